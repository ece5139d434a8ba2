"""The backward kernel for Hopper without a GPU: its machine code, and when it is chosen.

Like the portable kernel's test, this file runs itself as a program to compile.
"""

import dataclasses
import itertools
import json
import math
import os
import re
import sys
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from cases import OnGpu, one_sequence
from machine_code import classify, inspect
from test_forward_compile import BF16, FP16, pretend_gpu, zeros
from turns import steps_left

from modelopt_lite.kernels import KeyBlocks, choice
from modelopt_lite.kernels.hopper import backward_launch as hopper_backward_launch
from modelopt_lite.kernels.hopper.backward import (
    FREED,
    SCORES_FULL,
    SUMS_FULL,
    THREADS_OF_BOTH,
    THREADS_OF_ONE,
    THREADS_OF_STEP,
    add_parts,
    attention_backward_hopper,
    descends,
    item_of,
    nth_tile,
    prepare_gradients,
    rank_of,
    round_gradients,
    runs_of,
    share_of,
    tiles_that_see,
)
from modelopt_lite.kernels.hopper.visits import gather_tiles, mark_tiles
from modelopt_lite.kernels.portable import launch as portable_launch
from modelopt_lite.kernels.portable.backward import query_spans
from modelopt_lite.kernels.request import ForwardResult, HookRefusedError
from modelopt_lite.kernels.top_n import top_n_plan
from modelopt_lite.methods import SinkWindow
from modelopt_lite.plan import DENSE

SHARED_LIMIT = 227 * 1024
VARIANTS = [
    # dtype, (n, m) or None, causal, other options
    (BF16, None, True, {}),
    (BF16, (2, 4), True, {}),
    (BF16, (4, 8), True, {}),
    (FP16, (2, 4), False, {}),
    (BF16, (2, 4), True, {"softcap": 30.0, "sliding_window": 100}),
    (BF16, (2, 4), True, {"blocks": None}),  # lists of all blocks
]
BARRIER = re.compile(r"\bbar(?:rier)?\.(?:cta\.)?(?:sync|arrive|red)[\w.]*\s+(\d+)(?:,\s*(\d+))?")
# Accesses to spilled registers in the hot loop, with the Triton of constraints.txt; of 402 to 1318 instructions. With a
# softcap, scores stay until gradients are there.
SPILLS = [3, 7, 0, 4, 55, 6]


def compile_all():
    """Launch all variants for a GPU that is not there.

    Returns:
        The kernels, and how many more are compiled for other lengths and windows.
    """

    def run(lengths, dtype, n_of_m, causal, options, window=64):
        plan = dataclasses.replace(top_n_plan(*(n_of_m or (0, 4)), 0, 0), dense_window_size=window if n_of_m else 0)
        request = zeros(lengths, plan, head_dim=128, dtype=dtype, is_causal=causal, softmax_scale=1.0, **options)
        if "blocks" in options:
            masks = [torch.ones(4, -(-length // 128), -(-length // 128), dtype=torch.bool) for length in lengths]
            request = request._replace(blocks=KeyBlocks.from_masks(masks, 128, 128))
        lse = torch.zeros(request.q.shape[:2])
        hopper_backward_launch.prepare(request.q, request)(request.q, ForwardResult(request.q, lse), request)

    kernels = (attention_backward_hopper, prepare_gradients, round_gradients, add_parts, mark_tiles, gather_tiles)
    found = []
    pretend_gpu(hopper_backward_launch, *kernels, compiled=found)
    hopper_backward_launch.processors = lambda device: 132
    hopper_backward_launch.DIVIDED_FROM = 0
    for variant in VARIANTS:
        run([300], *variant)

    def number():
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    found = [kernel for kernel in found if kernel.metadata.name == "attention_backward_hopper"]
    before = number()
    several = ([1], [16], [17], [1000], [5, 6], [16] * 16)
    for lengths, window in zip(several, (0, 1, 16, 64, 100, 2**40), strict=True):
        run(lengths, *VARIANTS[1], window=window)
        run(lengths, *VARIANTS[-1], window=max(1, window))  # without a window, lists need no keys beside them
    return found, number() - before


def request_on_gpu(plan=DENSE, tokens=2048, dim=128, dtype=BF16, **options):
    q = torch.empty(tokens, 4, dim, dtype=dtype).as_subclass(OnGpu)
    return one_sequence(q, q, q, plan, **options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"plan": top_n_plan(2, 4, 4, 64), "dtype": FP16, "softcap": 30.0, "sliding_window": 100}, None),
        ({"plan": top_n_plan(8, 16, 0, 0)}, "groups have 16 keys, more than 8"),
        ({"plan": SinkWindow().plan()}, "the plan keeps sinks and recent keys alone"),
        ({"dim": 96}, "head dimensions are 96 and 96, not both 64 or both 128"),
        ({"dtype": torch.float32}, "the tensors are torch.float32, not torch.float16 or torch.bfloat16"),
        ({"first_q": torch.tensor([0])}, "first positions are given, or there is a sliding window without causality"),
    ],
    ids=["plain", "all options", "groups of 16", "nothing but sinks", "head_dim", "dtype", "first_q"],
)
def test_refusal(absent_gpu, options, reason):
    assert hopper_backward_launch.refusal(request_on_gpu(**options)) == reason
    absent_gpu(100)
    assert hopper_backward_launch.refusal(request_on_gpu(**options)) is not None


