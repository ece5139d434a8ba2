"""Building blocks of the Triton kernels: key tiles, groups of scores, and which of them take part in the softmax.

Keys are *deinterleaved*: with groups of ``GROUP`` keys, row ``r * (BLOCK_N // GROUP) + i`` of a key tile is key
``GROUP * i + r``. Softmax does not mind the order, and all scores of a group come to lie in one thread. In the Hopper
kernel, where ``OPTIONS.pair`` is 2, pairs of keys stay together, so that their scores lie in neighbouring registers:
see :func:`key_of_row`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .language import INTERPRETED, less_share

LOG2E = tl.constexpr(1.4426950408889634)
MAX_HALVINGS = tl.constexpr(4)
BOUNDED_N = tl.constexpr(32)
"""Keys of a tile that may reach past the sequence, at most; few, as its pointers and masks take registers."""


@triton.jit
def load_tile(
    source,
    first,
    limit,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    BOUNDED: tl.constexpr,
    lower,
):
    """Load rows ``[first, first + BLOCK_N)`` of one head of one sequence, deinterleaved: ``[BLOCK_N, BLOCK_D]``.

    Args:
        source: ``(pointer to the head's row 0, token stride, descriptor or None, sequence's first row, head)``.
        first: first row, a multiple of ``BLOCK_N``.
        limit: rows of the sequence; what a ``BOUNDED`` tile has beyond them is zero.
        WIDTH: columns that exist; the others are zero.
        BLOCK_N: rows of the tile.
        BLOCK_D: columns of the tile.
        GROUP: keys a group.
        BOUNDED: whether the tile may reach past the sequence. Such a tile is not read through the descriptor, which
            would find the next sequence there.
        lower: first row that exists; what a ``BOUNDED`` tile has before it is zero.
    """
    pointer, stride, descriptor, start, head = source
    row = start + first
    if descriptor is not None and not BOUNDED:
        row = row.to(tl.int32)
        tile = descriptor.load([row % GROUP, row // GROUP, head, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        places = tl.arange(0, BLOCK_N)
        offsets_n = GROUP * (places % (BLOCK_N // GROUP)) + places // (BLOCK_N // GROUP)
        offsets_d = tl.arange(0, BLOCK_D)
        # [BLOCK_N, BLOCK_D]
        pointers = pointer + (row + offsets_n)[:, None] * stride + offsets_d[None, :]
        if BOUNDED:
            exist = (first + offsets_n >= lower) & (first + offsets_n < limit)
            mask = exist[:, None] & (offsets_d < WIDTH)[None, :]
            tile = tl.load(pointers, mask=mask, other=0.0)
        elif WIDTH != BLOCK_D:
            tile = tl.load(pointers, mask=(offsets_d < WIDTH)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def key_of_row(row, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, PAIR: tl.constexpr):
    """Return which key of a tile lies in a row of it, or in rows; ``PAIR`` keys of a group lie beside each other."""
    pair = row // PAIR
    return GROUP * (pair % (BLOCK_N // GROUP)) + PAIR * (pair // (BLOCK_N // GROUP)) + row % PAIR


@triton.jit
def split_groups(tile, OPTIONS: tl.constexpr):
    """Split scores ``[BLOCK_M, BLOCK_N]`` into as many tiles as a group has keys, one a place in the group."""
    parts = (tile,)
    for _ in tl.static_range(MAX_HALVINGS):
        if len(parts) < OPTIONS.group:
            halves = ()
            for index in tl.static_range(len(parts)):
                if len(parts) * OPTIONS.pair == OPTIONS.group:
                    halves = halves + separate(parts[index])
                else:
                    halves = halves + halve(parts[index])
            parts = halves
    return parts


@triton.jit
def join_groups(parts, OPTIONS: tl.constexpr):
    """Undo :func:`split_groups`."""
    for _ in tl.static_range(MAX_HALVINGS):
        if len(parts) > 1:
            pairs = ()
            for index in tl.static_range(len(parts) // 2):
                if len(parts) // 2 * OPTIONS.pair == OPTIONS.group:
                    pairs = pairs + (interleave(parts[2 * index], parts[2 * index + 1]),)
                else:
                    pairs = pairs + (unite(parts[2 * index], parts[2 * index + 1]),)
            parts = pairs
    return parts[0]


@triton.jit
def as_if_of(product, tile):
    """Return a tile that was joined from parts of a matrix product as if it came from the product straight away.

    Before Hopper, the compiler lays both out alike only where one leads to the other without transpositions, as which
    splits and joins count, and takes what has been joined for narrower numbers than it holds. It does not look into
    assembly, and this is an instruction that costs nothing.
    """
    if not INTERPRETED:
        tile = tl.inline_asm_elementwise(
            "mov.f32 $0, $1;", "=f,f,f", [tile, product], dtype=tl.float32, is_pure=False, pack=1
        )
    return tile


@triton.jit
def halve(tile):
    """Split a tile into its left and right half."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def unite(left, right):
    """Put two tiles side by side."""
    return tl.join(left, right).permute(0, 2, 1).reshape(left.shape[0], left.shape[1] * 2)


