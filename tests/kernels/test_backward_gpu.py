"""The backward kernels on a GPU: gradients against the oracle's, in every precision, and the same bits every time."""

import itertools

import pytest
import torch
from cases import arguments, doubled, error_bound, gradients, oracle, packed_request, pytorch_attention
from test_forward_interpreter import HOOKS

from modelopt_lite.kernels import AttentionRequest, attention
from modelopt_lite.kernels.reference import attention_reference
from modelopt_lite.kernels.top_n import top_n_plan
from modelopt_lite.methods import SinkWindow
from modelopt_lite.plan import DENSE

pytestmark = pytest.mark.gpu

DEVICE, BACKEND = "cuda", "triton"
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
PLANS = [DENSE, top_n_plan(2, 4, 3, 17), top_n_plan(4, 8, 0, 64)]
NAMES = ["dense", "2:4", "4:8"]


@pytest.fixture(autouse=True)
def full_precision():
    """Keep PyTorch's FP32 products in FP32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def make(*args, **options):
    """Make a request on the GPU."""
    return packed_request(*args, device=DEVICE, **options)


def ours(request):
    return attention(**arguments(request), backend=BACKEND)


def check(request):
    """Hold gradients against the oracle's: no worse than twice PyTorch's own in the same precision."""
    q, _, v, s_aux = request[:4]
    generator = torch.Generator(DEVICE).manual_seed(1)
    grad = torch.randn(q.shape[0], q.shape[1], v.shape[2], generator=generator, device=DEVICE).to(q.dtype)
    grad = grad.masked_fill(q[..., :1].isnan(), torch.nan)
    # What is allocated and not yet written holds NaN, and what could give other bits raises.
    torch.use_deterministic_algorithms(True)
    try:
        found, again = (gradients(ours, grad, request) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    theirs = gradients(pytorch_attention, grad, request)
    expected = gradients(oracle, grad, doubled(request))
    # Results are rounded once, and weights come from an FP32 number that is rounded twice: the LSE, in log2 space.
    outside = q[..., 0].isnan()
    output, lse = attention_reference(request)
    with torch.no_grad():
        rounded = ours(request).double() - output
    per_row = (rounded * grad.double()).sum(-1).masked_fill(outside, 0.0)
    lse = lse.masked_fill(outside, 0.0).nan_to_num(neginf=0.0)
    rounding = torch.finfo(q.dtype).eps / 2 + torch.finfo(torch.float32).eps * lse.abs().max()
    for name, mine, same, other, right in zip(("q", "k", "v", "s_aux"), found, again, theirs, expected, strict=True):
        if right is not None:
            assert torch.equal(mine, same), name
            bound = error_bound(other, right, rounding)
            if name == "s_aux":
                # The output, rounded to its type, stands in every row's share of this sum.
                bound = bound + (torch.exp(s_aux.double() - lse) * per_row).sum(0).abs().max()
            error = (mine.double() - right).abs().max()
            assert error <= bound, f"gradient of {name}: {error=} {bound=}"


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("plan", PLANS, ids=NAMES)
def test_ragged(plan, is_causal, dtype):
    check(make(dims=(128, 128), plan=plan, is_causal=is_causal, dtype=dtype))


@pytest.mark.parametrize(
    ("heads", "dims"),
    [
        ((8, 1), (16, 16)),
        ((4, 4), (64, 64)),
        ((2, 1), (80, 80)),
        ((2, 2), (96, 96)),
        ((3, 1), (112, 112)),
        ((2, 1), (160, 160)),
        ((4, 2), (192, 128)),
        ((2, 1), (256, 256)),
    ],
)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("plan", PLANS[:2], ids=NAMES[:2])
def test_shapes(plan, is_causal, heads, dims):
    check(make(heads=heads, dims=dims, plan=plan, is_causal=is_causal))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dims", [(80, 80), (192, 128), (256, 256)])
def test_shapes_in_other_precisions(dims, dtype):
    check(make(heads=(2, 1), dims=dims, plan=PLANS[1], dtype=dtype))


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 4), (3, 4), (1, 8), (5, 8), (7, 8), (1, 16), (8, 16), (15, 16)])
def test_n_of_m(n, m):
    check(make(lengths=((500, 500), (129, 300)), heads=(4, 1), plan=top_n_plan(n, m, 3, 40)))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (5, 1), (0, 100), (70, 64)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_sinks_and_window(is_causal, sinks, window, dtype):
    check(make(plan=top_n_plan(1, 4, sinks, window), is_causal=is_causal, dtype=dtype))


@pytest.mark.parametrize(("sinks", "window"), [(4, 100), (0, 1), (3, 0), (0, 0)])
def test_sinks_and_window_alone(sinks, window):
    """Rows that keep no key have no gradient."""
    check(make(plan=SinkWindow(num_sink_tokens=sinks, dense_window_size=window).plan()))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", PLANS[:2], ids=NAMES[:2])
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
def test_options(options, plan, dtype):
    check(make(plan=plan, dtype=dtype, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128)])
def test_random_scores(dims, dtype):
    """Dense, so that no near-tie can fall either way."""
    check(make(lengths=((700, 700), (333, 800)), dims=dims, dtype=dtype, exact=False))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_all_keys_alike(n, m, dtype):
    """Nothing but ties."""
    request = make(dtype=dtype, plan=top_n_plan(n, m, 0, 8))
    request.k[~request.k.isnan()] = 0.5
    check(request)


@pytest.mark.parametrize("plan", HOOKS)
def test_other_hooks(plan):
    check(make(plan=plan))


def test_slices_of_a_fused_projection():
    request = make(plan=PLANS[1], lengths=((300, 300),))
    slices = torch.cat(request[:3], dim=1).split([4, 2, 2], dim=1)
    assert not slices[0].is_contiguous()
    check(AttentionRequest(*slices, *request[3:]))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("sliding_window", [None, 50])
@pytest.mark.parametrize("plan", PLANS[:2], ids=NAMES[:2])
def test_queries_and_keys_anywhere(plan, sliding_window, is_causal):
    request = make(plan=plan, sliding_window=sliding_window, is_causal=is_causal)
    first_k = torch.tensor([0, 7, 3, 64, 33, 100, 5, 1], device=DEVICE)
    check(request._replace(first_k=first_k))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("dims", "n_of_m", "dtype", "options"),
    [
        *itertools.product(((64, 64), (128, 128), (256, 256)), ((2, 4), (4, 8), (8, 16)), DTYPES[:2], ({},)),
        *itertools.product(((128, 128),), ((2, 4), (4, 8)), (torch.float32,), ({},)),
        *itertools.product(((192, 128),), ((2, 4),), DTYPES, ({},)),
        *itertools.product(((128, 128),), ((2, 4), (4, 8)), DTYPES, ({"softcap": 2.0}, {"is_causal": False})),
    ],
    ids=str,
)
def test_the_same_keys_as_in_the_forward(dims, n_of_m, dtype, options):
    """Bit for bit, of scores whose last digits depend on the order of their sums."""
    length, width = 1000, dims[1] // 2
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k = torch.randn(2, length, 1, dims[0], generator=generator, device=DEVICE).to(dtype)
    v, grad = torch.randn(2, length, 1, dims[1], generator=generator, device=DEVICE).to(dtype)
    # The last columns of keys do not change scores, and tell keys apart in the gradient of queries.
    q[..., -width:] = 0
    q, grad = q / 32, grad * 1024  # or else FP16 would round the gradients of some scores to 0
    packing = [torch.tensor([0], device=DEVICE), torch.tensor([length], device=DEVICE), length]
    options = {"is_causal": True, "plan": top_n_plan(*n_of_m, 0, 0), "softmax_scale": 1.0, **options}
    kept = [torch.zeros(length, length, dtype=torch.bool, device=DEVICE) for _ in range(3)]
    for first in range(0, length, width):
        block = slice(first, min(first + width, length))
        count = block.stop - first
        one_of_block = torch.zeros(length, 1, width, dtype=dtype, device=DEVICE)
        one_of_block[block, 0, :count] = torch.eye(count, dtype=dtype, device=DEVICE)
        marked = torch.cat([k[..., :-width], one_of_block], -1)
        marks = torch.cat([torch.zeros_like(v[..., :-width]), one_of_block], -1)
        inputs = [x.clone().requires_grad_() for x in (q, marked, v)]
        attention(*inputs, *packing, **options, backend=BACKEND).backward(grad)
        kept[0][:, block] = inputs[0].grad[:, 0, -width:][:, :count] != 0
        out = attention(q, marked, marks, *packing, **options, backend=BACKEND)
        kept[1][:, block] = out[:, 0, -width:][:, :count] > 0
        values = v.clone().requires_grad_()
        attention(q, marked, values, *packing, **options, backend=BACKEND).backward(marks)
        kept[2][block] = values.grad[:, 0, -width:][:, :count].T > 0
    share = kept[1].sum() / length**2 * (2 if options["is_causal"] else 1)
    assert abs(share - n_of_m[0] / n_of_m[1]) < 0.01
    # The first query of causal attention sees one key, whose weight is 1 and whose score has no gradient.
    assert torch.equal(kept[0][1:], kept[1][1:])
    assert torch.equal(kept[2], kept[1])
