"""The Hopper kernels with lists of key blocks on a GPU: the whole contract against the oracle."""

import dataclasses
import os

import pytest
import torch
from block_cases import shape_of_lists
from cases import check_in_a_graph
from cases import packed_request as make
from test_gpu import check, poison, run

from modelopt_lite.kernels import AttentionRequest, KeyBlocks
from modelopt_lite.kernels.choice import choose
from modelopt_lite.kernels.hopper import sparse_cores
from modelopt_lite.kernels.top_n import top_n_plan
from modelopt_lite.methods import SinkWindow
from modelopt_lite.plan import DENSE

__all__ = ["poison"]
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("pinned")]

BF16, FP16 = torch.bfloat16, torch.float16
# Lengths around block borders, 0 and 1 among them: (queries, keys) of each sequence.
LENGTHS = ((600, 600), (1, 1), (0, 0), (129, 1000), (1, 300), (64, 129), (0, 5), (300, 391))
PLANS = {
    "dense": DENSE,
    "exempt": dataclasses.replace(DENSE, num_sink_tokens=4, dense_window_size=64),
    "2:4": top_n_plan(2, 4, 0, 0),
    "2:4 exempt": top_n_plan(2, 4, 3, 70),
    "4:8 exempt": top_n_plan(4, 8, 0, 64),
    "4:8": top_n_plan(4, 8, 0, 0),
    "8:16": top_n_plan(8, 16, 2, 64),
    "nothing": SinkWindow(num_sink_tokens=130, dense_window_size=17).plan(),
    "sparse decode": dataclasses.replace(top_n_plan(2, 4, 1, 3), sparse_decode=True),
}


@pytest.fixture(params=["hopper", "sparse_cores"])
def pinned(request, monkeypatch):
    """Run each test with either kernel; :func:`listed` leaves out what the second one cannot run."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    monkeypatch.setenv("MODELOPT_LITE_KERNEL", request.param)


def listed(request, share=0.4, rows=128, per_kv_head=False, seed=1):
    """Return a request with random lists that hold about a share of all key blocks, seen or not."""
    heads = request.k.shape[1] if per_kv_head else request.q.shape[1]
    generator = torch.Generator().manual_seed(seed)
    shapes = shape_of_lists(request, 128, rows)
    masks = [torch.rand(heads, *shape, generator=generator) < share for shape in shapes]
    blocks = KeyBlocks.from_masks([mask.to(request.q.device) for mask in masks], 128, rows)
    request = request._replace(blocks=blocks)
    pinned = os.environ["MODELOPT_LITE_KERNEL"]
    if pinned == "sparse_cores" and (reason := sparse_cores.refusal(request)) is not None:
        assert "could not" not in reason
        pytest.skip(reason)
    assert choose(request, pinned=pinned).name == pinned
    return request


def of_128(plan="dense", lengths=LENGTHS, **options):
    return make(lengths=lengths, plan=PLANS[plan], **{"dims": (128, 128), **options})


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("dtype", "dims"), [(BF16, (128, 128)), (BF16, (64, 64)), (FP16, (128, 128))])
def test_plans(plan, dtype, dims):
    check(listed(of_128(plan, dtype=dtype, dims=dims)))


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("plan", ["dense", "exempt", "2:4 exempt"])
def test_empty_and_full_lists(plan, share):
    check(listed(of_128(plan), share))


@pytest.mark.parametrize("plan", ["dense", "exempt", "2:4 exempt"])
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": False},
        {"sliding_window": 1},
        {"sliding_window": 200},
        {"softcap": 2.0, "s_aux": True},
        {"is_causal": False, "s_aux": True},
    ],
    ids=str,
)
def test_options(plan, options):
    check(listed(of_128(plan, **options)))


@pytest.mark.parametrize("plan", ["dense", "2:4 exempt"])
@pytest.mark.parametrize(("rows", "per_kv_head"), [(256, False), (128, True), (384, True)])
def test_grids(plan, rows, per_kv_head):
    check(listed(of_128(plan, heads=(6, 2)), 0.5, rows, per_kv_head))


@pytest.mark.parametrize("plan", ["dense", "2:4", "4:8"])
@pytest.mark.parametrize("towards", ["later", "earlier"])
def test_scores_far_apart(plan, towards):
    """Scores jump by far more than an exponential holds, so that items are computed twice."""
    request = of_128(plan, lengths=((900, 900),))
    ramp = torch.arange(request.k.shape[0], device="cuda") // 150
    ramp = ramp if towards == "later" else ramp.flip(0)
    request.q[3:-2, :, 0], request.k[..., 0] = 16.0, (ramp[:, None] * 128).to(request.k.dtype)
    check(listed(request, 0.6))


@pytest.mark.parametrize("plan", ["dense", "2:4 exempt"])
def test_many_items_of_all_lengths(plan):
    """More than there are multiprocessors, and of very different lengths."""
    lengths = ((3000, 3000), (1, 2000), (700, 2500))
    request = listed(of_128(plan, lengths=lengths, heads=(8, 2), exact=plan != "dense"), 0.2)
    mask = request.blocks.mask()
    mask[::3] = True
    request = request._replace(blocks=KeyBlocks.from_mask(mask, request.blocks.starts, 128, 128))
    check(request)
    first = run(request)
    for _ in range(10):
        assert all(torch.equal(x, y) for x, y in zip(first, run(request), strict=True))


@pytest.mark.parametrize("plan", ["dense", "2:4 exempt", "4:8"])
def test_full_lists_are_as_no_lists(plan):
    request = of_128(plan, exact=False)
    with_lists, without = run(listed(request, 1.0)), run(request)
    torch.testing.assert_close(with_lists[0], without[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(with_lists[1], without[1], rtol=1e-4, atol=1e-4)


def test_batch_mates_and_chunks_do_not_matter():
    request = listed(of_128("2:4 exempt", lengths=((500, 500), (300, 300)), exact=False))
    together = run(request)[0]
    for number, sequence in enumerate(request.sequences()):
        for cut in (0, 128, 200):
            rows = slice(sequence.queries.start + cut, sequence.queries.stop)
            mask = request.blocks.mask()[:, int(request.blocks.starts[number]) + cut // 128 :]
            mask = mask[:, : -(-(sequence.queries.stop - sequence.queries.start) // 128) - cut // 128]
            alone = request._replace(
                starts_q=torch.full_like(request.starts_q[:1], rows.start),
                lengths_q=torch.full_like(request.starts_q[:1], rows.stop - rows.start),
                max_q=rows.stop - rows.start,
                starts_k=request.starts_k[number : number + 1],
                lengths_k=request.lengths_k[number : number + 1],
                blocks=KeyBlocks.from_masks([mask], 128, 128),
            )
            torch.testing.assert_close(run(alone)[0][rows], together[rows], rtol=2e-2, atol=2e-2)


def test_cuda_graph():
    check_in_a_graph(run, listed(of_128("2:4 exempt", exact=False)))


def test_strides_and_lists_that_are_not_contiguous():
    request = listed(of_128("exempt"))
    expected = run(request)
    blocks = request.blocks
    wide = torch.stack([blocks.indices, blocks.indices], -1)[..., 0]
    apart = AttentionRequest(*(torch.cat([x, x], 1)[:, : x.shape[1]] for x in request[:3]), *request[3:])
    found = run(apart._replace(blocks=blocks._replace(indices=wide)))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
