"""The forward kernel as machine code, without a GPU: registers, shared memory and what stands in its hot loop.

Triton compiles for a GPU only where its interpreter is off, so this file runs itself as a program for that.
"""

import dataclasses
import itertools
import json
import sys

import pytest
import torch
from cases import one_sequence
from machine_code import classify, compile_kernel, inspect
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from modelopt_lite.kernels.portable import forward
from modelopt_lite.kernels.portable import launch as portable_launch
from modelopt_lite.kernels.top_n import top_n_plan
from modelopt_lite.methods import SinkWindow

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Bytes that a GPU offers a program. 8.0 offers 163 KB, but 8.6, 8.9 and 12.0 run the same rows.
SHARED_LIMIT = {80: 99 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# Bytes that spill; and in the hot loop, spills, shuffles, and loads and stores of shared memory. On sm_80 and sm_120
# rows have maxima: a thread shares its two rows with three others. On sm_100, where it shares its row with one, weights
# also move to where the tensor memory wants them.
LIMITS = {80: (0, 0, 4, 0), 90: (0, 0, 0, 0), 100: (0, 0, 9, 8), 120: (0, 0, 4, 0)}
# By head_dim and (n, m). Before Hopper, the compiler gives each warp all queries and some dimensions if there are more
# of these: then all tiles pass through shared memory. Elsewhere so do groups of which a thread has a part, as tiles are
# narrow.
EXCEPTIONS = {
    (80, BF16, 64, (8, 16)): (0, 0, 4, 138),
    (80, BF16, 128, (8, 16)): (0, 0, 4, 138),
    (80, BF16, 256, None): (0, 0, 26, 46),
    (80, BF16, 256, (2, 4)): (0, 0, 22, 64),
    (80, BF16, 256, (4, 8)): (0, 0, 13, 64),
    (80, BF16, 256, (8, 16)): (0, 0, 12, 96),
    (90, FP16, 128, (2, 4)): (0, 0, 4, 0),
    # Counting ranks spills less, and is slower by 45 % and 17 % on an H200.
    (90, BF16, 64, (8, 16)): (96, 1, 0, 0),
    (90, BF16, 128, (8, 16)): (336, 10, 0, 0),
    (90, BF16, 192, (2, 4)): (0, 0, 4, 0),
    (90, BF16, 256, None): (0, 0, 4, 0),
    (90, BF16, 256, (2, 4)): (0, 0, 4, 0),
    (90, BF16, 256, (4, 8)): (16, 0, 4, 0),
    (90, BF16, 256, (8, 16)): (0, 0, 76, 278),
    (100, BF16, 128, (8, 16)): (0, 0, 76, 164),
    (100, BF16, 256, (4, 8)): (16, 0, 36, 40),
    (100, BF16, 256, (8, 16)): (0, 0, 33, 82),
    # Products are multiply-adds on operands in shared memory.
    (80, FP32, 64, (2, 4)): (0, 0, 11, 166),
    (80, FP32, 256, (2, 4)): (0, 0, 7, 298),
    (80, FP32, 256, (8, 16)): (144, 23, 7, 342),
}
VARIANTS = [
    # capability, dtype, (head_dim, value_dim), (n, m) or None, causal
    *itertools.product((80, 90, 100), (BF16,), ((128, 128), (256, 256)), (None, (2, 4), (4, 8), (8, 16)), (True,)),
    *itertools.product((80, 90), (BF16,), ((64, 64),), ((2, 4), (8, 16)), (True,)),
    *itertools.product((90,), (FP16,), ((128, 128),), ((2, 4),), (True,)),
    *itertools.product((80,), (FP32,), ((64, 64), (256, 256)), ((2, 4),), (True,)),
    *itertools.product((80,), (FP32,), ((256, 256),), ((8, 16),), (True,)),
    *itertools.product((120,), (BF16,), ((128, 128),), ((2, 4),), (True,)),
    *itertools.product((90,), (BF16,), ((128, 128),), ((1, 4), (3, 4), (2, 8)), (True,)),
    *itertools.product((90,), (BF16,), ((80, 128), (192, 128)), ((2, 4),), (False,)),
]


def pretend_gpu(module, *kernels, compiled=None):
    """Have a module that launches these kernels compile them for a GPU that is not there, and not run them.

    What is compiled is appended to the list ``compiled``.
    """

    class AbsentGpu:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    class CompileOnly:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*arguments, **options):
                kernel = self.kernel.warmup(*arguments, grid=grid, **options)
                if compiled is not None:
                    compiled.append(kernel)

            return launch

    driver.set_active(AbsentGpu())
    for name, kernel in list(vars(module).items()):
        if any(kernel is each for each in kernels):
            setattr(module, name, CompileOnly(kernel))
    module.compute_capability = module.capability_of = lambda device: 90


