"""The Triton kernels beside ``bounds.cu``: what scores have to reach, and queries and keys in INT8.

Queries and keys are rotated by a Hadamard matrix, which keeps their products and spreads large elements over all
dimensions, and rounded to INT8: queries with a step for each, keys with one for each block. From keys a vector, for
example their mean, is subtracted before; it changes all scores of a query alike, so what these have to reach changes
with them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..block_kernels import tile_of_rows

ROUNDING = tl.constexpr(2.0**-14)
"""Of the norms, more than rounding in FP32 changes a rotated vector."""
LEAST_STEP = tl.constexpr(1e-30)
SINKS = tl.constexpr(16)
"""Sinks that are looked at together."""


@triton.jit
def rotate_means(mean_ptr, center_ptr, hadamard_ptr, DIM: tl.constexpr):
    """Rotate the mean of a head's keys, and store the Hadamard matrix, ``[DIM, DIM]``, of up to 256 dimensions."""
    dims = tl.arange(0, DIM)
    bits = dims[:, None] & dims[None, :]
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    hadamard = 1.0 - 2.0 * (bits & 1).to(tl.float32)
    head = tl.program_id(0)
    mean = tl.load(mean_ptr + head * DIM + dims)
    tl.store(center_ptr + head * DIM + dims, tl.sum(mean[:, None] * hadamard, 0) * DIM**-0.5)
    if head == 0:
        tl.store(hadamard_ptr + dims[:, None] * DIM + dims[None, :], hadamard)


@triton.jit
def _rotated(x, hadamard_ptr, DIM: tl.constexpr):
    """Return rows rotated by the Hadamard matrix, ``[rows, DIM]`` FP32."""
    dims = tl.arange(0, DIM)
    hadamard = tl.load(hadamard_ptr + dims[:, None] * DIM + dims[None, :])
    return tl.dot(x, hadamard, input_precision="ieee") * DIM**-0.5


