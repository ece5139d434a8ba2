"""The methods that choose blocks: loops = reference = fast form, in every kind of batch."""

import math
from itertools import pairwise
from typing import Literal

import pytest
import torch
from block_cases import plans, requests
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from modelopt_lite.kernels import AttentionRequest, attention, attention_statistics, blocks, compute
from modelopt_lite.kernels.blocks import BlockGrid
from modelopt_lite.kernels.reference import SequenceBlocks, attention_reference
from modelopt_lite.kernels.selection import chosen_blocks, select_blocks
from modelopt_lite.methods import BlockMethod, FlashPrefill, MeanPoolTopK, SkipSoftmax, XAttention

some_cases = settings(max_examples=12, deadline=None)
SMALL = {"block_size": 16, "block_rows": 16}
METHODS = [
    FlashPrefill(alpha=0.6, first_blocks=1, recent_blocks=1, **SMALL),
    FlashPrefill(alpha=0.8, first_blocks=0, recent_blocks=0, block_size=16, block_rows=32, per_kv_head=True),
    XAttention(stride=4, threshold=0.6, **SMALL),
    XAttention(stride=8, threshold=0.5, first_blocks=0, block_size=16, block_rows=64),
    XAttention(stride=16, threshold=0.7, recent_blocks=0, block_size=32, block_rows=32, per_kv_head=True),
    MeanPoolTopK(keep=0.4, **SMALL),
    MeanPoolTopK(keep=0.7, first_blocks=0, recent_blocks=0, block_size=32, block_rows=64, per_kv_head=True),
]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.method}-{method.block_rows}")


@pytest.fixture(autouse=True, params=[1, 1 << 24], ids=["many parts", "one part"])
def parts(request, monkeypatch):
    monkeypatch.setattr(blocks, "PART_ELEMENTS", request.param)


def view_of(request, sequence):
    q, k = request.q[sequence.queries].double(), request.k[sequence.keys].double()
    q_pos, k_pos = sequence.first_q + torch.arange(len(q)), sequence.first_k + torch.arange(len(k))
    behind = q_pos[:, None] - k_pos
    visible = (behind >= 0) if request.is_causal else torch.ones_like(behind, dtype=torch.bool)
    if request.sliding_window is not None:
        visible = visible & (behind.abs() < request.sliding_window)
    return SequenceBlocks(q, k, q_pos, k_pos, visible, request)


