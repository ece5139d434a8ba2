"""The Triton forward kernel against the oracle, run by Triton's interpreter; tiles are small so that phases mix."""

import dataclasses
import itertools
import os

import pytest
import torch
from cases import cases
from hypothesis import given, settings
from hypothesis import strategies as st

from modelopt_lite.kernels import AttentionRequest
from modelopt_lite.kernels.language import jit, tl
from modelopt_lite.kernels.portable import launch as portable_launch
from modelopt_lite.kernels.portable.launch import KEY_SETTINGS, QUERY_SETTINGS, SETTINGS
from modelopt_lite.kernels.reference import attention_reference
from modelopt_lite.kernels.settings import DTYPES, Settings, default_settings
from modelopt_lite.kernels.top_n import top_n_plan
from modelopt_lite.methods import SinkWindow
from modelopt_lite.plan import DENSE, GROUP_SIZES, AttentionPlan

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"),
    # A frozen reference that is too low overflows on purpose.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]

ORDINARY = Settings(16, 16, 4, 1, descriptors=False, frozen=False)
FROZEN = Settings(16, 16, 4, 1, descriptors=True, frozen=True)
# FP32 rounding of exponentials, sums and products of numbers of order 1 over at most some hundred keys.
FP32 = {"rtol": 2e-5, "atol": 2e-5}


def n_of_m(n, m, num_sink_tokens=0, dense_window_size=0):
    return top_n_plan(n, m, num_sink_tokens, dense_window_size)


def run(request, kernel_settings):
    return portable_launch.prepare(request, kernel_settings)(request)


def check(request, kernel_settings, tolerance=FP32):
    """Compare with the oracle; every output element starts as NaN."""
    out, lse = run(request, kernel_settings)
    expected, expected_lse = attention_reference(request)
    torch.testing.assert_close(out.double(), expected, **tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, **tolerance)


