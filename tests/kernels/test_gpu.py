"""The fused kernel on a GPU: the whole contract against the oracle, in every precision."""

import pytest
import torch
from cases import arguments, check_in_a_graph, error_bound, gradients, one_sequence, oracle, pytorch_attention
from cases import packed_request as make

from modelopt_lite import UnsupportedError
from modelopt_lite.kernels import AttentionRequest, attention, compute
from modelopt_lite.kernels.hopper.forward import attention_forward_hopper
from modelopt_lite.kernels.language import jit, tl
from modelopt_lite.kernels.portable.forward import attention_forward
from modelopt_lite.kernels.reference import attention_reference
from modelopt_lite.kernels.top_n import top_n_plan
from modelopt_lite.methods import SinkWindow
from modelopt_lite.plan import DENSE, AttentionPlan

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernel")]

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
N_OF_M = [(n, m) for m in (2, 4, 8, 16) for n in range(1, m)]


@jit
def keep_even_hook(scores, q_pos, k_pos, args):
    return ((tl.zeros_like(scores[0]) == 0.0) & (k_pos[0] % 2 == 0),)


@jit
def count_falls(falls_ptr, first, step, number, BLOCK: tl.constexpr):
    """Count where exp2 falls from one number to the next, beginning with the bits ``first``."""
    falls = tl.zeros([BLOCK], tl.int32)
    for index in range(number):
        bits = first + ((tl.program_id(0) * number + index) * BLOCK + tl.arange(0, BLOCK)) * step
        lower, upper = bits.to(tl.float32, bitcast=True), (bits + step).to(tl.float32, bitcast=True)
        falls += (tl.exp2(upper) < tl.exp2(lower)).to(tl.int32)
    tl.atomic_add(falls_ptr, tl.sum(falls))


