"""Attention whose keys and values are divided among processes along the sequence.

Every way computes the same. *Gathering* gives each process all keys and values. The *ring* passes them on from process
to process while each computes with those it has, and adds up the results by their softmax denominators
(https://arxiv.org/abs/2310.01889). For single queries, which all processes have, only results are exchanged.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from ...kernels import AttentionRequest, Backend, KeyBlocks, compute, gradients, select_blocks
from ...plan import DENSE, AttentionPlan
from ..recomputation import Observer
from .shards import Pair, Run, Shards, calls_of, packing, reachable

# PyTorch 2.13 gave both new names.
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


@functools.cache
def _sparse_always(plan: AttentionPlan) -> AttentionPlan:
    """Return the plan for a part of a sequence, which is sparse even if the part is a single query."""
    return plan if plan.is_dense or plan.sparse_decode else dataclasses.replace(plan, sparse_decode=True)


@functools.cache
def _with_exemptions(plan: AttentionPlan, num_sink_tokens: int, dense_window_size: int) -> AttentionPlan:
    """Return a plan with other exemptions."""
    if (plan.num_sink_tokens, plan.dense_window_size) == (num_sink_tokens, dense_window_size):
        return plan
    return dataclasses.replace(plan, num_sink_tokens=num_sink_tokens, dense_window_size=dense_window_size)


def _plan_for(plan: AttentionPlan, is_single: bool) -> AttentionPlan:
    """Return the plan of sequences that have, over all processes, a single query or more."""
    return DENSE if is_single and not plan.sparse_decode else _sparse_always(plan)


def attend_gathered(
    request: AttentionRequest, shards: Shards, backend: Backend, statistics: Observer | None = None
) -> Tensor:
    """Compute attention with the keys and values of all processes; differentiable.

    Args:
        request: this process' queries, keys and values; where the sequences are is in ``shards``.
        shards: how the batch is divided.
        backend: which kernels run.
        statistics: what observes prefills, or None.

    Returns:
        The output ``[rows, query_heads, value_dim]`` of this process' queries.
    """
    request = _gather_keys(request, shards)
    needs_gradient = torch.is_grad_enabled() and (request.q.requires_grad or request.k.requires_grad)
    output = request.q.new_zeros(*request.q.shape[:2], request.v.shape[2])
    for call in _calls_of_gathered(request, shards, needs_gradient):
        part = call.request
        if statistics is not None and not call.is_single:
            part = statistics.observe(part)
        output = output + compute(part, backend)[0]
    if needs_gradient and not shards.queries[shards.rank]:
        # So that this process takes part in the backward pass.
        output = output + 0 * (request.q.sum() + request.k.sum() + request.v.sum())
    return output


def _calls_of_gathered(request: AttentionRequest, shards: Shards, needs_gradient: bool) -> list[_Call]:
    """Return what all queries of this process compute with all keys.

    Causal queries are the last tokens of the keys that they are given, so that no kernel needs to be told positions.
    """
    device, is_causal = request.q.device, request.is_causal
    # Gradients of keys that two runs share would be incomplete on a GPU, and selectors are faster with a single one.
    shares_keys = not needs_gradient and not request.plan.chooses_blocks

    def fields() -> list[tuple[bool, list[Pair], dict[str, Any]]]:
        _, starts = shards.rows_of_keys(device)
        parts: defaultdict[tuple[bool, int], list[Pair]] = defaultdict(list)
        seen: defaultdict[int, int] = defaultdict(int)
        for queries in shards.queries[shards.rank]:
            number = 0 if shares_keys else seen[queries.sequence]
            seen[queries.sequence] += 1
            length = queries.end if is_causal else shards.ends[queries.sequence]
            keys = Run(queries.sequence, 0, length, 0, starts[queries.sequence])
            parts[shards.is_single(queries), number].append(Pair(queries, keys))
        found = []
        for (is_single, _), pairs in parts.items():
            packed = packing(pairs, shards.slots_q, 0, device)
            if is_causal:
                packed |= {"first_q": None, "first_k": None}
            found.append((is_single, pairs, packed))
        return found

    return [
        _Call(is_single, slice(None), request._replace(plan=_plan_for(request.plan, is_single), **packed), pairs)
        for is_single, pairs, packed in shards.remembered(("gathered", device, is_causal, shares_keys), fields)
    ]


def _gather_keys(request: AttentionRequest, shards: Shards, with_values: bool = True) -> AttentionRequest:
    """Return a request with the keys and values of all processes, each sequence's in the order of their positions."""
    k, v = request.k, request.v
    local = torch.cat([k.flatten(1), v.flatten(1)], 1) if with_values else k.flatten(1)
    rows, _ = shards.rows_of_keys(k.device)
    everything: Tensor = _Gather.apply(local, shards.group)  # type: ignore[no-untyped-call]
    everything = everything[rows]
    width = k.shape[1] * k.shape[2]
    k = everything[:, :width].unflatten(1, k.shape[1:])
    return request._replace(k=k, v=everything[:, width:].unflatten(1, v.shape[1:]) if with_values else k)


