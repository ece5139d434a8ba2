"""Attention of few queries over many keys: the keys of a sequence are split over multiprocessors.

A *unit* is one kv head of one sequence with up to ``BLOCK_M`` rows, and a row is one query of one of the query heads
that share the kv head, so that keys are loaded once for all of them. Keys are walked in tiles of ``BLOCK_N``. Each
program of :func:`attend_pieces` takes one *piece* of a unit, a run of tiles, and writes the piece's output and the
logarithm of its softmax denominator to a slot of the workspace. :func:`merge_pieces` adds up the pieces of each row,
always in the same order.

Lengths are known on the GPU alone. So the host launches as many programs as there may be pieces, and every program
finds out from all lengths which piece is its own: pieces have about equally many tiles, whatever the sequences'
lengths. Where there are few units, pieces are as short as they can be if the GPU is to run all of them together; where
there are many, it runs them in turns. Programs beyond the last piece end at once, and nobody reads their slots.

The second kernel costs less than it seems: on Hopper it starts while the first one ends (programmatic dependent
launch). Merging in the last program of each unit to finish would save one launch, but that program alone would read
all pieces of all rows, which takes longer than the launch for more than a few rows, and arrivals would have to be
counted in memory that calls on different streams must not share.

Everything is in log2 space; positions are counted from the sequence's first token.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..tiles import LOG2E, as_if_of, join_groups, scale_scores, select_scores, weigh

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def place_sequences(sequences, index, exists, num_sinks, window, OPTIONS: tl.constexpr):
    """Read lengths and find positions of one sequence, or of a vector of them.

    Returns:
        ``(query_length, first_query, first_key, end, num_sinks, window)``: the number of queries; the positions of the
        first query, of the first key and behind the last key; and the keys that are always kept, from the start and up
        to the query: all, if a single query is dense.
    """
    _, lengths_q, _, lengths_k, firsts_q, firsts_k = sequences
    query_length = tl.load(lengths_q + index, mask=exists, other=0).to(tl.int32)
    end = tl.load(lengths_k + index, mask=exists, other=0).to(tl.int32)
    first_key = end * 0
    if firsts_k is not None:
        first_key = tl.load(firsts_k + index, mask=exists, other=0).to(tl.int32)
        end += first_key
    first_query = end - query_length
    if firsts_q is not None:
        first_query = tl.load(firsts_q + index, mask=exists, other=0).to(tl.int32)
    if not OPTIONS.sparse_decode:
        window = tl.where(query_length == 1, end, window)
        if OPTIONS.positions:  # the query may be anywhere
            num_sinks = tl.where(query_length == 1, end, num_sinks)
    return query_length, first_query, first_key, end, num_sinks, window


@triton.jit
def tile_span(query_length, first_query, first_key, end, num_sinks, window, sliding_window, OPTIONS: tl.constexpr):
    """Find the key tiles that a sequence's queries need; elementwise.

    Returns:
        ``(begin, hole_begin, hole_end, end)`` in tiles: those in ``[hole_begin, hole_end)`` are not needed.
    """
    BLOCK_N: tl.constexpr = OPTIONS.block_n
    low = first_key
    high = end
    if OPTIONS.causal:
        high = tl.minimum(high, first_query + query_length)
    if OPTIONS.sliding:
        low = tl.maximum(low, first_query - sliding_window + 1)
        if not OPTIONS.causal:
            high = tl.minimum(high, first_query + query_length - 1 + sliding_window)
    begin = low // BLOCK_N
    last = tl.maximum(tl.cdiv(tl.maximum(high, 0), BLOCK_N), begin)
    last = tl.where(query_length > 0, last, begin)
    hole_begin = last
    hole_end = last
    if OPTIONS.keeps_nothing:
        hole_begin = tl.minimum(tl.maximum(tl.cdiv(num_sinks, BLOCK_N), begin), last)
        hole_end = tl.maximum(first_query - window + 1, 0) // BLOCK_N
        hole_end = tl.minimum(tl.maximum(hole_end, hole_begin), last)
    return begin, hole_begin, hole_end, last


@triton.jit
def divide_work(
    sequences, index, batch, max_pieces, least_tiles, num_sinks, window, sliding_window, OPTIONS: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Divide the tiles of all sequences into pieces; the same in every program of both kernels.

    Pieces are about as short as they can be if there are to be ``max_pieces`` of them at most.

    Returns:
        ``(tiles, pieces, slots)``, a vector over the sequences ``index`` each: the tiles that one unit needs, its
        pieces, and the slots of all the sequence's units together.
    """
    query_length, first_query, first_key, end, num_sinks, window = place_sequences(
        sequences, index, index < batch, num_sinks, window, OPTIONS
    )
    begin, hole_begin, hole_end, last = tile_span(
        query_length, first_query, first_key, end, num_sinks, window, sliding_window, OPTIONS
    )
    tiles = last - begin - (hole_end - hole_begin)
    units = SPLIT.kv_heads * tl.cdiv(query_length * SPLIT.heads_per_kv, OPTIONS.block_m)
    if SPLIT.single:
        size = tl.cdiv(tiles, max_pieces // tl.maximum(units, 1))
    else:
        # Each unit has one piece that may be shorter. So there are few enough of this size.
        total = tl.sum(tiles * units, 0)
        size = tl.cdiv(total, max_pieces - tl.sum(units, 0))
        if SPLIT.sizes > 1:
            # Below this size there are too many. The best of some from one to the other is taken.
            low = tl.cdiv(total, max_pieces)
            # [SPLIT.sizes]
            sizes = size - (size - low) * tl.arange(0, SPLIT.sizes) // (SPLIT.sizes - 1)
            sizes = tl.maximum(sizes, least_tiles)
            slots = tl.sum(tl.cdiv(tiles[None, :], sizes[:, None]) * units[None, :], 1)
            size = tl.min(tl.where(slots <= max_pieces, sizes, size), 0)
    pieces = tl.cdiv(tiles, tl.maximum(size, least_tiles))
    return tiles, pieces, pieces * units


@triton.jit
def of_sequence(vector, index, sequence):
    """Return a vector's element."""
    return tl.sum(tl.where(index == sequence, vector, 0), 0)


@triton.jit
def hot_span(first_position, last_position, first_key, end, num_sinks, window, sliding_window, SPARSE: tl.constexpr,
             OPTIONS: tl.constexpr):  # fmt: skip
    """Find the tiles whose keys are all visible to all rows and that no exemption touches.

    Returns:
        ``(begin, end)`` in tiles; there are none if ``end`` is not above ``begin``.
    """
    BLOCK_N: tl.constexpr = OPTIONS.block_n
    low = first_key
    high = end
    if OPTIONS.causal:
        high = tl.minimum(high, first_position + 1)
    if OPTIONS.sliding:
        low = tl.maximum(low, last_position - sliding_window + 1)
        if not OPTIONS.causal:
            high = tl.minimum(high, first_position + sliding_window)
    if SPARSE:
        low = tl.maximum(low, num_sinks)
        high = tl.minimum(high, first_position - window + 1)
    return tl.cdiv(low, BLOCK_N), tl.maximum(high, 0) // BLOCK_N


@triton.jit
def find_rows(first, source, first_key, end, OPTIONS: tl.constexpr, SPLIT: tl.constexpr, BOUNDED: tl.constexpr):
    """Find where a tile's keys lie: deinterleaved, as :mod:`modelopt_lite.kernels.tiles` describes.

    Args:
        first: position of the tile's first key.
        source: ``(row of position 0, page table or None, place of the sequence's first page in it)``.
        first_key: position of the first key that is there.
        end: position behind the last one.
        OPTIONS: see :func:`attend_pieces`.
        SPLIT: see :func:`attend_pieces`.
        BOUNDED: whether some of the tile's keys may not be there.

    Returns:
        ``(row, offsets, exists)``: keys lie in the rows ``row + offsets``, where they exist.
    """
    BLOCK_N: tl.constexpr = OPTIONS.block_n
    GROUP: tl.constexpr = OPTIONS.group
    start, page_table_ptr, first_page = source
    # [BLOCK_N]
    places = tl.arange(0, BLOCK_N)
    members = GROUP * (places % (BLOCK_N // GROUP)) + places // (BLOCK_N // GROUP)
    keys = first + members
    exists = (keys >= first_key) & (keys < end)
    if page_table_ptr is None:
        row = start + first
        offsets = members.to(tl.int64)
    elif SPLIT.page_size % BLOCK_N == 0 and not OPTIONS.positions:
        page = tl.load(page_table_ptr + first_page + first // SPLIT.page_size).to(tl.int64)
        row = page * SPLIT.page_size + first % SPLIT.page_size
        offsets = members.to(tl.int64)
    else:
        keys -= first_key
        if BOUNDED:
            pages = tl.load(page_table_ptr + first_page + keys // SPLIT.page_size, mask=exists, other=0)
        else:
            pages = tl.load(page_table_ptr + first_page + keys // SPLIT.page_size)
        row = start * 0
        offsets = pages.to(tl.int64) * SPLIT.page_size + keys % SPLIT.page_size
    return row, offsets, exists


@triton.jit
def load_rows(pointer, stride, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BOUNDED: tl.constexpr):
    """Load ``WIDTH`` columns of the rows that :func:`find_rows` found, zero elsewhere: ``[BLOCK_N, BLOCK]``."""
    row, offsets, exists = rows
    columns = tl.arange(0, BLOCK)
    pointers = (pointer + row * stride) + (offsets[:, None] * stride + columns[None, :])
    if BOUNDED:
        tile = tl.load(pointers, mask=exists[:, None] & (columns < WIDTH)[None, :], other=0.0)
    elif WIDTH != BLOCK:
        tile = tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def attend_tile(
    query,
    accumulator,
    running_max,
    partial_sum,
    first,
    source,
    memory,
    rules,
    numbers,
    hook_args,
    SCORE_HOOK: tl.constexpr,
    OPTIONS: tl.constexpr,
    SPLIT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take the key tile that begins at position ``first`` into the softmax.

    Unlike the forward kernel's, a row is spread over all warps. So only its maximum passes between them, and weights
    are summed up column by column until the end.
    """
    BLOCK_M: tl.constexpr = OPTIONS.block_m
    GROUP: tl.constexpr = OPTIONS.group
    TAIL: tl.constexpr = OPTIONS.head_dim - OPTIONS.block_d
    key_ptr, key_stride, value_ptr, value_stride = memory
    end = rules[1]
    first_key = rules[5] if OPTIONS.positions else 0

    rows = find_rows(first, source, first_key, end, OPTIONS, SPLIT, MASKED)
    # [BLOCK_N, BLOCK_D]
    key = load_rows(key_ptr, key_stride, rows, min(OPTIONS.head_dim, OPTIONS.block_d), OPTIONS.block_d, MASKED)
    # [BLOCK_M, BLOCK_N]
    scores = tl.dot(query[0], key.T, input_precision="ieee")
    if SPLIT.block_tail > 0:
        key = load_rows(key_ptr + OPTIONS.block_d, key_stride, rows, TAIL, SPLIT.block_tail, MASKED)
        scores = tl.dot(query[1], key.T, scores, input_precision="ieee")
    scores, to_log2 = scale_scores(scores, numbers, OPTIONS)
    groups = first + GROUP * tl.arange(0, OPTIONS.block_n // GROUP)[None, :]
    parts, keep, largest = select_scores(
        scores, rules[0][:, None], groups, rules, hook_args, SCORE_HOOK, OPTIONS, MASKED
    )

    # [BLOCK_M]
    new_max = tl.maximum(running_max, tl.max(largest, 1) * to_log2)
    # Nothing kept so far: any finite number does.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    rescale = tl.math.exp2(running_max - shift)
    weights = ()
    for r in tl.static_range(GROUP):
        weight = tl.math.exp2(parts[r] * to_log2 - shift[:, None])
        if len(keep) > 0:
            weight = weigh(weight, keep[r])
        weights = weights + (weight,)
    # [BLOCK_M, BLOCK_N]
    probabilities = join_groups(weights, OPTIONS)
    if GROUP > 1 and BLOCK_M < 64:
        probabilities = as_if_of(scores, probabilities)
    partial_sum = partial_sum * rescale[:, None] + probabilities
    # [BLOCK_N, BLOCK_DV]
    value = load_rows(value_ptr, value_stride, rows, OPTIONS.value_dim, OPTIONS.block_dv, MASKED)
    accumulator = accumulator * rescale[:, None]
    accumulator = tl.dot(probabilities.to(value.dtype), value, accumulator, input_precision="ieee")
    return accumulator, new_max, partial_sum


@triton.jit(do_not_specialize=["batch", "slots", "max_pieces", "least_tiles", "page_stride", "num_sinks", "window",
                               "sliding_window", "hook_args"])  # fmt: skip
def attend_pieces(
    query_ptr,
    key_ptr,
    value_ptr,
    partial_ptr,
    page_table_ptr,
    strides,
    sequences,
    numbers,
    batch,
    slots,
    max_pieces,
    least_tiles,
    page_stride,
    num_sinks,
    window,
    sliding_window,
    hook_args,
    SCORE_HOOK: tl.constexpr,
    OPTIONS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Compute the attention of one piece of the keys; see :func:`modelopt_lite.kernels.decode.launch.prepare`.

    Args:
        query_ptr: ``[tokens, query heads, head_dim]``; the last dimension is contiguous everywhere.
        key_ptr: ``[key tokens, kv heads, head_dim]``.
        value_ptr: ``[key tokens, kv heads, value_dim]``.
        partial_ptr: FP32, contiguous; ``[slots, rows, value_dim]``, each piece's output, then ``[slots, rows]``, the
            logarithms of the softmax denominators.
        page_table_ptr: ``[batch, pages]``, int32, the pages that hold ``SPLIT.page_size`` keys each, or None.
        strides: ``(token stride, head stride)`` of query, key and value.
        sequences: pointers ``(starts, lengths)`` of the queries, then of the keys, then those of the positions of the
            first query and the first key, which may be None; ``[batch]`` each.
        numbers: ``(scale, softcap)``.
        batch: number of sequences.
        slots: programs that are launched, and places in the workspace.
        max_pieces: how many pieces there may be; more than there are units.
        least_tiles: tiles that a piece has at least, if its unit has so many.
        page_stride: row stride of the page table.
        num_sinks: leading keys that are always kept.
        window: most recent keys that are always kept.
        sliding_window: most recent keys that are visible, if ``OPTIONS.sliding``.
        hook_args: constants, then numbers, for the hook.
        SCORE_HOOK: which scores to keep, or None.
        OPTIONS: :class:`modelopt_lite.kernels.settings.Options`; ``block_d`` is that of the first columns.
        SPLIT: :class:`modelopt_lite.kernels.decode.launch.Split`.
    """
    BLOCK_M: tl.constexpr = OPTIONS.block_m
    BLOCK_N: tl.constexpr = OPTIONS.block_n
    BLOCK_DV: tl.constexpr = OPTIONS.block_dv
    SPARSE: tl.constexpr = SCORE_HOOK is not None
    if SPLIT.overlaps:
        gdc_launch_dependents()
    slot = tl.program_id(0)
    # Loaded together with the lengths, so that memory is waited for once.
    index = tl.arange(0, SPLIT.batch_block)
    starts_q = tl.load(sequences[0] + index, mask=index < batch, other=0).to(tl.int64)
    starts_k = tl.load(sequences[2] + index, mask=index < batch, other=0).to(tl.int64)
    tiles_of, pieces_of, slots_of = divide_work(
        sequences, index, batch, max_pieces, least_tiles, num_sinks, window, sliding_window, OPTIONS, SPLIT
    )
    sequence = tl.sum((tl.cumsum(slots_of, 0) <= slot).to(tl.int32), 0)
    if sequence >= batch:
        return
    within = slot - tl.sum(tl.where(index < sequence, slots_of, 0), 0)
    pieces = of_sequence(pieces_of, index, sequence)
    tiles = of_sequence(tiles_of, index, sequence)
    piece = within % pieces
    unit = within // pieces
    kv_head = (unit % SPLIT.kv_heads).to(tl.int64)
    row_start = unit // SPLIT.kv_heads * BLOCK_M

    query_length, first_query, first_key, end, num_sinks, window = place_sequences(
        sequences, sequence, sequence < batch, num_sinks, window, OPTIONS
    )
    begin, hole_begin, hole_end, _ = tile_span(
        query_length, first_query, first_key, end, num_sinks, window, sliding_window, OPTIONS
    )
    start_q = of_sequence(starts_q, index, sequence)
    start_k = of_sequence(starts_k, index, sequence) - first_key

    # [BLOCK_M]; rows past the last repeat it and are not stored.
    rows = query_length * SPLIT.heads_per_kv - row_start
    offsets_m = tl.arange(0, BLOCK_M)
    row = row_start + tl.minimum(offsets_m, rows - 1)
    queries = row // SPLIT.heads_per_kv
    positions = first_query + queries
    first_position = first_query + row_start // SPLIT.heads_per_kv
    last_position = first_query + (row_start + tl.minimum(BLOCK_M, rows) - 1) // SPLIT.heads_per_kv
    query_strides, key_strides, value_strides = strides
    # [BLOCK_M, BLOCK_D]
    query_pointers = query_ptr + (start_q + queries) * query_strides[0]
    query_pointers += (kv_head * SPLIT.heads_per_kv + row % SPLIT.heads_per_kv) * query_strides[1]
    offsets_d = tl.arange(0, OPTIONS.block_d)
    query = (tl.load(query_pointers[:, None] + offsets_d[None, :], mask=(offsets_d < OPTIONS.head_dim)[None, :],
                     other=0.0),)  # fmt: skip
    if SPLIT.block_tail > 0:
        offsets_d = OPTIONS.block_d + tl.arange(0, SPLIT.block_tail)
        query_tail = tl.load(
            query_pointers[:, None] + offsets_d[None, :], mask=(offsets_d < OPTIONS.head_dim)[None, :], other=0.0
        )
        query = query + (query_tail,)

    source = (start_k, page_table_ptr, sequence.to(tl.int64) * page_stride)
    memory = (key_ptr + kv_head * key_strides[1], key_strides[0], value_ptr + kv_head * value_strides[1],
              value_strides[0])  # fmt: skip
    rules = (positions, end, num_sinks, window, sliding_window)
    if OPTIONS.positions:
        rules = rules + (first_key,)
    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    partial_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    # The piece's tiles, counted without the hole. What is not hot needs masks.
    piece_begin = begin + piece * tiles // pieces
    piece_end = begin + (piece + 1) * tiles // pieces
    hot_begin = piece_end
    hot_end = piece_end
    if SPLIT.peel and not OPTIONS.keeps_nothing:
        hot_begin, hot_end = hot_span(
            first_position, last_position, first_key, end, num_sinks, window, sliding_window, SPARSE, OPTIONS
        )
        hot_begin = tl.minimum(tl.maximum(hot_begin, piece_begin), piece_end)
        hot_end = tl.minimum(tl.maximum(hot_end, hot_begin), piece_end)
        for tile in tl.range(hot_begin, hot_end):
            accumulator, running_max, partial_sum = attend_tile(
                query, accumulator, running_max, partial_sum, tile * BLOCK_N, source, memory, rules, numbers, hook_args,
                SCORE_HOOK, OPTIONS, SPLIT, MASKED=False,
            )  # fmt: skip
    for tile in tl.range(piece_begin, piece_end - (hot_end - hot_begin)):
        number = tile + tl.where(tile >= hot_begin, hot_end - hot_begin, 0)
        number += tl.where(number >= hole_begin, hole_end - hole_begin, 0)
        accumulator, running_max, partial_sum = attend_tile(
            query, accumulator, running_max, partial_sum, number * BLOCK_N, source, memory, rules, numbers, hook_args,
            SCORE_HOOK, OPTIONS, SPLIT, MASKED=True,
        )  # fmt: skip

    # [BLOCK_M]
    weight = tl.sum(partial_sum, 1)
    inverse = tl.where(weight == 0.0, 0.0, 1.0 / weight)
    stored = offsets_m < rows
    slot_rows = slot.to(tl.int64) * SPLIT.rows + offsets_m
    lse_ptr = partial_ptr + slots.to(tl.int64) * (SPLIT.rows * OPTIONS.value_dim)
    tl.store(lse_ptr + slot_rows, running_max + tl.math.log2(weight), mask=stored)
    offsets_dv = tl.arange(0, BLOCK_DV)
    tl.store(
        partial_ptr + slot_rows[:, None] * OPTIONS.value_dim + offsets_dv[None, :],
        accumulator * inverse[:, None],
        mask=stored[:, None] & (offsets_dv < OPTIONS.value_dim)[None, :],
    )


@triton.jit(do_not_specialize=["batch", "slots", "max_pieces", "least_tiles", "num_sinks", "window", "sliding_window"])
def merge_pieces(
    partial_ptr,
    out_ptr,
    lse_ptr,
    sink_logits_ptr,
    sequences,
    batch,
    slots,
    max_pieces,
    least_tiles,
    num_sinks,
    window,
    sliding_window,
    OPTIONS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Add up the pieces of one query token and head, and its sink logit; 0 and -inf where there are none.

    Args:
        partial_ptr: what :func:`attend_pieces` wrote.
        out_ptr: ``[tokens, query heads, value_dim]``, contiguous.
        lse_ptr: ``[tokens, query heads]``, FP32, contiguous, or None.
        sink_logits_ptr: ``[query heads]``, logits that only join the denominator, or None.
        sequences: as for :func:`attend_pieces`.
        batch: as for :func:`attend_pieces`.
        slots: as for :func:`attend_pieces`.
        max_pieces: as for :func:`attend_pieces`.
        least_tiles: as for :func:`attend_pieces`.
        num_sinks: as for :func:`attend_pieces`.
        window: as for :func:`attend_pieces`.
        sliding_window: as for :func:`attend_pieces`.
        OPTIONS: as for :func:`attend_pieces`.
        SPLIT: as for :func:`attend_pieces`.
    """
    AT_ONCE: tl.constexpr = SPLIT.merge_block
    BLOCK_DV: tl.constexpr = OPTIONS.block_dv
    heads: tl.constexpr = SPLIT.kv_heads * SPLIT.heads_per_kv
    token = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    index = tl.arange(0, SPLIT.batch_block)
    _, pieces_of, slots_of = divide_work(
        sequences, index, batch, max_pieces, least_tiles, num_sinks, window, sliding_window, OPTIONS, SPLIT
    )
    starts = tl.load(sequences[0] + index, mask=index < batch, other=0).to(tl.int32)
    lengths = tl.load(sequences[1] + index, mask=index < batch, other=0).to(tl.int32)
    is_own = (token >= starts) & (token < starts + lengths)
    # Of a token of no sequence, there are no pieces.
    sequence = tl.max(tl.where(is_own, index, -1), 0)
    pieces = of_sequence(pieces_of, index, sequence)
    query = token - of_sequence(starts, index, sequence)
    row = query * SPLIT.heads_per_kv + head % SPLIT.heads_per_kv
    unit = row // OPTIONS.block_m * SPLIT.kv_heads + head // SPLIT.heads_per_kv
    first_slot = tl.sum(tl.where(index < sequence, slots_of, 0), 0) + unit * pieces
    first_row = first_slot.to(tl.int64) * SPLIT.rows + row % OPTIONS.block_m
    lse_partial_ptr = partial_ptr + slots.to(tl.int64) * (SPLIT.rows * OPTIONS.value_dim)

    running_max = pieces * 0.0 + float("-inf")
    weight_sum = pieces * 0.0
    if sink_logits_ptr is not None:
        sink_logit = tl.load(sink_logits_ptr + head).to(tl.float32) * LOG2E
        running_max = tl.where(sequence >= 0, sink_logit, running_max)
        weight_sum = tl.where(sequence >= 0, 1.0, weight_sum)
    if SPLIT.overlaps:
        gdc_wait()
    offsets = tl.arange(0, AT_ONCE)
    offsets_dv = tl.arange(0, BLOCK_DV)
    # [BLOCK_DV]
    accumulator = tl.zeros([BLOCK_DV], tl.float32)
    for first in tl.range(0, pieces, AT_ONCE, num_stages=1):
        # [AT_ONCE], [AT_ONCE, BLOCK_DV]
        exists = first + offsets < pieces
        rows = first_row + (first + offsets) * SPLIT.rows
        lse = tl.load(lse_partial_ptr + rows, mask=exists, other=float("-inf"))
        partial = tl.load(
            partial_ptr + rows[:, None] * OPTIONS.value_dim + offsets_dv[None, :],
            mask=exists[:, None] & (offsets_dv < OPTIONS.value_dim)[None, :],
            other=0.0,
        )
        new_max = tl.maximum(running_max, tl.max(lse, 0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale = tl.math.exp2(running_max - shift)
        weights = tl.math.exp2(lse - shift)
        weight_sum = weight_sum * rescale + tl.sum(weights, 0)
        accumulator = accumulator * rescale + tl.sum(partial * weights[:, None], 0)
        running_max = new_max
    inverse = tl.where(weight_sum == 0.0, 0.0, 1.0 / weight_sum)
    place = tl.program_id(0).to(tl.int64)
    if lse_ptr is not None:
        tl.store(lse_ptr + place, (running_max + tl.math.log2(weight_sum)) * LN2)
    tl.store(
        out_ptr + place * OPTIONS.value_dim + offsets_dv,
        (accumulator * inverse).to(out_ptr.dtype.element_ty),
        mask=offsets_dv < OPTIONS.value_dim,
    )
