"""The backward kernel for Hopper on a GPU, as the portable ones in ``test_backward_gpu``."""

import gc

import pytest
import torch
from cases import arguments
from test_backward_gpu import PLANS, check, full_precision, make  # noqa: F401
from test_forward_interpreter import HOOKS
from test_lists_gpu import listed, of_128

from modelopt_lite.kernels import AttentionRequest, attention, choice, gradients
from modelopt_lite.kernels.hopper import backward_launch as hopper_backward_launch
from modelopt_lite.kernels.hopper import forward_launch as hopper_launch
from modelopt_lite.kernels.hopper import sparse_cores
from modelopt_lite.kernels.portable import launch as portable_launch
from modelopt_lite.kernels.request import ForwardResult
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
    monkeypatch.setattr(portable_launch, "prepare_backward", lambda *arguments: pytest.fail("it is the portable one"))


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


@pytest.mark.parametrize("plan", PLANS[:2], ids=["dense", "2:4"])
def test_a_head_at_a_time(plan, monkeypatch):
    """Launches compute the heads of keys one by one, in several waves, and their sums lie in the same memory."""
    monkeypatch.setattr(hopper_backward_launch, "processors", lambda device: 5)
    monkeypatch.setattr(hopper_backward_launch, "heads_of_launch", lambda *shape: 1)
    monkeypatch.setattr(choice, "_prepared_backward", {})
    check(make(lengths=((700, 700), (333, 800)), heads=(8, 4), dims=DIMS, plan=plan))


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


FORWARDS = {"hopper": hopper_launch, "portable": portable_launch, "sparse_cores": sparse_cores}


def marks(request, names, first, width):
    """Return ``[rows, 1, width]``: a one in column ``c`` of the row at ``first + c`` in its sequence."""
    rows, starts, lengths = (getattr(request, name) for name in names)
    found = torch.zeros(rows.shape[0], 1, width, dtype=rows.dtype, device=rows.device)
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        count = max(0, min(width, length - first))
        found[start + first : start + first + count, 0, :count] = torch.eye(count, device=rows.device)
    return found


def kept_by_forward(run, request, width):
    """Return which keys of its sequence have a weight, ``[queries, heads, longest]``, one after the other marked."""
    found = []
    for first in range(0, request.max_k, width):
        v = torch.zeros_like(request.v)
        v[..., -width:] = marks(request, ("k", "starts_k", "lengths_k"), first, width)
        found.append(run(request._replace(v=v))[0][..., -width:] > 0)
    return torch.cat(found, -1)[..., : request.max_k]


def kept_for_queries(request, grad, out, lse, width):
    """Return likewise which keys have a part in the gradient of a query."""
    found = []
    for first in range(0, request.max_k, width):
        k = request.k.clone()
        k[..., -width:] = marks(request, ("k", "starts_k", "lengths_k"), first, width)
        grad_q = choice.differentiate(grad, ForwardResult(out, lse), request._replace(k=k))[0]
        found.append(grad_q[..., -width:] != 0)
    return torch.cat(found, -1)[..., : request.max_k]


def kept_for_values(request, out, lse, width):
    """Return likewise to which values a query gives a gradient."""
    r, members = request, request.q.shape[1] // request.k.shape[1]
    found = torch.zeros(*r.q.shape[:2], r.max_k, dtype=torch.bool, device=r.q.device)
    sequences = list(zip(*(x.tolist() for x in (r.starts_q, r.lengths_q, r.starts_k, r.lengths_k)), strict=True))
    for first in range(0, r.max_q, width):
        for member in range(members):
            grad = torch.zeros_like(out)
            grad[:, member::members, -width:] = marks(r, ("q", "starts_q", "lengths_q"), first, width)
            grad_v = choice.differentiate(grad, ForwardResult(out, lse), r)[2][..., -width:]
            for start_q, length_q, start_k, length_k in sequences:
                count = max(0, min(width, length_q - first))
                of_sequence = grad_v[start_k : start_k + length_k, :, :count] > 0
                rows = slice(start_q + first, start_q + first + count)
                found[rows, member::members, :length_k] = of_sequence.permute(2, 1, 0)
    return found


