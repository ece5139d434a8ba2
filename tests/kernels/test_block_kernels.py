"""The Triton kernels that score and choose key blocks against their PyTorch forms and FP64 references."""

import dataclasses
import os

import pytest
import torch
from block_cases import requests
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from modelopt_lite.kernels import block_launch, block_scores
from modelopt_lite.kernels.blocks import BlockGrid, KeyBlocks
from modelopt_lite.kernels.reference import SequenceBlocks
from modelopt_lite.kernels.selection import select_blocks
from modelopt_lite.plan import DENSE, AttentionPlan, BlockSelector, SkipRule

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]
some_cases = settings(max_examples=15, deadline=None)
GRIDS = st.sampled_from([(16, 16), (16, 32), (32, 32), (32, 64)])
FP32 = {"rtol": 1e-5, "atol": 1e-5}


@st.composite
def grids(draw):
    """Draw the grid of a ragged batch with scores that are not all exact, in FP32 or FP16."""
    request = draw(requests(longest=70))
    noise = torch.randn(request.q.shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    request = request._replace(q=request.q + noise)
    if draw(st.booleans()):
        request = request._replace(q=request.q.half(), k=request.k.half())
    grid = BlockGrid(request, *draw(GRIDS))
    assume(0 not in grid.shape)
    return grid


def check_where_seen(found, expected, grid):
    seen = grid.seen()
    torch.testing.assert_close(found[:, seen], expected[:, seen], **FP32)


@given(grids())
@some_cases
def test_means(grid):
    torch.testing.assert_close(block_launch.mean_keys(grid), grid.mean_keys(), **FP32)
    torch.testing.assert_close(block_launch.mean_queries(grid), block_scores.mean_queries(grid), **FP32)


@given(requests(longest=70), GRIDS, st.integers(0, 3), st.integers(0, 3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_tables_and_marks(request, sizes, first_blocks, recent_blocks, sparse_decode):
    request = request._replace(plan=dataclasses.replace(DENSE, sparse_decode=sparse_decode))
    grid = BlockGrid(request, *sizes)
    for name, found in block_launch.grid_tables(grid)._asdict().items():
        expected = getattr(grid, name)
        assert found.dtype == expected.dtype, name
        assert torch.equal(found, expected), name
    found = block_launch.marked(grid, first_blocks, recent_blocks)
    for one, other in zip(found, grid.marked(first_blocks, recent_blocks), strict=True):
        assert torch.equal(one, other)


@given(grids())
@some_cases
def test_mean_scores(grid):
    check_where_seen(block_launch.mean_scores(grid), block_scores.mean_scores(grid), grid)


@given(grids())
@some_cases
def test_softmax_mass(grid):
    pooled = grid.mean_keys()
    check_where_seen(block_launch.softmax_mass(grid, pooled), block_scores.softmax_mass(grid, pooled), grid)
    with pytest.raises(ValueError, match="pooled"):
        block_scores.softmax_mass(grid, pooled[..., :1])


@given(grids(), st.sampled_from([4, 8, 16]))
@some_cases
def test_antidiagonal_mass(grid, stride):
    found = block_launch.antidiagonal_mass(grid, stride)
    check_where_seen(found, block_scores.antidiagonal_mass(grid, stride), grid)


@given(grids(), st.sampled_from([4, 16]))
@settings(max_examples=8, deadline=None)
def test_antidiagonal_mass_in_parts(grid, stride):
    """How many query blocks are scored together does not matter."""
    found = block_launch.antidiagonal_mass(grid, stride)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_launch, "PARTIAL_BYTES", 1)
        assert_same_where_seen(block_launch.antidiagonal_mass(grid, stride), found, grid)


def assert_same_where_seen(a, b, grid):
    seen = grid.seen()
    assert torch.equal(a[:, seen], b[:, seen])


@st.composite
def skipping(draw):
    """Draw a call with a skip rule whose threshold no score meets, alone or behind a selector of blocks."""
    size, rows = draw(GRIDS)
    selector = None
    if draw(st.booleans()):
        share = draw(st.sampled_from([0.3, 0.7]))
        selector = BlockSelector(last_keys, lambda scores, seen, forced: scores >= -share, None, size, rows)
    rule = SkipRule(draw(st.sampled_from([0.01, 0.2, 0.7, 0.95])), size, rows, draw(st.sampled_from([None, 0.3])))
    plan = AttentionPlan(
        skip=rule, blocks=selector, num_sink_tokens=draw(st.sampled_from([0, 0, 3, 17])),
        dense_window_size=draw(st.sampled_from([0, 0, 1, 16, 40])), sparse_decode=draw(st.booleans()),
    )  # fmt: skip
    request = draw(requests(longest=100, batch=2, plan=plan))
    if draw(st.booleans()):
        request = request._replace(q=request.q.half(), k=request.k.half())
    return request


def last_keys(view):
    """Score a block by a number that depends on its place alone, from -1 to 0."""
    rows, columns = (x.shape[0] for x in (view.queries_in(view.request.grid[1]), view.keys_in(view.request.grid[0])))
    place = torch.arange(rows * columns).view(rows, columns) * 7 % 11 / 11 - 1.0
    return place.expand(view.q.shape[1], rows, columns)


@given(skipping())
@some_cases
def test_skipped_blocks(request):
    """Scores are exact, and so is every decision."""
    assume(0 not in BlockGrid(request, *request.grid).shape)
    expected, grid = select_blocks(request), BlockGrid(request, *request.grid)
    assert block_launch.excess_refusal(grid) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_launch, "runs_on", lambda x: True)
        found = select_blocks(request)
    assert torch.equal(found.mask(), expected.mask())


@given(skipping())
@settings(max_examples=8, deadline=None)
def test_excess(request):
    """The excess is that of FP64 scores."""
    request = request._replace(plan=dataclasses.replace(request.plan, blocks=None))
    noise = torch.randn(request.q.shape, generator=torch.Generator().manual_seed(1))
    request = request._replace(q=request.q + noise.to(request.q.dtype))
    grid = BlockGrid(request, *request.grid)
    assume(0 not in grid.shape)
    found, (size, rows) = block_launch.excess(grid), request.grid
    for number, sequence in enumerate(request.sequences()):
        view = SequenceBlocks.of(request, sequence)
        if 0 in view.visible.shape:
            continue
        behind = view.q_pos[:, None] - view.k_pos
        is_exempt = (view.k_pos < request.plan.num_sink_tokens) | (
            (behind >= 0) & (behind < request.plan.dense_window_size)
        )
        is_spared = is_exempt | (view.q_pos[:, None] // rows == view.k_pos // rows)
        scores = view.scores(view.q, view.k).masked_fill(~view.visible, -torch.inf)
        reference = scores.masked_fill(~is_spared, -torch.inf).amax(-1, keepdim=True)
        others = scores.masked_fill(is_spared, -torch.inf)
        excess = torch.where(others > -torch.inf, others - reference, -torch.inf)
        seen = view.queries_in(rows) @ view.visible.double() @ view.keys_in(size).T > 0
        for i, j in seen.nonzero().tolist():
            here = excess[:, view.queries_in(rows)[i] > 0][:, :, view.keys_in(size)[j] > 0].amax((1, 2))
            torch.testing.assert_close(
                found[:, int(grid.starts[number]) + i, j].double(), here, rtol=1e-5, atol=1e-5
            )  # fmt: skip


@st.composite
def scored(draw, signed):
    """Draw scores of which many are equal, what is seen and what is forced."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    heads, rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 70))
    distinct = draw(st.sampled_from([2, 5, 1000]))
    scores = torch.randint(-distinct if signed else 0, distinct + 1, (heads, rows, columns), generator=generator) / 8
    if signed:
        scores[scores == 0] *= draw(st.sampled_from([1.0, -1.0]))  # zeros of both signs
    seen = torch.rand(rows, columns, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    forced = (torch.rand(rows, columns, generator=generator) < draw(st.sampled_from([0.0, 0.2, 1.0]))) & seen
    scores = scores.masked_fill(~seen, torch.nan)
    share = draw(st.sampled_from([0.0, 0.1, 0.25, 0.7, 1.0]))
    if draw(st.booleans()):
        share = torch.rand(rows, 1, generator=generator, dtype=torch.float64)
    return scores, seen, forced, share


def check_lists(rule, found, scores, seen, forced, number):
    """The lists of a choice are those of the mask that it makes."""
    counts, indices = block_launch.listed_choice(scores, seen, forced, rule, number)
    expected = KeyBlocks.from_mask((found & seen) | forced, torch.zeros(1), 16, 16)
    assert torch.equal(counts, expected.counts)
    assert torch.equal(indices, expected.indices)


@given(scored(signed=False))
@settings(max_examples=60, deadline=None)
def test_heaviest_blocks(case):
    """Masses are eighths and shares FP64, so that every decision is exact, ties among them."""
    scores, seen, forced, share = case
    found = block_launch.chosen(scores, seen, forced, "heaviest", share)
    expected = block_scores.heaviest_blocks(scores.double(), seen, forced, share)
    assert torch.equal((found | forced) & seen, (expected | forced) & seen)
    check_lists("heaviest", found, *case)


@given(scored(signed=True))
@settings(max_examples=60, deadline=None)
def test_largest_blocks(case):
    scores, seen, forced, share = case
    found = block_launch.chosen(scores, seen, forced, "largest", share)
    expected = block_scores.largest_blocks(scores.double(), seen, forced, share)
    assert torch.equal((found | forced) & seen, (expected | forced) & seen)
    check_lists("largest", found, *case)


@given(scored(signed=False))
@settings(max_examples=60, deadline=None)
def test_blocks_above(case):
    scores, seen, _, fraction = case
    found = block_launch.chosen(scores, seen, None, "above", fraction)
    if isinstance(fraction, torch.Tensor):
        fraction = fraction.float()
    assert torch.equal(found & seen, block_scores.blocks_above(scores, seen, fraction) & seen)
    check_lists("above", found, *case)


@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 1100), st.sampled_from([0.0, 0.3, 1.0]), st.booleans())
@settings(max_examples=20, deadline=None)
def test_lists(heads, rows, columns, share, has_marks):
    mask = torch.rand(heads, rows, columns) < share
    seen, forced = torch.rand(rows, columns) < 0.8, torch.rand(rows, columns) < 0.1
    marks = (seen, forced & seen) if has_marks else ()
    counts, indices = block_launch.listed(mask, *marks)
    kept = (mask & seen) | (forced & seen) if has_marks else mask
    expected = KeyBlocks.from_mask(kept, torch.zeros(1), 16, 16)
    assert torch.equal(counts, expected.counts)
    assert torch.equal(indices, expected.indices)
