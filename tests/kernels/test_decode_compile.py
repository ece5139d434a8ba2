"""The decode kernels as machine code, without a GPU: registers, shared memory, and loads that overlap.

Triton compiles for a GPU only where its interpreter is off, so this file runs itself as a program for that.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}
"""Bytes that a GPU offers a program; 8.0 offers more, but 8.6, 8.9 and 12.0 run the same rows."""
VARIANTS = [
    # capability, dtype, heads, (head_dim, value_dim), queries, (n, m), page size, sequences
    (90, BF16, (32, 8), (64, 64), 1, None, 0, 1),
    (90, BF16, (32, 8), (128, 128), 1, None, 0, 1),
    (90, BF16, (32, 8), (128, 128), 1, None, 0, 16),
    (90, BF16, (32, 8), (128, 128), 1, None, 0, 100),
    (90, BF16, (32, 8), (128, 128), 1, None, 256, 1),
    (90, BF16, (32, 8), (128, 128), 16, None, 0, 1),
    (90, BF16, (32, 8), (128, 128), 4, (2, 4), 0, 1),
    (90, BF16, (32, 8), (128, 128), 16, (2, 4), 0, 1),
    (90, BF16, (16, 8), (256, 256), 1, None, 0, 1),
    (90, BF16, (16, 16), (192, 128), 1, None, 0, 1),
    (90, BF16, (16, 1), (576, 512), 1, None, 0, 1),
    (90, BF16, (16, 1), (576, 512), 1, None, 0, 16),
    (90, FP32, (32, 8), (128, 128), 1, None, 0, 1),
    (80, BF16, (32, 8), (128, 128), 1, None, 0, 1),
    (80, BF16, (32, 8), (128, 128), 4, (2, 4), 0, 1),
]


def compile_variant(capability, dtype, heads, dims, queries, n_of_m, page_size, sequences):
    """Return what is worth knowing of the kernel that computes pieces."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from modelopt_lite.kernels import AttentionRequest
    from modelopt_lite.kernels.decode import launch as decode_launch
    from modelopt_lite.kernels.top_n import top_n_plan

    class AbsentGpu:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

    compiled = []

    class CompileOnly:
        def __init__(self, kernel, device, *constants, **options):
            self.kernel, self.constants, self.options = kernel, constants, options

        def __call__(self, programs, *arguments):
            compiled.append(self.kernel.warmup(*arguments, *self.constants, grid=(programs,), **self.options))

    driver.set_active(AbsentGpu())
    decode_launch.Launch, decode_launch.capability_of = CompileOnly, lambda device: capability
    decode_launch.processors = lambda device: 132
    starts, slots = torch.zeros(sequences, dtype=torch.int64), 1024
    fields = {
        "q": torch.zeros(queries, heads[0], dims[0], dtype=dtype),
        "k": torch.zeros(slots, heads[1], dims[0], dtype=dtype),
        "v": torch.zeros(slots, heads[1], dims[1], dtype=dtype),
        "s_aux": torch.zeros(heads[0]),
        "starts_q": starts,
        "lengths_q": starts,
        "max_q": queries,
        "starts_k": starts,
        "lengths_k": starts,
        "max_k": slots,
        "is_causal": True,
        "softmax_scale": 0.1,
        "sliding_window": None,
        "softcap": None,
        "plan": top_n_plan(*(n_of_m or (0, 4)), 0, 64),
    }
    if page_size:
        table = torch.zeros(sequences, slots // page_size, dtype=torch.int32)
        request = AttentionRequest(**fields, page_table=table, page_size=page_size)
    else:
        request = AttentionRequest(**fields)
    decode_launch.prepare(request)(request)
    return [inspect(kernel) for kernel in compiled]


def inspect(kernel):
    """Return a kernel's bytes of shared memory, bytes that a thread spills, and its instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = run_tool("cuobjdump", "-res-usage", file.name)
        sass = run_tool("nvdisasm", "--no-dataflow", "--print-code", file.name)
    stack, local = map(int, re.search(r"STACK:(\d+) .*LOCAL:(\d+)", usage).groups())
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", sass)
    return {
        "shared": kernel.metadata.shared,
        "spilled": stack + local,
        "instructions": Counter(name.split(".")[0] for name in names),
    }


def run_tool(name, *arguments):
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(VARIANTS)), ids=lambda i: "-".join(map(str, VARIANTS[i])))
def test_kernels_fit_the_gpu(compiled, index):
    capability, dtype, *_ = VARIANTS[index]
    for kernel in compiled[index]:
        assert kernel["shared"] <= SHARED_LIMIT[capability]
        assert kernel["spilled"] == 0
    attend, merge = (kernel["instructions"] for kernel in compiled[index])
    assert attend.get("LDGSTS", 0) > 0  # keys are loaded while others are multiplied
    assert dtype == FP32 or attend.get("HMMA", 0) + attend.get("HGMMA", 0) > 0
    # The second kernel starts while the first one runs, and waits for it.
    assert (attend.get("PREEXIT", 0) > 0) == (merge.get("ACQBULK", 0) > 0) == (capability >= 90)


if __name__ == "__main__":
    for variant in VARIANTS:
        sys.stdout.write(json.dumps(compile_variant(*variant)) + "\n")
