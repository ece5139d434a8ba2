"""Launches the backward kernel for Hopper GPUs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import hopper_launch
from .device import cdiv, is_aligned, processors, rebased
from .hopper_backward import (
    CLEARED,
    KEYS,
    LINE,
    ROWS,
    WARPGROUPS,
    attention_backward_hopper,
    prepare_gradients,
    round_gradients,
)
from .hopper_launch import key_descriptor, shared_descriptor, tail_of
from .portable import gradient_of_sink_logits
from .request import AttentionRequest, HookRefusedError
from .settings import Options, Settings, distances, hook_arguments, options_of
from .visits import TILES_FROM, gather_tiles, mark_tiles

SETTINGS = Settings(ROWS.value, KEYS.value, 4, 2, True, False)
HEAD_DIMS = (64, 128)
MAX_GROUP = 8
LONGEST_LISTED = KEYS.value * TILES_FROM.value // 2
"""Tokens of a sequence whose tiles can be numbered in an entry of a list."""
FASTER_FROM = {64: 1024, 128: 1024}
"""Queries of a sequence, on average, from which on this kernel is faster than the portable ones."""

_UNCOMPILABLE: dict[Any, str] = {}
"""Why Gluon cannot compile a hook."""


def refusal(request: AttentionRequest) -> str | None:
    """Say why the kernel cannot compute a request's gradients, or None if it can."""
    r = request
    if (reason := hopper_launch.refusal(r)) is not None:
        return reason
    if r.blocks is not None and max(r.max_q, r.max_k) > LONGEST_LISTED:
        return f"with lists of key blocks, sequences have more than {LONGEST_LISTED} tokens"
    if r.plan.keeps_nothing:
        return "the plan keeps sinks and recent keys alone"
    if r.q.shape[0] == 0 or r.k.shape[0] == 0:
        return "there are no queries or no keys"
    if r.q.shape[2] not in HEAD_DIMS:
        return f"head dimensions are {r.q.shape[2]}, not one of {HEAD_DIMS}"
    if r.group > MAX_GROUP:
        return f"groups have {r.group} keys, more than {MAX_GROUP}"
    return _UNCOMPILABLE.get(r.plan.score_hook)


def pays(request: AttentionRequest) -> bool:
    """Whether the kernel is faster than the portable ones."""
    rows = request.q.shape[0] / max(1, request.starts_q.shape[0])
    return rows >= FASTER_FROM.get(request.q.shape[2], math.inf)


