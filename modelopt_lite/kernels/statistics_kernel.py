"""Counts what a plan keeps, in one pass over the scores: kept ones, and both denominators of the softmax.

A program takes ``BLOCK_M`` queries of one head through all keys that they see, as
:mod:`modelopt_lite.kernels.portable.forward` does, and writes sums over its queries. Nothing is added up by atomics, so
the numbers are the same from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .hopper.visits import floor_div
from .lists import floor_mod
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
    query, first, state, key, listed, rules, numbers, hook_args, SCORE_HOOK: tl.constexpr, OPTIONS: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Count the key tile that begins at position ``first``.

    ``state`` is, for each query, the largest visible score, the sum of all weights relative to it, that of the kept
    ones, and how many are kept. ``listed`` is where the lists of key blocks are, or None.
    """
    GROUP: tl.constexpr = OPTIONS.group
    highest, total, kept_total, kept = state
    lower = rules[5] if OPTIONS.positions else 0
    unlisted = 0
    if listed is not None:
        pointer, first_block, columns = listed
        column = floor_div(first, OPTIONS.block_size) - first_block
        exists = (column >= 0) & (column < columns)
        unlisted = 1 - tl.load(pointer + column, mask=exists, other=0).to(tl.int32)

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
    total *= shrink
    kept_total *= shrink
    for r in tl.static_range(GROUP):
        weight = tl.math.exp2(visible[r] * to_log2 - shift[:, None])
        is_kept = parts[r] > float("-inf")
        if listed is not None and not MASKED:
            is_kept = is_kept & (unlisted == 0)
        total += tl.sum(weight, 1)
        kept_total += tl.sum(tl.where(is_kept, weight, 0.0), 1)
        kept += tl.sum(is_kept.to(tl.int32), 1)
    return new, total, kept_total, kept


@triton.jit
def visible_keys(positions, length, sliding_window, first_key, OPTIONS: tl.constexpr):
    """Return how many keys queries at these positions see."""
    begin = positions * 0 + first_key
    end = positions * 0 + length
    if OPTIONS.causal:
        end = tl.minimum(end, positions + 1)
    if OPTIONS.sliding:
        begin = tl.maximum(begin, positions - sliding_window + 1)
        if not OPTIONS.causal:
            end = tl.minimum(end, positions + sliding_window)
    return tl.maximum(end - begin, 0)


