"""The kernels as machine code, without a GPU: registers, shared memory and what stands in their hot loops.

As a program, prints the portable kernels' table in the docs: what a warp executes of a hot loop, for each tile of 64
queries and 64 keys with a head dimension of 128 in BF16 on Hopper.

    python benchmarks/machine_code.py
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from modelopt_lite.kernels import AttentionRequest, KeyBlocks
from modelopt_lite.kernels.portable import backward, forward
from modelopt_lite.kernels.portable import launch as portable_launch
from modelopt_lite.kernels.portable.launch import KEY_SETTINGS, QUERY_SETTINGS, SETTINGS
from modelopt_lite.kernels.settings import Settings, block_dim, default_settings
from modelopt_lite.kernels.top_n import top_n_plan
from modelopt_lite.plan import BLOCK_SIZE, AttentionPlan

KERNELS = {
    # function, its table of settings, number of tensors with strides
    "forward": (forward.attention_forward, SETTINGS, 4),
    "queries": (backward.gradient_of_queries, QUERY_SETTINGS, 5),
    "keys": (backward.gradient_of_keys, KEY_SETTINGS, 6),
}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
CLASSES = {
    "matrix": r"HGMMA|HMMA|UTC\w*MMA",
    "FMA pipe": r"FFMA|FMUL|FADD|IMAD|HFMA2",
    "ALU pipe": r"FMNMX|FSETP?|FSEL|SEL|F2FP|LOP3|PLOP3|ISETP|IADD3|LEA|SHF|PRMT|VIMNMX3?|MOV|P2R|R2P",
    "exponentials": r"MUFU",
    "shuffles": r"SHFL",
    "shared memory": r"LDS|STS",
    "spills": r"LDL|STL",
}
"""Machine instructions by the unit that runs them; loads of matrix operands (LDSM) are among the others."""


def compile_kernel(
    kernel: str,
    capability: int,
    dtype: torch.dtype,
    dims: tuple[int, int],
    n_of_m: tuple[int, int] | None,
    causal: bool,
    settings: Settings | None = None,
    listed: bool = False,
) -> CompiledKernel:
    """Compile one of ``KERNELS`` as :mod:`modelopt_lite.kernels.portable.launch` would, by default with its settings.

    Args:
        kernel: its name.
        capability: compute capability of the GPU, which need not be there.
        dtype: type of the tensors.
        dims: dimension of queries and keys, and of values.
        n_of_m: kept of how many, or None for dense.
        causal: whether a query sees only keys at its own position and before.
        settings: tiles and warps, instead of the table's.
        listed: whether there are lists of key blocks, of the default size.
    """
    function, _, strided = KERNELS[kernel]
    plan = top_n_plan(*(n_of_m or (0, 4)), 0, 64)
    group = 1 if plan.is_dense else plan.group
    block_d, block_dv = map(block_dim, dims)
    request = empty_request(dtype, dims, plan, causal, listed)
    settings = settings or table_settings(kernel, capability, dtype, dims, n_of_m, causal)
    settings = portable_launch.fitted(settings, request.blocks)
    keys_box, queries_box = [group, settings.block_n // group, 1], [1, settings.block_m]
    boxes = {
        "key_descriptor": [*keys_box, block_d],
        "value_descriptor": [*keys_box, block_dv],
        "query_descriptor": [*queries_box, block_d],
        "grad_descriptor": [*queries_box, block_dv],
    }
    places = {parameter.name: index for index, parameter in enumerate(function.params)}
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    for name, place in places.items():
        if (
            name in ("sink_logits_ptr", "output_rows_ptr")
            or (name in boxes and not settings.descriptors)
            or (name, listed) == ("lists", False)
        ):
            signature[name], constants[place,] = "constexpr", None
        elif name in boxes:
            signature[name] = f"tensordesc<{TYPES[dtype]}{boxes[name]}>"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name in ("lse_ptr", "shift_ptr", "delta_ptr") else f"*{TYPES[dtype]}"
        else:
            signature[name] = "i32"
    signature |= {
        "strides": (("i32", "i32"),) * strided,
        "sequences": ("*i64",) * 4 + ("constexpr",) * 2,
        "heads_of": ("i32", "i32"),
        "numbers": ("fp32", "fp32"),
        "hook_args": ("constexpr",) * len(plan.hook_constants),
        "SCORE_HOOK": "constexpr",
        "OPTIONS": "constexpr",
    }
    if listed:
        signature["lists"] = ("*i32",) * 3 + ("i32",) * (4 if kernel == "keys" else 3)
    constants |= {(places["sequences"], index): None for index in (4, 5)}
    constants |= {(places["hook_args"], index): number for index, number in enumerate(plan.hook_constants)}
    constants[places["SCORE_HOOK"],] = plan.score_hook
    constants[places["OPTIONS"],] = portable_launch.options_for(request, settings)
    aligned = [(place,) for name, place in places.items() if name.endswith("_ptr") and signature[name] != "constexpr"]
    aligned += [(places["strides"], *pair) for pair in itertools.product(range(strided), range(2))]
    return triton.compile(
        ASTSource(function, signature, constants, {path: [["tt.divisibility", 16]] for path in aligned}),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": settings.num_warps, "num_stages": settings.num_stages, "enable_fp_fusion": True},
    )


def table_settings(
    kernel: str,
    capability: int,
    dtype: torch.dtype,
    dims: tuple[int, int],
    n_of_m: tuple[int, int] | None,
    causal: bool,
) -> Settings:
    """Return the settings that a kernel is launched with; arguments are those of :func:`compile_kernel`."""
    block_d, group = block_dim(max(dims)), 1 if n_of_m is None else n_of_m[1]
    return default_settings(capability, dtype, block_d, group, causal, KERNELS[kernel][1], kernel != "forward")


def empty_request(
    dtype: torch.dtype, dims: tuple[int, int], plan: AttentionPlan, causal: bool, listed: bool = False
) -> AttentionRequest:
    """Return a request without tokens, as options are made from."""
    q, v = (torch.empty(0, 1, dim, dtype=dtype) for dim in dims)
    none = torch.empty(0, dtype=torch.int64)
    lists = KeyBlocks.from_mask(torch.empty(1, 0, 0, dtype=torch.bool), none, BLOCK_SIZE, BLOCK_SIZE)
    return AttentionRequest(
        q=q, k=q, v=v, s_aux=None, starts_q=none, lengths_q=none, max_q=0, starts_k=none, lengths_k=none, max_k=0,
        is_causal=causal, softmax_scale=1.0, sliding_window=None, softcap=None, plan=plan,
        blocks=lists if listed else None,
    )  # fmt: skip


def inspect(kernel: CompiledKernel) -> dict[str, Any]:
    """Return a kernel's bytes of shared memory, registers a thread, bytes a thread spills, and its hot loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = run_tool("cuobjdump", "-res-usage", file.name)
        sass = run_tool("nvdisasm", "--no-dataflow", "--print-code", file.name)
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups())
    return {
        "shared": kernel.metadata.shared,
        "registers": registers,
        "spilled": stack + local,
        "hot loop": Counter(instruction.partition(".")[0] for instruction in hot_loop(sass)),
    }