def _gathered(x: Tensor, group: distributed.ProcessGroup) -> Tensor:
    gathered = x.new_empty(distributed.get_world_size(group) * x.shape[0], *x.shape[1:])
    _all_gather(gathered, x.contiguous(), group=group)
    return gathered


class _Gather(torch.autograd.Function):
    """Put the rows of all processes one after the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: distributed.ProcessGroup) -> Tensor:
        ctx.group, ctx.dtype = group, x.dtype
        return _gathered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.to(torch.promote_types(ctx.dtype, torch.float32))  # in which the processes' gradients add up
        rows = grad.shape[0] // distributed.get_world_size(ctx.group)
        local = grad.new_empty(rows, *grad.shape[1:])
        _reduce_scatter(local, grad.contiguous(), group=ctx.group)
        return local.to(ctx.dtype), None


def gather_rows(x: Tensor, group: distributed.ProcessGroup) -> Tensor:
    """Put the rows of all processes one after the other; differentiable."""
    gathered: Tensor = _Gather.apply(x, group)  # type: ignore[no-untyped-call]
    return gathered


class _Merge:
    """Adds up results of attention over different keys, in FP32, or FP64 for FP64 inputs.

    Attributes:
        output: the softmax over all keys so far, times their values, ``[rows, query_heads, value_dim]``.
        lse: the logarithms of its denominators, ``[rows, query_heads]``.
    """

    def __init__(self, request: AttentionRequest) -> None:
        q, dtype = request.q, torch.promote_types(request.q.dtype, torch.float32)
        self.output = q.new_zeros(*q.shape[:2], request.v.shape[2], dtype=dtype)
        self.lse = q.new_full(q.shape[:2], -torch.inf, dtype=dtype)
        self._is_empty = True

    def add(self, output: Tensor, lse: Tensor, rows: slice = slice(None)) -> None:
        """Add the result of some rows over other keys; one of no value has an output of 0."""
        total, total_lse = self.output[rows], self.lse[rows]
        if self._is_empty:
            total.copy_(output)
            total_lse.copy_(lse)
        else:
            share = torch.sigmoid(lse - total_lse).nan_to_num(0.0)  # not a number where neither has a value
            total.lerp_(output.to(total.dtype), share[..., None])
            torch.logaddexp(total_lse, lse, out=total_lse)
        self._is_empty = False

    def add_sinks(self, s_aux: Tensor | None) -> None:
        """Add learnable sinks, which have no value."""
        if s_aux is not None:
            self.add(torch.zeros_like(self.output), s_aux.to(self.lse.dtype).expand_as(self.lse))


@torch.no_grad()
def attend_replicated(request: AttentionRequest, shards: Shards, backend: Backend) -> Tensor:
    """Compute dense attention of queries that all processes have; each looks at its own keys.

    Arguments and result as of :func:`attend_gathered`.
    """
    merge = _Merge(request)
    for call in _calls(request._replace(s_aux=None, with_lse=True), shards, shards.rank):
        merge.add(*_result(call.request, backend), call.rows)
    everything = _gathered(torch.cat([merge.output, merge.lse[..., None]], -1), shards.group)
    outputs, lse = everything.unflatten(0, (shards.size, -1)).split([merge.output.shape[-1], 1], -1)
    weights = lse
    if request.s_aux is not None:
        sinks = request.s_aux.to(lse.dtype)[:, None].expand_as(lse[:1])
        weights = torch.cat([lse, sinks])
    weights = weights.softmax(0)[: shards.size].nan_to_num(0.0)  # not a number where no process has any key
    output: Tensor = (outputs * weights).sum(0)
    return output.to(request.q.dtype)


class _Call(NamedTuple):
    """One computation.

    Attributes:
        is_single: whether its sequences have a single query, over all processes.
        rows: the rows of this process' queries that it looks at.
        request: these queries, and the keys and values.
        pairs: the pairs of runs in it.
    """

    is_single: bool
    rows: slice
    request: AttentionRequest
    pairs: list[Pair]


def _calls(request: AttentionRequest, shards: Shards, source: int) -> list[_Call]:
    """Return what this process' queries compute with the keys and values of the process ``source``."""
    device, is_causal, window = request.q.device, request.is_causal, request.sliding_window

    def fields() -> list[tuple[bool, slice, list[Pair], dict[str, Any]]]:
        forms: defaultdict[tuple[bool, _Form], list[Pair]] = defaultdict(list)
        for queries in shards.queries[shards.rank]:
            is_single = shards.is_single(queries)
            plan = _plan_for(request.plan, is_single)
            for keys in _keys_for(queries, shards.keys[source], is_single, window is None):
                for part in _parts_of(queries, keys, request):
                    pair = Pair(part, keys)
                    if reachable(pair, is_causal, window):
                        forms[is_single, _form_of(pair, request._replace(plan=plan))].append(pair)
        found = []
        for (is_single, form), pairs in forms.items():
            for call in calls_of(pairs):
                packed = packing(call, shards.slots_q, shards.slots_k, device)
                starts = [q.row * shards.slots_q + q.slot for q, _ in call]
                rows = slice(min(starts), max(start + q.length for start, (q, _) in zip(starts, call, strict=True)))
                packed |= {"starts_q": packed["starts_q"] - rows.start, "plan": form.plan, "is_causal": form.is_causal}
                if not form.has_positions:
                    packed |= {"first_q": None, "first_k": None}
                found.append((is_single, rows, call, packed))
        return found

    known = ("calls", device, is_causal, window, request.plan.name, source)
    return [
        _Call(is_single, rows, request._replace(q=request.q[rows], **packed), pairs)
        for is_single, rows, pairs, packed in shards.remembered(known, fields)
    ]


