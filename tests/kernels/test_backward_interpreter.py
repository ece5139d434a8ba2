"""The Triton backward kernels against the oracle's autograd, run by Triton's interpreter; tiles are small."""

import os

import pytest
import torch
from cases import arguments, cases, doubled, gradients, oracle, smallest_gap
from hypothesis import given, settings
from hypothesis import strategies as st
from test_forward_interpreter import HOOKS, n_of_m, sequences

from modelopt_lite.kernels import AttentionRequest, KeyBlocks, attention
from modelopt_lite.kernels.portable import launch as portable_launch
from modelopt_lite.kernels.reference import attention_reference
from modelopt_lite.kernels.request import ForwardResult
from modelopt_lite.kernels.settings import Settings
from modelopt_lite.methods.sink_window import SinkWindow
from modelopt_lite.plan import DENSE

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"),
    # Rows that keep nothing divide by zero on purpose.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]

FORWARD = Settings(16, 16, 4, 1, descriptors=False, frozen=False)
POINTERS = (Settings(16, 16, 4, 1, descriptors=False, frozen=False),) * 2
DESCRIPTORS = (
    Settings(32, 16, 4, 1, descriptors=True, frozen=False),
    Settings(16, 32, 4, 1, descriptors=True, frozen=False),
)
# FP32 rounding of exponentials, sums and products of numbers of order 1 over at most some hundred keys.
FP32 = {"rtol": 3e-5, "atol": 3e-5}
# The first 16 queries see none of the keys that are listed for their block, and the last block has none at all.
WITHOUT_DIAGONAL = KeyBlocks(
    torch.tensor([[1, 0]], dtype=torch.int32),
    torch.tensor([[[1, 0, 2], [0, 1, 2]]], dtype=torch.int32),
    torch.tensor([0], dtype=torch.int32),
    block_size=16,
    block_rows=32,
)


def run(grad, request, kernel_settings, forward_settings=None):
    """Run the backward kernels on what the oracle computed, or on what the forward kernel does with its settings."""
    if forward_settings is None:
        out, lse = attention_reference(request)
        out, lse = out.to(request.q.dtype), lse.float()
    else:
        out, lse = portable_launch.prepare(request, forward_settings)(request)
    grad = portable_launch.readable(grad)
    differentiate = portable_launch.prepare_backward(grad, request, kernel_settings)
    return differentiate(grad, ForwardResult(out, lse), request)


def gradients_of_oracle(grad, request):
    """Differentiate the oracle; what is poisoned belongs to no sequence and gets no gradient."""
    request = doubled(request)
    q, k, v = (x.nan_to_num() for x in request[:3])
    return gradients(oracle, grad.nan_to_num(), request._replace(q=q, k=k, v=v))


def output_gradient(request):
    """Random numbers, and NaN for rows of no sequence, as queries have them."""
    q, v = request.q, request.v
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(q.shape[0], q.shape[1], v.shape[2], generator=generator)
    return grad.masked_fill(q[..., :1].isnan(), torch.nan).to(q.dtype)


def check(request, kernel_settings, tolerance=FP32, forward_settings=None):
    """Compare with the oracle; what no sequence owns is NaN in every input."""
    grad = output_gradient(request)
    found = run(grad, request, kernel_settings, forward_settings)
    expected = gradients_of_oracle(grad, request)
    assert (found[3] is None) == (expected[3] is None)
    for name, ours, theirs in zip(("q", "k", "v", "s_aux"), found, expected, strict=True):
        if ours is not None:
            torch.testing.assert_close(
                ours.double(), theirs, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )


@given(cases(longest=36, batch=2) | cases(longest=36, batch=2, placed=True), st.sampled_from([POINTERS, DESCRIPTORS]))
@settings(max_examples=16, deadline=None)
def test_gradients_equal_the_oracles(case, kernel_settings):
    check(case.request, kernel_settings, forward_settings=FORWARD)


