"""Counts what a plan keeps, in one pass over the scores: kept ones, and both denominators of the softmax.

A program takes ``BLOCK_M`` queries of one head through a part of the keys that they see, with the phases of
:mod:`modelopt_lite.kernels.portable.forward`. Others join the parts, and write sums over each program's queries.
Nothing is added up by atomics, so the numbers are the same from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .hopper.visits import floor_div
from .lists import CHUNK, floor_mod
from .tiles import (
    BOUNDED_N,
    bounded_span,
    hide_invisible,
    hide_unkept,
    key_spans,
    load_tile,
    maximum_of,
    place,
    position_of_first,
    scale_scores,
    split_groups,
)


@triton.jit
def count_tile(
    query, first, state, key, unlisted, rules, numbers, hook_args, SCORE_HOOK: tl.constexpr, OPTIONS: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Count the key tile that begins at position ``first``.

    ``state`` is, for each query, the largest visible score, the sum of all weights relative to it, that of the kept
    ones, and how many are kept. ``unlisted`` is not 0 if there are lists of key blocks and the tile is in none.
    """
    GROUP: tl.constexpr = OPTIONS.group
    highest, total, kept_total, kept = state
    lower = rules[5] if OPTIONS.positions else 0

    # [BLOCK_N, BLOCK_D], [BLOCK_M, BLOCK_N]
    key_tile = load_tile(key, first, rules[1], OPTIONS.head_dim, BLOCK_N, OPTIONS.block_d, GROUP, BOUNDED, lower)
    scores, to_log2 = scale_scores(tl.dot(query, key_tile.T, input_precision="ieee"), numbers, OPTIONS)
    # GROUP tiles [BLOCK_M, BLOCK_N // GROUP]
    q_pos = rules[0][:, None]
    groups = first + GROUP * tl.arange(0, BLOCK_N // GROUP)[None, :]
    visible = split_groups(scores, OPTIONS)
    if MASKED:
        visible = hide_invisible(visible, q_pos, groups, rules, OPTIONS)
    parts, _, _ = hide_unkept(visible, q_pos, groups, rules, hook_args, SCORE_HOOK, OPTIONS, MASKED, unlisted)

    # [BLOCK_M]
    new = tl.maximum(highest, tl.max(maximum_of(visible), 1) * to_log2)
    shift = tl.where(new == float("-inf"), 0.0, new)
    shrink = tl.math.exp2(highest - shift)
    # Summed place by place before they are summed over a row, which takes threads that tell each other.
    weights = tl.zeros(visible[0].shape, tl.float32)
    kept_weights = tl.zeros(visible[0].shape, tl.float32)
    number = tl.zeros(visible[0].shape, tl.int32)
    for r in tl.static_range(GROUP):
        weight = tl.math.exp2(visible[r] * to_log2 - shift[:, None])
        is_kept = parts[r] > float("-inf")
        if OPTIONS.block_size > 0 and not MASKED:
            is_kept = is_kept & (unlisted == 0)
        weights += weight
        kept_weights += tl.where(is_kept, weight, 0.0)
        number += is_kept.to(tl.int32)
    total = total * shrink + tl.sum(weights, 1)
    kept_total = kept_total * shrink + tl.sum(kept_weights, 1)
    return new, total, kept_total, kept + tl.sum(number, 1)


@triton.jit
def visible_keys(positions, length, sliding_window, first_key, OPTIONS: tl.constexpr):
    """Return which keys queries at these positions see: the first one, and the one behind the last, if any."""
    begin = positions * 0 + first_key
    end = positions * 0 + length
    if OPTIONS.causal:
        end = tl.minimum(end, positions + 1)
    if OPTIONS.sliding:
        begin = tl.maximum(begin, positions - sliding_window + 1)
        if not OPTIONS.causal:
            end = tl.minimum(end, positions + sliding_window)
    return begin, end


@triton.jit
def locate(program, sequences, heads, batch, num_sinks, window, OPTIONS: tl.constexpr):
    """Find what queries a program has: heads are in sequences, which are in tiles of queries.

    Returns:
        ``(head, sequence, row_start, query_length)``, and what :func:`~modelopt_lite.kernels.tiles.place` returns.
        There are no queries if ``max(row_start, 0)`` is not below ``query_length``.
    """
    _, lengths_q, starts_k, lengths_k, firsts_q, firsts_k = sequences
    head = program % heads
    sequence = program // heads % batch
    query_length = tl.load(lengths_q + sequence).to(tl.int32)
    length = tl.load(lengths_k + sequence).to(tl.int32)
    start_k = tl.load(starts_k + sequence).to(tl.int64)
    # Tiles begin where query blocks do.
    row_start = program // heads // batch * OPTIONS.block_m
    row_start -= floor_mod(position_of_first(firsts_q, sequence, length - query_length, OPTIONS), OPTIONS.block_m)
    placed = place(firsts_q, firsts_k, sequence, query_length, length, start_k, num_sinks, window, OPTIONS)
    return head, sequence, row_start, query_length, placed


@triton.jit
def list_of(lists, head, sequence, first_query, position, OPTIONS: tl.constexpr):
    """Return where the list of the query at a position is, and how many key blocks it names."""
    counts_ptr, indices_ptr, starts_ptr, heads_per_list, rows, columns = lists
    row = tl.load(starts_ptr + sequence).to(tl.int64) + (head // heads_per_list).to(tl.int64) * rows
    row += floor_div(position, OPTIONS.block_rows) - floor_div(first_query, OPTIONS.block_rows)
    return indices_ptr + row * columns, tl.load(counts_ptr + row)


@triton.jit
def names_before(pointer, number, column):
    """Return how many of the key blocks that a list names come before another one."""
    before = 0
    for begin in range(0, number, CHUNK):
        places = begin + tl.arange(0, CHUNK)
        names = tl.load(pointer + places, mask=places < number, other=1 << 30)
        before += tl.sum((names < column).to(tl.int32), 0)
    return before


@triton.jit
def is_unlisted(pointer, number, place, column):
    """Return 1 unless a list names a key block at a place, 0 if it does."""
    return (tl.load(pointer + place, mask=place < number, other=-1) != column).to(tl.int32)


@triton.jit(do_not_specialize=["programs", "parts", "batch", "num_sinks", "window", "sliding_window", "lists",
                               "hook_args"])  # fmt: skip
def count_scores(
    query_ptr, key_ptr, state_ptr, strides, sequences, heads_of, numbers, programs, parts, batch, num_sinks, window,
    sliding_window, lists, hook_args, SCORE_HOOK: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Count what each program's queries see and keep of a part of the keys.

    Args:
        query_ptr: ``[tokens, heads, head_dim]``, as are the keys; the last dimension is contiguous.
        key_ptr: ``[key tokens, kv heads, head_dim]``.
        state_ptr: where to write what :func:`count_tile` calls a state, FP32 ``[programs, parts, 4, BLOCK_M]``.
            Programs are tiles of queries, in which are sequences, in which are heads.
        strides: ``(token stride, head stride)`` of query and key.
        sequences: as for :func:`~modelopt_lite.kernels.portable.forward.attention_forward`, as are all that are not
            named here.
        heads_of: ``(query heads, query heads per kv head)``.
        numbers: ``(scale, softcap)``.
        programs: how many there are.
        parts: into how many parts the keys of a program are cut.
        batch: number of sequences.
        num_sinks: leading keys that are always kept.
        window: most recent keys that are always kept.
        sliding_window: most recent keys that are visible, if ``OPTIONS.sliding``.
        lists: lists of key blocks, ``(counts, indices, number of each sequence's first query block, query heads that
            share a list, query blocks, key blocks)``, or None.
        hook_args: constants, then numbers, for the hook.
        SCORE_HOOK: which scores to keep, or None.
        OPTIONS: :class:`modelopt_lite.kernels.settings.Options`.
    """
    BLOCK_M: tl.constexpr = OPTIONS.block_m
    BLOCK_N: tl.constexpr = OPTIONS.block_n
    BOUNDED: tl.constexpr = OPTIONS.block_n if OPTIONS.block_n < BOUNDED_N else BOUNDED_N
    query_strides, key_strides = strides
    heads, heads_per_kv = heads_of
    part = tl.program_id(0) // programs
    program = programs - 1 - tl.program_id(0) % programs  # later sequences of a sample are longer
    head, sequence, row_start, query_length, placed = locate(
        program, sequences, heads, batch, num_sinks, window, OPTIONS
    )
    first_query, first_key, length, start_k, num_sinks, window = placed
    if tl.maximum(row_start, 0) >= query_length:
        return

    # [BLOCK_M]; rows before the first one repeat it, rows past the end the last one, and none of these counts.
    offsets_m = row_start + tl.arange(0, BLOCK_M)
    query_rows = tl.maximum(tl.minimum(offsets_m, query_length - 1), 0)
    positions = first_query + query_rows
    first_position = first_query + tl.maximum(row_start, 0)
    last_position = first_query + tl.minimum(row_start + BLOCK_M, query_length) - 1

    # [BLOCK_M, BLOCK_D]
    offsets_d = tl.arange(0, OPTIONS.block_d)
    query_pointers = query_ptr + head.to(tl.int64) * query_strides[1] + offsets_d[None, :]
    start_q = tl.load(sequences[0] + sequence).to(tl.int64)
    query_pointers += (start_q + query_rows.to(tl.int64))[:, None] * query_strides[0]
    query = tl.load(query_pointers, mask=(offsets_d < OPTIONS.head_dim)[None, :], other=0.0)
    kv_head = head // heads_per_kv
    key = (key_ptr + kv_head.to(tl.int64) * key_strides[1], key_strides[0], None, start_k, kv_head)
    rules = (positions, length, num_sinks, window, sliding_window)
    if OPTIONS.positions:
        rules = rules + (first_key,)
        spans = bounded_span(first_position, last_position, rules, OPTIONS)
    else:
        spans = key_spans(first_position, last_position, rules, True, OPTIONS)
    keys_begin, hot_begin, band_begin, band_end, full_end, bounded_begin, keys_end = spans
    names, number, first_block = key_ptr, 0, 0
    if lists is not None:
        names, number = list_of(lists, head, sequence, first_query, first_position, OPTIONS)
        first_block = floor_div(first_key, OPTIONS.block_size)

    zeros = tl.zeros([BLOCK_M], tl.float32)
    state = (zeros + float("-inf"), zeros, zeros, tl.zeros([BLOCK_M], tl.int32))
    unlisted = 0
    if part == 0:
        # Before the hot tiles and between them (or, when causal, after them).
        for offset in tl.range(0, hot_begin - keys_begin + band_end - band_begin, BLOCK_N, num_stages=1):
            first = keys_begin + offset
            first += tl.where(first >= hot_begin, band_begin - hot_begin, 0)
            if lists is not None:
                column = floor_div(first, OPTIONS.block_size) - first_block
                unlisted = is_unlisted(names, number, names_before(names, number, column), column)
            state = count_tile(
                query, first, state, key, unlisted, rules, numbers, hook_args, SCORE_HOOK, OPTIONS, BLOCK_N,
                MASKED=True, BOUNDED=False,
            )  # fmt: skip
        for first in tl.range(bounded_begin, keys_end, BOUNDED, num_stages=1):
            if lists is not None:
                column = floor_div(first, OPTIONS.block_size) - first_block
                unlisted = is_unlisted(names, number, names_before(names, number, column), column)
            state = count_tile(
                query, first, state, key, unlisted, rules, numbers, hook_args, SCORE_HOOK, OPTIONS, BOUNDED,
                MASKED=True, BOUNDED=True,
            )  # fmt: skip
    hot = full_end - (band_end - band_begin) - hot_begin
    each = tl.cdiv(tl.cdiv(hot, BLOCK_N), parts) * BLOCK_N
    begin = hot_begin + part * each
    before = 0
    if lists is not None:
        column = begin
        if not OPTIONS.causal:
            column += tl.where(column >= band_begin, band_end - band_begin, 0)
        before = names_before(names, number, floor_div(column, OPTIONS.block_size) - first_block)
    for place_of in tl.range(begin, tl.minimum(begin + each, hot_begin + hot), BLOCK_N):
        first = place_of
        if not OPTIONS.causal:
            first += tl.where(first >= band_begin, band_end - band_begin, 0)
        if lists is not None:
            column = floor_div(first, OPTIONS.block_size) - first_block
            if OPTIONS.causal:
                # A list ascends, and a block is at most the next one, of which the list may name one.
                before += (tl.load(names + before, mask=before < number, other=1 << 30) < column).to(tl.int32)
            else:
                before = names_before(names, number, column)
            unlisted = is_unlisted(names, number, before, column)
        state = count_tile(
            query, first, state, key, unlisted, rules, numbers, hook_args, SCORE_HOOK, OPTIONS, BLOCK_N, MASKED=False,
            BOUNDED=False,
        )  # fmt: skip

    state_ptr += (program.to(tl.int64) * parts + part) * 4 * BLOCK_M + tl.arange(0, BLOCK_M)
    for i in tl.static_range(4):
        tl.store(state_ptr + i * BLOCK_M, state[i].to(tl.float32))


@triton.jit(do_not_specialize=["parts", "batch", "sliding_window", "lists"])
def join_parts(
    state_ptr, counts_ptr, sequences, heads, parts, batch, sliding_window, lists, SKIPS: tl.constexpr,
    PARTS: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Join the parts of a program of :func:`count_scores`, and count its queries and blocks.

    Args:
        state_ptr: what was found of each part.
        counts_ptr: where to write, for each program, its queries that see any key, the keys that they see, those that
            are kept, and the sum over these queries of the share of the weights that is kept; then, of the query block
            that begins with these queries, if any, how many key blocks its queries see, how many of these are listed,
            and how many are not, if ``SKIPS``, or else 0. FP64 ``[programs, 7]``.
        sequences: as for :func:`count_scores`.
        heads: number of query heads.
        parts: as for :func:`count_scores`.
        batch: likewise.
        sliding_window: likewise.
        lists: likewise.
        SKIPS: whether a skip rule alone has made the lists.
        PARTS: a power of two, at least ``parts``.
        OPTIONS: :class:`modelopt_lite.kernels.settings.Options`.
    """
    BLOCK_M: tl.constexpr = OPTIONS.block_m
    program = tl.program_id(0)
    head, sequence, row_start, query_length, placed = locate(program, sequences, heads, batch, 0, 0, OPTIONS)
    first_query, first_key, length, _, _, _ = placed
    counts_ptr += program.to(tl.int64) * 7
    if tl.maximum(row_start, 0) >= query_length:
        for i in tl.static_range(7):
            tl.store(counts_ptr + i, tl.zeros([], tl.float64))
        return

    # [PARTS, BLOCK_M]
    numbers = tl.arange(0, PARTS)[:, None]
    state_ptr += (program.to(tl.int64) * parts + numbers) * 4 * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    mask = numbers < parts
    highest = tl.load(state_ptr, mask=mask, other=float("-inf"))
    shift = tl.max(highest, 0)
    shrink = tl.math.exp2(highest - tl.where(shift == float("-inf"), 0.0, shift)[None, :])
    # [BLOCK_M]
    total = tl.sum(tl.load(state_ptr + BLOCK_M, mask=mask, other=0.0) * shrink, 0)
    kept_total = tl.sum(tl.load(state_ptr + 2 * BLOCK_M, mask=mask, other=0.0) * shrink, 0)
    kept = tl.sum(tl.load(state_ptr + 3 * BLOCK_M, mask=mask, other=0.0), 0)
    offsets_m = row_start + tl.arange(0, BLOCK_M)
    exist = (offsets_m >= 0) & (offsets_m < query_length)
    begin, end = visible_keys(first_query + offsets_m, length, sliding_window, first_key, OPTIONS)
    seen = tl.where(exist, tl.maximum(end - begin, 0), 0)
    share = tl.where(exist & (total > 0.0), kept_total / tl.where(total > 0.0, total, 1.0), 0.0)
    tl.store(counts_ptr, tl.sum((seen > 0).to(tl.float64), 0))
    tl.store(counts_ptr + 1, tl.sum(seen.to(tl.float64), 0))
    tl.store(counts_ptr + 2, tl.sum(tl.where(exist, kept, 0.0).to(tl.float64), 0))
    tl.store(counts_ptr + 3, tl.sum(share.to(tl.float64), 0))

    seen_blocks = 0
    listed_blocks = 0
    if lists is not None:
        low = first_query + tl.maximum(row_start, 0)
        origin = floor_div(low, OPTIONS.block_rows) * OPTIONS.block_rows
        if low == tl.maximum(origin, first_query):
            high = tl.minimum(origin + OPTIONS.block_rows, first_query + query_length) - 1
            first_seen = visible_keys(low, length, sliding_window, first_key, OPTIONS)[0]
            behind = visible_keys(high, length, sliding_window, first_key, OPTIONS)[1]
            if behind > first_seen:
                last_block = floor_div(behind - 1, OPTIONS.block_size)
                seen_blocks = last_block - floor_div(first_seen, OPTIONS.block_size) + 1
            listed_blocks = list_of(lists, head, sequence, first_query, low, OPTIONS)[1]
    tl.store(counts_ptr + 4, seen_blocks)
    tl.store(counts_ptr + 5, listed_blocks)
    tl.store(counts_ptr + 6, seen_blocks - listed_blocks if SKIPS else 0)
