"""Launches the kernels that find blocks, score key blocks, choose among them, and list what was chosen.

The functions return what those of the same name in :mod:`modelopt_lite.kernels.block_scores` do.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeAlias

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
from .device import Launch, cdiv, compute_capability
from .grid_tables import GridTables, grid_shape

if TYPE_CHECKING:
    from .blocks import BlockGrid
    from .request import AttentionRequest

Rule: TypeAlias = Literal["above", "heaviest", "largest"]

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
MAX_LAUNCHES = 1024
"""How many launches of a kernel are remembered."""


def runs_on(x: Tensor) -> bool:
    """Whether kernels run on a tensor's device, which is new enough; which of them run, is up to types and sizes."""
    return x.is_cuda and compute_capability(x.device) >= OLDEST


def grid_tables(grid: BlockGrid) -> GridTables:
    """As :func:`modelopt_lite.kernels.grid_tables.grid_tables`, of a grid that has no tables yet."""
    return grid.prepared(_prepare_tables)(grid)


def _prepare_tables(grid: BlockGrid) -> Callable[[BlockGrid], GridTables]:
    batch, device = grid.request.starts_q.shape[0], grid.request.q.device
    blocks, columns = grid_shape(grid.request, grid.block_size, grid.block_rows)
    programs = max(1, cdiv(blocks, TABLE_BLOCK)) + batch * cdiv(columns, TABLE_BLOCK)
    fill = Launch(lay_out, device, grid.block_rows, grid.block_size, TABLE_BLOCK, num_warps=4)
    # One piece of memory, of which each table begins at a multiple of 16 bytes: views cost Python less.
    views, size = [], 0
    for shape in (*((blocks,),) * 4, *((batch, columns),) * 3, *((batch,),) * 2):
        views.append((shape, (columns, 1)[-len(shape) :], size))
        size += math.prod(shape) + math.prod(shape) % 2

    def run(grid: BlockGrid) -> GridTables:
        r, memory = grid.request, torch.empty(size, dtype=torch.int64, device=device)
        starts = torch.empty(batch, dtype=torch.int32, device=device)
        found = GridTables(starts, *(memory.as_strided(*view) for view in views))
        tensors = (r.starts_q, r.lengths_q, r.starts_k, r.lengths_k, r.first_q, r.first_k)
        packing = tuple([None if x is None else x.contiguous() for x in tensors])
        fill(programs, found.starts, found[1:5], found[5:8], found[8:], packing, batch, blocks, columns)
        return found

    return run


def marked(grid: BlockGrid, first_blocks: int, recent_blocks: int) -> tuple[Tensor, Tensor]:
    """As :meth:`modelopt_lite.kernels.blocks.BlockGrid.marked`."""
    return grid.prepared(_prepare_marks, first_blocks, recent_blocks)(grid)


