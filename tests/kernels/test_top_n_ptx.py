"""The assembly of N:M selection and of masks, which Triton's interpreter does not run, step by step on the CPU."""

import itertools
import random
import re
from math import copysign, inf, isnan, nan

import pytest

from modelopt_lite.kernels.hopper.forward import ANY_FEWER, FIND_BELOW, KEEP_FROM
from modelopt_lite.kernels.tiles import HIDE_BEYOND, HIDE_DROPPED
from modelopt_lite.kernels.top_n_hooks import _comparators, _keep_n, _nth_largest

ONE = 0x3F800000
CONSTANTS = {"0fFF800000": -inf, "0f3F800000": 1.0, "0f00000000": 0.0}
FUNCTIONS = {
    "mov": lambda x: x,
    "min": lambda x, y: y if isnan(x) else x if isnan(y) else min(x, y),
    "max": lambda x, y: y if isnan(x) else x if isnan(y) else max(x, y),
    # As integers, NaN is above infinity; nothing is negative there.
    "min.s32": lambda x, y: y if isnan(x) else x if isnan(y) else min(x, y),
    "max.s32": lambda x, y: nan if isnan(x) or isnan(y) else max(x, y),
    "set.geu": lambda x, y: float(not x < y),
    "add": lambda x, y: x + y,
    # Flags, 1.0 or 0.0, whose bits are added up.
    "add.u32": lambda x, y: (bits(x) + bits(y)) % 2**32,
    "sub": lambda x, y: x - y,
    "sub.rn": lambda x, y: nan if x == y == inf else x - y,
    "neg": lambda x: -x,
    "shr": lambda x, y: x >> y,
    "bfe": lambda x, start, length: (x + 2 ** (length - 1)) % 2**length - 2 ** (length - 1),
    # The signs of two numbers, each in all bits of a half; NaN, as instructions return it, has none.
    "prmt": lambda x, y, _: 0xFFFF * (copysign(1.0, x) < 0.0) + 0xFFFF0000 * (copysign(1.0, y) < 0.0),
    "vote.sync.any.pred": lambda x, _: x,
    "setp.eq": lambda x, y: x == y,
    "setp.eq.and": lambda x, y, z: x == y and z,
    "setp.eq.or": lambda x, y, z: x == y or z,
    "setp.ne.or": lambda x, y, z: x != y or z,
    "setp.le.and": lambda x, y, z: x <= y and z,
    "setp.le.or": lambda x, y, z: x <= y or z,
    "setp.geu": lambda x, y: not x < y,
    "setp.lt": lambda x, y: x < y,
    "setp.gt": lambda x, y: x > y,
    "selp": lambda x, y, z: x if z else y,
}


def bits(flag):
    return round(flag * ONE) if isinstance(flag, float) else flag


def run(program, operands):
    """Run a program on operands by number, and return all registers."""
    steps = re.findall(r"[^\s;:{}][^;:{}]*[;:]", program)
    labels = {step[:-1]: place for place, step in enumerate(steps) if step.endswith(":")}
    registers = {f"${number}": value for number, value in operands.items()}

    def value(name):
        if name in registers or name in CONSTANTS:
            return registers.get(name, CONSTANTS.get(name))
        return float(name) if "." in name else int(name, 0)

    place = 0
    while place < len(steps):
        step = steps[place][:-1]
        place += 1
        condition, name, rest = re.fullmatch(r"(?:@(\w+) )?(\S+)(.*)", step).groups()
        if name.startswith(".") or step in labels or (condition and not registers[condition]):
            continue
        if name == "bra":
            place = labels[rest.strip()]
            continue
        target, *sources = (x.strip() for x in rest.split(","))
        if name not in FUNCTIONS:
            name = re.sub(r"\.(f32|s32|b32)", "", name.replace("setp.eq.u32", "setp.eq").replace("and.u32", "and"))
        registers[target] = FUNCTIONS[name](*map(value, sources))
    return registers