@pytest.fixture(autouse=True)
def poison():
    """Fill what is allocated and not yet written with NaN, and keep FP32 products in FP32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32 = before


def run(request, **changes):
    """Run the fused kernel, by default with its LSE."""
    return attention(**{**arguments(request), "backend": "triton", "return_lse": True, **changes})


def check(request):
    """Hold the kernel against the oracle: no worse than twice PyTorch in the same precision."""
    output, lse = run(request)
    outputs = [output]
    if not request.plan.is_dense and request.plan.group <= 8 and request.q.shape[2] == request.v.shape[2] == 64:
        # The Hopper kernel sums weights in another way if no LSE is asked for.
        outputs.append(run(request, return_lse=False))
    expected, expected_lse = attention_reference(request)
    bound = error_bound(pytorch_attention(request), expected, torch.finfo(request.q.dtype).eps / 2)
    for output in outputs:
        assert not output.isnan().any()
        error = (output.double() - expected).abs().max()
        assert error <= bound, f"{error=} {bound=}"
    finite = expected_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    torch.testing.assert_close(lse[finite], expected_lse[finite].float(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("heads", "dims"),
    [
        ((4, 2), (64, 64)),
        ((4, 4), (128, 128)),
        ((8, 1), (16, 16)),
        ((2, 1), (80, 80)),
        ((2, 2), (96, 96)),
        ((3, 1), (112, 112)),
        ((2, 1), (160, 160)),
        ((2, 2), (192, 128)),
        ((2, 1), (256, 256)),
    ],
)
@pytest.mark.parametrize("plan", [DENSE, top_n_plan(2, 4, 3, 17), top_n_plan(4, 8, 0, 64)], ids=["dense", "2:4", "4:8"])
def test_shapes(dtype, is_causal, heads, dims, plan):
    check(make(heads=heads, dims=dims, dtype=dtype, is_causal=is_causal, plan=plan))


@pytest.mark.parametrize(("n", "m"), N_OF_M)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (5, 1), (0, 100), (70, 64)])
def test_every_n_of_m(n, m, dtype, sinks, window):
    check(make(dtype=dtype, plan=top_n_plan(n, m, sinks, window)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", [DENSE, top_n_plan(2, 4, 4, 64), top_n_plan(1, 4, 0, 0), top_n_plan(8, 16, 1, 30)])
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
def test_options(dtype, plan, options):
    check(make(dtype=dtype, plan=plan, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128)])
def test_random_scores(dtype, dims):
    """Dense, so that no near-tie can fall either way."""
    check(make(lengths=((1000, 1000), (777, 1500)), heads=(8, 2), dims=dims, dtype=dtype, exact=False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "plan",
    [DENSE, top_n_plan(2, 4, 0, 64), top_n_plan(2, 4, 4, 0), top_n_plan(4, 8, 0, 64), top_n_plan(8, 16, 0, 64)],
    ids=["dense", "2:4", "no window", "4:8", "8:16"],
)
@pytest.mark.parametrize("towards", ["later", "earlier"])
def test_scores_far_apart(dtype, plan, towards):
    """Scores jump by far more than an exponential holds, up or down along the keys."""
    request = make(lengths=((600, 600),), dtype=dtype, plan=plan)
    ramp = torch.arange(request.k.shape[0], device="cuda") // 150
    ramp = ramp if towards == "later" else ramp.flip(0)
    request.q[3:-2, :, 0], request.k[..., 0] = 16.0, (ramp[:, None] * 128).to(dtype)
    check(request)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_keys_alike(dtype):
    """Nothing but ties."""
    request = make(dtype=dtype, plan=top_n_plan(2, 4, 0, 8))
    request.k[~request.k.isnan()] = 0.5
    check(request)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alike", [0, 40])
@pytest.mark.parametrize(("n", "m"), [(n, m) for m in (8, 16) for n in range(1, m)])
def test_without_ties_and_with_few(dtype, n, m, alike):
    """Scores are exact, and differ inside every group, except those of ``alike`` keys."""
    plan = top_n_plan(n, m, 0, 3)
    request = make(lengths=((700, 700), (300, 500)), dims=(128, 128), dtype=dtype, plan=plan)
    q, k = request.q, request.k
    generator = torch.Generator("cuda").manual_seed(n)
    for rows, keys, _, _ in request.sequences():
        q[rows, :, 0] = q[rows, :, 0].sign() * 2 + 1
        order = torch.rand(-(-(keys.stop - keys.start) // 16), 16, k.shape[1], device="cuda", generator=generator)
        k[keys] = 0
        k[keys, :, 0] = (order.argsort(1).flatten(0, 1)[: keys.stop - keys.start] / 4).to(dtype)
        if alike:
            k[keys.start + 200 : keys.start + 200 + alike, :, 0] = 1.0
    check(request)


@pytest.mark.parametrize(("first", "step"), [(0, 1), (-(2**23), -1)], ids=["from 0 to inf", "from -inf to -0"])
def test_exponentials_never_fall(first, step):
    """As quick rules need, which select among weights."""
    falls = torch.zeros(1, dtype=torch.int32, device="cuda")
    count_falls[(255 * 128,)](falls, first, step, 64, 1024)  # 2**23 numbers of each of 255 exponents
    assert falls.item() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    """Transformers' ``[batch, heads, tokens, dim]`` goes in without a copy, and slices of fused projections too."""
    torch.manual_seed(0)
    length, plan = 300, top_n_plan(2, 4, 1, 20)
    for sliced in (False, True):
        q, k, v = (torch.randint(-2, 3, (h, length, 64), device="cuda").to(dtype) / 2 for h in (4, 2, 2))
        if sliced:
            q, k, v = torch.cat([q, k, v]).transpose(0, 1).split([4, 2, 2], dim=1)
        else:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        assert not q.is_contiguous()
        request = one_sequence(q, k, v, plan)
        check(request)
        packed = one_sequence(*(x.contiguous() for x in (q, k, v)), plan)
        assert torch.equal(run(request)[0], run(packed)[0])


