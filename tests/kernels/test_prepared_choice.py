"""What is prepared and kept for choosing key blocks changes no result, whatever follows what."""

import copy
import dataclasses
import gc
import os
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from block_cases import requests
from cases import one_sequence
from hypothesis import given, settings
from hypothesis import strategies as st

from modelopt_lite.kernels import block_launch, block_scores, blocks, choice, compute, select_blocks
from modelopt_lite.methods import FlashPrefill, MeanPoolTopK, XAttention
from modelopt_lite.methods.calibrated import Calibration
from modelopt_lite.plan import AttentionPlan, BlockSelector

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
SIZES = {"block_size": 16, "block_rows": 16}
METHODS = [
    MeanPoolTopK(keep=0.4, **SIZES),
    MeanPoolTopK(keep=0.6, per_kv_head=True, block_size=16, block_rows=32),
    FlashPrefill(alpha=0.5, first_blocks=1, recent_blocks=1, **SIZES),
    XAttention(threshold=0.6, stride=4, **SIZES),
]
TABLE = {"form": "table", "lengths": (16, 64), "targets": (0.2, 0.8), "knobs": ((0.9, 0.5), (0.6, 0.3))}
CALIBRATED = MeanPoolTopK(target_sparsity=0.5, calibration=Calibration(prefill=TABLE), **SIZES)


@pytest.fixture(params=["kernels", "PyTorch"], autouse=True)
def way(request, monkeypatch):
    """Choose blocks by the kernels, in Triton's interpreter, or by PyTorch operations; keep nothing of other tests."""
    for module in (choice, blocks):
        monkeypatch.setattr(module, "_prepared", {})
    if request.param == "kernels":
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("needs Triton's interpreter")
        monkeypatch.setattr(block_launch, "runs_on", lambda x: True)
        monkeypatch.setattr(block_scores, "_runs_kernels", lambda grid: grid.prepared(block_scores._scores_by_kernel))
    return request.param


