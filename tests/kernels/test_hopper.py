"""The Hopper kernel without a GPU: when it is chosen, what its launch makes sure of, and its machine code.

Like the portable kernel's test, this file runs itself as a program to compile.
"""

import functools
import json
import sys

import pytest
import torch
from machine_code import classify, inspect
from test_forward_compile import pretend_gpu

from modelopt_lite.kernels.top_n import top_n_plan
from modelopt_lite.plan import DENSE

BF16, FP16 = torch.bfloat16, torch.float16
SHARED_LIMIT = 227 * 1024
REGISTERS = {2: 168, 3: 128}  # of a thread at the launch, by warpgroups that compute; then they give and take
VARIANTS = [
    # dtype, head_dim, (n, m) or None, causal
    (BF16, 128, None, True),
    (BF16, 128, (2, 4), True),
    (BF16, 128, (4, 8), True),
    (BF16, 64, (2, 4), False),
    (FP16, 128, (2, 4), True),
    (FP16, 128, (4, 8), True),
    (BF16, 128, (8, 16), False),
]
# Shuffles, accesses to shared memory and spills in the hot loop. The one store pins the order and never happens; with
# FP16 there are the rows' maxima, two shuffles for each of two rows; with a quick hook warps tell each other whether
# any has to compute again. Groups of 16 hold more at a time than there are registers.
TRAFFIC = {
    (FP16, (2, 4)): (4, 1, 0),
    (FP16, (4, 8)): (4, 5, 0),
    (BF16, (4, 8)): (0, 5, 4),
    (BF16, (8, 16)): (0, 5, 34),
}


def compile_all():
    """Launch all variants for a GPU that is not there.

    Returns:
        The kernels, and how many more are compiled for other lengths and windows.
    """
    from modelopt_lite.kernels import launch
    from modelopt_lite.kernels.hopper import attention_forward_hopper, prepare

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
    launch._with_room = lambda x, group: x
    for variant in VARIANTS:
        run([300], *variant)
    found = [kernel for kernel in found if kernel.metadata.name == "attention_forward_hopper"]
    for lengths, window in zip(([1], [16], [17], [1000], [5, 6], [16] * 16), (0, 1, 16, 64, 100, 2**40), strict=True):
        run(lengths, *VARIANTS[1], window=window)
    caches = (*attention_forward_hopper.device_caches.values(), *prepare.device_caches.values())
    return found, sum(len(cache[0]) for cache in caches) - 2 * len(VARIANTS)


@pytest.fixture
def absent_gpu(monkeypatch):
    from modelopt_lite.kernels import launch

    monkeypatch.delenv("MODELOPT_LITE_KERNEL", raising=False)
    monkeypatch.setattr(launch, "compute_capability", lambda device: 90)
    return launch


@pytest.mark.parametrize(
    ("tokens", "dims", "dtype", "plan", "expected"),
    [
        (65, (128, 128), BF16, DENSE, "hopper"),
        (65, (128, 128), BF16, top_n_plan(2, 4, 0, 64), "hopper"),
        (4096, (128, 128), FP16, top_n_plan(4, 8, 0, 64), "hopper"),
        (8192, (64, 64), BF16, DENSE, "hopper"),
        (64, (128, 128), BF16, DENSE, "short"),
        (2048, (128, 128), BF16, top_n_plan(4, 8, 0, 64), "short"),
        (4096, (64, 64), BF16, DENSE, "short"),
        (4096, (128, 128), torch.float32, DENSE, "portable"),
        (4096, (96, 96), BF16, DENSE, "portable"),
        (4096, (128, 64), BF16, DENSE, "portable"),
    ],
)
def test_choice(absent_gpu, monkeypatch, tokens, dims, dtype, plan, expected):
    q, v = (torch.zeros(tokens, 2, dim, dtype=dtype) for dim in dims)
    choose = functools.partial(absent_gpu.kernel_for, q, q, v, tokens, plan)
    assert choose() == ("hopper" if expected == "hopper" else "portable")
    monkeypatch.setenv("MODELOPT_LITE_KERNEL", "portable")
    assert choose() == "portable"
    monkeypatch.setenv("MODELOPT_LITE_KERNEL", "hopper")
    assert choose() == ("portable" if expected == "portable" else "hopper")
    monkeypatch.setenv("MODELOPT_LITE_KERNEL", "fast")
    with pytest.raises(ValueError, match="MODELOPT_LITE_KERNEL: 'fast' is not allowed; hopper, portable or nothing"):
        choose()
    monkeypatch.delenv("MODELOPT_LITE_KERNEL")
    for name, value in (("compute_capability", lambda device: 100), ("HOPPER_TRITON", False)):
        with monkeypatch.context() as patch:
            patch.setattr(absent_gpu, name, value)
            assert choose() == "portable"


@pytest.mark.parametrize("group", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(
    "view", [lambda x: x, lambda x: x[:, 1:3, :8], lambda x: x[3:-2]], ids=["all", "heads", "rows"]
)
def test_rows_past_the_end_are_memory(absent_gpu, monkeypatch, group, view):
    """Keys are copied exactly if boxes reach past the memory they lie in."""
    whole = torch.randn(20, 4, 16)
    x = view(whole)
    last = (x.shape[0] + 2 * group - 3) * 64 + (x.shape[1] - 1) * 16 + x.shape[2]
    needed = x.data_ptr() + 4 * last - whole.data_ptr()

    class Driver:
        def cuMemGetAddressRange_v2(self, begin, size, pointer):
            begin._obj.value, size._obj.value = whole.data_ptr(), self.size
            return self.failed

    driver = Driver()
    monkeypatch.setattr(absent_gpu, "_driver", lambda: driver)
    for driver.size, driver.failed in ((needed, 0), (needed - 1, 0), (needed, 1)):
        found = absent_gpu._with_room(x, group)
        assert torch.equal(found, x)
        assert (found is x) == (group == 1 or (driver.size == needed and not driver.failed))
        assert found is x or found.untyped_storage().nbytes() >= 4 * (x.shape[0] + 2 * group - 2) * x[0].numel()


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(VARIANTS)), ids=lambda i: "-".join(map(str, VARIANTS[i])))
def test_kernel_fits_the_gpu(compiled, index):
    from modelopt_lite.kernels.launch import hopper_settings

    dtype, head_dim, n_of_m, _ = VARIANTS[index]
    settings = hopper_settings(dtype, head_dim, n_of_m[1] if n_of_m else 1)
    found = compiled[index]
    loop = classify(found["hot loop"])
    assert found["shared"] <= SHARED_LIMIT
    assert found["registers"] == REGISTERS[settings.block_m // 64]
    # instructions that take 16 keys of the values, or 16 dimensions
    assert loop["matrix"] == settings.block_n // 16 + head_dim // 16
    traffic = (loop["shuffles"], loop["shared memory"], loop["spills"])
    assert all(x <= limit for x, limit in zip(traffic, TRAFFIC.get((dtype, n_of_m), (0, 1, 0)), strict=True)), traffic


@pytest.mark.slow
def test_run_time_numbers_do_not_recompile(compiled):
    assert compiled[-1] == 0


if __name__ == "__main__":
    kernels, more = compile_all()
    for kernel in kernels:
        sys.stdout.write(json.dumps(inspect(kernel)) + "\n")
    sys.stdout.write(f"{more}\n")