def sequences(lengths, heads=(2, 1), dims=(16, 16), dtype=torch.float32, seed=0, **options):
    """Make a request of random sequences ``(len_q, len_k)`` with gaps that hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    query_heads, kv_heads = heads
    sides = []
    for side in range(2):
        starts, row = [], 3
        for pair in lengths:
            starts.append(row)
            row += pair[side] + 1
        sides.append((torch.tensor(starts), torch.tensor([pair[side] for pair in lengths]), row))
    tensors = []
    for (starts, counts, rows), head_count, dim in zip(
        (sides[0], sides[1], sides[1]), (query_heads, kv_heads, kv_heads), (dims[0], *dims), strict=True
    ):
        x = torch.full((rows, head_count, dim), torch.nan)
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
            x[start : start + count] = torch.randn(count, head_count, dim, generator=generator)
        tensors.append(x.to(dtype))
    request = AttentionRequest(
        *tensors,
        s_aux=None,
        starts_q=sides[0][0],
        lengths_q=sides[0][1],
        max_q=max(pair[0] for pair in lengths),
        starts_k=sides[1][0],
        lengths_k=sides[1][1],
        max_k=max(pair[1] for pair in lengths),
        is_causal=True,
        softmax_scale=dims[0] ** -0.5,
        sliding_window=None,
        softcap=None,
        plan=DENSE,
        with_lse=True,
    )
    return request._replace(**options)


@given(cases(longest=70, batch=2) | cases(longest=70, batch=2, placed=True), st.sampled_from([ORDINARY, FROZEN]))
@settings(max_examples=30, deadline=None)
def test_kernel_equals_oracle(case, kernel_settings):
    check(case.request, kernel_settings)


@pytest.mark.parametrize(("n", "m"), [(n, m) for m in (2, 4, 8, 16) for n in range(1, m)])
def test_every_n_of_m_with_many_ties(n, m):
    generator = torch.Generator().manual_seed(n)
    scores = torch.randint(0, 4, (37, 1, 16), generator=generator).float()
    request = sequences([(37, 37)], (1, 1), plan=n_of_m(n, m, dense_window_size=2), softmax_scale=0.25)
    k = torch.where(request.k.isnan(), request.k, request.k.sign())
    check(request._replace(q=torch.cat([k[:3], scores, k[:1]]), k=k), ORDINARY)


@pytest.mark.parametrize("kernel_settings", [ORDINARY, FROZEN])
@pytest.mark.parametrize("dims", [(16, 16), (24, 8), (80, 48)])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2)])
def test_shapes(heads, dims, kernel_settings):
    lengths = [(1, 1), (33, 33), (0, 5), (7, 40), (1, 20)]
    check(sequences(lengths, heads, dims, plan=n_of_m(2, 4, 3, 5)), kernel_settings)


def test_without_lse():
    request = sequences([(33, 33), (0, 5), (7, 40)], plan=n_of_m(2, 4, 3, 5))
    out, _ = run(request, FROZEN)
    again, lse = run(request._replace(with_lse=False), FROZEN)
    assert lse is None
    assert torch.equal(out, again)


def test_odd_length_with_real_tiles():
    request = sequences([(257, 257)], (1, 1), plan=n_of_m(2, 4, 4, 64))
    check(request, Settings(64, 64, 4, 1, descriptors=True, frozen=True))


def test_half_precision():
    request = sequences([(50, 50)], dtype=torch.float16, plan=n_of_m(4, 8, dense_window_size=8))
    # FP16 rounds values and probabilities to 2^-11.
    check(request, ORDINARY, {"rtol": 2e-3, "atol": 2e-3})


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 20])
@pytest.mark.parametrize("sinks", [0, 1, 20])
def test_exemptions_are_token_exact(causal, window, sinks):
    check(sequences([(50, 70)], plan=n_of_m(1, 4, sinks, window), is_causal=causal), FROZEN)


@pytest.mark.parametrize("sliding_window", [1, 2, 17, 1000])
@pytest.mark.parametrize("plan", [DENSE, n_of_m(2, 4, 3, 4)], ids=["dense", "2:4"])
def test_sliding_window(plan, sliding_window):
    check(sequences([(60, 75), (1, 30)], plan=plan, sliding_window=sliding_window), FROZEN)


@pytest.mark.parametrize("logit", [-30.0, 0.0, 200.0])
def test_learnable_sinks(logit):
    check(sequences([(40, 40)], plan=n_of_m(2, 4), s_aux=torch.tensor([logit, logit / 2])), FROZEN)


def test_softcap_of_large_and_small_scores():
    request = sequences([(40, 40)], softcap=3.0, plan=n_of_m(2, 4))
    for size in (1.0, 1e-3, 10.0):
        check(request._replace(q=request.q * size), FROZEN)


def test_decode_is_dense_unless_asked():
    for sparse_decode in (False, True):
        plan = dataclasses.replace(n_of_m(1, 4), sparse_decode=sparse_decode)
        check(sequences([(1, 60), (2, 60)], plan=plan), ORDINARY)


def test_strides_other_than_packed():
    request = sequences([(30, 30)], (4, 2))
    apart = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in request[:3]]
    assert not apart[0].is_contiguous()
    check(AttentionRequest(*apart, *request[3:]), FROZEN)
    wide = [torch.cat([x, x], dim=2)[:, :, :16] for x in request[:3]]
    check(AttentionRequest(*wide, *request[3:]), ORDINARY)


@pytest.mark.parametrize("level", [200.0, -200.0, 1e4])
@pytest.mark.parametrize("causal", [True, False])
def test_frozen_reference_far_from_the_scores(level, causal):
    """Recent keys far above (below) all others: the reference is far too high (low), and in between."""
    request = sequences([(70, 70)], (1, 1), plan=n_of_m(2, 4, 0, 3), is_causal=causal, softmax_scale=1.0)
    request.q[..., 0] = 1.0
    request.k[3:43, :, 0] = -level
    # FP32 rounds such scores, and with them the logarithms of their weights, to 2^-24 of their size.
    check(request, FROZEN, {"rtol": 2e-5, "atol": 2e-5 + 1e-6 * abs(level)})


def test_values_of_other_sequences_do_not_leak():
    request = sequences([(20, 20), (21, 21)])
    alone, _ = run(request, FROZEN)
    for x in request[:3]:
        x[24:] = torch.inf
    beside, _ = run(request, FROZEN)
    assert torch.equal(alone[3:23], beside[3:23])


@pytest.mark.parametrize("kernel_settings", [ORDINARY, FROZEN])
@pytest.mark.parametrize("options", [{}, {"dims": (24, 8)}, {"first_q": torch.tensor([3, 0, 40])}], ids=str)
def test_results_go_to_the_rows_that_are_named(options, kernel_settings):
    request = sequences([(20, 20), (0, 9), (7, 37)], plan=n_of_m(2, 4, 1, 2), **options)
    rows = torch.randperm(len(request.q), generator=torch.Generator().manual_seed(0))
    check(request._replace(output_rows=rows), kernel_settings)
    with pytest.raises(ValueError, match=f"output_rows: not a permutation of the {len(rows)} rows of q"):
        run(request._replace(output_rows=rows.clamp(min=1)), kernel_settings)


@jit
def near_top_hook(scores, q_pos, k_pos, args):
    """Keep what is less than ``args[1]`` below the group's best, or at a position divisible by ``args[0]``."""
    best = tl.maximum(scores[0], scores[1])
    return (
        (scores[0] > best - args[1]) | (k_pos[0] % args[0] == 0),
        (scores[1] > best - args[1]) | (k_pos[1] % args[0] == 0),
    )


