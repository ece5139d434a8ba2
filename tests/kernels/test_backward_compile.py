"""The backward kernels as machine code, without a GPU: registers, shared memory and what stands in their hot loops.

Triton compiles for a GPU only where its interpreter is off, so this file runs itself as a program for that.
"""

import dataclasses
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from test_forward_compile import BF16, FP16, FP32, SHARED_LIMIT, hot_loop, resources

# Bytes a thread that the Triton of constraints.txt spills; other versions spill less or more. They may grow no further.
SPILLS = {
    ("keys", 90, BF16, 128): 168,
    ("keys", 90, BF16, 64): 72,
    ("queries", 90, BF16, 192): 104,
    ("keys", 90, BF16, 192): 88,
    ("queries", 80, BF16, 128): 24,
    ("keys", 80, BF16, 128): 680,
    ("keys", 100, BF16, 128): 400,
}
VARIANTS = [
    # kernel, capability, dtype, head_dim, value_dim, (n, m) or None, causal
    *itertools.product(("queries", "keys"), (90,), (BF16,), (128,), (128,), (None, (2, 4)), (True,)),
    *itertools.product(("queries", "keys"), (90,), (BF16,), (64,), (64,), ((4, 8),), (False,)),
    *itertools.product(("queries", "keys"), (80, 100), (BF16,), (128,), (128,), ((2, 4),), (True,)),
    *itertools.product(("queries", "keys"), (90,), (BF16,), (192,), (128,), ((2, 4),), (True,)),
    *itertools.product(("queries", "keys"), (90,), (FP32,), (64,), (64,), ((2, 4),), (True,)),
]


def compile_variant(kernel, capability, dtype, head_dim, value_dim, n_of_m, causal, settings=None):
    """Compile one variant as ``launch.backward`` would; returns what the tests look at, and Triton's result."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from modelopt_lite.kernels import backward, launch
    from modelopt_lite.kernels.top_n import top_n_plan

    queries = kernel == "queries"
    plan = top_n_plan(*(n_of_m or (0, 4)), 0, 64)
    group = 1 if plan.is_dense else plan.group
    block_d, block_dv = launch.block_dim(head_dim), launch.block_dim(value_dim)
    if settings is None:
        table = launch.QUERY_SETTINGS if queries else launch.KEY_SETTINGS
        settings = launch.default_settings(capability, dtype, max(block_d, block_dv), group, causal, table)
    options = launch._options(settings, head_dim, value_dim, causal, None, None, plan)
    kind = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]
    function = backward.gradient_of_queries if queries else backward.gradient_of_keys

    signature = {}
    for name in (parameter.name for parameter in function.params):
        if name.endswith("_descriptor"):
            block = block_d if name in ("key_descriptor", "query_descriptor") else block_dv
            box = [group, settings.block_n // group, 1, block] if queries else [1, settings.block_m, block]
            signature[name] = f"tensordesc<{kind}{box}>" if settings.descriptors else "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name in ("shift_ptr", "delta_ptr") else f"*{kind}"
        else:
            signature[name] = "constexpr" if name in ("SCORE_HOOK", "OPTIONS") else "i32"
    signature["strides"] = (("i32", "i32"),) * (5 if queries else 6)
    signature["sequences"] = ("*i64",) * 4
    signature["heads_of"] = ("i32", "i32")
    signature["numbers"] = ("fp32", "fp32")
    signature["hook_args"] = () if plan.is_dense else ("constexpr",)
    place = {name: index for index, name in enumerate(signature)}
    constants = {(place["SCORE_HOOK"],): plan.score_hook, (place["OPTIONS"],): options}
    constants |= {(i,): None for name, i in place.items() if "descriptor" in name and signature[name] == "constexpr"}
    if not plan.is_dense:
        constants[(place["hook_args"], 0)] = plan.hook_constants[0]
    aligned = [(i,) for name, i in place.items() if name.endswith("_ptr")]
    aligned += [(place["strides"], *pair) for pair in itertools.product(range(len(signature["strides"])), range(2))]
    compiled = compile(
        ASTSource(function, signature, constants, {path: [["tt.divisibility", 16]] for path in aligned}),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": settings.num_warps, "num_stages": settings.num_stages, "enable_fp_fusion": True},
    )
    found = {
        "shared": compiled.metadata.shared,
        **resources(compiled.asm["cubin"]),
        **hot_loop(compiled.asm["ptx"]),
    }
    return found, compiled


def count_compilations():
    """Launch with many run-time numbers for a GPU that is not there, and count what is compiled of each kernel."""
    from test_forward_compile import pretend_gpu

    from modelopt_lite.kernels import launch
    from modelopt_lite.kernels.top_n import top_n_plan

    kernels = [launch.gradient_rows, launch.gradient_of_keys, launch.gradient_of_queries]
    pretend_gpu(launch, *kernels)
    for lengths, number in itertools.product(([1], [16], [17], [1000], [5, 6], [16] * 16), (1, 16, 100)):
        q, k = (torch.zeros(sum(lengths), heads, 64, dtype=BF16) for heads in (4, 2))
        length = torch.tensor(lengths)
        packing = (length.cumsum(0) - length, length, max(lengths))
        launch.backward(
            q,
            q,
            k,
            k,
            None,
            q,
            torch.zeros(q.shape[:2]),
            *packing,
            *packing,
            is_causal=True,
            softmax_scale=1.0 / number,
            sliding_window=number,
            softcap=None,
            plan=dataclasses.replace(top_n_plan(2, 4, number, number), hook_args=(float(number),)),
        )
    return [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]


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
    found = compiled[index]
    kernel, capability, dtype, head_dim, *_ = VARIANTS[index]
    assert found["shared"] <= SHARED_LIMIT[capability]
    assert found["spilled"] <= SPILLS.get((kernel, capability, dtype, head_dim), 0)
    if (capability, dtype) == (90, BF16) and head_dim <= 128:
        # Two programs at a time on every multiprocessor: one computes softmax while the other multiplies.
        assert found["shared"] <= 113 * 1024
        assert found["shfl"] == found["st.shared"] == 0
        # The rows' numbers of the keys' kernel pass through shared memory.
        assert found["ld.shared"] <= (4 if kernel == "keys" else 0)


@pytest.mark.slow
def test_run_time_numbers_do_not_recompile(compiled):
    assert compiled[-1] == [1, 1, 1]


if __name__ == "__main__":
    for variant in VARIANTS:
        sys.stdout.write(json.dumps(compile_variant(*variant)[0]) + "\n")
    sys.stdout.write(f"{json.dumps(count_compilations())}\n")
