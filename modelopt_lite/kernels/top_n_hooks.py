"""Which N of every M scores are the largest: the fused kernels' half of :mod:`modelopt_lite.kernels.top_n`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .language import INTERPRETED, at_least, combine, constexpr, dropped, jit, more_than, tl

# What becomes of three flags; see combine().
ALL = constexpr(0b10000000)
ALL_BUT_LAST = constexpr(0b01000000)
FIRST_ONLY = constexpr(0b00010000)
ANY = constexpr(0b11111110)
MOST = constexpr(0b11101000)
MOST_LAST_INVERTED = constexpr(0b11010100)


def _comparators(size: int) -> list[tuple[int, int]]:
    """Return Batcher's odd-even merge sort: pairs of places, the larger number of which comes first afterwards.

    Args:
        size: how many numbers are sorted, a power of two.
    """
    pairs = []
    for half in (2**k for k in range(size.bit_length() - 1)):  # sorted runs of this length are merged in pairs
        for run in range(0, size, 2 * half):
            pairs += [(run + i, run + i + half) for i in range(half)]
            step = half // 2
            while step > 0:
                pairs += [(run + i, run + i + step) for i in range(step, 2 * half - step) if i // step % 2]
                step //= 2
    return pairs


def _find_nth_largest(n: int, scores: list[str], result: str, kind: str) -> list[str]:
    """Write PTX that finds the n-th largest of a group's scores or weights, numbers of the type ``kind``.

    Callers declare the registers that it works in, ``x0`` and so on, one a score, and ``low``.
    """
    half = len(scores) // 2
    x = list(scores)
    lines = []
    for first in (0, half):
        for i, j in ((first + i, first + j) for i, j in _comparators(half)):
            lines += [f"min.{kind} low, {x[i]}, {x[j]};", f"max.{kind} x{i}, {x[i]}, {x[j]};", f"mov.b32 x{j}, low;"]
            x[i], x[j] = f"x{i}", f"x{j}"
    # It is the least one kept if the largest i of one half and n - i of the other are, for the best i.
    found = ""
    for i in range(max(0, n - half), min(n, half) + 1):
        least = [x[i - 1]] * (i > 0) + [x[half + n - i - 1]] * (i < n)
        if len(least) == 2:
            lines += [f"min.{kind} low, {least[0]}, {least[1]};"]
            least = ["low"]
        lines += [f"max.{kind} {result}, {found}, {least[0]};" if found else f"mov.b32 {result}, {least[0]};"]
        found = result
    return lines


def _keep_n(n: int, m: int, groups: int) -> str:
    """Write PTX that keeps the ``n`` largest scores of each of some groups of ``m``.

    All scores are compared with the n-th largest. Where more than ``n`` are at least as large, some are equal to it,
    and only the first of these stay: a branch, as it is rare.

    Operands are the flags of each place, then the scores of each place, ``groups`` registers each.
    """
    flag = [[f"${place * groups + group}" for place in range(m)] for group in range(groups)]
    score = [[f"${(m + place) * groups + group}" for place in range(m)] for group in range(groups)]
    lines = [".reg .pred done, equal, room;", ".reg .b32 left;", f".reg .f32 nth<{groups}>, x<{m}>, low;"]
    for group in range(groups):
        lines += _find_nth_largest(n, score[group], f"nth{group}", "f32")
        for r in range(m):
            lines += [f"set.geu.f32.f32 {flag[group][r]}, {score[group][r]}, nth{group};"]
    # 1.0 is 0x3F800000; added up as integers, flags are counted. NaN counts, too, so that no group has too few. Each
    # group by itself, as some are not there where a thread has fewer, and nothing may follow from what they seem to be.
    lines += [".reg .b32 number;", "setp.eq.u32 done, 0, 0;"]
    for group in range(groups):
        lines += [f"add.u32 number, {flag[group][0]}, {flag[group][1]};"]
        lines += [f"add.u32 number, number, {flag[group][r]};" for r in range(2, m)]
        lines += [f"setp.eq.and.u32 done, number, {n * 0x3F800000 % 2**32}, done;"]
    lines += ["@done bra DONE;"]
    for group in range(groups):
        # With fewer than n visible scores all are kept, and it does not matter what is said of the others.
        lines += [f"setp.eq.f32 done, nth{group}, 0fFF800000;", f"@done bra NEXT{group};", f"mov.b32 left, {n};"]
        for r in range(m):
            lines += [f"setp.gt.f32 equal, {score[group][r]}, nth{group};", "@equal sub.s32 left, left, 1;"]
        for r in range(m):
            lines += [f"setp.eq.f32 equal, {score[group][r]}, nth{group};", "setp.gt.s32 room, left, 0;"]
            lines += [f"@equal selp.f32 {flag[group][r]}, 0f3F800000, 0f00000000, room;"]
            lines += ["@equal sub.s32 left, left, 1;"]
        lines += [f"NEXT{group}:"]
    return "{ " + " ".join(lines) + " DONE: }"


def _nth_largest(n: int, m: int) -> str:
    """Write PTX that finds the ``n``-th largest weight of a group of ``m``.

    Numbers that are not negative have the order of their bits, and of integers, the largest or least of three is one
    instruction. NaN comes before all others then.

    Operands are the result, and the weights.
    """
    weights = [f"w{r}" for r in range(m)]
    lines = [f".reg .b32 bound, w<{m}>, x<{m}>, low;"]
    lines += [f"mov.b32 {weight}, ${1 + r};" for r, weight in enumerate(weights)]
    lines += _find_nth_largest(n, weights, "bound", "s32")
    return "{ " + " ".join(lines) + " mov.b32 $0, bound; }"


def _of_each(program: Callable[[int, int], str]) -> Any:
    """Make a constant of a program for each n of groups of 8, then of 16, and of one more to fill the place of 0."""
    return constexpr(tuple(program(max(n, 1), m) for m in (8, 16) for n in range(m)))


GROUPS = {8: 4, 16: 1}  # of how many keys: how many are looked at together, each in two registers a key
AT_A_TIME = constexpr(tuple(GROUPS.values()))
KEEP_N = _of_each(lambda n, m: _keep_n(n, m, GROUPS[m]))
KEEP_N_OPERANDS = constexpr(tuple(",".join(["=&f"] * m * many + ["f"] * m * many) for m, many in GROUPS.items()))
NTH_LARGEST = _of_each(_nth_largest)
NTH_LARGEST_OPERANDS = constexpr(tuple(",".join(["=f"] + ["f"] * m) for m in (8, 16)))


@jit
def keep_top_n_hook(scores, q_pos, k_pos, args):
    """Keep the ``args[0]`` largest of each group's scores, equal ones going to the lower key.

    Args:
        scores: one score tile a place in the group.
        q_pos: not used.
        k_pos: not used.
        args: ``(n,)``, known at compile time, ``1 <= n < len(scores)``.

    Returns:
        What to keep, one tile a place; see :class:`~modelopt_lite.plan.AttentionPlan`.
    """
    N: tl.constexpr = args[0]
    M: tl.constexpr = len(scores)
    if M == 4:
        keep = keep_of_four(scores, N)
    elif N == 1:
        keep = keep_largest(scores)
    elif N == M - 1:
        keep = drop_smallest(scores)
    elif INTERPRETED:
        keep = keep_by_rank(scores, N)
    else:
        keep = tl.inline_asm_elementwise(
            KEEP_N[M - 8 + N], KEEP_N_OPERANDS[M // 16], scores, dtype=(tl.float32,) * M, is_pure=True,
            pack=AT_A_TIME[M // 16],
        )  # fmt: skip
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
    keep = (at_least(scores[0], after[M - 2]),)
    for place in tl.static_range(1, M - 1):
        keep = keep + (
            tl.minimum(more_than(scores[place], before[place - 1]), at_least(scores[place], after[M - 2 - place])),
        )
    return keep + (more_than(scores[M - 1], before[M - 2]),)


@jit
def drop_smallest(scores):
    """Keep all but the last of the smallest: above one before it, or not below one after it."""
    M: tl.constexpr = len(scores)
    before = (scores[0],)
    after = (scores[M - 1],)
    for place in tl.static_range(1, M - 1):
        before = before + (tl.minimum(before[place - 1], scores[place]),)
        after = after + (tl.minimum(after[place - 1], scores[M - 1 - place]),)
    keep = (at_least(scores[0], after[M - 2]),)
    for place in tl.static_range(1, M - 1):
        keep = keep + (
            tl.maximum(more_than(scores[place], before[place - 1]), at_least(scores[place], after[M - 2 - place])),
        )
    return keep + (more_than(scores[M - 1], before[M - 2]),)


@jit
def keep_of_four(scores, N: tl.constexpr):
    """Keep scores that come before at least ``4 - N`` of the other three, in descending order."""
    a, b, c, d = scores
    ab = at_least(a, b)
    ac = at_least(a, c)
    ad = at_least(a, d)
    bc = at_least(b, c)
    bd = at_least(b, d)
    cd = at_least(c, d)
    if N == 1:
        keep = (
            combine(ab, ac, ad, ALL),
            combine(bc, bd, ab, ALL_BUT_LAST),
            combine(cd, ac, bc, FIRST_ONLY),
            dropped(combine(ad, bd, cd, ANY)),
        )
    elif N == 2:
        keep = (
            combine(ab, ac, ad, MOST),
            combine(bc, bd, ab, MOST_LAST_INVERTED),
            dropped(combine(ac, bc, cd, MOST_LAST_INVERTED)),
            dropped(combine(ad, bd, cd, MOST)),
        )
    else:
        keep = (
            combine(ab, ac, ad, ANY),
            dropped(combine(ab, bc, bd, FIRST_ONLY)),
            dropped(combine(ac, bc, cd, ALL_BUT_LAST)),
            dropped(combine(ad, bd, cd, ALL)),
        )
    return keep


@jit
def nth_largest_weight(weights, q_pos, k_pos, args):
    """Return the ``args[0]``-th largest weight of each group of 8 or 16, one tile.

    Args:
        weights: one tile a place in the group, not negative.
        q_pos: not used.
        k_pos: not used.
        args: ``(n,)``, known at compile time.
    """
    N: tl.constexpr = args[0]
    M: tl.constexpr = len(weights)
    return tl.inline_asm_elementwise(
        NTH_LARGEST[M - 8 + N], NTH_LARGEST_OPERANDS[M // 16], weights, dtype=tl.float32, is_pure=True, pack=1
    )


@jit
def keep_by_rank(scores, N: tl.constexpr):
    """Keep the scores that fewer than ``N`` others go before: what the assembly does, for the interpreter."""
    M: tl.constexpr = len(scores)
    keep = ()
    for place in tl.static_range(M):
        rank = 0.0
        for other in tl.static_range(M):
            if other < place:
                rank += at_least(scores[other], scores[place])
            elif other > place:
                rank += more_than(scores[other], scores[place])
        keep = keep + (rank < N,)
    return keep