def test_offsets_beyond_two_to_the_31():
    """A sequence whose first element lies past 2^31 elements in query and key memory."""
    rows, heads, dim, length = 2**20 + 400, 16, 128, 300
    torch.manual_seed(0)
    far = [torch.zeros(rows, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    near = [torch.randn(length, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    start = rows - length
    assert start * heads * dim > 2**31
    for x, y in zip(far, near, strict=True):
        x[start:] = y
    request = one_sequence(*near, top_n_plan(2, 4, 2, 10), softmax_scale=0.1)
    starts = request.starts_q + start

    torch.use_deterministic_algorithms(False)  # or gigabytes would be filled
    expected, _ = run(request)
    output, _ = run(AttentionRequest(*far, *request[3:])._replace(starts_q=starts, starts_k=starts))
    assert torch.equal(output[start:], expected)
    assert not output[:start].any()


def test_strides_that_descriptors_cannot_take():
    request = make(plan=top_n_plan(2, 4, 1, 20))
    odd = [torch.cat([x, x[..., :1]], dim=2)[..., :64] for x in request[:3]]
    assert odd[1].stride(1) * odd[1].element_size() % 16
    check(AttentionRequest(*odd, *request[3:]))


def test_strides_that_are_copied():
    """Elements of a head that do not lie side by side, and integers that do not."""
    request = make(plan=top_n_plan(2, 4, 1, 20))
    expected = run(request)
    apart = [x.mT.contiguous().mT for x in request[:3]]
    wide = {
        name: torch.stack([x, x], dim=-1)[..., 0]
        for name in ("starts_q", "lengths_q", "starts_k", "lengths_k")
        if (x := getattr(request, name)) is not None
    }
    assert {*(x.stride(-1) for x in apart)} != {1}
    for _ in range(2):  # prepared, and from what was prepared
        found = run(AttentionRequest(*apart, *request[3:])._replace(**wide))
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_results_go_to_the_rows_that_are_named(backend):
    request = make(plan=top_n_plan(2, 4, 1, 20))._replace(with_lse=True)
    rows = torch.randperm(len(request.q), device="cuda")
    expected = compute(request, backend)
    for _ in range(2):  # prepared, and from what was prepared
        found = compute(request._replace(output_rows=rows), backend)
        assert all(torch.equal(x[rows], y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("sinks", "window"), [(4, 100), (0, 1), (3, 0), (0, 0)])
def test_sinks_and_window_alone(dtype, is_causal, sinks, window):
    plan = SinkWindow(num_sink_tokens=sinks, dense_window_size=window).plan()
    check(make(dtype=dtype, is_causal=is_causal, plan=plan))


def test_nothing_is_compiled_again_for_other_numbers(kernel):
    """Whether there are sink tokens is known at compile time, how many is not; short calls have their own variant."""
    function, dim, variants = (attention_forward_hopper, 64, 1) if kernel == "hopper" else (attention_forward, 32, 2)

    def compiled():
        return sum(len(cache[0]) for cache in function.device_caches.values())

    before = compiled()
    for number, (sinks, window, sliding) in enumerate(((1, 0, 1), (2, 1, 16), (16, 16, 100))):
        for length in (1, 16, 17, 100, 1024):
            plan = top_n_plan(2, 4, sinks, window)
            lengths = [(length, length + number)] * sinks
            run(make(lengths=lengths, heads=(2, 2), dims=(dim, dim), plan=plan, sliding_window=sliding))
    assert compiled() == before + variants


def test_a_hook_that_gluon_cannot_compile_is_left_to_the_portable_kernel(kernel, caplog):
    request = make(
        lengths=((200, 200),),
        plan=AttentionPlan(
            keep=lambda scores, q_pos, k_pos: (k_pos % 2 == 0).expand(scores.shape), score_hook=keep_even_hook
        ),
    )
    check(request)
    refused = "the kernel hopper is left out: Gluon cannot compile the hook keep_even_hook"
    assert (refused in caplog.text) == (kernel == "hopper")
    caplog.clear()
    check(request)
    check(request._replace(softmax_scale=0.5))
    assert not caplog.text


def test_what_the_kernel_cannot_run_is_refused():
    request = make(lengths=((40, 40),))  # more queries than the decode kernel takes, which takes a head_dim of 300
    doubles = {name: getattr(request, name).double() for name in ("q", "k", "v")}

    def refused(message, **changes):
        with pytest.raises(UnsupportedError, match=rf"backend: 'triton' cannot run this: {message}"):
            run(request, **changes)

    refused(r"q is torch.float64, not one of", **doubles)
    wide = torch.zeros(*request.q.shape[:2], 300, device="cuda", dtype=request.q.dtype)
    refused(r"q has a head_dim of 300, above 256", q=wide, k=wide[:, :2])
    unfused = AttentionPlan(keep=top_n_plan(2, 4, 0, 0).keep, group=4)
    refused(r"the method has no score_hook", plan=unfused)
    # Nobody asked for triton, so the torch backend, which can, does.
    assert run(request, **doubles, backend="auto")[0].dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("sliding_window", [None, 50])
@pytest.mark.parametrize("plan", [DENSE, top_n_plan(2, 4, 70, 17), top_n_plan(4, 8, 0, 0)], ids=["dense", "2:4", "4:8"])
def test_queries_and_keys_anywhere(dtype, is_causal, sliding_window, plan):
    """Caches that have dropped their first keys, cross-attention, windows without causality."""
    request = make(dtype=dtype, is_causal=is_causal, sliding_window=sliding_window, plan=plan)
    first_k = torch.tensor([0, 7, 3, 64, 33, 100, 5, 1], device="cuda")
    first_q = torch.tensor([5, 7, 0, 90, 303, 399, 0, 0], device="cuda")
    for placed in ({"first_k": first_k}, {"first_q": first_q}, {"first_q": first_q, "first_k": first_k}):
        check(request._replace(**placed))


def test_the_same_bits_every_time():
    request = make(lengths=((900, 900), (300, 1200)), heads=(8, 2), plan=top_n_plan(2, 4, 4, 64), exact=False)
    first, without = run(request), run(request, return_lse=False)
    for _ in range(20):
        assert all(torch.equal(x, y) for x, y in zip(first, run(request), strict=True))
        assert torch.equal(without, run(request, return_lse=False))


def test_batch_mates_and_chunks_do_not_matter():
    lengths = ((500, 500), (300, 300), (37, 37))
    for plan in (DENSE, top_n_plan(2, 4, 4, 64), top_n_plan(4, 8, 0, 5)):
        request = make(lengths=lengths, plan=plan, exact=False)
        together, _ = run(request)
        for in_q, in_k, *_ in request.sequences():
            length = in_q.stop - in_q.start
            for cut in (0, length // 2 + 1):
                q, k, v = request.q[in_q][cut:], request.k[in_k], request.v[in_k]
                output, _ = run(one_sequence(q, k, v, plan))
                torch.testing.assert_close(output, together[in_q][cut:], rtol=2e-2, atol=2e-2)


def test_cuda_graph():
    check_in_a_graph(run, make(plan=top_n_plan(2, 4, 4, 64), exact=False))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_and_not_the_current_one():
    request = make(dims=(128, 128), plan=top_n_plan(2, 4, 4, 64))
    expected, _ = run(request)
    moved = (x.to("cuda:1") if isinstance(x, torch.Tensor) else x for x in request)
    output, _ = run(AttentionRequest(*moved))
    assert output.device == torch.device("cuda:1")
    assert torch.equal(output.to("cuda:0"), expected)


def test_gradients_equal_the_torch_backend():
    request = make(lengths=((100, 100), (50, 90)), plan=top_n_plan(2, 4, 1, 10), s_aux=True)
    request = AttentionRequest(*(x.nan_to_num().float() for x in request[:3]), *request[3:])
    direction = torch.randn_like(request.q)
    found = gradients(lambda request: run(request)[0], direction, request)
    wanted = gradients(oracle, direction, request)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
