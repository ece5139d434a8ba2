"""``torch.func`` through the attention function: reverse mode and vmap work, forward mode is refused."""

import pytest
import torch
from cases import arguments, gradients, one_sequence, oracle
from torch.func import grad, jvp, vmap

from modelopt_lite import UnsupportedError
from modelopt_lite.kernels import attention
from modelopt_lite.kernels.top_n import top_n_plan
from modelopt_lite.plan import DENSE

PLANS = pytest.mark.parametrize("plan", [DENSE, top_n_plan(1, 4, 1, 3)], ids=["dense", "1:4"])
LENGTH = 21


def batch_of(*sizes, seed=0):
    """Make queries, keys and values, and the gradient of the output, in FP64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((*sizes, LENGTH, heads, dim) for heads, dim in ((4, 8), (2, 8), (2, 6), (4, 6)))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def loss(q, k, v, direction, plan):
    return (attention(**arguments(one_sequence(q, k, v, plan))) * direction).sum()


def wanted(q, k, v, direction, plan):
    return gradients(oracle, direction, one_sequence(q, k, v, plan))[:3]


@PLANS
def test_grad(plan):
    tensors = batch_of()
    found = grad(loss, (0, 1, 2))(*tensors, plan)
    for ours, theirs in zip(found, wanted(*tensors, plan), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@PLANS
def test_grad_with_respect_to_s_aux(plan):
    q, k, v, direction = batch_of()
    request = one_sequence(q, k, v, plan, s_aux=torch.randn(4, dtype=torch.float64))

    def of_s_aux(s_aux):
        return (attention(**arguments(request._replace(s_aux=s_aux))) * direction).sum()

    expected = gradients(oracle, direction, request)[3]
    torch.testing.assert_close(grad(of_s_aux)(request.s_aux), expected, rtol=1e-12, atol=1e-12)


@PLANS
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_vmap(plan, needs_gradient):
    """Over tensors that are batched in different dimensions, and keys that are not."""
    q, k, v, _ = batch_of(3)
    if needs_gradient:
        q.requires_grad_()

    def attend(q, k, v):
        return attention(**arguments(one_sequence(q, k, v, plan)), return_lse=True)

    found = vmap(attend, (2, None, 0))(q.movedim(0, 2), k[0], v)
    for i in range(3):
        expected = attend(q[i], k[0], v[i])
        assert all(torch.equal(x[i], y) for x, y in zip(found, expected, strict=True))


@PLANS
def test_vmap_of_grad(plan):
    """Gradients of each sample."""
    tensors = batch_of(3)
    found = vmap(lambda *each: grad(loss, (0, 1, 2))(*each, plan))(*tensors)
    for i in range(3):
        for ours, theirs in zip(found, wanted(*(x[i] for x in tensors), plan), strict=True):
            torch.testing.assert_close(ours[i], theirs, rtol=1e-12, atol=1e-12)


@PLANS
def test_vmap_that_is_compiled(plan):
    q, k, v, _ = batch_of(3)

    def attend(q, k, v):
        return attention(**arguments(one_sequence(q, k, v, plan)))

    torch.compiler.reset()
    compiled = torch.compile(lambda *each: vmap(attend)(*each), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), torch.stack([attend(*each) for each in zip(q, k, v, strict=True)]))


@PLANS
def test_batched_gradients(plan):
    """Several gradients of one output at once, which do not come from ``torch.func``."""
    q, k, v, _ = (x.requires_grad_() for x in batch_of())
    directions = batch_of(3)[3]
    output = attention(**arguments(one_sequence(q, k, v, plan)))
    found = torch.autograd.grad(output, (q, k, v), directions, is_grads_batched=True)
    for i, direction in enumerate(directions):
        for ours, theirs in zip(found, wanted(q.detach(), k.detach(), v.detach(), direction, plan), strict=True):
            torch.testing.assert_close(ours[i], theirs, rtol=1e-12, atol=1e-12)


class WithoutGradient(torch.autograd.Function):
    """Passes a tensor on, and no gradient back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_no_gradient_comes_back():
    q, k, v, _ = (x.requires_grad_() for x in batch_of())
    output = attention(**arguments(one_sequence(q, k, v, DENSE)))
    (WithoutGradient.apply(output).sum() + q.sum()).backward()
    assert torch.equal(q.grad, torch.ones_like(q))
    assert k.grad is None


@PLANS
def test_second_derivatives_are_refused(plan):
    q, k, v, direction = batch_of()
    message = "second derivatives of attention .* are not supported"
    with pytest.raises(UnsupportedError, match=message):
        grad(lambda q: grad(loss)(q, k, v, direction, plan).square().sum())(q)
    first = torch.autograd.grad(loss(q.requires_grad_(), k, v, direction, plan), q, create_graph=True)[0]
    torch.testing.assert_close(first.detach(), wanted(q.detach(), k, v, direction, plan)[0], rtol=1e-12, atol=1e-12)
    with pytest.raises(UnsupportedError, match=message):
        torch.autograd.grad(first.square().sum(), q)


@PLANS
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # which PyTorch itself uses
def test_forward_mode_is_refused(plan):
    """PyTorch would take a missing derivative for 0."""
    q, k, v, _ = batch_of()

    def attend(q):
        return attention(**arguments(one_sequence(q, k, v, plan)))

    with pytest.raises(UnsupportedError, match="forward-mode derivatives .* are not supported; use reverse mode"):
        jvp(attend, (q,), (torch.ones_like(q),))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(UnsupportedError, match="forward-mode derivatives"),
    ):
        attend(torch.autograd.forward_ad.make_dual(q, torch.ones_like(q)))


@PLANS
def test_a_graph_of_any_scale(plan):
    """From the second scale on, as of another model, the compiler makes a variable of the number."""
    q, k, v, _ = batch_of()
    request = one_sequence(q, k, v, plan)

    def attend(scale):
        return attention(**arguments(request._replace(softmax_scale=scale)))

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    for scale in (0.5, 0.25, 2.0):
        torch.testing.assert_close(compiled(scale), attend(scale), rtol=0, atol=0)