def backward(
    grad: Tensor, out: Tensor, lse: Tensor, request: AttentionRequest
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute gradients as :func:`modelopt_lite.kernels.portable.backward` does.

    Raises:
        HookRefusedError: if Gluon cannot compile the plan's hook.
    """
    r, plan = request, request.plan
    (total, query_heads, head_dim), kv_heads, batch = r.q.shape, r.k.shape[1], r.starts_q.shape[0]
    heads = (kv_heads, query_heads // kv_heads)
    if not is_aligned(grad) or grad.stride(2) != 1:
        grad = grad.contiguous()
    options = options_of(r, SETTINGS)._replace(pair=min(r.group, 2))
    tiles = max(1, cdiv(r.max_k, KEYS.value))
    items = batch * kv_heads * (cdiv(tiles, 2) if r.blocks is None else tiles)
    programs = min(items, processors(r.q.device))
    # With lists, the first and the last tile of a sequence may both have fewer rows.
    query_tiles = total // ROWS.value + batch * (1 if r.blocks is None else 2)
    sequences = (r.starts_q, r.lengths_q, r.starts_k, r.lengths_k)
    lengths = (r.lengths_q, None if r.blocks is None else r.lengths_k)
    shift, delta = (r.q.new_empty(query_heads, query_tiles * ROWS.value, dtype=torch.float32) for _ in range(2))
    sums = r.q.new_empty(
        query_heads * query_tiles * ROWS.value * head_dim // LINE.value, LINE.value, dtype=torch.float32
    )
    turns = torch.empty(query_heads * query_tiles, dtype=torch.int32, device=r.q.device)
    begins = torch.empty(batch, dtype=torch.int32, device=r.q.device)
    lines = ROWS.value * head_dim // WARPGROUPS.value // LINE.value
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    sums_descriptor = TensorDescriptor(sums, [*sums.shape], [*sums.stride()], [lines, LINE.value], layout)
    layout = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    of_rows = (
        TensorDescriptor(x, [query_heads * query_tiles, ROWS.value], [ROWS.value, 1], [1, ROWS.value], layout)
        for x in (shift, delta)
    )
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (r.q, r.k, r.v))
    clearing = cdiv(grad_k.numel(), CLEARED.value)
    with torch.cuda.device_of(r.q):
        prepare_gradients[((query_tiles + cdiv(total, ROWS.value)) * query_heads + batch + clearing,)](
            grad, out, lse, shift, delta, grad_q, turns, begins, grad_k, grad_v,
            tuple(x.stride()[:2] for x in (grad, out, grad_q)), r.starts_q, lengths, query_heads, batch, total,
            query_tiles, grad_k.numel(), head_dim,
        )  # fmt: skip
        entries = list_entries(r, tiles, options)
        try:
            attention_backward_hopper[(programs,)](
                *_descriptors(r, grad, options), sums_descriptor, *of_rows, grad_k, grad_v, turns, begins,
                query_tiles, grad_k.stride()[:2], sequences, heads, (r.softmax_scale, r.softcap or 0.0), batch,
                tiles, *distances(r), entries, hook_arguments(plan), SCORE_HOOK=plan.score_hook,
                OPTIONS=options, num_warps=SETTINGS.num_warps, enable_fp_fusion=True, launch_cooperative_grid=True,
            )  # fmt: skip
        except CompilationError as error:
            if plan.score_hook is None:
                raise
            _UNCOMPILABLE[plan.score_hook] = f"Gluon cannot compile the hook {plan.score_hook.__name__}: {error}"
            raise HookRefusedError(_UNCOMPILABLE[plan.score_hook]) from None
        round_gradients[(query_tiles * query_heads,)](
            sums, shift, grad_q, begins, r.starts_q, lengths, r.softmax_scale, batch, query_tiles, query_heads,
            grad_q.stride()[:2], head_dim,
        )  # fmt: skip
    return grad_q, grad_k, grad_v, gradient_of_sink_logits(r, shift, delta)


def _descriptors(request: AttentionRequest, grad: Tensor, options: Options) -> tuple[Any, ...]:
    """Return how to load tiles of queries, gradients, keys, values and their tails, and where tails begin."""
    r = request
    boxes = options._replace(block_n=ROWS.value)
    rows = (shared_descriptor(x, [*x.shape], [*x.stride()], [ROWS.value, 1, x.shape[2]]) for x in (r.q, grad))
    tail_rows, tail_start = tail_of(r.k.shape[0], r.group, ROWS.value)
    tails: list[Any] = [None, None]
    if tail_rows:
        for index, x in enumerate((r.k, r.v)):
            copy = x.new_empty(tail_rows, *x.shape[1:])
            copy[: x.shape[0] - tail_start] = x[tail_start:]
            tails[index] = rebased(key_descriptor(copy, boxes), copy)
    keys = (rebased(key_descriptor(x, boxes), x) for x in (r.k, r.v))
    return (*map(rebased, rows, (r.q, grad)), *keys, *tails, tail_start)


def list_entries(request: AttentionRequest, tiles: int, options: Options) -> tuple[Any, ...] | None:
    """Return which tiles of queries visit each tile of keys, as :func:`.hopper_backward.entries_of` reads it."""
    r, blocks = request, request.blocks
    if blocks is None:
        return None
    lists, list_rows = blocks.counts.shape
    rows_each, batch = blocks.block_rows // ROWS.value, r.starts_q.shape[0]
    rows = list_rows * rows_each
    counts, indices, starts = (x.contiguous() for x in (blocks.counts, blocks.indices, blocks.starts))
    marks = torch.empty(lists, tiles, rows, dtype=torch.int32, device=r.q.device)
    # The kernel reads an entry ahead.
    entries = torch.empty(marks.numel() + 1, dtype=torch.int32, device=r.q.device)
    numbers = torch.empty(lists, tiles, batch, 2, dtype=torch.int32, device=r.q.device)
    lengths = (r.lengths_q, r.lengths_k)
    mark_tiles[(lists * rows,)](
        marks, counts, indices, starts, lengths, list_rows, indices.shape[2], rows_each, batch, tiles, *distances(r),
        SPARSE=r.plan.score_hook is not None, OPTIONS=options, num_warps=4,
    )  # fmt: skip
    gather_tiles[(lists * tiles * batch,)](
        entries, numbers, marks, starts, lengths, list_rows, rows_each, batch, tiles, num_warps=1
    )
    return entries, numbers, starts, rows, rows_each, r.q.shape[1] // lists
