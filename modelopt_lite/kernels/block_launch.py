"""Launches the kernels that find blocks, score key blocks, choose among them, and list what was chosen.

The functions return what those of the same name in :mod:`modelopt_lite.kernels.block_scores` do.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .block_kernels import (
    antidiagonal_tile,
    choose_above,
    choose_largest,
    excess_of_blocks,
    join_antidiagonals,
    lay_out,
    list_rows,
    mark_blocks,
    mean_rows,
    multiply_means,
    split_numbers,
    sum_softmax,
)
from .device import cdiv, compute_capability, launch
from .grid_tables import GridTables, grid_shape

if TYPE_CHECKING:
    from .blocks import BlockGrid
    from .request import AttentionRequest

OLDEST = 80
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_BLOCK = 128
"""Positions in a block up to which the kernels hold a block at a time."""
MAX_HEAD_DIM = 256
MEAN_ROWS = 16
"""Query blocks of a program that multiplies means."""
MAX_COLUMNS = 16384
"""Key blocks up to which a program holds all scores of a query block to choose the largest."""
MAX_POSITION = 1 << 30
"""What distances and numbers of keys above it are taken for, so that they fit into 32 bits."""
TABLE_BLOCK = 128
"""Blocks whose tables a program writes."""
PARTIAL_BYTES = 1 << 29
"""About how many bytes :func:`antidiagonal_mass` keeps beside its result."""


def runs_on(x: Tensor) -> bool:
    """Whether kernels run on a tensor's device, which is new enough; which of them run, is up to types and sizes."""
    return x.is_cuda and compute_capability(x.device) >= OLDEST


def grid_tables(request: AttentionRequest, block_size: int, block_rows: int) -> GridTables:
    """As :func:`modelopt_lite.kernels.grid_tables.grid_tables`."""
    r, batch, device = request, request.starts_q.shape[0], request.q.device
    blocks, columns = grid_shape(r, block_size, block_rows)
    shapes = ((blocks,),) * 4 + ((batch, columns),) * 3 + ((batch,),) * 2
    starts = torch.empty(batch, dtype=torch.int32, device=device)
    found = GridTables(starts, *(torch.empty(shape, dtype=torch.int64, device=device) for shape in shapes))
    launch(
        lay_out, max(1, cdiv(blocks, TABLE_BLOCK)) + batch * cdiv(columns, TABLE_BLOCK),
        (
            found.starts, (found.sequence, found.origin_q, found.low_q, found.high_q),
            (found.origin_k, found.low_k, found.high_k), (found.row_q, found.row_k),
            (r.starts_q, r.lengths_q, r.starts_k, r.lengths_k, r.first_q, r.first_k), batch, blocks, columns,
        ),
        (block_rows, block_size, TABLE_BLOCK), num_warps=4,
    )  # fmt: skip
    return found


