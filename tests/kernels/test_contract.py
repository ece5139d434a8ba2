"""The contract of ``docs/design.md``, point by point: brute force = oracle = torch backend."""

import dataclasses
import weakref
from itertools import pairwise

import pytest
import torch
from brute_force import attention_brute_force
from cases import SCALE, Case, arguments, cases, one_sequence, oracle, packed_request, smallest_gap, tensors_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from modelopt_lite.kernels import (
    AttentionRequest,
    KeyBlocks,
    attention,
    attention_statistics,
    blocked,
    compute,
    statistics,
)
from modelopt_lite.kernels.reference import attention_reference, kept_scores
from modelopt_lite.kernels.request import SCHEMA
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
    return attention(**{**arguments(case.request), **overrides})


def statistics_of(case: Case, slack: int = 0, **overrides):
    given = {name: x for name, x in arguments(case.request).items() if name not in ("v", "s_aux", "blocks")}
    given["max_input_len"] += slack
    given["max_input_len_k"] += slack
    return attention_statistics(**{**given, **overrides})


@given(cases(longest=24, batch=1) | cases(longest=24, batch=1, placed=True))
@many_cases
def test_oracle_is_the_contract(case):
    r = case.request
    output, _ = attention_reference(r)
    queries, keys, first_query, first_key = next(r.sequences())
    expected, counts = attention_brute_force(
        r.q[queries],
        r.k[keys],
        r.v[keys],
        scale=SCALE,
        softcap=r.softcap,
        s_aux=r.s_aux,
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
    expected, expected_lse = attention_reference(case.request)
    torch.testing.assert_close(output, expected.float(), **FP32)
    torch.testing.assert_close(lse, expected_lse.float(), **FP32)


@given(cases() | cases(placed=True))
@many_cases
def test_gradients_equal_oracle(case):
    inputs = [x.requires_grad_() for x in tensors_of(case.request).values()]
    output, expected = run(case), oracle(case.request)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad(output, inputs, direction)
    wanted = torch.autograd.grad(expected, inputs, direction.double())
    for x, y in zip(found, wanted, strict=True):
        # Rows of no sequence have no gradient, although the oracle's zero rows carry NaN inputs.
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [torch.arange(11, dtype=torch.int32), torch.arange(10)], ids=str)
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_rows_for_the_results_are_checked(rows, needs_gradient):
    q = torch.randn(11, 4, 8, requires_grad=needs_gradient)
    with pytest.raises(ValueError, match=r"output_rows: int.. \[1.\] on cpu; must be int64 \[11\] on cpu"):
        compute(one_sequence(q, q, q, output_rows=rows))


@given(cases(longest=40) | cases(longest=40, placed=True), st.booleans(), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_results_go_to_the_rows_that_are_named(case, needs_gradient, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(case.request.q), generator=generator)
    request = case.request._replace(with_lse=True, output_rows=rows)
    inputs = [x.requires_grad_(needs_gradient) for x in tensors_of(request).values()]
    (found, lse), (expected, expected_lse) = compute(request), attention_reference(request)
    torch.testing.assert_close(found, expected.float(), **FP32)
    torch.testing.assert_close(lse, expected_lse.float(), **FP32)
    if needs_gradient:
        direction = torch.randn(found.shape, generator=generator)
        found = torch.autograd.grad(found, inputs, direction)
        wanted = torch.autograd.grad(oracle(request), inputs, direction.double())
        for x, y in zip(found, wanted, strict=True):
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
    request = packed_request([lengths], (2, 1), dtype=torch.float64, device="cpu", exact=False, **options)
    inputs = {name: x.double().nan_to_num().requires_grad_() for name, x in tensors_of(request).items()}
    request = request._replace(**inputs)
    # A step of one element moves a score by at most the element that it is multiplied with.
    step = GRADCHECK_EPS * request.softmax_scale * max(request.q.abs().max(), request.k.abs().max())
    assert smallest_gap(request, n, m) > 100 * step

    def function(*tensors):
        moved = request._replace(**dict(zip(inputs, tensors, strict=True)))
        return attention(**arguments(moved), backend="torch")

    assert torch.autograd.gradcheck(function, tuple(inputs.values()), eps=GRADCHECK_EPS)


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


def test_a_checkpoint_frees_the_lists_of_blocks():
    """They grow with the square of the length."""
    q, k, v = (torch.randn(64, 2, 8, requires_grad=True) for _ in range(3))
    starts, lengths = torch.tensor([0]), torch.tensor([64])
    held = []

    def attend(q, k, v):
        mask = torch.ones(2, 4, 4, dtype=torch.bool).tril()
        blocks = KeyBlocks.from_mask(mask, starts, 16, 16)
        held.extend(map(weakref.ref, blocks[:2]))
        return attention(q, k, v, starts, lengths, 64, blocks=blocks)

    output = checkpoint(attend, q, k, v, use_reentrant=False)
    assert [x() for x in held] == [None, None]
    found = torch.autograd.grad(output.sum(), (q, k, v))
    expected = torch.autograd.grad(attention(q, k, v, starts, lengths, 64).sum(), (q, k, v))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **FP32)


