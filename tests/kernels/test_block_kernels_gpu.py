"""The kernels that score and choose key blocks on a GPU, in every precision, against PyTorch operations in FP64."""

import pytest
import torch
from block_cases import assert_same_counts
from cases import packed_request

from modelopt_lite.kernels import (
    block_launch,
    block_scores,
    count_kept,
    count_prefill,
    statistics,
    statistics_launch,
    with_lists,
)
from modelopt_lite.kernels.blocks import BlockGrid, KeyBlocks
from modelopt_lite.kernels.selection import _excess, select_blocks
from modelopt_lite.methods import (
    Combined,
    FlashPrefill,
    MeanPoolTopK,
    SinkWindow,
    SkipSoftmax,
    SparseSoftmax,
    XAttention,
)
from modelopt_lite.plan import AttentionPlan, SkipRule

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")]


DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 130}, {"softcap": 5.0}, {"is_causal": False}], ids=str)
@pytest.mark.parametrize("grid_size", [(128, 128), (16, 64)])
def test_scores(dtype, options, grid_size):
    request = packed_request(heads=(4, 2), dims=(64, 64), dtype=dtype, exact=False, **options)
    grid = BlockGrid(request, *grid_size)
    exact = BlockGrid(request._replace(q=request.q.double(), k=request.k.double()), *grid_size)
    assert block_launch.refusal(grid) is None
    seen, forced = grid.marked(1, 2)
    assert torch.equal(seen, grid.seen())
    on_cpu = BlockGrid(_on_cpu(request), *grid_size)
    assert all(torch.equal(x.cpu(), y) for x, y in zip((seen, forced), on_cpu.marked(1, 2), strict=True))
    # Pooled keys have 16 bits in the products with BF16.
    tolerance = {"rtol": 2e-4, "atol": 1e-4} if dtype == torch.bfloat16 else {"rtol": 2e-5, "atol": 2e-5}
    mass = block_scores.softmax_mass(grid, block_scores.mean_keys(grid))
    expected = block_scores.softmax_mass(exact, exact.mean_keys())
    torch.testing.assert_close(mass[:, seen].double(), expected[:, seen], **tolerance)
    scores, expected = block_scores.mean_scores(grid), block_scores.mean_scores(exact)
    torch.testing.assert_close(scores[:, seen].double(), expected[:, seen], rtol=2e-5, atol=2e-5)
    for stride in (4, 16):
        mass = block_scores.antidiagonal_mass(grid, stride)
        expected = block_scores.antidiagonal_mass(exact, stride)
        torch.testing.assert_close(mass[:, seen].double(), expected[:, seen], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 300}, {"softcap": 5.0}, {"is_causal": False}], ids=str)
@pytest.mark.parametrize(("size", "rows", "dim"), [(128, 128, 128), (128, 128, 64), (16, 64, 80)])
def test_skipped_blocks(dtype, options, size, rows, dim):
    """Scores are exact, and so is every decision."""
    plan = AttentionPlan(skip=SkipRule(2.0, size, rows), num_sink_tokens=3, dense_window_size=20)
    lengths = ((1100, 1100), (1, 1), (63, 63), (130, 700), (1, 300), (64, 129), (0, 5))
    request = packed_request(lengths, heads=(4, 2), dims=(dim, dim), dtype=dtype, plan=plan, **options)
    assert block_launch.excess_refusal(BlockGrid(request, size, rows)) is None
    found = select_blocks(request).mask()
    expected = select_blocks(request._replace(q=request.q.double(), k=request.k.double())).mask()
    assert torch.equal(found, expected)
    assert 0 < found.sum() < BlockGrid(request, size, rows).seen().sum() * len(found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 300}, {"softcap": 5.0}, {"is_causal": False}], ids=str)
@pytest.mark.parametrize(("size", "rows", "dim"), [(128, 128, 128), (128, 128, 64), (32, 64, 80)])
def test_excess(dtype, options, size, rows, dim):
    """The excess is that of FP64 scores."""
    plan = AttentionPlan(skip=SkipRule(2.0, size, rows), num_sink_tokens=3, dense_window_size=20)
    request = packed_request(heads=(4, 2), dims=(dim, dim), dtype=dtype, plan=plan, exact=False, **options)
    request = request._replace(q=request.q * 3)
    grid = BlockGrid(request, size, rows)
    double = BlockGrid(request._replace(q=request.q.double(), k=request.k.double()), size, rows)
    seen, found = grid.seen(), block_launch.excess(grid)
    expected = _excess(double.request, double, seen, seen.expand(4, *seen.shape))
    torch.testing.assert_close(found[:, seen].double(), expected[:, seen], rtol=1e-5, atol=1e-4)


