"""Decides on skip-softmax before the main loop: by products in INT8, and exactly on what these leave open.

Queries and keys are rounded to INT8, with bounds of what that changes in a product. The kernel of ``bounds.cu``
multiplies them, on matrix units that are twice as fast as with BF16. So most key blocks are known to be skipped or
kept. For the others, those 16 queries that are in doubt are multiplied with the block's keys as they are.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..block_launch import MAX_POSITION, excess_refusal, mean_keys
from ..device import Launch, cdiv, compute_capability, current_stream, is_aligned
from .bound_kernels import find_least, quantize_keys, quantize_queries, rotate_means
from .cuda_code import CudaKernel, check, driver, handle
from .forward_launch import HOPPER

if TYPE_CHECKING:
    from ..blocks import BlockGrid

SIZE, HEAD_DIM = 128, 128
"""Keys and positions of a block, and the head dimension that the kernels are made for."""
FEW_BYTES = 1 << 28
"""Bytes of rounded blocks that are always spent; more are if they are at most twice those of queries and keys."""
DECIDE_THREADS = 256
"""Threads of a program of ``decide_open``."""
WITHOUT_IT = "skip-softmax decides by exact products, which are slower than those in INT8"


class _Problem(ctypes.Structure):
    """``Problem`` of ``bounds.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("queries", "keys", "rows", "tiles", "spans", "words")),
        *((name, ctypes.c_int) for name in ("query_blocks", "columns", "key_blocks", "words_each", "heads_per_kv")),
    )


class Bounded(NamedTuple):
    """What ``bounds.cu`` reads, and the words that it writes.

    Attributes:
        queries: INT8, ``[query_heads, query_blocks, HEAD_DIM / 16, SIZE, 16]``.
        keys: INT8, ``[kv_heads, batch * key_blocks, HEAD_DIM / 16, SIZE, 16]``.
        rows: of each query, as ``quantize_queries`` stores them, ``[query_heads, query_blocks, SIZE, 4]``.
        tiles: of each key block, as ``quantize_keys`` stores them, ``[kv_heads, batch * key_blocks, 4]``.
        spans: sequence of each query block, the first key block to bound and the one behind the last, ``[query_blocks,
            4]``.
        words: a bit for each of 32 key blocks, ``[query_heads, query_blocks, words, 3, 4]``: whether some score surely
            reaches what it has to reach, as four warps found it; and whether one of 16 queries may, for eight times 16.
    """

    queries: Tensor
    keys: Tensor
    rows: Tensor
    tiles: Tensor
    spans: Tensor
    words: Tensor