@pytest.mark.parametrize(("n", "m"), [(n, m) for m in (2, 4, 8, 16) for n in {1, m // 2, m - 1}])
def test_n_of_m_with_many_ties(n, m):
    generator = torch.Generator().manual_seed(n)
    scores = torch.randint(0, 4, (37, 1, 16), generator=generator).float()
    request = sequences([(37, 37)], (1, 1), plan=n_of_m(n, m, dense_window_size=2), softmax_scale=0.25)
    k = torch.where(request.k.isnan(), request.k, request.k.sign())
    check(request._replace(q=torch.cat([k[:3], scores, k[:1]]), k=k), POINTERS)


@pytest.mark.parametrize("plan", [DENSE, n_of_m(2, 4, 3, 5)], ids=["dense", "2:4"])
@pytest.mark.parametrize("dims", [(16, 16), (24, 8), (40, 48)])
@pytest.mark.parametrize("heads", [(1, 1), (4, 2)])
def test_shapes(heads, dims, plan):
    lengths = [(1, 1), (33, 33), (0, 5), (7, 20), (1, 20)]
    check(sequences(lengths, heads, dims, plan=plan), DESCRIPTORS)


def test_odd_length_with_real_tiles():
    request = sequences([(193, 193)], (1, 1), plan=n_of_m(2, 4, 4, 64))
    check(request, (Settings(64, 64, 4, 1, descriptors=True, frozen=False),) * 2)


def test_half_precision():
    request = sequences([(50, 50)], dtype=torch.float16, plan=n_of_m(4, 8, dense_window_size=8))
    # FP16 rounds weights, the gradients of scores and those that are returned to 2^-11.
    check(request, POINTERS, {"rtol": 4e-3, "atol": 4e-3})


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 20])
@pytest.mark.parametrize("sinks", [0, 17])
def test_exemptions_are_token_exact(causal, window, sinks):
    check(sequences([(40, 53)], plan=n_of_m(1, 4, sinks, window), is_causal=causal), POINTERS)


@pytest.mark.parametrize(("causal", "sliding_window"), [(True, None), (True, 9), (False, None), (False, 9)])
@pytest.mark.parametrize("plan", [DENSE, n_of_m(2, 4, 21, 6), n_of_m(3, 8)], ids=["dense", "2:4", "3:8"])
def test_queries_and_keys_anywhere(plan, sliding_window, causal):
    """Groups and sinks count from the sequence's first token; decode is dense wherever its query is."""
    first_q, first_k = torch.tensor([40, 3, 60, 0]), torch.tensor([5, 0, 19, 30])
    request = sequences(
        [(30, 41), (50, 33), (1, 37), (20, 7)], plan=plan, sliding_window=sliding_window, is_causal=causal,
        first_q=first_q, first_k=first_k,
    )  # fmt: skip
    # Each way to load meets each plan, causality and sliding window.
    kernel_settings = POINTERS if causal == (sliding_window is None) else DESCRIPTORS
    check(request, kernel_settings, forward_settings=FORWARD)


def test_more_queries_than_keys():
    check(sequences([(35, 18), (20, 0), (50, 35)], plan=n_of_m(1, 4, 3, 7), is_causal=False), POINTERS)


@pytest.mark.parametrize("sliding_window", [1, 17, 1000])
@pytest.mark.parametrize("plan", [DENSE, n_of_m(2, 4, 3, 4)], ids=["dense", "2:4"])
def test_sliding_window(plan, sliding_window):
    check(sequences([(60, 75), (1, 30)], plan=plan, sliding_window=sliding_window), POINTERS)


@pytest.mark.parametrize("logit", [-30.0, 0.0, 200.0])
def test_learnable_sinks(logit):
    check(sequences([(40, 40)], plan=n_of_m(2, 4), s_aux=torch.tensor([logit, logit / 2])), POINTERS)


@pytest.mark.parametrize("plan", [DENSE, n_of_m(2, 4)], ids=["dense", "2:4"])
def test_softcap_of_large_and_small_scores(plan):
    request = sequences([(40, 40)], softcap=3.0, plan=plan)
    for size in (1.0, 1e-3, 10.0):
        check(request._replace(q=request.q * size), POINTERS)


@pytest.mark.parametrize("plan", [DENSE, n_of_m(2, 4, 2, 3)], ids=["dense", "2:4"])
def test_strides_other_than_packed(plan):
    request = sequences([(30, 30)], (4, 2), plan=plan)
    (q, k, v), grad = request[:3], output_gradient(request)
    expected = run(grad, request, DESCRIPTORS)
    apart = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (grad, q, k, v)]
    wide = [torch.cat([x, x], dim=2)[:, :, :16] for x in (grad, q, k, v)]
    columns_first = [grad.transpose(1, 2).contiguous().transpose(1, 2), q, k, v]
    for tensors in (apart, wide, columns_first):
        assert not tensors[0].is_contiguous()
        found = run(tensors[0], AttentionRequest(*tensors[1:], *request[3:]), DESCRIPTORS)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs)


