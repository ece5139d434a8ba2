"""The fused hook of ``examples/own_method.py`` against the oracle, run by Triton's interpreter."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from cases import doubled, gradients, one_sequence, oracle

from modelopt_lite import list_sparse_methods, registry
from modelopt_lite.config import SparsityConfig
from modelopt_lite.kernels import portable
from modelopt_lite.kernels.settings import Settings

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
    request = one_sequence(q, k, v, plan)
    tiles = Settings(16, 16, num_warps=4, num_stages=1, descriptors=False, frozen=frozen)

    output, lse = portable.prepare(request, tiles)(request)
    *found, _ = portable.backward(grad, output, lse, request, (tiles, tiles))

    expected = oracle(request)
    *wanted, _ = gradients(oracle, grad, doubled(request))
    # FP32 rounding of exponentials, sums and products of numbers of order 1 over at most 61 keys.
    for ours, theirs in zip((output, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=3e-5, atol=3e-5)
