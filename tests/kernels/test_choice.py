"""Which kernel runs what: order, reasons, what is remembered, and Triton's interpreter asked for by its variable."""

import logging
import os
import re
import subprocess
import sys

import pytest
import torch
import triton
from cases import OnGpu, arguments, one_sequence

from modelopt_lite import UnsupportedError
from modelopt_lite.kernels import AttentionRequest, attention, choice, compute, settings
from modelopt_lite.kernels.choice import BLOCKED, GPU_KERNELS, choose, refusal
from modelopt_lite.kernels.hopper import forward_launch as hopper_launch
from modelopt_lite.kernels.portable import launch as portable_launch
from modelopt_lite.kernels.top_n import top_n_plan
from modelopt_lite.plan import DENSE, AttentionPlan

HALF = torch.bfloat16


def on_gpu(tokens=100, heads=2, dims=(128, 128), dtype=HALF, plan=top_n_plan(2, 4, 0, 64), **options):  # noqa: B008
    q, v = (torch.zeros(tokens, heads, dim, dtype=dtype).as_subclass(OnGpu) for dim in dims)
    return one_sequence(q, q, v, plan, **options)


def on_cpu(**options):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(30, 2, 16, generator=generator) for _ in range(3))
    return one_sequence(q, k, v, top_n_plan(2, 4, 0, 3), **options)


def rule_alone(scores, q_pos, k_pos):
    return (k_pos % 2 == 0).expand(scores.shape)


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    """As in a process that has computed nothing."""
    monkeypatch.setattr(choice, "_prepared", {})
    choice._warn_once.cache_clear()
    monkeypatch.delenv("MODELOPT_LITE_KERNEL", raising=False)


def test_the_most_special_is_asked_first():
    assert [kernel.name for kernel in GPU_KERNELS] == ["decode", "sparse_cores", "hopper", "portable"]


def test_backends(absent_gpu):
    request = on_gpu()
    assert choose(request).name == choose(request, "triton").name == "portable"
    assert choose(request, "torch") is BLOCKED
    assert choose(on_cpu()) is choose(on_cpu(), "torch") is BLOCKED
    assert choose(on_cpu(), "auto", "portable") is BLOCKED
    assert choose(request, pinned="hopper").name == "hopper"
    assert choose(request, pinned="hopper", without=["hopper"]).name == "portable"


REFUSED = {
    "old": (75, {}, "the GPU's compute capability is 7.5, not 8.0 or later"),
    "no hook": (90, {"plan": AttentionPlan(keep=rule_alone)}, "the method has no score_hook, only a rule in PyTorch"),
    "type": (90, {"dtype": torch.float64}, "q is torch.float64, not one of torch.float16, torch.bfloat16"),
    "head_dim": (90, {"dims": (264, 64)}, "q has a head_dim of 264, above 256"),
    "value_dim": (90, {"dims": (64, 264)}, "v has a head_dim of 264, above 256"),
}