def run_tool(name: str, *arguments: str) -> str:
    """Return what one of NVIDIA's tools that come with Triton prints."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def hot_loop(sass: str) -> list[str]:
    """Return the instructions that the last loop to multiply matrices, the hot one in every kernel, runs as a rule."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    # What is predicated never to run is left out.
    line = re.compile(r"^(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(?:@(?!!PT)!?\w+ )?([A-Z][\w.]*)(.*?);", re.MULTILINE)
    for label, name, operands in line.findall(sass):
        if label:
            labels[label] = len(code)
        else:
            code.append((name, operands))
    end = max(index for index, (name, _) in enumerate(code) if name == "EXIT")  # behind it wait those who must
    product = re.compile(f"{CLASSES['matrix']}|FFMA")
    loops = []
    for index, (name, operands) in enumerate(code[:end]):
        target = re.search(r"`\((\.L_x_\d+)\)", operands)
        first = labels[target[1]] if name.startswith("BRA") and target else end
        if first <= index and any(product.match(name) for name, _ in code[first:index]):
            loops.append((first, index + 1))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    index, last = max(inner)
    names = []
    while index < last:
        name, operands = code[index]
        names.append(name)
        target = re.search(r"`\((\.L_x_\d+)\)", operands)
        after = labels[target[1]] if name.startswith("BRA") and target else index
        # What whole warpgroups can skip is multiplied again, which is rare.
        skipped = index < after < last and any(name.startswith("HGMMA") for name, _ in code[index:after])
        index = after if skipped else index + 1
    return names


def classify(loop: dict[str, int]) -> dict[str, int]:
    """Sum the instructions of a hot loop over ``CLASSES``."""
    return {
        name: sum(count for instruction, count in loop.items() if re.fullmatch(pattern, instruction))
        for name, pattern in CLASSES.items()
    }


def main() -> None:
    """Print the table."""
    print("| kernel | |", " | ".join(["all", *CLASSES]), "|")
    print("| --- | --- |" + " ---: |" * (1 + len(CLASSES)))
    for kernel, n_of_m in itertools.product(KERNELS, (None, (2, 4), (4, 8))):
        variant = (kernel, 90, torch.bfloat16, (128, 128), n_of_m, True)
        loop = inspect(compile_kernel(*variant))["hot loop"]
        settings = table_settings(*variant)
        tiles = settings.block_m * settings.block_n / 64**2 * 4 / settings.num_warps
        counts = (f"{count / tiles:.0f}" for count in (sum(loop.values()), *classify(loop).values()))
        print(f"| {kernel} | {'{}:{}'.format(*n_of_m) if n_of_m else 'dense'} |", " | ".join(counts), "|")


if __name__ == "__main__":
    main()