def test_expanded_gradient():
    request = sequences([(30, 30)])
    one = torch.ones(()).expand(request.q.shape)
    for ours, theirs in zip(run(one, request, DESCRIPTORS), gradients_of_oracle(one, request), strict=True):
        assert ours is theirs is None or torch.allclose(ours.double(), theirs, **FP32)


def test_other_sequences_do_not_leak():
    request = sequences([(20, 20), (21, 21)])
    grad = output_gradient(request)
    alone = run(grad, request, DESCRIPTORS)
    for x in (grad, *request[:3]):
        x[24:] = torch.inf
    beside = run(grad, request, DESCRIPTORS)
    for ours, theirs in zip(beside[:3], alone[:3], strict=True):
        assert torch.equal(ours[:24], theirs[:24])


@pytest.mark.parametrize("plan", HOOKS)
def test_other_hooks(plan):
    """A row may keep nothing; then nothing gets a gradient from it."""
    check(sequences([(45, 60)], plan=plan), DESCRIPTORS)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("keys", "plan", "options"),
    [
        (45, HOOKS[3], {}),
        (60, SinkWindow(num_sink_tokens=0, dense_window_size=0).plan(), {}),
        (60, n_of_m(2, 4), {"first_q": torch.tensor([3]), "first_k": torch.tensor([17])}),
        (23, DENSE, {"sliding_window": 4, "is_causal": False}),
        (45, DENSE, {"blocks": WITHOUT_DIAGONAL}),
    ],
    ids=["hook", "nothing", "positions", "sliding window", "lists"],
)
def test_rows_without_keys_may_have_any_gradient(keys, plan, options, backend):
    request = sequences([(45, keys)], plan=plan, **options)
    dead = attention_reference(request)[1] == -torch.inf
    assert dead[3:48].any()
    grad = output_gradient(request)
    found, expected = (
        gradients(lambda request: attention(**arguments(request), backend=backend), x, request)
        for x in (grad.masked_fill(dead[..., None], torch.nan), grad)
    )
    assert all(map(torch.equal, found[:3], expected[:3]))
    right = gradients_of_oracle(grad, request)
    double = doubled(request)
    q, k, v = (x.nan_to_num() for x in double[:3])
    of_oracle = gradients(oracle, grad.masked_fill(dead[..., None], torch.nan), double._replace(q=q, k=k, v=v))
    assert all(map(torch.equal, of_oracle[:3], right[:3]))


@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (3, 0), (4, 20), (0, 0)])
def test_a_rule_that_keeps_nothing(sinks, window):
    plan = SinkWindow(num_sink_tokens=sinks, dense_window_size=window).plan()
    check(sequences([(45, 60), (70, 70)], plan=plan), POINTERS)


def test_directional_derivative():
    """The forward kernel's differences along random directions, so far from ties that no step changes a selection."""
    step, n, m = 2**-9, 2, 4
    for seed in range(50):
        request = sequences([(9, 13)], seed=seed, plan=n_of_m(n, m))
        q, k, v = (x.nan_to_num() for x in request[:3])
        request = request._replace(q=q, k=k, v=v)
        generator = torch.Generator().manual_seed(seed)
        directions = [torch.randn(x.shape, generator=generator) for x in (q, k, v)]
        # Scores are products of q + t dq and k + t dk; how far do they move at most until t = 2 step?
        (dq, dk), t = directions[:2], 2 * step
        linear, square = (
            torch.einsum("qhd,kgd->hqk", *x) for x in ((torch.cat([q, dq], 2), torch.cat([dk, k], 2)), (dq, dk))
        )
        moved = request.softmax_scale * (t * linear.abs().max() + t * t * square.abs().max())
        if smallest_gap(request, n, m) > 2 * moved:
            break
    else:
        pytest.fail("no request is far enough from ties")
    grad = output_gradient(request)

    def value(t):
        moved = (x + t * d for x, d in zip((q, k, v), directions, strict=True))
        out, _ = portable_launch.prepare(request, FORWARD)(AttentionRequest(*moved, *request[3:]))
        return (out.double() * grad).sum().item()

    near, far = ((value(t) - value(-t)) / (2 * t) for t in (step, 2 * step))
    difference = (4 * near - far) / 3  # without the error of second order
    found = run(grad, request, POINTERS, FORWARD)[:3]
    derivative = sum((x.double() * d).sum().item() for x, d in zip(found, directions, strict=True))
    # An output is off by the roundings of 16 products and 13 weights and some more, independently of the others.
    tolerance = 40 * 2**-24 * grad.norm().item() / step
    assert tolerance < 0.01 * abs(derivative)
    assert abs(difference - derivative) < tolerance