def above(scores, seen, forced, fraction):
    return block_scores.blocks_above(scores, seen, fraction)


def _on_cpu(request):
    return request._replace(**{name: x.cpu() for name, x in request._asdict().items() if isinstance(x, torch.Tensor)})


@pytest.mark.parametrize("columns", [1, 70, 1000, 9000])
def test_choices_and_lists(columns):
    """Masses are eighths, so that every decision is exact, and many of them equal."""
    generator = torch.Generator("cuda").manual_seed(0)
    scores = torch.randint(0, 9, (3, 5, columns), device="cuda", generator=generator) / 8
    seen = torch.rand(5, columns, device="cuda", generator=generator) < 0.8
    forced = (torch.rand(5, columns, device="cuda", generator=generator) < 0.1) & seen
    for choose in (block_scores.heaviest_blocks, block_scores.largest_blocks, above):
        for share in (0.0, 0.25, 0.9, torch.rand(5, 1, device="cuda", generator=generator, dtype=torch.float64)):
            found, expected = (choose(x, seen, forced, share) for x in (scores, scores.double()))
            assert torch.equal((found | forced) & seen, (expected | forced) & seen)
    starts = torch.zeros(1, device="cuda", dtype=torch.int64)
    found, expected = (KeyBlocks.from_mask(x, starts, 16, 16) for x in (seen[None], seen[None].cpu()))
    assert torch.equal(found.counts.cpu(), expected.counts)
    assert torch.equal(found.indices.cpu(), expected.indices)


@pytest.mark.parametrize("method", [FlashPrefill(), XAttention(), MeanPoolTopK()], ids=lambda method: method.method)
def test_selection_does_not_wait_for_the_gpu(method, monkeypatch):
    request = packed_request(heads=(4, 2), dims=(64, 64), dtype=torch.bfloat16, exact=False, plan=method.shared_plan())
    select_blocks(request)  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = select_blocks(request)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    again = select_blocks(request)
    assert all(torch.equal(a, b) for a, b in zip(found[:3], again[:3], strict=True))
    monkeypatch.setattr(block_launch, "runs_on", lambda x: False)
    monkeypatch.setattr(block_scores, "_runs_kernels", lambda grid: False)
    by_torch = select_blocks(request).mask()
    assert (found.mask() != by_torch).float().mean() < 0.01  # near ties alone


@pytest.mark.parametrize("shortest_part", [16, statistics_launch.SHORTEST_PART])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "method",
    [
        MeanPoolTopK(dense_window_size=70, num_sink_tokens=3),
        SinkWindow(dense_window_size=70),
        SparseSoftmax(num_sink_tokens=3, dense_window_size=70),
        SparseSoftmax(sparsity_n=8, sparsity_m=16, dense_window_size=0),
        SkipSoftmax(threshold=0.3),
        Combined(methods=(FlashPrefill(alpha=0.9), SparseSoftmax(dense_window_size=70))),
    ],
    ids=lambda method: method.method,
)
def test_statistics(method, dtype, shortest_part, monkeypatch):
    """The kernel counts what PyTorch operations count, of whole calls and of samples, and waits for no GPU."""
    monkeypatch.setattr(statistics_launch, "_prepared", {})
    monkeypatch.setattr(statistics_launch, "SHORTEST_PART", shortest_part)
    request = packed_request(heads=(4, 2), dims=(128, 128), dtype=dtype, exact=True, plan=method.shared_plan())
    request = request._replace(v=request.k)
    monkeypatch.setattr(statistics, "SAMPLED_BLOCKS", 2)
    monkeypatch.setattr(statistics, "WHOLE_BLOCKS", 4)

    def count():
        listed = with_lists(request)
        sampled, times = count_prefill(listed, is_exact=False)
        assert times > 1
        exact = count_prefill(listed, is_exact=True)[0]
        twice = count_prefill(listed, exact.clone(), is_exact=True)[0]
        return count_kept(request), sampled, exact, twice

    count()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = count()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, found, count()))
    monkeypatch.setattr(statistics, "_kernel", lambda *_, **__: None)
    for x, y in zip(found, count(), strict=True):
        assert_same_counts(x, y)