class _Form(NamedTuple):
    """How a pair is computed.

    Attributes:
        plan: with the exemptions that are within reach.
        is_causal: whether that matters.
        has_positions: whether the kernel has to know positions, which the fastest ones do not.
    """

    plan: AttentionPlan
    is_causal: bool
    has_positions: bool


def _form_of(pair: Pair, request: AttentionRequest) -> _Form:
    """Return how a pair is computed: without positions where that is possible.

    It is where queries are the last tokens of their keys, or see them all. Positions inside of groups and blocks stay
    what they are, because runs of keys begin at the beginning of a block. Exemptions out of reach are left out.
    """
    plan, (queries, keys) = request.plan, pair
    as_it_is = _Form(plan, request.is_causal, True)
    knows_positions = plan.keep is not None and not plan.keeps_top  # a rule of a user's own may look at them
    sinks = plan.num_sink_tokens if keys.first < plan.num_sink_tokens else 0
    if knows_positions or not request.is_causal or (sinks and keys.first > 0):
        return as_it_is
    if queries.end == keys.end:
        return _Form(_with_exemptions(plan, sinks, plan.dense_window_size), True, False)
    _, block_rows = request.grid
    has_other_grid = plan.chooses_blocks and (keys.length - queries.length) % block_rows
    nearest = queries.first - keys.end + 1
    if request.sliding_window is not None or nearest < max(1, plan.dense_window_size) or has_other_grid:
        return as_it_is
    return _Form(_with_exemptions(plan, sinks, 0), False, False)


