"""What the kernels for Hopper GPUs visit, run by Triton's interpreter: with the oracle as the judge of every key."""

import dataclasses
import itertools
import os
from random import Random

import pytest
import torch
from block_cases import shape_of_lists
from hypothesis import given, settings
from hypothesis import strategies as st
from turns import steps_left

from modelopt_lite.kernels import AttentionRequest, KeyBlocks
from modelopt_lite.kernels.hopper import backward_launch as hopper_backward_launch
from modelopt_lite.kernels.hopper import visits_launch
from modelopt_lite.kernels.hopper.forward_launch import hopper_settings
from modelopt_lite.kernels.hopper.visits import HALF, HEADER, TILE, TILES_FROM, UNLISTED
from modelopt_lite.kernels.hopper.visits_launch import Schedule
from modelopt_lite.kernels.reference import kept_scores, listed_blocks
from modelopt_lite.kernels.settings import options_of
from modelopt_lite.kernels.top_n import top_n_plan
from modelopt_lite.methods import SinkWindow
from modelopt_lite.plan import DENSE, AttentionPlan

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"),
]
PLANS = ("dense", "2:4", "nothing")


def plan_of(name, sinks, window, sparse_decode):
    if name == "nothing":
        return SinkWindow(num_sink_tokens=sinks, dense_window_size=window).plan()
    plan = top_n_plan(2, 4, 0, 0) if name == "2:4" else DENSE
    return dataclasses.replace(
        plan, num_sink_tokens=sinks, dense_window_size=window, sparse_decode=sparse_decode
    )  # fmt: skip


def without_rule(request):
    """Return a request that keeps what the rule of a request looks at."""
    plan = request.plan
    numbers = {name: getattr(plan, name) for name in ("num_sink_tokens", "dense_window_size", "sparse_decode")}
    return request._replace(plan=AttentionPlan(**numbers))