@triton.jit
def separate(tile):
    """Split a tile into its columns of even and of odd number."""
    return tile.reshape(tile.shape[0], tile.shape[1] // 2, 2).split()


@triton.jit
def interleave(even, odd):
    """Undo :func:`separate`."""
    return tl.join(even, odd).reshape(even.shape[0], even.shape[1] * 2)


@triton.jit
def maximum_of(parts):
    """The elementwise maximum of a tuple of tiles, in pairs, as hooks that sort compute it too."""
    for _ in tl.static_range(MAX_HALVINGS):
        if len(parts) > 1:
            pairs = ()
            for index in tl.static_range(len(parts) // 2):
                pairs = pairs + (tl.maximum(parts[2 * index], parts[2 * index + 1]),)
            parts = pairs
    return parts[0]


@triton.jit
def is_kept(flag):
    """Turn what a hook says of one place into booleans."""
    if flag.dtype == tl.int1:
        kept = flag
    elif flag.dtype == tl.int32:  # dropped()
        kept = flag == 0
    else:
        kept = flag != 0
    return kept


@triton.jit
def keep_listed(flag, unlisted):
    """Keep what a hook keeps of one place, unless its key block is not listed."""
    if flag.dtype == tl.int1:
        kept = flag & (unlisted == 0)
    elif flag.dtype == tl.int32:  # dropped()
        kept = flag | unlisted
    else:
        kept = flag * tl.where(unlisted == 0, 1.0, 0.0)
    return kept


@triton.jit
def weigh(weight, flag):
    """Set weights to 0 where a hook does not keep them."""
    if flag.dtype == tl.int1:
        kept = tl.where(flag, weight, 0.0)
    elif flag.dtype == tl.int32:  # dropped()
        kept = less_share(weight, flag.to(tl.float32, bitcast=True))
    else:
        kept = weight * flag
    return kept


HIDE_BEYOND = tl.constexpr(
    "{ .reg .pred p; .reg .b32 d; sub.s32 d, $2, $3; setp.gt.s32 p, d, $4; selp.f32 $0, 0fFF800000, $1, p; }"
)
# In this order: causal or not, without sinks or with, flags of what is kept or of what is dropped. Operands are the
# score, the flag, groups, -member, before_window, q_pos and last_sink.
HIDE_DROPPED = tl.constexpr(
    tuple(
        "{ .reg .pred p; .reg .b32 d; sub.s32 d, $3, $5; setp.gt.s32 p, d, $4; " + not_later + is_sink
        + "setp." + kept + ".or.s32 p, $2, 0, p; selp.f32 $0, $1, 0fFF800000, p; }"
        for not_later in ("", "sub.s32 d, $3, $6; setp.le.and.s32 p, d, $4, p; ")
        for is_sink in ("", "sub.s32 d, $3, $7; setp.le.or.s32 p, d, $4, p; ")
        for kept in ("ne", "eq")
    )
)  # fmt: skip


@triton.jit
def hide_beyond(score, x, y, bound):
    """Hide an FP32 score, that is, set it to -inf, where ``x - y`` is above ``bound``, all integers.

    Written as plain comparisons and selections, all comparisons of a tile come first and are kept as bits until used.
    """
    if INTERPRETED:
        score = tl.where(x - y > bound, float("-inf"), score)
    else:
        score = tl.inline_asm_elementwise(
            HIDE_BEYOND, "=f,f,r,r,r", [score, x, y, bound], dtype=tl.float32, is_pure=True, pack=1
        )
    return score


@triton.jit
def hide_dropped(score, flag, groups, member, before_window, q_pos, last_sink, OPTIONS: tl.constexpr):
    """Hide a score unless a hook keeps it or it is a sink's or a recent key's; the rest is as in :func:`hide_beyond`.

    Args:
        score: one place's tile.
        flag: what the hook says of it.
        groups: the positions of the groups' first keys.
        member: the place's number in the group.
        before_window: the position of the last key before the query's dense window.
        q_pos: the query's position.
        last_sink: the position of the last sink.
        OPTIONS: see :func:`select_scores`.
    """
    if not INTERPRETED and (flag.dtype == tl.float32 or flag.dtype == tl.int32):
        PROGRAM: tl.constexpr = 4 * (not OPTIONS.causal) + 2 * OPTIONS.sinks + (flag.dtype == tl.int32)
        score = tl.inline_asm_elementwise(
            HIDE_DROPPED[PROGRAM], "=f,f,r,r,r,r,r,r", [score, flag, groups, -member, before_window, q_pos, last_sink],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        kept = groups - before_window > -member
        if not OPTIONS.causal:
            kept = kept & (groups - q_pos <= -member)
        if OPTIONS.sinks:
            kept = kept | (groups - last_sink <= -member)
        score = tl.where(is_kept(flag) | kept, score, float("-inf"))
    return score


@triton.jit
def tanh(x):
    """The hyperbolic tangent, to a few units in the last place of FP32."""
    square = x * x
    near_zero = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0))))
    decay = tl.math.exp2(-2.8853900817779268 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.2, near_zero, tl.where(x < 0.0, -far, far))