@pytest.mark.parametrize(("capability", "options", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_no_gpu_kernel_can_run(absent_gpu, caplog, capability, options, reason):
    """Asked for triton it is refused; else PyTorch operations do it, and a warning says once that and why."""
    absent_gpu(capability)
    request = on_gpu(**options)
    assert refusal(request).startswith(reason)
    for _ in range(2):
        assert choose(request) is choose(request._replace(softmax_scale=0.5)) is BLOCKED
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"attention on the GPU runs with PyTorch operations, which are slow: {reason}" in record.getMessage()
    caplog.clear()
    with pytest.raises(UnsupportedError, match=f"backend: 'triton' cannot run this: {reason}"):
        choice.check_backend(request, "triton")
    assert choose(request, "torch") is BLOCKED
    assert not caplog.text


def test_gradients_that_no_gpu_kernel_computes(absent_gpu, caplog):
    """The decode kernel takes larger heads than the kernels of the backward."""
    absent_gpu(90)
    request = on_gpu(tokens=10, dims=(576, 512), plan=DENSE)._replace(max_k=1000)
    reason = "q has a head_dim of 576, above 256"
    assert choose(request).name == "decode"
    assert not any(choice.differentiates_on_gpu(request, "auto") for _ in range(2))
    (record,) = caplog.records
    assert record.getMessage().endswith(f"computed with PyTorch operations, which are slow: {reason}")
    with pytest.raises(UnsupportedError, match=f"backend: 'triton' cannot compute gradients of this: {reason}"):
        choice.differentiates_on_gpu(request, "triton")
    assert not choice.differentiates_on_gpu(request, "torch")


HOPPER_REFUSES = {
    "GPU": (100, {}, "it is made for GPUs of compute capability 9.0"),
    "type": (90, {"dtype": torch.float32}, "the tensors are torch.float32, not torch.float16 or torch.bfloat16"),
    "two dims": (90, {"dims": (128, 64)}, "head dimensions are 128 and 64, not both 64 or both 128"),
    "dims": (90, {"dims": (96, 96)}, "head dimensions are 96 and 96, not both 64 or both 128"),
    "first": (90, {"first_k": torch.tensor([0])}, "first positions are given, or there is a sliding window without"),
    "window": (
        90,
        {"sliding_window": 5, "is_causal": False},
        "first positions are given, or there is a sliding window",
    ),
}


@pytest.mark.parametrize(("capability", "options", "reason"), HOPPER_REFUSES.values(), ids=HOPPER_REFUSES.keys())
def test_what_the_hopper_kernel_cannot_run(absent_gpu, capability, options, reason):
    absent_gpu(capability)
    request = on_gpu(**options)
    assert hopper_launch.refusal(request).startswith(reason)
    assert portable_launch.refusal(request) is None


def test_the_hopper_kernel_needs_alignment(absent_gpu):
    request = on_gpu()
    k = torch.zeros(100, 2, 129, dtype=HALF).as_subclass(OnGpu)[..., :128]
    assert hopper_launch.refusal(request) is None
    assert "not multiples of 16 bytes" in hopper_launch.refusal(request._replace(k=k))


def test_a_hook_that_cannot_be_compiled_is_not_tried_again(absent_gpu, monkeypatch, caplog):
    """Another kernel runs, also if that one is pinned, and a warning says so."""
    tried = []

    def cannot_compile(request):
        tried.append("hopper")
        raise choice.HookRefusedError("Gluon cannot compile the hook")

    kernels = [
        choice.Kernel("hopper", lambda _: None, lambda _: True, lambda _: cannot_compile),
        choice.Kernel("portable", lambda _: None, lambda _: True, lambda _: lambda request: (request.q, None)),
    ]
    monkeypatch.setattr(choice, "GPU_KERNELS", tuple(kernels))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    request = on_gpu()
    for pinned in ("", "hopper"):
        monkeypatch.setenv("MODELOPT_LITE_KERNEL", pinned)
        for _ in range(3):
            assert choice.run(request)[0] is request.q  # as that kernel does
        assert tried == ["hopper"]
        assert caplog.text.count("the kernel hopper is left out: Gluon cannot compile the hook") == 1
        tried.clear()
        caplog.clear()


def test_a_call_like_one_before_is_not_chosen_again(monkeypatch):
    prepared = []
    count = choice._prepare
    monkeypatch.setattr(choice, "_prepare", lambda *arguments: prepared.append(1) or count(*arguments))
    request = on_cpu()
    first, _ = choice.run(request)
    for changes, new in (
        ({}, 0),
        ({"q": request.q.clone() + 1}, 0),
        ({"softmax_scale": 0.5}, 1),
        ({"plan": top_n_plan(1, 4, 0, 3)}, 1),
        ({"is_causal": False}, 1),
        ({"k": request.k.transpose(0, 1).contiguous().transpose(0, 1)}, 1),
        ({"lengths_k": request.lengths_k.int()}, 1),
        ({"first_q": torch.tensor([0])}, 1),
    ):
        prepared.clear()
        choice.run(request._replace(**changes))
        assert len(prepared) == new, changes
    assert torch.equal(choice.run(request)[0], first)


def test_values_are_checked_at_every_call():
    request = on_cpu()
    choice.run(request)
    with pytest.raises(ValueError, match=r"b_start_loc\[0\]: rows 1 to 31 are not allowed; there are 30"):
        choice.run(request._replace(starts_q=torch.tensor([1])))


def test_what_lies_apart_is_read_right(monkeypatch):
    """Elements of a head, and integers, that do not lie side by side; the first time and from what was prepared."""
    request = on_cpu(s_aux=torch.randn(2))
    expected, _ = choice.run(request)
    apart = [x.mT.contiguous().mT for x in request[:3]]
    wide = {name: torch.stack([getattr(request, name)] * 2, -1)[..., 0] for name in ("s_aux", "starts_q", "lengths_k")}
    moved = AttentionRequest(*apart, *request[3:])._replace(**wide)
    assert moved.q.stride(2) != 1
    for backend in ("torch", *(["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else [])):
        for _ in range(2):
            found, _ = choice.run(moved, backend)
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_pages_take_no_gradient():
    """Also where a request like it that wants none has run."""
    q, k = torch.zeros(1, 2, 8), torch.zeros(16, 2, 8)
    request = one_sequence(q, k, k, with_lse=True)
    request = request._replace(page_table=torch.zeros(1, 1, dtype=torch.int32), page_size=16)
    compute(request)
    with pytest.raises(ValueError, match="page_table: not allowed where gradients are wanted"):
        compute(request._replace(q=q.requires_grad_()))


INTERPRETED = """
import torch
import modelopt_lite as mtsa
from modelopt_lite.kernels import attention
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
q, k, v = (torch.randn(30, heads, 16, requires_grad=True) for heads in (4, 2, 2))
packing = (torch.tensor([0, 13]), torch.tensor([13, 17]), 17)
found = []
for backend in ("triton", "torch"):
    out = attention(q, k, v, *packing, sparsity_n=2, dense_window_size=3, backend=backend)
    found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
for ours, theirs in zip(*found, strict=True):
    torch.testing.assert_close(ours, theirs, rtol=3e-5, atol=3e-5)

config = LlamaConfig(
    vocab_size=32, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=16
)
model, ids, found = LlamaForCausalLM(config), torch.randint(32, (2, 21)), []
mask = torch.ones_like(ids)
mask[0, :6] = 0
for backend in ("triton", "torch"):
    rule = {"method": "sparse_softmax", "dense_window_size": 2, "sparsity_n": 1, "backend": backend}
    mtsa.sparsify(model, {"sparse_cfg": {"*": rule}})
    model.zero_grad()
    logits = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    logits.square().sum().backward()
    found.append((logits, model.model.embed_tokens.weight.grad.clone()))
for ours, theirs in zip(*found, strict=True):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
print("equal")
"""


def run_with(interpret, program):
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.skipif(
    not settings.INTERPRETER_WORKS, reason="the interpreter of Triton before 3.7 does not work with NumPy 2.4 or later"
)
def test_the_interpreter_runs_kernels_and_models_on_a_cpu():
    done = run_with("1", INTERPRETED)
    assert done.stdout == "equal\n", done.stderr[-4000:]


def test_an_interpreter_that_does_not_work_with_numpy_is_refused(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    monkeypatch.setattr(settings, "INTERPRETER_WORKS", False)
    reason = (
        r"the interpreter of Triton \S+ does not work with NumPy \S+; install Triton 3\.7 or later, or NumPy before 2.4"
    )
    assert re.fullmatch(reason, refusal(on_cpu()))


def test_without_the_interpreter_triton_needs_a_gpu():
    program = """
import torch
from modelopt_lite.kernels import attention
q = torch.randn(8, 1, 16)
attention(q, q, q, torch.tensor([0]), torch.tensor([8]), 8, backend="triton")
"""
    done = run_with("0", program)
    message = (
        "backend: 'triton' cannot run this: the tensors are on cpu, not on a CUDA GPU, and TRITON_INTERPRET=1 is not"
    )
    assert message in done.stderr


def test_bad_values_are_refused_by_the_interpreter_too():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter")
    with pytest.raises(ValueError, match=r"b_start_loc\[0\]: rows 1 to 31 are not allowed; there are 30"):
        attention(**arguments(on_cpu(starts_q=torch.tensor([1]))), backend="triton")