@triton.jit
def _rounded(x):
    """Round to the nearest integers, up to 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _norms(x):
    return tl.sqrt(tl.sum(x * x, 1))


@triton.jit
def _store_block(pointer, numbers, SIZE: tl.constexpr, DIM: tl.constexpr):
    """Store a block of integers as ``bounds.cu`` reads it: ``[DIM // 16, SIZE, 16]``."""
    dims = tl.arange(0, DIM)
    places = dims[None, :] // 16 * (SIZE * 16) + tl.arange(0, SIZE)[:, None] * 16 + dims[None, :] % 16
    tl.store(pointer + places, numbers.to(tl.int8))


@triton.jit(do_not_specialize=["columns", "blocks", "num_sinks"])
def quantize_keys(
    key_ptr, center_ptr, hadamard_ptr, quantized_ptr, tile_ptr, row_k_ptr, low_ptr, high_ptr, stride, head_stride,
    columns, blocks, num_sinks, DIM: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Round one key block of one head; ``tile_ptr``, ``[heads, blocks, 4]``: 1, and norms, in units of a step.

    In place of sinks, which are no others, stands the block's last key.
    """
    head, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    low, high = tl.load(low_ptr + block), tl.load(high_ptr + block)
    position = block % columns * SIZE + tl.arange(0, SIZE)
    exists = (position >= low) & (position <= high)
    rows = tl.load(row_k_ptr + block // columns) + tl.where(position < num_sinks, high, position)
    key = tile_of_rows(key_ptr + head * head_stride, rows, exists, stride, DIM, DIM)
    center = tl.load(center_ptr + head * DIM + tl.arange(0, DIM))
    rotated = tl.where(exists[:, None], _rotated(key, hadamard_ptr, DIM) - center[None, :], 0.0)
    step = tl.maximum(tl.max(tl.max(tl.abs(rotated), 1), 0) / 127.0, LEAST_STEP)
    rotated = rotated / step
    numbers = _rounded(rotated)
    norm = tl.max(_norms(numbers), 0)
    error = tl.max(_norms(rotated - numbers), 0)
    error += ROUNDING * (norm + tl.sqrt(tl.sum(center * center, 0)) / step)
    place = head * blocks + block
    _store_block(quantized_ptr + place * (SIZE * DIM), numbers, SIZE, DIM)
    tl.store(tile_ptr + 4 * place, 1.0 / step)
    tl.store(tile_ptr + 4 * place + 1, error)
    tl.store(tile_ptr + 4 * place + 2, norm)


@triton.jit(do_not_specialize=["query_blocks", "columns", "num_sinks", "recent"])
def find_least(
    query_ptr, key_ptr, selected_ptr, margin_ptr, row_ptr, span_ptr, kept_ptr, sequence_ptr, row_q_ptr, origin_q_ptr,
    low_q_ptr, high_q_ptr, row_k_ptr, length_k_ptr, stride_q, head_stride_q, stride_k, head_stride_k, query_blocks,
    columns, scale, num_sinks, recent,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Find what the products of one query block and head have to reach, and decide on key blocks that need a mask.

    It is stored as the last number of ``row_ptr``, ``[heads, query_blocks, ROWS, 4]``. ``span_ptr``, ``[query_blocks,
    4]``, gets the sequence, the first key block with other keys than sinks, the one behind the last that needs no mask,
    and the row of the first query. Attention is causal.
    """
    PIECES: tl.constexpr = SIZE // BLOCK_N
    head, block = (tl.program_id(0) % HEADS).to(tl.int64), tl.program_id(0) // HEADS
    sequence = tl.load(sequence_ptr + block)
    low, high = tl.load(low_q_ptr + block).to(tl.int32), tl.load(high_q_ptr + block).to(tl.int32)
    origin = tl.load(origin_q_ptr + block).to(tl.int32)
    position = origin + tl.arange(0, ROWS)
    is_query = (position >= low) & (position <= high)
    first_row = tl.load(row_q_ptr + sequence) + origin
    query = tile_of_rows(query_ptr + head * head_stride_q, first_row + tl.arange(0, ROWS), is_query, stride_q, DIM, DIM)
    end = tl.minimum(tl.load(length_k_ptr + sequence).to(tl.int32), high + 1)
    key_ptr += head // REPEAT * head_stride_k + tl.load(row_k_ptr + sequence) * stride_k
    place = head * query_blocks + block
    kept_ptr += place * columns

    diagonal = origin // SIZE
    behind = tl.where(low <= high, tl.minimum(high // SIZE + 1, columns), 0)
    front = tl.minimum(num_sinks // SIZE, behind)
    band = tl.minimum(origin, tl.maximum(low - tl.maximum(recent - 1, 0), 0)) // SIZE
    band = tl.minimum(tl.maximum(band, front), behind)
    if head == 0:
        tl.store(span_ptr + 4 * block, sequence.to(tl.int32))
        tl.store(span_ptr + 4 * block + 1, front)
        tl.store(span_ptr + 4 * block + 2, band)
        tl.store(span_ptr + 4 * block + 3, first_row.to(tl.int32))

    reference = tl.full([ROWS], float("-inf"), tl.float32)
    for begin in tl.range(0, tl.minimum(num_sinks, end), SINKS, num_stages=1):
        k_pos = begin + tl.arange(0, SINKS)
        exists = k_pos < tl.minimum(num_sinks, end)
        key = tile_of_rows(key_ptr, k_pos.to(tl.int64), exists, stride_k, DIM, DIM)
        products = tl.dot(query, key.T, input_precision="ieee")
        visible = (position[:, None] >= k_pos[None, :]) & exists[None, :]
        reference = tl.maximum(reference, tl.max(tl.where(visible, products, float("-inf")), 1))
    is_reference = 1
    if selected_ptr is not None:
        is_reference = tl.load(selected_ptr + place * columns + diagonal, mask=diagonal < columns, other=0).to(tl.int32)
    for step in tl.range(band * PIECES, behind * PIECES, num_stages=3):
        k_pos = step * BLOCK_N + tl.arange(0, BLOCK_N)
        key = tile_of_rows(key_ptr, k_pos.to(tl.int64), k_pos < end, stride_k, DIM, DIM)
        products = tl.dot(query, key.T, input_precision="ieee")
        distance = position[:, None] - k_pos[None, :]
        counts = (distance < recent) | ((k_pos >= origin) & (is_reference != 0))[None, :]
        counts = counts & (distance >= 0) & (k_pos < end)[None, :]
        reference = tl.maximum(reference, tl.max(tl.where(counts, products, float("-inf")), 1))
    least = tl.where(is_query, reference + tl.load(margin_ptr + block) / scale, float("inf"))
    tl.store(row_ptr + (place * ROWS + tl.arange(0, ROWS)) * 4 + 3, least)

    # Blocks of sinks alone, those of the band with others that reach it or without others, and the diagonal one.
    for column in tl.range(0, front, num_stages=1):
        tl.store(kept_ptr + column, 1)
    reached = 0
    others = 0
    for step in tl.range(band * PIECES, tl.minimum(diagonal, behind) * PIECES, num_stages=1):
        k_pos = step * BLOCK_N + tl.arange(0, BLOCK_N)
        key = tile_of_rows(key_ptr, k_pos.to(tl.int64), k_pos < end, stride_k, DIM, DIM)
        products = tl.dot(query, key.T, input_precision="ieee")
        distance = position[:, None] - k_pos[None, :]
        is_other = is_query[:, None] & (distance >= recent) & ((k_pos >= num_sinks) & (k_pos < end))[None, :]
        reaches = is_other & (products >= least[:, None])
        is_first = step % PIECES == 0
        reached = tl.maximum(tl.where(is_first, 0, reached), tl.max(tl.max(reaches.to(tl.int32), 1), 0))
        others = tl.maximum(tl.where(is_first, 0, others), tl.max(tl.max(is_other.to(tl.int32), 1), 0))
        tl.store(kept_ptr + step // PIECES, tl.maximum(reached, 1 - others).to(tl.int8))
    if (diagonal < behind) & (diagonal >= front):
        tl.store(kept_ptr + diagonal, 1)


@triton.jit(do_not_specialize=["query_blocks"])
def quantize_queries(
    query_ptr, center_ptr, hadamard_ptr, quantized_ptr, row_ptr, span_ptr, origin_q_ptr, low_q_ptr, high_q_ptr, stride,
    head_stride, query_blocks, REPEAT: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Round the queries of one block and head.

    The first numbers of ``row_ptr``, ``[heads, query_blocks, ROWS, 4]``, become what products have to reach, the norm
    of a query and that of its error, all in units of a step.
    """
    head, block = (tl.program_id(0) // query_blocks).to(tl.int64), tl.program_id(0) % query_blocks
    low, high = tl.load(low_q_ptr + block), tl.load(high_q_ptr + block)
    position = tl.load(origin_q_ptr + block) + tl.arange(0, ROWS)
    is_query = (position >= low) & (position <= high)
    rows = tl.load(span_ptr + 4 * block + 3).to(tl.int64) + tl.arange(0, ROWS)
    query = tile_of_rows(query_ptr + head * head_stride, rows, is_query, stride, DIM, DIM)
    center = tl.load(center_ptr + head // REPEAT * DIM + tl.arange(0, DIM))
    rotated = _rotated(query, hadamard_ptr, DIM)
    shift = tl.sum(rotated * center[None, :], 1)
    step = tl.maximum(tl.max(tl.abs(rotated), 1) / 127.0, LEAST_STEP)
    rotated = rotated / step[:, None]
    numbers = _rounded(rotated)
    norm = _norms(rotated)
    error = _norms(rotated - numbers) + ROUNDING * norm
    place = head * query_blocks + block
    _store_block(quantized_ptr + place * (ROWS * DIM), numbers, ROWS, DIM)
    row_ptr += (place * ROWS + tl.arange(0, ROWS)) * 4
    tl.store(row_ptr, (tl.load(row_ptr + 3) - shift) / step)
    tl.store(row_ptr + 1, norm)
    tl.store(row_ptr + 2, error)