@st.composite
def listed_requests(draw):
    """Draw a call with lists, empty and full ones among them: ragged lengths, suffix queries, all masks."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    is_causal = draw(st.booleans())
    lengths_k = draw(st.lists(st.sampled_from([0, 1, 5, 127, 128, 129, 256, 300, 640]), min_size=1, max_size=3))
    lengths_q = [
        draw(st.just(n) | st.sampled_from([0, 1]) | st.integers(0, n if is_causal else 300)) for n in lengths_k
    ]
    lengths_q = [min(m, n) if is_causal else m for m, n in zip(lengths_q, lengths_k, strict=True)]
    kv_heads, repeat = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 3)]))
    packings = []
    for lengths in (lengths_q, lengths_k):
        length = torch.tensor(lengths)
        packings.append((length.cumsum(0) - length, length, max(lengths)))
    rows_q, rows_k = (max(1, sum(lengths)) for lengths in (lengths_q, lengths_k))
    plan = plan_of(
        draw(st.sampled_from(PLANS)), draw(st.sampled_from([0, 0, 3, 130])), draw(st.sampled_from([0, 0, 1, 64, 200])),
        draw(st.booleans()),
    )  # fmt: skip
    request = AttentionRequest(
        q=torch.randn(rows_q, kv_heads * repeat, 128, generator=generator).bfloat16(),
        k=torch.randn(rows_k, kv_heads, 128, generator=generator).bfloat16(),
        v=torch.randn(rows_k, kv_heads, 128, generator=generator).bfloat16(),
        s_aux=None,
        starts_q=packings[0][0],
        lengths_q=packings[0][1],
        max_q=packings[0][2],
        starts_k=packings[1][0],
        lengths_k=packings[1][1],
        max_k=packings[1][2],
        is_causal=is_causal,
        softmax_scale=0.125,
        sliding_window=draw(st.none() | st.sampled_from([1, 100, 128, 300])) if is_causal else None,
        softcap=None,
        plan=plan,
    )
    block_rows = draw(st.sampled_from([128, 128, 256]))
    heads, share = draw(st.sampled_from([kv_heads, kv_heads * repeat])), draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    shapes = shape_of_lists(request, 128, block_rows)
    masks = [torch.rand(heads, *shape, generator=generator) < share for shape in shapes]
    return request._replace(blocks=KeyBlocks.from_masks(masks, 128, block_rows))


def visits_of(request):
    options = options_of(request, hopper_settings(torch.bfloat16, 128, request.group, True))
    schedule = Schedule(request, options)
    return schedule, schedule(request)


def check_item(request, number, row, tiles, kept):
    """Hold the tiles of one item against the keys that the oracle keeps; returns whether it has queries.

    Args:
        request: the call.
        number: the sequence.
        row: which block of 128 queries of this sequence it is, counted from the block of the first one.
        tiles: the item's visits, with the header.
        kept: the keys of its head that are kept, or looked at by a rule, ``[len_q, len_k]``.
    """
    sequence = list(request.sequences())[number]
    begin = (sequence.first_q // TILE.value + row) * TILE.value
    low, high = max(begin, sequence.first_q), min(begin + TILE.value, sequence.first_q + kept.shape[0])
    count, masked = tiles[2:4].tolist()
    if low >= high:
        assert count == 0
        return
    spared = int(tiles[4])
    assert tiles[:2].tolist() == [number, begin - sequence.first_q]
    q_pos, k_pos = torch.arange(low, high)[:, None], torch.arange(kept.shape[1])
    behind, plan = q_pos - k_pos, request.plan
    visible = behind >= 0 if request.is_causal else torch.ones_like(behind, dtype=torch.bool)
    if request.sliding_window is not None:
        visible = visible & (behind < request.sliding_window)
    window = kept.shape[1] if request.is_decode(kept.shape[0]) else plan.dense_window_size
    exempt = visible & ((k_pos < plan.num_sink_tokens) | ((behind >= 0) & (behind < window)))
    found = torch.zeros_like(visible)
    entries = tiles[HEADER.value : HEADER.value + count]
    firsts = entries - entries % TILE.value
    assert len(set(firsts.tolist())) == count
    assert 1 <= masked <= count
    assert 0 <= spared < masked
    assert (firsts[1:] + TILE.value <= kept.shape[1]).all(), "only the first tile may reach past the sequence"
    for place, (entry, first) in enumerate(zip(entries.tolist(), firsts.tolist(), strict=True)):
        keys = slice(first, first + TILE.value)
        if place >= masked - spared:
            # The second half of the queries; if there are none, the last one stands in for them.
            late = slice(min(max(0, begin + 64 - low), high - low - 1) if place < masked else 0, None)
            assert entry == first
            assert visible[late, keys].all()
            assert plan.keep is None or not exempt[late, keys].any()
        found[:, keys] = exempt[:, keys] if entry % TILE.value == UNLISTED.value else visible[:, keys]
    kept = kept[low - sequence.first_q : high - sequence.first_q]
    if plan.keeps_nothing:  # listed tiles that are masked may be visited all the same
        assert not (kept & ~found).any()
    else:
        assert torch.equal(found, kept)


@given(listed_requests())
@settings(max_examples=40, deadline=None)
def test_visits(request):
    schedule, found = visits_of(request)
    heads, lists = request.q.shape[1], request.blocks.counts.shape[0]
    each = request.blocks.block_rows // TILE.value
    if schedule.rows == 0:
        return
    for number, sequence in enumerate(request.sequences()):
        q, k = request.q[sequence.queries].double(), request.k[sequence.keys].double()
        listed = listed_blocks(request, number)
        looked_at = request if request.plan.keeps_nothing else without_rule(request)
        kept = kept_scores(q, k, looked_at, sequence.first_q, sequence.first_k, listed) > -torch.inf
        blocks = shape_of_lists(request, TILE.value, request.blocks.block_rows)[number][0]
        skew = sequence.first_q // TILE.value - sequence.first_q // request.blocks.block_rows * each
        for head in range(lists):
            for row in range(blocks * each):
                tiles = found.tiles[head, int(request.blocks.starts[number]) * each + row]
                check_item(request, number, row - skew, tiles, kept[head * heads // lists])


@given(listed_requests(), st.integers(1, 6))
@settings(max_examples=15, deadline=None)
def test_items_are_sorted(request, per_wave):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visits_launch, "heads_per_wave", lambda *_: per_wave)
        schedule, found = visits_of(request)
    heads, lists = request.q.shape[1], request.blocks.counts.shape[0]
    each = request.blocks.block_rows // TILE.value
    wave = min(heads, per_wave * (heads // request.k.shape[1]))
    counts = request.blocks.counts.repeat_interleave(heads // lists, 0).repeat_interleave(each, 1)
    for first in range(0, heads, wave):
        items = found.order[first * schedule.rows : (first + wave) * schedule.rows].long()
        expected = torch.arange(first * schedule.rows, min(first + wave, heads) * schedule.rows)
        assert torch.equal(items.sort().values, expected)
        assert (counts.flatten()[items].diff() <= 0).all()


def entries_of(request):
    """Return what the backward visits."""
    options = options_of(request, hopper_backward_launch.SETTINGS)
    tiles = max(1, -(-request.max_k // TILE.value))
    prepared = hopper_backward_launch.Entries(request, tiles, options)
    entries, numbers, starts = prepared(request)
    rows, rows_each, heads_per_list = prepared.of_lists
    return entries[:-1].view(*numbers.shape[:2], rows), numbers, starts * rows_each, heads_per_list


@given(listed_requests())
@settings(max_examples=40, deadline=None)
def test_visits_of_the_backward(request):
    """Each tile of keys is visited by the queries that keep any of its keys, masked where needed, in turns."""
    if request.plan.keeps_nothing:
        return
    entries, numbers, starts, heads_per_list = entries_of(request)
    for number, sequence in enumerate(request.sequences()):
        q, k = request.q[sequence.queries].double(), request.k[sequence.keys].double()
        if q.shape[0] == 0 or k.shape[0] == 0:
            assert not numbers[:, :, number].any()
            continue
        listed = listed_blocks(request, number)
        kept = kept_scores(q, k, without_rule(request), sequence.first_q, sequence.first_k, listed) > -torch.inf
        whole = kept_scores(q, k, without_rule(request)._replace(blocks=None), sequence.first_q)[0] > -torch.inf
        behind = sequence.first_q + torch.arange(q.shape[0])[:, None] - torch.arange(k.shape[0])
        window = k.shape[0] if request.is_decode(q.shape[0]) else request.plan.dense_window_size
        exempt = (torch.arange(k.shape[0]) < request.plan.num_sink_tokens) | ((behind >= 0) & (behind < window))
        before = sequence.first_q % HALF.value
        for head in range(entries.shape[0]):
            ranks = {}
            for tile in range(-(-k.shape[0] // TILE.value)):
                keys = slice(tile * TILE.value, (tile + 1) * TILE.value)
                masked, count = numbers[head, tile, number].tolist()
                assert 0 <= masked <= count
                found = torch.zeros_like(whole[:, keys])
                for place, entry in enumerate(entries[head, tile, starts[number] :][:count].tolist()):
                    row = entry // TILES_FROM.value * HALF.value - before
                    rows = slice(max(0, row), row + HALF.value)
                    unlisted = entry % 2
                    assert not found[rows].any()
                    found[rows] = (whole & exempt)[rows, keys] if unlisted else whole[rows, keys]
                    ranks.setdefault(row, []).append(entry % TILES_FROM.value // 2)
                    if place >= masked:
                        assert not unlisted
                        assert row >= 0
                        assert row + HALF.value <= q.shape[0]
                        assert keys.stop <= k.shape[0]
                        assert whole[rows, keys].all()
                        assert request.plan.keep is None or not (whole & exempt)[rows, keys].any()
                assert torch.equal(found, kept[head * heads_per_list][:, keys])
            assert all(found == list(range(len(found))) for found in ranks.values())


@given(listed_requests(), st.sampled_from([1, 2, 5, 132]))
@settings(max_examples=20, deadline=None)
def test_nobody_waits_for_ever(request, programs):
    """As in test_hopper_backward.py, with lists: whoever takes the next item, a tile of keys or a share of one."""
    if request.plan.keeps_nothing:
        return
    entries, numbers, starts, heads_per_list = entries_of(request)
    kv_heads = request.k.shape[1]
    members = request.q.shape[1] // kv_heads
    heads, tiles = len(starts) * kv_heads, entries.shape[1]
    shares = [(tile, [member]) for tile in range(min(2, tiles)) for member in range(members)]
    shares += [(tile, range(members)) for tile in range(2, tiles)]
    work, random = [[] for _ in range(programs)], Random(programs)
    for (tile, share), item in itertools.product(shares, range(heads)):
        sequence, kv_head = divmod(item, kv_heads)
        steps = []
        for head in (kv_head * members + member for member in share):
            number = head // heads_per_list
            found = entries[number, tile, starts[sequence] :][: numbers[number, tile, sequence, 1]].tolist()
            steps += [((sequence, head, entry // TILES_FROM.value), entry % TILES_FROM.value // 2) for entry in found]
        random.choice(work).extend(steps)
    assert steps_left(work) == 0
