"""The forward kernel as machine code, without a GPU: registers, shared memory and what stands in its hot loop.

Triton compiles for a GPU only where its interpreter is off, so this file runs itself as a program for that.
"""

import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Shuffles, loads and stores of shared memory in the hot loop, for rows' maxima: a thread shares its two rows with three
# others, on sm_100 its row with one. On sm_80 the compiler lays sparse probabilities out for 8-bit data and shuffles.
TRAFFIC = {(80, False): (4, 0, 0), (80, True): (20, 0, 0), 90: (4, 0, 0), 100: (9, 4, 4)}
# Bytes that spill, outside the hot loop: what no GPU was there to tune, or not worth it.
SPILLS = {
    (80, BF16, 128): 16,
    (80, BF16, 256): 800,
    (90, BF16, (8, 16)): 96,
    (90, FP32, 128): 256,
    (100, BF16, 256): 96,
}
VARIANTS = [
    # capability, dtype, head_dim, value_dim, (n, m) or None, causal
    *itertools.product((80, 90, 100), (BF16,), (64, 128, 256), (None,), (None, (2, 4)), (True,)),
    *itertools.product((90,), (FP16, FP32), (128,), (None,), (None, (2, 4)), (True,)),
    *itertools.product((90,), (BF16,), (128,), (None,), ((1, 2), (1, 4), (3, 4), (2, 8), (4, 8), (8, 16)), (True,)),
    *itertools.product((90,), (BF16,), (80, 192), (128,), ((2, 4),), (False,)),
]


def compile_variant(capability, dtype, head_dim, value_dim, n_of_m, causal, settings=None):
    """Compile one variant as ``launch.forward`` would, and return what the tests look at."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from modelopt_lite.kernels import launch
    from modelopt_lite.kernels.forward import attention_forward
    from modelopt_lite.kernels.top_n_hooks import keep_top_n_hook
    from modelopt_lite.plan import DENSE

    n, group = n_of_m or (0, 1)
    value_dim = value_dim or head_dim
    block_d, block_dv = launch.block_dim(head_dim), launch.block_dim(value_dim)
    settings = settings or launch.default_settings(capability, dtype, max(block_d, block_dv), group, causal)
    options = launch.Options(
        block_m=settings.block_m,
        block_n=settings.block_n,
        block_d=block_d,
        block_dv=block_dv,
        head_dim=head_dim,
        value_dim=value_dim,
        group=group,
        causal=causal,
        sliding=False,
        softcap=False,
        prescale=False,
        keeps_group_max=True,
        keeps_nothing=False,
        sparse_decode=DENSE.sparse_decode,
        frozen=settings.frozen,
        hopper=settings.descriptors,
    )
    kind = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]

    def descriptor(block):
        box = [group, settings.block_n // group, 1, block]
        return f"tensordesc<{kind}{box}>" if settings.descriptors else "constexpr"

    strides = ("i32", "i32")
    signature = {
        **dict.fromkeys(("query_ptr", "key_ptr", "value_ptr", "out_ptr"), f"*{kind}"),
        "lse_ptr": "*fp32",
        "sink_logits_ptr": "constexpr",
        "key_descriptor": descriptor(block_d),
        "value_descriptor": descriptor(block_dv),
        "strides": (strides,) * 4,
        "sequences": (*("*i64",) * 4, "constexpr", "constexpr"),
        "heads_of": ("i32", "i32"),
        "numbers": ("fp32", "fp32"),
        **dict.fromkeys(
            ("batch", "total", "tiles_per_head", "heads_per_wave", "num_sinks", "window", "sliding_window"), "i32"
        ),
        "hook_args": ("constexpr",) if n_of_m else (),
        "SCORE_HOOK": "constexpr",
        "OPTIONS": "constexpr",
    }
    place = {name: index for index, name in enumerate(signature)}
    assert list(place) == [parameter.name for parameter in attention_forward.params]
    constants = {(place["SCORE_HOOK"],): keep_top_n_hook if n_of_m else None, (place["OPTIONS"],): options}
    for name in ("sink_logits_ptr", "key_descriptor", "value_descriptor"):
        if signature[name] == "constexpr":
            constants[(place[name],)] = None
    constants |= {(place["sequences"], 4): None, (place["sequences"], 5): None}
    if n_of_m:
        constants[(place["hook_args"], 0)] = n
    aligned = [(place[name],) for name in ("query_ptr", "key_ptr", "value_ptr", "out_ptr", "lse_ptr")]
    aligned += [(place["strides"], *pair) for pair in itertools.product(range(4), range(2))]
    source = ASTSource(attention_forward, signature, constants, {path: [["tt.divisibility", 16]] for path in aligned})
    kernel = compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": settings.num_warps, "num_stages": settings.num_stages, "enable_fp_fusion": True},
    )
    return {"shared": kernel.metadata.shared, **resources(kernel.asm["cubin"]), **hot_loop(kernel.asm["ptx"])}


def resources(cubin):
    """Ask NVIDIA's tool for the registers and the bytes of local memory, which spills are, of a thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report).groups()
    return {"registers": int(registers), "spilled": int(stack) + int(local)}


