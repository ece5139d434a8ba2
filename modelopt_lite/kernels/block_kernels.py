"""Triton kernels that find the blocks of a request, score key blocks, choose among them, and list what was chosen.

Each program finds its blocks by the tables of a :class:`~modelopt_lite.kernels.blocks.BlockGrid`, so the host
knows no lengths and never waits. Logarithms are those of base 2. Programs with the most keys start first. Numbers that
change with the length are not specialized, so that nothing is compiled again for another length.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .lists import floor_div
from .tiles import LOG2E

SEQUENCES = tl.constexpr(32)
"""Sequences that a program of :func:`lay_out` looks at together."""


@triton.jit
def _positions(sequence, lengths_q_ptr, lengths_k_ptr, first_q_ptr, first_k_ptr, exists):
    """Return the first position of a sequence's queries and the one behind the last, and the same of its keys."""
    length_q = tl.load(lengths_q_ptr + sequence, mask=exists, other=0).to(tl.int32)
    length_k = tl.load(lengths_k_ptr + sequence, mask=exists, other=0).to(tl.int32)
    first_k = length_k * 0
    if first_k_ptr is not None:
        first_k = tl.load(first_k_ptr + sequence, mask=exists, other=0).to(tl.int32)
    first_q = first_k + length_k - length_q
    if first_q_ptr is not None:
        first_q = tl.load(first_q_ptr + sequence, mask=exists, other=0).to(tl.int32)
    return first_q, first_q + length_q, first_k, first_k + length_k