@triton.jit(do_not_specialize=["batch", "num_sinks", "window", "sliding_window", "listed", "hook_args"])
def count_scores(
    query_ptr, key_ptr, counts_ptr, strides, sequences, heads_of, numbers, batch, num_sinks, window,
    sliding_window, listed, hook_args, SCORE_HOOK: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Count what each program's queries see and keep.

    Args:
        query_ptr: ``[tokens, heads, head_dim]``, as are the keys; the last dimension is contiguous.
        key_ptr: ``[key tokens, kv heads, head_dim]``.
        counts_ptr: where to write, for each program, its queries that see any key, the keys that they see, those that
            are kept, and the sum over these queries of the share of the weights that is kept, FP64 ``[programs, 4]``.
            Programs are tiles of queries, in which are sequences, in which are heads.
        strides: ``(token stride, head stride)`` of query and key.
        sequences: as for :func:`~modelopt_lite.kernels.portable.forward.attention_forward`, as are all that are not
            named here.
        heads_of: ``(query heads, query heads per kv head)``.
        numbers: ``(scale, softcap)``.
        batch: number of sequences.
        num_sinks: leading keys that are always kept.
        window: most recent keys that are always kept.
        sliding_window: most recent keys that are visible, if ``OPTIONS.sliding``.
        listed: where key blocks are listed, ``(mask [heads, query blocks, key blocks] in bytes, number of each
            sequence's first query block, query heads that share a list, query blocks, key blocks)``, or None.
        hook_args: constants, then numbers, for the hook.
        SCORE_HOOK: which scores to keep, or None.
        OPTIONS: :class:`modelopt_lite.kernels.settings.Options`.
    """
    BLOCK_M: tl.constexpr = OPTIONS.block_m
    BLOCK_N: tl.constexpr = OPTIONS.block_n
    BOUNDED: tl.constexpr = OPTIONS.block_n if OPTIONS.block_n < BOUNDED_N else BOUNDED_N
    starts_q, lengths_q, starts_k, lengths_k, firsts_q, firsts_k = sequences
    query_strides, key_strides = strides
    heads, heads_per_kv = heads_of
    program = tl.program_id(0)
    head = program % heads
    sequence = program // heads % batch
    query_length = tl.load(lengths_q + sequence).to(tl.int32)
    length = tl.load(lengths_k + sequence).to(tl.int32)
    start_q = tl.load(starts_q + sequence).to(tl.int64)
    start_k = tl.load(starts_k + sequence).to(tl.int64)
    # Tiles begin where query blocks do.
    row_start = program // heads // batch * BLOCK_M
    row_start -= floor_mod(position_of_first(firsts_q, sequence, length - query_length, OPTIONS), BLOCK_M)
    if tl.maximum(row_start, 0) >= query_length:
        tl.store(counts_ptr + program.to(tl.int64) * 4 + tl.arange(0, 4), tl.zeros([4], tl.float64))
        return

    # [BLOCK_M]; rows before the first one repeat it, rows past the end the last one, and none of these counts.
    offsets_m = row_start + tl.arange(0, BLOCK_M)
    exist = (offsets_m >= 0) & (offsets_m < query_length)
    query_rows = tl.maximum(tl.minimum(offsets_m, query_length - 1), 0)
    first_query, first_key, length, start_k, num_sinks, window = place(
        firsts_q, firsts_k, sequence, query_length, length, start_k, num_sinks, window, OPTIONS
    )
    positions = first_query + query_rows
    first_position = first_query + tl.maximum(row_start, 0)
    last_position = first_query + tl.minimum(row_start + BLOCK_M, query_length) - 1

    # [BLOCK_M, BLOCK_D]
    offsets_d = tl.arange(0, OPTIONS.block_d)
    query_pointers = query_ptr + head.to(tl.int64) * query_strides[1] + offsets_d[None, :]
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
    of_rows = None
    if listed is not None:
        mask_ptr, block_starts, heads_per_list, rows, columns = listed
        row = tl.load(block_starts + sequence) + head // heads_per_list * rows
        row += floor_div(first_position, OPTIONS.block_rows) - floor_div(first_query, OPTIONS.block_rows)
        of_rows = (mask_ptr + row.to(tl.int64) * columns, floor_div(first_key, OPTIONS.block_size), columns)

    zeros = tl.zeros([BLOCK_M], tl.float32)
    state = (zeros + float("-inf"), zeros, zeros, tl.zeros([BLOCK_M], tl.int32))
    # Before the hot tiles and between them (or, when causal, after them).
    for offset in tl.range(0, hot_begin - keys_begin + band_end - band_begin, BLOCK_N, num_stages=1):
        first = keys_begin + offset
        first += tl.where(first >= hot_begin, band_begin - hot_begin, 0)
        state = count_tile(
            query, first, state, key, of_rows, rules, numbers, hook_args, SCORE_HOOK, OPTIONS, BLOCK_N, MASKED=True,
            BOUNDED=False,
        )  # fmt: skip
    for first in tl.range(bounded_begin, keys_end, BOUNDED, num_stages=1):
        state = count_tile(
            query, first, state, key, of_rows, rules, numbers, hook_args, SCORE_HOOK, OPTIONS, BOUNDED, MASKED=True,
            BOUNDED=True,
        )  # fmt: skip
    for begin in tl.range(hot_begin, full_end - (band_end - band_begin), BLOCK_N):
        first = begin
        if not OPTIONS.causal:
            first += tl.where(first >= band_begin, band_end - band_begin, 0)
        state = count_tile(
            query, first, state, key, of_rows, rules, numbers, hook_args, SCORE_HOOK, OPTIONS, BLOCK_N, MASKED=False,
            BOUNDED=False,
        )  # fmt: skip

    _, total, kept_total, kept = state
    seen = visible_keys(positions, length, sliding_window, first_key, OPTIONS)
    share = tl.where(exist & (total > 0.0), kept_total / tl.where(total > 0.0, total, 1.0), 0.0)
    counts_ptr += program.to(tl.int64) * 4
    tl.store(counts_ptr, tl.sum((exist & (seen > 0)).to(tl.float64), 0))
    tl.store(counts_ptr + 1, tl.sum(tl.where(exist, seen, 0).to(tl.float64), 0))
    tl.store(counts_ptr + 2, tl.sum(tl.where(exist, kept, 0).to(tl.float64), 0))
    tl.store(counts_ptr + 3, tl.sum(share.to(tl.float64), 0))