@pytest.mark.parametrize("name", ["starts_q", "lengths_k", "first_q", "counts", "indices"])
def test_what_changes_before_the_backward_pass_is_found_out(name):
    q = torch.randn(64, 2, 8, requires_grad=True)
    blocks = KeyBlocks.from_mask(torch.ones(2, 4, 4, dtype=torch.bool), torch.tensor([0]), 16, 16)
    request = one_sequence(q, q, q, first_q=torch.tensor([0]), lengths_k=torch.tensor([64]), blocks=blocks)
    output, _ = compute(request, "torch")
    getattr(blocks if name in ("counts", "indices") else request, name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_another_default_device_does_not_matter():
    """Here one that has no memory, so that nothing computes on it by mistake."""
    plan = top_n_plan(2, 4, 1, 2)
    q = torch.randn(64, 2, 8, requires_grad=True)
    blocks = KeyBlocks.from_mask(torch.ones(2, 4, 4, dtype=torch.bool), torch.tensor([0]), 16, 16)
    request = one_sequence(q, q, q, dataclasses.replace(plan), blocks=blocks)
    expected, _ = compute(request, "torch")
    with torch.device("meta"):
        found, _ = compute(request._replace(plan=dataclasses.replace(plan)), "torch")
        found.sum().backward()
    assert torch.equal(found, expected)


def test_operators_take_the_fields_of_a_request_in_their_order():
    lists = ("block_counts", "block_indices", "block_starts", "block_size", "block_rows")
    assert tuple(SCHEMA)[-len(lists) :] == lists
    assert (*tuple(SCHEMA)[: -len(lists)], "blocks", "grids") == AttentionRequest._fields


def test_operator_is_well_formed():
    """PyTorch's own checks: schema, fake shapes, autograd registration, tracing."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(11, heads, dim, requires_grad=True) for heads, dim in ((4, 8), (2, 8), (2, 6)))
    two = {"starts_q": torch.tensor([0, 5]), "lengths_q": torch.tensor([5, 6]), "max_q": 6}
    two |= {"starts_k": two["starts_q"], "lengths_k": two["lengths_q"], "max_k": 6}
    request = one_sequence(q, k, v, top_n_plan(2, 4, 1, 2), softcap=3.0, **two)
    for s_aux in (None, torch.randn(4, requires_grad=True)):
        inputs = (*request._replace(s_aux=s_aux).flatten(), "torch")
        torch.library.opcheck(torch.ops.modelopt_lite.attention.default, inputs)
        without = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
        torch.library.opcheck(torch.ops.modelopt_lite.attention_without_gradient.default, without)


@pytest.mark.parametrize(
    ("needs_gradient", "return_lse", "name"),
    [(False, False, "attention_without_gradient"), (False, True, "attention"), (True, False, "attention")],
)
def test_operators_in_graphs(needs_gradient, return_lse, name):
    """Autograd takes the host longer than all else of a short call, so it is left out of graphs without gradients."""
    names = []

    def backend(graph, _):
        names.extend(str(node.target) for node in graph.graph.nodes if "modelopt_lite" in str(node.target))
        return graph

    q = torch.randn(11, 4, 8, requires_grad=needs_gradient)
    given = arguments(one_sequence(q, q, q, top_n_plan(2, 4, 1, 2)))
    torch.compiler.reset()
    found = torch.compile(attention, fullgraph=True, backend=backend)(**given, return_lse=return_lse)
    expected = attention(**given, return_lse=return_lse)
    torch.testing.assert_close(found, expected)
    assert names == [f"modelopt_lite.{name}"]
    assert (found[0] if return_lse else found).requires_grad == needs_gradient


def test_programs_exported_without_gradients_refuse_them():
    """A graph that is only compiled is compiled anew where gradients are wanted; a program cannot be."""

    class Attention(torch.nn.Module):
        def forward(self, q):
            return attention(**arguments(one_sequence(q, q, q, top_n_plan(2, 4, 1, 2))))

    q = torch.randn(11, 4, 8)
    with torch.no_grad():
        program = torch.export.export(Attention(), (q,)).module()
    assert torch.equal(program(q), Attention()(q))
    with pytest.raises(ValueError, match="with_lse: False is not allowed where gradients are wanted"):
        program(q.requires_grad_()).sum().backward()


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("with_lse", [True, False])
def test_shapes_without_tensors(backend, with_lse):
    with FakeTensorMode():
        q, k, v = (torch.empty(11, heads, dim) for heads, dim in ((4, 8), (2, 8), (2, 6)))
        request = one_sequence(q, k, v, with_lse=with_lse)
        output, lse = torch.ops.modelopt_lite.attention(*request.flatten(), backend)
    assert output.shape == (11, 4, 6)
    assert lse.shape == ((11, 4) if with_lse else (0,))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("with_lse", [True, False])
def test_shapes_are_those_promised_without_tensors(backend, with_lse):
    for dtype in (torch.float16, torch.float64):
        q = torch.randn(11, 4, 8, dtype=dtype)
        inputs = (*one_sequence(q, q, q, with_lse=with_lse).flatten(), backend)
        found = torch.ops.modelopt_lite.attention(*inputs)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            promised = torch.ops.modelopt_lite.attention(
                *(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs)
            )
        for real, fake in zip(found, promised, strict=True):
            assert (real.shape, real.dtype) == (fake.shape, fake.dtype)


def test_no_gradients_without_lse():
    """What the operator's callers see to; without, the kernels would read what is not there."""
    with FakeTensorMode():
        q = torch.empty(11, 2, 8, requires_grad=True)
        output, _ = torch.ops.modelopt_lite.attention(*one_sequence(q, q, q, with_lse=False).flatten(), "triton")
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
    r = case.request
    _, keys, *_ = next(r.sequences())
    len_k = keys.stop - keys.start
    q = torch.randint(-2, 3, (len_k, *r.q.shape[1:])) / 2
    k, v = r.k[keys], r.v[keys]
    plan = dataclasses.replace(r.plan, sparse_decode=True)  # or a chunk of one token would be decode
    options = {"sliding_window": r.sliding_window, "softcap": r.softcap, "s_aux": r.s_aux, "softmax_scale": SCALE}

    def prefill(start, stop):
        return attention(**arguments(one_sequence(q[start:stop], k[:stop], v[:stop], plan, **options)))

    cuts = sorted({0, len_k, *data.draw(st.lists(st.integers(0, len_k), max_size=4))})
    chunks = [prefill(start, stop) for start, stop in pairwise(cuts)]
    if chunks:
        torch.testing.assert_close(torch.cat(chunks), prefill(0, len_k), **FP32)


@given(cases(batch=3))
@many_cases
def test_batch_mates_do_not_matter(case):
    together, lse = run(case, return_lse=True)
    for b, (queries, *_) in enumerate(case.request.sequences()):
        alone = {
            name: x[b : b + 1]
            for name, x in arguments(case.request).items()
            if isinstance(x, torch.Tensor) and name.startswith("b_")
        }
        output, lse_alone = run(case, **alone, return_lse=True)
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
    if case.request.is_causal:
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
    r = case.request
    for queries, keys, *firsts in r.sequences():
        if queries.start == queries.stop:
            continue
        q, k = r.q[queries].double(), r.k[keys].double()
        dense = kept_scores(q, k, r._replace(plan=DENSE), *firsts)
        chosen = kept_scores(q, k, r, *firsts) > -torch.inf
        seen = dense > -torch.inf
        rows, visible, kept = rows + seen.any(-1).sum(), visible + seen.sum(), kept + chosen.sum()
        mass += dense.softmax(-1)[chosen].sum()
    assert found[:3] == (rows, visible, kept)
    torch.testing.assert_close(float(found.mass), float(mass), **FP32)


@given(cases(longest=24) | cases(longest=24, placed=True))
@settings(max_examples=10, deadline=None)
def test_statistics_wait_for_no_device(case):
    """On the meta device tensors have no values, so that reading one is an error."""
    request = AttentionRequest(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in case.request))
    assert statistics.count(request).is_meta


@given(cases(), st.integers(0, 9), st.sampled_from([0, 1, 5, 30]))
@many_cases
def test_sinks_and_window_alone(case, sinks, window):
    """A rule that keeps nothing: tiles without sinks and recent keys are skipped, and missed by nobody."""
    plan = SinkWindow(num_sink_tokens=sinks, dense_window_size=window).plan()
    expected = oracle(case.request._replace(plan=plan))
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
