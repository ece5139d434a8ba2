"""The kernels that score, choose and count as machine code, without a GPU: registers and shared memory.

Triton compiles for a GPU only where its interpreter is off, so this file runs itself as a program for that.
"""

import json
import re
import sys
import tempfile

import pytest
import torch
from machine_code import run_tool

BF16, FP32 = torch.bfloat16, torch.float32
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}
"""Bytes that a GPU offers a program; 8.0 offers more, but 8.6, 8.9 and 12.0 run the same."""
VARIANTS = [
    # capability, dtype, head_dim, stride, options
    (90, BF16, 128, 16, {}),
    (90, BF16, 64, 8, {}),
    (90, BF16, 80, 4, {"sliding_window": 1000, "softcap": 20.0}),
    (90, BF16, 256, 8, {"is_causal": False}),
    (90, FP32, 128, 16, {}),
    (80, BF16, 128, 16, {}),
    (80, FP32, 128, 16, {}),
]


def compile_variant(capability, dtype, head_dim, stride, options):
    """Compile all kernels as they are launched for a request, and return what is worth knowing of each."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from modelopt_lite.kernels import AttentionRequest, block_launch, blocks, statistics_launch
    from modelopt_lite.kernels.blocks import BlockGrid, KeyBlocks
    from modelopt_lite.kernels.top_n import top_n_plan
    from modelopt_lite.plan import DENSE

    class AbsentGpu:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

    compiled = {}

    class CompileOnly:
        def __init__(self, kernel, device, *constants, **options):
            self.kernel, self.constants, self.options = kernel, constants, options

        def __call__(self, programs, *arguments):
            kernel, rest = self.kernel, (*arguments, *self.constants)
            compiled[kernel.__name__] = kernel.warmup(*rest, grid=(programs,), **self.options)

    driver.set_active(AbsentGpu())
    blocks._prepared.clear()
    for launches in (block_launch._choice, block_launch._listing):
        launches.cache_clear()
    block_launch._is_large = lambda x: capability == 90
    block_launch.Launch = statistics_launch.Launch = CompileOnly
    statistics_launch.capability_of = lambda device: capability
    length = 4096
    q, k = (torch.zeros(length, heads, head_dim, dtype=dtype) for heads in (8, 2))
    start, lengths = torch.zeros(1, dtype=torch.int64), torch.tensor([length])
    packing = {"starts_q": start, "lengths_q": lengths, "max_q": length, "starts_k": start, "lengths_k": lengths}
    masks = {"is_causal": True, "softmax_scale": 0.1, "sliding_window": None, "softcap": None, "s_aux": None, **options}
    request = AttentionRequest(q=q, k=k, v=k, max_k=length, plan=DENSE, **packing, **masks)
    grid = BlockGrid(request, 128, 128)
    block_launch.grid_tables(grid)
    seen, forced = block_launch.marked(grid, 1, 1)
    block_launch.mean_scores(grid)
    block_launch.softmax_mass(grid, None)
    block_launch.softmax_mass(grid, block_launch.mean_keys(grid))  # splits numbers, if they have 16 bits
    scores = block_launch.antidiagonal_mass(grid, stride)
    block_launch.listed_choice(scores, seen, forced, "heaviest", 0.9)
    block_launch.listed_choice(scores, seen, forced, "above", 0.9)
    chosen = block_launch.chosen(scores, seen, forced, "above", 0.9)
    block_launch.listed(chosen, seen, forced)
    block_launch.excess(grid)
    lists = KeyBlocks.from_mask(torch.ones(1, *grid.shape, dtype=torch.bool), start, 128, 128)
    with_lists = request._replace(plan=top_n_plan(2, 4, 4, 64), blocks=lists)
    statistics_launch.prepare(with_lists, every=4)(with_lists)
    return {name: inspect(kernel) for name, kernel in compiled.items()}


def inspect(kernel):
    """Return a kernel's bytes of shared memory, bytes a thread spills, and how many products of matrices it has."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = run_tool("cuobjdump", "-res-usage", file.name)
    stack, local = map(int, re.search(r"STACK:(\d+) .*LOCAL:(\d+)", usage).groups())
    return {"spilled": stack + local, "shared": kernel.metadata.shared, "products": kernel.asm["ptx"].count("mma")}


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(VARIANTS)), ids=lambda i: "-".join(map(str, VARIANTS[i][:4])))
def test_kernels_fit_the_gpu(compiled, index):
    capability, dtype, *_ = VARIANTS[index]
    found = compiled[index]
    assert set(found) == {
        "lay_out", "mark_blocks", "mean_rows", "multiply_means", "sum_softmax", "antidiagonal_tile",
        "join_antidiagonals", "choose_largest", "choose_above", "list_rows", "excess_of_blocks",
        "count_scores", "join_parts",
    } | ({"split_numbers"} if dtype != FP32 else set())  # fmt: skip
    for name, kernel in found.items():
        assert kernel["shared"] <= SHARED_LIMIT[capability]
        # FP32 products are multiply-adds of registers, and masks take many. Elsewhere two registers may be spilled.
        assert kernel["spilled"] <= (256 if dtype == FP32 or name == "excess_of_blocks" else 8)
    for name in ("sum_softmax", "antidiagonal_tile", "excess_of_blocks", "count_scores"):
        assert (found[name]["products"] > 0) == (dtype != FP32)


if __name__ == "__main__":
    for variant in VARIANTS:
        sys.stdout.write(json.dumps(compile_variant(*variant)) + "\n")
        sys.stdout.flush()