@triton.jit
def scale_scores(products, numbers, OPTIONS: tl.constexpr):
    """Turn products of queries and keys into scores.

    Returns:
        The scores, which hooks see, and the factor that takes them to log2 space.
    """
    scale, softcap = numbers
    if OPTIONS.softcap:
        products = softcap * tanh(products * (scale / softcap))
    elif OPTIONS.prescale:
        products = products * scale
    to_log2 = LOG2E if OPTIONS.softcap or OPTIONS.prescale else scale * LOG2E
    return products, to_log2


@triton.jit
def hide_invisible(parts, q_pos, groups, rules, OPTIONS: tl.constexpr):
    """Hide the scores of keys that are not visible; arguments as in :func:`select_scores`, ``parts`` by place."""
    GROUP: tl.constexpr = OPTIONS.group
    _, length, _, _, sliding_window = rules[:5]
    # Compared with a place's number, an immediate operand, so that positions of places take no registers.
    last_visible = q_pos if OPTIONS.causal else length - 1
    masked = ()
    for r in tl.static_range(GROUP):
        part = hide_beyond(parts[r], groups, last_visible, -r)
        if OPTIONS.sliding:
            part = hide_beyond(part, q_pos - sliding_window + 1, groups, r)
        if OPTIONS.positions:
            part = hide_beyond(hide_beyond(part, rules[5], groups, r), groups, length - 1, -r)
            if OPTIONS.sliding and not OPTIONS.causal:
                part = hide_beyond(part, groups, q_pos + sliding_window - 1, -r)
        masked = masked + (part,)
    return masked


