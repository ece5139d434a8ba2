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
from modelopt_lite.plan import DENSE

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
    for name, found in block_launch.grid_tables(request, *sizes)._asdict().items():
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


@given(scored(signed=False))
@settings(max_examples=60, deadline=None)
def test_heaviest_blocks(case):
    """Masses are eighths and shares FP64, so that every decision is exact, ties among them."""
    scores, seen, forced, share = case
    found = block_launch.largest(scores, seen, forced, share, by_mass=True)
    expected = block_scores.heaviest_blocks(scores.double(), seen, forced, share)
    assert torch.equal((found | forced) & seen, (expected | forced) & seen)


@given(scored(signed=True))
@settings(max_examples=60, deadline=None)
def test_largest_blocks(case):
    scores, seen, forced, share = case
    found = block_launch.largest(scores, seen, forced, share, by_mass=False)
    expected = block_scores.largest_blocks(scores.double(), seen, forced, share)
    assert torch.equal((found | forced) & seen, (expected | forced) & seen)


@given(scored(signed=False))
@settings(max_examples=60, deadline=None)
def test_blocks_above(case):
    scores, seen, _, fraction = case
    found = block_launch.above(scores, seen, fraction)
    if isinstance(fraction, torch.Tensor):
        fraction = fraction.float()
    assert torch.equal(found & seen, block_scores.blocks_above(scores, seen, fraction) & seen)


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
