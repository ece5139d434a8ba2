"""The contract of ``docs/design.md``, point by point: brute force = oracle = torch backend."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from brute_force import attention_brute_force
from cases import SCALE, Case, cases, packed_problem, smallest_gap
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from modelopt_lite.kernels import attention, attention_statistics, blocked
from modelopt_lite.kernels.reference import attention_reference, kept_scores
from modelopt_lite.kernels.top_n import keep_top_n, top_n_plan
from modelopt_lite.methods import SinkWindow
from modelopt_lite.plan import DENSE, AttentionPlan

# FP32 rounding of exponentials, sums and products of numbers of order 1 over at most 80 keys.
FP32 = {"rtol": 1e-5, "atol": 1e-5}

many_cases = settings(max_examples=100, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def tiles_smaller_than_sequences():
    """Let short sequences cross block borders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "QUERY_BLOCK", 16)
        patch.setattr(blocked, "TILE_SCORES", 1024)
        yield


def run(case: Case, **overrides):
    return attention(case.q, case.k, case.v, **{**case.arguments(), "plan": case.problem.plan, **overrides})


def statistics_of(case: Case, slack: int = 0, **overrides):
    arguments = {name: x for name, x in case.arguments().items() if name != "s_aux"}
    arguments["max_input_len"] += slack
    arguments["max_input_len_k"] += slack
    return attention_statistics(case.q, case.k, **{**arguments, "plan": case.problem.plan, **overrides})


@given(cases(longest=24, batch=1) | cases(longest=24, batch=1, placed=True))
@many_cases
def test_oracle_is_the_contract(case):
    output, _ = attention_reference(case.q, case.k, case.v, case.s_aux, case.problem)
    queries, keys, first_query, first_key = next(case.problem.sequences())
    expected, counts = attention_brute_force(
        case.q[queries],
        case.k[keys],
        case.v[keys],
        scale=SCALE,
        softcap=case.problem.softcap,
        s_aux=case.s_aux,
        first_query=first_query,
        first_key=first_key,
        **case.selection(),
    )
    torch.testing.assert_close(output[queries], expected, rtol=1e-12, atol=1e-12)
    assert statistics_of(case).kept == counts.sum()


@given(cases() | cases(placed=True))
@many_cases
def test_torch_backend_equals_oracle(case):
    output, lse = run(case, return_lse=True)
    expected, expected_lse = attention_reference(case.q, case.k, case.v, case.s_aux, case.problem)
    torch.testing.assert_close(output, expected.float(), **FP32)
    torch.testing.assert_close(lse, expected_lse.float(), **FP32)


@given(cases() | cases(placed=True))
@many_cases
def test_gradients_equal_oracle(case):
    inputs = [x.requires_grad_() for x in (case.q, case.k, case.v, case.s_aux) if x is not None]
    output = run(case)
    expected, _ = attention_reference(case.q, case.k, case.v, case.s_aux, case.problem)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad(output, inputs, direction)
    wanted = torch.autograd.grad(expected, inputs, direction.double())
    for x, y in zip(found, wanted, strict=True):
        # Rows of no sequence have no gradient, although the oracle's zero rows carry NaN inputs.
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


GRADCHECK_EPS = 1e-6
PREFILL, CHUNK = (9, 9), (4, 12)  # queries and keys