@triton.jit
def hide_unkept(
    visible, q_pos, groups, rules, hook_args, SCORE_HOOK: tl.constexpr, OPTIONS: tl.constexpr, MASKED: tl.constexpr,
    unlisted=0,
):  # fmt: skip
    """Decide which visible keys take part in the softmax: :func:`select_scores` after :func:`hide_invisible`."""
    GROUP: tl.constexpr = OPTIONS.group
    _, _, num_sinks, window, _ = rules[:5]
    parts = visible

    GATED: tl.constexpr = MASKED and OPTIONS.unlisted
    keep = ()
    if SCORE_HOOK is not None:
        k_pos = ()
        for r in tl.static_range(GROUP):
            k_pos = k_pos + (groups + r,)
        keep = SCORE_HOOK(parts, q_pos, k_pos, hook_args)
    if GATED and SCORE_HOOK is None and INTERPRETED:
        # The interpreter takes the comparison of one number with another for a number where it spreads it.
        keep = (unlisted + 0 * groups,)
    elif GATED and SCORE_HOOK is None:
        keep = (tl.where(unlisted == 0, 1.0, 0.0),) * GROUP
    elif GATED:
        gated = ()
        for r in tl.static_range(GROUP):
            gated = gated + (keep_listed(keep[r], unlisted),)
        keep = gated
    if len(keep) > 0 and (MASKED or not OPTIONS.keeps_group_max):
        kept = ()
        for r in tl.static_range(GROUP):
            if MASKED:
                part = hide_dropped(parts[r], keep[r], groups, r, q_pos - window, q_pos, num_sinks - 1, OPTIONS)
            else:
                part = tl.where(is_kept(keep[r]), parts[r], float("-inf"))
            kept = kept + (part,)
        parts = kept
        keep = ()
    # Of visible ones, if that promise makes it the same: known before the hook has run.
    largest = maximum_of(visible if OPTIONS.keeps_group_max and not GATED else parts)
    return parts, keep, largest


@triton.jit
def select_scores(
    scores, q_pos, groups, rules, hook_args, SCORE_HOOK: tl.constexpr, OPTIONS: tl.constexpr, MASKED: tl.constexpr,
    unlisted=0,
):  # fmt: skip
    """Decide which keys take part in the softmax.

    Args:
        scores: ``[BLOCK_M, BLOCK_N]``.
        q_pos: the queries' positions, spread over ``scores``.
        groups: the positions of the groups' first keys, spread over ``scores``.
        rules: ``(positions, length, num_sinks, window, sliding_window)``, and with ``OPTIONS.positions`` the first
            key's position.
        hook_args: constants, then numbers, for the hook.
        SCORE_HOOK: which scores to keep, or None.
        OPTIONS: :class:`modelopt_lite.kernels.settings.Options`.
        MASKED: whether visibility and exemptions are checked for each key.
        unlisted: not 0 if only exempt keys take part, because the tile's key block is not listed. It is used if
            ``MASKED`` and ``OPTIONS.unlisted``.

    Returns:
        ``(parts, keep, largest)``: ``GROUP`` tiles of scores, ``-inf`` where a key is not visible and, if ``MASKED`` or
        if the plan does not keep every group's maximum, where it is not kept; else, with a hook, as many tiles that say
        what is kept, otherwise none; and the largest score of each group that is kept.
    """
    parts = split_groups(scores, OPTIONS)
    if MASKED:
        parts = hide_invisible(parts, q_pos, groups, rules, OPTIONS)
    return hide_unkept(parts, q_pos, groups, rules, hook_args, SCORE_HOOK, OPTIONS, MASKED, unlisted)


@triton.jit
def position_of_first(firsts_q, sequence, usual, OPTIONS: tl.constexpr):
    """Return the position of a sequence's first query, ``usual`` unless positions are given."""
    position = usual
    if OPTIONS.positions:
        position = tl.load(firsts_q + sequence).to(tl.int32)
    return position


@triton.jit
def place(firsts_q, firsts_k, sequence, query_length, length, start_k, num_sinks, window, OPTIONS: tl.constexpr):
    """Find a sequence's positions, and what decode keeps of it: all, unless ``OPTIONS.sparse_decode``.

    Returns:
        ``(first_query, first_key, length, start_k, num_sinks, window)``: positions of the first query and the first
        key; the length and the first row of the keys, as if those before the first were there, so that all else counts
        from the sequence's first token; and the keys that are always kept, from the start and up to the query.
    """
    first_query = length - query_length
    first_key = length * 0
    if OPTIONS.positions:
        first_query = tl.load(firsts_q + sequence).to(tl.int32)
        first_key = tl.load(firsts_k + sequence).to(tl.int32)
        length += first_key
        start_k -= first_key
    if not OPTIONS.sparse_decode:
        window = tl.where(query_length == 1, length, window)
        if OPTIONS.positions:  # the query may be anywhere
            num_sinks = tl.where(query_length == 1, length, num_sinks)
    return first_query, first_key, length, start_k, num_sinks, window