@pytest.fixture
def chosen(absent_gpu, monkeypatch):
    """Return which kernel differentiates a request."""
    monkeypatch.setattr(portable_launch, "prepare_backward", lambda *arguments: lambda *arguments: "portable")
    monkeypatch.setattr(hopper_backward_launch, "prepare", lambda *arguments: lambda *arguments: "hopper")
    monkeypatch.setattr(choice, "_prepared_backward", {})
    return lambda request: choice.differentiate(request.q, ForwardResult(request.q, request.q), request)


def test_choice(chosen, monkeypatch):
    # Four heads have as many tiles of 128 keys as there are multiprocessors, and one key less.
    long, short = request_on_gpu(tokens=4224), request_on_gpu(tokens=4223)
    refused = request_on_gpu(tokens=4224, dim=96)
    assert [chosen(x) for x in (long, short, refused)] == ["hopper", "portable", "portable"]
    monkeypatch.setenv("MODELOPT_LITE_KERNEL", "hopper")
    assert [chosen(x) for x in (long, short, refused)] == ["hopper", "hopper", "portable"]
    monkeypatch.setenv("MODELOPT_LITE_KERNEL", "portable")
    assert [chosen(x) for x in (long, short, refused)] == ["portable"] * 3


def test_a_hook_that_cannot_be_compiled(chosen, monkeypatch, caplog):
    def refuse(*arguments):
        raise HookRefusedError("Gluon cannot compile the hook")

    monkeypatch.setattr(hopper_backward_launch, "prepare", lambda *arguments: refuse)
    assert chosen(request_on_gpu(tokens=4224)) == "portable"
    assert "the backward kernel for Hopper is left out: Gluon cannot compile the hook" in caplog.text


@pytest.mark.parametrize(
    ("kv_heads", "batch", "tiles", "heads"),
    [
        (8, 1, 1, 8),
        (8, 1, 32, 8),
        (8, 1, 64, 4),
        (8, 1, 128, 2),
        (8, 1, 256, 1),
        (8, 4, 16, 8),
        (3, 1, 128, 3),
        (1, 1, 999, 1),
    ],
)
def test_heads_of_a_launch(kv_heads, batch, tiles, heads):
    assert hopper_backward_launch.heads_of_launch(kv_heads, batch, tiles, 4, 132, is_causal=True) == heads


class Rules(NamedTuple):
    """Those of the kernel's options that say which queries see a key."""

    causal: bool
    sliding: bool


