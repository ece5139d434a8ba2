"""Launches the kernels that score key blocks, choose among them, and list what was chosen.

The functions return what those of the same name in :mod:`modelopt_lite.kernels.block_scores` do.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .block_kernels import (
    antidiagonal_tile,
    choose_largest,
    excess_of_blocks,
    join_antidiagonals,
    list_rows,
    mean_rows,
    sum_softmax,
)
from .device import cdiv, compute_capability

if TYPE_CHECKING:
    from .blocks import BlockGrid

OLDEST = 80
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_BLOCK = 128
"""Positions in a block up to which the kernels hold a block at a time."""
MAX_HEAD_DIM = 256
MAX_COLUMNS = 16384
"""Key blocks up to which a program holds all scores of a query block to choose the largest."""
MAX_POSITION = 1 << 30
"""What distances and numbers of keys above it are taken for, so that they fit into 32 bits."""
PARTIAL_BYTES = 1 << 29
"""About how many bytes :func:`antidiagonal_mass` keeps beside its result."""


def is_wanted(x: Tensor) -> bool:
    """Whether kernels are to run on a tensor: on a GPU, where ``MODELOPT_LITE_SELECTION`` is ``triton``.

    Without it PyTorch operations choose blocks, as the kernels have run in Triton's interpreter alone so far.

    Raises:
        ValueError: if the variable has another value than ``triton``, ``torch`` or none.
    """
    value = os.environ.get("MODELOPT_LITE_SELECTION", "")
    if value not in ("", "torch", "triton"):
        raise ValueError(f"MODELOPT_LITE_SELECTION: {value!r} is not allowed; triton, torch or nothing")
    return x.is_cuda and value == "triton"


def refusal(grid: BlockGrid) -> str | None:
    """Say why the kernels that score cannot run, or None if they can."""
    request = grid.request
    q, k = request.q, request.k
    if q.is_cuda and compute_capability(q.device) < OLDEST:
        return f"the GPU's compute capability is {compute_capability(q.device) / 10}, not {OLDEST / 10} or later"
    if q.dtype not in DTYPES or k.dtype != q.dtype:
        return f"q is {q.dtype} and k {k.dtype}, not both one of {', '.join(map(str, DTYPES))}"
    if q.shape[2] > 128 and not _is_large(q):
        return f"q has a head_dim of {q.shape[2]}, above 128, for which the GPU has too little shared memory"
    if q.shape[2] > MAX_HEAD_DIM or MAX_BLOCK * _block_d(q.shape[2]) * q.element_size() > 1 << 16:
        return f"q has a head_dim of {q.shape[2]} in {q.dtype}, above {(1 << 16) // MAX_BLOCK // q.element_size()}"
    for name, size in (("block_size", grid.block_size), ("block_rows", grid.block_rows)):
        if size > MAX_BLOCK or size & (size - 1):
            return f"{name} is {size}, not a power of two up to {MAX_BLOCK}"
    return None


def mean_keys(grid: BlockGrid) -> Tensor:
    """As :func:`modelopt_lite.kernels.block_scores.mean_keys`."""
    batch, columns = grid.low_k.shape
    sequence = torch.arange(batch, device=grid.low_k.device).repeat_interleave(columns, output_size=batch * columns)
    tables = (sequence, grid.row_k, grid.origin_k, grid.low_k, grid.high_k)
    return _means(grid.request.k, tables, grid.block_size).view(batch, columns, *grid.request.k.shape[1:])


def mean_queries(grid: BlockGrid) -> Tensor:
    """As :func:`modelopt_lite.kernels.block_scores.mean_queries`."""
    return _means(grid.request.q, (grid.sequence, grid.row_q, grid.origin_q, grid.low_q, grid.high_q), grid.block_rows)


def _means(x: Tensor, tables: tuple[Tensor, ...], size: int) -> Tensor:
    blocks, (heads, dim) = tables[0].shape[0], x.shape[1:]
    means = torch.empty(blocks, heads, dim, dtype=torch.float32, device=x.device)
    x = _readable(x)
    if means.numel():
        mean_rows[(blocks * heads,)](
            x, means, *tables, x.stride(0), x.stride(1), HEADS=heads, DIM=dim, BLOCK_D=_block_d(dim), SIZE=size
        )
    return means


def softmax_mass(grid: BlockGrid, pooled: Tensor) -> Tensor:
    """As :func:`modelopt_lite.kernels.block_scores.softmax_mass`."""
    request, q = grid.request, _readable(grid.request.q)
    heads, dim = q.shape[1:]
    (blocks, columns), itemsize = grid.shape, q.element_size()
    mass = torch.empty(heads, blocks, columns, dtype=torch.float32, device=q.device)
    if mass.numel() == 0:
        return mass
    parts = pooled[None]
    if itemsize == 2:  # two numbers of 16 bits hold what one of them rounds away
        first = pooled.to(q.dtype)
        parts = torch.stack([first, (pooled - first.float()).to(q.dtype)])
    repeat = heads // pooled.shape[2]
    settings = mass_settings(q, repeat, grid.block_rows)
    sum_softmax[(heads // settings["TOGETHER"] * blocks,)](
        q, parts.contiguous(), mass, grid.sequence, grid.row_q, grid.origin_q, grid.low_q, grid.high_q, grid.low_k,
        grid.high_k, q.stride(0), q.stride(1), pooled.numel(), blocks, columns, request.softmax_scale,
        request.softcap or 1.0, request.sliding_window or 0,
        HEADS=heads, REPEAT=repeat, PARTS=len(parts), DIM=dim, BLOCK_D=_block_d(dim), ROWS=grid.block_rows,
        SIZE=grid.block_size, CAUSAL=request.is_causal, SLIDING=request.sliding_window is not None,
        HAS_SOFTCAP=request.softcap is not None, **settings,
    )  # fmt: skip
    return mass


def mass_settings(q: Tensor, repeat: int, rows: int) -> dict[str, int]:
    """Return how :func:`sum_softmax` is launched for queries of which ``repeat`` heads share keys."""
    is_half = q.element_size() == 2
    return {
        "TOGETHER": 1, "BLOCK_N": 64 if is_half else 16, "num_warps": 8 if rows == MAX_BLOCK else 4,
        "num_stages": 2 if is_half else 1,
    }  # fmt: skip


def antidiagonal_mass(grid: BlockGrid, stride: int) -> Tensor:
    """As :func:`modelopt_lite.kernels.block_scores.antidiagonal_mass`."""
    request, q, k = grid.request, _readable(grid.request.q), _readable(grid.request.k)
    heads, dim = q.shape[1:]
    blocks, columns = grid.shape
    mass = torch.empty(heads, blocks, columns, dtype=torch.float32, device=q.device)
    if mass.numel() == 0:
        return mass
    is_half = q.element_size() == 2
    tile = 128 if is_half else 32  # groups of queries, and of keys
    groups, joined = grid.block_rows // stride, tile * stride // grid.block_size
    tiles = cdiv(columns, joined)
    tables = (grid.sequence, grid.row_q, grid.origin_q, grid.low_q, grid.high_q)
    masks = {
        "STRIDE": stride, "ROWS": grid.block_rows, "SIZE": grid.block_size, "CAUSAL": request.is_causal,
        "SLIDING": request.sliding_window is not None,
    }  # fmt: skip
    window, of_tile = request.sliding_window or 0, tile // groups
    step = max(1, PARTIAL_BYTES // (4 * heads * groups * columns * of_tile)) * of_tile
    for begin in range(0, blocks, step):
        here = min(step, blocks - begin)
        partial = torch.empty(heads, here * groups, columns, dtype=torch.float32, device=q.device)
        highest = torch.empty(heads, here * groups, tiles, dtype=torch.float32, device=q.device)
        antidiagonal_tile[(cdiv(here, of_tile) * tiles * heads,)](
            q, k, partial, highest, *tables, grid.row_k, grid.low_k, grid.high_k, q.stride(0), q.stride(1), k.stride(0),
            k.stride(1), begin, here, blocks, columns, tiles, request.softmax_scale / stride, request.softcap or 1.0,
            window, HEADS=heads, REPEAT=heads // k.shape[1], DIM=dim, BLOCK_K=min(64, _block_d(dim)), BLOCK_M=tile,
            BLOCK_N=tile, HAS_SOFTCAP=request.softcap is not None, **masks, num_warps=8,
            num_stages=1 if not is_half else 4 if _is_large(q) else 3,
        )  # fmt: skip
        join_antidiagonals[(here * heads,)](
            partial, highest, mass, grid.sequence, *tables[2:], grid.low_k, grid.high_k, begin, here, blocks, columns,
            tiles, window, HEADS=heads, BLOCK_T=32, BLOCK_J=128, JOINED=joined, **masks, num_warps=4,
        )  # fmt: skip
    return mass


def largest(scores: Tensor, seen: Tensor, forced: Tensor, share: float | Tensor, by_mass: bool) -> Tensor:
    """As :func:`modelopt_lite.kernels.block_scores.largest_blocks` and ``heaviest_blocks``, FP32 scores alone."""
    heads, blocks, columns = scores.shape
    chosen = torch.empty(heads, blocks, columns, dtype=torch.bool, device=scores.device)
    if chosen.numel():
        if not isinstance(share, Tensor):  # filled on the device, as a copy to it would wait
            share = torch.full((blocks, 1), share, dtype=torch.float64, device=scores.device)
        width = _power(columns)
        choose_largest[(heads * blocks,)](
            scores.contiguous(), *(x.contiguous().view(torch.uint8) for x in (seen, forced)),
            share.double().expand(blocks, 1).contiguous(), chosen.view(torch.int8), blocks, columns,
            BY_MASS=by_mass, BLOCK_T=width, num_warps=min(16, max(1, width // 256)),
        )  # fmt: skip
    return chosen


def listed(mask: Tensor) -> tuple[Tensor, Tensor]:
    """List the places of the last dimension where a mask is set; see ``KeyBlocks``.

    Returns:
        How many there are, int32 ``[...]``, and their numbers, followed by all others, int32 of the mask's shape.
    """
    counts = torch.empty(mask.shape[:-1], dtype=torch.int32, device=mask.device)
    indices = torch.empty(mask.shape, dtype=torch.int32, device=mask.device)
    if indices.numel() == 0:
        return counts.zero_(), indices
    width = min(1024, _power(mask.shape[-1]))
    list_rows[(counts.numel(),)](
        mask.contiguous().view(torch.uint8), counts, indices, mask.shape[-1], BLOCK_T=width,
        num_warps=max(1, width // 256),
    )  # fmt: skip
    return counts, indices


def excess_refusal(grid: BlockGrid) -> str | None:
    """Say why :func:`excess` cannot run, or None if it can."""
    if grid.request.plan.keep is not None:
        return "the plan has a rule beside its skip rule"
    if not grid.request.softmax_scale > 0:
        return f"softmax_scale is {grid.request.softmax_scale}, not above 0"
    return refusal(grid)


def excess(grid: BlockGrid, selected: Tensor | None = None) -> Tensor:
    """Return by how much scores of key blocks exceed the references of skip-softmax, at most, for all its thresholds.

    A query's reference is its largest score among the keys that are exempt or in a diagonal block that is selected. The
    others count if they are not exempt and in no diagonal block.

    Args:
        grid: the query blocks of all sequences, and their key blocks; :func:`excess_refusal` has been asked.
        selected: which key blocks are selected, booleans ``[query_heads, query_blocks, key_blocks]``; None: all.

    Returns:
        FP32 ``[query_heads, query_blocks, key_blocks]``: the largest difference of any other visible score in the block
        from its query's reference; ``inf`` if a query has no reference, and ``-inf`` if there are no others. Anything
        where nothing is seen or selected.
    """
    request, q, k = grid.request, _readable(grid.request.q), _readable(grid.request.k)
    plan, (heads, dim), (blocks, columns) = request.plan, q.shape[1:], grid.shape
    found = torch.empty(heads, blocks, columns, dtype=torch.float32, device=q.device)
    if found.numel():
        excess_of_blocks[(heads * blocks,)](
            q, k, None if selected is None else selected.contiguous().view(torch.uint8), found, grid.sequence,
            grid.row_q, grid.origin_q, grid.low_q, grid.high_q, grid.row_k, grid.low_k, grid.high_k, q.stride(0),
            q.stride(1), k.stride(0), k.stride(1), blocks, columns, request.softmax_scale, request.softcap or 1.0,
            min(plan.num_sink_tokens, MAX_POSITION), min(plan.dense_window_size, MAX_POSITION),
            min(request.sliding_window or 0, MAX_POSITION), REPEAT=heads // k.shape[1], DIM=dim, BLOCK_D=_block_d(dim),
            ROWS=grid.block_rows, SIZE=grid.block_size, CAUSAL=request.is_causal,
            SLIDING=request.sliding_window is not None, HAS_SOFTCAP=request.softcap is not None,
            **excess_settings(q, grid.block_rows, grid.block_size),
        )  # fmt: skip
    return found


def excess_settings(q: Tensor, rows: int, size: int) -> dict[str, int]:
    """Return how :func:`excess_of_blocks` is launched for these queries and blocks."""
    if q.element_size() == 2:
        return {"BLOCK_N": size, "num_warps": 4 if q.shape[2] <= 128 else 8, "num_stages": 2}
    return {"BLOCK_N": 16, "num_warps": 8 if rows == MAX_BLOCK else 4, "num_stages": 1}


def _is_large(x: Tensor) -> bool:
    """Whether a GPU offers a program 227 KB of shared memory, and not 99 KB as some do."""
    return not x.is_cuda or 90 <= compute_capability(x.device) < 120


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _block_d(dim: int) -> int:
    return max(16, _power(dim))


def _power(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
