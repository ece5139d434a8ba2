"""The kernel that decides on skip-softmax in its main loop, without a GPU: what it runs and gets, and its machine code.

Like the Hopper kernel's test, this file runs itself as a program to compile.
"""

import dataclasses
import itertools
import json
import math
import sys

import pytest
import torch
from cases import OnGpu, one_sequence
from machine_code import classify, inspect
from test_forward_compile import pretend_gpu, zeros

from modelopt_lite.kernels import choice
from modelopt_lite.kernels.hopper import forward_launch as hopper_launch
from modelopt_lite.kernels.hopper import skip_launch as hopper_skip_launch
from modelopt_lite.kernels.hopper import visits_launch
from modelopt_lite.kernels.hopper.forward import prepare
from modelopt_lite.kernels.hopper.skip import skip_forward_hopper
from modelopt_lite.kernels.hopper.visits import schedule
from modelopt_lite.kernels.selection import select_before_skipping, select_blocks
from modelopt_lite.kernels.top_n import top_n_plan
from modelopt_lite.methods import MeanPoolTopK
from modelopt_lite.plan import AttentionPlan, LengthCurve, SkipRule

BF16 = torch.bfloat16
SMALL = {"block_size": 16, "block_rows": 16}
PLAN = AttentionPlan(skip=SkipRule(0.5), num_sink_tokens=4)
SELECTOR = MeanPoolTopK().plan()
SHARED_LIMIT = 227 * 1024
SPILLED = 160
"""Bytes that a thread spills at most, a few of them in the main loop."""


def compile_all():
    """Launch for a GPU that is not there, with and without an LSE; return the kernels and how many more compile."""
    found = []
    pretend_gpu(hopper_skip_launch, skip_forward_hopper, compiled=found)
    pretend_gpu(hopper_launch, prepare)
    pretend_gpu(visits_launch, schedule)
    hopper_skip_launch.processors = lambda device: 132

    def run(lengths, sinks=4, window=64, with_lse=True):
        plan = dataclasses.replace(PLAN, num_sink_tokens=sinks, dense_window_size=window)
        request = zeros(lengths, plan, head_dim=128, dtype=BF16, is_causal=True, softmax_scale=1.0, with_lse=with_lse)
        hopper_skip_launch.prepare(request)(request)

    run([300])
    run([300], with_lse=False)

    def number():
        return sum(len(cache[0]) for cache in skip_forward_hopper.device_caches.values())

    before = number()
    for lengths, window in (([200], 1), ([16], 16), ([1000], 100), ([5, 600], 2**40)):
        run(lengths, window // 2 + 1, window)
    return found[:2], number() - before


def on_gpu(plan=PLAN, dim=128, dtype=BF16, **options):
    q = torch.zeros(300, 4, dim, dtype=dtype).as_subclass(OnGpu)
    return one_sequence(q, q, q, plan, **options)


@pytest.mark.parametrize(
    ("request_of", "reason"),
    [
        (lambda: on_gpu(), None),
        (lambda: on_gpu(dataclasses.replace(SELECTOR, skip=SkipRule(0.1))), None),
        (lambda: on_gpu(SELECTOR), "no skip rule"),
        (lambda: on_gpu(dataclasses.replace(top_n_plan(2, 4, 0, 64), skip=SkipRule(0.1))), "a rule beside"),
        (lambda: on_gpu(dataclasses.replace(MeanPoolTopK(recent_blocks=0).plan(), skip=SkipRule(0.1))), "diagonal"),
        (lambda: on_gpu(AttentionPlan(skip=SkipRule(0.5, 64, 64))), "64 keys for 64 positions"),
        (lambda: on_gpu(AttentionPlan(skip=SkipRule(0.5, 128, 256))), "128 keys for 256 positions"),
        (lambda: on_gpu(is_causal=False), "not causal"),
        (lambda: on_gpu(sliding_window=200), "sliding window"),
        (lambda: on_gpu(softcap=20.0), "softcap"),
        (lambda: on_gpu(softmax_scale=-1.0), "softmax_scale is -1.0"),
        (lambda: on_gpu(dtype=torch.float16), "torch.float16"),
        (lambda: on_gpu(dim=64), "head_dim of 64"),
    ],
)
def test_what_it_runs(absent_gpu, monkeypatch, request_of, reason):
    request = request_of()
    found = hopper_skip_launch.refusal(request)
    assert found is None if reason is None else reason in found
    assert choice.skips_itself(request, "auto") == (reason is None)
    if reason is None:
        assert choice.choose(request).name == "hopper_skip"
    assert not choice.skips_itself(request, "torch")
    monkeypatch.setenv("MODELOPT_LITE_KERNEL", "hopper")
    assert not choice.skips_itself(request, "auto")
    monkeypatch.delenv("MODELOPT_LITE_KERNEL")
    absent_gpu(100)
    assert not choice.skips_itself(request, "auto")


def test_lists_and_thresholds():
    """Before skipping: all that is seen, or what a selector keeps; and one threshold for each query block."""
    lengths_q, lengths_k = torch.tensor([40, 1, 0, 20]), torch.tensor([40, 50, 3, 37])
    q, k = torch.randn(61, 2, 16), torch.randn(130, 1, 16)
    packing = {
        f"{name}_{side}": x
        for side, lengths in (("q", lengths_q), ("k", lengths_k))
        for name, x in (("starts", lengths.cumsum(0) - lengths), ("lengths", lengths), ("max", int(lengths.max())))
    }
    curve = LengthCurve((16.0, 48.0), (-2.0, -1.0))
    for selector, sparse_decode in itertools.product(
        (None, MeanPoolTopK(keep=0.6, **SMALL).plan().blocks), (True, False)
    ):
        skip = SkipRule(curve, 16, 16, decode_threshold=0.25)
        plan = AttentionPlan(skip=skip, blocks=selector, num_sink_tokens=2, sparse_decode=sparse_decode)
        request = one_sequence(q, k, k, plan, **packing)
        blocks, log_thresholds = select_before_skipping(request)
        kept = select_blocks(request._replace(plan=dataclasses.replace(plan, skip=SkipRule(1e-30, 16, 16)))).mask()
        assert torch.equal(blocks.mask().expand_as(kept), kept)
        # three query blocks of the first sequence, one of the second, two of the last one, which begins at 17
        of_decode = math.log(0.25) if sparse_decode else -math.inf
        expected = torch.tensor([16.0, 32.0, 48.0, 1.0, 32.0, 48.0], dtype=torch.float64)
        expected = curve.at(expected).index_fill(0, torch.tensor(3), of_decode).float()
        assert torch.equal(log_thresholds[:6], expected)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(2), ids=["with LSE", "without"])
def test_kernel_fits_the_gpu(compiled, index):
    found = compiled[index]
    loop = classify(found["hot loop"])
    assert found["shared"] <= SHARED_LIMIT
    assert found["registers"] == 168
    assert found["spilled"] <= SPILLED
    # queries times keys: of two tiles that are skipped, or of one of them, beside weights times values of the other
    assert loop["matrix"] in (16, 24)
    assert loop["shuffles"] == loop["spills"] == 0


@pytest.mark.slow
def test_run_time_numbers_do_not_recompile(compiled):
    assert compiled[-1] == 0


if __name__ == "__main__":
    kernels, more = compile_all()
    for kernel in kernels:
        sys.stdout.write(json.dumps(inspect(kernel)) + "\n")
    sys.stdout.write(f"{more}\n")
