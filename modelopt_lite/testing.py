"""Checks a sparsity method against the whole contract, for those who write one."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from .config import SparsityConfig
from .errors import ConfigError, UnsupportedError
from .kernels import AttentionRequest, choice, compute, request_statistics, select_blocks
from .kernels.arguments import check_rule, describe
from .kernels.blocks import BlockGrid
from .kernels.language import tl
from .kernels.reference import SequenceBlocks, attention_reference, kept_scores, listed_blocks, selected_blocks
from .kernels.request import HookRefusedError
from .kernels.top_n import keep_top_n
from .methods import Combined, SparseAttentionMethod
from .plan import DENSE, AttentionPlan, BlockSelector, canonical_name, plan_by_name
from .registry import get_sparse_method, method_names

if tl is not None:
    from .kernels.portable import launch as portable_launch
    from .kernels.settings import Settings

EXEMPTIONS = ((0, 0), (3, 5))
"""Sink tokens and dense window that kernels are checked with; a short sequence has nothing but a long window."""
NEAR_TIE = 1e-5
"""Relative change of queries and keys below which a choice of blocks may be decided by FP32 rounding."""
TORCH = "PyTorch operations"
MAX_SENTENCES = 5
"""How many places of one kind are named."""
CHILD = """
import importlib, sys
from modelopt_lite import testing
testing.PARTS.clear()  # a module that calls check_method would start yet another process
for module in sys.argv[2:]:
    importlib.import_module(module)
print(testing.fingerprint(sys.argv[1]))
"""
"""What another process runs: the name of a plan and the modules that define its method lead to its fingerprint."""


@dataclass(frozen=True)
class ContractReport:
    """What :func:`check_method` checked.

    Attributes:
        method: the method's instance.
        checked: the parts of the contract.
        not_run: what could not be checked on this machine or with this method, and why.
    """

    method: SparseAttentionMethod
    checked: tuple[str, ...]
    not_run: dict[str, str]

    def __str__(self) -> str:
        """List what was checked and what was not."""
        lines = [f"{self.method!r} meets the contract: {', '.join(self.checked)}"]
        return "\n".join([*lines, *(f"not run: {name}: {reason}" for name, reason in self.not_run.items())])


def check_method(
    method: type[SparseAttentionMethod] | SparseAttentionMethod, *, other_process: bool = True
) -> ContractReport:
    """Check a method against the whole contract of :doc:`semantics`: its configuration, its rule, and every kernel.

    The FP64 reference is compared with every kernel that this machine can run: PyTorch operations; Triton kernels on a
    GPU, or in Triton's interpreter if ``TRITON_INTERPRET=1`` is set before Triton is imported. Output, gradients and
    statistics may differ by no more than twice the error of PyTorch's own attention in the same precision.

    Args:
        method: a method's class, which is checked with its default settings, or an instance.
        other_process: whether to make the plan in another Python process, too, which takes some seconds to start.

    Returns:
        What was checked, and what could not be checked on this machine.

    Raises:
        AssertionError: if the method breaks the contract; the message says which part of it and how. Parts that follow
            the one that failed have not been checked.
        TypeError: if ``method`` is not a method.
    """
    if isinstance(method, type) and issubclass(method, SparseAttentionMethod):
        cls = method
        try:
            method = method()  # type: ignore[call-arg] # which a subclass gives a default
        except ConfigError as error:
            raise TypeError(
                f"{cls.__name__} cannot be made from its defaults alone ({error}); give check_method an instance"
            ) from error
    elif not isinstance(method, SparseAttentionMethod):
        raise TypeError(f"{method!r} is not a method; give a subclass of SparseAttentionMethod, or an instance of one")
    subject = _Subject(method, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    checked: list[str] = []
    for part, check in PARTS.items():
        if check is _check_other_process and not other_process:
            continue
        cause: Exception | None = None
        problems: list[str] = []
        try:
            problems.extend(check(subject))
        except _BrokenContractError as error:
            problems.append(str(error))
            cause = error
        if problems:
            before = f"\nchecked before without a failure: {', '.join(checked)}" if checked else ""
            raise AssertionError(f"{method!r} breaks the contract, {part}:\n{_bullets(problems)}{before}") from cause
        checked.append(part)
    return ContractReport(method, tuple(checked), subject.not_run)


class _BrokenContractError(Exception):
    """Something is wrong in a way that leaves nothing else to check in the same part."""


@dataclass
class _Subject:
    """A method under check.

    Attributes:
        method: the instance.
        device: where it is checked.
        not_run: what could not be checked, and why.
    """

    method: SparseAttentionMethod
    device: torch.device
    not_run: dict[str, str] = field(default_factory=dict)

    @functools.cached_property
    def plan(self) -> AttentionPlan:
        """The method's plan."""
        return self.method.plan()

    @functools.cached_property
    def plans(self) -> tuple[AttentionPlan, ...]:
        """The plans that kernels run: on the smallest grid, with few exempt keys, so that short sequences tell much."""
        return _with_exemptions(_on_small_grid(self.method).plan())

    def kernel_requests(self) -> Iterator[AttentionRequest]:
        """Yield batches whose plans, head dimensions and types reach every kernel there is on a device.

        Each new one compiles kernels, so types and exemptions are not all tried together.
        """
        bare, exempt = self.plans
        if self.device.type == "cpu":  # Triton's interpreter is slow, and has no BF16
            for plan in (bare, exempt):
                yield _request(plan, _ragged(plan), self.device, heads=(2, 1))
            return
        # Some kernels run blocks of the usual size alone.
        own_bare, own_exempt = _with_exemptions(self.plan)
        for plan, dim, dtype in (
            (own_bare, 128, torch.bfloat16),
            (own_exempt, 128, torch.bfloat16),
            (exempt, 64, torch.float16),
            (exempt, 32, torch.float32),
        ):
            yield _request(plan, _ragged(plan), self.device, dim=dim, dtype=dtype)

    def selectors(self) -> Iterator[AttentionPlan]:
        """Yield plans of the selector alone: on the small grid and, if that is another one, on that of its settings."""
        if self.plan.blocks is not None:
            yield AttentionPlan(blocks=self.plans[0].blocks)
            if self.plans[0].blocks != self.plan.blocks:
                yield AttentionPlan(blocks=self.plan.blocks)


