"""The fused attention backward: Triton kernels that every plan of the forward steers.

``gradient_rows`` prepares two numbers a query row. ``gradient_of_queries`` walks over keys as the forward does and adds
up the gradient of ``BLOCK_M`` queries of one head. ``gradient_of_keys`` keeps ``BLOCK_N`` keys and values of one head
and walks over the queries of all query heads that share them. Each gradient is summed by one program in a fixed order,
so that every run gives the same bits, and scores are computed anew rather than kept.

Hooks decide again, on the same scores: they are products of queries and keys in this order everywhere, as in the
forward, and weights are transposed afterwards. What is kept is taken as given; the selection has no gradient.

Everything is in log2 space; positions are counted from the sequence's first token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..lists import floor_mod, list_of_keys, list_of_queries, look_up, places_of, position_at, rows_exist
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


@triton.jit(do_not_specialize=["total"])
def gradient_rows(
    grad_ptr,
    out_ptr,
    lse_ptr,
    shift_ptr,
    delta_ptr,
    strides,
    heads,
    total,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Prepare what the other kernels need to know of each row; programs are blocks of ``BLOCK_M`` tokens of one head.

    Args:
        grad_ptr: gradient of the output, ``[tokens, heads, value_dim]``.
        out_ptr: the output.
        lse_ptr: ``[tokens, heads]``, FP32, contiguous.
        shift_ptr: receives the LSE in log2 space, ``inf`` for rows without a key, ``[heads, tokens]``.
        delta_ptr: receives each row's product of output and gradient, 0 for rows without a key, ``[heads, tokens]``.
        strides: ``(token stride, head stride)`` of gradient and output.
        heads: query heads.
        total: query tokens.
        VALUE_DIM: columns.
        BLOCK_M: tokens a program.
        BLOCK_DV: columns of a tile.
    """
    head = (tl.program_id(0) % heads).to(tl.int64)
    # [BLOCK_M]
    tokens = tl.program_id(0).to(tl.int64) // heads * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = tokens < total
    lse = tl.load(lse_ptr + tokens * heads + head, mask=exists, other=float("-inf"))
    alive = lse != float("-inf")
    offsets_d = tl.arange(0, BLOCK_DV)
    # [BLOCK_M, BLOCK_DV]
    mask = alive[:, None] & (offsets_d < VALUE_DIM)[None, :]
    grad_strides, out_strides = strides
    grad_pointers = grad_ptr + head * grad_strides[1] + (tokens[:, None] * grad_strides[0] + offsets_d[None, :])
    out_pointers = out_ptr + head * out_strides[1] + (tokens[:, None] * out_strides[0] + offsets_d[None, :])
    grad = tl.load(grad_pointers, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(out_pointers, mask=mask, other=0.0).to(tl.float32)
    places = head * total + tokens
    tl.store(shift_ptr + places, tl.where(alive, lse * LOG2E, float("inf")), mask=exists)
    tl.store(delta_ptr + places, tl.sum(grad * out, 1), mask=exists)


@triton.jit
def differentiate_softmax(
    products,
    grad_weights,
    q_pos,
    groups,
    shift,
    delta,
    rules,
    numbers,
    hook_args,
    SCORE_HOOK: tl.constexpr,
    OPTIONS: tl.constexpr,
    MASKED: tl.constexpr,
    unlisted,
):
    """Compute one tile's softmax weights again, and the gradient of its scores before the scale.

    Args:
        products: products of queries and keys, ``[BLOCK_M, BLOCK_N]``.
        grad_weights: gradients of the weights, laid out alike.
        q_pos: the queries' positions, spread over ``products``, as are ``shift`` and ``delta``.
        groups: the positions of the groups' first keys, spread over ``products``.
        shift: see :func:`gradient_rows`.
        delta: see :func:`gradient_rows`.
        rules: see :func:`~modelopt_lite.kernels.tiles.select_scores`, as for all that follow.
        numbers: ``(scale, softcap)``.
        hook_args: constants, then numbers, for the hook.
        SCORE_HOOK: which scores to keep, or None.
        OPTIONS: :class:`modelopt_lite.kernels.settings.Options`.
        MASKED: whether visibility and exemptions are checked for each key.
        unlisted: whether the tile is not listed.

    Returns:
        Weights and gradients.
    """
    GROUP: tl.constexpr = OPTIONS.group
    scores, to_log2 = scale_scores(products, numbers, OPTIONS)
    parts, keep, _ = select_scores(scores, q_pos, groups, rules, hook_args, SCORE_HOOK, OPTIONS, MASKED, unlisted)
    weights = ()
    for r in tl.static_range(GROUP):
        weight = tl.math.exp2(parts[r] * to_log2 - shift)
        if len(keep) > 0:
            weight = weigh(weight, keep[r])
        weights = weights + (weight,)
    weights = join_groups(weights, OPTIONS)
    if GROUP > 1 and not OPTIONS.hopper:
        weights = as_if_of(products, weights)
    grad_scores = weights * (grad_weights - delta)
    if OPTIONS.softcap:
        tanh_of_scores = scores / numbers[1]
        grad_scores *= 1.0 - tanh_of_scores * tanh_of_scores
    return weights, grad_scores


@triton.jit
def add_key_tile(
    query,
    grad,
    shift,
    delta,
    first,
    accumulator,
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
    unlisted=0,
):
    """Add to the gradient of a tile of queries what the key tile that begins at position ``first`` gives."""
    GROUP: tl.constexpr = OPTIONS.group
    length = rules[1]
    lower = rules[5] if OPTIONS.positions else 0
    # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
    key_tile = load_tile(key, first, length, OPTIONS.head_dim, BLOCK_N, OPTIONS.block_d, GROUP, BOUNDED, lower)
    value_tile = load_tile(value, first, length, OPTIONS.value_dim, BLOCK_N, OPTIONS.block_dv, GROUP, BOUNDED, lower)
    # [BLOCK_M, BLOCK_N]
    products = tl.dot(query, key_tile.T, input_precision="ieee")
    grad_weights = tl.dot(grad, value_tile.T, input_precision="ieee")
    groups = first + GROUP * tl.arange(0, BLOCK_N // GROUP)[None, :]
    _, grad_scores = differentiate_softmax(
        products, grad_weights, rules[0][:, None], groups, shift[:, None], delta[:, None], rules, numbers, hook_args,
        SCORE_HOOK, OPTIONS, MASKED, unlisted,
    )  # fmt: skip
    return tl.dot(grad_scores.to(key_tile.dtype), key_tile, accumulator, input_precision="ieee")


@triton.jit(
    do_not_specialize=[
        "batch", "total", "tiles_per_head", "heads_per_wave", "num_sinks", "window", "sliding_window", "lists",
        "hook_args",
    ]
)  # fmt: skip
def gradient_of_queries(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_ptr,
    shift_ptr,
    delta_ptr,
    grad_query_ptr,
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
    """Compute the gradient of packed queries; rows of no sequence are left as they are.

    Args:
        query_ptr: ``[tokens, heads, head_dim]``.
        key_ptr: ``[key tokens, kv heads, head_dim]``.
        value_ptr: ``[key tokens, kv heads, value_dim]``.
        grad_ptr: gradient of the output, ``[tokens, heads, value_dim]``.
        shift_ptr: ``[heads, tokens]``, from :func:`gradient_rows`, as ``delta_ptr``.
        delta_ptr: ``[heads, tokens]``.
        grad_query_ptr: receives the gradient, ``[tokens, heads, head_dim]``.
        key_descriptor: tensor descriptor ``[group phase, groups, kv heads, head_dim]`` of the keys, or None.
        value_descriptor: the same of the values.
        strides: ``(token stride, head stride)`` of query, key, value, gradient of the output and of the query.
        sequences: pointers ``(starts, lengths)`` of the queries, then of the keys, then those of the positions of the
            first query and the first key, None unless ``OPTIONS.positions``; ``[batch]`` each.
        heads_of: ``(query heads, query heads per kv head)``.
        numbers: ``(scale, softcap)``.
        batch: number of sequences.
        total: query tokens.
        tiles_per_head: query tiles of the longest sequence.
        heads_per_wave: query heads, counted over all sequences, that are computed at one time.
        num_sinks: leading keys that are always kept.
        window: most recent keys that are always kept.
        sliding_window: most recent keys that are visible, if ``OPTIONS.sliding``.
        lists: as in the forward.
        hook_args: constants, then numbers, for the hook.
        SCORE_HOOK: which scores to keep, or None.
        OPTIONS: :class:`modelopt_lite.kernels.settings.Options`.
    """
    BLOCK_M: tl.constexpr = OPTIONS.block_m
    BLOCK_N: tl.constexpr = OPTIONS.block_n
    BLOCK_D: tl.constexpr = OPTIONS.block_d
    BOUNDED: tl.constexpr = OPTIONS.block_n if OPTIONS.block_n < BOUNDED_N else BOUNDED_N
    SIZE: tl.constexpr = OPTIONS.block_size
    # Where registers are full, what does not change is worth computing again.
    AGAIN: tl.constexpr = BLOCK_D > 128 or not OPTIONS.hopper
    starts_q, lengths_q, starts_k, lengths_k, firsts_q, firsts_k = sequences
    query_strides, key_strides, value_strides, grad_strides, grad_query_strides = strides
    heads, heads_per_kv = heads_of

    # Programs: waves of heads whose keys and values fit into the L2 cache; in a wave, the longest tiles first.
    program = tl.program_id(0)
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
    kv_head = head // heads_per_kv
    head = head.to(tl.int64)

    # [BLOCK_M]; rows before the first one repeat it, rows past the end the last one, and none of these is stored.
    offsets_m = row_start + tl.arange(0, BLOCK_M)
    query_rows = tl.minimum(offsets_m, query_length - 1)
    if lists is not None:
        query_rows = tl.maximum(query_rows, 0)
    rows = start_q + query_rows
    shift = tl.load(shift_ptr + head * total + rows)
    delta = tl.load(delta_ptr + head * total + rows)
    first_query, first_key, length, start_k, num_sinks, window = place(
        firsts_q, firsts_k, sequence, query_length, length, start_k, num_sinks, window, OPTIONS
    )
    first_position = first_query + row_start
    last_position = first_query + tl.minimum(row_start + BLOCK_M, query_length) - 1
    rules = (first_query + query_rows, length, num_sinks, window, sliding_window)

    # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV]
    query = load_rows(query_ptr + head * query_strides[1], query_strides[0], rows, OPTIONS.head_dim, BLOCK_D)
    grad = load_rows(grad_ptr + head * grad_strides[1], grad_strides[0], rows, OPTIONS.value_dim, OPTIONS.block_dv)
    key = (key_ptr + kv_head.to(tl.int64) * key_strides[1], key_strides[0], key_descriptor, start_k, kv_head)
    value = (value_ptr + kv_head.to(tl.int64) * value_strides[1], value_strides[0], value_descriptor, start_k, kv_head)

    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if OPTIONS.positions:
        rules = rules + (first_key,)
        spans = bounded_span(first_position, last_position, rules, OPTIONS)
    else:
        spans = key_spans(first_position, last_position, rules, SCORE_HOOK is not None or lists is not None, OPTIONS)
    keys_begin, hot_begin, band_begin, band_end, full_end, bounded_begin, keys_end = spans
    if lists is not None:
        blocks = list_of_queries(lists, head, sequence, first_query, first_key, last_position, OPTIONS)
    for offset in tl.range(0, hot_begin - keys_begin + band_end - band_begin, BLOCK_N, disable_licm=AGAIN):
        first = keys_begin + offset
        first += tl.where(first >= hot_begin, band_begin - hot_begin, 0)
        unlisted, visited = 0, True
        if lists is not None:
            unlisted, visited = look_up(blocks, first, first, first_position, rules, SIZE, BLOCK_M, BLOCK_N)
        if visited:
            accumulator = add_key_tile(
                query, grad, shift, delta, first, accumulator, key, value, rules, numbers, hook_args,
                SCORE_HOOK, OPTIONS, BLOCK_N, MASKED=True, BOUNDED=False, unlisted=unlisted,
            )  # fmt: skip
    for first in tl.range(bounded_begin, keys_end, BOUNDED, num_stages=1, disable_licm=AGAIN):
        unlisted, visited = 0, True
        if lists is not None:
            unlisted, visited = look_up(blocks, first, first, first_position, rules, SIZE, BLOCK_M, BOUNDED)
        if visited:
            accumulator = add_key_tile(
                query, grad, shift, delta, first, accumulator, key, value, rules, numbers, hook_args,
                SCORE_HOOK, OPTIONS, BOUNDED, MASKED=True, BOUNDED=True, unlisted=unlisted,
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
        accumulator = add_key_tile(
            query, grad, shift, delta, first, accumulator, key, value, rules, numbers, hook_args,
            SCORE_HOOK, OPTIONS, BLOCK_N, MASKED=False, BOUNDED=False,
        )  # fmt: skip

    store_rows(
        grad_query_ptr + head * grad_query_strides[1], grad_query_strides[0], start_q + offsets_m,
        rows_exist(offsets_m, query_length, OPTIONS), accumulator * numbers[0], OPTIONS.head_dim,
    )  # fmt: skip


@triton.jit
def add_query_tile(
    key_tile,
    value_tile,
    first,
    row,
    grad_key,
    grad_value,
    query,
    grad,
    numbers_of_rows,
    query_length,
    first_query,
    rules,
    numbers,
    hook_args,
    SCORE_HOOK: tl.constexpr,
    OPTIONS: tl.constexpr,
    MASKED: tl.constexpr,
    BOUNDED: tl.constexpr,
    unlisted=0,
):
    """Add to the gradients of the key tile at position ``first`` what the queries from row ``row`` on give.

    ``BOUNDED``: the queries may reach past the sequence's end, or begin before it.
    """
    BLOCK_M: tl.constexpr = OPTIONS.block_m
    BLOCK_N: tl.constexpr = OPTIONS.block_n
    GROUP: tl.constexpr = OPTIONS.group
    # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV], [BLOCK_M], [BLOCK_M]
    query_tile = load_query_tile(query, row, query_length, OPTIONS.head_dim, BLOCK_M, OPTIONS.block_d, BOUNDED)
    grad_tile = load_query_tile(grad, row, query_length, OPTIONS.value_dim, BLOCK_M, OPTIONS.block_dv, BOUNDED)
    offsets_m = row + tl.arange(0, BLOCK_M)
    shift_ptr, delta_ptr = numbers_of_rows
    if BOUNDED:
        exist = rows_exist(offsets_m, query_length, OPTIONS)
        shift = tl.load(shift_ptr + offsets_m, mask=exist, other=float("inf"))
        delta = tl.load(delta_ptr + offsets_m, mask=exist, other=0.0)
    else:
        shift = tl.load(shift_ptr + offsets_m)
        delta = tl.load(delta_ptr + offsets_m)
    # [BLOCK_M, BLOCK_N]
    products = tl.dot(query_tile, key_tile.T, input_precision="ieee")
    grad_weights = tl.dot(grad_tile, value_tile.T, input_precision="ieee")
    groups = first + GROUP * tl.arange(0, BLOCK_N // GROUP)[None, :]
    q_pos = (first_query + offsets_m)[:, None]
    weights, grad_scores = differentiate_softmax(
        products, grad_weights, q_pos, groups, shift[:, None], delta[:, None], rules, numbers, hook_args,
        SCORE_HOOK, OPTIONS, MASKED, unlisted,
    )  # fmt: skip
    weights = weights.to(grad_tile.dtype).T
    grad_scores = grad_scores.to(query_tile.dtype).T
    grad_value = tl.dot(weights, grad_tile, grad_value, input_precision="ieee")
    grad_key = tl.dot(grad_scores, query_tile, grad_key, input_precision="ieee")
    return grad_key, grad_value


@triton.jit
def load_query_tile(
    source,
    first,
    limit,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """Load rows as :func:`~modelopt_lite.kernels.tiles.load_tile` does, in their own order.

    The descriptor is ``[heads, tokens, dim]``: only without dimensions of one between the others does the compiler
    leave the tile in shared memory for both products.
    """
    pointer, stride, descriptor, start, head = source
    if descriptor is not None and not BOUNDED:
        tile = descriptor.load([head, (start + first).to(tl.int32), 0]).reshape(BLOCK_M, BLOCK_D)
    else:
        tile = load_tile((pointer, stride, None, start, head), first, limit, WIDTH, BLOCK_M, BLOCK_D, 1, BOUNDED, 0)
    return tile


@triton.jit
def query_spans(first, query_length, first_query, rules, SPARSE: tl.constexpr, OPTIONS: tl.constexpr):
    """Sort the rows of the queries that see a key tile into phases; bounds are multiples of ``BLOCK_M``, or the end.

    Returns:
        ``(rows_begin, hot_begin, band_begin, band_end, full_end, rows_end)``: hot tiles lie in
        ``[hot_begin, band_begin)`` and ``[band_end, full_end)``, masked ones in ``[rows_begin, hot_begin)`` and
        ``[band_begin, band_end)``, the one that reaches past the sequence in ``[full_end, rows_end)``.
    """
    BLOCK_M: tl.constexpr = OPTIONS.block_m
    BLOCK_N: tl.constexpr = OPTIONS.block_n
    _, length, num_sinks, window, sliding_window = rules
    # Row of the query at the position of the tile's first key, and behind that of its last key.
    own_begin = first - first_query
    own_end = own_begin + BLOCK_N
    rows_end = query_length
    full_end = query_length // BLOCK_M * BLOCK_M
    rows_begin = query_length * 0
    if OPTIONS.causal:
        rows_begin = tl.maximum(own_begin, 0) // BLOCK_M * BLOCK_M
    elif OPTIONS.sliding:
        rows_begin = tl.maximum(own_begin - sliding_window + 1, 0) // BLOCK_M * BLOCK_M
    hot_begin = rows_begin
    band_begin = full_end
    band_end = full_end
    if OPTIONS.sliding:
        rows_end = tl.minimum(rows_end, tl.maximum(own_end - 1 + sliding_window, 0))
        full_end = tl.minimum(full_end, tl.cdiv(rows_end, BLOCK_M) * BLOCK_M)
        band_begin = tl.maximum(own_begin + sliding_window, 0) // BLOCK_M * BLOCK_M
        band_end = full_end
    if SPARSE or OPTIONS.causal:
        exempt_end = own_end
        if SPARSE:
            exempt_end += window
        exempt_end = tl.cdiv(tl.maximum(exempt_end - 1, 0), BLOCK_M) * BLOCK_M
        if OPTIONS.causal:
            hot_begin = exempt_end
        else:
            band_begin = tl.maximum(own_begin, 0) // BLOCK_M * BLOCK_M
            band_end = exempt_end
    masked_wholly = (first + BLOCK_N > length) | OPTIONS.positions
    if SPARSE:
        masked_wholly |= first < num_sinks
    hot_begin = tl.where(masked_wholly, full_end, hot_begin)
    hot_begin = tl.minimum(tl.maximum(hot_begin, rows_begin), full_end)
    band_begin = tl.minimum(tl.maximum(band_begin, hot_begin), full_end)
    band_end = tl.minimum(tl.maximum(band_end, band_begin), full_end)
    return rows_begin, hot_begin, band_begin, band_end, full_end, rows_end


@triton.jit(
    do_not_specialize=[
        "batch", "total", "tiles_per_head", "heads_per_wave", "num_sinks", "window", "sliding_window", "lists",
        "hook_args",
    ]
)  # fmt: skip
def gradient_of_keys(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_ptr,
    shift_ptr,
    delta_ptr,
    grad_key_ptr,
    grad_value_ptr,
    query_descriptor,
    grad_descriptor,
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
    """Compute the gradients of packed keys and values; rows of no sequence are left as they are.

    Args:
        query_ptr: ``[tokens, heads, head_dim]``.
        key_ptr: ``[key tokens, kv heads, head_dim]``.
        value_ptr: ``[key tokens, kv heads, value_dim]``.
        grad_ptr: gradient of the output, ``[tokens, heads, value_dim]``.
        shift_ptr: ``[heads, tokens]``, from :func:`gradient_rows`, as ``delta_ptr``.
        delta_ptr: ``[heads, tokens]``.
        grad_key_ptr: receives the gradient, ``[key tokens, kv heads, head_dim]``.
        grad_value_ptr: receives the gradient, ``[key tokens, kv heads, value_dim]``.
        query_descriptor: tensor descriptor ``[heads, tokens, head_dim]`` of the queries, or None.
        grad_descriptor: the same of the gradient of the output.
        strides: ``(token stride, head stride)`` of query, key, value, gradient of the output, of key and of value.
        sequences: as in :func:`gradient_of_queries`.
        heads_of: ``(kv heads, query heads per kv head)``.
        numbers: ``(scale, softcap)``.
        batch: number of sequences.
        total: query tokens.
        tiles_per_head: key tiles of the longest sequence.
        heads_per_wave: kv heads, counted over all sequences, that are computed at one time.
        num_sinks: leading keys that are always kept.
        window: most recent keys that are always kept.
        sliding_window: most recent keys that are visible, if ``OPTIONS.sliding``.
        lists: which query blocks look at each key block, or None: pointers ``begins`` and ``indices`` of
            :class:`~modelopt_lite.kernels.blocks.QueryBlocks`, ``starts``, query heads a list, query blocks and key
            blocks of a head, and sequences.
        hook_args: constants, then numbers, for the hook.
        SCORE_HOOK: which scores to keep, or None.
        OPTIONS: :class:`modelopt_lite.kernels.settings.Options`.
    """
    BLOCK_M: tl.constexpr = OPTIONS.block_m
    BLOCK_N: tl.constexpr = OPTIONS.block_n
    BLOCK_D: tl.constexpr = OPTIONS.block_d
    BLOCK_DV: tl.constexpr = OPTIONS.block_dv
    GROUP: tl.constexpr = OPTIONS.group
    ROWS: tl.constexpr = OPTIONS.block_rows
    starts_q, lengths_q, starts_k, lengths_k, firsts_q, firsts_k = sequences
    query_strides, key_strides, value_strides, grad_strides, grad_key_strides, grad_value_strides = strides
    kv_heads, heads_per_kv = heads_of

    # Programs: waves of heads whose queries fit into the L2 cache; in a wave, the keys that most queries see first.
    program = tl.program_id(0)
    wave = program // (tiles_per_head * heads_per_wave)
    program -= wave * tiles_per_head * heads_per_wave
    heads_in_wave = tl.minimum(heads_per_wave, batch * kv_heads - wave * heads_per_wave)
    first = program // heads_in_wave * BLOCK_N
    sequence = (wave * heads_per_wave + program % heads_in_wave) // kv_heads
    kv_head = (wave * heads_per_wave + program % heads_in_wave) % kv_heads
    length = tl.load(lengths_k + sequence).to(tl.int32)
    query_length = tl.load(lengths_q + sequence).to(tl.int32)
    start_q = tl.load(starts_q + sequence).to(tl.int64)
    start_k = tl.load(starts_k + sequence).to(tl.int64)
    first_query, first_key, length, start_k, num_sinks, window = place(
        firsts_q, firsts_k, sequence, query_length, length, start_k, num_sinks, window, OPTIONS
    )
    if OPTIONS.positions:
        STEP: tl.constexpr = GROUP if lists is None else BLOCK_N
        first += first_key // STEP * STEP
    if first >= length:
        return
    rules = (None, length, num_sinks, window, sliding_window)

    # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV], deinterleaved; zero before the first key and past the end
    key = (key_ptr + kv_head.to(tl.int64) * key_strides[1], key_strides[0], None, start_k, kv_head)
    value = (value_ptr + kv_head.to(tl.int64) * value_strides[1], value_strides[0], None, start_k, kv_head)
    key_tile = load_tile(key, first, length, OPTIONS.head_dim, BLOCK_N, BLOCK_D, GROUP, True, first_key)
    value_tile = load_tile(value, first, length, OPTIONS.value_dim, BLOCK_N, BLOCK_DV, GROUP, True, first_key)

    # Rows are counted from where tiles begin: from the first query, or with lists from so many rows before it.
    before = query_length * 0
    if lists is not None:
        before = floor_mod(first_query, BLOCK_M)
    rows_begin, hot_begin, band_begin, band_end, full_end, rows_end = query_spans(
        first, query_length + before, first_query - before, rules, SCORE_HOOK is not None or lists is not None, OPTIONS
    )
    # The first tile is bounded too if some of its rows do not exist.
    lead = query_length * 0
    if lists is not None:
        lead = tl.where((before > 0) & (rows_begin == 0) & (full_end > 0), BLOCK_M, 0)
        rows_begin += lead
        hot_begin = tl.maximum(hot_begin, rows_begin)
        band_begin = tl.maximum(band_begin, rows_begin)
        band_end = tl.maximum(band_end, rows_begin)
    if OPTIONS.positions:
        rules = rules + (first_key,)
    grad_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    # What does not change is worth computing again: registers are full.
    for member in range(heads_per_kv):
        head = kv_head * heads_per_kv + member
        far_head = head.to(tl.int64)
        query = (query_ptr + far_head * query_strides[1], query_strides[0], query_descriptor, start_q, head)
        grad = (grad_ptr + far_head * grad_strides[1], grad_strides[0], grad_descriptor, start_q, head)
        numbers_of_rows = (shift_ptr + (far_head * total + start_q), delta_ptr + (far_head * total + start_q))
        hot_bounds = (hot_begin, band_begin, band_end, full_end)
        if lists is not None:
            blocks = list_of_keys(lists, head, sequence, first_query, first_key, first, OPTIONS)
            origin = first_query - before
            hot_bounds = places_of(
                blocks, (hot_begin + origin, band_begin + origin, band_end + origin, full_end + origin), ROWS
            )
        for offset in tl.range(0, hot_begin - rows_begin + band_end - band_begin, BLOCK_M, disable_licm=True):
            row = rows_begin + offset
            row += tl.where(row >= hot_begin, band_begin - hot_begin, 0)
            row -= before
            unlisted, visited = 0, True
            if lists is not None:
                position = first_query + row
                unlisted, visited = look_up(blocks, position, first, position, rules, ROWS, BLOCK_M, BLOCK_N)
            if visited:
                grad_key, grad_value = add_query_tile(
                    key_tile, value_tile, first, row, grad_key, grad_value, query, grad, numbers_of_rows, query_length,
                    first_query, rules, numbers, hook_args, SCORE_HOOK, OPTIONS, MASKED=True, BOUNDED=False,
                    unlisted=unlisted,
                )  # fmt: skip
        for begin in tl.range(full_end - lead, rows_end, BLOCK_M, num_stages=1, disable_licm=True):
            row = begin
            if lists is not None:
                row = tl.where(begin < full_end, 0, begin) - before
            unlisted, visited = 0, True
            if lists is not None:
                position = first_query + row
                unlisted, visited = look_up(blocks, position, first, position, rules, ROWS, BLOCK_M, BLOCK_N)
            if visited:
                grad_key, grad_value = add_query_tile(
                    key_tile, value_tile, first, row, grad_key, grad_value, query, grad, numbers_of_rows, query_length,
                    first_query, rules, numbers, hook_args, SCORE_HOOK, OPTIONS, MASKED=True, BOUNDED=True,
                    unlisted=unlisted,
                )  # fmt: skip
        hot_first, gap_begin, gap_end, hot_last = hot_bounds
        # A rule that keeps nothing leaves hot tiles empty.
        hot_end = hot_first if OPTIONS.keeps_nothing else hot_last - (gap_end - gap_begin)
        for begin in tl.range(hot_first, hot_end, BLOCK_M, disable_licm=True):
            row = begin
            if not OPTIONS.causal:
                row += tl.where(row >= gap_begin, gap_end - gap_begin, 0)
            if lists is not None:
                row = position_at(blocks, row, ROWS) - first_query
            grad_key, grad_value = add_query_tile(
                key_tile, value_tile, first, row, grad_key, grad_value, query, grad, numbers_of_rows, query_length,
                first_query, rules, numbers, hook_args, SCORE_HOOK, OPTIONS, MASKED=False, BOUNDED=False,
            )  # fmt: skip

    # [BLOCK_N]; the keys of the tile's rows
    places = tl.arange(0, BLOCK_N)
    keys = first + GROUP * (places % (BLOCK_N // GROUP)) + places // (BLOCK_N // GROUP)
    exist = keys < length
    if OPTIONS.positions:
        exist = exist & (keys >= first_key)
    head = kv_head.to(tl.int64)
    store_rows(
        grad_key_ptr + head * grad_key_strides[1], grad_key_strides[0], start_k + keys, exist,
        grad_key * numbers[0], OPTIONS.head_dim,
    )  # fmt: skip
    store_rows(
        grad_value_ptr + head * grad_value_strides[1], grad_value_strides[0], start_k + keys, exist,
        grad_value, OPTIONS.value_dim,
    )  # fmt: skip


@triton.jit
def load_rows(pointer, stride, rows, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows of one head, ``[rows, BLOCK_D]``; columns from ``WIDTH`` on are zero."""
    offsets_d = tl.arange(0, BLOCK_D)
    pointers = pointer + (rows[:, None] * stride + offsets_d[None, :])
    if WIDTH == BLOCK_D:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(offsets_d < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def store_rows(pointer, stride, rows, exist, tile, WIDTH: tl.constexpr):
    """Store those rows of one head that exist, ``WIDTH`` columns each."""
    offsets_d = tl.arange(0, tile.shape[1])
    pointers = pointer + (rows[:, None] * stride + offsets_d[None, :])
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=exist[:, None] & (offsets_d < WIDTH)[None, :])