@pytest.mark.parametrize(
    ("n", "m", "sinks", "window", "lengths", "options"),
    [
        pytest.param(2, 4, 0, 0, PREFILL, {}, id="2:4"),
        pytest.param(4, 8, 0, 0, PREFILL, {}, id="4:8"),
        pytest.param(1, 4, 2, 3, PREFILL, {}, id="sinks and window"),
        pytest.param(2, 4, 0, 0, CHUNK, {}, id="more keys than queries"),
        pytest.param(2, 4, 0, 0, CHUNK, {"sliding_window": 6}, id="sliding window"),
        pytest.param(2, 4, 0, 0, CHUNK, {"is_causal": False}, id="not causal"),
        pytest.param(2, 4, 0, 0, PREFILL, {"dims": (4, 3)}, id="MLA"),
        pytest.param(2, 4, 0, 0, PREFILL, {"softcap": 1.5}, id="softcap"),
        pytest.param(2, 4, 0, 0, PREFILL, {"s_aux": True}, id="s_aux"),
        pytest.param(3, 8, 1, 2, CHUNK, {"sliding_window": 11, "softcap": 2.0, "s_aux": True}, id="together"),
    ],
)
def test_gradcheck(n, m, sinks, window, lengths, options, monkeypatch):
    """Finite differences, so far from ties that no step changes a selection."""
    monkeypatch.setattr(blocked, "QUERY_BLOCK", 4)
    monkeypatch.setattr(blocked, "TILE_SCORES", 64)
    options = {"plan": top_n_plan(n, m, sinks, window), "dims": (3, 3), **options}
    *inputs, problem = packed_problem([lengths], (2, 1), dtype=torch.float64, device="cpu", exact=False, **options)
    q, k, v, s_aux = (None if x is None else x.double().nan_to_num() for x in inputs)
    # A step of one element moves a score by at most the element that it is multiplied with.
    step = GRADCHECK_EPS * problem.softmax_scale * max(q.abs().max(), k.abs().max())
    assert smallest_gap(q, k, n, m, problem) > 100 * step
    p = problem
    packing = (p.starts_q, p.lengths_q, p.max_q, p.is_causal, p.softmax_scale, p.starts_k, p.lengths_k, p.max_k)

    def function(q, k, v, s_aux=None):
        more = {"sliding_window": p.sliding_window, "softcap": p.softcap, "s_aux": s_aux}
        return attention(q, k, v, *packing, plan=p.plan, backend="torch", **more)

    inputs = [x.requires_grad_() for x in (q, k, v, s_aux) if x is not None]
    assert torch.autograd.gradcheck(function, inputs, eps=GRADCHECK_EPS)


