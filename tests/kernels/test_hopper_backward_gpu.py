"""The backward kernel for Hopper on a GPU, as the portable ones in ``test_backward_gpu``."""

import pytest
import torch
from test_backward_gpu import PLANS, check, full_precision, make  # noqa: F401
from test_backward_gpu import test_the_same_keys_as_in_the_forward as compare_keys
from test_forward_interpreter import HOOKS
from test_lists_gpu import listed, of_128

from modelopt_lite.kernels import AttentionRequest, choice, hopper_backward_launch, hopper_launch, portable
from modelopt_lite.kernels.top_n import top_n_plan

pytestmark = pytest.mark.gpu

DIMS = (128, 128)
LISTED = ["dense", "exempt", "2:4", "2:4 exempt", "4:8", "4:8 exempt", "sparse decode"]
LONG = ((700, 700), (333, 800), (1500, 1500), (1, 900), (200, 3000))


@pytest.fixture(autouse=True)
def only_hopper(monkeypatch):
    """Have the Hopper kernel compute all gradients, or fail."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not a Hopper GPU")
    monkeypatch.setenv("MODELOPT_LITE_KERNEL", "hopper")
    monkeypatch.delattr(portable, "backward")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("plan", PLANS, ids=["dense", "2:4", "4:8"])
def test_ragged(plan, is_causal, dtype):
    check(make(dims=DIMS, plan=plan, is_causal=is_causal, dtype=dtype))


@pytest.mark.parametrize("dims", [DIMS, (64, 64)])
@pytest.mark.parametrize("plan", PLANS, ids=["dense", "2:4", "4:8"])
def test_long(plan, dims):
    check(make(lengths=LONG, heads=(8, 2), dims=dims, plan=plan))


@pytest.mark.parametrize("heads", [(8, 1), (4, 4), (3, 1)])
def test_heads(heads):
    check(make(heads=heads, dims=DIMS, plan=PLANS[1]))


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 4), (3, 4), (1, 8), (7, 8)])
def test_n_of_m(n, m):
    check(make(lengths=((500, 500), (129, 300)), heads=(4, 1), dims=DIMS, plan=top_n_plan(n, m, 3, 40)))


@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (5, 1), (0, 100), (70, 64), (200, 300)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_sinks_and_window(is_causal, sinks, window):
    check(make(lengths=LONG, dims=DIMS, plan=top_n_plan(1, 4, sinks, window), is_causal=is_causal))


@pytest.mark.parametrize("plan", PLANS[:2], ids=["dense", "2:4"])
@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 1},
        {"sliding_window": 100},
        {"softcap": 2.0},
        {"s_aux": True},
        {"sliding_window": 130, "softcap": 5.0, "s_aux": True},
        {"is_causal": False, "softcap": 2.0, "s_aux": True},
    ],
    ids=str,
)
def test_options(options, plan):
    check(make(lengths=LONG, dims=DIMS, plan=plan, **options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_random_scores(dtype):
    check(make(lengths=((700, 700), (333, 800)), dims=DIMS, dtype=dtype, exact=False))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_all_keys_alike(n, m):
    request = make(dims=DIMS, plan=top_n_plan(n, m, 0, 8))
    request.k[~request.k.isnan()] = 0.5
    check(request)


@pytest.mark.parametrize("plan", HOOKS)
def test_other_hooks(plan):
    check(make(dims=DIMS, plan=plan))


def test_slices_of_a_fused_projection():
    request = make(plan=PLANS[1], dims=DIMS, lengths=((300, 300),))
    slices = torch.cat(request[:3], dim=1).split([4, 2, 2], dim=1)
    check(AttentionRequest(*slices, *request[3:]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n_of_m", [(2, 4), (4, 8)])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"is_causal": False}], ids=str)
def test_the_same_keys_as_in_the_forward(dtype, n_of_m, options):
    compare_keys(DIMS, n_of_m, dtype, options)


@pytest.mark.parametrize("plan", PLANS, ids=["dense", "2:4", "4:8"])
def test_the_same_bits_every_time(plan):
    """With so many items that programs take several, and wait for each other."""
    request = make(lengths=((9000, 9000), (3000, 5000)), heads=(16, 4), dims=DIMS, plan=plan, exact=False)
    assert hopper_backward_launch.refusal(request) is None
    out, lse = hopper_launch.prepare(request)(request)
    grad = torch.randn(out.shape, device="cuda").to(out.dtype)
    first = choice.differentiate(grad, out, lse, request)[:3]
    for _ in range(3):
        again = choice.differentiate(grad, out, lse, request)[:3]
        assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("plan", LISTED)
def test_lists(plan):
    check(listed(of_128(plan)))


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("plan", ["dense", "2:4 exempt"])
def test_empty_and_full_lists(plan, share):
    check(listed(of_128(plan), share))


@pytest.mark.parametrize("plan", ["exempt", "2:4 exempt"])
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": False},
        {"sliding_window": 1},
        {"sliding_window": 200},
        {"softcap": 2.0, "s_aux": True},
    ],
    ids=str,
)
def test_options_of_lists(plan, options):
    check(listed(of_128(plan, **options)))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("plan", PLANS[:2], ids=["dense", "2:4"])
def test_a_head_dimension_of_64(plan, is_causal):
    check(make(heads=(6, 2), dims=(64, 64), plan=plan, is_causal=is_causal))


@pytest.mark.parametrize(("rows", "per_kv_head"), [(256, False), (128, True), (384, True)])
def test_grids(rows, per_kv_head):
    check(listed(of_128("2:4 exempt", heads=(6, 2)), 0.5, rows, per_kv_head))


@pytest.mark.parametrize("plan", ["dense", "2:4 exempt"])
def test_long_lists(plan):
    check(listed(of_128(plan, lengths=((1500, 1500), (333, 3000)), heads=(8, 2)), 0.25))


@pytest.mark.parametrize("plan", ["dense", "2:4"])
def test_the_same_bits_every_time_with_lists(plan):
    """With so many items that programs take several, and wait for each other."""
    request = listed(of_128(plan, lengths=((9000, 9000), (3000, 5000)), heads=(16, 4), exact=False), 0.25)
    assert hopper_backward_launch.refusal(request) is None
    out, lse = hopper_launch.prepare(request)(request)
    grad = torch.randn(out.shape, device="cuda").to(out.dtype)
    first = choice.differentiate(grad, out, lse, request)[:3]
    for _ in range(3):
        again = choice.differentiate(grad, out, lse, request)[:3]
        assert all(map(torch.equal, first, again))
