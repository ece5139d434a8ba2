"""The backward kernels as machine code, without a GPU: registers, shared memory and what stands in their hot loops.

Triton compiles for a GPU only where its interpreter is off, so this file runs itself as a program for that.
"""

import dataclasses
import itertools
import json
import sys

import pytest
import torch
from machine_code import classify, compile_kernel, inspect
from test_forward_compile import BF16, FP32, SHARED_LIMIT, count_compilations, pretend_gpu, zeros

from modelopt_lite.kernels.portable import launch as portable_launch
from modelopt_lite.kernels.request import ForwardResult
from modelopt_lite.kernels.top_n import top_n_plan

# Bytes a thread that the Triton of constraints.txt spills; other versions spill less or more. The tiles of 90 are what
# was fastest on an H200, and smaller ones that spill nothing would make every product wait for its operands. The
# tiles of 120 are those of 80, which spill nothing there, and here nothing in the hot loop.
SPILLS = {("keys", 90, (128, 128)): 168, ("keys", 90, (64, 64)): 56, ("queries", 120, (128, 128)): 16}
VARIANTS = [
    # kernel, capability, dtype, (head_dim, value_dim), (n, m) or None, causal
    *itertools.product(("queries", "keys"), (90,), (BF16,), ((128, 128),), (None, (2, 4)), (True,)),
    *itertools.product(("queries", "keys"), (90,), (BF16,), ((64, 64),), ((4, 8),), (False,)),
    *itertools.product(("queries", "keys"), (80, 100), (BF16,), ((128, 128),), ((2, 4),), (True,)),
    *itertools.product(("queries", "keys"), (80,), (BF16,), ((256, 256),), ((2, 4),), (True,)),
    *itertools.product(("queries", "keys"), (90,), (BF16,), ((192, 128),), ((2, 4),), (True,)),
    *itertools.product(("queries", "keys"), (80,), (FP32,), ((64, 64),), ((2, 4),), (True,)),
    *itertools.product(("queries",), (120,), (BF16,), ((128, 128),), ((2, 4),), (True,)),
    *itertools.product(("queries", "keys"), (120,), (BF16,), ((256, 256),), ((2, 4),), (True,)),
    *itertools.product(("queries", "keys"), (86,), (FP32,), ((256, 256),), ((2, 4),), (True,)),
]


def launch_all():
    """Launch with many run-time numbers for a GPU that is not there."""
    for lengths, number in itertools.product(([1], [16], [17], [1000], [5, 6], [16] * 16), (1, 16, 100)):
        plan = dataclasses.replace(top_n_plan(2, 4, number, number), hook_args=(float(number),))
        request = zeros(lengths, plan, softmax_scale=1.0 / number, sliding_window=number)
        result = ForwardResult(request.q, torch.zeros(request.q.shape[:2]))
        portable_launch.prepare_backward(request.q, request)(request.q, result, request)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(VARIANTS)), ids=lambda i: "-".join(map(str, VARIANTS[i])))
def test_kernel_fits_the_gpu(compiled, index):
    found = compiled[index]
    kernel, capability, dtype, dims, *_ = VARIANTS[index]
    loop = classify(found["hot loop"])
    assert found["shared"] <= SHARED_LIMIT[capability]
    assert found["spilled"] <= SPILLS.get((kernel, capability, dims), 0)
    assert loop["spills"] <= (5 if (kernel, capability, dims) in SPILLS else 0)
    assert loop["shuffles"] == 0
    if capability == 90 and max(dims) <= 128:
        # Two programs at a time on every multiprocessor: one computes softmax while the other multiplies.
        assert found["shared"] <= 113 * 1024
    if kernel == "queries" and (capability == 90 or dims[0] < 256) and dtype != FP32:
        # On sm_100 scores and the gradients of weights meet in different layouts.
        assert loop["shared memory"] <= (16 if capability == 100 else 0)
    elif capability == 90:
        # The rows' numbers pass through shared memory; weights and the gradients of scores too, transposed, but
        # before Hopper instruction by instruction.
        assert loop["shared memory"] <= 4


@pytest.mark.slow
def test_run_time_numbers_do_not_recompile(compiled):
    assert compiled[-1] == [1, 1, 1]


if __name__ == "__main__":
    for variant in VARIANTS:
        sys.stdout.write(json.dumps(inspect(compile_kernel(*variant))) + "\n")
    kernels = [portable_launch.gradient_rows, portable_launch.gradient_of_keys, portable_launch.gradient_of_queries]
    pretend_gpu(portable_launch, *kernels)
    sys.stdout.write(f"{json.dumps(count_compilations(launch_all, *kernels))}\n")
