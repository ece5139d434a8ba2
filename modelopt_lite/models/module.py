"""The class swap that turns a model's attention module into a sparse one, and what a call of it does."""

from __future__ import annotations

import copyreg
import functools
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypeVar, cast
from weakref import WeakSet

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.module import _has_any_global_hook as any_global_hook

from ..errors import UnsupportedError
from ..methods import SparseAttentionMethod
from ..plan import DENSE, AttentionPlan
from .recomputation import Decision, Observer, checkpoints, forbid, may_be_checkpointed, record, recorded

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class SparseAttentionFlags:
    """What one attention module has been told, and what is known of its calls.

    All threads share it. What a single call does depends on the caller's context as well: see :func:`decide`.

    Attributes:
        name: the module's dotted name in its model.
        method: its sparsity method.
        sparse_plan: the method's plan.
        enabled: whether the method applies; if not, the module is dense.
        active: whether its last eager forward called this package's attention; None before the first.
        reported: whether a forward without such a call has been reported.
        last_call: an object that each eager call of this package's attention replaces.
        reached: whether a traced forward has; a graph knows no threads.
        dense_blocks: how many blocks of :func:`run_dense` are open in any context, for traced graphs, which cannot read
            context variables.
        counters: what the open blocks of :func:`count` fill, in any context, likewise.
        is_sharded: whether calls need to be told how the tokens are divided among processes.
        checkpoints: PyTorch's objects for the checkpoints that will run a call again.
        dense_decision: what a dense call does that nobody observes.
        sparse_decision: what a sparse one does.
        leaves_dense: whether prefills may be left to PyTorch's attention while the module is switched off.
        leaves_prefill: whether they may be in any case, as the plan keeps every key.
        leaves_decode: whether decode steps may be in any case.
    """

    name: str
    method: SparseAttentionMethod
    sparse_plan: AttentionPlan
    enabled: bool
    active: bool | None = None
    reported: bool = False
    last_call: object = None
    reached: bool = False
    dense_blocks: int = 0
    counters: tuple[Observer, ...] = ()
    is_sharded: bool = False
    checkpoints: WeakSet[Any] = field(default_factory=WeakSet)
    dense_decision: Decision = field(init=False)
    sparse_decision: Decision = field(init=False)
    leaves_dense: bool = field(init=False)
    leaves_prefill: bool = field(init=False)
    leaves_decode: bool = field(init=False)

    def __post_init__(self) -> None:
        """Make the decisions of nearly all calls once."""
        backend = self.method.backend
        self.dense_decision = Decision(False, DENSE, backend)
        self.sparse_decision = Decision(True, self.sparse_plan, backend)
        self.leaves_dense = backend == "auto"
        self.leaves_prefill = self.leaves_dense and self.sparse_plan.is_dense
        self.leaves_decode = self.leaves_dense and (self.sparse_plan.is_dense or not self.sparse_plan.sparse_decode)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy starts with; it makes the plan anew and knows nothing of calls that are running."""
        return {name: getattr(self, name) for name in ("name", "method", "enabled", "active", "reported")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a copy."""
        vars(self).update(vars(SparseAttentionFlags(sparse_plan=state["method"].shared_plan(), **state)))


class CallerState(NamedTuple):
    """What blocks that are open in a context change.

    Attributes:
        dense: the modules that :func:`run_dense` makes dense, by their flags.
        counters: what :func:`count` fills.
    """

    dense: frozenset[SparseAttentionFlags] = frozenset()
    counters: Mapping[SparseAttentionFlags, Observer] = MappingProxyType({})


caller_state: ContextVar[CallerState | None] = ContextVar("modelopt_lite_state", default=None)
"""None where no block is open, as nearly always: one look-up is all that a layer can afford."""
_followers: ContextVar[tuple[SparseAttentionModule, ...]] = ContextVar("modelopt_lite_followers", default=())
_lock = threading.Lock()
_MODULE_CALL = nn.Module.__call__
_CALLS = ("__call__", "_wrapped_call_impl", "_call_impl")
"""What PyTorch goes through from a call of a module to its forward."""