def marked(grid: BlockGrid, first_blocks: int, recent_blocks: int) -> tuple[Tensor, Tensor]:
    """As :meth:`modelopt_lite.kernels.blocks.BlockGrid.marked`."""
    request, (blocks, columns) = grid.request, grid.shape
    seen, forced = (torch.empty(blocks, columns, dtype=torch.bool, device=request.q.device) for _ in range(2))
    if seen.numel():
        width = min(1024, _power(columns))
        tables = (
            grid.sequence, grid.origin_q, grid.low_q, grid.high_q, grid.origin_k, grid.low_k, grid.high_k,
            request.lengths_q,
        )  # fmt: skip
        most = MAX_POSITION // grid.block_size
        numbers = (columns, _masks(request)[2], min(first_blocks, most), min(recent_blocks, most))
        masks = (request.is_causal, request.sliding_window is not None, request.plan.sparse_decode)
        launch(
            mark_blocks, blocks, (_bytes(seen), _bytes(forced), *tables, *numbers),
            (grid.block_rows, grid.block_size, width, *masks), num_warps=max(1, width // 256),
        )  # fmt: skip
    return seen, forced


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
    tables = (None, grid.row_k, grid.origin_k, grid.low_k, grid.high_k)
    means = _means(grid.request.k, tables, batch * columns, columns, grid.block_size)
    return means.view(batch, columns, *grid.request.k.shape[1:])


def mean_queries(grid: BlockGrid) -> Tensor:
    """As :func:`modelopt_lite.kernels.block_scores.mean_queries`."""
    tables = (grid.sequence, grid.row_q, grid.origin_q, grid.low_q, grid.high_q)
    return _means(grid.request.q, tables, grid.shape[0], 0, grid.block_rows)


def _means(x: Tensor, tables: tuple[Tensor | None, ...], blocks: int, blocks_each: int, size: int) -> Tensor:
    heads, dim = x.shape[1:]
    means = torch.empty(blocks, heads, dim, dtype=torch.float32, device=x.device)
    x = _readable(x)
    if means.numel():
        launch(
            mean_rows, blocks * heads, (x, means, *tables, blocks_each, *x.stride()[:2]),
            (heads, dim, _block_d(dim), size), num_warps=4,
        )  # fmt: skip
    return means


def mean_scores(grid: BlockGrid) -> Tensor:
    """As :func:`modelopt_lite.kernels.block_scores.mean_scores`."""
    request, keys, queries = grid.request, mean_keys(grid), mean_queries(grid)
    heads, dim = queries.shape[1:]
    blocks, columns = grid.shape
    scores = torch.empty(heads, blocks, columns, dtype=torch.float32, device=queries.device)
    if scores.numel():
        tables = (grid.sequence, grid.low_q, grid.high_q, grid.low_k, grid.high_k)
        launch(
            multiply_means, heads * cdiv(blocks, MEAN_ROWS),
            (queries, keys, scores, *tables, blocks, columns, *_masks(request)),
            (heads, heads // keys.shape[2], dim, _block_d(dim), MEAN_ROWS, 64, grid.block_size, *_mask_kinds(request)),
            num_warps=4, num_stages=1,
        )  # fmt: skip
    return scores


def _masks(request: AttentionRequest) -> tuple[float, float, int]:
    """Return what kernels take at run time: scale, cap of the scores, and sliding window."""
    return request.softmax_scale, request.softcap or 1.0, min(request.sliding_window or 0, MAX_POSITION)


def _mask_kinds(request: AttentionRequest) -> tuple[bool, bool, bool]:
    """Return what they know at compile time: whether it is causal, and has a sliding window and a cap."""
    return request.is_causal, request.sliding_window is not None, request.softcap is not None


def softmax_mass(grid: BlockGrid, pooled: Tensor) -> Tensor:
    """As :func:`modelopt_lite.kernels.block_scores.softmax_mass`."""
    request, q = grid.request, _readable(grid.request.q)
    heads, dim = q.shape[1:]
    (blocks, columns), itemsize = grid.shape, q.element_size()
    mass = torch.empty(heads, blocks, columns, dtype=torch.float32, device=q.device)
    if mass.numel() == 0:
        return mass
    pooled, number = pooled.contiguous(), 1
    if itemsize == 2:  # two numbers of 16 bits hold what one of them rounds away
        parts, number = torch.empty(2, *pooled.shape, dtype=q.dtype, device=q.device), 2
        launch(split_numbers, cdiv(pooled.numel(), 1024), (pooled, parts, pooled.numel()), (1024,), num_warps=4)
        pooled = parts
    kv_heads = pooled.shape[-2]
    is_small = grid.block_rows < MAX_BLOCK or (itemsize == 2 and dim <= 128)
    tables = (grid.sequence, grid.row_q, grid.origin_q, grid.low_q, grid.high_q, grid.low_k, grid.high_k)
    numbers = (q.stride(0), q.stride(1), pooled.numel() // number, blocks, columns)
    launch(
        sum_softmax, heads * blocks, (q, pooled, mass, *tables, *numbers, *_masks(request)),
        (
            heads, heads // kv_heads, number, dim, _block_d(dim), grid.block_rows, 64 if itemsize == 2 else 16,
            grid.block_size, *_mask_kinds(request),
        ),
        num_warps=4 if is_small else 8, num_stages=2 if itemsize == 2 else 1,
    )  # fmt: skip
    return mass


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
    scale, softcap, window = _masks(request)
    masks, of_tile = _mask_kinds(request), tile // groups
    step = max(1, PARTIAL_BYTES // (4 * heads * groups * columns * of_tile)) * of_tile
    for begin in range(0, blocks, step):
        here = min(step, blocks - begin)
        partial = torch.empty(heads, here * groups, columns, dtype=torch.float32, device=q.device)
        highest = torch.empty(heads, here * groups, tiles, dtype=torch.float32, device=q.device)
        numbers = (begin, here, blocks, columns, tiles)
        launch(
            antidiagonal_tile, cdiv(here, of_tile) * tiles * heads,
            (
                q, k, partial, highest, *tables, grid.row_k, grid.low_k, grid.high_k, *q.stride()[:2], *k.stride()[:2],
                *numbers, scale / stride, softcap, window,
            ),
            (
                heads, heads // k.shape[1], stride, dim, min(64, _block_d(dim)), tile, tile, grid.block_rows,
                grid.block_size, *masks,
            ),
            num_warps=8, num_stages=1 if not is_half else 4 if _is_large(q) else 3,
        )  # fmt: skip
        launch(
            join_antidiagonals, here * heads,
            (partial, highest, mass, grid.sequence, *tables[2:], grid.low_k, grid.high_k, *numbers, window),
            (heads, stride, grid.block_rows, grid.block_size, 32, 128, joined, *masks[:2]), num_warps=4,
        )  # fmt: skip
    return mass


def largest(scores: Tensor, seen: Tensor, forced: Tensor, share: float | Tensor, by_mass: bool) -> Tensor:
    """As :func:`modelopt_lite.kernels.block_scores.largest_blocks` and ``heaviest_blocks``, FP32 scores alone."""
    heads, blocks, columns = scores.shape
    chosen = torch.empty(heads, blocks, columns, dtype=torch.bool, device=scores.device)
    if chosen.numel():
        width = _power(columns)
        launch(
            choose_largest, heads * blocks,
            (
                scores.contiguous(), _bytes(seen), _bytes(forced), _bytes(chosen), *_number_of_blocks(share, blocks),
                blocks, columns,
            ),
            (by_mass, width), num_warps=min(16, max(1, width // 256)),
        )  # fmt: skip
    return chosen


def above(scores: Tensor, seen: Tensor, fraction: float | Tensor) -> Tensor:
    """As :func:`modelopt_lite.kernels.block_scores.blocks_above`, FP32 scores alone."""
    heads, blocks, columns = scores.shape
    chosen = torch.empty(heads, blocks, columns, dtype=torch.bool, device=scores.device)
    if chosen.numel():
        width = min(1024, _power(columns))
        number = _number_of_blocks(fraction, blocks)
        launch(
            choose_above, heads * blocks,
            (scores.contiguous(), _bytes(seen), _bytes(chosen), *number, blocks, columns), (width,),
            num_warps=max(1, width // 256),
        )  # fmt: skip
    return chosen


def _number_of_blocks(number: float | Tensor, blocks: int) -> tuple[Tensor | None, int]:
    """Return a number of each query block for a kernel: FP64 numbers, or the bits of one."""
    if isinstance(number, Tensor):
        return number.double().expand(blocks, 1).contiguous(), 0
    return None, struct.unpack("<q", struct.pack("<d", number))[0]


def listed(mask: Tensor, seen: Tensor | None = None, forced: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """List the places of the last dimension where a mask is set; see ``KeyBlocks``.

    Args:
        mask: booleans, ``[..., rows, columns]``.
        seen: if given, only places count that are seen, ``[rows, columns]``.
        forced: given together with it: and those that are forced.

    Returns:
        How many there are, int32 ``[...]``, and their numbers, followed by all others, int32 of the mask's shape.
    """
    counts = torch.empty(mask.shape[:-1], dtype=torch.int32, device=mask.device)
    indices = torch.empty(mask.shape, dtype=torch.int32, device=mask.device)
    if indices.numel() == 0:
        return counts.zero_(), indices
    rows, columns = mask.shape[-2:]
    width = min(1024, _power(columns))
    of_all = [None if x is None else _bytes(x) for x in (seen, forced)]
    launch(
        list_rows, counts.numel(), (_bytes(mask), *of_all, counts, indices, rows, columns), (width,),
        num_warps=max(1, width // 256),
    )  # fmt: skip
    return counts, indices


def _bytes(mask: Tensor) -> Tensor:
    return mask.contiguous().view(torch.int8)


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
        width, warps, stages = excess_settings(q, grid.block_rows, grid.block_size)
        scale, softcap, window = _masks(request)
        tables = (
            grid.sequence,
            grid.row_q,
            grid.origin_q,
            grid.low_q,
            grid.high_q,
            grid.row_k,
            grid.low_k,
            grid.high_k,
        )
        distances = (min(x, MAX_POSITION) for x in (plan.num_sink_tokens, plan.dense_window_size, window))
        launch(
            excess_of_blocks, heads * blocks,
            (
                q, k, None if selected is None else _bytes(selected), found, *tables, *q.stride()[:2], *k.stride()[:2],
                blocks, columns, scale, softcap, *distances,
            ),
            (
                heads // k.shape[1], dim, _block_d(dim), grid.block_rows, grid.block_size, width, *_mask_kinds(request),
            ),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return found


def excess_settings(q: Tensor, rows: int, size: int) -> tuple[int, int, int]:
    """Return keys of a step of :func:`excess_of_blocks`, its warps and its stages, for these queries and blocks."""
    if q.element_size() == 2:
        return size, 4 if q.shape[2] <= 128 else 8, 2
    return 16, 8 if rows == MAX_BLOCK else 4, 1


def _is_large(x: Tensor) -> bool:
    """Whether a GPU offers a program 227 KB of shared memory, and not 99 KB as some do."""
    return not x.is_cuda or 90 <= compute_capability(x.device) < 120


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _block_d(dim: int) -> int:
    return max(16, _power(dim))


def _power(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
