"""Which N of every M scores are the largest: the fused kernels' half of :mod:`modelopt_lite.kernels.top_n`."""

from __future__ import annotations

from .language import jit, tl


@jit
def keep_top_n_hook(scores, q_pos, k_pos, args):
    """Keep the ``args[0]`` largest of each group's scores, equal ones going to the lower key.

    Args:
        scores: one score tile a place in the group.
        q_pos: not used.
        k_pos: not used.
        args: ``(n,)``, known at compile time, ``1 <= n < len(scores)``.

    Returns:
        One boolean tile a place.
    """
    N: tl.constexpr = args[0]
    M: tl.constexpr = len(scores)
    if N == 1:
        keep = keep_largest(scores)
    elif N == M - 1:
        keep = drop_smallest(scores)
    elif M == 4:
        keep = keep_two_of_four(scores)
    else:
        keep = keep_by_rank(scores, N)
    return keep


@jit
def keep_largest(scores):
    """Keep the first of the largest: above all before it, and not below any after it."""
    M: tl.constexpr = len(scores)
    before = (scores[0],)
    after = (scores[M - 1],)
    for place in tl.static_range(1, M - 1):
        before = before + (tl.maximum(before[place - 1], scores[place]),)
        after = after + (tl.maximum(after[place - 1], scores[M - 1 - place]),)
    keep = (scores[0] >= after[M - 2],)
    for place in tl.static_range(1, M - 1):
        keep = keep + ((scores[place] > before[place - 1]) & (scores[place] >= after[M - 2 - place]),)
    return keep + (scores[M - 1] > before[M - 2],)


@jit
def drop_smallest(scores):
    """Keep all but the last of the smallest: above one before it, or not below one after it."""
    M: tl.constexpr = len(scores)
    before = (scores[0],)
    after = (scores[M - 1],)
    for place in tl.static_range(1, M - 1):
        before = before + (tl.minimum(before[place - 1], scores[place]),)
        after = after + (tl.minimum(after[place - 1], scores[M - 1 - place]),)
    keep = (scores[0] >= after[M - 2],)
    for place in tl.static_range(1, M - 1):
        keep = keep + ((scores[place] > before[place - 1]) | (scores[place] >= after[M - 2 - place]),)
    return keep + (scores[M - 1] > before[M - 2],)


@jit
def keep_two_of_four(scores):
    """Keep two of four: a score must beat one of the other pair, and the order in its own pair says which."""
    a, b, c, d = scores
    high_ab = tl.maximum(a, b)
    low_ab = tl.minimum(a, b)
    high_cd = tl.maximum(c, d)
    low_cd = tl.minimum(c, d)
    a_first = a >= b
    c_first = c >= d
    return (
        a >= tl.where(a_first, low_cd, high_cd),
        b >= tl.where(a_first, high_cd, low_cd),
        c > tl.where(c_first, low_ab, high_ab),
        d > tl.where(c_first, high_ab, low_ab),
    )


@jit
def keep_by_rank(scores, N: tl.constexpr):
    """Keep the scores that fewer than ``N`` others go before, in descending order.

    Ranks are counted in fields of a few bits, as many as an FP32 number holds exactly, so that most comparisons cost
    one multiply-add. Fields are offset such that the highest bit of each says that the score is dropped.
    """
    M: tl.constexpr = len(scores)
    TOP: tl.constexpr = 4 if N == 4 and M == 8 else 8 if M == 8 or N == 8 else 16
    WIDTH: tl.constexpr = 3 if TOP == 4 else 4 if TOP == 8 else 5
    FIELDS: tl.constexpr = 24 // WIDTH
    keep = ()
    for counter in tl.static_range((M + FIELDS - 1) // FIELDS):
        packed = tl.zeros_like(scores[0])
        for place in tl.static_range(counter * FIELDS, min((counter + 1) * FIELDS, M)):
            # all before it, unless found otherwise
            packed += (TOP - N + place) * 2.0 ** (WIDTH * (place - counter * FIELDS))
        for lower in tl.static_range(M):
            for higher in tl.static_range(lower + 1, M):
                if lower // FIELDS == counter and higher // FIELDS == counter:
                    weight = 2.0 ** (WIDTH * (lower % FIELDS)) - 2.0 ** (WIDTH * (higher % FIELDS))
                    packed += (scores[higher] > scores[lower]).to(tl.float32) * weight
                elif lower // FIELDS == counter:
                    packed += (scores[higher] > scores[lower]).to(tl.float32) * 2.0 ** (WIDTH * (lower % FIELDS))
                elif higher // FIELDS == counter:
                    packed -= (scores[higher] > scores[lower]).to(tl.float32) * 2.0 ** (WIDTH * (higher % FIELDS))
        bits = packed.to(tl.int32)
        for place in tl.static_range(counter * FIELDS, min((counter + 1) * FIELDS, M)):
            keep = keep + ((bits & (TOP << (WIDTH * (place - counter * FIELDS)))) == 0,)
    return keep
