"""Skip-softmax decided by bounds of products in INT8, without a GPU: whether they are bounds, and the machine code.

Triton's interpreter runs all kernels but the one in CUDA C++, in whose place PyTorch does what it says.
"""

import ctypes
import dataclasses
import itertools
import re
import tempfile
import types
from collections import Counter

import pytest
import torch
from block_cases import log_thresholds
from cases import OnGpu, one_sequence, packed_request
from machine_code import run_tool

from modelopt_lite.kernels import selection
from modelopt_lite.kernels.blocks import BlockGrid
from modelopt_lite.kernels.hopper import bounds
from modelopt_lite.kernels.top_n import top_n_plan
from modelopt_lite.methods import MeanPoolTopK
from modelopt_lite.plan import AttentionPlan, SkipRule

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

PLAN = AttentionPlan(skip=SkipRule(0.5), num_sink_tokens=4)
LENGTHS = ((300, 300), (1, 1), (0, 0), (129, 700), (1, 300), (64, 129), (0, 5))


def bound(grid, bounded):
    """What ``bound_blocks`` does."""
    queries, keys = (x.transpose(2, 3).flatten(3).float() for x in (bounded.queries, bounded.keys))
    repeat, columns = queries.shape[0] // keys.shape[0], grid.shape[1]
    bounded.words.zero_()
    for block, (sequence, first, behind, _) in enumerate(bounded.spans.tolist()):
        for head, column in itertools.product(range(queries.shape[0]), range(first, behind)):
            place = (head // repeat, sequence * columns + column)
            one, errors, norms = bounded.tiles[place][:3]
            least, norm, error = bounded.rows[head, block, :, :3].T
            largest = (queries[head, block] @ keys[place].T).amax(1)
            slack = norm * errors + error * norms
            sure, may = (largest >= least * one + slack).view(2, 4, 16), ~(largest < least * one - slack).view(2, 4, 16)
            # The other 64 queries may be left out if one of the first is sure.
            sure = sure[0].any().expand(4) if sure[0].any() else sure[1].any(-1)
            bit = torch.tensor(1 << column % 32).to(torch.uint32).view(torch.int32)
            bounded.words[head, block, column // 32] |= torch.cat([sure[None], may.any(-1)]).int() * bit


def decoded(bounded):
    """Return which bits of words are set: of four warps and of eight, ``[heads, query_blocks, key_blocks, warps]``."""
    bits = bounded.words.flatten(3)[..., None] >> torch.arange(32) & 1
    return [x.bool().transpose(-1, -2).flatten(2, 3) for x in (bits[..., :4, :], bits[..., 4:, :])]


def decide(grid, bounded, kept):
    """What ``decide_open`` does."""
    (sure, may), q, k = decoded(bounded), grid.request.q, grid.request.k
    for block, (sequence, first, behind, row) in enumerate(bounded.spans.tolist()):
        for head, column in itertools.product(range(q.shape[1]), range(first, behind)):
            in_doubt = may[head, block, column].repeat_interleave(16) & (bounded.rows[head, block, :, 3] < torch.inf)
            begin = grid.row_k[sequence] + 128 * column
            keys = k[begin : begin + 128, head * k.shape[1] // q.shape[1]]
            keys = keys[max(0, grid.request.plan.num_sink_tokens - 128 * column) :]
            products = q[row + in_doubt.nonzero().flatten(), head] @ keys.T
            reaches = (products >= bounded.rows[head, block, in_doubt, 3:]).any()
            kept[head, block, column] = sure[head, block, column].any() | reaches


@pytest.fixture
def by_interpreter(monkeypatch):
    monkeypatch.setattr(bounds, "bound", bound)
    monkeypatch.setattr(bounds, "decide", decide)
    monkeypatch.setattr(bounds, "mean_keys", BlockGrid.mean_keys)


def make(plan=PLAN, heads=(2, 1), lengths=LENGTHS):
    return packed_request(lengths, heads, (128, 128), torch.float32, plan, device="cpu", exact=False)


@pytest.mark.parametrize("threshold", [1e-30, 1.0, 4.0, 1e30])
@pytest.mark.parametrize(("sinks", "window"), [(4, 0), (0, 0), (200, 70)])
def test_decisions(by_interpreter, threshold, sinks, window):
    """They are those of exact scores, for query blocks that begin and end anywhere."""
    plan = AttentionPlan(skip=SkipRule(threshold), num_sink_tokens=sinks, dense_window_size=window)
    request = make(plan)
    grid = BlockGrid(request, *request.grid)
    found = bounds.kept_blocks(grid, None, log_thresholds(grid))
    selected, skipped = selection.chosen_blocks(request, grid)
    assert torch.equal(found & selected, selected & ~skipped)


@pytest.mark.parametrize(("scale", "product"), [(0.1, 13), (128**-0.5, 7)])
def test_equal_scores_reach_a_threshold_of_one(by_interpreter, scale, product):
    """Nothing is skipped, although FP32 rounds ``product * scale / scale`` up."""
    request = make(AttentionPlan(skip=SkipRule(1.0)), lengths=((300, 300),))._replace(softmax_scale=scale)
    request.q[:], request.k[:] = 0.0, 1.0
    request.q[..., 0] = product
    grid = BlockGrid(request, *request.grid)
    found = bounds.kept_blocks(grid, None, log_thresholds(grid))
    assert found[:, grid.seen()].all()


def test_with_a_selector(by_interpreter):
    """Of the diagonal blocks it drops some, which then hold no references."""
    plan = dataclasses.replace(MeanPoolTopK(keep=0.5, recent_blocks=0).plan(), skip=SkipRule(2.0), num_sink_tokens=4)
    request = make(plan, heads=(3, 3))
    grid = BlockGrid(request, *request.grid)
    selected, skipped = selection.chosen_blocks(request, grid)
    found = bounds.kept_blocks(grid, selected, log_thresholds(grid))
    assert torch.equal(found & selected, selected & ~skipped)


def test_bounds_are_tight(by_interpreter):
    """Near a threshold that half of the blocks reach, a third of them is open, but few warps of these."""
    request = make(AttentionPlan(skip=SkipRule(6.0), num_sink_tokens=4), lengths=((1500, 1500),))
    grid = BlockGrid(request, *request.grid)
    kept = torch.empty(2, *grid.shape, dtype=torch.bool)
    bounded = bounds.quantize(grid, None, log_thresholds(grid), kept)
    bound(grid, bounded)
    sure, may = (x[:, :, : grid.shape[1]] for x in decoded(bounded))
    seen = torch.zeros(grid.shape, dtype=torch.bool)
    for block, (_, first, behind, _) in enumerate(bounded.spans.tolist()):
        seen[block, first:behind] = True
    of_warps = [x[:, seen] for x in (sure, may)]
    is_open = of_warps[1].any(-1) & ~of_warps[0].any(-1)
    assert 0.1 < of_warps[0].any(-1).float().mean() < 0.9
    assert 0.1 < is_open.float().mean() < 0.4
    assert (of_warps[1] & is_open[..., None]).float().mean() < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("repeat", [1, 2, 4])
def test_machine_code(dtype, repeat):
    """No spills, four warpgroups that multiply on a multiprocessor, and a maximum for each two products."""
    kernels = bounds.Kernels.of(dtype, repeat)
    code, _ = kernels.bound.compiled()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        usage = run_tool("cuobjdump", "-res-usage", file.name)
        sass = run_tool("nvdisasm", "--no-dataflow", "--print-code", file.name)
    registers = {name: int(number) for name, number in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:0 ", usage)}
    programs = 4 // repeat
    assert registers["bound_blocks"] <= 65536 // 4 // (programs * (4 * repeat + 1) / 4).__ceil__() // 32 // 8 * 8
    assert registers["decide_open"] <= 65536 // (2 * 256)
    assert kernels.bound.shared_bytes <= 227 * 1024 // programs - 1024
    assert kernels.decide.shared_bytes <= 227 * 1024 // 2 - 1024
    counts = Counter(instruction for instruction in re.findall(r"\s([A-Z][A-Z0-9]+)[\w.]* ", sass))
    assert counts["IGMMA"] == 2 * 4
    assert counts["VIMNMX3"] + counts["VIMNMX"] <= 2 * 34


def test_both_languages_lay_out_the_problems_alike():
    """As ``bounds.cu`` asserts."""
    assert ctypes.sizeof(bounds._Problem) == 72
    assert ctypes.sizeof(bounds._OpenProblem) == 120


def on_gpu(plan=PLAN, dim=128, dtype=torch.bfloat16, **options):
    q = torch.zeros(300, 4, dim, dtype=dtype).as_subclass(OnGpu)
    return one_sequence(q, q, q, plan, **options)


def grid_of(request, batch=1, columns=3):
    sizes = dict(zip(("block_size", "block_rows"), request.grid, strict=True))
    return types.SimpleNamespace(request=request, shape=(3, columns), starts=torch.zeros(batch), **sizes)


@pytest.mark.parametrize(
    ("request_of", "reason"),
    [
        (lambda: on_gpu(), None),
        (lambda: on_gpu(dtype=torch.float16), None),
        (lambda: on_gpu(dataclasses.replace(MeanPoolTopK().plan(), skip=SkipRule(0.1))), None),
        (lambda: on_gpu(dataclasses.replace(top_n_plan(2, 4, 0, 64), skip=SkipRule(0.1))), "a rule beside"),
        (lambda: on_gpu(AttentionPlan(skip=SkipRule(0.5, 64, 64))), "64 keys for 64 positions"),
        (lambda: on_gpu(AttentionPlan(skip=SkipRule(0.5, 128, 256))), "block_rows is 256"),
        (lambda: on_gpu(is_causal=False), "not causal"),
        (lambda: on_gpu(sliding_window=200), "sliding window"),
        (lambda: on_gpu(softcap=20.0), "softcap"),
        (lambda: on_gpu(softmax_scale=-1.0), "softmax_scale is -1.0"),
        (lambda: on_gpu(dtype=torch.float32), "torch.float32"),
        (lambda: on_gpu(dim=64), "head_dim of 64"),
    ],
)
def test_what_it_runs(absent_gpu, monkeypatch, request_of, reason):
    monkeypatch.setattr(bounds, "handle", lambda device, kernel, without_it: ctypes.c_void_p())
    request = request_of()
    found = bounds.refusal(grid_of(request))
    assert found is None if reason is None else reason in found
    absent_gpu(100)
    assert bounds.refusal(grid_of(request)) is not None


@pytest.mark.parametrize(("batch", "columns", "runs"), [(1, 3, True), (100, 3, True), (100, 64, False)])
def test_memory(absent_gpu, monkeypatch, batch, columns, runs):
    """Each sequence has room for as many key blocks as the longest one, of which many may be absent."""
    monkeypatch.setattr(bounds, "handle", lambda device, kernel, without_it: ctypes.c_void_p())
    found = bounds.refusal(grid_of(on_gpu(), batch, columns))
    assert found is None if runs else "too much memory" in found