def test_what_is_saved_for_the_backward_pass_grows_with_the_length_alone():
    def saved(length):
        tensors = []
        q, k, v = (torch.randn(length, heads, 8, requires_grad=True) for heads in (4, 2, 2))
        starts, lengths = torch.tensor([0]), torch.tensor([length])
        with torch.autograd.graph.saved_tensors_hooks(lambda x: tensors.append(x) or x, lambda x: x):
            output = attention(q, k, v, starts, lengths, length, sparsity_n=2, s_aux=torch.randn(4, requires_grad=True))
        assert output.requires_grad
        # Views count with all that they keep alive.
        return sum(x.untyped_storage().nbytes() // x.element_size() for x in tensors)

    of_a_token = 4 * 8 + 4 + 4 * 8 + 2 * 8 + 2 * 8  # output, logarithms, q, k, v
    for length in (64, 640):
        assert length * of_a_token <= saved(length) <= length * of_a_token + 16


def test_operator_is_well_formed():
    """PyTorch's own checks: schema, fake shapes, autograd registration, tracing."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(11, heads, dim, requires_grad=True) for heads, dim in ((4, 8), (2, 8), (2, 6)))
    starts, lengths = torch.tensor([0, 5]), torch.tensor([5, 6])
    s_aux = torch.randn(4, requires_grad=True)
    plan = top_n_plan(2, 4, 1, 2)
    for extra in (None, s_aux):
        packing = (starts, lengths, 6, starts, lengths, 6)
        options = (True, 0.5, None, 3.0, plan.key, False, True)
        torch.library.opcheck(torch.ops.modelopt_lite.attention.default, (q, k, v, extra, *packing, *options))


@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize("with_lse", [True, False])
def test_shapes_without_tensors(use_triton, with_lse):
    with FakeTensorMode():
        q, k, v = (torch.empty(11, heads, dim) for heads, dim in ((4, 8), (2, 8), (2, 6)))
        packing = (torch.empty(2, dtype=torch.int32), torch.empty(2, dtype=torch.int32), 6) * 2
        options = (True, 0.5, None, None, DENSE.key, use_triton, with_lse)
        output, lse = torch.ops.modelopt_lite.attention(q, k, v, None, *packing, *options)
    assert output.shape == (11, 4, 6)
    assert lse.shape == ((11, 4) if with_lse or not use_triton else (0,))


def test_no_gradients_without_lse():
    """What the operator's callers see to; without, the kernels would read what is not there."""
    with FakeTensorMode():
        q = torch.empty(11, 2, 8, requires_grad=True)
        packing = (torch.empty(2, dtype=torch.int32), torch.empty(2, dtype=torch.int32), 6) * 2
        options = (True, 0.5, None, None, DENSE.key, True, False)
        output, _ = torch.ops.modelopt_lite.attention(q, q, q, None, *packing, *options)
        with pytest.raises(ValueError, match="with_lse: False is not allowed where gradients are wanted"):
            output.sum().backward()


@given(st.integers(0, 16), st.sampled_from([2, 4, 8, 16]), st.data())
def test_exactly_n_of_visible_ties_to_the_lower(n, m, data):
    n = min(n, m)
    group = data.draw(st.lists(st.sampled_from([-torch.inf, -1.0, 0.0, 0.5, 2.0]), min_size=m, max_size=m))
    kept = keep_top_n(torch.tensor([group]), torch.tensor(0), torch.arange(m)[None], n=n)[0]
    expected = set(sorted(range(m), key=lambda j: (-group[j], j))[:n])
    assert {j for j in range(m) if kept[j]} == expected
    visible = [j for j in range(m) if group[j] > -torch.inf]
    assert sum(bool(kept[j]) for j in visible) == min(n, len(visible))


@given(cases(batch=1), st.data())
@many_cases
def test_chunked_prefill_equals_one_prefill(case, data):
    problem = case.problem
    _, keys, *_ = next(problem.sequences())
    len_k = keys.stop - keys.start
    q = torch.randint(-2, 3, (len_k, *case.q.shape[1:])) / 2
    k, v = case.k[keys], case.v[keys]
    zero = torch.zeros(1, dtype=torch.int64)

    def prefill(start, stop):
        return attention(
            q[start:stop],
            k[:stop],
            v[:stop],
            zero,
            torch.tensor([stop - start]),
            stop - start,
            True,
            SCALE,
            zero,
            torch.tensor([stop]),
            stop,
            plan=dataclasses.replace(problem.plan, sparse_decode=True),  # or a chunk of one token would be decode
            sliding_window=problem.sliding_window,
            softcap=problem.softcap,
            s_aux=case.s_aux,
        )

    cuts = sorted({0, len_k, *data.draw(st.lists(st.integers(0, len_k), max_size=4))})
    chunks = [prefill(start, stop) for start, stop in pairwise(cuts)]
    if chunks:
        torch.testing.assert_close(torch.cat(chunks), prefill(0, len_k), **FP32)


@given(cases(batch=3))
@many_cases
def test_batch_mates_do_not_matter(case):
    together, lse = run(case, return_lse=True)
    problem = case.problem
    for b, (queries, *_) in enumerate(problem.sequences()):
        alone = {
            name: x[b : b + 1] if isinstance(x, torch.Tensor) and name.startswith("b_") else x
            for name, x in case.arguments().items()
        }
        output, lse_alone = attention(case.q, case.k, case.v, **alone, plan=problem.plan, return_lse=True)
        torch.testing.assert_close(output[queries], together[queries], **FP32)
        torch.testing.assert_close(lse_alone[queries], lse[queries], **FP32)


@given(cases(), st.sampled_from([1, 7, 64]), st.sampled_from([16, 512, 1 << 16]))
@many_cases
def test_tile_size_does_not_matter(case, query_block, tile_scores):
    expected = run(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "QUERY_BLOCK", query_block)
        patch.setattr(blocked, "TILE_SCORES", tile_scores)
        torch.testing.assert_close(run(case), expected, **FP32)


@given(cases())
@many_cases
def test_n_equal_to_m_and_a_huge_window_are_dense(case):
    dense = run(case, plan=DENSE)
    torch.testing.assert_close(run(case, plan=top_n_plan(case.m, case.m, 0, 0)), dense, **FP32)
    if case.problem.is_causal:
        torch.testing.assert_close(run(case, plan=top_n_plan(1, case.m, 0, 1000)), dense, **FP32)
    torch.testing.assert_close(run(case, plan=top_n_plan(1, case.m, 1000, 0)), dense, **FP32)


def decode_inputs():
    torch.manual_seed(1)
    q, k, v = torch.randn(1, 2, 8), torch.randn(40, 2, 8), torch.randn(40, 2, 8)
    zero, one = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    return (q, k, v, zero, one, 1, True, None, zero, 40 * one, 40)


def test_decode_is_dense_unless_the_plan_says_otherwise():
    arguments = decode_inputs()
    plan = top_n_plan(1, 4, 0, 0)
    dense = attention(*arguments)
    torch.testing.assert_close(attention(*arguments, plan=plan), dense, rtol=0, atol=0)
    sparse = attention(*arguments, plan=dataclasses.replace(plan, sparse_decode=True))
    # The last row of a longer prefill.
    q = torch.cat([torch.zeros(1, 2, 8), arguments[0]])
    selection = {"n": 1, "m": 4, "sinks": 0, "window": 0, "causal": True, "sliding_window": None}
    rows, _ = attention_brute_force(q, *arguments[1:3], scale=8**-0.5, **selection)
    torch.testing.assert_close(sparse, rows[1:].float(), **FP32)


def test_an_equal_mix_keeps_half_of_the_dense_mass():
    """Equal scores: 2:4 keeps half of the mass in full groups, and the statistics say so."""
    length = 64
    q, k = torch.zeros(length, 1, 4), torch.zeros(length, 1, 4)
    starts, lengths = torch.tensor([0]), torch.tensor([length])
    statistics = attention_statistics(q, k, starts, lengths, length, plan=top_n_plan(2, 4, 0, 0))
    visible = length * (length + 1) // 2
    kept = sum(2 * (p // 4) + min(2, p % 4) for p in range(1, length + 1))
    mass = sum((2 * (p // 4) + min(2, p % 4)) / p for p in range(1, length + 1))
    assert statistics[:3] == (length, visible, kept)
    assert statistics.mass == pytest.approx(mass, rel=1e-6)


@given(cases() | cases(placed=True), st.sampled_from([0, 1, 100]))
@many_cases
def test_statistics_equal_oracle(case, slack):
    """Whatever the upper bounds of the lengths."""
    found = statistics_of(case, slack)
    rows = visible = kept = mass = 0
    for queries, keys, *firsts in case.problem.sequences():
        if queries.start == queries.stop:
            continue
        q, k = case.q[queries].double(), case.k[keys].double()
        dense = kept_scores(q, k, dataclasses.replace(case.problem, plan=DENSE), *firsts)
        chosen = kept_scores(q, k, case.problem, *firsts) > -torch.inf
        seen = dense > -torch.inf
        rows, visible, kept = rows + seen.any(-1).sum(), visible + seen.sum(), kept + chosen.sum()
        mass += dense.softmax(-1)[chosen].sum()
    assert found[:3] == (rows, visible, kept)
    torch.testing.assert_close(float(found.mass), float(mass), **FP32)


@given(cases(longest=24) | cases(longest=24, placed=True))
@settings(max_examples=10, deadline=None)
def test_statistics_wait_for_no_device(case):
    """On the meta device tensors have no values, so that reading one is an error."""
    fields = ("starts_q", "lengths_q", "starts_k", "lengths_k", "first_q", "first_k")
    moved = {name: x.to("meta") for name in fields if (x := getattr(case.problem, name)) is not None}
    problem = dataclasses.replace(case.problem, **moved)
    found = blocked.statistics_blocked(case.q.to("meta"), case.k.to("meta"), problem)
    assert all(count.is_meta for count in found)


@given(cases(), st.integers(0, 9), st.sampled_from([0, 1, 5, 30]))
@many_cases
def test_sinks_and_window_alone(case, sinks, window):
    """A rule that keeps nothing: tiles without sinks and recent keys are skipped, and missed by nobody."""
    plan = SinkWindow(num_sink_tokens=sinks, dense_window_size=window).plan()
    problem = dataclasses.replace(case.problem, plan=plan)
    expected, _ = attention_reference(case.q, case.k, case.v, case.s_aux, problem)
    torch.testing.assert_close(run(case, plan=plan), expected.float(), **FP32)
    assert statistics_of(case, plan=plan).visible == statistics_of(case, plan=DENSE).visible


def test_a_rule_of_ones_own():
    """A plan may hold any rule over one group; here every other key, whatever its score."""

    def even(scores, q_pos, k_pos):
        return (k_pos % 2 == 0).expand_as(scores)

    torch.manual_seed(0)
    q, k, v = (torch.randn(50, 2, 8) for _ in range(3))
    starts, lengths = torch.tensor([0]), torch.tensor([50])
    output = attention(q, k, v, starts, lengths, 50, False, plan=AttentionPlan(keep=even))
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k[::2], v[::2])))
    torch.testing.assert_close(output, dense.transpose(0, 1), **FP32)


def test_half_precision_is_no_worse_than_twice_pytorch():
    torch.manual_seed(0)
    length = 300
    starts, lengths = torch.tensor([0]), torch.tensor([length])
    for dtype in (torch.float16, torch.bfloat16):
        q, k, v = (torch.randn(length, heads, 64).to(dtype) for heads in (4, 2, 2))
        heads_first = [x.transpose(0, 1) for x in (q, k, v)]
        exact = torch.nn.functional.scaled_dot_product_attention(
            *(x.double() for x in heads_first), is_causal=True, enable_gqa=True
        )
        theirs = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        ours = attention(q, k, v, starts, lengths, length).transpose(0, 1)
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