def rule(scores, n):
    """Return which visible scores are the ``n`` largest, ties to the first."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return [i in order[:n] and score > -inf for i, score in enumerate(scores)]


def groups(m, seed):
    """Make groups with and without ties, visible wholly, in part and not at all."""
    generator = random.Random(seed)
    for kind in range(24):
        score = generator.random if kind % 2 else lambda: float(generator.randrange(4))
        visible = m if kind % 3 else generator.randrange(m + 1)
        yield [score() - 1.0 for _ in range(visible)] + [-inf] * (m - visible)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_comparators_sort(size):
    for numbers in itertools.product((0, 1), repeat=size):  # which is enough, by the 0-1 principle
        numbers = list(numbers)
        for i, j in _comparators(size):
            numbers[i], numbers[j] = max(numbers[i], numbers[j]), min(numbers[i], numbers[j])
        assert numbers == sorted(numbers, reverse=True)


@pytest.mark.parametrize(("n", "m"), [(n, m) for m in (8, 16) for n in range(1, m)])
@pytest.mark.parametrize("absent", [None, nan, inf, 0.5])
def test_exact_rule(n, m, absent):
    """Groups that a thread does not have may hold anything."""
    together = 32 // m
    program = _keep_n(n, m, together)
    for seed in range(8):
        scores = list(itertools.islice(groups(m, seed), together))
        if absent is not None:
            scores[1:] = [[absent] * m] * (together - 1)
        found = run(program, {(m + r) * together + g: scores[g][r] for g in range(together) for r in range(m)})
        for g in range(together if absent is None else 1):
            kept = [found[f"${together * r + g}"] == 1.0 and scores[g][r] > -inf for r in range(m)]
            assert kept == rule(scores[g], n)


def selected(weights, n):
    """Return what the Hopper kernel keeps of a group at first and how many, and whether both of its ways find too many.

    One way makes weights 0 and counts the others; the other one makes masks, and counts by their sum.
    """
    m = len(weights)
    bound = run(_nth_largest(n, m), {1 + r: weight for r, weight in enumerate(weights)})["$0"]
    kept = run(KEEP_FROM.value[m], {m + 1 + r: x for r, x in enumerate([*weights, bound])})
    masks = run(FIND_BELOW.value[m], {m // 2 + 1 + r: x for r, x in enumerate([*weights, bound])})
    by_mask = [not masks[f"${r // 2}"] >> 16 * (r % 2) & 0xFFFF for r in range(m)]
    total = (masks[f"${m // 2}"] + 2**31) % 2**32 - 2**31
    too_many = run(ANY_FEWER.value, {1: total, 2: m - n})["$0"]
    found, number = [kept[f"${r}"] for r in range(m)], kept[f"${m}"]
    assert all(
        (isnan(x) if isnan(weight) else x == weight) if keep else x == 0.0
        for keep, x, weight in zip(by_mask, found, weights, strict=True)
    )
    assert number == sum(by_mask)
    assert too_many == (number > n)
    return by_mask, number


@pytest.mark.parametrize(("n", "m"), [(n, m) for m in (8, 16) for n in range(1, m)])
def test_quick_rule_is_right_or_undecided(n, m):
    for scores in groups(m, n):
        weights = [round(2**score, 2) for score in scores]  # so that some scores that differ have the same weight
        kept, number = selected(weights, n)
        right = rule(scores, n)
        assert number == sum(weight >= sorted(weights)[-n] for weight in weights)
        # Where scores differ and their weights do not, there is one too many; what is not visible has no weight.
        assert all(k or not r for k, r in zip(kept, right, strict=True))
        if number == n:
            assert all(k == r or not weight for k, r, weight in zip(kept, right, weights, strict=True))


@pytest.mark.parametrize(("n", "m"), [(n, m) for m in (8, 16) for n in range(1, m)])
def test_quick_rule_counts_nan(n, m):
    """No group may count below ``n``, as that would hide another group that is undecided."""
    generator = random.Random(n)
    for _ in range(40):
        first = generator.randrange(m)
        weights = [generator.choice((nan, inf, 0.0, 1e-38, generator.random())) for _ in range(m)]
        weights[first : first + m // 2] = [nan] * len(weights[first : first + m // 2])
        kept, number = selected(weights, n)
        assert number >= n
        assert all(keep for keep, weight in zip(kept, weights, strict=True) if isnan(weight))


@pytest.mark.parametrize("m", [8, 16])
def test_masks_of_several_groups_are_counted(m):
    """The sum of all groups of a thread says how many halves of masks are all ones."""
    generator = random.Random(m)
    for _ in range(200):
        halves = [generator.choice((0, 0xFFFF)) for _ in range(generator.choice((16, 32, 64)))]
        total = sum(x << 16 * (place % 2) for place, x in enumerate(halves))
        ones = halves.count(0xFFFF)
        for expected in (ones - 1, ones, ones + 1):
            found = run(ANY_FEWER.value, {1: (total + 2**31) % 2**32 - 2**31, 2: expected})["$0"]
            assert found == (ones < expected)


def test_hide_beyond():
    for x, y, bound in itertools.product(range(-2, 3), repeat=3):
        found = run(HIDE_BEYOND.value, {1: 0.5, 2: x, 3: y, 4: bound})
        assert found["$0"] == (-inf if x - y > bound else 0.5)


@pytest.mark.parametrize(("causal", "sinks", "of_dropped"), list(itertools.product((True, False), repeat=3)))
def test_hide_dropped(causal, sinks, of_dropped):
    program = HIDE_DROPPED.value[4 * (not causal) + 2 * sinks + of_dropped]
    for kept, key, query, window, num_sinks in itertools.product((0, 1), range(6), range(6), (0, 1, 3), (0, 1, 4)):
        if causal and key > query:
            continue  # which is hidden before
        member = key % 4
        flag = ONE * (kept != of_dropped)
        numbers = {2: flag, 3: key - member, 4: -member, 5: query - window, 6: query, 7: num_sinks - 1}
        is_recent = query - window < key <= query
        found = run(program, {1: 0.5, **numbers})
        assert found["$0"] == (0.5 if kept or is_recent or (sinks and key < num_sinks) else -inf)