def hot_loop(ptx):
    """Count what stands in the last loop that multiplies matrices: the hot loop comes last in the kernel."""
    lines = ptx.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"\$(L__BB\w+):", line))}
    loops = []
    for end, line in enumerate(lines):
        branch = re.search(r"bra(?:\.uni)?\s+\$(L__BB\w+);", line)
        if branch and labels[branch[1]] < end:
            body = lines[labels[branch[1]] : end]
            if any(re.search(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma|fma\.rn\.f32)", x) for x in body):
                loops.append((labels[branch[1]], end, body))
    inner = [a for a in loops if not any(b is not a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    body = inner[-1][2]
    return {
        "instructions": sum(x.startswith("\t") and x.endswith(";") for x in body),
        **{name: sum(name in x for x in body) for name in ("shfl", "ld.shared", "st.shared")},
    }


def pretend_gpu(launch, *kernels):
    """Have ``launch`` compile these of its kernels for a GPU that is not there, and not run them."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

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
            return functools.partial(self.kernel.warmup, grid=grid)

    driver.set_active(AbsentGpu())
    for kernel in kernels:
        setattr(launch, kernel.__name__, CompileOnly(kernel))
    launch.compute_capability = lambda device: 90


def count_compilations():
    """Launch with many run-time numbers for a GPU that is not there, and count what is compiled."""
    from modelopt_lite.kernels import launch
    from modelopt_lite.kernels.forward import attention_forward
    from modelopt_lite.kernels.top_n import top_n_plan
    from modelopt_lite.methods import SinkWindow

    pretend_gpu(launch, attention_forward)
    numbers = ((0, 0, 1), (1, 1, 16), (16, 16, 100))
    for lengths, (sinks, window, sliding) in itertools.product(([1], [16], [17], [1000], [5, 6], [16] * 16), numbers):
        q, k = (torch.zeros(sum(lengths), heads, 64, dtype=BF16) for heads in (4, 2))
        length = torch.tensor(lengths)
        packing = (length.cumsum(0) - length, length, max(lengths))
        launch.forward(
            q,
            k,
            k,
            *packing,
            *packing,
            is_causal=True,
            softmax_scale=1.0 / sliding,
            sliding_window=sliding,
            softcap=None,
            s_aux=None,
            plan=dataclasses.replace(top_n_plan(2, 4, sinks, window), hook_args=(float(sinks),)),
        )
    first = torch.zeros_like(length)
    for plan, placement in ((SinkWindow().plan(), {}), (top_n_plan(2, 4, 4, 64), {"first_q": first, "first_k": first})):
        options = {"sliding_window": None, "softcap": None, "s_aux": None, "plan": plan, **placement}
        launch.forward(q, k, k, *packing, *packing, is_causal=False, softmax_scale=1.0, **options)
    return sum(len(cache[0]) for cache in attention_forward.device_caches.values())


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
    capability, dtype, head_dim, _, n_of_m, _ = VARIANTS[index]
    assert found["shared"] <= SHARED_LIMIT[capability]
    allowed = SPILLS.get((capability, dtype, head_dim), 0) or SPILLS.get((capability, dtype, n_of_m), 0)
    assert found["spilled"] <= allowed
    if dtype != FP32 and (capability, head_dim) != (80, 256):
        traffic = TRAFFIC.get(capability) or TRAFFIC[capability, n_of_m is not None]
        assert all(found[name] <= most for name, most in zip(("shfl", "ld.shared", "st.shared"), traffic, strict=True))


@pytest.mark.slow
def test_run_time_numbers_do_not_recompile(compiled):
    assert compiled[-1] == 3  # one for all numbers, one with another hook, and one with positions


if __name__ == "__main__":
    for variant in VARIANTS:
        sys.stdout.write(json.dumps(compile_variant(*variant)) + "\n")
    sys.stdout.write(f"{count_compilations()}\n")