def _prepare_marks(
    grid: BlockGrid, first_blocks: int, recent_blocks: int
) -> Callable[[BlockGrid], tuple[Tensor, Tensor]]:
    request, (blocks, columns), device = grid.request, grid.shape, grid.request.q.device
    width, most = min(1024, _power(columns)), MAX_POSITION // grid.block_size
    numbers = (columns, _masks(request)[2], min(first_blocks, most), min(recent_blocks, most))
    mark = Launch(
        mark_blocks, device, grid.block_rows, grid.block_size, width, *_mask_kinds(request)[:2],
        request.plan.sparse_decode, num_warps=max(1, width // 256),
    )  # fmt: skip

    def run(grid: BlockGrid) -> tuple[Tensor, Tensor]:
        seen, forced = (torch.empty(blocks, columns, dtype=torch.bool, device=device) for _ in range(2))
        if seen.numel():
            mark(
                blocks, seen, forced, grid.sequence, grid.origin_q, grid.low_q, grid.high_q, grid.origin_k, grid.low_k,
                grid.high_k, grid.request.lengths_q.contiguous(), *numbers,
            )  # fmt: skip
        return seen, forced

    return run


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
    means = grid.prepared(_prepare_means, False, True)(grid)
    return means.view(*grid.low_k.shape, *grid.request.k.shape[1:])


def mean_queries(grid: BlockGrid) -> Tensor:
    """As :func:`modelopt_lite.kernels.block_scores.mean_queries`."""
    means = grid.prepared(_prepare_means, True, False)(grid)
    return means.view(grid.shape[0], *grid.request.q.shape[1:])


def _prepare_means(grid: BlockGrid, of_queries: bool, of_keys: bool, parts: int = 1) -> Callable[[BlockGrid], Tensor]:
    """Prepare means of the queries of blocks, of their keys, or of both.

    Args:
        grid: one of those that they are for.
        of_queries: whether those of queries are wanted, ``[query_blocks, query_heads, head_dim]``.
        of_keys: whether those of keys are, ``[batch, key_blocks, kv_heads, head_dim]``; they come behind the others.
        parts: 1 for FP32, 2 for sums of two numbers of the inputs' type, the second ones behind all first ones.
    """
    q, k = _readable(grid.request.q), _readable(grid.request.k)
    (heads, dim), kv_heads, device, (blocks, columns) = q.shape[1:], k.shape[1], q.device, grid.shape
    programs_q, programs_k = of_queries * blocks * heads, of_keys * grid.starts.shape[0] * columns * kv_heads
    programs, dtype = programs_q + programs_k, torch.float32 if parts == 1 else q.dtype
    numbers = (programs_q, columns, *q.stride()[:2], *k.stride()[:2])
    means_of_rows = Launch(
        mean_rows, device, heads, kv_heads, dim, _block_d(dim), grid.block_rows, grid.block_size, parts, num_warps=4
    )

    def run(grid: BlockGrid) -> Tensor:
        q, k = _readable(grid.request.q), _readable(grid.request.k)
        means = q.new_empty(parts * programs * dim, dtype=dtype)
        if programs:
            means_of_rows(
                programs, q, k, means, grid.sequence, grid.row_q, grid.origin_q, grid.low_q, grid.high_q, grid.row_k,
                grid.origin_k, grid.low_k, grid.high_k, *numbers,
            )  # fmt: skip
        return means

    return run


def mean_scores(grid: BlockGrid) -> Tensor:
    """As :func:`modelopt_lite.kernels.block_scores.mean_scores`."""
    return grid.prepared(_prepare_mean_scores)(grid)


def _prepare_mean_scores(grid: BlockGrid) -> Callable[[BlockGrid], Tensor]:
    request, (blocks, columns) = grid.request, grid.shape
    (heads, dim), repeat, device = request.q.shape[1:], request.q.shape[1] // request.k.shape[1], request.q.device
    means, numbers = _prepare_means(grid, True, True), (blocks, columns, *_masks(request))
    programs = heads * cdiv(blocks, MEAN_ROWS)
    multiply = Launch(
        multiply_means, device, heads, repeat, dim, _block_d(dim), MEAN_ROWS, 64, grid.block_size,
        *_mask_kinds(request), num_warps=4, num_stages=1,
    )  # fmt: skip

    def run(grid: BlockGrid) -> Tensor:
        scores = grid.request.q.new_empty(heads, blocks, columns, dtype=torch.float32)
        if scores.numel():
            multiply(
                programs, means(grid), scores, grid.sequence, grid.low_q, grid.high_q, grid.low_k, grid.high_k,
                *numbers,
            )  # fmt: skip
        return scores

    return run


def _masks(request: AttentionRequest) -> tuple[float, float, int]:
    """Return what kernels take at run time: scale, cap of the scores, and sliding window."""
    return request.softmax_scale, request.softcap or 1.0, min(request.sliding_window or 0, MAX_POSITION)


def _mask_kinds(request: AttentionRequest) -> tuple[bool, bool, bool]:
    """Return what they know at compile time: whether it is causal, and has a sliding window and a cap."""
    return request.is_causal, request.sliding_window is not None, request.softcap is not None


def softmax_mass(grid: BlockGrid, pooled: Tensor | None) -> Tensor:
    """As :func:`modelopt_lite.kernels.block_scores.softmax_mass`."""
    if pooled is None:
        return grid.prepared(_prepare_softmax_mass)(grid, None)
    pooled = pooled.contiguous()
    return grid.prepared(_prepare_softmax_mass, pooled.dtype, pooled.data_ptr() & 15)(grid, pooled)


def _prepare_softmax_mass(grid: BlockGrid, *_: object) -> Callable[[BlockGrid, Tensor | None], Tensor]:
    """Prepare masses by the means of keys; or by other pooled keys, whose type and alignment follow the grid then."""
    request, q, (blocks, columns) = grid.request, _readable(grid.request.q), grid.shape
    (heads, dim), kv_heads, itemsize, device = q.shape[1:], request.k.shape[1], q.element_size(), q.device
    dtype, parts = q.dtype, 2 if itemsize == 2 else 1  # two numbers of 16 bits hold what one of them rounds away
    size = grid.starts.shape[0] * columns * kv_heads * dim
    means = _prepare_means(grid, False, True, parts)
    split = Launch(split_numbers, device, 1024, num_warps=4)
    is_small = grid.block_rows < MAX_BLOCK or (itemsize == 2 and dim <= 128)
    masses = Launch(
        sum_softmax, device, heads, heads // kv_heads, parts, dim, _block_d(dim), grid.block_rows,
        64 if itemsize == 2 else 16, grid.block_size, *_mask_kinds(request),
        num_warps=4 if is_small else 8, num_stages=2 if itemsize == 2 else 1,
    )  # fmt: skip
    numbers = (*q.stride()[:2], size, blocks, columns, *_masks(request))

    def run(grid: BlockGrid, pooled: Tensor | None) -> Tensor:
        mass = grid.request.q.new_empty(heads, blocks, columns, dtype=torch.float32)
        if mass.numel() == 0:
            return mass
        if pooled is None:
            pooled = means(grid)
        elif parts > 1:
            whole, pooled = pooled, torch.empty(parts * size, dtype=dtype, device=device)
            split(cdiv(size, 1024), whole, pooled, size)
        masses(
            heads * blocks, _readable(grid.request.q), pooled, mass, grid.sequence, grid.row_q, grid.origin_q,
            grid.low_q, grid.high_q, grid.low_k, grid.high_k, *numbers,
        )  # fmt: skip
        return mass

    return run


def antidiagonal_mass(grid: BlockGrid, stride: int) -> Tensor:
    """As :func:`modelopt_lite.kernels.block_scores.antidiagonal_mass`."""
    return grid.prepared(_prepare_antidiagonal_mass, stride)(grid)


def _prepare_antidiagonal_mass(grid: BlockGrid, stride: int) -> Callable[[BlockGrid], Tensor]:
    request, q, k, (blocks, columns) = grid.request, _readable(grid.request.q), _readable(grid.request.k), grid.shape
    (heads, dim), device, is_half = q.shape[1:], q.device, q.element_size() == 2
    tile = 128 if is_half else 32  # groups of queries, and of keys
    groups, joined = grid.block_rows // stride, tile * stride // grid.block_size
    tiles, of_tile = cdiv(columns, joined), tile // groups
    scale, softcap, window = _masks(request)
    masks, strides = _mask_kinds(request), (*q.stride()[:2], *k.stride()[:2])
    step = max(1, PARTIAL_BYTES // max(1, 4 * heads * groups * columns * of_tile)) * of_tile
    multiply = Launch(
        antidiagonal_tile, device, heads, heads // k.shape[1], stride, dim, min(64, _block_d(dim)), tile, tile,
        grid.block_rows, grid.block_size, *masks,
        num_warps=8, num_stages=1 if not is_half else 4 if _is_large(q) else 3,
    )  # fmt: skip
    join = Launch(
        join_antidiagonals, device, heads, stride, grid.block_rows, grid.block_size, 32, 128, joined, *masks[:2],
        num_warps=4,
    )  # fmt: skip

    def run(grid: BlockGrid) -> Tensor:
        mass = grid.request.q.new_empty(heads, blocks, columns, dtype=torch.float32)
        if mass.numel() == 0:
            return mass
        q, k = _readable(grid.request.q), _readable(grid.request.k)
        for begin in range(0, blocks, step):
            here = min(step, blocks - begin)
            partial = mass.new_empty(heads * here * groups * (columns + tiles))
            numbers = (begin, here, blocks, columns, tiles)
            multiply(
                cdiv(here, of_tile) * tiles * heads, q, k, partial, grid.sequence, grid.row_q, grid.origin_q,
                grid.low_q, grid.high_q, grid.row_k, grid.low_k, grid.high_k, *strides, *numbers, scale / stride,
                softcap, window,
            )  # fmt: skip
            join(
                here * heads, partial, mass, grid.sequence, grid.origin_q, grid.low_q, grid.high_q,
                grid.low_k, grid.high_k, *numbers, window,
            )  # fmt: skip
        return mass

    return run


def chosen(scores: Tensor, seen: Tensor, forced: Tensor | None, rule: Rule, number: float | Tensor) -> Tensor:
    """As :meth:`modelopt_lite.kernels.block_scores.BlockChoice.chosen`, FP32 scores alone.

    Without ``forced``, the rule must be ``"above"``.
    """
    found = scores.new_empty(*scores.shape, dtype=torch.bool)  # PyTorch reads a tuple more slowly
    if found.numel():
        _choose(scores, seen, forced, rule, number, found, None, None)
    return found


def listed_choice(
    scores: Tensor, seen: Tensor, forced: Tensor, rule: Rule, number: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Return lists of what :func:`chosen` returns and is seen, and of what is forced, as :func:`listed`."""
    heads, blocks, columns = scores.shape
    counts = scores.new_empty(heads, blocks, dtype=torch.int32)
    indices = scores.new_empty(heads, blocks, columns, dtype=torch.int32)
    if indices.numel() == 0:
        return counts.zero_(), indices
    _choose(scores, seen, forced, rule, number, None, counts, indices)
    return counts, indices


def _choose(
    scores: Tensor,
    seen: Tensor,
    forced: Tensor | None,
    rule: Rule,
    number: float | Tensor,
    found: Tensor | None,
    counts: Tensor | None,
    indices: Tensor | None,
) -> None:
    """Launch a choice that fills ``found``, or the lists."""
    (heads, blocks, columns), scores, seen = scores.shape, scores.contiguous(), seen.contiguous()
    if forced is not None:
        forced = forced.contiguous()
    numbers, bits = _number_of_blocks(number, blocks)
    kinds = (found is None, bits.bit_length() >= 32, _alignment(scores, seen, forced, numbers))
    launch = _choice(scores.device, rule, _power(columns), *kinds)
    launch(heads * blocks, scores, seen, forced, found, counts, indices, numbers, bits, blocks, columns)


@functools.lru_cache(MAX_LAUNCHES)
def _choice(device: torch.device, rule: Rule, width: int, *_: object) -> Launch:
    if rule == "above":
        width = min(1024, width)
        return Launch(choose_above, device, width, num_warps=max(1, width // 256))
    return Launch(choose_largest, device, rule == "heaviest", width, num_warps=min(16, max(1, width // 256)))


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
    *heads, rows, columns = mask.shape
    counts = mask.new_empty(*heads, rows, dtype=torch.int32)  # PyTorch reads a tuple more slowly
    indices = mask.new_empty(*heads, rows, columns, dtype=torch.int32)
    if indices.numel() == 0:
        return counts.zero_(), indices
    mask = mask.contiguous()
    if seen is not None and forced is not None:
        seen, forced = seen.contiguous(), forced.contiguous()
    fill = _listing(mask.device, min(1024, _power(columns)), _alignment(mask, seen, forced))
    fill(counts.numel(), mask, seen, forced, counts, indices, rows, columns)
    return counts, indices


@functools.lru_cache(MAX_LAUNCHES)
def _listing(device: torch.device, width: int, *_: object) -> Launch:
    return Launch(list_rows, device, width, num_warps=max(1, width // 256))


def _alignment(*tensors: Tensor | None) -> tuple[object, ...]:
    """Return what Triton looks at to find the kernel for tensors of known types."""
    return tuple([None if x is None else x.data_ptr() & 15 for x in tensors])


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
    if selected is not None:
        selected = selected.contiguous()
    return grid.prepared(_prepare_excess, _alignment(selected))(grid, selected)


def _prepare_excess(grid: BlockGrid, _: object) -> Callable[[BlockGrid, Tensor | None], Tensor]:
    request, q, k, (blocks, columns) = grid.request, _readable(grid.request.q), _readable(grid.request.k), grid.shape
    plan, (heads, dim), device = request.plan, q.shape[1:], q.device
    width, warps, stages = excess_settings(q, grid.block_rows, grid.block_size)
    scale, softcap, window = _masks(request)
    distances = (min(x, MAX_POSITION) for x in (plan.num_sink_tokens, plan.dense_window_size, window))
    numbers = (*q.stride()[:2], *k.stride()[:2], blocks, columns, scale, softcap, *distances)
    compare = Launch(
        excess_of_blocks, device, heads // k.shape[1], dim, _block_d(dim), grid.block_rows, grid.block_size, width,
        *_mask_kinds(request), num_warps=warps, num_stages=stages,
    )  # fmt: skip

    def run(grid: BlockGrid, selected: Tensor | None) -> Tensor:
        found = torch.empty(heads, blocks, columns, dtype=torch.float32, device=device)
        if found.numel():
            compare(
                heads * blocks, _readable(grid.request.q), _readable(grid.request.k), selected, found, grid.sequence,
                grid.row_q, grid.origin_q, grid.low_q, grid.high_q, grid.row_k, grid.low_k, grid.high_k, *numbers,
            )  # fmt: skip
        return found

    return run


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