@triton.jit
def key_spans(first_position, last_position, rules, SPARSE: tl.constexpr, OPTIONS: tl.constexpr):
    """Sort the keys of one program into phases; every bound is a multiple of ``BLOCK_N``, or the end of the keys.

    ``SPARSE``: a rule or a list may drop keys, so that it matters which ones are exempt.

    Returns:
        ``(keys_begin, hot_begin, band_begin, band_end, full_end, bounded_begin, keys_end)``: hot tiles lie in
        ``[hot_begin, band_begin)`` and ``[band_end, full_end)``, masked ones in ``[keys_begin, hot_begin)`` and
        ``[band_begin, band_end)``, the one that reaches past the sequence in ``[bounded_begin, keys_end)``.
    """
    BLOCK_N: tl.constexpr = OPTIONS.block_n
    _, length, num_sinks, window, sliding_window = rules
    keys_end = length
    if OPTIONS.causal:
        keys_end = last_position + 1
    keys_begin = length * 0
    if OPTIONS.sliding:
        keys_begin = tl.maximum(first_position - sliding_window + 1, 0) // BLOCK_N * BLOCK_N
    full_end = tl.minimum(tl.cdiv(keys_end, BLOCK_N), length // BLOCK_N) * BLOCK_N

    hot_begin = keys_begin
    if SPARSE:
        hot_begin = tl.maximum(hot_begin, tl.cdiv(num_sinks, BLOCK_N) * BLOCK_N)
    if OPTIONS.sliding:
        hot_begin = tl.maximum(hot_begin, tl.cdiv(last_position - sliding_window + 1, BLOCK_N) * BLOCK_N)
    if OPTIONS.frozen and not OPTIONS.causal and not SPARSE:
        # Without a band, the first tile gives it something.
        hot_begin = tl.maximum(hot_begin, keys_begin + BLOCK_N)
    hot_begin = tl.minimum(hot_begin, full_end)

    band_begin = full_end
    band_end = full_end
    if SPARSE or OPTIONS.causal:
        # A query's own key belongs to it even without a window, so that a frozen reference has something to go by.
        band_begin = first_position
        if SPARSE:
            band_begin -= tl.maximum(window - 1, 0)
        band_begin = tl.maximum(band_begin, 0) // BLOCK_N * BLOCK_N
        band_begin = tl.minimum(tl.maximum(band_begin, hot_begin), full_end)
        if not OPTIONS.causal:
            band_end = tl.cdiv(last_position + 1, BLOCK_N) * BLOCK_N
            band_end = tl.minimum(tl.maximum(band_end, band_begin), full_end)
    return keys_begin, hot_begin, band_begin, band_end, full_end, full_end, keys_end


@triton.jit
def bounded_span(first_position, last_position, rules, OPTIONS: tl.constexpr):
    """Return spans like :func:`key_spans` with bounded tiles only, which are right wherever queries and keys begin.

    Slow, and rarely needed: after a sliding cache has dropped keys, in padded bidirectional and in cross-attention.
    """
    BLOCK_N: tl.constexpr = OPTIONS.block_n if OPTIONS.block_n < BOUNDED_N else BOUNDED_N
    _, length, _, _, sliding_window, first_key = rules
    keys_begin = first_key
    keys_end = length
    if OPTIONS.causal:
        keys_end = tl.minimum(keys_end, last_position + 1)
    if OPTIONS.sliding:
        keys_begin = tl.maximum(keys_begin, first_position - sliding_window + 1)
        if not OPTIONS.causal:
            keys_end = tl.minimum(keys_end, last_position + sliding_window)
    keys_begin = keys_begin // BLOCK_N * BLOCK_N
    return keys_begin, keys_begin, keys_begin, keys_begin, keys_begin, keys_begin, keys_end
