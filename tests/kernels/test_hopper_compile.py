"""The Hopper kernel as machine code, without a GPU: like the portable one's test, this runs itself as a program."""

import json
import os
import subprocess
import sys

import pytest
import torch
from machine_code import classify, inspect
from test_forward_compile import pretend_gpu

BF16, FP16 = torch.bfloat16, torch.float16
SHARED_LIMIT = 227 * 1024
REGISTERS = 168  # of a thread at the launch, for 384 of them; warpgroups then give and take
VARIANTS = [
    # dtype, head_dim, (n, m) or None, causal
    (BF16, 128, None, True),
    (BF16, 128, (2, 4), True),
    (BF16, 128, (4, 8), True),
    (BF16, 64, (2, 4), False),
    (FP16, 128, (2, 4), True),
]
# Instructions that spill registers in the hot loop: flags of a group of 8 are all made before the first is used.
SPILLS = {(4, 8): 30}
# With FP16 the loop has the rows' maxima, four shuffles of two rows.
SHUFFLES = {BF16: 0, FP16: 4}


def compile_all():
    """Launch all variants for a GPU that is not there.

    Returns:
        The kernels, and how many more are compiled for other lengths and windows.
    """
    from modelopt_lite.kernels import launch
    from modelopt_lite.kernels.hopper import attention_forward_hopper, prepare
    from modelopt_lite.kernels.top_n import top_n_plan

    def run(lengths, dtype, head_dim, n_of_m, causal, window=64):
        q, k = (torch.zeros(sum(lengths), heads, head_dim, dtype=dtype) for heads in (4, 2))
        length = torch.tensor(lengths)
        packing = length.cumsum(0) - length, length, max(lengths)
        options = {"is_causal": causal, "softmax_scale": 1.0, "sliding_window": None, "softcap": None, "s_aux": None}
        plan = top_n_plan(*(n_of_m or (0, 4)), 0, window)
        launch.forward(q, k, k, *packing, *packing, **options, plan=plan, kernel="hopper")

    found = []
    pretend_gpu(launch, attention_forward_hopper, prepare, compiled=found)
    launch.processors = lambda device: 132
    for variant in VARIANTS:
        run([300], *variant)
    found = [kernel for kernel in found if kernel.metadata.name == "attention_forward_hopper"]
    for lengths, window in zip(([1], [16], [17], [1000], [5, 6], [16] * 16), (0, 1, 16, 64, 100, 2**40), strict=True):
        run(lengths, *VARIANTS[1], window=window)
    return found, sum(len(cache[0]) for cache in attention_forward_hopper.device_caches.values()) - len(VARIANTS)


@pytest.fixture(scope="module")
def compiled():
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(VARIANTS)), ids=lambda i: "-".join(map(str, VARIANTS[i])))
def test_kernel_fits_the_gpu(compiled, index):
    dtype, head_dim, n_of_m, _ = VARIANTS[index]
    found = compiled[index]
    loop = classify(found["hot loop"])
    assert found["shared"] <= SHARED_LIMIT
    assert found["registers"] == REGISTERS
    assert loop["matrix"] == 8 + head_dim // 16  # instructions that take 16 keys of the values, or 16 dimensions
    assert loop["spills"] <= SPILLS.get(n_of_m, 0)
    assert loop["shuffles"] == SHUFFLES[dtype]
    assert loop["shared memory"] <= 1  # the store that pins the order and never happens


@pytest.mark.slow
def test_run_time_numbers_do_not_recompile(compiled):
    assert compiled[-1] == 0


if __name__ == "__main__":
    kernels, more = compile_all()
    for kernel in kernels:
        sys.stdout.write(json.dumps(inspect(kernel)) + "\n")
    sys.stdout.write(f"{more}\n")