def compare_keys(request):
    """Hold the keys of the backward, bit for bit, against those of every forward kernel that can run a request.

    Scores are random, so that their last digits depend on the order of their sums. The last columns of queries are 0,
    so that there keys can be told apart without changing scores.
    """
    width = request.q.shape[2] // 2
    request.q[..., -width:] = 0
    out, lse = hopper_launch.prepare(request)(request)
    generator = torch.Generator("cuda").manual_seed(2)
    # Large, or else FP16 would round the gradients of some scores to 0.
    grad = 256 * torch.randn(out.shape, generator=generator, device="cuda").to(out.dtype)
    for_queries = kept_for_queries(request, grad, out, lse, width)
    for_values = kept_for_values(request, out, lse, width)
    compared = set()
    for name, kernel in FORWARDS.items():
        if kernel.refusal(request) is None:
            kept = kept_by_forward(kernel.prepare(request), request, width)
            assert kept.any()
            assert torch.equal(for_values, kept), name
            # The only key of a query has the weight 1, whatever its score.
            several = kept.sum(-1, keepdim=True) > 1
            assert torch.equal(for_queries & several, kept & several), name
            compared.add(name)
    return compared


SUFFIXES = ((300, 300), (129, 500), (1, 333), (64, 129), (0, 5))


@pytest.mark.parametrize("dims", [DIMS, (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [True, False])
def test_the_same_keys_as_on_sparse_tensor_cores(is_causal, dtype, dims):
    request = make(SUFFIXES, dims=dims, dtype=dtype, plan=PLANS[1], is_causal=is_causal, exact=False)
    assert compare_keys(request) == set(FORWARDS)


@pytest.mark.parametrize("n_of_m", [(2, 4), (4, 8), (1, 8)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 2.0},
        {"sliding_window": 100},
        {"s_aux": True},
        {"sliding_window": 130, "softcap": 5.0, "s_aux": True},
    ],
    ids=str,
)
def test_the_same_keys_as_in_the_forward(n_of_m, options):
    request = make(SUFFIXES, (6, 2), DIMS, plan=top_n_plan(*n_of_m, 3, 17), exact=False, **options)
    assert compare_keys(request) >= {"hopper", "portable"}


@pytest.mark.parametrize(
    ("plan", "options", "kernels"),
    [
        ("2:4 exempt", {}, ("hopper", "portable", "sparse_cores")),
        ("2:4 exempt", {"is_causal": False}, ("hopper", "portable", "sparse_cores")),
        ("2:4 exempt", {"sliding_window": 200}, ("hopper", "portable")),
        ("4:8", {}, ("hopper", "portable")),
    ],
    ids=str,
)
def test_the_same_keys_as_in_the_forward_with_lists(plan, options, kernels):
    lengths = ((600, 600), (129, 700), (1, 300), (0, 5), (300, 391))
    request = listed(of_128(plan, lengths=lengths, exact=False, **options))
    assert compare_keys(request) == set(kernels)


@pytest.mark.parametrize("dims", [DIMS, (64, 64)])
@pytest.mark.parametrize("plan", PLANS, ids=["dense", "2:4", "4:8"])
def test_the_same_bits_every_time(plan, dims):
    """With so many items that programs take several, and wait for each other."""
    request = make(lengths=((9000, 9000), (3000, 5000)), heads=(16, 4), dims=dims, plan=plan, exact=False)
    assert hopper_backward_launch.refusal(request) is None
    out, lse = hopper_launch.prepare(request)(request)
    grad = torch.randn(out.shape, device="cuda").to(out.dtype)
    first = choice.differentiate(grad, ForwardResult(out, lse), request)[:3]
    for _ in range(3):
        again = choice.differentiate(grad, ForwardResult(out, lse), request)[:3]
        assert all(map(torch.equal, first, again))


class Loss(torch.autograd.Function):
    """The sum of a tensor, which it does not hold."""

    @staticmethod
    def forward(ctx, x):
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype).repeat(ctx.shape)


@pytest.mark.parametrize("keeps_graph", [False, True])
def test_the_output_is_freed_before_sums_are_allocated(keeps_graph):
    """Unless the graph is kept, which then gives the same gradients again."""
    gc.collect()  # or what is freed meanwhile would count
    torch.cuda.empty_cache()  # a block that is left over may be larger than what is put into it
    request = make(lengths=((4096, 4096),), heads=(8, 2), dims=DIMS, exact=False)
    request = request._replace(q=request.q.requires_grad_())

    def differentiate():
        loss = Loss.apply(attention(**arguments(request)))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = torch.autograd.grad(loss, request.q, retain_graph=keeps_graph)[0]
        peak = torch.cuda.max_memory_allocated() - before
        if keeps_graph:
            assert torch.equal(found, torch.autograd.grad(loss, request.q)[0])
        return peak

    of_queries, of_keys = (x.numel() * x.element_size() for x in (request.q, request.k))
    differentiate()
    peak, rows = differentiate(), request.q.numel() // DIMS[0]
    # Gradients of the output, of queries, of keys and values, sums in FP32, and two numbers a row. Blocks of memory may
    # be larger than asked for.
    needed = (1 + 1 + 2) * of_queries + 2 * of_keys + 2 * 4 * rows - (0 if keeps_graph else of_queries)
    assert needed <= peak < needed + of_queries // 2