class SparseAttentionModule(nn.Module):
    """Mixed in before a model's own attention class, which keeps its forward, its parameters and their names.

    Made by :func:`convert` and undone by :func:`revert`, never instantiated.

    Attributes:
        model_class: the model's own class.
        sparse_attention: the module's flags.
        call_context: the context whose state calls follow in every thread; None: the caller's.
        is_called_plainly: whether the model's own class is called as any other module.
    """

    model_class: ClassVar[type[nn.Module]]
    sparse_attention: SparseAttentionFlags
    call_context: Context | None = None
    is_called_plainly: ClassVar[bool] = False

    # Hooks would see the same, but cost several times as much.
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, and report once if its forward does not call this package's attention."""
        if is_dynamo_compiling():
            flags = self.sparse_attention
            # In a traced graph whose activations are checkpointed, flags must be in the end as they were before.
            before, flags.reached = flags.reached, False
            output = super().__call__(*args, **kwargs)
            if flags.enabled and not flags.dense_blocks and not flags.reached:
                _warn_of_bypass(flags.name, original_class(self).__name__)
            flags.reached = before
            return output
        own = self.__dict__  # PyTorch looks attributes of modules up slowly
        flags = own["sparse_attention"]
        last_call = flags.last_call
        if (
            self.is_called_plainly
            and not (own["_forward_pre_hooks"] or own["_forward_hooks"])
            and not (own["_backward_pre_hooks"] or own["_backward_hooks"])
            and not any_global_hook()
            and own.get("_compiled_call_impl") is None
            # Tracers, such as that of torch.export, put a function of their own there.
            and nn.Module.__call__ is _MODULE_CALL
            and not torch._C._get_tracing_state()
        ):
            # All that it would do, in two functions less.
            output = self.forward(*args, **kwargs)
        else:
            output = super().__call__(*args, **kwargs)
        # A call in another thread may hide that there was none in this one, but never seem to be missing.
        if flags.last_call is not last_call or flags.reached:
            flags.active = True
        else:
            self._note_bypass(flags)
        return output

    def _note_bypass(self, flags: SparseAttentionFlags) -> None:
        """Note that a forward did not call this package's attention, and report it once."""
        flags.active = False
        if not flags.reported and present_decision(self).is_on:
            with _lock:
                is_new, flags.reported = not flags.reported, True
            if is_new:
                _warn_of_bypass(flags.name, original_class(self).__name__)

    def extra_repr(self) -> str:
        """Add the method to what ``print(model)`` shows."""
        flags = self.sparse_attention
        settings = ", ".join(f"{key}={value!r}" for key, value in flags.method.settings().items())
        sparse = f"sparse_attention={flags.method.method}({settings}){'' if flags.enabled else ' (off)'}"
        return ", ".join(part for part in (super().extra_repr(), sparse) if part)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Tell pickle how to make the module's class, which no import can find."""
        reduced = super().__reduce_ex__(protocol)
        if "model_class" not in vars(type(self)) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        return (_new_module, type(self).__bases__, *reduced[2:])

    def _replicate_for_data_parallel(self) -> Any:
        """Return a replica, as :class:`torch.nn.DataParallel` asks for; it runs in a thread with no context."""
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.call_context = copy_context()
        return replica


@functools.cache
def _sparse_class(mixin: Any, cls: Any) -> type[SparseAttentionModule]:
    attributes = {
        "__module__": cls.__module__,
        "model_class": cls,
        "is_called_plainly": all(getattr(cls, name) is getattr(nn.Module, name) for name in _CALLS),
    }
    return type(f"Sparse{cls.__name__}", (mixin, cls), attributes)


def _new_module(mixin: Any, cls: Any) -> SparseAttentionModule:
    """Return a sparse module without its state, which pickle and copy fill in."""
    made = _sparse_class(mixin, cls)
    return made.__new__(made)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the model's own class of a module, sparse or not."""
    return type(module).model_class if isinstance(module, SparseAttentionModule) else type(module)


def convert(
    module: nn.Module, flags: SparseAttentionFlags, mixin: type[SparseAttentionModule] = SparseAttentionModule
) -> None:
    """Make a dense attention module sparse."""
    bases: tuple[Any, Any] = (mixin, type(module))
    module.__class__ = _sparse_class(*bases)
    cast(SparseAttentionModule, module).sparse_attention = flags


def _warn_of_bypass(name: str, class_name: str) -> None:
    logger.warning(
        "%s (%s) is matched and switched on, but its forward did not call this package's attention: it was dense",
        name,
        class_name,
    )


# The compiler calls it while it traces, once for each graph.
torch.compiler.assume_constant_result(_warn_of_bypass)


def decide(module: nn.Module, is_decode: bool = False) -> Decision:
    """Return what a call of an attention module does, and note that its forward has made the call.

    That follows from the module's flags and the caller's context. What gradient checkpointing runs again does what its
    first run did, whatever has changed since.

    Args:
        module: the attention module; one that is not sparse is dense.
        is_decode: whether the call has single queries, for which it makes no difference to be run again.
    """
    flags = module.sparse_attention if isinstance(module, SparseAttentionModule) else None
    if torch.compiler.is_compiling():
        if flags is None:
            return Decision()
        if torch.compiler.is_dynamo_compiling():
            flags.reached = True
        else:
            flags.last_call = object()
        return _observed(flags, flags.dense_blocks > 0, flags.counters[-1] if flags.counters else None)
    if flags is not None:
        flags.last_call = object()
    if is_decode and not torch.is_grad_enabled():
        return present_decision(module)
    around = checkpoints() if may_be_checkpointed() else []
    decision = recorded(module, around) if around else None
    if decision is None:
        decision = present_decision(module)
    if around:
        runs = record(module, decision, around)
        if flags is not None:
            flags.checkpoints.update(runs)
    return decision