@triton.jit
def _lay_out_queries(
    starts_ptr, tables_of_queries, rows, packing, sizes, program, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the tables of ``BLOCK`` query blocks; the first program also writes those of the sequences."""
    sequence_ptr, origin_ptr, low_ptr, high_ptr = tables_of_queries
    row_q_ptr, row_k_ptr = rows
    starts_q_ptr, lengths_q_ptr, starts_k_ptr, lengths_k_ptr, first_q_ptr, first_k_ptr = packing
    batch, query_blocks = sizes
    number = program * BLOCK + tl.arange(0, BLOCK)
    sequence = tl.zeros([BLOCK], tl.int32)
    start = tl.zeros([BLOCK], tl.int32)
    before = batch * 0
    for begin in range(0, batch, SEQUENCES):
        others = begin + tl.arange(0, SEQUENCES)
        exist = others < batch
        first_q, end_q, first_k, _end_k = _positions(
            others, lengths_q_ptr, lengths_k_ptr, first_q_ptr, first_k_ptr, exist
        )
        blocks = floor_div(end_q - 1, ROWS) - floor_div(first_q, ROWS) + 1
        blocks = tl.where(exist & (end_q > first_q), blocks, 0)
        ends = before + tl.cumsum(blocks, 0)
        before += tl.sum(blocks, 0)
        # Rows behind the last block are those of the last sequence.
        is_before = (ends[None, :] <= number[:, None]) & (others < batch - 1)[None, :]
        sequence += tl.sum(is_before.to(tl.int32), 1)
        start = tl.maximum(start, tl.max(tl.where(is_before, ends[None, :], 0), 1))
        if program == 0:
            tl.store(starts_ptr + others, ends - blocks, mask=exist)
            begin_q = tl.load(starts_q_ptr + others, mask=exist, other=0).to(tl.int64)
            begin_k = tl.load(starts_k_ptr + others, mask=exist, other=0).to(tl.int64)
            tl.store(row_q_ptr + others, begin_q - first_q, mask=exist)
            tl.store(row_k_ptr + others, begin_k - first_k, mask=exist)
    exists = number < query_blocks
    first, end, _, _ = _positions(sequence, lengths_q_ptr, lengths_k_ptr, first_q_ptr, first_k_ptr, exists)
    origin = (floor_div(first, ROWS) + number - start) * ROWS
    tl.store(sequence_ptr + number, sequence.to(tl.int64), mask=exists)
    tl.store(origin_ptr + number, origin.to(tl.int64), mask=exists)
    tl.store(low_ptr + number, tl.maximum(origin, first).to(tl.int64), mask=exists)
    tl.store(high_ptr + number, (tl.minimum(origin + ROWS, end) - 1).to(tl.int64), mask=exists)


@triton.jit
def _lay_out_keys(tables_of_keys, packing, columns, program, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Write the tables of ``BLOCK`` key blocks of one sequence."""
    origin_ptr, low_ptr, high_ptr = tables_of_keys
    _, lengths_q_ptr, _, lengths_k_ptr, first_q_ptr, first_k_ptr = packing
    programs_each = tl.cdiv(columns, BLOCK)
    sequence = program // programs_each
    column = program % programs_each * BLOCK + tl.arange(0, BLOCK)
    exists = column < columns
    _, _, first, end = _positions(sequence, lengths_q_ptr, lengths_k_ptr, first_q_ptr, first_k_ptr, sequence >= 0)
    origin = (first // SIZE + column) * SIZE
    place = sequence.to(tl.int64) * columns + column
    tl.store(origin_ptr + place, origin.to(tl.int64), mask=exists)
    tl.store(low_ptr + place, tl.maximum(origin, first).to(tl.int64), mask=exists)
    tl.store(high_ptr + place, (tl.minimum(origin + SIZE, end) - 1).to(tl.int64), mask=exists)


@triton.jit(do_not_specialize=["batch", "query_blocks", "columns"])
def lay_out(
    starts_ptr, tables_of_queries, tables_of_keys, rows, packing, batch, query_blocks, columns,
    ROWS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the tables of a grid, as :func:`modelopt_lite.kernels.grid_tables.grid_tables`.

    The first programs write those of ``BLOCK`` query blocks each, the others those of ``BLOCK`` key blocks.
    """
    sizes = (batch, query_blocks)
    programs = tl.maximum(tl.cdiv(query_blocks, BLOCK), 1)
    program = tl.program_id(0)
    if program < programs:
        _lay_out_queries(starts_ptr, tables_of_queries, rows, packing, sizes, program, ROWS, BLOCK)
    else:
        _lay_out_keys(tables_of_keys, packing, columns, program - programs, SIZE, BLOCK)


@triton.jit(do_not_specialize=["columns", "window", "first_blocks", "recent_blocks"])
def mark_blocks(
    seen_ptr, forced_ptr, sequence_ptr, origin_q_ptr, low_q_ptr, high_q_ptr, origin_k_ptr, low_k_ptr, high_k_ptr,
    lengths_q_ptr, columns, window, first_blocks, recent_blocks,
    ROWS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, SLIDING: tl.constexpr,
    SPARSE_DECODE: tl.constexpr,
):  # fmt: skip
    """Mark the blocks that a query block sees, and those of them that are kept in any case."""
    block = tl.program_id(0)
    sequence = tl.load(sequence_ptr + block)
    origin = tl.load(origin_q_ptr + block).to(tl.int32)
    low = tl.load(low_q_ptr + block).to(tl.int32)
    high = tl.load(high_q_ptr + block).to(tl.int32)
    keeps_all = (tl.load(lengths_q_ptr + sequence) == 1) & (SPARSE_DECODE == 0)
    for begin in range(0, columns, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        exists = column < columns
        table = sequence * columns + column
        low_k = tl.load(low_k_ptr + table, mask=exists, other=0).to(tl.int32)
        high_k = tl.load(high_k_ptr + table, mask=exists, other=-1).to(tl.int32)
        origin_k = tl.load(origin_k_ptr + table, mask=exists, other=0).to(tl.int32)
        seen = _any_visible(low, high, low_k, high_k, window, CAUSAL, SLIDING)
        is_recent = (origin_k >= origin - (recent_blocks - 1) * SIZE) & (origin_k < origin + ROWS)
        forced = (origin_k < first_blocks * SIZE) | (is_recent & (recent_blocks > 0)) | keeps_all
        place = block.to(tl.int64) * columns + column
        tl.store(seen_ptr + place, seen.to(tl.int8), mask=exists)
        tl.store(forced_ptr + place, (seen & forced).to(tl.int8), mask=exists)


@triton.jit
def tile_of_rows(pointer, rows, exists, stride, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows of ``DIM`` numbers, 0 where none exists: ``[rows, BLOCK_D]``."""
    columns = tl.arange(0, BLOCK_D)
    mask = exists[:, None] & (columns < DIM)[None, :]
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _mean_of_rows(x_ptr, row, origin, low, high, stride, DIM: tl.constexpr, BLOCK_D: tl.constexpr, SIZE: tl.constexpr):
    """Return the mean of the rows at positions ``low`` to ``high`` of one block and head, FP32 ``[BLOCK_D]``, or 0."""
    position = origin + tl.arange(0, SIZE)
    exists = (position >= low) & (position <= high)
    x = tile_of_rows(x_ptr, row + position, exists, stride, DIM, BLOCK_D)
    return tl.sum(x.to(tl.float32), 0) / tl.maximum(high - low + 1, 1).to(tl.float32)


@triton.jit
def _store_parts(pointer, x, exists, part_stride, PARTS: tl.constexpr):
    """Store FP32 numbers, or each of them as the sum of two of another type, ``part_stride`` apart."""
    if PARTS == 1:
        tl.store(pointer, x, mask=exists)
    else:
        first = x.to(pointer.dtype.element_ty)
        tl.store(pointer, first, mask=exists)
        tl.store(pointer + part_stride, (x - first.to(tl.float32)).to(pointer.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["programs_q", "columns"])
def mean_rows(
    query_ptr, key_ptr, mean_ptr, sequence_ptr, row_q_ptr, origin_q_ptr, low_q_ptr, high_q_ptr, row_k_ptr,
    origin_k_ptr, low_k_ptr, high_k_ptr, programs_q, columns, stride_q, head_stride_q, stride_k, head_stride_k,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    SIZE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Store the mean of the rows of one block and head, 0 without any row.

    The first ``programs_q`` programs store means of queries, ``[query_blocks, HEADS, DIM]``, those behind them means of
    keys, ``[batch, columns, KV_HEADS, DIM]``; all of them in ``PARTS`` parts as :func:`split_numbers`.
    """
    program = tl.program_id(0)
    if program < programs_q:
        block, head = program // HEADS, (program % HEADS).to(tl.int64)
        mean = _mean_of_rows(
            query_ptr + head * head_stride_q, tl.load(row_q_ptr + tl.load(sequence_ptr + block)),
            tl.load(origin_q_ptr + block), tl.load(low_q_ptr + block), tl.load(high_q_ptr + block), stride_q, DIM,
            BLOCK_D, ROWS,
        )  # fmt: skip
    else:
        place = program - programs_q
        block, head = place // KV_HEADS, (place % KV_HEADS).to(tl.int64)
        mean = _mean_of_rows(
            key_ptr + head * head_stride_k, tl.load(row_k_ptr + block // columns), tl.load(origin_k_ptr + block),
            tl.load(low_k_ptr + block), tl.load(high_k_ptr + block), stride_k, DIM, BLOCK_D, SIZE,
        )  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    all_means = tl.num_programs(0).to(tl.int64) * DIM
    _store_parts(mean_ptr + program.to(tl.int64) * DIM + dims, mean, dims < DIM, all_means, PARTS)


@triton.jit(do_not_specialize=["numbers"])
def split_numbers(x_ptr, parts_ptr, numbers, BLOCK: tl.constexpr):
    """Store FP32 numbers as sums of two of another type: all first parts, then all second ones."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = place < numbers
    x = tl.load(x_ptr + place, mask=exists, other=0.0)
    _store_parts(parts_ptr + place, x, exists, numbers, 2)


@triton.jit(do_not_specialize=["query_blocks", "columns", "window"])
def multiply_means(
    mean_ptr, score_ptr, sequence_ptr, low_q_ptr, high_q_ptr, low_k_ptr, high_k_ptr, query_blocks, columns, scale,
    softcap, window,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SIZE: tl.constexpr, CAUSAL: tl.constexpr, SLIDING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Multiply ``BLOCK_M`` mean queries of one head with all mean keys that their blocks see.

    Stores scores ``[HEADS, query_blocks, columns]``; means are those of :func:`mean_rows`, in one part.
    """
    KV_HEADS: tl.constexpr = HEADS // REPEAT
    key_ptr = mean_ptr + query_blocks.to(tl.int64) * HEADS * DIM
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    tile = tl.cdiv(query_blocks, BLOCK_M) - 1 - tl.program_id(0) // HEADS
    block = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = block < query_blocks
    of_row = tl.load(sequence_ptr + block, mask=exists, other=0).to(tl.int32)
    low = tl.load(low_q_ptr + block, mask=exists, other=0).to(tl.int32)
    high = tl.load(high_q_ptr + block, mask=exists, other=-1).to(tl.int32)
    query = tile_of_rows(mean_ptr + head * DIM, block.to(tl.int64), exists, HEADS * DIM, DIM, BLOCK_D)
    score_ptr += (head * query_blocks + block) * columns
    for sequence in tl.range(
        tl.min(tl.where(exists, of_row, 1 << 30), 0), tl.max(tl.where(exists, of_row, -1), 0) + 1, num_stages=1
    ):
        is_own = exists & (of_row == sequence) & (low <= high)
        tables = columns.to(tl.int64) * sequence
        first = tl.load(low_k_ptr + tables).to(tl.int32)
        end = tl.load(high_k_ptr + tables + columns - 1).to(tl.int32) + 1
        lowest = tl.min(tl.where(is_own, low, 1 << 30), 0)
        farthest = tl.max(tl.where(is_own, high, -(1 << 30)), 0)
        begin, behind = _span(lowest, farthest, first, end, window, SIZE, CAUSAL, SLIDING)
        behind = tl.where(lowest <= farthest, tl.minimum(behind, columns), begin)
        for column in tl.range(begin, behind, BLOCK_N):
            number = column + tl.arange(0, BLOCK_N)
            keys = (tables + number) * KV_HEADS + head // REPEAT
            key = tile_of_rows(key_ptr, keys, number < columns, DIM, DIM, BLOCK_D)
            scores = _scaled(tl.dot(query, key.T, input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
            tl.store(score_ptr[:, None] + number[None, :], scores, mask=is_own[:, None] & (number < columns)[None, :])


@triton.jit
def _capped(products, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scale products as the model does, and bring them to base 2."""
    return _scaled(products, scale, softcap, HAS_SOFTCAP) * LOG2E


@triton.jit
def _scaled(products, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scale and cap products as the model does."""
    scores = products * scale
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + e^2x), which neither overflows to NaN nor needs another library.
        scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 * LOG2E / softcap))))
    return scores


@triton.jit
def _any_visible(low_q, high_q, low_k, high_k, window, CAUSAL: tl.constexpr, SLIDING: tl.constexpr):
    """As :func:`modelopt_lite.kernels.blocks.any_visible`."""
    seen = (low_q <= high_q) & (low_k <= high_k)
    if CAUSAL:
        seen = seen & (low_k <= high_q)
    if SLIDING:
        seen = seen & (low_q - high_k < window)
        if not CAUSAL:
            seen = seen & (low_k - high_q < window)
    return seen


@triton.jit
def _sees(low_q, high_q, low_k, high_k, window, CAUSAL: tl.constexpr, SLIDING: tl.constexpr):
    """As :func:`_any_visible`, for a column of queries and a row of keys."""
    return _any_visible(low_q[:, None], high_q[:, None], low_k[None, :], high_k[None, :], window, CAUSAL, SLIDING)


@triton.jit
def _span(low_q, high_q, first, end, window, SIZE: tl.constexpr, CAUSAL: tl.constexpr, SLIDING: tl.constexpr):
    """Return the first key block that may be seen and the one behind the last, from positions of keys."""
    origin = first // SIZE * SIZE
    begin, behind = first, end
    if SLIDING:
        begin = tl.maximum(begin, low_q - window + 1)
        if not CAUSAL:
            behind = tl.minimum(behind, high_q + window)
    if CAUSAL:
        behind = tl.minimum(behind, high_q + 1)
    behind = tl.maximum(behind, origin)
    return (begin - origin) // SIZE, (behind - origin + SIZE - 1) // SIZE


@triton.jit
def _pooled_scores(
    query, pooled_ptr, part_stride, stride, column, columns, low_q, low_k_ptr, high_k_ptr, scale, softcap, window,
    PARTS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    SLIDING: tl.constexpr, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return the scores of queries with the pooled keys from number ``column`` on, ``-inf`` where not seen."""
    number = column + tl.arange(0, BLOCK_N)
    exists = number < columns
    rows = number.to(tl.int64)
    pooled = tile_of_rows(pooled_ptr, rows, exists, stride, DIM, BLOCK_D)
    scores = tl.dot(query, pooled.T, input_precision="ieee")
    if PARTS == 2:
        pooled = tile_of_rows(pooled_ptr + part_stride, rows, exists, stride, DIM, BLOCK_D)
        scores = tl.dot(query, pooled.T, scores, input_precision="ieee")
    scores = _capped(scores, scale, softcap, HAS_SOFTCAP)
    if MASKED:
        low_k = tl.load(low_k_ptr + number, mask=exists, other=0).to(tl.int32)
        high_k = tl.load(high_k_ptr + number, mask=exists, other=-1).to(tl.int32)
        seen = _sees(low_q, low_q, low_k, high_k, window, CAUSAL, SLIDING)
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit(do_not_specialize=["query_blocks", "columns", "window"])
def sum_softmax(
    query_ptr, pooled_ptr, mass_ptr, sequence_ptr, row_q_ptr, origin_q_ptr, low_q_ptr, high_q_ptr, low_k_ptr,
    high_k_ptr, stride, head_stride, part_stride, query_blocks, columns, scale, softcap, window,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, PARTS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SIZE: tl.constexpr, CAUSAL: tl.constexpr, SLIDING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Sum the softmax weights of pooled keys over the queries of a block: ``[HEADS, query_blocks, columns]``.

    The first pass finds the logarithm of each query's denominator, the second one adds up weights; the products are
    cheaper to compute again than to keep.
    """
    KV_HEADS: tl.constexpr = HEADS // REPEAT
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    block = query_blocks - 1 - tl.program_id(0) // HEADS
    sequence = tl.load(sequence_ptr + block).to(tl.int64)
    low = tl.load(low_q_ptr + block).to(tl.int32)
    high = tl.load(high_q_ptr + block).to(tl.int32)
    position = tl.load(origin_q_ptr + block).to(tl.int32) + tl.arange(0, BLOCK_M)
    is_query = (position >= low) & (position <= high)
    rows = tl.load(row_q_ptr + sequence).to(tl.int64) + position
    query = tile_of_rows(query_ptr + head * head_stride, rows, is_query, stride, DIM, BLOCK_D)

    low_k_ptr += sequence * columns
    high_k_ptr += sequence * columns
    pooled_ptr += (sequence * columns * KV_HEADS + head // REPEAT) * DIM
    first = tl.load(low_k_ptr).to(tl.int32)
    end = tl.load(high_k_ptr + columns - 1).to(tl.int32) + 1
    begin, behind = _span(low, high, first, end, window, SIZE, CAUSAL, SLIDING)
    behind = tl.where(low <= high, tl.minimum(behind, columns), begin)
    # Up to here all queries see all blocks.
    hot = begin
    if not SLIDING:
        hot = behind
        if CAUSAL:
            hot = tl.maximum(tl.minimum((low - first // SIZE * SIZE) // SIZE + 1, behind), begin)
        hot = begin + (hot - begin) // BLOCK_N * BLOCK_N

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for column in tl.range(begin, hot, BLOCK_N):
        scores = _pooled_scores(
            query, pooled_ptr, part_stride, KV_HEADS * DIM, column, columns, position, low_k_ptr, high_k_ptr, scale,
            softcap, window, PARTS, DIM, BLOCK_D, BLOCK_N, CAUSAL, SLIDING, HAS_SOFTCAP, MASKED=False,
        )  # fmt: skip
        new = tl.maximum(highest, tl.max(scores, 1))
        total = total * tl.exp2(highest - new) + tl.sum(tl.exp2(scores - new[:, None]), 1)
        highest = new
    for column in tl.range(hot, behind, BLOCK_N):
        scores = _pooled_scores(
            query, pooled_ptr, part_stride, KV_HEADS * DIM, column, columns, position, low_k_ptr, high_k_ptr, scale,
            softcap, window, PARTS, DIM, BLOCK_D, BLOCK_N, CAUSAL, SLIDING, HAS_SOFTCAP, MASKED=True,
        )  # fmt: skip
        new = tl.maximum(highest, tl.max(scores, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(highest - shift) + tl.sum(tl.exp2(scores - shift[:, None]), 1)
        highest = new
    # Rows without a query, and queries that see nothing, weigh nothing.
    lse = tl.where(is_query & (total > 0.0), highest + tl.log2(total), float("inf"))

    mass_ptr += (head * query_blocks + block) * columns
    for column in tl.range(begin, hot, BLOCK_N):
        scores = _pooled_scores(
            query, pooled_ptr, part_stride, KV_HEADS * DIM, column, columns, position, low_k_ptr, high_k_ptr, scale,
            softcap, window, PARTS, DIM, BLOCK_D, BLOCK_N, CAUSAL, SLIDING, HAS_SOFTCAP, MASKED=False,
        )  # fmt: skip
        tl.store(mass_ptr + column + tl.arange(0, BLOCK_N), tl.sum(tl.exp2(scores - lse[:, None]), 0))
    for column in tl.range(hot, behind, BLOCK_N):
        scores = _pooled_scores(
            query, pooled_ptr, part_stride, KV_HEADS * DIM, column, columns, position, low_k_ptr, high_k_ptr, scale,
            softcap, window, PARTS, DIM, BLOCK_D, BLOCK_N, CAUSAL, SLIDING, HAS_SOFTCAP, MASKED=True,
        )  # fmt: skip
        number = column + tl.arange(0, BLOCK_N)
        tl.store(mass_ptr + number, tl.sum(tl.exp2(scores - lse[:, None]), 0), mask=number < behind)


@triton.jit(do_not_specialize=["first_block", "blocks_here", "query_blocks", "columns", "tiles", "window"])
def antidiagonal_tile(
    query_ptr, key_ptr, partial_ptr, sequence_ptr, row_q_ptr, origin_q_ptr, low_q_ptr, high_q_ptr, row_k_ptr,
    low_k_ptr, high_k_ptr, stride_q, head_stride_q, stride_k, head_stride_k, first_block, blocks_here,
    query_blocks, columns, tiles, scale, softcap, window,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, CAUSAL: tl.constexpr,
    SLIDING: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Multiply ``BLOCK_M`` query groups with ``BLOCK_N`` key groups along antidiagonals.

    Stores, relative to each query group's largest logit in the tile, the weights summed over the groups of each key
    block, ``[HEADS, groups, columns]``, and behind them that largest logit, ``[HEADS, groups, tiles]``.
    """
    GROUPS: tl.constexpr = ROWS // STRIDE  # of a query block
    highest_ptr = partial_ptr + blocks_here.to(tl.int64) * columns * (HEADS * GROUPS)
    BLOCKS: tl.constexpr = BLOCK_M // GROUPS  # query blocks of the tile
    KEY_GROUPS: tl.constexpr = SIZE // STRIDE
    JOINED: tl.constexpr = BLOCK_N // KEY_GROUPS  # key blocks of the tile
    STEPS: tl.constexpr = (DIM + BLOCK_K - 1) // BLOCK_K
    # Heads follow each other, so that those that share keys read them from the cache.
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    rest = tl.program_id(0) // HEADS
    tile = rest % tiles
    block_tiles = (blocks_here + BLOCKS - 1) // BLOCKS
    within = (block_tiles - 1 - rest // tiles) * BLOCKS
    place = tl.arange(0, BLOCK_M)
    local = within + place // GROUPS
    block = tl.minimum(first_block + local, query_blocks - 1)
    exists = local < blocks_here
    of_row = tl.load(sequence_ptr + block).to(tl.int64)
    begin_q = tl.load(origin_q_ptr + block).to(tl.int32) + place % GROUPS * STRIDE
    low_q = tl.maximum(begin_q, tl.load(low_q_ptr + block).to(tl.int32))
    high_q = tl.minimum(begin_q + STRIDE - 1, tl.load(high_q_ptr + block).to(tl.int32))
    high_q = tl.where(exists, high_q, low_q - 1)
    row_q = tl.load(row_q_ptr + of_row) + begin_q
    first_sequence = tl.load(sequence_ptr + first_block + within)
    last = tl.minimum(first_block + tl.minimum(within + BLOCKS, blocks_here), query_blocks) - 1
    last_sequence = tl.load(sequence_ptr + last)
    offsets = tl.arange(0, BLOCK_K)

    for sequence in tl.range(first_sequence, last_sequence + 1, num_stages=1):
        is_own = (of_row == sequence) & (low_q <= high_q)
        first = tl.load(low_k_ptr + sequence * columns).to(tl.int32)
        end = tl.load(high_k_ptr + sequence * columns + columns - 1).to(tl.int32) + 1
        lowest = tl.min(tl.where(is_own, low_q, 1 << 30), 0)
        farthest = tl.max(tl.where(is_own, high_q, -(1 << 30)), 0)
        begin, behind = _span(lowest, farthest, first, end, window, SIZE, CAUSAL, SLIDING)
        if (lowest <= farthest) & (tile * JOINED < behind) & ((tile + 1) * JOINED > begin):
            begin_k = first // SIZE * SIZE + (tile * BLOCK_N + tl.arange(0, BLOCK_N)) * STRIDE
            row_k = tl.load(row_k_ptr + sequence) + begin_k
            query_pointers = query_ptr + head * head_stride_q + row_q[:, None] * stride_q + offsets[None, :]
            key_pointers = key_ptr + head // REPEAT * head_stride_k + row_k[None, :] * stride_k + offsets[:, None]
            products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for step in tl.range(0, STRIDE * STEPS):
                member = step // STEPS
                dims = step % STEPS * BLOCK_K
                at_q = begin_q + (STRIDE - 1 - member)
                at_k = begin_k + member
                there_q = is_own & (at_q >= low_q) & (at_q <= high_q)
                there_k = (at_k >= first) & (at_k < end)
                fits = dims + offsets < DIM
                query = tl.load(
                    query_pointers + ((STRIDE - 1 - member) * stride_q + dims),
                    mask=there_q[:, None] & fits[None, :], other=0.0,
                )  # fmt: skip
                key = tl.load(
                    key_pointers + (member * stride_k + dims), mask=there_k[None, :] & fits[:, None], other=0.0
                )
                products = tl.dot(query, key, products, input_precision="ieee")
            scores = _capped(products, scale, softcap, HAS_SOFTCAP)
            low_k = tl.maximum(begin_k, first)
            high_k = tl.minimum(begin_k + STRIDE, end) - 1
            seen = _sees(low_q, high_q, low_k, high_k, window, CAUSAL, SLIDING)
            scores = tl.where(seen, scores, float("-inf"))
            highest = tl.max(scores, 1)
            weights = tl.exp2(scores - tl.where(highest == float("-inf"), 0.0, highest)[:, None])
            joined = tl.sum(tl.reshape(weights, [BLOCK_M, JOINED, KEY_GROUPS]), 2)
            group = (head * blocks_here + local) * GROUPS + place % GROUPS
            column = tile * JOINED + tl.arange(0, JOINED)
            tl.store(
                partial_ptr + group[:, None] * columns + column[None, :], joined,
                mask=is_own[:, None] & (column < columns)[None, :],
            )  # fmt: skip
            tl.store(highest_ptr + group * tiles + tile, highest, mask=is_own)


@triton.jit(do_not_specialize=["first_block", "blocks_here", "query_blocks", "columns", "tiles", "window"])
def join_antidiagonals(
    partial_ptr, mass_ptr, sequence_ptr, origin_q_ptr, low_q_ptr, high_q_ptr, low_k_ptr, high_k_ptr, first_block,
    blocks_here, query_blocks, columns, tiles, window,
    HEADS: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr, JOINED: tl.constexpr, CAUSAL: tl.constexpr, SLIDING: tl.constexpr,
):  # fmt: skip
    """Normalise what :func:`antidiagonal_tile` stored, and sum it over the groups of one query block and head."""
    GROUPS: tl.constexpr = ROWS // STRIDE
    highest_ptr = partial_ptr + blocks_here.to(tl.int64) * columns * (HEADS * GROUPS)
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    local = tl.program_id(0) // HEADS
    block = first_block + local
    sequence = tl.load(sequence_ptr + block).to(tl.int64)
    low = tl.load(low_q_ptr + block).to(tl.int32)
    high = tl.load(high_q_ptr + block).to(tl.int32)
    first = tl.load(low_k_ptr + sequence * columns).to(tl.int32)
    end = tl.load(high_k_ptr + sequence * columns + columns - 1).to(tl.int32) + 1
    begin, behind = _span(low, high, first, end, window, SIZE, CAUSAL, SLIDING)
    behind = tl.where(low <= high, tl.minimum(behind, columns), begin)
    number = tl.arange(0, GROUPS)
    begin_q = tl.load(origin_q_ptr + block).to(tl.int32) + number * STRIDE
    exists = (begin_q + STRIDE > low) & (begin_q <= high)
    group = (head * blocks_here + local) * GROUPS + number

    # Reduced behind the loops: Triton 3.6 fails to compile a sum in a loop that is used twice behind it.
    largest = tl.full([GROUPS, BLOCK_T], float("-inf"), tl.float32)
    for tile in tl.range(begin // JOINED, (behind + JOINED - 1) // JOINED, BLOCK_T):
        tile_number = tile + tl.arange(0, BLOCK_T)
        mask = exists[:, None] & (tile_number * JOINED < behind)[None, :]
        found = tl.load(highest_ptr + group[:, None] * tiles + tile_number[None, :], mask=mask, other=float("-inf"))
        largest = tl.maximum(largest, found)
    highest = tl.max(largest, 1)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    sums = tl.zeros([GROUPS, BLOCK_J], tl.float32)
    for column in tl.range(begin, behind, BLOCK_J):
        sums += _weights(
            partial_ptr, highest_ptr, group, exists, column, behind, columns, tiles, shift, BLOCK_J, JOINED
        )
    total = tl.sum(sums, 1)
    inverse = tl.where(total > 0.0, 1.0 / total, 0.0)
    mass_ptr += (head * query_blocks + block) * columns
    for column in tl.range(begin, behind, BLOCK_J):
        weights = _weights(partial_ptr, highest_ptr, group, exists, column, behind, columns, tiles, shift, BLOCK_J,
                           JOINED)  # fmt: skip
        here = column + tl.arange(0, BLOCK_J)
        tl.store(mass_ptr + here, tl.sum(weights * inverse[:, None], 0), mask=here < behind)


@triton.jit
def _weights(
    partial_ptr, highest_ptr, group, exists, column, behind, columns, tiles, shift, BLOCK_J: tl.constexpr,
    JOINED: tl.constexpr,
):  # fmt: skip
    """Load weights of query groups and key blocks, relative to ``shift``: ``[groups, BLOCK_J]``."""
    number = column + tl.arange(0, BLOCK_J)
    mask = exists[:, None] & (number < behind)[None, :]
    partial = tl.load(partial_ptr + group[:, None] * columns + number[None, :], mask=mask, other=0.0)
    of_tile = highest_ptr + group[:, None] * tiles + (number // JOINED)[None, :]
    highest = tl.load(of_tile, mask=mask, other=float("-inf"))
    return partial * tl.exp2(highest - shift[:, None])


@triton.jit
def _number_of(block, bits, numbers_ptr):
    """Return the FP64 number of a query block, or the one for all, whose bits are given."""
    if numbers_ptr is None:
        number = bits.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        number = tl.load(numbers_ptr + block)
    return number


@triton.jit
def _list_blocks(index_ptr, kept, before, count, number, columns):
    """Store some blocks of a row in its list: those kept, ascending, behind the ``before`` that are kept before them.

    All others follow behind ``count``, the number of all that are kept. Returns how many are kept up to here.
    """
    kept_before = before + tl.cumsum(kept, 0) - kept
    place = tl.where(kept != 0, kept_before, count + number - kept_before)
    tl.store(index_ptr + place, number, mask=number < columns)
    return before + tl.sum(kept)


@triton.jit(do_not_specialize=["share", "query_blocks", "columns"])
def choose_largest(
    score_ptr, seen_ptr, forced_ptr, chosen_ptr, count_ptr, index_ptr, share_ptr, share, query_blocks, columns,
    BY_MASS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Keep the blocks of one query block and head with the largest scores, the forced ones first, up to a share.

    In that order, a block is kept as long as those before it are fewer, or have less mass, than the share. The smallest
    score that is kept is found by bisection on the bits of FP32 numbers; sums are FP64, so that their order, and with
    it the number of columns, does not matter.

    Stores a mask of those that are not forced, or lists all as :func:`list_rows`, for whichever there is memory.
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(0) % query_blocks
    number = tl.arange(0, BLOCK_T)
    exists = number < columns
    here = block.to(tl.int64) * columns + number
    seen = tl.load(seen_ptr + here, mask=exists, other=0) != 0
    forced = (tl.load(forced_ptr + here, mask=exists, other=0) != 0) & seen
    score = tl.load(score_ptr + row * columns + number, mask=seen, other=0.0) + 0.0  # -0.0 becomes 0.0
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the scores
    free = seen & (forced == 0)
    weight = tl.where(seen, 1.0, 0.0).to(tl.float64)
    if BY_MASS:
        weight = score.to(tl.float64)
    target = tl.sum(weight, 0) * _number_of(block, share, share_ptr)
    if not BY_MASS:
        target = tl.ceil(target - 1e-9)  # 0.7 * 10 is a little more than 7
    held = tl.sum(tl.where(forced, weight, 0.0), 0)
    weight = tl.where(free, weight, 0.0)

    # The least number above which the keys hold too little.
    low = tl.min(tl.where(free, key, 0x7FFFFFFF), 0)
    high = tl.max(tl.where(free, key, -0x80000000), 0)
    while low < high:
        middle = (low & high) + ((low ^ high) >> 1)
        above = held + tl.sum(tl.where(key > middle, weight, 0.0), 0)
        is_less = above < target
        high = tl.where(is_less, middle, high)
        low = tl.where(is_less, low, middle + 1)
    above = held + tl.sum(tl.where(key > high, weight, 0.0), 0)
    ties = free & (key == high)
    before = tl.cumsum(ties.to(tl.int32), 0) - ties.to(tl.int32)
    kept = ties & (above + before.to(tl.float64) * weight < target)
    kept = kept | (free & (key > high))
    if chosen_ptr is not None:
        tl.store(chosen_ptr + row * columns + number, kept.to(tl.int8), mask=exists)
    if count_ptr is not None:
        kept = (kept | forced).to(tl.int32)
        count = tl.sum(kept, 0)
        tl.store(count_ptr + row, count)
        _list_blocks(index_ptr + row * columns, kept, 0, count, number, columns)


@triton.jit(do_not_specialize=["fraction", "query_blocks", "columns"])
def choose_above(
    score_ptr, seen_ptr, forced_ptr, chosen_ptr, count_ptr, index_ptr, fraction_ptr, fraction, query_blocks, columns,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Keep the blocks of one query block and head whose score is at least a fraction of the largest one, or of 0.

    Stores what :func:`choose_largest` does; there is no mask of what is forced if there are to be no lists.
    """
    row = tl.program_id(0).to(tl.int64)
    block = (tl.program_id(0) % query_blocks).to(tl.int64)
    score_ptr += row * columns
    highest = tl.zeros([BLOCK_T], tl.float32)
    for begin in tl.range(0, columns, BLOCK_T):
        number = begin + tl.arange(0, BLOCK_T)
        seen = tl.load(seen_ptr + block * columns + number, mask=number < columns, other=0) != 0
        highest = tl.maximum(highest, tl.load(score_ptr + number, mask=seen, other=0.0))
    least = _number_of(block, fraction, fraction_ptr).to(tl.float32) * tl.max(highest, 0)
    if chosen_ptr is not None:
        for begin in tl.range(0, columns, BLOCK_T):
            number = begin + tl.arange(0, BLOCK_T)
            score = tl.load(score_ptr + number, mask=number < columns, other=0.0)
            tl.store(chosen_ptr + row * columns + number, (score >= least).to(tl.int8), mask=number < columns)
    if count_ptr is not None:
        count = 0
        for begin in tl.range(0, columns, BLOCK_T):
            count += tl.sum(_at_least(score_ptr, seen_ptr, forced_ptr, least, block, columns, begin, BLOCK_T))
        tl.store(count_ptr + row, count)
        before = 0
        for begin in tl.range(0, columns, BLOCK_T):
            kept = _at_least(score_ptr, seen_ptr, forced_ptr, least, block, columns, begin, BLOCK_T)
            number = begin + tl.arange(0, BLOCK_T)
            before = _list_blocks(index_ptr + row * columns, kept, before, count, number, columns)


@triton.jit
def _at_least(score_ptr, seen_ptr, forced_ptr, least, block, columns, begin, BLOCK_T: tl.constexpr):
    """Load which of some blocks are seen and have at least this score, or are forced."""
    number = begin + tl.arange(0, BLOCK_T)
    exists = number < columns
    kept = tl.load(score_ptr + number, mask=exists, other=0.0) >= least
    kept = kept & (tl.load(seen_ptr + block * columns + number, mask=exists, other=0) != 0)
    return (kept | (tl.load(forced_ptr + block * columns + number, mask=exists, other=0) != 0)).to(tl.int32)


@triton.jit
def _kept(mask_ptr, seen_ptr, forced_ptr, row, of_all, columns, begin, BLOCK_T: tl.constexpr):
    """Load which of some blocks are kept."""
    number = begin + tl.arange(0, BLOCK_T)
    exists = number < columns
    kept = tl.load(mask_ptr + row * columns + number, mask=exists, other=0) != 0
    if seen_ptr is not None:
        kept = kept & (tl.load(seen_ptr + of_all * columns + number, mask=exists, other=0) != 0)
        kept = kept | (tl.load(forced_ptr + of_all * columns + number, mask=exists, other=0) != 0)
    return kept.to(tl.int32)


@triton.jit(do_not_specialize=["rows", "columns"])
def list_rows(mask_ptr, seen_ptr, forced_ptr, count_ptr, index_ptr, rows, columns, BLOCK_T: tl.constexpr):
    """List the places of one row where a mask is set, ascending, and behind them all others; and count them.

    If there are masks of ``rows`` rows of what is seen and what is forced, a place counts that is chosen and seen, or
    forced.
    """
    row = tl.program_id(0).to(tl.int64)
    of_all = row % rows
    offsets = tl.arange(0, BLOCK_T)
    count = 0
    for begin in tl.range(0, columns, BLOCK_T):
        count += tl.sum(_kept(mask_ptr, seen_ptr, forced_ptr, row, of_all, columns, begin, BLOCK_T))
    tl.store(count_ptr + row, count)
    before = 0
    for begin in tl.range(0, columns, BLOCK_T):
        number = begin + offsets
        kept = _kept(mask_ptr, seen_ptr, forced_ptr, row, of_all, columns, begin, BLOCK_T)
        before = _list_blocks(index_ptr + row * columns, kept, before, count, number, columns)


@triton.jit(do_not_specialize=["query_blocks", "columns"])
def excess_of_blocks(
    query_ptr, key_ptr, selected_ptr, excess_ptr, sequence_ptr, row_q_ptr, origin_q_ptr, low_q_ptr, high_q_ptr,
    row_k_ptr, low_k_ptr, high_k_ptr, stride_q, head_stride_q, stride_k, head_stride_k, query_blocks, columns, scale,
    softcap, num_sinks, recent, window,
    REPEAT: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, SLIDING: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Find by how much the scores of each key block exceed the references of one query block and head, at most.

    What it stores, ``[HEADS, query_blocks, columns]``, is described in
    :func:`modelopt_lite.kernels.block_launch.excess`; nothing is stored where nothing is seen. Key blocks that may hold
    references, or keys that some query does not see, are looked at twice, first for the references. All others need no
    mask. There, a row's largest product gives its largest score, as the scale is positive.
    """
    # Heads that share keys follow each other, then the query blocks, those with most keys first: so the keys of few
    # heads are in use at a time.
    kv_head = (tl.program_id(0) // (REPEAT * query_blocks)).to(tl.int64)
    head = kv_head * REPEAT + tl.program_id(0) % REPEAT
    block = query_blocks - 1 - tl.program_id(0) // REPEAT % query_blocks
    sequence = tl.load(sequence_ptr + block).to(tl.int64)
    low = tl.load(low_q_ptr + block).to(tl.int32)
    high = tl.load(high_q_ptr + block).to(tl.int32)
    origin_q = tl.load(origin_q_ptr + block).to(tl.int32)
    position = origin_q + tl.arange(0, ROWS)
    is_query = (position >= low) & (position <= high)
    rows = tl.load(row_q_ptr + sequence) + position
    query = tile_of_rows(query_ptr + head * head_stride_q, rows, is_query, stride_q, DIM, BLOCK_D)

    first = tl.load(low_k_ptr + sequence * columns).to(tl.int32)
    end = tl.load(high_k_ptr + sequence * columns + columns - 1).to(tl.int32) + 1
    origin = first // SIZE * SIZE
    key_ptr += kv_head * head_stride_k + (tl.load(row_k_ptr + sequence) + origin) * stride_k
    row_of_blocks = (head * query_blocks + block) * columns
    excess_ptr += row_of_blocks
    begin, behind = _span(low, high, first, end, window, SIZE, CAUSAL, SLIDING)
    behind = tl.where(low <= high, tl.minimum(behind, columns), begin)

    # Masked blocks lie in [begin, front), [band, band_end) and [tail, behind). The band is around the queries.
    front = tl.maximum(begin, (tl.maximum(num_sinks - origin, 0) + SIZE - 1) // SIZE)
    if SLIDING:
        front = tl.maximum(front, (tl.maximum(high - window + 1 - origin, 0) + SIZE - 1) // SIZE)
    front = tl.maximum(front, (first - origin + SIZE - 1) // SIZE)
    front = tl.minimum(front, behind)
    tail = (end - origin) // SIZE
    if SLIDING:
        tail = tl.minimum(tail, tl.maximum(low + window - origin, 0) // SIZE)
    tail = tl.minimum(tl.maximum(tail, front), behind)
    band = tl.minimum(origin_q, low - tl.maximum(recent - 1, 0))
    band = tl.minimum(tl.maximum(tl.maximum(band - origin, 0) // SIZE, front), tail)
    band_end = tl.minimum(tl.maximum(tl.maximum(origin_q + ROWS - origin, 0) // SIZE, band), behind)
    tail = tl.maximum(tail, band_end)
    masked = front - begin + band_end - band + behind - tail
    hot = band - front + tail - band_end

    MASKED_N: tl.constexpr = min(BLOCK_N, 64)  # masks take registers
    PIECES: tl.constexpr = SIZE // MASKED_N
    reference = tl.full([ROWS], float("-inf"), tl.float32)
    excess = float("-inf")
    for step in tl.range(0, 2 * masked * PIECES, num_stages=1):
        index = step // PIECES % masked
        column = begin + index
        column = tl.where(column < front, column, band + column - front)
        column = tl.where(index < front - begin + band_end - band, column, behind - masked + index)
        place = column * SIZE + step % PIECES * MASKED_N + tl.arange(0, MASKED_N)
        k_pos = origin + place
        exists = (k_pos >= first) & (k_pos < end)
        key = tile_of_rows(key_ptr, place.to(tl.int64), exists, stride_k, DIM, BLOCK_D)
        scores = _scaled(tl.dot(query, key.T, input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
        distance = position[:, None] - k_pos[None, :]
        visible = is_query[:, None] & exists[None, :]
        if CAUSAL:
            visible = visible & (distance >= 0)
        if SLIDING:
            visible = visible & (distance < window) & (distance > -window)
        is_exempt = (k_pos < num_sinks)[None, :] | ((distance >= 0) & (distance < recent))
        on_diagonal = (k_pos >= origin_q) & (k_pos < origin_q + ROWS)
        if step < masked * PIECES:
            if selected_ptr is not None:
                on_diagonal = on_diagonal & (tl.load(selected_ptr + row_of_blocks + column) != 0)
            is_reference = visible & (is_exempt | on_diagonal[None, :])
            reference = tl.maximum(reference, tl.max(tl.where(is_reference, scores, float("-inf")), 1))
        else:
            is_other = visible & (is_exempt == 0) & (on_diagonal == 0)[None, :]
            largest = tl.max(tl.where(is_other, scores, float("-inf")), 1)
            largest = tl.where(largest == float("-inf"), largest, largest - reference)
            excess = tl.maximum(tl.where(step % PIECES == 0, float("-inf"), excess), tl.max(largest, 0))
            tl.store(excess_ptr + column, excess)

    reference = tl.where(is_query, reference, float("inf"))
    dims = tl.arange(0, BLOCK_D)
    key_pointers = key_ptr + tl.arange(0, BLOCK_N)[:, None].to(tl.int64) * stride_k + dims[None, :]
    HOT_PIECES: tl.constexpr = SIZE // BLOCK_N
    for step in tl.range(0, hot * HOT_PIECES):
        column = front + step // HOT_PIECES
        column = tl.where(column < band, column, band_end + column - band)
        offset = (column * SIZE + step % HOT_PIECES * BLOCK_N).to(tl.int64) * stride_k
        if DIM == BLOCK_D:
            key = tl.load(key_pointers + offset)
        else:
            key = tl.load(key_pointers + offset, mask=(dims < DIM)[None, :], other=0.0)
        products = tl.dot(query, key.T, input_precision="ieee")
        largest = _scaled(tl.max(products, 1), scale, softcap, HAS_SOFTCAP) - reference
        excess = tl.maximum(tl.where(step % HOT_PIECES == 0, float("-inf"), excess), tl.max(largest, 0))
        tl.store(excess_ptr + column, excess)
