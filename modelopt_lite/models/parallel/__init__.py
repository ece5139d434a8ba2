"""Long sequences over several processes: context parallelism."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh

from ...errors import UnsupportedError
from ...kernels import AttentionRequest
from ...plan import AttentionPlan
from ..discovery import attention_modules, unreachable_modules, uses_interface
from ..layout import layer_name, packed
from ..module import SparseAttentionModule, decide, original_class, sparse_modules
from ..recomputation import Decision
from .exchange import attend_gathered, attend_in_ring, attend_replicated, gather_rows
from .shards import Exchange, Segment, Shards, cut, sequences_of

__all__ = ["ARGUMENT", "ContextParallel", "Shards", "attend_sharded", "context_parallel"]

ARGUMENT = "context_parallel"
"""What models pass on to their layers."""
NO_LABEL = -100
_LAYERS = ("full_attention", "sliding_attention")


@contextmanager
def context_parallel(model: nn.Module, mesh: DeviceMesh, *, exchange: Exchange = "ring") -> Iterator[ContextParallel]:
    """Divide the tokens of each batch among processes inside the ``with`` block; every process calls the model.

    Each process computes its own tokens and holds their keys and values. Attention sees the keys of all. The result is
    that of a single process, for every method, forward and backward. Divide a batch with :meth:`ContextParallel.shard`
    and pass what it returns to the model::

        with mtsa.context_parallel(model, mesh) as parallel:
            inputs = parallel.shard(input_ids, labels=labels)
            model(**inputs).loss.backward()

    Args:
        model: a Transformers model after :func:`~modelopt_lite.conversion.sparsify`, the same in all processes. A
            pattern must match every attention layer; ``enable: false`` leaves a layer dense.
        mesh: the processes, a mesh of one dimension.
        exchange: how keys and values come together. ``"ring"`` passes them on while it computes, so that each process
            holds those of two at a time. ``"gather"`` gives all to every process, layer by layer; it makes one
            exchange instead of many. Tokens that follow cached ones, and calls that are counted by
            ``collect_statistics``, are computed with ``"gather"`` in any case.

    Yields:
        The object that divides batches.

    Raises:
        UnsupportedError: if a layer of the model cannot be divided; the message names it.
        ValueError: if ``mesh`` or ``exchange`` is wrong.
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh: {mesh.ndim} dimensions are not allowed; one, such as mesh['context']")
    if exchange not in get_args(Exchange):
        raise ValueError(f"exchange: {exchange!r} is not allowed; one of {get_args(Exchange)}")
    modules = _divisible_layers(model)
    alignment = 1
    for module in modules:
        plan = module.sparse_attention.sparse_plan
        grids = [grid.block_rows for grid in (plan.blocks, plan.skip) if grid is not None]
        alignment = math.lcm(alignment, plan.group, *grids)
    for module in modules:
        module.sparse_attention.is_sharded = True
    try:
        yield ContextParallel(mesh, exchange, alignment)
    finally:
        for module in modules:
            module.sparse_attention.is_sharded = False


def _divisible_layers(model: nn.Module) -> list[SparseAttentionModule]:
    """Return a model's attention modules; raises UnsupportedError if it mixes tokens anywhere else."""
    sparse = sparse_modules(model)
    for name, module in sparse.items():
        if not uses_interface(module):
            raise UnsupportedError(
                f"{name} ({original_class(module).__name__}): context parallelism needs a layer that goes through "
                "Transformers' attention interface"
            )
        if module.sparse_attention.is_sharded:
            raise UnsupportedError(f"{name} ({original_class(module).__name__}): is in context_parallel() already")
    others = attention_modules(model)
    for name, other in {**others, **unreachable_modules(model, others)}.items():
        if name not in sparse:
            raise UnsupportedError(
                f"{name} ({type(other).__name__}): context parallelism needs every attention layer, and no pattern "
                "matches this one; let one match it, with 'enable: false' if it is to stay dense"
            )
    if not sparse:
        raise UnsupportedError(f"{type(model).__name__}: has no sparse layer; call sparsify first")
    for name, part in model.named_modules():
        kinds = getattr(getattr(part, "config", None), "layer_types", None) or ()
        kind = next((kind for kind in kinds if kind not in _LAYERS), None)
        if isinstance(part, nn.Conv1d):
            kind = "a convolution"
        if kind is not None:
            raise UnsupportedError(
                f"{name or type(model).__name__} ({type(part).__name__}): context parallelism supports attention "
                f"alone where tokens meet, not {kind}"
            )
    return list(sparse.values())


