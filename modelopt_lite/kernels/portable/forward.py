"""The fused attention forward: one Triton kernel that every plan steers.

A program computes ``BLOCK_M`` queries of one head. It walks over the sequence's keys in tiles of ``BLOCK_N``, in three
phases that share one body: masked tiles (sinks, dense window, diagonal, edge of the sliding window), what reaches past
the last whole tile, and all others, the hot loop, which needs no mask at all. Softmax does not mind the order.

With ``OPTIONS.frozen`` the hot loop, which comes last, takes the row maximum of the other phases as its reference and
never updates it: no row maximum, no rescaling. That is the same mathematics unless it overflows, for which a weight has
to be about 2^120 times the reference's. The program looks at its result, and then starts again with the ordinary online
softmax throughout.

Everything is in log2 space; positions are counted from the sequence's first token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..lists import floor_mod, list_of_queries, look_up, places_of, position_at, rows_exist
from ..tiles import (
    BOUNDED_N,
    LOG2E,
    as_if_of,
    bounded_span,
    join_groups,
    key_spans,
    load_tile,
    place,
    position_of_first,
    scale_scores,
    select_scores,
    weigh,
)

LN2 = tl.constexpr(0.6931471805599453)
LANES = tl.constexpr(8)
"""Partial sums of a row: as many as the columns that it spreads over its threads, so that none is shuffled."""


@triton.jit
def attend_tile(
    query,
    first,
    accumulator,
    running_max,
    partial_sum,
    key,
    value,
    rules,
    numbers,
    hook_args,
    SCORE_HOOK: tl.constexpr,
    OPTIONS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    BOUNDED: tl.constexpr,
    FROZEN: tl.constexpr,
    unlisted=0,
):
    """Take the key tile that begins at position ``first`` into the softmax.

    ``MASKED``: visibility and exemptions are checked for each key. ``BOUNDED``: the tile may reach past the sequence's
    end (and is masked). ``FROZEN``: ``running_max`` stays as it is. ``unlisted``: see
    :func:`~modelopt_lite.kernels.tiles.select_scores`.
    """
    BLOCK_M: tl.constexpr = OPTIONS.block_m
    GROUP: tl.constexpr = OPTIONS.group
    length = rules[1]
    lower = rules[5] if OPTIONS.positions else 0

    # [BLOCK_N, BLOCK_D]
    key_tile = load_tile(key, first, length, OPTIONS.head_dim, BLOCK_N, OPTIONS.block_d, GROUP, BOUNDED, lower)
    # [BLOCK_M, BLOCK_N]
    scores = tl.dot(query, key_tile.T, input_precision="ieee")
    scores, to_log2 = scale_scores(scores, numbers, OPTIONS)
    # GROUP tiles [BLOCK_M, BLOCK_N // GROUP]
    groups = first + GROUP * tl.arange(0, BLOCK_N // GROUP)[None, :]
    parts, keep, largest = select_scores(
        scores, rules[0][:, None], groups, rules, hook_args, SCORE_HOOK, OPTIONS, MASKED, unlisted
    )

    # [BLOCK_M]
    if FROZEN:
        shift = running_max
    else:
        tile_max = tl.max(largest, 1)
        new_max = tl.maximum(running_max, tile_max * to_log2)
        if MASKED or not OPTIONS.keeps_group_max:
            # Nothing kept so far: any finite number does.
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        else:
            shift = new_max
        rescale = tl.math.exp2(running_max - shift)
        running_max = new_max
        partial_sum = partial_sum * rescale[:, None]
        accumulator = accumulator * rescale[:, None]

    weights = ()
    for r in tl.static_range(GROUP):
        weight = tl.math.exp2(parts[r] * to_log2 - shift[:, None])
        if len(keep) > 0:
            weight = weigh(weight, keep[r])
        weights = weights + (weight,)
    # [BLOCK_M, BLOCK_N]
    probabilities = join_groups(weights, OPTIONS)
    if GROUP > 1 and not OPTIONS.hopper:
        probabilities = as_if_of(scores, probabilities)
    partial_sum += tl.sum(probabilities.reshape(BLOCK_M, BLOCK_N // LANES, LANES), 1)
    # [BLOCK_N, BLOCK_DV]
    value_tile = load_tile(value, first, length, OPTIONS.value_dim, BLOCK_N, OPTIONS.block_dv, GROUP, BOUNDED, lower)
    accumulator = tl.dot(probabilities.to(value_tile.dtype), value_tile, accumulator, input_precision="ieee")
    return accumulator, running_max, partial_sum


@triton.jit
def attend_tiles(
    query,
    accumulator,
    running_max,
    partial_sum,
    spans,
    lists,
    where,
    key,
    value,
    rules,
    numbers,
    hook_args,
    SCORE_HOOK: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """Take all key tiles of ``spans`` into the softmax, as far as they are listed: masked, bounded, then hot ones.

    ``where`` is the query head, the sequence, and the positions of its first query, its first key, and of the first and
    the last query of the tile.
    """
    BLOCK_M: tl.constexpr = OPTIONS.block_m
    BLOCK_N: tl.constexpr = OPTIONS.block_n
    BOUNDED: tl.constexpr = OPTIONS.block_n if OPTIONS.block_n < BOUNDED_N else BOUNDED_N
    SIZE: tl.constexpr = OPTIONS.block_size
    # Registers are full where every tile has a maximum: what does not change is worth computing again.
    AGAIN: tl.constexpr = not OPTIONS.frozen
    keys_begin, hot_begin, band_begin, band_end, full_end, bounded_begin, keys_end = spans
    head, sequence, first_query, first_key, first_position, last_position = where
    if lists is not None:
        blocks = list_of_queries(lists, head, sequence, first_query, first_key, last_position, OPTIONS)

    # Before the hot tiles and between them (or, when causal, after them).
    for offset in tl.range(0, hot_begin - keys_begin + band_end - band_begin, BLOCK_N, disable_licm=AGAIN):
        first = keys_begin + offset
        first += tl.where(first >= hot_begin, band_begin - hot_begin, 0)
        unlisted, visited = 0, True
        if lists is not None:
            unlisted, visited = look_up(blocks, first, first, first_position, rules, SIZE, BLOCK_M, BLOCK_N)
        if visited:
            accumulator, running_max, partial_sum = attend_tile(
                query, first, accumulator, running_max, partial_sum, key, value, rules, numbers, hook_args,
                SCORE_HOOK, OPTIONS, BLOCK_N, MASKED=True, BOUNDED=False, FROZEN=False, unlisted=unlisted,
            )  # fmt: skip
    for first in tl.range(bounded_begin, keys_end, BOUNDED, num_stages=1, disable_licm=AGAIN):
        unlisted, visited = 0, True
        if lists is not None:
            unlisted, visited = look_up(blocks, first, first, first_position, rules, SIZE, BLOCK_M, BOUNDED)
        if visited:
            accumulator, running_max, partial_sum = attend_tile(
                query, first, accumulator, running_max, partial_sum, key, value, rules, numbers, hook_args,
                SCORE_HOOK, OPTIONS, BOUNDED, MASKED=True, BOUNDED=True, FROZEN=False, unlisted=unlisted,
            )  # fmt: skip
    if lists is not None:
        hot_begin, band_begin, band_end, full_end = places_of(blocks, (hot_begin, band_begin, band_end, full_end), SIZE)
    # Without sinks and recent keys, hot tiles are empty to a rule that keeps nothing.
    hot_end = hot_begin if OPTIONS.keeps_nothing else full_end - (band_end - band_begin)
    for begin in tl.range(hot_begin, hot_end, BLOCK_N, disable_licm=AGAIN):
        first = begin
        if not OPTIONS.causal:
            first += tl.where(first >= band_begin, band_end - band_begin, 0)
        if lists is not None:
            first = position_at(blocks, first, SIZE)
        accumulator, running_max, partial_sum = attend_tile(
            query, first, accumulator, running_max, partial_sum, key, value, rules, numbers, hook_args,
            SCORE_HOOK, OPTIONS, BLOCK_N, MASKED=False, BOUNDED=False, FROZEN=OPTIONS.frozen,
        )  # fmt: skip
    return accumulator, running_max, partial_sum


@triton.jit
def rows_of_output(rows, mask, output_rows_ptr):
    """Return where the results of rows go."""
    if output_rows_ptr is not None:
        rows = tl.load(output_rows_ptr + rows, mask=mask, other=0)
    return rows


@triton.jit
def fill_gap(
    out_ptr, lse_ptr, output_rows_ptr, out_strides, starts_ptr, lengths_ptr, batch, total, heads, first_token,
    BLOCK_M: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Write zeros, and -inf to any LSE, for those of the next ``BLOCK_M`` tokens that belong to no sequence."""
    BLOCK_DV: tl.constexpr = OPTIONS.block_dv
    # [BLOCK_M]
    tokens = first_token + tl.arange(0, BLOCK_M)
    gap = tokens < total
    for index in range(batch):
        start = tl.load(starts_ptr + index)
        gap = gap & ((tokens < start) | (tokens >= start + tl.load(lengths_ptr + index)))
    if tl.max(gap.to(tl.int32), 0) > 0:
        offsets_d = tl.arange(0, BLOCK_DV)
        mask = gap[:, None] & (offsets_d < OPTIONS.value_dim)[None, :]
        rows = rows_of_output(tokens.to(tl.int64), gap, output_rows_ptr)
        zeros = tl.zeros([BLOCK_M, BLOCK_DV], out_ptr.dtype.element_ty)
        out_pointers = out_ptr + rows[:, None] * out_strides[0] + offsets_d[None, :]
        for head in range(heads):
            tl.store(out_pointers, zeros, mask=mask)
            if lse_ptr is not None:
                tl.store(lse_ptr + rows * heads + head, float("-inf"), mask=gap)
            out_pointers += out_strides[1]


