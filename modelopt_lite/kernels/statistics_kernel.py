"""Counts what a plan keeps, in one pass over the scores: kept ones, and both denominators of the softmax.

A program takes ``BLOCK_M`` queries of one head through a part of the keys that they see, with the phases of
:mod:`modelopt_lite.kernels.portable.forward`. Another kernel joins the parts and sums up over the queries, one head a
program. Nothing is added up by atomics, so the numbers are the same from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .lists import find_block, floor_div, list_of_queries
from .tiles import (
    BOUNDED_N,
    bounded_span,
    hide_invisible,
    hide_unkept,
    key_spans,
    load_tile,
    maximum_of,
    place,
    scale_scores,
    split_groups,
)

SEQUENCES = tl.constexpr(32)
"""Sequences that are looked at together."""


@triton.jit
def score_tile(
    query, first, key, rules, numbers, OPTIONS: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    BOUNDED: tl.constexpr,
):  # fmt: skip
    """Score the key tile that begins at position ``first``.

    Returns:
        ``GROUP`` tiles ``[BLOCK_M, BLOCK_N // GROUP]`` of scores, ``-inf`` where no key is visible; the factor that
        takes them to log2 space; and the positions of the groups' first keys.
    """
    GROUP: tl.constexpr = OPTIONS.group
    lower = rules[5] if OPTIONS.positions else 0
    # [BLOCK_N, BLOCK_D], [BLOCK_M, BLOCK_N]
    key_tile = load_tile(key, first, rules[1], OPTIONS.head_dim, BLOCK_N, OPTIONS.block_d, GROUP, BOUNDED, lower)
    scores, to_log2 = scale_scores(tl.dot(query, key_tile.T, input_precision="ieee"), numbers, OPTIONS)
    groups = first + GROUP * tl.arange(0, BLOCK_N // GROUP)[None, :]
    visible = split_groups(scores, OPTIONS)
    if MASKED:
        visible = hide_invisible(visible, rules[0][:, None], groups, rules, OPTIONS)
    return visible, to_log2, groups


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
    visible, to_log2, groups = score_tile(query, first, key, rules, numbers, OPTIONS, BLOCK_N, MASKED, BOUNDED)
    # [BLOCK_M]
    largest = tl.max(maximum_of(visible), 1) * to_log2
    parts, _, _ = hide_unkept(
        visible, rules[0][:, None], groups, rules, hook_args, SCORE_HOOK, OPTIONS, MASKED, unlisted
    )  # fmt: skip

    new = tl.maximum(highest, largest)
    shift = tl.where(new == float("-inf"), 0.0, new)
    shrink = tl.math.exp2(highest - shift)
    # Summed place by place before they are summed over a row, which takes threads that tell each other.
    weights = tl.zeros(visible[0].shape, tl.float32)
    kept_weights = tl.zeros(visible[0].shape, tl.float32)
    number = tl.zeros(visible[0].shape, tl.int32)
    for r in tl.static_range(GROUP):
        weight = tl.math.exp2(visible[r] * to_log2 - shift[:, None])
        is_kept = parts[r] > float("-inf")
        if OPTIONS.unlisted and not MASKED:
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
def blocks_counted(first_query, query_length, sample):
    """Return which query blocks of a sequence are counted: the number of the first one, and how many.

    ``sample`` is ``(every, rows, fewest)``: of query blocks of ``rows`` positions, those are counted whose number is
    ``every // 2`` more than a multiple of ``every``; of sequences with fewer queries than ``fewest`` none.
    """
    every, rows, fewest = sample
    offset = every // 2
    first = -floor_div(offset - floor_div(first_query, rows), every)
    behind = floor_div(floor_div(first_query + query_length - 1, rows) - offset, every) + 1
    number = tl.where(query_length >= fewest, tl.maximum(behind - first, 0), 0)
    return offset + first * every, number


@triton.jit
def find_tile(tile, sequences, batch, sample, OPTIONS: tl.constexpr):
    """Find which sequence a tile of queries belongs to; tiles of all sequences stand one after the other.

    Returns:
        The number of the sequence, and of the tile in it; there are fewer tiles if the first is not below ``batch``.
    """
    _, lengths_q, _, lengths_k, firsts_q, _ = sequences
    sequence = batch * 0
    before = tile * 0
    found = tile * 0
    for first in range(0, batch, SEQUENCES):
        numbers = first + tl.arange(0, SEQUENCES)
        exist = numbers < batch
        query_lengths = tl.load(lengths_q + numbers, mask=exist, other=0).to(tl.int32)
        if OPTIONS.positions:
            first_queries = tl.load(firsts_q + numbers, mask=exist, other=0).to(tl.int32)
        else:
            first_queries = tl.load(lengths_k + numbers, mask=exist, other=0).to(tl.int32) - query_lengths
        tiles = blocks_counted(first_queries, query_lengths, sample)[1] * (sample[1] // OPTIONS.block_m)
        ends = before + tl.cumsum(tiles, 0)
        passed = exist & (ends <= tile)
        sequence += tl.sum(passed.to(tl.int32), 0)
        found = tl.maximum(found, tl.max(tl.where(passed, ends, 0), 0))
        before += tl.sum(tiles, 0)
    return sequence, tile - found


@triton.jit
def count_blocks(first_query, query_length, length, first_key, sliding_window, low, number, OPTIONS: tl.constexpr):
    """Count the key blocks that a query block sees and that its list names, if ``low`` is its first query.

    Args:
        first_query: position of the sequence's first query.
        query_length: how many it has.
        length: position behind its last key.
        first_key: position of its first key.
        sliding_window: most recent keys that are visible, if ``OPTIONS.sliding``.
        low: position of a tile's first query.
        number: how many key blocks its list names.
        OPTIONS: :class:`modelopt_lite.kernels.settings.Options`.
    """
    seen = low * 0
    origin = floor_div(low, OPTIONS.block_rows) * OPTIONS.block_rows
    begins = low == tl.maximum(origin, first_query)
    high = tl.minimum(origin + OPTIONS.block_rows, first_query + query_length) - 1
    first_seen = visible_keys(low, length, sliding_window, first_key, OPTIONS)[0]
    behind = visible_keys(high, length, sliding_window, first_key, OPTIONS)[1]
    if behind > first_seen:
        seen = floor_div(behind - 1, OPTIONS.block_size) - floor_div(first_seen, OPTIONS.block_size) + 1
    return tl.where(begins, seen, 0), tl.where(begins, number, 0)


@triton.jit(do_not_specialize=["tiles", "parts", "batch", "sample", "num_sinks", "window", "sliding_window", "lists",
                               "hook_args"])  # fmt: skip
def count_scores(
    query_ptr, key_ptr, state_ptr, strides, sequences, heads_of, numbers, tiles, parts, batch, sample, num_sinks,
    window, sliding_window, lists, hook_args, SCORE_HOOK: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Count what each program's queries see and keep of a part of the keys.

    Args:
        query_ptr: ``[tokens, heads, head_dim]``, as are the keys; the last dimension is contiguous.
        key_ptr: ``[key tokens, kv heads, head_dim]``.
        state_ptr: where to write, FP32 ``[tiles, heads, 4 * parts + 2, BLOCK_M]``: of each part what
            :func:`count_tile` calls a state; then how many keys each query sees, 0 where there is no query; then the
            two numbers of :func:`count_blocks`. Where a query sees no key, its states mean nothing.
        strides: ``(token stride, head stride)`` of query and key.
        sequences: as for :func:`~modelopt_lite.kernels.portable.forward.attention_forward`, as are all that are not
            named here.
        heads_of: ``(query heads, query heads per kv head)``.
        numbers: ``(scale, softcap)``.
        tiles: how many tiles of queries there are, at most, over all sequences.
        parts: into how many parts the keys of a tile are cut.
        batch: number of sequences.
        sample: as for :func:`blocks_counted`; ``BLOCK_M`` divides the rows.
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
    every, rows, _ = sample
    head = tl.program_id(0) % heads
    tile = tiles - 1 - tl.program_id(0) // heads % tiles  # later ones see more keys
    part = tl.program_id(0) // (heads * tiles)
    sequence, tile_of = find_tile(tile, sequences, batch, sample, OPTIONS)
    exists = sequence < batch
    sequence = tl.minimum(sequence, batch - 1)

    starts_q, lengths_q, starts_k, lengths_k, firsts_q, firsts_k = sequences
    query_length = tl.load(lengths_q + sequence).to(tl.int32)
    length = tl.load(lengths_k + sequence).to(tl.int32)
    start_k = tl.load(starts_k + sequence).to(tl.int64)
    placed = place(firsts_q, firsts_k, sequence, query_length, length, start_k, num_sinks, window, OPTIONS)
    first_query, first_key, length, start_k, num_sinks, window = placed
    block = blocks_counted(first_query, query_length, sample)[0] + tile_of // (rows // BLOCK_M) * every
    row_start = block * rows + tile_of % (rows // BLOCK_M) * BLOCK_M - first_query
    end = first_query + query_length
    in_block = tl.minimum((block + 1) * rows, end) - tl.maximum(block * rows, first_query)
    # In a sample, what has a single query would look like decode.
    exists = exists & (in_block >= tl.minimum(every, 2))
    exists = exists & (tl.maximum(row_start, 0) < tl.minimum(row_start + BLOCK_M, query_length))
    state_ptr += (tile * heads + head).to(tl.int64) * (4 * parts + 2) * BLOCK_M + tl.arange(0, BLOCK_M)
    if exists == 0:
        if part == 0:
            for i in tl.static_range(2):
                tl.store(state_ptr + (4 * parts + i) * BLOCK_M, tl.zeros([BLOCK_M], tl.float32))
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
    start_q = tl.load(starts_q + sequence).to(tl.int64)
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
    blocks = (key_ptr, 0, 0)
    if lists is not None:
        blocks = list_of_queries(lists, head, sequence, first_query, first_key, first_position, OPTIONS)

    zeros = tl.zeros([BLOCK_M], tl.float32)
    # Before the hot tiles and between them (or, when causal, after them).
    masked = hot_begin - keys_begin + band_end - band_begin
    state = (zeros + float("-inf"), zeros, zeros, tl.zeros([BLOCK_M], tl.int32))
    unlisted = 0
    if part == 0:
        for offset in tl.range(0, masked, BLOCK_N, num_stages=1):
            first = keys_begin + offset
            first += tl.where(first >= hot_begin, band_begin - hot_begin, 0)
            if lists is not None:
                unlisted = 1 - find_block(blocks, floor_div(first, OPTIONS.block_size))[1].to(tl.int32)
            state = count_tile(
                query, first, state, key, unlisted, rules, numbers, hook_args, SCORE_HOOK, OPTIONS, BLOCK_N,
                MASKED=True, BOUNDED=False,
            )  # fmt: skip
        for first in tl.range(bounded_begin, keys_end, BOUNDED, num_stages=1):
            if lists is not None:
                unlisted = 1 - find_block(blocks, floor_div(first, OPTIONS.block_size))[1].to(tl.int32)
            state = count_tile(
                query, first, state, key, unlisted, rules, numbers, hook_args, SCORE_HOOK, OPTIONS, BOUNDED,
                MASKED=True, BOUNDED=True,
            )  # fmt: skip
    hot = full_end - (band_end - band_begin) - hot_begin
    each = tl.cdiv(tl.cdiv(hot, BLOCK_N), parts) * BLOCK_N
    begin = hot_begin + part * each
    before = 0
    if lists is not None:
        before = find_block(blocks, floor_div(begin, OPTIONS.block_size))[0]
    for place_of in tl.range(begin, tl.minimum(begin + each, hot_begin + hot), BLOCK_N):
        first = place_of
        if not OPTIONS.causal:
            first += tl.where(first >= band_begin, band_end - band_begin, 0)
        if lists is not None:
            pointer, number, origin = blocks
            block = floor_div(first, OPTIONS.block_size)
            if OPTIONS.causal:
                # A list ascends, and a block is at most the next one, of which the list may name one.
                name = tl.load(pointer + before, mask=before < number, other=1 << 30)
                before += (name < block - origin).to(tl.int32)
            else:
                before = find_block(blocks, block)[0]
            name = tl.load(pointer + before, mask=before < number, other=-1)
            unlisted = (name != block - origin).to(tl.int32)
        state = count_tile(
            query, first, state, key, unlisted, rules, numbers, hook_args, SCORE_HOOK, OPTIONS, BLOCK_N,
            MASKED=False, BOUNDED=False,
        )  # fmt: skip

    for i in tl.static_range(4):
        tl.store(state_ptr + (4 * part + i) * BLOCK_M, state[i].to(tl.float32))
    if part == 0:
        exist = (offsets_m >= 0) & (offsets_m < query_length)
        first_seen, behind = visible_keys(first_query + offsets_m, length, sliding_window, first_key, OPTIONS)
        seen = tl.where(exist, tl.maximum(behind - first_seen, 0), 0)
        tl.store(state_ptr + 4 * parts * BLOCK_M, seen.to(tl.float32))
        if OPTIONS.block_size > 0:
            seen_blocks, listed_blocks = count_blocks(
                first_query, query_length, length, first_key, sliding_window, first_position, blocks[1], OPTIONS
            )
            places = tl.arange(0, BLOCK_M)
            both = tl.where(places == 0, seen_blocks, listed_blocks)
            tl.store(state_ptr + (4 * parts + 1) * BLOCK_M, both.to(tl.float32), mask=places < 2)


@triton.jit(do_not_specialize=["tiles", "heads", "parts", "times"])
def join_parts(
    state_ptr, counts_ptr, tiles, heads, parts, times, ADDS: tl.constexpr, SKIPS: tl.constexpr, TILES: tl.constexpr,
    PARTS: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Join the parts of all tiles of a head, and count its queries and blocks.

    Args:
        state_ptr: what :func:`count_scores` has written.
        counts_ptr: where to write, for each head, its queries that see any key, the keys that they see, those that are
            kept, and the sum over these queries of the share of the weights that is kept; then how many key blocks
            query blocks see, how many of these are visited, and how many are not, if ``SKIPS``, or else 0. FP64
            ``[heads, 7]``.
        tiles: as for :func:`count_scores`.
        heads: number of query heads.
        parts: as for :func:`count_scores`.
        times: by what to multiply all counts.
        ADDS: whether to add to what is there.
        SKIPS: whether a skip rule alone made the lists.
        TILES: tiles that are looked at together.
        PARTS: a power of two, at least ``parts``.
        OPTIONS: :class:`modelopt_lite.kernels.settings.Options`.
    """
    BLOCK_M: tl.constexpr = OPTIONS.block_m
    head = tl.program_id(0)
    zero = tl.zeros([TILES], tl.float64)
    rows = zero
    visible = zero
    kept = zero
    mass = zero
    seen_blocks = zero
    listed_blocks = zero
    for first in range(0, tiles, TILES):
        numbers = first + tl.arange(0, TILES)
        exist = numbers < tiles
        of_tile = state_ptr + (numbers * heads + head).to(tl.int64) * (4 * parts + 2) * BLOCK_M
        # [TILES, BLOCK_M]
        of_row = of_tile[:, None] + tl.arange(0, BLOCK_M)[None, :]
        seen = tl.load(of_row + 4 * parts * BLOCK_M, mask=exist[:, None], other=0.0)
        # [TILES, PARTS, BLOCK_M]
        part = tl.arange(0, PARTS)[None, :, None]
        pointers = of_row[:, None, :] + part * (4 * BLOCK_M)
        mask = (seen > 0.0)[:, None, :] & (part < parts)
        highest = tl.load(pointers, mask=mask, other=float("-inf"))
        shift = tl.max(highest, 1)
        shrink = tl.math.exp2(highest - tl.where(shift == float("-inf"), 0.0, shift)[:, None, :])
        # [TILES, BLOCK_M]
        total = tl.sum(tl.load(pointers + BLOCK_M, mask=mask, other=0.0) * shrink, 1)
        kept_total = tl.sum(tl.load(pointers + 2 * BLOCK_M, mask=mask, other=0.0) * shrink, 1)
        share = tl.where(total > 0.0, kept_total / tl.where(total > 0.0, total, 1.0), 0.0)
        kept_here = tl.sum(tl.load(pointers + 3 * BLOCK_M, mask=mask, other=0.0), 1)
        # [TILES]
        rows += tl.sum((seen > 0.0).to(tl.float64), 1)
        visible += tl.sum(seen.to(tl.float64), 1)
        kept += tl.sum(kept_here.to(tl.float64), 1)
        mass += tl.sum(share.to(tl.float64), 1)
        if OPTIONS.block_size > 0:
            of_blocks = of_tile + (4 * parts + 1) * BLOCK_M
            seen_blocks += tl.load(of_blocks, mask=exist, other=0.0).to(tl.float64)
            listed_blocks += tl.load(of_blocks + 1, mask=exist, other=0.0).to(tl.float64)
    seen_of_head = tl.sum(seen_blocks, 0)
    listed_of_head = tl.sum(listed_blocks, 0)
    found = (
        tl.sum(rows, 0), tl.sum(visible, 0), tl.sum(kept, 0), tl.sum(mass, 0), seen_of_head, listed_of_head,
        seen_of_head - listed_of_head if SKIPS else 0.0,
    )  # fmt: skip
    for i in tl.static_range(7):
        number = found[i] * times
        if ADDS:
            number += tl.load(counts_ptr + head * 7 + i)
        tl.store(counts_ptr + head * 7 + i, number)
