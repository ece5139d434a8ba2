"""Skip-softmax decided by bounds of INT8 products, on a GPU: every decision, and the contract against the oracle."""

import dataclasses
import math

import pytest
import torch
from block_cases import log_thresholds
from cases import check_in_a_graph, packed_request
from test_gpu import check, poison, run

from modelopt_lite.kernels import AttentionRequest, select_blocks
from modelopt_lite.kernels.blocks import BlockGrid
from modelopt_lite.kernels.hopper import bounds
from modelopt_lite.kernels.selection import _excess
from modelopt_lite.methods import FlashPrefill, MeanPoolTopK
from modelopt_lite.plan import AttentionPlan, LengthCurve, SkipRule

__all__ = ["poison"]
pytestmark = pytest.mark.gpu

# Lengths around block borders, 0 and 1 among them: (queries, keys) of each sequence.
LENGTHS = ((600, 600), (1, 1), (0, 0), (129, 1000), (1, 300), (64, 129), (0, 5), (300, 391))
PLANS = {
    "sinks": AttentionPlan(skip=SkipRule(0.5), num_sink_tokens=4),
    "neither": AttentionPlan(skip=SkipRule(1.5)),
    "window": AttentionPlan(skip=SkipRule(1.0), num_sink_tokens=3, dense_window_size=200),
    "many exempt": AttentionPlan(skip=SkipRule(2.0), num_sink_tokens=200, dense_window_size=64),
    "nothing skipped": AttentionPlan(skip=SkipRule(1e-30), num_sink_tokens=4),
    "everything skipped": AttentionPlan(skip=SkipRule(1e30), num_sink_tokens=4),
    "curve": AttentionPlan(skip=SkipRule(LengthCurve((128.0, 1000.0), (-0.5, 0.5))), num_sink_tokens=4),
    "decode": AttentionPlan(skip=SkipRule(1.0, decode_threshold=0.9), num_sink_tokens=4, sparse_decode=True),
    "selector": dataclasses.replace(
        MeanPoolTopK(keep=0.6).plan(), skip=SkipRule(0.7), num_sink_tokens=4, dense_window_size=30
    ),
    "shared selector": dataclasses.replace(FlashPrefill(alpha=0.2, per_kv_head=True).plan(), skip=SkipRule(0.7)),
}


@pytest.fixture(autouse=True)
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


def make(plan="sinks", lengths=LENGTHS, exact=True, **options):
    """Make a request. Unless it is exact, all queries attend to the sinks, and every other key block matters little."""
    request = packed_request(lengths=lengths, plan=PLANS[plan], exact=exact, **{"dims": (128, 128), **options})
    if not exact:
        for sequence in request.sequences():
            q, k = request.q[sequence.queries], request.k[sequence.keys]
            q[..., 0] = 4.0
            k[torch.arange(k.shape[0], device=k.device) // 128 % 2 == 1] *= 0.05
            k[:4, :, 0] = 12.0
    assert bounds.refusal(BlockGrid(request, *request.grid)) is None
    return request


def kept_and_expected(request):
    """Decisions, what FP64 scores say, and where these are not near ties."""
    grid = BlockGrid(request, *request.grid)
    double = BlockGrid(request._replace(q=request.q.double(), k=request.k.double()), *request.grid)
    seen, margins = grid.seen(), log_thresholds(grid)
    found = bounds.kept_blocks(grid, None, margins)[:, seen]
    excess = _excess(double.request, double, seen, seen.expand(request.q.shape[1], *seen.shape))
    difference = (excess - margins[:, None].double())[:, seen]
    norms = (x.double().nan_to_num().norm(dim=-1).max() for x in (request.q, request.k))
    # A sum of 128 products in FP32 is off by up to 128 * 2^-24, about 1e-5, of the product of the norms.
    rounding = 1e-5 * math.prod(norms) * request.softmax_scale
    return found, (difference >= 0) | (difference == -torch.inf), difference.abs() > rounding


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("plan", [name for name in PLANS if "selector" not in name])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decisions(plan, exact, dtype):
    """They are those of FP64 scores, except near ties."""
    found, expected, is_clear = kept_and_expected(make(plan, exact=exact, dtype=dtype))
    assert torch.equal(found[is_clear], expected[is_clear])
    assert is_clear.float().mean() > 0.9


@pytest.mark.parametrize("factor", [0.0, 1e-20, 1e4, 1e30])
def test_decisions_on_numbers_of_any_size(factor):
    request = make(lengths=((900, 900),), exact=False)
    q = request.q.clone()
    q[3:-2] *= factor
    found, expected, is_clear = kept_and_expected(request._replace(q=q))
    assert torch.equal(found[is_clear], expected[is_clear])


def test_decisions_on_equal_keys():
    request = make(lengths=((900, 900),), exact=False)
    k = request.k.clone()
    k[3:-2] = k[3]
    found, expected, _ = kept_and_expected(request._replace(k=k))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("plan", PLANS)
def test_plans(plan, exact):
    check(make(plan, exact=exact))


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)])
def test_heads_and_learnable_sinks(heads):
    check(make(heads=heads, s_aux=True))