class ContextParallel:
    """Divides batches among the processes of a mesh; made by :func:`context_parallel`."""

    def __init__(self, mesh: DeviceMesh, exchange: Exchange, alignment: int) -> None:
        self._group, self._exchange, self._alignment = mesh.get_group(), exchange, alignment
        self._rank, self._size = mesh.get_local_rank(), mesh.size()

    def shard(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        past: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return this process' part of a batch, as a model's arguments; every process passes the same whole batch.

        Padding may be anywhere and is left out. Positions count real tokens. A batch with a single column, as in
        generation, is not divided: every process gets it, and the first one keeps its key and value.

        Args:
            input_ids: tokens, ``[batch, columns]``.
            attention_mask: 0 at padding, ``[batch, columns]``; by default there is none.
            position_ids: positions, ``[1 or batch, columns]``; where they begin again with 0, so does a packed
                sequence. By default each row is one sequence.
            labels: as for the whole batch, ``[batch, columns]``. The loss that the model then returns is this process'
                share: the sum over the processes is the mean over all labels.
            past: what :meth:`shard` returned for the tokens before these, whose keys and values are in the cache. Pass
                the cache itself to the model, in each process its own. Each row must be one sequence.

        Raises:
            ValueError: if shapes do not fit, or sequences are packed together with ``past``.
        """
        batch, columns = input_ids.shape
        for name, x in (("attention_mask", attention_mask), ("labels", labels)):
            if x is not None and x.shape != input_ids.shape:
                raise ValueError(f"{name}: {list(x.shape)} is not allowed; {list(input_ids.shape)}, as input_ids")
        before: Shards | None = None if past is None else past[ARGUMENT]
        segments = _segments(sequences_of(attention_mask, position_ids, batch, columns), before)
        shards = self._divide(segments, columns, before)
        if position_ids is None:
            positions = torch.zeros(batch, columns, dtype=torch.int64, device="cpu")
            for row, parts in enumerate(segments):
                for part in parts:
                    positions[row, part.columns] = part.first + torch.arange(len(part.columns), device="cpu")
            position_ids = positions.to(input_ids.device)
        inputs = {
            "input_ids": shards.local(input_ids, 0),
            "position_ids": shards.local(position_ids.expand(batch, -1), 0),
            ARGUMENT: shards,
        }
        if labels is not None:
            shifted = nn.functional.pad(labels, (0, 1), value=NO_LABEL)[:, 1:]
            counted = shifted != NO_LABEL
            if attention_mask is not None:
                counted = counted & attention_mask.bool()
            inputs |= {
                "labels": shards.local(labels, NO_LABEL),
                "shift_labels": shards.local(shifted, NO_LABEL),
                "num_items_in_batch": counted.sum().clamp(min=1),
            }
        return inputs

    def _divide(self, segments: list[list[Segment]], columns: int, before: Shards | None) -> Shards:
        is_replicated = columns == 1
        if is_replicated:
            sources, (runs,) = cut(segments, columns, 1, 1)
            sources = sources[:, :, :1].expand(self._size, -1, -1)
            queries, new_keys = (runs,) * self._size, (runs, *[()] * (self._size - 1))
        else:
            sources, queries = cut(segments, columns, self._size, self._alignment)
            new_keys = queries
        ends, keys, slots = (
            ({}, ((),) * self._size, 0) if before is None else (before.ends, before.keys, before.slots_k)
        )
        new = {part.sequence: len(part.columns) for parts in segments for part in parts}
        return Shards(
            group=self._group,
            rank=self._rank,
            batch=len(segments),
            columns=columns,
            sources=sources,
            queries=queries,
            keys=tuple(
                (*cached, *(run._replace(slot=slots + run.slot) for run in runs))
                for cached, runs in zip(keys, new_keys, strict=True)
            ),
            slots_k=slots + sources.shape[2],
            new=new,
            ends=ends | {part.sequence: part.first + len(part.columns) for parts in segments for part in parts},
            is_replicated=is_replicated,
            exchange=self._exchange,
        )

    def gather(self, x: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Put together what the processes computed of their tokens, in the order of the whole batch; differentiable.

        Args:
            x: one vector for each slot, such as the logits, ``[batch, slots, ...]``.
            inputs: what :meth:`shard` returned.

        Returns:
            ``[batch, columns, ...]``, in every process; 0 at padding.
        """
        shards: Shards = inputs[ARGUMENT]
        sources = shards.sources.to(x.device)
        if shards.is_replicated:
            return x.masked_fill((sources[0] < 0).view(*sources.shape[1:], *[1] * (x.dim() - 2)), 0)
        everything = gather_rows(x, shards.group).unflatten(0, (shards.size, shards.batch))
        process, row, slot = (sources >= 0).nonzero(as_tuple=True)
        whole = x.new_zeros(shards.batch, shards.columns, *x.shape[2:])
        return whole.index_put((row, sources[process, row, slot]), everything[process, row, slot])

    @torch.no_grad()
    def last(self, x: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Return what belongs to the last token of each row, without gathering all; in every process.

        Args:
            x: one vector for each slot, ``[batch, slots, ...]``.
            inputs: what :meth:`shard` returned.

        Returns:
            ``[batch, ...]``; 0 where a row has no token.
        """
        shards: Shards = inputs[ARGUMENT]
        found = x.new_zeros(x.shape[0], *x.shape[2:])
        for run in shards.queries[shards.rank]:
            is_last = all(run.end >= other.end for runs in shards.queries for other in runs if other.row == run.row)
            if is_last and (shards.rank == 0 or not shards.is_replicated):
                found[run.row] = x[run.row, run.slot + run.length - 1]
        distributed.all_reduce(found, group=shards.group)
        return found


def _segments(sequences: list[list[Tensor]], before: Shards | None) -> list[list[Segment]]:
    """Number the sequences of a batch, and say where the new tokens of each begin."""
    ends = {} if before is None else before.ends
    batch = len(sequences)
    if before is not None and batch != before.batch:
        raise ValueError(f"input_ids: {batch} rows are not allowed; {before.batch}, as past has")
    is_packed = max([number // batch for number in ends], default=0) or max(map(len, sequences)) > 1
    if before is not None and is_packed:
        raise ValueError("past: not allowed with packed sequences; give each sequence a row")
    return [
        [Segment(row + batch * i, ends.get(row + batch * i, 0), columns) for i, columns in enumerate(parts)]
        for row, parts in enumerate(sequences)
    ]


def attend_sharded(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shards: Shards,
    *,
    is_causal: bool,
    sliding_window: int | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Compute an attention module's attention over the keys of all processes.

    Args:
        module: the attention module.
        query: this process' queries, ``[batch, query_heads, slots_q, head_dim]``.
        key: its keys, cached ones first, ``[batch, kv_heads, slots_k, head_dim]``.
        value: its values, ``[batch, kv_heads, slots_k, value_dim]``.
        shards: how the batch is divided.
        is_causal: whether a query sees only keys up to its own position.
        sliding_window: a query sees only keys fewer positions away; None: all.
        scaling: factor on the scores.
        softcap: bound of the scores, if the model has one.
        s_aux: learnable sink logits ``[query_heads]``, if the model has them.

    Returns:
        ``[batch, slots_q, query_heads, value_dim]``, 0 where no token is.

    Raises:
        UnsupportedError: if the call cannot be divided; the message names the layer.
    """
    decision = decide(module, is_decode=shards.is_replicated)
    refusal = _refusal(query, key, value, shards)
    if refusal is not None:
        raise UnsupportedError(f"{layer_name(module)}: {refusal}")
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    request = _request(query, key, value, decision.plan)._replace(
        s_aux=s_aux, is_causal=is_causal, sliding_window=sliding_window, softcap=softcap
    )
    if scaling is not None:
        request = request._replace(softmax_scale=float(scaling))
    try:
        output = _computed(request, shards, decision)
    except UnsupportedError as error:
        raise UnsupportedError(f"{layer_name(module)}: {error}") from None
    return output.view(shards.batch, shards.slots_q, *output.shape[1:])


def _request(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> AttentionRequest:
    """Return a causal request of this process' tokens, which does not say yet where sequences are."""
    nowhere = torch.empty(0, dtype=torch.int64, device=query.device)
    return AttentionRequest(
        q=packed(query),
        k=packed(key),
        v=packed(value),
        s_aux=None,
        starts_q=nowhere,
        lengths_q=nowhere,
        max_q=0,
        starts_k=nowhere,
        lengths_k=nowhere,
        max_k=0,
        is_causal=True,
        softmax_scale=query.shape[3] ** -0.5,
        sliding_window=None,
        softcap=None,
        plan=plan,
    )


def _computed(request: AttentionRequest, shards: Shards, decision: Decision) -> Tensor:
    if shards.is_replicated and not decision.plan.sparse_decode:
        return attend_replicated(request, shards, decision.backend)
    # Statistics look at all keys.
    if shards.is_replicated or shards.has_cache or shards.exchange == "gather" or decision.statistics is not None:
        statistics = None if shards.is_replicated else decision.statistics
        return attend_gathered(request, shards, decision.backend, statistics)
    return attend_in_ring(request, shards, decision.backend)


def _refusal(query: Tensor, key: Tensor, value: Tensor, shards: Shards) -> str | None:
    """Return why a call cannot be divided, None if it can."""
    if torch.compiler.is_compiling():
        return "torch.compile cannot trace context parallelism; call the model without it"
    if (query.shape[0], query.shape[2]) != (shards.batch, shards.slots_q):
        return (
            f"queries {[query.shape[0], query.shape[2]]} [batch, tokens] are not those of shard(), "
            f"{[shards.batch, shards.slots_q]}; pass all that shard() returns, and nothing else, to the model"
        )
    if (key.shape[0], key.shape[2]) != (shards.batch, shards.slots_k):
        return (
            f"keys {[key.shape[0], key.shape[2]]} [batch, tokens] are not those of shard(), "
            f"{[shards.batch, shards.slots_k]}; with a cache, pass past= to shard(), and take a DynamicCache() without "
            "a config, which drops no keys"
        )
    if shards.is_replicated and torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return "a batch with a single column is for generation; use torch.no_grad(), or more columns for training"
    return None
