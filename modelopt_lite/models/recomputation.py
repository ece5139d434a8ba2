"""What gradient checkpointing runs a second time, and what was decided the first time.

A checkpoint runs a part of a model in the forward pass, and again in the backward pass. By then the state that decides
what the attention does may have changed, but gradients are right only if the second run does what the first one did.

PyTorch does not tell a function that it is run again. The checkpoints around a call are therefore found by what PyTorch
puts around it: saved-tensor hooks (``use_reentrant=False``), or the context of an autograd function on the stack
(``use_reentrant=True``, and the checkpoints of other libraries). Both hold an object that belongs to one run and its
repetitions. That object carries the record of what was decided, and the record lives as long as it does.
"""

from __future__ import annotations

import inspect
import sys
from collections import defaultdict
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.utils.checkpoint import _checkpoint_hook, _recomputation_hook

from ..errors import UnsupportedError
from ..plan import DENSE, AttentionPlan

if TYPE_CHECKING:
    from ..kernels import AttentionRequest, Backend

_RECORD = "_attention_decisions"


class Observer(Protocol):
    """Looks at the prefills of one layer, for example to count what they keep."""

    def observe(self, request: AttentionRequest) -> AttentionRequest:
        """Look at a call that has not been computed yet, and return the one to compute."""


class _Silent:
    """The observer of what is run again: it counts nothing, and calls take the way of observed ones."""

    def observe(self, request: AttentionRequest) -> AttentionRequest:
        """Return the call."""
        return request


class Decision(NamedTuple):
    """What one call of an attention module does.

    Attributes:
        is_on: whether the module is sparse and switched on.
        plan: what the kernels run.
        backend: which kernels run it.
        statistics: what observes prefills, or None.
    """

    is_on: bool = False
    plan: AttentionPlan = DENSE
    backend: Backend = "auto"
    statistics: Observer | None = None


class Checkpoint(NamedTuple):
    """A checkpoint around a call.

    Attributes:
        run: PyTorch's object for it, the same in the forward pass and in the backward pass.
        is_repeated: whether this is the run in the backward pass.
    """

    run: Any
    is_repeated: bool


class _Record:
    """What the calls of attention modules in one checkpoint decided, in their order."""

    def __init__(self) -> None:
        self.decisions: defaultdict[nn.Module, list[Decision]] = defaultdict(list)
        self.backward = -1
        self.repeated: defaultdict[nn.Module, int] = defaultdict(int)

    def next(self, module: nn.Module) -> Decision:
        """Return what the module's next call decided; dense if it decided nothing, as it was not sparse then."""
        backward = torch._C._current_graph_task_id()
        if backward != self.backward:  # another backward pass over the same graph starts from the first call
            self.backward = backward
            self.repeated.clear()
        found = self.decisions.get(module, [Decision()])
        index = self.repeated[module]
        self.repeated[module] += 1
        return found[min(index, len(found) - 1)]


def may_be_checkpointed() -> bool:
    """Whether there can be a checkpoint around the caller: not where nothing records gradients."""
    return torch.is_grad_enabled() or is_in_function()


def is_in_function() -> bool:
    """Whether the caller may be in the forward of an autograd function, or in a backward pass."""
    if torch._C._current_graph_task_id() != -1:
        return True
    # Such a forward runs without forward-mode gradients, in which no_grad() alone does not differ.
    return not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()


def checkpoints() -> list[Checkpoint]:
    """Return the checkpoints around the caller, innermost first."""
    return [*_by_hooks(), *_by_stack()]


def recorded(module: nn.Module, around: list[Checkpoint]) -> Decision | None:
    """Return what a call that is run again decided the first time, None if it is the first time."""
    for checkpoint in around:
        if checkpoint.is_repeated:
            record: _Record = vars(checkpoint.run).get(_RECORD) or _Record()
            return record.next(module)
    return None


def record(module: nn.Module, decision: Decision, around: list[Checkpoint]) -> list[Any]:
    """Record what a call decided in the checkpoints that will run it again; return PyTorch's objects for these.

    The second run counts no statistics, as the first one has.
    """
    runs = [checkpoint.run for checkpoint in around if not checkpoint.is_repeated]
    again = decision if decision.statistics is None else decision._replace(statistics=_Silent())
    for run in runs:
        vars(run).setdefault(_RECORD, _Record()).decisions[module].append(again)
    return runs


def forbid(module: nn.Module, run: Any, message: str) -> None:
    """Let a checkpoint's second run raise an error, unless it has taken place or has no call of the module.

    Raises:
        UnsupportedError: in the backward pass, with the message.
    """

    def refuse(*_: Any) -> None:
        raise UnsupportedError(message)

    found: _Record = vars(run)[_RECORD]
    if module not in found.decisions or module in found.repeated:
        return
    if isinstance(run, BackwardCFunction):
        run.register_prehook(refuse)
    else:
        run.recompute_fn = refuse


def _pack_hook(cls: type) -> CodeType | None:
    """Return the code that a kind of saved-tensor hooks runs to save a tensor."""
    constants = cls.__init__.__code__.co_consts  # type: ignore[misc]
    return next((x for x in constants if isinstance(x, CodeType) and x.co_name == "pack_hook"), None)


_FIRST_RUN, _SECOND_RUN = _pack_hook(_checkpoint_hook), _pack_hook(_recomputation_hook)


def _by_hooks() -> Iterator[Checkpoint]:
    """Yield the checkpoints whose saved-tensor hooks are in force."""
    hooks: Any = torch._C._autograd
    if hooks._top_saved_tensors_default_hooks(True) is None:
        return
    if hooks._saved_tensors_hooks_get_disabled_error_message() is not None:
        return
    # PyTorch shows only the innermost ones.
    pairs = []
    while (pair := hooks._top_saved_tensors_default_hooks(True)) is not None:
        pairs.append(pair)
        hooks._pop_saved_tensors_default_hooks()
    for pair in reversed(pairs):
        hooks._push_saved_tensors_default_hooks(*pair)
    for pack, _ in pairs:
        function: Any = inspect.unwrap(pack)
        code = getattr(function, "__code__", None)
        if code is not None and code is _FIRST_RUN:
            yield Checkpoint(_closed_over(function, "frame"), False)
        elif code is not None and code is _SECOND_RUN:
            yield Checkpoint(_closed_over(function, "target_frame_ref")(), True)


def _closed_over(function: Any, name: str) -> Any:
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _by_stack() -> Iterator[Checkpoint]:
    """Yield the autograd functions in whose forward or backward the caller is."""
    if not is_in_function():
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name in ("forward", "backward") and code.co_varnames[:1] == ("ctx",):
            context = frame.f_locals.get("ctx")
            if isinstance(context, BackwardCFunction):
                yield Checkpoint(context, code.co_name == "backward")
        frame = frame.f_back