@triton.jit
def write_ranks(ranks_ptr, numbers_ptr, OPTIONS: tl.constexpr):
    """Store the ranks of a program's tile of keys of a wave, ``[heads, tiles_per_head, columns]``."""
    program, wave = tl.program_id(0), tl.program_id(1)
    query_length, length = tl.load(numbers_ptr), tl.load(numbers_ptr + 1)
    sliding_window, tiles_per_head = tl.load(numbers_ptr + 2), tl.load(numbers_ptr + 3)
    columns, heads = tl.load(numbers_ptr + 4), tl.load(numbers_ptr + 5)
    programs = tl.num_programs(0)
    item = item_of(wave, program, programs)
    head, tile = item % heads, item // heads
    lengths = (query_length, length)
    if (tile < tiles_per_head) & (tile * 128 < length):
        begin, end = tiles_that_see(tile, lengths, sliding_window, OPTIONS)
        column = begin
        while column < end:
            rank = rank_of(wave, program, column, lengths, sliding_window, heads, programs, OPTIONS)
            tl.store(ranks_ptr + (head * tiles_per_head + tile) * columns + column, rank)
            column += 1


def waves_of(heads, tiles, programs):
    """Return which item each program computes in each wave, ``{(wave, program): (head, tile)}``."""
    found = {}
    for wave in range(-(-heads * tiles // programs)):
        for program in range(programs):
            item = wave * programs + (programs - 1 - program if wave % 2 else program)
            if item < heads * tiles:
                found[wave, program] = (item % heads, item // heads)
    return found


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
@pytest.mark.parametrize("programs", [1, 3, 4, 132])
@pytest.mark.parametrize(
    ("query_length", "length", "longest", "rules", "sliding_window"),
    [
        (700, 700, 700, Rules(True, False), 0),
        (64, 64, 64, Rules(True, False), 0),
        (300, 900, 1300, Rules(True, False), 0),
        (500, 300, 300, Rules(False, False), 0),
        (900, 900, 900, Rules(True, True), 1),
        (333, 900, 1000, Rules(True, True), 130),
        (900, 900, 900, Rules(True, True), 2**30),
    ],
)
def test_all_take_turns(query_length, length, longest, rules, sliding_window, programs):
    """Those that add to a tile of queries have different ranks, without a gap, and wait for none that comes later."""
    heads, tiles, columns = 3, -(-longest // 128), -(-query_length // 64)
    ranks = torch.full((heads, tiles, columns), -1, dtype=torch.int32)
    numbers = torch.tensor([query_length, length, sliding_window, tiles, columns, heads], dtype=torch.int32)
    write_ranks[(programs, -(-heads * tiles // programs))](ranks, numbers, rules)
    waves = {item: wave for (wave, _), item in waves_of(heads, tiles, programs).items()}
    for head, column in itertools.product(range(heads), range(columns)):
        found = ranks[head, :, column]
        who = (found >= 0).nonzero().flatten().tolist()
        assert sorted(found[who].tolist()) == list(range(len(who)))
        found_waves = [waves[head, tile] for tile in sorted(who, key=lambda tile: found[tile])]
        assert found_waves == sorted(found_waves)
    seen = torch.arange(query_length)[:, None] + length - query_length - torch.arange(length)
    visible = seen >= 0 if rules.causal else torch.ones_like(seen, dtype=torch.bool)
    if rules.sliding:
        visible &= seen < sliding_window
    padded = torch.nn.functional.pad(visible, (0, -length % 128, 0, -query_length % 64))
    needed = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 64)).any(3).any(1).T
    assert (ranks[:, : needed.shape[0]] >= 0)[:, needed].all()


@triton.jit
def write_shares(found_ptr, heads, members, shares):
    """Store what each item is: ``[items, 4]``."""
    item = tl.program_id(0)
    head, tile, first, end = share_of(item, heads, members, shares)
    tl.store(found_ptr + 4 * item, head)
    tl.store(found_ptr + 4 * item + 1, tile)
    tl.store(found_ptr + 4 * item + 2, first)
    tl.store(found_ptr + 4 * item + 3, end)


def test_shares_from_a_length_on():
    shares = [hopper_backward_launch.shares_of(keys, 3, 4) for keys in (3 * 1024 - 1, 3 * 1024, 100000)]
    assert shares == [1, 4, 4]
    assert hopper_backward_launch.shares_of(1024, 1, 1) == 1


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
@pytest.mark.parametrize(("heads", "members", "shares"), [(3, 4, 4), (3, 4, 1), (1, 1, 1), (2, 3, 3)])
def test_shares_of_first_tiles(heads, members, shares):
    """With lists, each tile of keys meets each head of queries once, and no item comes before one it waits for."""
    tiles = 5
    found = torch.empty(heads * (tiles + 2 * (shares - 1)), 4, dtype=torch.int32)
    write_shares[(found.shape[0],)](found, heads, members, shares)
    met = [(head, tile, x) for head, tile, first, end in found.tolist() for x in range(first, end)]
    assert sorted(met) == list(itertools.product(range(heads), range(tiles), range(members)))
    numbers = found[:, 1].tolist()
    assert numbers == sorted(numbers)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("dtype", [FP16, torch.float32])
def test_parts_are_added(dtype, members):
    """Parts of keys that do not exist are not read, and no other gradient is written."""
    heads, dim, lengths = 2, 64, [300, 0, 130, 50]
    starts = torch.tensor([3, 303, 303, 433])
    parts = torch.randn(2, len(lengths), heads, 2, members, 128, dim)
    grads = [torch.full((490, heads, dim), 7.0, dtype=dtype) for _ in range(2)]
    wanted = [grad.clone() for grad in grads]
    for (sequence, length), tile in itertools.product(enumerate(lengths), range(2)):
        rows, first = min(128, max(0, length - 128 * tile)), starts[sequence] + 128 * tile
        for grad, of_kind in zip(wanted, parts, strict=True):
            total = of_kind[sequence, :, tile, :, :rows].double().sum(1).to(dtype)
            grad[first : first + rows] = total.transpose(0, 1)
        parts[:, sequence, :, tile, :, rows:] = float("nan")
    programs = len(lengths) * heads * 2
    add_parts[(programs,)](parts, *grads, starts, torch.tensor(lengths), (heads * dim, dim), heads, members, dim)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=torch.finfo(dtype).eps, atol=1e-6)


def steps_of(wave, head, tile, members, ranks):
    """Return an item's steps: to which tiles of queries of which heads it adds, and how many add before it."""
    found = ranks[head][tile]
    columns = [column for column, rank in enumerate(found) if rank >= 0]
    steps = []
    for member in range(members):
        order = reversed(columns) if descends.fn(wave, member, None) else columns
        steps += [((head, member, column), found[column]) for column in order]
    return steps


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
@pytest.mark.parametrize("programs", [1, 2, 3, 7, 78, 132])
@pytest.mark.parametrize(
    ("sequences", "heads", "members", "rules", "sliding_window"),
    [
        ([(2048, 2048)], 4, 4, Rules(True, False), 0),
        ([(2100, 2100)], 1, 3, Rules(True, False), 0),
        ([(1300, 1300)], 3, 1, Rules(False, False), 0),
        ([(400, 2000)], 2, 4, Rules(True, False), 0),
        ([(500, 1500), (0, 700), (1000, 1000), (65, 65)], 2, 2, Rules(True, False), 0),
        ([(900, 300), (128, 1280)], 2, 3, Rules(False, False), 0),
        ([(2048, 2048)], 2, 4, Rules(True, True), 1),
        ([(1500, 1900), (700, 700)], 2, 4, Rules(True, True), 300),
        ([(700, 700), (333, 800), (1500, 1500), (1, 900), (200, 3000)], 2, 2, Rules(True, True), 1),
        ([(700, 700), (333, 800), (1500, 1500), (1, 900), (200, 3000)], 2, 2, Rules(True, True), 100),
        ([(700, 700), (333, 800), (1500, 1500), (1, 900), (200, 3000)], 2, 2, Rules(True, False), 0),
        ([(700, 700), (333, 800), (1500, 1500), (1, 900), (200, 3000)], 2, 2, Rules(False, False), 0),
    ],
)
def test_nobody_waits_for_ever(sequences, heads, members, rules, sliding_window, programs):
    """For several numbers of multiprocessors, a program that waits for its turn waits for one that can go on.

    Steps of a program are taken one after the other here. In the kernel, the warp that adds for the next step may wait
    for its turn at the same time, but it adds no earlier.
    """
    tiles = max(-(-length // 128) for _, length in sequences)
    columns = max(-(-query_length // 64) for query_length, _ in sequences)
    all_heads = len(sequences) * heads
    programs = min(programs, all_heads * tiles)
    waves = -(-all_heads * tiles // programs)
    ranks = []
    for number, lengths in enumerate(sequences):
        found = torch.full((all_heads, tiles, columns), -1, dtype=torch.int32)
        numbers = torch.tensor([*lengths, sliding_window, tiles, columns, all_heads], dtype=torch.int32)
        write_ranks[(programs, waves)](found, numbers, rules)
        ranks += found[number * heads : (number + 1) * heads].tolist()
    work = [[] for _ in range(programs)]
    for (wave, program), (head, tile) in sorted(waves_of(all_heads, tiles, programs).items()):
        work[program] += steps_of(wave, head, tile, members, ranks)
    assert any(work)
    assert steps_left(work) == 0


def test_a_ring_of_programs_that_wait_is_found():
    first, second = [("a", 1), ("b", 0)], [("b", 1), ("a", 0)]
    assert steps_left([first, second]) == 4
    assert steps_left([first[::-1], second]) == 0


class Spans(NamedTuple):
    """Those of the kernel's options that say which queries need a mask."""

    block_m: int
    block_n: int
    causal: bool
    sliding: bool
    positions: bool = False


@triton.jit
def write_runs(visits_ptr, numbers_ptr, SPARSE: tl.constexpr, OPTIONS: tl.constexpr):
    """Store the tiles of queries that a tile of keys meets, plus 1000 if they are masked, in their order."""
    tile = tl.program_id(0)
    query_length, length, columns = tl.load(numbers_ptr), tl.load(numbers_ptr + 1), tl.load(numbers_ptr + 2)
    sinks, window, sliding_window = tl.load(numbers_ptr + 3), tl.load(numbers_ptr + 4), tl.load(numbers_ptr + 5)
    descending = tl.load(numbers_ptr + 6) != 0
    begin, end = tiles_that_see(tile, (query_length, length), sliding_window, OPTIONS)
    rules = (length - query_length, length, sinks, window, sliding_window)
    spans = query_spans(tile * 128, query_length, length - query_length, rules, SPARSE, OPTIONS)
    spans = (spans[1] // 64, spans[2] // 64, spans[3] // 64, spans[4] // 64)
    number = 0
    for run in range(3):
        place, masked_end, hot_end = runs_of(run, begin, spans, end, descending)
        while place < hot_end:
            column = nth_tile(place, begin, end, descending)
            tl.store(visits_ptr + tile * columns + number, column + tl.where(place < masked_end, 1000, 0))
            number += 1
            place += 1


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
@pytest.mark.parametrize(("query_length", "length"), [(700, 700), (64, 64), (300, 900), (65, 130)])
@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (130, 100)])
@pytest.mark.parametrize("rules", [(True, 0), (False, 0), (True, 1), (True, 200)])
@pytest.mark.parametrize("descending", [False, True])
def test_every_tile_is_met_once_and_masked_where_needed(query_length, length, sinks, window, rules, descending):
    causal, sliding_window = rules
    tiles, columns = -(-length // 128), -(-query_length // 64)
    visits = torch.full((tiles, columns + 1), -1, dtype=torch.int32)
    numbers = [query_length, length, columns + 1, sinks, window, sliding_window, int(descending)]
    numbers = torch.tensor(numbers, dtype=torch.int32)
    write_runs[(tiles,)](visits, numbers, window > 0, Spans(64, 128, causal, sliding_window > 0))
    distance = torch.arange(query_length)[:, None] + length - query_length - torch.arange(length)
    visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if sliding_window:
        visible &= distance < sliding_window
    exempt = ((distance >= 0) & (distance < window)) | (torch.arange(length) < sinks)
    shape = (0, -length % 128, 0, -query_length % 64)
    whole = torch.nn.functional.pad(visible & ~exempt, shape).unflatten(1, (-1, 128)).unflatten(0, (-1, 64))
    needed = torch.nn.functional.pad(visible, shape).unflatten(1, (-1, 128)).unflatten(0, (-1, 64)).any(3).any(1)
    for tile in range(tiles):
        met = visits[tile][visits[tile] >= 0].tolist()
        if descending:
            met.reverse()
        places = [x % 1000 for x in met]
        assert places == list(range(places[0], places[0] + len(places))) if places else not needed[:, tile].any()
        assert set(needed[:, tile].nonzero().flatten().tolist()) <= set(places)
        assert all(whole[x, :, tile].all() for x in met if x < 1000)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
@pytest.mark.parametrize("has_lists", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_before_and_after(has_lists, transposed):
    """What is prepared for the kernel, and what becomes of its sums."""
    total, heads, kv_heads, dim = 200, 4, 2, 128
    starts, lengths_q, lengths_k = torch.tensor([70, 5, 3]), torch.tensor([100, 0, 64]), torch.tensor([190, 7, 64])
    # With lists, tiles begin at multiples of 64: those of the first sequence at rows -26 and 38.
    begins, before = ([0, 2, 2], 26) if has_lists else ([0, 2, 2], 0)
    lengths = (lengths_q, lengths_k if has_lists else None)
    grad, out = torch.randn(2, total, heads, dim).half()
    lse = torch.randn(total, heads)
    lse[:3] = lse[67:70] = -torch.inf
    lse[80, 1] = -torch.inf
    alive = lse > -torch.inf
    alive[170:] = False  # in no sequence of this call, but in one of another
    tiles = 4
    shift, delta = torch.full((2, heads, tiles, 64), torch.nan)
    grad_q = torch.full((total, heads, dim), torch.nan).half()
    turns, found = (torch.full((size,), -1, dtype=torch.int32) for size in (heads * tiles + 1, 3))
    grad_k, grad_v = torch.full((2, 90, kv_heads, dim), torch.nan).half()
    programs = (tiles + 4) * heads + 3 + -(-grad_k.numel() // 8192)
    prepare_gradients[(programs,)](
        grad, out, lse, shift, delta, grad_q, turns, found, grad_k, grad_v,
        tuple(x.stride()[:2] for x in (grad, out, grad_q)), starts, lengths, heads, 3, total, tiles, grad_k.numel(),
        dim, transposed,
    )  # fmt: skip
    assert found.tolist() == begins
    shifts, deltas = torch.full((tiles * 64, heads), torch.inf), torch.zeros(tiles * 64, heads)
    for number, (start, length) in enumerate(zip(starts.tolist(), lengths_q.tolist(), strict=True)):
        first = begins[number] * 64 + (before if number == 0 else 0)
        rows, places = slice(start, start + length), slice(first, first + length)
        shifts[places] = torch.where(alive[rows], lse[rows] / math.log(2), torch.inf)
        deltas[places] = (grad[rows].float() * out[rows].float()).sum(2).masked_fill(~alive[rows], 0.0)
    # Transposed, a thread's four numbers of 16 rows are two neighbours and the two that are 8 rows further on.
    shapes, order = ((heads, tiles * 4, 4, 2, 2), (0, 1, 3, 2, 4)) if transposed else ((heads, -1), (0, 1))
    found_shifts, found_deltas = (x.view(shapes).permute(order).reshape(heads, -1) for x in (shift, delta))
    torch.testing.assert_close(found_shifts, shifts.T)
    torch.testing.assert_close(found_deltas, -deltas.T)
    assert not any(x.any() for x in (turns, grad_k, grad_v))
    assert not grad_q[~alive].any()
    assert grad_q[alive].isnan().all()

    right = torch.randn(total, heads, dim)
    sums = torch.full((heads, tiles, 64, dim), torch.nan)
    for number, (start, length) in enumerate(zip(starts.tolist(), lengths_q.tolist(), strict=True)):
        skipped = before if number == 0 else 0
        for row in range(length):
            tile, place = divmod(row + skipped, 64)
            sums[:, begins[number] + tile, place] = right[start + row]
    # [halves, 16 rows, blocks of 8 columns, rows, pairs of columns, row 8 further on, column]
    lines = sums.view(heads, tiles, 4, 2, 8, 2, 8, 4, 2).permute(0, 1, 5, 2, 6, 4, 7, 3, 8).contiguous()
    turns = turns[:-1].view(heads, tiles)
    turns[:] = 3
    turns[2, 1] = 0  # without any keys, its rows have learnable sinks alone
    second = slice(starts[0] + 64 - before, starts[0] + min(128 - before, 100))
    lines[2, 1], right[second, 2] = torch.nan, 0.0
    round_gradients[(tiles * heads,)](
        lines, shift, turns, grad_q, found, starts, lengths, 0.5, 3, tiles, 0, heads, grad_q.stride()[:2], dim,
        transposed,
    )  # fmt: skip
    torch.testing.assert_close(grad_q, (right * 0.5).masked_fill(~alive[..., None], 0.0).half())


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(VARIANTS)), ids=lambda i: "-".join(map(str, VARIANTS[i])))
def test_kernel_fits_the_gpu(compiled, index):
    found = compiled[index]
    loop = classify(found["hot loop"])
    assert found["shared"] <= SHARED_LIMIT
    assert found["registers"] == 168  # at the launch; then warps give and take
    is_dense = VARIANTS[index][1] is None
    # Instructions that take 16 dimensions, for two products; queries, for two more; and keys, but with a hook they are
    # left out here, as a warpgroup computes gradients of queries in every other step.
    assert loop["matrix"] == 8 + 8 + 4 + 4 + (8 if is_dense else 0)
    assert loop["shuffles"] == 0
    # Transposed, a thread reads numbers of 16 rows, four at a time, and hands sums over in every step.
    assert loop["shared memory"] <= (16 if is_dense else 4)
    assert loop["spills"] <= SPILLS[index]
    # The compiler's own barriers have other numbers than the kernel's, so nobody else comes to these.
    threads = {(FREED, THREADS_OF_STEP), (SUMS_FULL, THREADS_OF_STEP if is_dense else THREADS_OF_ONE)}
    threads |= {(tl.constexpr(pair), THREADS_OF_BOTH) for pair in SCORES_FULL.value}
    expected = {(pair.value + parity, count.value) for pair, count in threads for parity in (0, 1)}
    assert {tuple(x) for x in found["barriers"] if x[0] >= FREED.value} == expected


@pytest.mark.slow
def test_run_time_numbers_do_not_recompile(compiled):
    assert compiled[-1] == 0


if __name__ == "__main__":
    kernels, more = compile_all()
    for kernel in kernels:
        barriers = sorted({(int(number), int(threads or 0)) for number, threads in BARRIER.findall(kernel.asm["ptx"])})
        sys.stdout.write(json.dumps({**inspect(kernel), "barriers": barriers}) + "\n")
    sys.stdout.write(f"{more}\n")