@triton.jit(
    do_not_specialize=[
        "batch", "total", "tiles_per_head", "heads_per_wave", "num_sinks", "window", "sliding_window", "lists",
        "hook_args",
    ]
)  # fmt: skip
def attention_forward(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    lse_ptr,
    output_rows_ptr,
    sink_logits_ptr,
    key_descriptor,
    value_descriptor,
    strides,
    sequences,
    heads_of,
    numbers,
    batch,
    total,
    tiles_per_head,
    heads_per_wave,
    num_sinks,
    window,
    sliding_window,
    lists,
    hook_args,
    SCORE_HOOK: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """Compute attention of packed sequences, and its log-sum-exp.

    Its launch is :func:`modelopt_lite.kernels.portable.launch.prepare`.

    Args:
        query_ptr: ``[tokens, heads, head_dim]``, as are the keys; the last dimension is contiguous everywhere.
        key_ptr: ``[key tokens, kv heads, head_dim]``.
        value_ptr: ``[key tokens, kv heads, value_dim]``.
        out_ptr: ``[tokens, heads, value_dim]``.
        lse_ptr: ``[tokens, heads]``, FP32, contiguous, or None.
        output_rows_ptr: ``[tokens]``, where the results of each token go, or None: to its own row.
        sink_logits_ptr: ``[heads]``, logits that only join the denominator, or None.
        key_descriptor: tensor descriptor ``[group phase, groups, kv heads, head_dim]`` of the keys, or None.
        value_descriptor: the same of the values.
        strides: ``(token stride, head stride)`` of query, key, value and out.
        sequences: pointers ``(starts, lengths)`` of the queries, then of the keys, then those of the positions of the
            first query and the first key, None unless ``OPTIONS.positions``; ``[batch]`` each.
        heads_of: ``(query heads, query heads per kv head)``.
        numbers: ``(scale, softcap)``.
        batch: number of sequences.
        total: query tokens.
        tiles_per_head: query tiles of the longest sequence.
        heads_per_wave: heads, counted over all sequences, that are computed at one time.
        num_sinks: leading keys that are always kept.
        window: most recent keys that are always kept.
        sliding_window: most recent keys that are visible, if ``OPTIONS.sliding``.
        lists: which key blocks to visit, or None: pointers ``counts``, ``indices`` and ``starts`` of
            :class:`~modelopt_lite.kernels.blocks.KeyBlocks`, query heads a list, query blocks and key blocks of a head.
        hook_args: constants, then numbers, for the hook.
        SCORE_HOOK: which scores to keep, or None.
        OPTIONS: :class:`modelopt_lite.kernels.settings.Options`.
    """
    BLOCK_M: tl.constexpr = OPTIONS.block_m
    BLOCK_D: tl.constexpr = OPTIONS.block_d
    BLOCK_DV: tl.constexpr = OPTIONS.block_dv
    starts_q, lengths_q, starts_k, lengths_k, firsts_q, firsts_k = sequences
    query_strides, key_strides, value_strides, out_strides = strides
    heads, heads_per_kv = heads_of

    # Programs: waves of heads whose keys and values fit into the L2 cache; in a wave, the longest tiles first.
    program = tl.program_id(0)
    if program >= batch * heads * tiles_per_head:
        first_token = (program - batch * heads * tiles_per_head) * BLOCK_M
        fill_gap(
            out_ptr, lse_ptr, output_rows_ptr, out_strides, starts_q, lengths_q, batch, total, heads, first_token,
            BLOCK_M, OPTIONS,
        )  # fmt: skip
        return
    wave = program // (tiles_per_head * heads_per_wave)
    program -= wave * tiles_per_head * heads_per_wave
    heads_in_wave = tl.minimum(heads_per_wave, batch * heads - wave * heads_per_wave)
    row_start = (tiles_per_head - 1 - program // heads_in_wave) * BLOCK_M
    sequence = (wave * heads_per_wave + program % heads_in_wave) // heads
    head = (wave * heads_per_wave + program % heads_in_wave) % heads
    query_length = tl.load(lengths_q + sequence).to(tl.int32)
    if lists is None:
        if row_start >= query_length:
            return
    length = tl.load(lengths_k + sequence).to(tl.int32)
    start_q = tl.load(starts_q + sequence).to(tl.int64)
    start_k = tl.load(starts_k + sequence).to(tl.int64)
    if lists is not None:
        # Tiles begin where query blocks do.
        row_start -= floor_mod(position_of_first(firsts_q, sequence, length - query_length, OPTIONS), BLOCK_M)
        if tl.maximum(row_start, 0) >= query_length:
            return

    # [BLOCK_M]; rows before the first one repeat it, rows past the end the last one, and none of these is stored.
    offsets_m = row_start + tl.arange(0, BLOCK_M)
    query_rows = tl.minimum(offsets_m, query_length - 1)
    if lists is not None:
        query_rows = tl.maximum(query_rows, 0)
    first_query, first_key, length, start_k, num_sinks, window = place(
        firsts_q, firsts_k, sequence, query_length, length, start_k, num_sinks, window, OPTIONS
    )
    positions = first_query + query_rows
    first_position = first_query + row_start
    last_position = first_query + tl.minimum(row_start + BLOCK_M, query_length) - 1

    # [BLOCK_M, BLOCK_D]
    offsets_d = tl.arange(0, BLOCK_D)
    query_pointers = (
        query_ptr
        + start_q * query_strides[0]
        + head.to(tl.int64) * query_strides[1]
        + (query_rows.to(tl.int64)[:, None] * query_strides[0] + offsets_d[None, :])
    )
    if OPTIONS.head_dim == BLOCK_D:
        query = tl.load(query_pointers)
    else:
        query = tl.load(query_pointers, mask=(offsets_d < OPTIONS.head_dim)[None, :], other=0.0)

    kv_head = head // heads_per_kv
    key_head_ptr = key_ptr + kv_head.to(tl.int64) * key_strides[1]
    value_head_ptr = value_ptr + kv_head.to(tl.int64) * value_strides[1]
    key = (key_head_ptr, key_strides[0], key_descriptor, start_k, kv_head)
    value = (value_head_ptr, value_strides[0], value_descriptor, start_k, kv_head)
    rules = (positions, length, num_sinks, window, sliding_window)
    if OPTIONS.positions:
        rules = rules + (first_key,)
        spans = bounded_span(first_position, last_position, rules, OPTIONS)
    else:
        spans = key_spans(first_position, last_position, rules, SCORE_HOOK is not None or lists is not None, OPTIONS)
    where = (head, sequence, first_query, first_key, first_position, last_position)

    # [BLOCK_M, BLOCK_DV], [BLOCK_M], [BLOCK_M, LANES]
    zeros = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    initial_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    initial_sum = tl.zeros([BLOCK_M, LANES], tl.float32)
    if sink_logits_ptr is not None:
        sink_logit = tl.load(sink_logits_ptr + head).to(tl.float32) * LOG2E
        initial_max = tl.zeros([BLOCK_M], tl.float32) + sink_logit
        initial_sum += tl.where(tl.arange(0, LANES) == 0, 1.0, 0.0)[None, :]
    accumulator, running_max, partial_sum = zeros, initial_max, initial_sum
    if OPTIONS.frozen:
        pending = True
        while pending:
            accumulator, running_max, partial_sum = attend_tiles(
                query, zeros, initial_max, initial_sum, spans, lists, where, key, value, rules, numbers,
                hook_args, SCORE_HOOK, OPTIONS,
            )  # fmt: skip
            # Zero times a finite number is zero.
            suspicious = tl.sum(accumulator * 0.0, 1) + tl.sum(partial_sum * 0.0, 1) != 0.0
            keys_begin, _, _, _, _, bounded_begin, keys_end = spans
            pending = (tl.max(suspicious.to(tl.int32), 0) > 0) & (bounded_begin > keys_begin)
            spans = (keys_begin, keys_begin, keys_begin, keys_begin, keys_begin, keys_begin, keys_end)
    else:
        accumulator, running_max, partial_sum = attend_tiles(
            query, zeros, initial_max, initial_sum, spans, lists, where, key, value, rules, numbers,
            hook_args, SCORE_HOOK, OPTIONS,
        )  # fmt: skip

    # [BLOCK_M]
    total_weight = tl.sum(partial_sum, 1)
    inverse = tl.where(total_weight == 0.0, 0.0, 1.0 / total_weight)
    stored = rows_exist(offsets_m, query_length, OPTIONS)
    out_rows = rows_of_output(start_q + offsets_m, stored, output_rows_ptr)
    if lse_ptr is not None:
        lse = (running_max + tl.math.log2(total_weight)) * LN2
        tl.store(lse_ptr + out_rows * heads + head, lse, mask=stored)
    offsets_dv = tl.arange(0, BLOCK_DV)
    out_pointers = (
        out_ptr + head.to(tl.int64) * out_strides[1] + (out_rows[:, None] * out_strides[0] + offsets_dv[None, :])
    )
    mask = stored[:, None] & (offsets_dv < OPTIONS.value_dim)[None, :]
    tl.store(out_pointers, (accumulator * inverse[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