def zeros(lengths, plan, heads=(4, 2), head_dim=64, dtype=BF16, **options):
    """Make a request of sequences of these lengths."""
    q, k = (torch.zeros(sum(lengths), count, head_dim, dtype=dtype) for count in heads)
    length = torch.tensor(lengths)
    packing = {"starts": length.cumsum(0) - length, "lengths": length, "max": max(lengths)}
    both = {f"{name}_{side}": x for name, x in packing.items() for side in "qk"}
    return one_sequence(q, k, k, plan, **both, **options)


def count_compilations(launch, *kernels):
    """Return how many variants of each kernel Triton would compile if ``launch`` ran; nothing is compiled."""
    keys = {kernel: set() for kernel in kernels}

    def note(*, key, fn, **_):
        keys[fn.jit_function].add(key)
        return True  # stops before it compiles

    knobs.runtime.jit_cache_hook = note
    launch()
    return [len(of_kernel) for of_kernel in keys.values()]


def launch_all():
    """Launch with many run-time numbers for a GPU that is not there."""
    numbers = ((1, 0, 1), (2, 1, 16), (16, 16, 100))
    lengths = ([1], [16], [17], [1000], [5, 6], [16] * 16, [3000], [3001])
    for of_each, (sinks, window, sliding) in itertools.product(lengths, numbers):
        plan = dataclasses.replace(top_n_plan(2, 4, sinks, window), hook_args=(float(sinks),))
        request = zeros(of_each, plan, softmax_scale=1.0 / sliding, sliding_window=sliding)
        portable_launch.prepare(request)(request)
    first = torch.zeros(2, dtype=torch.int64)
    for plan, positions in ((SinkWindow().plan(), {}), (top_n_plan(2, 4, 4, 64), {"first_q": first, "first_k": first})):
        request = zeros([5, 6], plan, is_causal=False, softmax_scale=1.0, **positions)
        portable_launch.prepare(request)(request)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(VARIANTS)), ids=lambda i: "-".join(map(str, VARIANTS[i])))
def test_kernel_fits_the_gpu(compiled, index):
    found = compiled[index]
    capability, dtype, dims, n_of_m, _ = VARIANTS[index]
    loop = classify(found["hot loop"])
    assert found["shared"] <= SHARED_LIMIT[capability]
    assert loop["matrix"] > 0 or dtype == FP32
    traffic = (found["spilled"], loop["spills"], loop["shuffles"], loop["shared memory"])
    limits = EXCEPTIONS.get((capability, dtype, dims[0], n_of_m), LIMITS[capability])
    assert all(x <= limit for x, limit in zip(traffic, limits, strict=True)), traffic


@pytest.mark.slow
def test_run_time_numbers_do_not_recompile(compiled):
    # One for all numbers, one for those of long calls, one with another hook, and one with positions.
    assert compiled[-1] == [4]


if __name__ == "__main__":
    for variant in VARIANTS:
        sys.stdout.write(json.dumps(inspect(compile_kernel("forward", *variant))) + "\n")
    pretend_gpu(portable_launch, forward.attention_forward)
    sys.stdout.write(f"{json.dumps(count_compilations(launch_all, forward.attention_forward))}\n")
