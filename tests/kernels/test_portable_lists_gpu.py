"""The portable kernels with lists of key blocks on a GPU: output and gradients against the oracle's."""

import dataclasses

import pytest
import torch
from block_cases import shape_of_lists
from cases import packed_request
from test_backward_gpu import check as check_gradients
from test_gpu import check as check_output
from test_gpu import poison, run

from modelopt_lite.kernels import KeyBlocks
from modelopt_lite.kernels.choice import choose
from modelopt_lite.kernels.top_n import top_n_plan
from modelopt_lite.methods import SinkWindow
from modelopt_lite.plan import DENSE

__all__ = ["poison"]
pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Lengths around block borders, 0 and 1 among them: (queries, keys) of each sequence.
LENGTHS = ((600, 600), (1, 1), (0, 0), (129, 500), (1, 300), (64, 129), (0, 5), (300, 391))
PLANS = {
    "dense": DENSE,
    "exempt": dataclasses.replace(DENSE, num_sink_tokens=4, dense_window_size=64),
    "2:4": top_n_plan(2, 4, 0, 0),
    "2:4 exempt": top_n_plan(2, 4, 3, 70),
    "8:16": top_n_plan(8, 16, 2, 64),
    "nothing": SinkWindow(num_sink_tokens=130, dense_window_size=17).plan(),
    "sparse decode": dataclasses.replace(top_n_plan(2, 4, 1, 3), sparse_decode=True),
}


@pytest.fixture(autouse=True)
def pinned(monkeypatch):
    """Run every test with the portable kernel, also where there is a faster one."""
    monkeypatch.setenv("MODELOPT_LITE_KERNEL", "portable")


def listed(plan="dense", block_size=128, block_rows=128, share=0.4, per_kv_head=False, lengths=LENGTHS, **options):
    """Make a request with random lists that hold about a share of all key blocks, seen or not."""
    request = packed_request(lengths=lengths, plan=PLANS[plan], **{"dims": (128, 128), **options})
    heads = request.k.shape[1] if per_kv_head else request.q.shape[1]
    generator = torch.Generator().manual_seed(1)
    masks = [
        (torch.rand(heads, *shape, generator=generator) < share).cuda()
        for shape in shape_of_lists(request, block_size, block_rows)
    ]
    request = request._replace(blocks=KeyBlocks.from_masks(masks, block_size, block_rows))
    assert choose(request, pinned="portable").name == "portable"
    return request


def check(request):
    """Hold output and gradients against the oracle's, and two runs against each other."""
    check_output(request)
    check_gradients(request)
    once, again = (run(request) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


@pytest.mark.parametrize("plan", PLANS)
def test_plans(plan):
    check(listed(plan))


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("plan", ["dense", "exempt", "2:4 exempt"])
def test_empty_and_full_lists(plan, share):
    check(listed(plan, share=share))


@pytest.mark.parametrize(
    ("dtype", "dims", "heads"),
    [
        (FP16, (64, 64), (4, 2)),
        (FP32, (64, 64), (2, 1)),
        (BF16, (80, 80), (2, 1)),
        (BF16, (192, 128), (2, 2)),
        (BF16, (256, 256), (2, 1)),
        (BF16, (16, 16), (8, 1)),
    ],
)
@pytest.mark.parametrize("plan", ["exempt", "2:4 exempt"])
def test_shapes(plan, dtype, dims, heads):
    check(listed(plan, dtype=dtype, dims=dims, heads=heads))


@pytest.mark.parametrize("plan", ["dense", "2:4 exempt"])
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
    check(listed(plan, **options))


@pytest.mark.parametrize("plan", ["dense", "2:4 exempt"])
@pytest.mark.parametrize(
    ("grid", "per_kv_head"), [((16, 16), False), ((64, 128), True), ((128, 384), True), ((48, 96), False)]
)
def test_grids(plan, grid, per_kv_head):
    check(listed(plan, *grid, 0.5, per_kv_head, heads=(6, 2), lengths=LENGTHS[3:]))


def test_positions():
    """A cache that has dropped its first keys; a short one, as queries then come last."""
    request = listed("2:4 exempt", lengths=((129, 500), (1, 300), (64, 129)))
    first_k = torch.tensor([200, 3, 0], device="cuda", dtype=torch.int32)
    shapes = shape_of_lists(request._replace(first_k=first_k), 128, 128)
    generator = torch.Generator().manual_seed(2)
    masks = [(torch.rand(4, *shape, generator=generator) < 0.5).cuda() for shape in shapes]
    check(request._replace(first_k=first_k, blocks=KeyBlocks.from_masks(masks, 128, 128)))