def present_decision(module: nn.Module) -> Decision:
    """Return what a call of a module would do now."""
    if not isinstance(module, SparseAttentionModule):
        return Decision()
    flags, context = module.sparse_attention, module.call_context
    state = caller_state.get() if context is None else context.get(caller_state)
    if state is not None:
        return _observed(flags, flags in state.dense, state.counters.get(flags))
    return flags.sparse_decision if flags.enabled else flags.dense_decision


def _observed(flags: SparseAttentionFlags, is_dense: bool, observer: Observer | None) -> Decision:
    decision = flags.sparse_decision if flags.enabled and not is_dense else flags.dense_decision
    # Where there is nothing to replace, a compiled call would check that replacing is what it was.
    return decision if observer is None or not decision.is_on else decision._replace(statistics=observer)


@contextmanager
def run_dense(modules: Sequence[SparseAttentionModule]) -> Iterator[None]:
    """Make calls of modules dense inside the ``with`` block, in the caller's context."""
    flags = [module.sparse_attention for module in modules]
    for each in flags:
        with _lock:
            each.dense_blocks += 1
    try:
        state = caller_state.get() or CallerState()
        with _setting(caller_state, state._replace(dense=state.dense | frozenset(flags))):
            yield
    finally:
        for each in flags:
            with _lock:
                each.dense_blocks -= 1


@contextmanager
def count(counters: Mapping[SparseAttentionModule, Observer]) -> Iterator[None]:
    """Count calls of modules inside the ``with`` block, in the caller's context."""
    by_flags = {module.sparse_attention: statistics for module, statistics in counters.items()}
    for flags, statistics in by_flags.items():
        with _lock:
            flags.counters = (*flags.counters, statistics)
    try:
        state = caller_state.get() or CallerState()
        with _setting(caller_state, state._replace(counters={**state.counters, **by_flags})):
            yield
    finally:
        for flags, statistics in by_flags.items():
            with _lock:
                flags.counters = tuple(x for x in flags.counters if x is not statistics)


@contextmanager
def follow(modules: Sequence[SparseAttentionModule]) -> Iterator[None]:
    """Let calls of modules follow the caller's context inside the ``with`` block, in whatever thread they run."""
    try:
        with _setting(_followers, (*_followers.get(), *modules)):
            yield
    finally:
        for module in modules:
            vars(module).pop("call_context", None)


@contextmanager
def _setting(variable: ContextVar[T], value: T) -> Iterator[None]:
    token = variable.set(value)
    _refresh_followers()
    try:
        yield
    finally:
        variable.reset(token)
        _refresh_followers()


def _refresh_followers() -> None:
    for module in _followers.get():
        module.call_context = copy_context()


def check_revertible(model: nn.Module) -> None:
    """Check that each of a model's sparse attention modules can be given back its own class.

    Raises:
        UnsupportedError: if something else has swapped a module's class since, as ``fully_shard`` does; names it.
    """
    for name, module in sparse_modules(model).items():
        if "model_class" not in vars(type(module)):
            raise UnsupportedError(
                f"{name} ({original_class(module).__name__}): its sparsity cannot be undone, because something else, "
                f"such as fully_shard, has made it a {type(module).__name__}; undo that first, or do it before sparsify"
            )


def revert(module: SparseAttentionModule) -> SparseAttentionFlags:
    """Give an attention module back its own class; return the flags it had."""
    flags = module.sparse_attention
    del module.sparse_attention
    vars(module).pop("call_context", None)
    cast(nn.Module, module).__class__ = original_class(module)
    return flags


def forbid_recomputation(module: nn.Module, flags: SparseAttentionFlags) -> None:
    """Let the backward pass of checkpointed calls that a reverted module has made raise an error that says why."""
    for run in list(flags.checkpoints):
        forbid(
            module,
            run,
            f"{flags.name} ({original_class(module).__name__}): gradient checkpointing computes its attention again, "
            "but the layer is no longer sparse; call backward() before unsparsify or sparsify",
        )


def sparse_modules(model: nn.Module) -> dict[str, SparseAttentionModule]:
    """Return a model's sparse attention modules by dotted name, in the order of ``model.named_modules()``.

    Written out, as it is done in the time of a short forward pass.
    """
    found: dict[str, SparseAttentionModule] = {}
    seen: set[nn.Module] = set()
    stack = [("", model)]
    while stack:
        prefix, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        if isinstance(module, SparseAttentionModule):
            found[prefix[:-1]] = module
        for name, child in reversed(module._modules.items()):
            if child is not None and (child._modules or isinstance(child, SparseAttentionModule)):
                stack.append((f"{prefix}{name}.", child))
    return found