def test_long_sequences():
    """More items than multiprocessors, of very different lengths, and from run to run the same."""
    request = make(lengths=((3000, 3000), (1, 2000), (700, 2500)), heads=(8, 2), exact=False)
    check(request)
    first = run(request)
    for _ in range(10):
        assert all(torch.equal(x, y) for x, y in zip(first, run(request), strict=True))


@pytest.mark.parametrize("towards", ["later", "earlier"])
def test_scores_far_apart(towards):
    """Scores jump by far more than an exponential holds, so that items are computed twice."""
    request = make(lengths=((900, 900),))
    ramp = torch.arange(request.k.shape[0], device="cuda") // 150
    ramp = ramp if towards == "later" else ramp.flip(0)
    request.q[3:-2, :, 0], request.k[..., 0] = 16.0, (ramp[:, None] * 128).to(request.k.dtype)
    check(request)


def test_exact_products_say_the_same(monkeypatch):
    """At a given threshold really some of the blocks, of more than a word."""
    request = make(lengths=((6000, 6000),), exact=False)
    listed = select_blocks(request)
    share = listed.counts.sum().item() / (request.q.shape[1] * 47 * 48 / 2)
    assert 0.2 < share < 0.9
    monkeypatch.setattr(bounds, "refusal", lambda grid: "exact")
    assert (listed.mask() != select_blocks(request).mask()).float().mean() < 1e-3


def test_what_belongs_to_no_sequence_may_be_anything():
    """Around the queries, whose blocks they share, and behind the keys."""
    request = make("window", exact=False)
    expected = run(request)
    for value in (torch.inf, -torch.inf):
        q, k, v = (x.nan_to_num(nan=value) for x in (request.q, request.k, request.v))
        found = run(request._replace(q=q, k=k, v=v))
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_batch_mates_and_chunks_do_not_matter():
    request = make(lengths=((500, 500), (300, 300)), exact=False)
    together = run(request)[0]
    for number, sequence in enumerate(request.sequences()):
        for cut in (0, 128, 256):
            rows = slice(sequence.queries.start + cut, sequence.queries.stop)
            alone = request._replace(
                starts_q=torch.full_like(request.starts_q[:1], rows.start),
                lengths_q=torch.full_like(request.starts_q[:1], rows.stop - rows.start),
                max_q=rows.stop - rows.start,
                starts_k=request.starts_k[number : number + 1],
                lengths_k=request.lengths_k[number : number + 1],
            )
            assert torch.equal(run(alone)[0][rows], together[rows])


def test_cuda_graph():
    check_in_a_graph(run, make(exact=False))


def test_strides():
    request = make("window")
    expected = run(request)
    apart = AttentionRequest(*(torch.cat([x, x], 1)[:, : x.shape[1]] for x in request[:3]), *request[3:])
    assert all(torch.equal(x, y) for x, y in zip(run(apart), expected, strict=True))