@jit
def positive_hook(scores, q_pos, k_pos, args):
    """Keep scores above a threshold, and of even queries all."""
    return ((scores[0] > args[0]) | (q_pos % 2 == 0),)


def near_top(scores, q_pos, k_pos):
    return (scores > scores.amax(-1, keepdim=True) - 0.5) | (k_pos % 3 == 0)


def positive(scores, q_pos, k_pos):
    return (scores > 0.25) | (q_pos % 2 == 0)


HOOKS = [
    AttentionPlan(near_top, 2, 2, 3, False, near_top_hook, (3,), (0.5,), keeps_group_max=True),
    AttentionPlan(near_top, 2, 0, 0, False, near_top_hook, (3,), (0.5,)),
    AttentionPlan(positive, 1, 2, 3, False, positive_hook, (), (0.25,)),
    AttentionPlan(positive, 1, 0, 0, False, positive_hook, (), (0.25,)),
]


@pytest.mark.parametrize("kernel_settings", [ORDINARY, FROZEN])
@pytest.mark.parametrize("plan", HOOKS)
def test_other_hooks(plan, kernel_settings):
    """Scores come to a hook scaled; a row may keep nothing."""
    check(sequences([(45, 60)], plan=plan), kernel_settings)


def test_a_rule_that_keeps_nothing():
    """What is skipped then makes no difference."""
    for kernel_settings in (ORDINARY, FROZEN):
        for sinks, window in ((0, 1), (3, 0), (4, 20), (0, 0)):
            plan = SinkWindow(num_sink_tokens=sinks, dense_window_size=window).plan()
            check(sequences([(45, 60), (70, 70)], plan=plan), kernel_settings)


@pytest.mark.parametrize("table", [SETTINGS, QUERY_SETTINGS, KEY_SETTINGS], ids=["forward", "queries", "keys"])
def test_table_covers_every_size(table):
    for capability, dtype, power, group in itertools.product((80, 86, 90, 100, 120), DTYPES, range(4, 9), GROUP_SIZES):
        for is_causal in (True, False):
            assert default_settings(capability, dtype, 2**power, group, is_causal, table) is not None
