"""The backward kernel for Hopper without a GPU: its machine code, and when it is chosen.

Like the portable kernel's test, this file runs itself as a program to compile.
"""

import dataclasses
import json
import sys

import pytest
import torch
from machine_code import classify, inspect
from test_forward_compile import BF16, FP16, pretend_gpu, zeros

from modelopt_lite.kernels import hopper_backward_launch
from modelopt_lite.kernels.hopper_backward import attention_backward_hopper, prepare_gradients, round_gradients
from modelopt_lite.kernels.top_n import top_n_plan

SHARED_LIMIT = 227 * 1024
VARIANTS = [
    # dtype, (n, m) or None, causal, other options
    (BF16, None, True, {}),
    (BF16, (2, 4), True, {}),
    (BF16, (4, 8), True, {}),
    (FP16, (2, 4), False, {}),
    (BF16, (2, 4), True, {"softcap": 30.0, "sliding_window": 100}),
]


def compile_all():
    """Launch all variants for a GPU that is not there.

    Returns:
        The kernels, and how many more are compiled for other lengths and windows.
    """

    def run(lengths, dtype, n_of_m, causal, options, window=64):
        plan = dataclasses.replace(top_n_plan(*(n_of_m or (0, 4)), 0, 0), dense_window_size=window if n_of_m else 0)
        request = zeros(lengths, plan, head_dim=128, dtype=dtype, is_causal=causal, softmax_scale=1.0, **options)
        hopper_backward_launch.backward(request.q, request.q, torch.zeros(request.q.shape[:2]), request)

    kernels = (attention_backward_hopper, prepare_gradients, round_gradients)
    found = []
    pretend_gpu(hopper_backward_launch, *kernels, compiled=found)
    hopper_backward_launch.processors = lambda device: 132
    for variant in VARIANTS:
        run([300], *variant)

    def number():
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    found = [kernel for kernel in found if kernel.metadata.name == "attention_backward_hopper"]
    before = number()
    several = ([1], [16], [17], [1000], [5, 6], [16] * 16)
    for lengths, window in zip(several, (0, 1, 16, 64, 100, 2**40), strict=True):
        run(lengths, *VARIANTS[1], window=window)
    return found, number() - before


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(VARIANTS)), ids=lambda i: "-".join(map(str, VARIANTS[i])))
def test_kernel_fits_the_gpu(compiled, index):
    found = compiled[index]
    loop = classify(found["hot loop"])
    assert found["shared"] <= SHARED_LIMIT
    assert found["registers"] == 168  # at the launch; then warps give and take
    # Instructions that take 16 dimensions, for two products; queries, for two more; and keys.
    assert loop["matrix"] == 8 + 8 + 4 + 4 + 8
    assert loop["shuffles"] == 0
    assert loop["shared memory"] <= 16
    assert loop["spills"] <= 13


@pytest.mark.slow
def test_run_time_numbers_do_not_recompile(compiled):
    assert compiled[-1] == 0


if __name__ == "__main__":
    kernels, more = compile_all()
    for kernel in kernels:
        sys.stdout.write(json.dumps(inspect(kernel)) + "\n")
    sys.stdout.write(f"{more}\n")