def _with_exemptions(plan: AttentionPlan) -> tuple[AttentionPlan, ...]:
    return tuple(
        dataclasses.replace(plan, num_sink_tokens=sinks, dense_window_size=window) for sinks, window in EXEMPTIONS
    )


def _on_small_grid(method: SparseAttentionMethod) -> SparseAttentionMethod:
    """Return the method with small blocks, if it has settings for them that allow that."""
    if isinstance(method, Combined):
        return Combined(methods=tuple(_on_small_grid(part) for part in method.methods))
    if not {"block_size", "block_rows"} <= set(type(method).model_fields):
        return method
    try:
        return type(method).model_validate({**method.model_dump(), "block_size": 16, "block_rows": 32})
    except ValueError:
        return method


# The parts of the contract. Each yields sentences that say what is wrong.


def _check_configuration(subject: _Subject) -> Iterator[str]:
    method, cls = subject.method, type(subject.method)
    try:
        name = method_names(cls)[0]
        registered = get_sparse_method(name)
    except (TypeError, ConfigError) as error:
        reason = f"{error}; write @register_sparse_method before the class" if isinstance(error, ConfigError) else error
        raise _BrokenContractError(str(reason)) from error
    if registered is not cls:
        raise _BrokenContractError(
            f"{name!r} is the name of another class, {registered.__module__}.{registered.__name__}"
        )
    for setting, why in (("frozen", "equal configurations share one plan"), ("strict", "values are never converted")):
        if not cls.model_config.get(setting):
            yield f"model_config has {setting}=False; leave it at True, because {why}"
    if cls.model_config.get("extra") != "forbid":
        yield "model_config lets unknown fields pass; leave extra='forbid', so that a misspelt setting is refused"
    entry = method.model_dump(mode="json")
    try:
        text = json.dumps({"sparse_cfg": {"*": entry}}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise _BrokenContractError(f"its settings {entry} cannot be written as JSON: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        files = {"JSON": Path(folder, "config.json"), "YAML": Path(folder, "config.yaml")}
        files["JSON"].write_text(text, encoding="utf-8")
        files["YAML"].write_text(yaml.safe_dump(json.loads(text)), encoding="utf-8")
        for kind, file in files.items():
            try:
                found = SparsityConfig.load(file).sparse_cfg["*"]
            except ConfigError as error:
                yield f"its settings do not load again from {kind}: {str(error).replace(str(file), file.name)}"
                continue
            if found != method:
                yield f"written to {kind} and loaded again, it is another configuration: {found!r}"


def _check_plan(subject: _Subject) -> Iterator[str]:
    method, where = subject.method, f"{type(subject.method).__name__}.plan()"
    plan = _called(where, method.plan)
    if not isinstance(plan, AttentionPlan):
        raise _BrokenContractError(f"{where} returns {plan!r}; it must return an AttentionPlan")
    if plan.score_hook is not None and tl is not None and not hasattr(plan.score_hook, "fn"):
        yield f"{where}: score_hook is a plain function; write @jit of modelopt_lite.kernels.language before it"
    if plan.is_dense:
        return
    for name in ("num_sink_tokens", "dense_window_size"):
        found, wanted = getattr(plan, name), getattr(method, name)
        if found != wanted:
            yield f"{where} has {name} = {found}, and the configuration {wanted}; hand it on with {name}=self.{name}"
    again = SparsityConfig.load({"sparse_cfg": {"*": method.model_dump(mode="json")}}).sparse_cfg["*"]
    if isinstance(again, SparseAttentionMethod) and again.shared_plan() is not method.shared_plan():
        yield "an equal configuration has a plan of another name; identity() must depend on the settings alone"


def _check_rule(subject: _Subject) -> Iterator[str]:
    plan = subject.plan
    if plan.keep is None:
        return
    where = _name_of(plan.keep)
    for dtype in (torch.float32, torch.float64):
        for leading in ((), (2,), (2, 3)):
            scores, q_pos, k_pos = _groups(plan.group, leading, dtype, subject.device)
            before = scores.clone()
            found = _called(where, plan.keep, scores, q_pos, k_pos)
            _refuse(where, found, torch.bool, scores.shape, scores.device, "the shape of the scores")
            if not torch.equal(scores, before):
                raise _BrokenContractError(f"{where} changes the scores that it is given; it must work on a copy")
    on_meta = (x.to("meta") for x in _groups(plan.group, (2,), torch.float32, subject.device))
    try:
        found = plan.keep(*on_meta)
    except Exception as error:  # the method's own code may raise anything
        raise _BrokenContractError(
            f"{where} fails on tensors of a device without values ({_brief(error)}); make tensors with "
            "device=scores.device, and read no value back, because that waits for the GPU"
        ) from error
    if found.device.type != "meta":
        yield f"{where} returns a tensor on {found.device} for scores on another device; use device=scores.device"
    try:
        check_rule(plan, subject.device)
    except UnsupportedError as error:
        yield str(error).replace("the rule of the plan", where)


def _check_promises(subject: _Subject) -> Iterator[str]:
    plan = subject.plan
    if plan.keep is None:
        return
    where, (scores, q_pos, k_pos) = _name_of(plan.keep), _groups(plan.group, (4,), torch.float32, subject.device, 40)
    visible = scores > -torch.inf
    kept = plan.keep(scores.clone(), q_pos, k_pos) & visible
    if plan.keeps_group_max:
        is_largest = visible & (scores == scores.amax(-1, keepdim=True))
        if not bool(((is_largest & kept).any(-1) | ~visible.any(-1)).all()):
            yield f"the plan promises keeps_group_max, and {where} drops the largest score of a group"
    if plan.scale_free:
        for factor in (0.25, 8.0):
            if not torch.equal(plan.keep(scores * factor, q_pos, k_pos) & visible, kept):
                yield f"the plan promises scale_free, and {where} keeps other keys if all scores are times {factor}"
    if plan.keeps_nothing and bool(kept.any()):
        yield f"the plan promises keeps_nothing, and {where} keeps a score"
    if plan.keeps_top and not torch.equal(keep_top_n(scores, q_pos, k_pos, n=plan.keeps_top) & visible, kept):
        yield f"the plan promises keeps_top = {plan.keeps_top}, and {where} does not keep the largest of each group"


def _check_selector(subject: _Subject) -> Iterator[str]:
    """Check what the functions of a block selector return, and that they depend on nothing else."""
    for plan in subject.selectors():
        selector = _selector_of(plan)
        request = _request(plan, [_longest(plan)], subject.device)
        _check_reference_scores(request, selector)
        _check_choose(request, selector)
        yield from _check_heads_and_chunks(request, selector)


def _check_reference_scores(request: AttentionRequest, selector: BlockSelector) -> None:
    where, view = _name_of(selector.reference), _view(request)
    seen, _ = _seen_and_forced(request, selector)
    shape = (request.q.shape[1], *seen.shape)
    found = _called(where, selector.reference, view)
    _refuse(where, found, torch.float64, shape, view.q.device, "[query_heads, query_blocks, key_blocks]")
    _refuse_nan(where, found, seen)
    if not torch.equal(_called(where, selector.reference, view).nan_to_num(), found.nan_to_num()):
        raise _BrokenContractError(f"{where} returns other scores when it is called again with the same view")
    if not torch.equal(view.q, _view(request).q) or not torch.equal(view.k, _view(request).k):
        raise _BrokenContractError(f"{where} changes the queries or keys of its view; it must work on a copy")


def _check_choose(request: AttentionRequest, selector: BlockSelector) -> None:
    where, (seen, forced) = _name_of(selector.choose), _seen_and_forced(request, selector)
    scores = selector.reference(_view(request)).masked_fill(~seen, 0.0)
    free = seen & ~forced

    def chosen(scores: Tensor, rows: slice = slice(None), columns: int = 0) -> Tensor:
        wide = [pad(x[rows], (0, columns)) for x in (seen, forced)]
        scores, before = scores.clone(), scores
        found: Tensor = _called(where, selector.choose, scores, *wide)
        _refuse(where, found, torch.bool, scores.shape, scores.device, "the shape of the scores")
        if not torch.equal(scores.nan_to_num(), before.nan_to_num()):
            raise _BrokenContractError(f"{where} changes the scores that it is given; it must work on a copy")
        return found

    whole = chosen(scores) & free
    chosen(scores.float())
    others = {
        "when it is called again with the same scores": chosen(scores),
        "if blocks that no query sees have other scores, which may be anything": chosen(
            scores.masked_fill(~seen, torch.nan)
        ),
        "if there are more key blocks that no query sees, as in a batch": chosen(pad(scores, (0, 3)), columns=3)[
            ..., :-3
        ],
        "if it sees fewer heads at a time": torch.cat([chosen(part) for part in scores.split(1)]),
        "if it sees fewer query blocks at a time": torch.cat(
            [chosen(scores[:, i : i + 1], slice(i, i + 1)) for i in range(len(seen))], 1
        ),
    }
    for when, found in others.items():
        if not torch.equal(found & free, whole):
            raise _BrokenContractError(f"{where} keeps other blocks {when}")


def _check_heads_and_chunks(request: AttentionRequest, selector: BlockSelector) -> Iterator[str]:
    where, repeat = _name_of(selector.reference), request.q.shape[1] // request.k.shape[1]
    whole, is_stable = _chosen_by_reference(request, selector)
    q, k, v = request.q, request.k, request.v
    one = request._replace(q=q[:, :repeat], k=k[:, :1], v=v[:, :1])
    found, _ = _chosen_by_reference(one, selector)
    if not torch.equal(found & is_stable[: len(found)], (whole & is_stable)[: len(found)]):
        yield f"{where} looks at other heads: with one key/value head and its queries alone, other blocks are kept"
    if not selector.per_kv_head:
        repeated = request._replace(k=k.repeat_interleave(repeat, 1), v=v.repeat_interleave(repeat, 1))
        found, _ = _chosen_by_reference(repeated, selector)
        if not torch.equal(found & is_stable, whole & is_stable):
            yield f"{where} is wrong about query heads that share keys: with copies of the keys, other blocks are kept"
    length, rows, size = request.max_q, selector.block_rows, selector.block_size
    tokens = next(request.sequences()).queries
    q, k = q[tokens], k[tokens]
    for start, stop in ((0, 2 * rows), (2 * rows, 3 * rows), (3 * rows, length)):
        chunk = _request(request.plan, [(stop - start, stop)], q.device)
        chunk = chunk._replace(q=_copied(chunk.q, q[start:stop]), k=_copied(chunk.k, k[:stop]))
        found, _ = _chosen_by_reference(chunk, selector)
        wanted, is_sure = (x[:, start // rows : -(-stop // rows), : -(-stop // size)] for x in (whole, is_stable))
        if not torch.equal(found & is_sure, wanted & is_sure):
            yield (
                f"{where} or {_name_of(selector.choose)} keeps other blocks if the prefill comes in chunks, as for the "
                f"queries {start} to {stop - 1} of {length} in a call of their own; a choice may depend only on the "
                "queries of the block and the keys that they see"
            )
            return


def _check_fast_scores(subject: _Subject) -> Iterator[str]:
    """Compare the fast form of a selector with its reference, in every kind of batch."""
    for plan in subject.selectors():
        selector = _selector_of(plan)
        for case, request in _selector_cases(plan, subject.device):
            if selector.scores is not None:
                _check_scores(case, request, selector)
            yield from _check_selected(case, request, selector)
        if selector.scores is None:
            subject.not_run["the fast form"] = "the method has reference_scores() alone, which is slow on a GPU"
            return
        yield from _check_without_values(request, selector)


def _check_scores(case: str, request: AttentionRequest, selector: BlockSelector) -> None:
    assert selector.scores is not None
    where, grid, before = f"{_name_of(selector.scores)}, {case}", _grid(request), (request.q.clone(), request.k.clone())
    found = _called(where, selector.scores, grid)
    shape = (request.q.shape[1], *grid.shape)
    _refuse(where, found, torch.float32, shape, request.q.device, "[query_heads, query_blocks, key_blocks]")
    _refuse_nan(where, found, grid.seen())
    for x, y in zip(before, (request.q, request.k), strict=True):
        if not torch.equal(x.nan_to_num(), y.nan_to_num()):
            raise _BrokenContractError(f"{where}: the queries or keys of the grid are changed; it must work on copies")


def _check_selected(case: str, request: AttentionRequest, selector: BlockSelector) -> Iterator[str]:
    """Compare what is selected for all sequences at once with the reference of each sequence."""
    found, starts = select_blocks(request).mask(), _grid(request).starts.tolist()
    places = []
    for number, (sequence, start) in enumerate(zip(request.sequences(), starts, strict=True)):
        view = SequenceBlocks.of(request, sequence)
        if min(len(view.q), len(view.k)) == 0 or request.is_decode(len(view.q)):
            continue
        wanted, is_stable = _stable_choice(view, selector)
        mine = found[:, start : start + wanted.shape[1], : wanted.shape[2]]
        places += [
            f"sequence {number}, head {head}, query block {row}, key block {column} is "
            + ("dropped" if mine[head, row, column] else "kept")
            for head, row, column in ((mine != wanted) & is_stable).nonzero().tolist()
        ]
    if places:
        fast = _name_of(selector.scores) if selector.scores is not None else "the selection"
        yield f"{fast} leads to other blocks than the reference, {case}: by the reference {_listed(places)}"


def _check_without_values(request: AttentionRequest, selector: BlockSelector) -> Iterator[str]:
    names = ("q", "k", "v", "starts_q", "lengths_q", "starts_k", "lengths_k", "first_q", "first_k")
    moved = {name: x.to("meta") for name in names if (x := getattr(request, name)) is not None}
    try:
        select_blocks(request._replace(**moved))
    except Exception as error:  # the method's own code may raise anything
        yield (
            f"{_name_of(selector.scores)} or {_name_of(selector.choose)} fails on tensors of a device without values "
            f"({_brief(error)}); make tensors on the device of the grid, and read no value back, because that waits "
            "for the GPU"
        )


def _check_kernels(subject: _Subject) -> Iterator[str]:
    """Compare every kernel's output with the reference, in batches with gaps, decode, chunks and shared keys."""
    ran: set[str] = set()
    refused: dict[str, str] = {}
    for request in subject.kernel_requests():
        listed, expected = _with_lists(request)
        for kernel in _kernels(request):
            # One kernel applies skip rules itself.
            given = listed if kernel.refusal(listed) is None else request
            reason = kernel.refusal(given)
            if reason is None:
                try:
                    yield from _check_output(kernel, given, expected)
                    ran.add(kernel.name)
                except HookRefusedError as error:
                    reason = str(error)
            if reason is not None:
                refused[kernel.name] = reason
    if ran == {TORCH}:
        refused = {"Triton kernels": next(iter(refused.values()), "Triton is not installed")}
    subject.not_run.update({name: reason for name, reason in refused.items() if name not in ran})


def _check_output(kernel: _KernelUnderTest, listed: AttentionRequest, expected: AttentionRequest) -> Iterator[str]:
    wanted, wanted_lse = attention_reference(expected)
    bound = _error_bound(_pytorch_attention(expected), wanted, listed.max_k)
    where = f"{kernel.name}, {_type_of(listed)}, {_exemptions(listed.plan)}"
    try:
        with _quiet():
            output, lse = kernel.run(listed.readable())
    except HookRefusedError:
        raise
    except Exception as error:  # the method's own code may raise anything
        raise _BrokenContractError(f"{where}: {_brief(error)}") from error
    yield from _compare(where, "the output", output, wanted, bound, _explain(kernel, listed, expected))
    if lse is not None and not torch.equal(lse.isfinite(), wanted_lse.isfinite()):
        yield f"{where}: other rows than in the reference keep no key at all"


def _check_gradients(subject: _Subject) -> Iterator[str]:
    for request in subject.kernel_requests():
        listed, expected = _with_lists(request)
        direction = torch.randn(request.q.shape, generator=torch.Generator().manual_seed(1)).to(request.q)

        def reference(request: AttentionRequest) -> Tensor:
            return attention_reference(request)[0]

        wanted = _gradients(reference, expected, direction, torch.float64)
        theirs = _gradients(_pytorch_attention, expected, direction, request.q.dtype)
        bounds = [_error_bound(x, y, request.max_k) for x, y in zip(theirs, wanted, strict=True)]
        for backend in ("torch", "triton"):
            if backend == "triton" and (choice.refusal(listed) is not None or not request.plan.dense_window_size):
                continue  # one kind of exemptions will do

            def attend(request: AttentionRequest, backend: Any = backend) -> Tensor:
                return compute(request, backend)[0]

            where = f"backend {backend!r}, {_type_of(request)}, {_exemptions(request.plan)}"
            try:
                with _quiet():
                    found = _gradients(attend, request, direction, request.q.dtype)
            except Exception as error:  # the method's own code may raise anything
                raise _BrokenContractError(f"{where}: {_brief(error)}") from error
            for name, mine, right, bound in zip("qkv", found, wanted, bounds, strict=True):
                yield from _compare(where, f"the gradient of {name}", mine, right, bound)


def _check_statistics(subject: _Subject) -> Iterator[str]:
    kept_at_all = dropped_at_all = False
    for plan in subject.plans:
        request = _request(plan, _ragged(plan), subject.device)
        _, expected = _with_lists(request)
        kept = visible = rows = 0
        mass = 0.0
        for number, sequence in enumerate(request.sequences()):
            seen = _kept(expected._replace(plan=DENSE, blocks=None), number)
            mine = _kept(expected, number)
            view = SequenceBlocks.of(request, sequence)
            weights = view.scores(view.q, view.k).masked_fill(~seen, -torch.inf).softmax(-1)
            rows, visible = rows + int(seen.any(-1).sum()), visible + int(seen.sum())
            kept, mass = kept + int(mine.sum()), mass + float(weights[mine].sum())
        found = request_statistics(request._replace(v=request.k))
        numbers = {"rows": rows, "visible": visible, "kept": kept}
        for name, wanted in numbers.items():
            if int(getattr(found, name)) != wanted:
                counted = int(getattr(found, name))
                yield f"{_exemptions(plan)}: statistics count {counted} {name}, the reference {wanted}"
        if not math.isclose(float(found.mass), mass, rel_tol=1e-5, abs_tol=1e-5):
            yield f"{_exemptions(plan)}: statistics have a mass of {float(found.mass):.6g}, the reference {mass:.6g}"
        kept_at_all, dropped_at_all = kept_at_all or kept > 0, dropped_at_all or kept < visible
    if not (kept_at_all and dropped_at_all) and not subject.plan.is_dense:
        what = "drops no score" if kept_at_all else "keeps no score"
        subject.not_run["what the rule decides"] = (
            f"it {what} of the random inputs; check an instance of other settings"
        )


def _check_other_process(subject: _Subject) -> Iterator[str]:
    parts = subject.method.methods if isinstance(subject.method, Combined) else (subject.method,)
    classes = [type(subject.method), *map(type, parts)]
    for cls in classes:
        if cls.__module__ == "__main__" or getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls:
            reason = f"{cls.__name__} is not defined at the top of a module that another process can import"
            subject.not_run["another process"] = reason
            return
    modules = list(dict.fromkeys(cls.__module__ for cls in classes))
    name = canonical_name(subject.method.identity())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", CHILD, name, *modules]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    last = done.stderr.strip().rpartition("\n")[2]
    if any(last == f"ModuleNotFoundError: No module named {module.partition('.')[0]!r}" for module in modules):
        subject.not_run["another process"] = f"which cannot import the module of the method ({last})"
    elif done.returncode:
        yield f"another process cannot make the plan {name}: {last}"
    elif done.stdout.strip().rpartition("\n")[2] != fingerprint(name):  # the module may print, too
        yield f"the plan {name} keeps other keys in another process; it must depend on the settings alone"


def fingerprint(name: str) -> str:
    """Return a number of what the plan with a name keeps of a standard input, the same in every process."""
    plan = plan_by_name(name)
    uncovered = dataclasses.replace(plan, num_sink_tokens=0, dense_window_size=0)
    request = _request(uncovered, [_longest(plan)], torch.device("cpu"))
    numbers = (plan.group, plan.num_sink_tokens, plan.dense_window_size, plan.hook_constants, plan.hook_args)
    return hashlib.sha256(repr((numbers, _kept(request, 0).nonzero().tolist())).encode()).hexdigest()


PARTS: dict[str, Callable[[_Subject], Iterator[str]]] = {
    "configuration": _check_configuration,
    "plan": _check_plan,
    "rule": _check_rule,
    "promises of the plan": _check_promises,
    "choice of blocks": _check_selector,
    "fast choice of blocks": _check_fast_scores,
    "output of every kernel": _check_kernels,
    "gradients": _check_gradients,
    "statistics": _check_statistics,
    "another process": _check_other_process,
}


# Inputs.


def _groups(
    group: int, leading: tuple[int, ...], dtype: torch.dtype, device: torch.device, groups: int = 9
) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores ``[..., queries, groups, group]`` with equal ones among them, and the positions, as a rule sees."""
    generator = torch.Generator().manual_seed(0)
    q_pos = torch.tensor([0, 1, group, 3 * group + group // 2, groups * group - 1])[:, None, None]
    k_pos = torch.arange(groups * group).unflatten(0, (groups, group))
    scores = torch.randint(-8, 9, (*leading, len(q_pos), groups, group), generator=generator).to(dtype) / 2
    return scores.masked_fill(k_pos > q_pos, -torch.inf).to(device), q_pos.to(device), k_pos.to(device)


def _longest(plan: AttentionPlan) -> int:
    """Return a length that no tile, block or group divides, and that has blocks that are not forced."""
    if plan.blocks is not None:
        size, rows = plan.blocks.block_size, plan.blocks.block_rows
        return rows * (3 - (-(plan.blocks.first_blocks + plan.blocks.recent_blocks) * size) // rows) + size // 2 + 5
    return 37 if plan.skip is None else 4 * plan.skip.block_rows + 13


def _ragged(plan: AttentionPlan) -> list[int | tuple[int, int]]:
    """Return lengths of sequences: with one query, without any, and with queries that are the last tokens."""
    n = _longest(plan)
    return [n, (1, n // 2), 0, (n // 3, n)]


def _request(
    plan: AttentionPlan,
    lengths: Sequence[int | tuple[int, int]],
    device: torch.device,
    *,
    heads: tuple[int, int] = (4, 2),
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> AttentionRequest:
    """Make a request of packed sequences, with NaN in the rows between them.

    Queries and keys are multiples of 1/4, so that scores are exact in every precision. Some runs of 16 keys score far
    less than the others, so that whole blocks can be dropped.

    Args:
        plan: what is kept.
        lengths: queries and keys of each sequence; a number alone means both.
        device: where to put it.
        heads: query heads and key/value heads.
        dim: head dimension, of values as well.
        dtype: type of queries, keys and values.
        options: other fields of the request.
    """
    generator = torch.Generator().manual_seed(0)
    pairs = [(x, x) if isinstance(x, int) else x for x in lengths]
    scale = 2.0 ** (1 - math.ceil(math.log2(dim) / 2))

    def tokens(length: int, number: int) -> Tensor:
        centres = torch.randn(-(-length // 16), number, dim, generator=generator).repeat_interleave(16, 0)[:length]
        return (2 * (centres + torch.randn(length, number, dim, generator=generator))).round() / 4

    def packed(side: int) -> tuple[Tensor, Tensor, int]:
        starts, row = [], 3
        for pair in pairs:
            starts.append(row)
            row += pair[side] + 2
        return torch.tensor(starts), torch.tensor([pair[side] for pair in pairs]), row

    (starts_q, lengths_q, rows_q), (starts_k, lengths_k, rows_k) = packed(0), packed(1)
    q, k, v = (
        torch.full((rows, number, dim), torch.nan)
        for rows, number in zip((rows_q, rows_k, rows_k), (heads[0], heads[1], heads[1]), strict=True)
    )
    for start_q, start_k, (len_q, len_k) in zip(starts_q.tolist(), starts_k.tolist(), pairs, strict=True):
        q[start_q : start_q + len_q] = tokens(len_q, heads[0])
        k[start_k : start_k + len_k] = tokens(len_k, heads[1])
        v[start_k : start_k + len_k] = torch.randn(len_k, heads[1], dim, generator=generator)
        levels = torch.randint(0, 3, (-(-len_k // 16), heads[1]), generator=generator).repeat_interleave(16, 0)[:len_k]
        k[start_k : start_k + len_k, :, 0] = -6.0 * levels
        q[start_q : start_q + len_q, :, 0] = 1 / scale
    request = AttentionRequest(
        q=q.to(device, dtype),
        k=k.to(device, dtype),
        v=v.to(device, dtype),
        s_aux=None,
        starts_q=starts_q.to(device),
        lengths_q=lengths_q.to(device),
        max_q=max(pair[0] for pair in pairs),
        starts_k=starts_k.to(device),
        lengths_k=lengths_k.to(device),
        max_k=max(pair[1] for pair in pairs),
        is_causal=True,
        softmax_scale=scale,
        sliding_window=None,
        softcap=None,
        plan=plan,
        with_lse=True,
    )
    return request._replace(**options)


def _selector_cases(plan: AttentionPlan, device: torch.device) -> Iterator[tuple[str, AttentionRequest]]:
    n, rows = _longest(plan), _selector_of(plan).block_rows
    yield "for one sequence", _request(plan, [n], device)
    yield (
        "for a batch of sequences of different lengths with padding between them",
        _request(plan, _ragged(plan), device),
    )
    yield "in BF16", _request(plan, [n, n // 2], device, dtype=torch.bfloat16)
    suffix: list[int | tuple[int, int]] = [n, (rows + 3, n)]
    yield "with softcap and sliding window", _request(plan, suffix, device, softcap=4.0, sliding_window=n // 2)
    yield "without causality", _request(plan, [n, n // 2], device, is_causal=False)
    first = torch.tensor([21, rows], device=device)
    yield "for a cache that has dropped its first keys", _request(plan, suffix, device, first_k=first)


def _copied(into: Tensor, rows: Tensor) -> Tensor:
    """Return ``into``, a request's padded rows, with other tokens in them."""
    into = into.clone()
    into[3 : 3 + len(rows)] = rows
    return into


# Kernels, and what they are compared with.


class _KernelUnderTest(NamedTuple):
    name: str
    refusal: Callable[[AttentionRequest], str | None]
    run: Callable[[AttentionRequest], tuple[Tensor, Tensor | None]]


def _kernels(request: AttentionRequest) -> Iterator[_KernelUnderTest]:
    """Yield every kernel there is, and the portable one with several sizes of tiles."""

    def prepared(kernel: choice.Kernel) -> Callable[[AttentionRequest], tuple[Tensor, Tensor | None]]:
        return lambda request: kernel.prepare(request)(request)

    yield _KernelUnderTest(TORCH, choice.BLOCKED.refusal, prepared(choice.BLOCKED))
    if tl is None:
        return
    is_interpreted = not request.q.is_cuda  # which is slow
    if is_interpreted and request.plan.chooses_blocks and not request.plan.dense_window_size:
        return
    if request.q.is_cuda or request.plan.chooses_blocks:
        for kernel in choice.GPU_KERNELS:
            yield _KernelUnderTest(f"the {kernel.name} kernel", kernel.refusal, prepared(kernel))
    if not request.plan.chooses_blocks:  # or else lists bind the tiles
        size = 16 if request.plan.dense_window_size else 32
        tiles = Settings(size, size, num_warps=4, num_stages=1, descriptors=False, frozen=False)
        run = functools.partial(_run_portable, tiles)
        yield _KernelUnderTest(f"the portable kernel with tiles of {size} x {size}", portable_launch.refusal, run)


def _run_portable(tiles: Settings, request: AttentionRequest) -> tuple[Tensor, Tensor | None]:
    return portable_launch.prepare(request, tiles)(request)


def _with_lists(request: AttentionRequest) -> tuple[AttentionRequest, AttentionRequest]:
    """Return a request as kernels get it, with the chosen blocks as lists, and as the reference gets it.

    The choice of a selector has been compared before, so the reference gets its lists, too; skip-softmax it decides
    by itself.
    """
    if not request.plan.chooses_blocks:
        return request, request
    listed = request._replace(blocks=select_blocks(request))
    return listed, request if request.plan.blocks is None else listed


def _kept(request: AttentionRequest, number: int) -> Tensor:
    """Return which keys the reference keeps in one sequence, ``[query_heads, len_q, len_k]``."""
    sequence = list(request.sequences())[number]
    q, k = request.q[sequence.queries].detach().double(), request.k[sequence.keys].detach().double()
    listed = listed_blocks(request, number)
    return kept_scores(q, k, request, sequence.first_q, sequence.first_k, listed) > -torch.inf


def _pytorch_attention(request: AttentionRequest) -> Tensor:
    """Compute PyTorch's own attention over the keys that the reference keeps, in the precision of the inputs."""
    output = torch.zeros_like(request.q)
    repeat = request.q.shape[1] // request.k.shape[1]
    for number, sequence in enumerate(request.sequences()):
        if 0 in (sequence.queries.stop - sequence.queries.start, sequence.keys.stop - sequence.keys.start):
            continue
        kept = _kept(request, number)
        is_alive = kept.any(-1, keepdim=True)
        q, k, v = (
            x.transpose(0, 1) for x in (request.q[sequence.queries], request.k[sequence.keys], request.v[sequence.keys])
        )
        k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
        mask = kept | ~is_alive  # a row without a key would be NaN
        found = scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask[None], scale=request.softmax_scale
        )
        output[sequence.queries] = found[0].masked_fill(~is_alive, 0.0).transpose(0, 1)
    return output


def _gradients(
    attend: Callable[[AttentionRequest], Tensor], request: AttentionRequest, direction: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    inputs = {name: getattr(request, name).detach().to(dtype).requires_grad_() for name in ("q", "k", "v")}
    output = attend(request._replace(**inputs))
    return torch.autograd.grad(output, list(inputs.values()), direction.to(output.dtype))


def _error_bound(theirs: Tensor, expected: Tensor, terms: int) -> float:
    """Return how far a kernel may be off: twice as far as PyTorch, which may be exact by chance, or as rounding is.

    Args:
        theirs: PyTorch's result.
        expected: the reference's.
        terms: how many numbers are added up in FP32, whose errors grow as the root of it.
    """
    rounding = max(torch.finfo(theirs.dtype).eps / 2, torch.finfo(torch.float32).eps / 2 * math.sqrt(terms))
    return 2 * max(float((theirs.double() - expected).abs().max()), rounding * float(expected.abs().max()))


def _compare(
    where: str, what: str, found: Tensor, expected: Tensor, bound: float, explain: Callable[[], str] = lambda: ""
) -> Iterator[str]:
    if bool(found.isnan().any()):
        yield f"{where}: {what} has NaN{explain()}"
        return
    error = float((found.double() - expected).abs().max())
    if error > bound:
        yield f"{where}: {what} differs from the FP64 reference by {error:.2g}, and may by {bound:.2g}{explain()}"


def _explain(kernel: _KernelUnderTest, listed: AttentionRequest, expected: AttentionRequest) -> Callable[[], str]:
    """Return what finds the keys about which a kernel and the reference disagree."""

    def found() -> str:
        # With the unit vectors as values, the output is the attention weights.
        places = []
        v = torch.zeros(*listed.v.shape[:2], listed.max_k, dtype=listed.v.dtype, device=listed.v.device)
        for sequence in listed.sequences():
            unit = torch.eye(sequence.keys.stop - sequence.keys.start, listed.max_k, dtype=v.dtype, device=v.device)
            v[sequence.keys] = unit[:, None]
        request = listed._replace(v=v)
        if kernel.refusal(request) is not None:
            return ""
        with _quiet():
            weights, _ = kernel.run(request.readable())
        for number, sequence in enumerate(listed.sequences()):
            kept = _kept(expected, number)
            mine = weights[sequence.queries].transpose(0, 1)[..., : kept.shape[-1]] != 0
            places += [
                f"the reference {'keeps' if kept[head, row, key] else 'drops'} key {key + sequence.first_k} for the "
                f"query at position {row + sequence.first_q} of sequence {number}, head {head}"
                for head, row, key in (mine != kept).nonzero().tolist()
            ]
        rule = "the hook" if kernel.name != TORCH else "the kernel"
        return f"; {rule} decides otherwise where {_listed(places)}" if places else "; the same keys are kept"

    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Ignore what NumPy says of infinite numbers in Triton's interpreter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


# Block selectors.


def _selector_of(plan: AttentionPlan) -> BlockSelector:
    assert plan.blocks is not None
    return plan.blocks


def _grid(request: AttentionRequest) -> BlockGrid:
    return BlockGrid(request, *request.grid)


def _seen_and_forced(request: AttentionRequest, selector: BlockSelector) -> tuple[Tensor, Tensor]:
    """Return where any query sees any key of a request's only sequence, and which of these blocks are always kept."""
    grid = _grid(request)
    seen, forced = grid.seen(), grid.forced(selector.first_blocks, selector.recent_blocks)
    rows = seen.any(-1)  # the grid may have more query blocks than the sequence
    return seen[rows], (forced & seen)[rows]


def _view(request: AttentionRequest) -> SequenceBlocks:
    """Return the view of a request's only sequence."""
    return SequenceBlocks.of(request, next(request.sequences()))


def _chosen_by_reference(request: AttentionRequest, selector: BlockSelector) -> tuple[Tensor, Tensor]:
    return _stable_choice(_view(request), selector)


def _stable_choice(view: SequenceBlocks, selector: BlockSelector) -> tuple[Tensor, Tensor]:
    """Return which blocks the reference keeps, and where that does not hang on the rounding of FP32."""
    chosen = _called(_name_of(selector.reference), selected_blocks, view, selector)
    is_stable, generator = torch.ones_like(chosen), torch.Generator().manual_seed(0)
    for _ in range(3):
        q, k = (
            x * (1 + NEAR_TIE * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device))
            for x in (view.q, view.k)
        )
        is_stable &= selected_blocks(view._replace(q=q, k=k), selector) == chosen
    return chosen, is_stable


# Sentences.


def _called(where: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a method's function; what it raises breaks the contract."""
    try:
        return function(*arguments)
    except Exception as error:  # the method's own code may raise anything
        raise _BrokenContractError(f"{where} raises {_brief(error)}") from error


def _refuse(
    where: str, found: object, dtype: torch.dtype, shape: Sequence[int], device: torch.device, meaning: str
) -> None:
    """Refuse a return value that is not a tensor of the kind wanted; any floating type passes for another."""
    if not isinstance(found, Tensor):
        reason = f"must return a tensor{'; is there a return statement?' if found is None else ''}"
        raise _BrokenContractError(f"{where} returns {_abbreviated(found)}; it {reason}")
    wrong = []
    if dtype == torch.bool and found.dtype != torch.bool:
        wrong.append("booleans, such as a comparison gives")
    if dtype != torch.bool and not found.is_floating_point():
        wrong.append("floating-point numbers")
    if tuple(found.shape) != tuple(shape):
        wrong.append(f"the shape {list(shape)}, {meaning}; .expand() broadcasts")
    if found.device != device:
        wrong.append(f"a tensor on {device}; make tensors on the device of the arguments")
    if wrong:
        raise _BrokenContractError(f"{where} returns {describe(found)}; it must return {', and '.join(wrong)}")


def _refuse_nan(where: str, scores: Tensor, seen: Tensor) -> None:
    """Refuse NaN among scores ``[heads, query_blocks, key_blocks]`` where any query sees any key."""
    wrong = (scores.isnan() & seen).nonzero().tolist()
    if wrong:
        head, row, column = wrong[0]
        raise _BrokenContractError(
            f"{where} returns NaN for {len(wrong)} blocks, the first in head {head}, query block {row}, key block "
            f"{column}; every block of which a query sees a key needs a number"
        )


def _name_of(function: object) -> str:
    """Return the name of a method's function, or what it is if it has none."""
    name = getattr(function, "__qualname__", None)
    return f"{name}()" if name else "the rule (plan.keep)"


def _type_of(request: AttentionRequest) -> str:
    return str(request.q.dtype).removeprefix("torch.")


def _exemptions(plan: AttentionPlan) -> str:
    return f"{plan.num_sink_tokens} sinks and a dense window of {plan.dense_window_size}"


def _brief(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _abbreviated(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]} ... ({type(value).__name__})"


def _bullets(problems: list[str]) -> str:
    more = len(problems) - MAX_SENTENCES
    lines = problems[:MAX_SENTENCES] + ([f"{more} more of this kind"] if more > 0 else [])
    return "\n".join(f"- {line}" for line in lines)


def _listed(places: list[str]) -> str:
    more = len(places) - MAX_SENTENCES
    return "; ".join(places[:MAX_SENTENCES]) + (f"; and {more} more" if more > 0 else "")
