"""The backward kernels on a GPU, with the settings they are launched with."""

import dataclasses

import pytest
import torch
from test_backward_interpreter import oracle, output_gradient, run
from test_forward_interpreter import HOOKS, n_of_m, sequences

from modelopt_lite.plan import DENSE

pytestmark = pytest.mark.gpu

# Relative to the largest element: FP16 and BF16 round weights and the gradients of scores to 2^-11 and 2^-8.
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 2e-5}
# (queries, keys) of each sequence.
RAGGED = [(1, 1), (300, 1000), (0, 5), (257, 257), (1, 700), (520, 520)]
PLANS = [DENSE, n_of_m(2, 4, 4, 64), n_of_m(4, 8, 0, 64)]


@pytest.fixture(autouse=True)
def poison():
    """Fill what is allocated and not yet written with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def check(tensors, problem, s_aux=None):
    """Compare with the oracle; every run gives the same bits."""
    q, k, v = tensors
    # Scores of small integers are exact in FP32, so that every key is kept or dropped as in FP64, ties included.
    q, k = ((x * 2).round().clamp(-4, 4) for x in (q, k))
    grad = output_gradient(q, v).cuda()
    tensors = [x.cuda() for x in (q, k, v)]
    fields = {name: x.cuda() for name, x in vars(problem).items() if isinstance(x, torch.Tensor)}
    problem = dataclasses.replace(problem, **fields)
    s_aux = None if s_aux is None else s_aux.cuda()
    found = run(grad, *tensors, s_aux, problem, None, None)
    again = run(grad, *tensors, s_aux, problem, None, None)
    for ours, other, theirs in zip(found, again, oracle(grad, *tensors, s_aux, problem), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert torch.equal(ours, other)
            bound = TOLERANCE[grad.dtype] * theirs.abs().max().item()
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("plan", PLANS, ids=["dense", "2:4", "4:8"])
@pytest.mark.parametrize("causal", [True, False])
def test_ragged(plan, dtype, causal):
    tensors, problem = sequences(RAGGED, (4, 2), (128, 128), dtype, plan=plan, is_causal=causal)
    check(tensors, problem)


@pytest.mark.parametrize(
    "dims", [(16, 16), (64, 64), (80, 80), (96, 96), (112, 112), (160, 160), (192, 128), (256, 256)]
)
@pytest.mark.parametrize("plan", PLANS[:2], ids=["dense", "2:4"])
@pytest.mark.parametrize("causal", [True, False])
def test_head_dims(plan, dims, causal):
    tensors, problem = sequences(RAGGED, (4, 2), dims, torch.bfloat16, plan=plan, is_causal=causal)
    check(tensors, problem)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 4), (3, 4), (1, 8), (5, 8), (1, 16), (8, 16), (15, 16)])
def test_n_of_m(n, m):
    tensors, problem = sequences([(500, 500), (129, 300)], (4, 1), (64, 64), torch.bfloat16, plan=n_of_m(n, m, 3, 40))
    check(tensors, problem)


@pytest.mark.parametrize("options", [{"sliding_window": 100}, {"softcap": 5.0}, {"sliding_window": 3, "softcap": 2.0}])
@pytest.mark.parametrize("plan", PLANS[:2], ids=["dense", "2:4"])
def test_model_options(plan, options):
    tensors, problem = sequences(RAGGED, (4, 2), (64, 64), torch.bfloat16, plan=plan, **options)
    check(tensors, problem, s_aux=torch.tensor([-2.0, 0.0, 3.0, 5.0]))


@pytest.mark.parametrize("plan", HOOKS)
def test_other_hooks(plan):
    tensors, problem = sequences(RAGGED, (4, 2), (64, 64), torch.bfloat16, plan=plan)
    check(tensors, problem)
