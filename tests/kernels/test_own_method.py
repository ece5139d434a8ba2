"""The fused hook of ``examples/own_method.py`` against the oracle, run by Triton's interpreter."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

from modelopt_lite import list_sparse_methods, registry
from modelopt_lite.config import SparsityConfig
from modelopt_lite.kernels import launch
from modelopt_lite.kernels.launch import Settings
from modelopt_lite.kernels.problem import AttentionProblem
from modelopt_lite.kernels.reference import attention_reference

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")


@pytest.fixture(scope="module")
def own_method():
    """The example as a module, whose methods are registered as long as this file's tests run."""
    list_sparse_methods()
    path = Path(__file__).parents[2] / "examples" / "own_method.py"
    spec = importlib.util.spec_from_file_location("own_method", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_methods", dict(registry._methods))
        patch.setitem(sys.modules, spec.name, module)  # where pydantic looks up types
        spec.loader.exec_module(module)
        yield module


@pytest.mark.parametrize(("margin", "frozen"), [(0.0, False), (0.5, True)])
def test_hook_equals_rule(own_method, margin, frozen):
    method = {"method": "threshold", "margin": margin, "num_sink_tokens": 2, "dense_window_size": 5}
    plan = SparsityConfig.load({"sparse_cfg": {"*": method}}).sparse_cfg["*"].plan()
    assert plan.score_hook is own_method.threshold_hook
    check_against_oracle(plan, frozen)


def check_against_oracle(plan, frozen):
    """Compare output and gradients of one sequence, whose 61 keys are neither whole tiles nor whole groups."""
    generator = torch.Generator().manual_seed(0)
    # Multiples of 1/2, and a scale that is a power of two: scores are exact, and all have to agree at the margin, too.
    q, k = (torch.randint(-2, 3, (61, 1, 16), generator=generator) / 2 for _ in range(2))
    v, grad = (torch.randn(61, 1, 16, generator=generator) for _ in range(2))
    packing = (torch.tensor([0]), torch.tensor([61]), 61) * 2
    options = {"is_causal": True, "softmax_scale": 0.25, "sliding_window": None, "softcap": None, "plan": plan}
    tiles = Settings(16, 16, num_warps=4, num_stages=1, descriptors=False, frozen=frozen)

    output, lse = launch.forward(q, k, v, *packing, **options, s_aux=None, settings=tiles)
    *found, _ = launch.backward(grad, q, k, v, None, output, lse, *packing, **options, settings=(tiles, tiles))

    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    expected, _ = attention_reference(*inputs, None, AttentionProblem(*packing, **options))
    wanted = torch.autograd.grad(expected, inputs, grad.double())
    # FP32 rounding of exponentials, sums and products of numbers of order 1 over at most 61 keys.
    for ours, theirs in zip((output, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=3e-5, atol=3e-5)