def _parts_of(queries: Run, keys: Run, request: AttentionRequest) -> list[Run]:
    """Divide a run of queries such that few have to be computed with positions, by slower kernels.

    These are the queries whose dense window reaches into keys that all of them see, and those of a last block that is
    not whole, if there are lists of blocks.
    """
    plan, (_, block_rows) = request.plan, request.grid
    if not request.is_causal or request.sliding_window is not None or queries.first < keys.end:
        return [queries]
    reaching = plan.dense_window_size - (queries.first - keys.end + 1)
    begin = 0 if plan.is_dense or reaching <= 0 else -(-reaching // block_rows) * block_rows
    end = queries.length // block_rows * block_rows if plan.chooses_blocks else queries.length
    edges = sorted({0, min(begin, queries.length), max(end, 0), queries.length})
    return [queries.part(*edge) for edge in itertools.pairwise(edges)]


def _keys_for(queries: Run, keys: tuple[Run, ...], is_single: bool, any_position: bool) -> list[Run]:
    """Return the runs of keys of a sequence.

    For a single query, after which there are no keys, runs that lie side by side are one; if positions do not matter,
    also where these do not follow each other.
    """
    own = sorted((x for x in keys if x.sequence == queries.sequence), key=lambda x: x.slot)
    if not is_single:
        return own
    found: list[Run] = []
    for x in own:
        joins = found and found[-1].slot + found[-1].length == x.slot
        if joins and (any_position or found[-1].end == x.first):
            first = min(found[-1].first, x.first) if any_position else found[-1].first
            found[-1] = found[-1]._replace(first=first, length=found[-1].length + x.length)
        else:
            found.append(x)
    return found


def attend_in_ring(request: AttentionRequest, shards: Shards, backend: Backend) -> Tensor:
    """Compute attention while keys and values go around; differentiable.

    Arguments and result as of :func:`attend_gathered`.
    """
    blocks = _Selected(request, shards) if request.plan.chooses_blocks else None
    job = _Job(request._replace(q=None, k=None, v=None, s_aux=None), shards, backend, blocks)  # type: ignore[arg-type]
    output: Tensor = _Ring.apply(request.q, request.k, request.v, request.s_aux, job)  # type: ignore[no-untyped-call]
    return output


class _Selected:
    """The key blocks that this process' queries visit, from which those of a pair of runs are taken."""

    @torch.no_grad()
    def __init__(self, request: AttentionRequest, shards: Shards) -> None:
        """Choose blocks; selectors look at the keys of all processes, but at no values."""
        self.size, self.rows = request.grid
        self.masks: dict[Run, Tensor] = {}
        request = request._replace(q=request.q.detach(), k=request.k.detach(), v=request.k.detach(), s_aux=None)
        for call in _calls_of_gathered(_gather_keys(request, shards, with_values=False), shards, False):
            if call.request.plan.chooses_blocks:
                with torch.autocast(request.q.device.type, enabled=False):
                    mask = select_blocks(call.request).mask()
                numbers = [_blocks_of(queries, self.rows) for queries, _ in call.pairs]
                for (queries, _), part in zip(call.pairs, mask[:, : sum(numbers)].split(numbers, 1), strict=True):
                    self.masks[queries] = part

    def of(self, pairs: list[Pair]) -> KeyBlocks:
        """Return the lists of some pairs."""
        masks = []
        for queries, keys in pairs:
            whole = next(run for run in self.masks if run.overlaps(queries))
            row, column = queries.first // self.rows - whole.first // self.rows, keys.first // self.size
            rows, columns = _blocks_of(queries, self.rows), _blocks_of(keys, self.size)
            masks.append(self.masks[whole][:, row : row + rows, column : column + columns])
        return KeyBlocks.from_masks(masks, self.size, self.rows)


def _blocks_of(tokens: Run, size: int) -> int:
    return (tokens.end - 1) // size - tokens.first // size + 1


class _Job(NamedTuple):
    """What the ring computes, without its tensors.

    Attributes:
        request: masks, scale and plan.
        shards: how the batch is divided.
        backend: which kernels run.
        blocks: the key blocks to visit, None if the plan chooses none.
    """

    request: AttentionRequest
    shards: Shards
    backend: Backend
    blocks: _Selected | None

    def calls(self, q: Tensor, k: Tensor, v: Tensor, source: int) -> list[_Call]:
        """Return what this process computes with the keys and values of the process ``source``."""
        request = self.request._replace(q=q, k=k, v=v, with_lse=True)
        return [
            call._replace(request=call.request._replace(blocks=self.blocks.of(call.pairs)))
            if self.blocks is not None and call.request.plan.chooses_blocks
            else call
            for call in _calls(request, self.shards, source)
        ]


class _Ring(torch.autograd.Function):
    """Ring attention. Each step computes with the keys and values that are there while the next ones arrive."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, job: _Job) -> Tensor:
        shards, passing = job.shards, _Passing(k, v)
        merge = _Merge(job.request._replace(q=q, v=v))
        merge.add_sinks(s_aux)
        for step in range(shards.size):
            arriving = None if step == shards.size - 1 else _send(passing.buffer, shards)
            for call in job.calls(q, *passing.tensors(), (shards.rank - step) % shards.size):
                merge.add(*_result(call.request, job.backend), call.rows)
            if arriving is not None:
                passing.buffer = arriving.wait()
        output = merge.output.to(q.dtype)
        ctx.save_for_backward(q, k, v, s_aux, output, merge.lse)
        ctx.job = job
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, s_aux, output, lse = ctx.saved_tensors
        shards, passing = ctx.job.shards, _Passing(k, v)
        grad_q = torch.zeros_like(q, dtype=lse.dtype)
        # The gradients of keys and values follow these around, one step behind, until they are back home.
        sums = _Passing(torch.zeros_like(k, dtype=lse.dtype), torch.zeros_like(v, dtype=lse.dtype))
        returning = None
        for step in range(shards.size):
            arriving = None if step == shards.size - 1 else _send(passing.buffer, shards)
            own = _Passing(*(torch.zeros_like(x) for x in sums.tensors()))
            for call in ctx.job.calls(q, *passing.tensors(), (shards.rank - step) % shards.size):
                rows = call.rows
                found = gradients(grad[rows], output[rows], lse[rows], call.request, ctx.job.backend)
                grad_q[rows] += found[0]
                for total, part in zip(own.tensors(), found[1:3], strict=True):
                    total += part
            if arriving is not None:
                passing.buffer = arriving.wait()
            if returning is not None:
                sums.buffer = returning.wait()
            sums.buffer = sums.buffer + own.buffer
            returning = _send(sums.buffer, shards) if shards.size > 1 else None
        if returning is not None:
            sums.buffer = returning.wait()
        grad_k, grad_v = sums.tensors()
        grad_s_aux = None
        if s_aux is not None:
            empty = lse == -torch.inf
            delta = (grad.to(lse.dtype) * output).sum(-1).masked_fill(empty, 0.0)
            weight = torch.exp(s_aux.to(lse.dtype) - lse.masked_fill(empty, 0.0))
            grad_s_aux = -(weight * delta).sum(0).to(s_aux.dtype)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_s_aux, None


class _Passing:
    """Keys and values, or their gradients, in one piece of memory that goes from process to process."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.shapes = (k.shape, v.shape)
        self.buffer = torch.cat([k.flatten(), v.flatten()])

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return what is there now, in its shapes."""
        k, v = self.buffer.split([shape.numel() for shape in self.shapes])
        return k.view(self.shapes[0]), v.view(self.shapes[1])


class _Arriving(NamedTuple):
    """What is on its way from the process before this one.

    Attributes:
        buffer: where it arrives.
        works: what to wait for.
    """

    buffer: Tensor
    works: list[Any]

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.buffer


def _send(buffer: Tensor, shards: Shards) -> _Arriving:
    """Begin to send a tensor to the next process, and to receive one from the process before."""
    after, before = (distributed.get_global_rank(shards.group, (shards.rank + step) % shards.size) for step in (1, -1))
    received = torch.empty_like(buffer)
    works = distributed.batch_isend_irecv(
        [
            distributed.P2POp(distributed.isend, buffer, after, shards.group),
            distributed.P2POp(distributed.irecv, received, before, shards.group),
        ]
    )
    return _Arriving(received, works)


def _result(request: AttentionRequest, backend: Backend) -> tuple[Tensor, Tensor]:
    output, lse = compute(request, backend)
    if lse is None:
        raise AssertionError("a kernel gave no logarithms of the denominators that it was asked for")
    return output, lse