@pytest.fixture(params=[False, True], ids=["whole", "divided"])
def first_tiles(request, monkeypatch):
    """With lists, each of the first tiles of keys is one item, or one for each head of queries that shares it."""
    monkeypatch.setattr(hopper_backward_launch, "DIVIDED_FROM", 0 if request.param else 1 << 20)
    monkeypatch.setattr(choice, "_prepared_backward", {})


@pytest.mark.usefixtures("first_tiles")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", LISTED)
def test_lists(plan, dtype):
    check(listed(of_128(plan, dtype=dtype)))


@pytest.mark.usefixtures("first_tiles")
@pytest.mark.parametrize("s_aux", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("plan", ["dense", "2:4 exempt"])
def test_empty_and_full_lists(plan, share, s_aux):
    check(listed(of_128(plan, s_aux=s_aux), share))


def test_a_part_of_the_queries():
    """As in ring attention, whose logarithms are those of all queries."""
    request = make(lengths=((700, 700), (333, 800), (400, 400)), dims=DIMS)
    output, lse = attention(**arguments(request), return_lse=True)
    grad = torch.randn_like(output)
    packing = ("starts_q", "lengths_q", "starts_k", "lengths_k")
    part = request._replace(**{name: getattr(request, name)[::2].contiguous() for name in packing})
    torch.use_deterministic_algorithms(True)  # so that what is not written is NaN
    try:
        whole, found = (gradients(grad, output, lse, x) for x in (request, part))
    finally:
        torch.use_deterministic_algorithms(False)
    queries, keys, _, _ = list(request.sequences())[1]
    for ours, expected, rows in zip(found[:3], whole[:3], (queries, keys, keys), strict=True):
        expected[rows] = 0.0
        torch.testing.assert_close(ours, expected)


@pytest.mark.usefixtures("first_tiles")
@pytest.mark.parametrize("plan", ["exempt", "2:4 exempt"])
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": False},
        {"sliding_window": 1},
        {"sliding_window": 200},
        {"softcap": 2.0, "s_aux": True},
        {"dims": (64, 64)},
        {"lengths": ((100, 100), (1, 30), (0, 5), (64, 128))},
    ],
    ids=str,
)
def test_options_of_lists(plan, options):
    check(listed(of_128(plan, **options)))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("plan", PLANS[:2], ids=["dense", "2:4"])
def test_a_head_dimension_of_64(plan, is_causal):
    check(make(heads=(6, 2), dims=(64, 64), plan=plan, is_causal=is_causal))


@pytest.mark.usefixtures("first_tiles")
@pytest.mark.parametrize(("rows", "per_kv_head"), [(256, False), (128, True), (384, True)])
def test_grids(rows, per_kv_head):
    check(listed(of_128("2:4 exempt", heads=(6, 2)), 0.5, rows, per_kv_head))


@pytest.mark.usefixtures("first_tiles")
@pytest.mark.parametrize("plan", ["dense", "2:4 exempt"])
def test_long_lists(plan):
    check(listed(of_128(plan, lengths=((1500, 1500), (333, 3000)), heads=(8, 2)), 0.25))


@pytest.mark.usefixtures("first_tiles")
@pytest.mark.parametrize("plan", ["dense", "2:4"])
def test_the_same_bits_every_time_with_lists(plan):
    """With so many items that programs take several, and wait for each other; in a CUDA graph, too."""
    request = listed(of_128(plan, lengths=((9000, 9000), (3000, 5000)), heads=(16, 4), exact=False), 0.25)
    assert hopper_backward_launch.refusal(request) is None
    out, lse = hopper_launch.prepare(request)(request)
    grad = torch.randn(out.shape, device="cuda").to(out.dtype)
    first = choice.differentiate(grad, ForwardResult(out, lse), request)[:3]
    for _ in range(3):
        again = choice.differentiate(grad, ForwardResult(out, lse), request)[:3]
        assert all(map(torch.equal, first, again))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = choice.differentiate(grad, ForwardResult(out, lse), request)[:3]
    for _ in range(2):
        for x in again:
            x.fill_(7.0)
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, first, again))
