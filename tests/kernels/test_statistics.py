"""What is counted of attention calls, by the kernel and in samples of their queries, against the oracle."""

import dataclasses
import os

import pytest
import torch
from block_cases import assert_same_counts, counts_by_oracle, requests, with_lists
from cases import one_sequence
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_blocks import selectors, skipping
from test_lists_interpreter import plans

from modelopt_lite.kernels import select_blocks, statistics_launch
from modelopt_lite.kernels.blocks import BlockGrid
from modelopt_lite.kernels.settings import Settings
from modelopt_lite.kernels.statistics import COUNTS, count, sample, sample_interval
from modelopt_lite.methods import SinkWindow
from modelopt_lite.plan import DENSE, SkipRule

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
SIZES = st.sampled_from([(16, 16), (32, 16), (16, 32)])


def check_kernel(request, sizes, parts=1):
    tiles = Settings(*sizes, num_warps=4, num_stages=1, descriptors=False, frozen=False)
    run = statistics_launch.prepare(request, tiles, parts)
    counts = run(request)
    assert_same_counts(counts, counts_by_oracle(request))
    assert_same_counts(counts, count(request))
    assert_same_counts(run(request, 3 * counts), 4 * counts)


@interpreted
@pytest.mark.usefixtures("poison")
@given(plans().flatmap(lambda plan: requests(longest=60, batch=2, plan=plan)), SIZES, st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_kernel(request, sizes, parts):
    check_kernel(request, sizes, parts)


@interpreted
@pytest.mark.usefixtures("poison")
@given(plans().flatmap(lambda plan: with_lists(longest=60, batch=2, plan=plan)), SIZES, st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_kernel_with_lists(request, sizes, parts):
    check_kernel(request, sizes, parts)


@interpreted
@pytest.mark.usefixtures("poison")
@given(requests(longest=60, batch=2, plan=SinkWindow(num_sink_tokens=5, dense_window_size=7).plan()), SIZES)
@settings(max_examples=10, deadline=None)
def test_kernel_with_a_rule_that_keeps_nothing(request, sizes):
    check_kernel(request, sizes)


def sampled_rows(request, every):
    """Return which of the packed queries are in the sample, key by key."""
    rows, found = request.grid[1], torch.zeros(request.q.shape[0], dtype=torch.bool)
    for sequence in request.sequences():
        number = sequence.queries.stop - sequence.queries.start
        of_block = [(sequence.first_q + i) // rows for i in range(number)]
        for i, block in enumerate(of_block):
            found[sequence.queries.start + i] = block % every == every // 2 and of_block.count(block) > 1
    return found


@given(
    st.one_of(plans(), selectors().flatmap(skipping), selectors().map(lambda x: dataclasses.replace(DENSE, blocks=x))),
    st.integers(2, 4),
    st.booleans(),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_sample(plan, every, has_lists, data):
    """A sample keeps what the whole call keeps of the same queries, with lists and without."""
    request = data.draw(requests(plan=plan, longest=130, causal=True))._replace(first_q=None)
    assume(min(request.max_q, request.q.shape[0]) > 0)
    if not plan.chooses_blocks:
        request = request._replace(plan=dataclasses.replace(plan, sparse_decode=False))
    if plan.chooses_blocks and has_lists:
        request = request._replace(blocks=select_blocks(request))
    counted = sampled_rows(request, every)
    sampled = sample(request, every)
    sampled.check_values()
    found = count(sampled._replace(v=request.k))
    assert_same_counts(found, counts_by_oracle(request, counted))
    if plan.chooses_blocks:
        grid, lists = BlockGrid(request, *request.grid), select_blocks(request._replace(blocks=None))
        rows = counted[(grid.row_q[grid.sequence] + grid.low_q).clamp(0, len(counted) - 1)] & (
            grid.low_q <= grid.high_q
        )
        heads = request.q.shape[1]
        assert bool((found[:, COUNTS.index("blocks")] == grid.seen()[rows].sum()).all())
        visited = lists.counts[:, rows].sum(1).repeat_interleave(heads // len(lists.counts))
        assert torch.equal(found[:, COUNTS.index("blocks_visited")].long(), visited)


def check_sample(request, sizes, parts, every):
    """The kernel finds a sample as PyTorch operations do; or of every 1, all sequences with several queries."""
    assume(request.first_q is None)
    tiles = Settings(*sizes, num_warps=4, num_stages=1, descriptors=False, frozen=False)
    run = statistics_launch.prepare(request, tiles, parts, every=every, is_prefill=True)
    lengths = request.lengths_q
    if every == 1:
        expected = count(request._replace(lengths_q=lengths.masked_fill(lengths == 1, 0)))
    else:
        assume(min(request.max_q, request.q.shape[0]) > 0)
        expected = count(sample(request, every)._replace(v=request.k)) * every
    assert_same_counts(run(request), expected)


CAUSAL = {"longest": 100, "batch": 3, "causal": True}


@interpreted
@pytest.mark.usefixtures("poison")
@given(plans().flatmap(lambda plan: with_lists(plan=plan, **CAUSAL)), SIZES, st.integers(1, 3), st.integers(0, 2))
@settings(max_examples=25, deadline=None)
def test_kernel_samples_lists(request, sizes, parts, exponent):
    check_sample(request, sizes, parts, 1 << exponent)


@interpreted
@pytest.mark.usefixtures("poison")
@given(plans().flatmap(lambda plan: requests(plan=plan, **CAUSAL | {"longest": 300})), st.sampled_from([1, 2]))
@settings(max_examples=8, deadline=None)
def test_kernel_samples(request, every):
    check_sample(request, (64, 32), 2, every)


@st.composite
def skip_plans(draw):
    """A plan with a skip rule alone, whose threshold no exact score meets."""
    size = draw(st.sampled_from([16, 32]))
    rule = SkipRule(draw(st.sampled_from([0.01, 0.2, 0.7])), size, size, draw(st.none() | st.just(0.3)))
    sinks, window = draw(st.integers(0, 20)), draw(st.sampled_from([0, 1, 3, 16, 40]))
    return dataclasses.replace(
        DENSE, skip=rule, num_sink_tokens=sinks, dense_window_size=window, sparse_decode=draw(st.booleans())
    )


@interpreted
@pytest.mark.usefixtures("poison")
@given(skip_plans().flatmap(lambda plan: requests(plan=plan, **CAUSAL)), SIZES, st.integers(1, 3), st.integers(0, 2))
@settings(max_examples=25, deadline=None)
def test_kernel_with_a_skip_rule(request, sizes, parts, exponent):
    """What is not in the lists that a skip rule alone has made was skipped."""
    listed = request._replace(blocks=select_blocks(request))
    tiles = Settings(*sizes, num_warps=4, num_stages=1, descriptors=False, frozen=False)
    found = statistics_launch.prepare(listed, tiles, parts)(listed)
    assert_same_counts(found, counts_by_oracle(request))
    assert_same_counts(found, count(request))
    assert_same_counts(found, count(listed))
    check_sample(listed, sizes, parts, 1 << exponent)


def test_states_take_as_much_as_the_queries():
    """One long sequence among many short ones needs no room for as many long ones."""
    q = torch.zeros(131_072 + 255, 1, 8)
    lengths = torch.tensor([131_072] + 255 * [1])
    request = one_sequence(q, q, q)._replace(
        starts_q=lengths.cumsum(0) - lengths, lengths_q=lengths, starts_k=lengths.cumsum(0) - lengths, lengths_k=lengths
    )
    assert statistics_launch._most_tiles(request, 1, 64) < 131_072 / 64 + 2 * 256
    assert statistics_launch._most_tiles(request, 256, 128) < 4 + 2 * 256


def test_sample_interval():
    q = torch.zeros(40_000, 1, 8)
    request = one_sequence(q, q, q)
    lengths = {1: 1, 1920: 1, 1921: 4, 2048: 4, 3968: 4, 3969: 8, 8192: 16, 32768: 64}
    assert {n: sample_interval(request._replace(max_q=n, max_k=n)) for n in lengths} == lengths
    chunks = {2: 1, 128: 1, 129: 2, 512: 4, 700: 4, 4096: 32, 8192: 64}
    assert {n: sample_interval(request._replace(max_q=n, max_k=32768)) for n in chunks} == chunks
    for changes in ({"is_causal": False}, {"first_q": torch.tensor([0])}):
        assert sample_interval(request._replace(max_k=8192, **changes)) == 1


@pytest.mark.parametrize("length", [5000, 20_000, 32_768])
@pytest.mark.parametrize("chunk", [128, 200, 512, 2048, 32_768])
def test_chunks_are_sampled_evenly(length, chunk):
    """A prompt in chunks sees about as many scores by its samples as it does."""
    k = torch.zeros(length, 1, 8)
    estimate = 0
    for end in range(chunk, length + chunk, chunk):
        end = min(end, length)
        q = torch.zeros(end % chunk or chunk, 1, 8)
        request = one_sequence(q, k[:end], k[:end])
        every = sample_interval(request)
        taken = sample(request, every) if every > 1 else request
        last = taken.lengths_k.long()
        first = last - taken.lengths_q
        scores = int((last * (last + 1) - first * (first + 1)).sum()) // 2
        assert scores > 0 or len(q) == 1
        estimate += every * scores
    assert estimate == pytest.approx(length * (length + 1) / 2, rel=0.08)