def sequence(length=70, plan=METHODS[0], seed=0, **options):
    """One sequence of two heads of keys and four of queries."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(length, heads, 8, generator=generator) for heads in (4, 2, 2))
    return one_sequence(q, k, v, plan.shared_plan(), **options)


def assert_alone(request):
    """The lists and the output of a call are those that it has if nothing was prepared."""
    found, (output, _) = select_blocks(request), compute(request, "torch")
    with pytest.MonkeyPatch.context() as patch:
        for module in (choice, blocks):
            patch.setattr(module, "_prepared", {})
        alone = request._replace(grids=None)
        expected, (expected_output, _) = select_blocks(alone), compute(alone, "torch")
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert torch.equal(output, expected_output)


@given(st.lists(requests(longest=60), min_size=2, max_size=3), st.data())
@settings(max_examples=8, deadline=None)
def test_any_call_may_follow_any_other(calls, data):
    """Ragged batches, other lengths, masks and plans, where all share what they found."""
    shared = {}
    for call in calls * 2:
        for method in data.draw(st.permutations(METHODS))[:2]:
            request = call._replace(plan=method.shared_plan(), grids=shared)
            assert_alone(request)
    assert shared


def test_layers_of_one_forward_may_differ():
    """In type, strides, scale and plan, with one packing."""
    first, shared = sequence(), {}
    packing = {name: getattr(first, name) for name in ("starts_q", "lengths_q", "starts_k", "lengths_k")}
    for seed in range(2):
        plain = sequence(seed=seed, grids=shared, **packing)
        strided = torch.randn(4, 70, 8).transpose(0, 1)
        unreadable = torch.randn(70, 8, 4).transpose(1, 2)
        moved = torch.randn(70 * 4 * 8 + 1)[1:].view(70, 4, 8)
        for request in (
            plain,
            *(plain._replace(q=q) for q in (strided, unreadable, moved)),
            plain._replace(**{name: getattr(plain, name).half() for name in "qkv"}),
            plain._replace(**{name: getattr(plain, name).double() for name in "qkv"}),
            plain._replace(softmax_scale=2.0),
            plain._replace(sliding_window=20),
            plain._replace(is_causal=False),
            plain._replace(softcap=1.0),
            *(plain._replace(plan=method.shared_plan()) for method in (*METHODS, CALIBRATED)),
        ):
            assert_alone(request)


def test_a_packing_may_have_strides():
    call = sequence(length=140)
    starts, lengths = torch.tensor([[0, 40], [40, 70], [110, 30]]).T
    packing = {"starts_q": starts, "lengths_q": lengths, "starts_k": starts, "lengths_k": lengths}
    packing |= {"first_q": torch.tensor([[0, 9], [0, 9], [3, 9]])[:, 0], "max_q": 70, "max_k": 70}
    contiguous = {name: x.contiguous() if isinstance(x, torch.Tensor) else x for name, x in packing.items()}
    found, expected = (select_blocks(call._replace(**x)) for x in (packing, contiguous))
    assert torch.equal(found.counts, expected.counts)
    assert torch.equal(found.mask(), expected.mask())
    assert torch.equal(found.starts, expected.starts)


def test_gradients_follow_calls_without_them():
    request = sequence(plan=XAttention(threshold=0.5, stride=4, **SIZES))
    alone, _ = compute(request, "torch")
    inputs = [x.clone().requires_grad_() for x in request[:3]]
    output, _ = compute(request._replace(**dict(zip("qkv", inputs, strict=True))), "torch")
    assert torch.equal(output, alone)
    listed = request._replace(**dict(zip("qkv", inputs, strict=True)), blocks=select_blocks(request))
    expected = torch.autograd.grad(compute(listed, "torch")[0].sum(), inputs)
    for found, other in zip(torch.autograd.grad(output.sum(), inputs), expected, strict=True):
        assert torch.equal(found, other)


def last_blocks(scores, seen, forced):
    return seen.flip(-1).cumsum(-1).flip(-1).expand(scores.shape) <= 2


def sums(view):
    size, rows = view.request.grid
    return view.queries_in(rows) @ view.scores(view.q, view.k) @ view.keys_in(size).T


def test_a_selector_of_ones_own_is_called_each_time():
    """So what it depends on may change, and nothing is recorded for gradients of it."""
    factor = torch.ones(1, requires_grad=True)

    def scores(grid):
        return factor * torch.arange(grid.shape[1]).expand(4, *grid.shape)

    selector = BlockSelector(sums, lambda scores, seen, forced: scores > 1, scores, **SIZES)
    request = sequence()._replace(plan=AttentionPlan(blocks=selector), grids={})
    visited = []
    for value in (1.0, 10.0, 1.0):
        factor.data.fill_(value)
        output, _ = compute(request, "torch")
        assert not output.requires_grad
        visited.append(int(select_blocks(request).counts.sum()))
        assert torch.equal(output, compute(request._replace(grids=None), "torch")[0])
    assert visited[0] == visited[2] < visited[1]


def test_a_method_that_chooses_otherwise_is_asked():
    """A class that inherits how kernels choose, and overrides how it chooses, means the latter."""

    class LastBlocks(MeanPoolTopK):
        def choose(self, scores, seen, forced):
            return last_blocks(scores, seen, forced)

    plan = LastBlocks(**SIZES).plan()
    assert plan.blocks.choice is None
    request = sequence()._replace(plan=plan)
    expected = request._replace(plan=AttentionPlan(blocks=dataclasses.replace(plan.blocks, scores=None)))
    assert torch.equal(select_blocks(request).mask(), select_blocks(expected).mask())


@pytest.mark.parametrize("per_kv_head", [False, True])
def test_shapes_that_are_wrong(per_kv_head):
    def scores(grid):
        return torch.zeros(4, *grid.shape)

    options = {"per_kv_head": per_kv_head, **SIZES}
    heads = 2 if per_kv_head else 4
    for selector, message in (
        (BlockSelector(sums, last_blocks, lambda grid: scores(grid)[:1], **options), r"scores: returns \[1, 6, 5\]"),
        (BlockSelector(sums, lambda *_: torch.ones(1, 6, 5) > 0, scores, **options), r"choose: returns \[1, 6, 5\]"),
        (BlockSelector(sums, lambda *_: torch.ones(6, 5) > 0, scores, **options), rf"of the scores, \[{heads}, 6, 5\]"),
        (BlockSelector(sums, lambda *_: torch.ones(heads, 6, 5), scores, **options), r"returns torch.float32; must be"),
    ):
        with pytest.raises(ValueError, match=message):
            compute(sequence()._replace(plan=AttentionPlan(blocks=selector)), "torch")


def test_a_calibrated_choice_is_made_once_for_a_forward(monkeypatch):
    calls, knob_of = [], MeanPoolTopK.knob_of
    monkeypatch.setattr(MeanPoolTopK, "knob_of", lambda *args: calls.append(args) or knob_of(*args))
    first = sequence(plan=CALIBRATED, grids={})
    found = [select_blocks(first), select_blocks(sequence(plan=CALIBRATED, seed=1)._replace(**_packing(first)))]
    assert len(calls) == 1
    alone = [select_blocks(sequence(plan=CALIBRATED, seed=seed)) for seed in (0, 1)]
    assert len(calls) == 3
    for one, other in zip(found, alone, strict=True):
        assert torch.equal(one.mask(), other.mask())
    assert found[0].counts.sum() < select_blocks(sequence(plan=MeanPoolTopK(keep=1.0, **SIZES))).counts.sum()


def _packing(request):
    names = ("starts_q", "lengths_q", "starts_k", "lengths_k", "grids")
    return {name: getattr(request, name) for name in names}


def test_threads_choose_beside_each_other(way):
    if way == "kernels":
        pytest.skip("Triton's interpreter is made for one thread")
    calls = [sequence(length, method, seed) for seed, length in enumerate((40, 70)) for method in METHODS]
    expected = [compute(call, "torch")[0] for call in calls]
    choice._prepared.clear()
    blocks._prepared.clear()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda call: compute(call, "torch")[0], calls * 3))
    assert all(map(torch.equal, found, expected * 3))


@pytest.mark.parametrize("method", [*METHODS, CALIBRATED], ids=lambda method: method.method)
def test_nothing_that_is_prepared_holds_tensors(method):
    request = sequence(plan=method, grids={})
    for _ in range(2):
        compute(request, "torch")
        select_blocks(request)
    assert choice._prepared
    held = [weakref.ref(x) for x in request if isinstance(x, torch.Tensor)]
    del request
    gc.collect()
    assert not any(x() is not None for x in held)


@pytest.mark.parametrize("method", [METHODS[0], *METHODS[2:], CALIBRATED], ids=lambda method: method.method)
def test_a_layer_takes_three_launches(method, way, monkeypatch):
    """Beside what the first layer of a forward finds out for all."""
    launches, launch = [], block_launch.Launch.__call__
    monkeypatch.setattr(
        block_launch.Launch, "__call__", lambda self, *args: launches.append(self) or launch(self, *args)
    )
    request = sequence(plan=method, grids={})
    select_blocks(request)
    first = len(launches)
    select_blocks(request)
    assert (first, len(launches) - first) == ((5, 3) if way == "kernels" else (0, 0))


def test_autocast_does_not_choose():
    request = sequence(plan=METHODS[0])
    expected = select_blocks(request).mask()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(select_blocks(request).mask(), expected)


def test_a_copy_of_a_plan_shares_what_is_prepared():
    request = sequence()
    compute(request, "torch")
    kept = len(choice._prepared)
    compute(request._replace(plan=copy.deepcopy(request.plan)), "torch")
    assert len(choice._prepared) == kept