class _OpenProblem(ctypes.Structure):
    """``OpenProblem`` of ``bounds.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("queries", "keys", "rows", "spans", "words", "kept", "starts")),
        ("key_rows", ctypes.c_void_p),
        *((name, ctypes.c_longlong) for name in ("query_stride", "query_head_stride", "key_stride", "key_head_stride")),
        *((name, ctypes.c_int) for name in ("batch", "query_blocks", "columns", "words_each", "heads_per_kv")),
        ("num_sinks", ctypes.c_int),
    )


class Kernels(NamedTuple):
    """Both kernels of ``bounds.cu``, for a type and a number of query heads that share keys."""

    bound: CudaKernel
    decide: CudaKernel

    @classmethod
    def of(cls, dtype: torch.dtype, repeat: int) -> Kernels:
        """Return them."""
        heads = _heads_each(repeat)
        stages = 2 if heads == 1 else 4
        options = (b"-DHEADS=%d" % heads, *((b"-DFP16",) if dtype == torch.float16 else ()))
        block_bytes = SIZE * HEAD_DIM
        bound_bytes = heads * (block_bytes + 16 * SIZE) + stages * (block_bytes + 16 + 16) + 8
        decide_bytes = SIZE * (2 * HEAD_DIM + 64) + 4 * 8 * DECIDE_THREADS + 4
        return cls(
            CudaKernel("bounds", "bound_blocks", options, bound_bytes),
            CudaKernel("bounds", "decide_open", options, decide_bytes),
        )


def _heads_each(repeat: int) -> int:
    """Return how many of the query heads that share keys a program of ``bound_blocks`` takes: 4, 2 or 1."""
    return math.gcd(repeat, 4)


def refusal(grid: BlockGrid) -> str | None:
    """Say why the kernel cannot decide on the plan's skip rule, or None if it can.

    The first time that nothing else is in the way, the kernel is compiled and loaded; if that fails, a warning says
    why. While a CUDA graph is captured, it cannot be loaded.
    """
    r = grid.request
    if (reason := excess_refusal(grid)) is not None:
        return reason
    if (grid.block_size, grid.block_rows) != (SIZE, SIZE):
        return f"key blocks have {grid.block_size} keys for {grid.block_rows} positions, not {SIZE} for {SIZE}"
    if not r.is_causal or r.sliding_window is not None or r.softcap is not None:
        return "the attention is not causal, or has a sliding window or a softcap"
    if r.q.dtype not in (torch.bfloat16, torch.float16) or r.q.shape[2] != HEAD_DIM:
        return f"q is {r.q.dtype} with a head_dim of {r.q.shape[2]}, not of 16 bits with {HEAD_DIM}"
    if r.first_q is not None or r.first_k is not None:
        return "first positions are given"
    if not r.q.is_cuda or compute_capability(r.q.device) != HOPPER:
        return "it is made for GPUs of compute capability 9.0"
    if not all(is_aligned(x) and x.stride(2) == 1 for x in (r.q, r.k)):
        return "addresses or strides of q or k are not multiples of 16 bytes"
    blocks, columns = grid.shape
    rounded = SIZE * HEAD_DIM * (r.q.shape[1] * blocks + r.k.shape[1] * grid.starts.shape[0] * columns)
    if rounded > max(FEW_BYTES, 2 * r.q.element_size() * (r.q.numel() + r.k.numel())):
        return "lengths differ so much that rounded blocks, of which all sequences get as many, take too much memory"
    kernels = Kernels.of(r.q.dtype, r.q.shape[1] // r.k.shape[1])
    if any(handle(r.q.device, kernel, WITHOUT_IT) is None for kernel in kernels):
        return "it could not be compiled or loaded (a warning says why), or a CUDA graph is being captured"
    return None


def kept_blocks(grid: BlockGrid, selected: Tensor | None, log_thresholds: Tensor) -> Tensor:
    """Return which key blocks the plan's skip rule keeps.

    Args:
        grid: the blocks; :func:`refusal` has been asked.
        selected: which key blocks are selected, booleans ``[query_heads, query_blocks, key_blocks]``; None: all.
        log_thresholds: of each query block, FP32 ``[query_blocks]``.

    Returns:
        Booleans like ``selected``; anything where nothing is seen or selected.
    """
    if selected is not None:
        selected = selected.contiguous()
    kept = grid.request.q.new_empty(grid.request.q.shape[1], *grid.shape, dtype=torch.bool)
    bounded = quantize(grid, selected, log_thresholds, kept)
    bound(grid, bounded)
    decide(grid, bounded, kept)
    return kept


def quantize(grid: BlockGrid, selected: Tensor | None, log_thresholds: Tensor, kept: Tensor) -> Bounded:
    """Round queries and keys, and decide on the key blocks that need a mask."""
    alignment = None if selected is None else selected.data_ptr() & 15
    return grid.prepared(_prepare_quantize, alignment)(grid, selected, log_thresholds, kept)


def _prepare_quantize(grid: BlockGrid, _: int | None) -> Callable[[BlockGrid, Tensor | None, Tensor, Tensor], Bounded]:
    r, (blocks, columns), device = grid.request, grid.shape, grid.request.q.device
    (heads, dim), kv_heads, total = r.q.shape[1:], r.k.shape[1], grid.starts.shape[0] * columns
    sinks, recent = (min(x, MAX_POSITION) for x in (r.plan.num_sink_tokens, r.plan.dense_window_size))
    strides_q, strides_k, repeat = r.q.stride()[:2], r.k.stride()[:2], heads // kv_heads
    rotate = Launch(rotate_means, device, dim, num_warps=8)
    of_keys = Launch(quantize_keys, device, dim, SIZE, num_warps=8)
    least = Launch(find_least, device, heads, repeat, dim, SIZE, SIZE, 32, num_warps=8)
    of_queries = Launch(quantize_queries, device, repeat, dim, SIZE, num_warps=8)

    def run(grid: BlockGrid, selected: Tensor | None, log_thresholds: Tensor, kept: Tensor) -> Bounded:
        r, new = grid.request, functools.partial(torch.empty, device=device)
        found = Bounded(
            new(heads, blocks, dim // 16, SIZE, 16, dtype=torch.int8),
            new(kv_heads, total, dim // 16, SIZE, 16, dtype=torch.int8),
            new(heads, blocks, SIZE, 4, dtype=torch.float32),
            new(kv_heads, total, 4, dtype=torch.float32),
            new(blocks, 4, dtype=torch.int32),
            new(heads, blocks, cdiv(columns, 32), 3, 4, dtype=torch.int32),
        )
        # The matrix is not kept: what is made first while CUDA graphs warm up belongs to their memory.
        hadamard = new(dim, dim, dtype=r.q.dtype)
        means = mean_keys(grid).mean((0, 1))  # any vectors would do, but these leave small numbers
        center = torch.empty_like(means)
        rotate(kv_heads, means, center, hadamard)
        of_keys(
            kv_heads * total, r.k, center, hadamard, found.keys, found.tiles, grid.row_k, grid.low_k, grid.high_k,
            *strides_k, columns, total, sinks,
        )  # fmt: skip
        least(
            heads * blocks, r.q, r.k, selected, log_thresholds, found.rows, found.spans, kept, grid.sequence,
            grid.row_q, grid.origin_q, grid.low_q, grid.high_q, grid.row_k, r.lengths_k.contiguous(), *strides_q,
            *strides_k, blocks, columns, r.softmax_scale, sinks, recent,
        )  # fmt: skip
        of_queries(
            heads * blocks, r.q, center, hadamard, found.queries, found.rows, found.spans, grid.origin_q, grid.low_q,
            grid.high_q, *strides_q, blocks,
        )  # fmt: skip
        return found

    return run


def bound(grid: BlockGrid, bounded: Bounded) -> None:
    """Multiply in INT8, and write the words."""
    (heads, blocks), (kv_heads, total) = bounded.queries.shape[:2], bounded.keys.shape[:2]
    repeat = heads // kv_heads
    addresses = (x.data_ptr() for x in bounded)
    problem = _Problem(*addresses, blocks, grid.shape[1], total, bounded.words.shape[2], repeat)
    heads_each, kernel = _heads_each(repeat), Kernels.of(grid.request.q.dtype, repeat).bound
    _launch(kernel, bounded.words.device, heads // heads_each * blocks, 128 * heads_each + 32, problem)


def decide(grid: BlockGrid, bounded: Bounded, kept: Tensor) -> None:
    """Decide on all key blocks that need no mask, those that are open by exact products."""
    q, k, (blocks, columns), batch = grid.request.q, grid.request.k, grid.shape, grid.starts.shape[0]
    repeat, sinks = q.shape[1] // k.shape[1], min(grid.request.plan.num_sink_tokens, MAX_POSITION)
    tensors = (q, k, bounded.rows, bounded.spans, bounded.words, kept, grid.starts, grid.row_k)
    problem = _OpenProblem(
        *(x.data_ptr() for x in tensors), *q.stride()[:2], *k.stride()[:2], batch, blocks, columns,
        bounded.words.shape[2], repeat, sinks,
    )  # fmt: skip
    _launch(Kernels.of(q.dtype, repeat).decide, q.device, k.shape[1] * batch * columns, DECIDE_THREADS, problem)


def _launch(
    kernel: CudaKernel, device: torch.device, programs: int, threads: int, problem: _Problem | _OpenProblem
) -> None:
    """Launch a kernel of ``bounds.cu`` on the current stream of a device."""
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(kernel, device, programs, threads, problem)
        return
    slots = (ctypes.c_void_p * 1)(ctypes.addressof(problem))
    sizes = map(ctypes.c_uint, (programs, 1, 1, threads, 1, 1, kernel.shared_bytes))
    stream = ctypes.c_void_p(current_stream(device))
    function = handle(device, kernel, WITHOUT_IT)
    check(kernel.name, driver().cuLaunchKernel(function, *sizes, stream, slots, None))