def loops(method, view):
    """A method's scores once more, pair of blocks by pair of blocks; None where nothing is seen."""
    size, rows = method.block_size, method.block_rows
    heads, repeat = view.q.shape[1], view.q.shape[1] // view.k.shape[1]
    q_blocks = [(view.q_pos // rows == i).nonzero().flatten() for i in (view.q_pos // rows).unique()]
    k_blocks = [(view.k_pos // size == j).nonzero().flatten() for j in (view.k_pos // size).unique()]

    def score(q, k):
        x = float(q @ k) * view.request.softmax_scale
        return x if view.request.softcap is None else view.request.softcap * math.tanh(x / view.request.softcap)

    found = torch.full((heads, len(q_blocks), len(k_blocks)), torch.nan, dtype=torch.float64)
    for h in range(heads):
        k = view.k[:, h // repeat]
        for i, queries in enumerate(q_blocks):
            seen = [j for j, keys in enumerate(k_blocks) if view.visible[queries][:, keys].any()]
            if isinstance(method, MeanPoolTopK):
                for j in seen:
                    found[h, i, j] = score(view.q[queries, h].mean(0), k[k_blocks[j]].mean(0))
            elif isinstance(method, FlashPrefill):
                found[h, i, seen] = 0.0
                for query in queries.tolist():
                    own = [j for j in seen if view.visible[query, k_blocks[j]].any()]
                    weights = [math.exp(score(view.q[query, h], k[k_blocks[j]].mean(0))) for j in own]
                    for j, weight in zip(own, weights, strict=True):
                        found[h, i, j] += weight / sum(weights)
            else:
                found[h, i, seen] = 0.0
                for j, mass in antidiagonal_masses(view, h, k, queries, method):
                    found[h, i, j] += mass
    return found


def antidiagonal_masses(view, head, k, queries, method):
    """Yield key blocks, counted from the first one, and the mass that a key group of theirs adds for a query block."""
    stride = method.stride
    place_q = {int(p): i for i, p in enumerate(view.q_pos)}
    place_k = {int(p): j for j, p in enumerate(view.k_pos)}
    for group in sorted({int(view.q_pos[i]) // stride for i in queries}):
        members = [place_q[p] for p in range(group * stride, (group + 1) * stride) if p in place_q]
        weights = {}
        for other in sorted({p // stride for p in place_k}):
            keys = [place_k[p] for p in range(other * stride, (other + 1) * stride) if p in place_k]
            if not view.visible[members][:, keys].any():
                continue
            total = 0.0
            for m in range(stride):
                p, j = group * stride + stride - 1 - m, other * stride + m
                if p in place_q and j in place_k:
                    total += float(view.q[place_q[p], head] @ k[place_k[j]])
            x = total * view.request.softmax_scale / stride
            x = x if view.request.softcap is None else view.request.softcap * math.tanh(x / view.request.softcap)
            weights[other] = math.exp(x)
        for other, weight in weights.items():
            first = int(view.k_pos[0]) // method.block_size
            yield other * stride // method.block_size - first, weight / sum(weights.values())


@every_method
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_reference_equals_loops(method, data):
    request = data.draw(requests(longest=45, batch=1, plan=method.shared_plan()))
    view = view_of(request, next(request.sequences()))
    if 0 in (len(view.q), len(view.k)):
        return
    expected = loops(method, view)
    found = method.reference_scores(view)
    assert found.shape == expected.shape
    torch.testing.assert_close(found[~expected.isnan()], expected[~expected.isnan()], rtol=1e-12, atol=1e-12)


@every_method
@given(data=st.data())
@some_cases
def test_fast_form_equals_reference(method, data):
    """Scores to FP32 rounding; and a choice differs only where two numbers that it compares are as close as that."""
    request = data.draw(requests(plan=method.shared_plan()))
    noise = torch.randn(request.q.shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    request = request._replace(q=request.q + noise)
    grid = BlockGrid(request, method.block_size, method.block_rows)
    if 0 in grid.shape:
        return
    scores = method.scores(grid)
    chosen, _ = chosen_blocks(request)
    for number, sequence in enumerate(request.sequences()):
        view = view_of(request, sequence)
        if 0 in (len(view.q), len(view.k)):
            continue
        expected = method.reference_scores(view)
        rows = slice(int(grid.starts[number]), int(grid.starts[number]) + expected.shape[1])
        seen = grid.seen()[rows, : expected.shape[2]]
        mine = scores[:, rows, : expected.shape[2]]
        torch.testing.assert_close(mine.double()[:, seen], expected[:, seen], rtol=1e-5, atol=1e-5)
        if method.per_kv_head:
            expected = expected.unflatten(0, (request.k.shape[1], -1)).sum(1)
        forced = grid.forced(method.first_blocks, method.recent_blocks)[rows, : expected.shape[2]] & seen
        wanted = seen & (forced | method.choose(expected, seen, forced))
        is_dense = grid.is_dense()[rows, None]
        differs = (chosen[:, rows, : expected.shape[2]] != (wanted | (is_dense & seen))).any(-1)
        for head, row in differs.nonzero().tolist():
            assert closest_call(method, expected[head, row], seen[row], forced[row]) < 1e-4


def closest_call(method, scores, seen, forced):
    """Return by how little the closest of a query block's decisions was made."""
    scores = scores[seen]
    free = sorted(scores[~forced[seen]].tolist(), reverse=True)
    if isinstance(method, FlashPrefill):
        return (scores - method.alpha * scores.max()).abs().min()
    if isinstance(method, MeanPoolTopK):
        return min((a - b for a, b in pairwise(free)), default=math.inf)
    held, calls = float(scores[forced[seen]].sum()), [math.inf]
    for a, b in zip(free, [*free[1:], -math.inf], strict=True):
        calls += [abs(held - method.threshold * float(scores.sum())), a - b]
        held += a
    return min(calls)


@every_method
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_selection_waits_for_no_device(method, data):
    """On the meta device tensors have no values, so that reading one is an error."""
    request = data.draw(requests(longest=40, plan=method.shared_plan()))
    fields = ("q", "k", "v", "starts_q", "lengths_q", "starts_k", "lengths_k", "first_q", "first_k")
    moved = {name: x.to("meta") for name in fields if (x := getattr(request, name)) is not None}
    found, expected = select_blocks(request._replace(**moved)), select_blocks(request)
    assert all(x.is_meta for x in found[:3])
    assert [x.shape for x in found[:3]] == [x.shape for x in expected[:3]]


@given(plans().flatmap(lambda plan: requests(plan=plan)), st.data())
@settings(max_examples=15, deadline=None)
def test_skipping_waits_for_no_device(request, data):
    plan = SkipSoftmax(threshold=0.3, block_size=16, num_sink_tokens=3, dense_window_size=5).plan()
    request = request._replace(plan=plan)
    fields = ("q", "k", "v", "starts_q", "lengths_q", "starts_k", "lengths_k", "first_q", "first_k")
    moved = {name: x.to("meta") for name in fields if (x := getattr(request, name)) is not None}
    found, expected = select_blocks(request._replace(**moved)), select_blocks(request)
    assert [x.shape for x in found[:3]] == [x.shape for x in expected[:3]]


class Peaks(BlockMethod):
    """The example of ``docs/writing_a_method.md``, with a reference alone."""

    method: Literal["peaks"] = "peaks"
    margin: float = Field(default=4.0, ge=0, description="how far below the best score a kept block may be")

    def reference_scores(self, view):
        in_block = view.keys_in(self.block_size)
        means = torch.einsum("bk,khd->bhd", in_block / in_block.sum(-1, keepdim=True), view.k)
        scores = view.scores(view.q, means)
        of_block = view.queries_in(self.block_rows) > 0
        return scores[:, None].masked_fill(~of_block[..., None], -torch.inf).amax(2)

    def choose(self, scores, seen, forced):
        return scores >= scores.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True) - self.margin


@given(requests(plan=Peaks(margin=0.1, **SMALL).plan()))
@settings(max_examples=8, deadline=None)
def test_own_method_without_a_fast_form(request):
    output, _ = compute(request)
    expected, _ = attention_reference(request)
    torch.testing.assert_close(output, expected.float(), rtol=1e-5, atol=1e-5)


def test_top_k_counts_forced_blocks():
    """Of ten visible blocks, 0.7 are seven; forced ones are among them, and more of them stay."""
    scores = torch.arange(12.0)[None, None]
    seen, forced = torch.arange(12)[None] < 10, torch.arange(12)[None] < 2
    chosen = MeanPoolTopK(keep=0.7).choose(scores, seen, forced)
    assert chosen.nonzero()[:, 2].tolist() == [0, 1, 5, 6, 7, 8, 9]
    assert MeanPoolTopK(keep=0.1).choose(scores, seen, forced).nonzero()[:, 2].tolist() == [0]
    assert MeanPoolTopK(keep=0.2).choose(torch.zeros(1, 1, 12), seen, forced & False).nonzero()[:, 2].tolist() == [0, 1]


def test_mass_counts_forced_blocks():
    scores = torch.tensor([[[0.1, 0.3, 0.2, 0.4]]])
    seen, none = torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.bool)
    forced = none.clone()
    forced[0, 0] = True
    assert XAttention(threshold=0.65).choose(scores, seen, none).tolist() == [[[False, True, False, True]]]
    assert XAttention(threshold=0.65).choose(scores, seen, forced).tolist() == [[[True, True, False, True]]]
    assert XAttention(threshold=0.45).choose(scores, seen, forced).tolist() == [[[True, False, False, True]]]


SKIP = SkipSoftmax(threshold=0.7, dense_window_size=40, **SMALL)


@pytest.mark.parametrize("method", [*METHODS, SKIP], ids=lambda method: method.method)
def test_public_call(method):
    """From tensors to output and statistics, in FP32, and in BF16 with an error of twice its rounding at most."""
    torch.manual_seed(0)
    q, k, v = (2 * torch.randn(150, heads, 16).bfloat16() for heads in (4, 2, 2))
    starts, lengths = torch.tensor([0, 100]), torch.tensor([100, 50])
    plan = method.shared_plan()
    packing = {"starts_q": starts, "lengths_q": lengths, "max_q": 100, "starts_k": starts, "lengths_k": lengths}
    masks = {"is_causal": True, "softmax_scale": 0.25, "sliding_window": None, "softcap": None, "s_aux": None}
    expected, _ = attention_reference(AttentionRequest(q=q, k=k, v=v, max_k=100, plan=plan, **packing, **masks))
    output = attention(q.float(), k.float(), v.float(), starts, lengths, 100, plan=plan)
    torch.testing.assert_close(output, expected.float(), rtol=1e-5, atol=1e-5)
    of_half = attention(q, k, v, starts, lengths, 100, plan=plan)
    torch.testing.assert_close(of_half.double(), expected, rtol=2**-8, atol=1e-5)
    statistics = attention_statistics(q, k, starts, lengths, 100, plan=plan)
    assert 0 < statistics.blocks_visited < statistics.blocks
    assert statistics.kept < statistics.visible
