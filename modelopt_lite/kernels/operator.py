"""Attention as a PyTorch operator: its gradients, and its shapes for ``torch.compile``, which does not look inside.

Operators take tensors and numbers only, so an :class:`AttentionProblem` passes as its fields, and its plan by key.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..plan import plan_by_key
from .blocked import backward_blocked, forward_blocked
from .language import tl
from .problem import AttentionProblem

if tl is not None:
    from . import launch


def attention_operator(
    q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, problem: AttentionProblem, use_triton: bool, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """Run a checked problem; arguments and results as of :func:`~modelopt_lite.kernels.blocked.forward_blocked`.

    Without ``return_lse``, there may be nothing in the LSE.
    """
    p = problem
    with_lse = return_lse or (
        torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, s_aux))
    )
    packing = (p.starts_q, p.lengths_q, p.max_q, p.starts_k, p.lengths_k, p.max_k)
    options = (p.is_causal, p.softmax_scale, p.sliding_window, p.softcap, p.plan.key, use_triton)
    output, lse = _forward(q, k, v, s_aux, *packing, *options, with_lse, p.first_q, p.first_k)
    return output, lse.detach()


@torch.library.custom_op("modelopt_lite::attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_aux: Tensor | None,
    starts_q: Tensor,
    lengths_q: Tensor,
    max_q: int,
    starts_k: Tensor,
    lengths_k: Tensor,
    max_k: int,
    is_causal: bool,
    softmax_scale: float,
    sliding_window: int | None,
    softcap: float | None,
    plan_key: int,
    use_triton: bool,
    with_lse: bool,
    first_q: Tensor | None = None,
    first_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    packing = (starts_q, lengths_q, max_q, starts_k, lengths_k, max_k)
    plan = plan_by_key(plan_key)
    if use_triton:
        output, lse = launch.forward(
            q,
            k,
            v,
            *packing,
            is_causal=is_causal,
            softmax_scale=softmax_scale,
            sliding_window=sliding_window,
            softcap=softcap,
            s_aux=s_aux,
            plan=plan,
            first_q=first_q,
            first_k=first_k,
            with_lse=with_lse,
        )
        return output, q.new_empty(0, dtype=torch.float32) if lse is None else lse
    problem = AttentionProblem(*packing, is_causal, softmax_scale, sliding_window, softcap, plan, first_q, first_k)
    problem.check_values(q.shape[0], k.shape[0])
    with torch.autocast(q.device.type, enabled=False):
        return forward_blocked(q, k, v, s_aux, problem)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    use_triton, with_lse = others[12:14]
    shape = q.shape[:2] if with_lse or not use_triton else (0,)
    accumulated = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2]), q.new_empty(shape, dtype=accumulated)


@torch.library.custom_op("modelopt_lite::attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    output: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_aux: Tensor | None,
    starts_q: Tensor,
    lengths_q: Tensor,
    max_q: int,
    starts_k: Tensor,
    lengths_k: Tensor,
    max_k: int,
    is_causal: bool,
    softmax_scale: float,
    sliding_window: int | None,
    softcap: float | None,
    plan_key: int,
    use_triton: bool,
    first_q: Tensor | None = None,
    first_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    packing = (starts_q, lengths_q, max_q, starts_k, lengths_k, max_k)
    plan = plan_by_key(plan_key)
    problem = AttentionProblem(*packing, is_causal, softmax_scale, sliding_window, softcap, plan, first_q, first_k)
    if use_triton:
        grad_q, grad_k, grad_v, grad_s_aux = launch.backward(
            grad,
            q,
            k,
            v,
            s_aux,
            output,
            lse,
            *packing,
            is_causal=is_causal,
            softmax_scale=softmax_scale,
            sliding_window=sliding_window,
            softcap=softcap,
            plan=plan,
            first_q=first_q,
            first_k=first_k,
        )
    else:
        with torch.autocast(q.device.type, enabled=False):
            grad_q, grad_k, grad_v, grad_s_aux = backward_blocked(grad, q, k, v, s_aux, output, lse, problem)
    # An operator returns tensors, so no gradient is an empty one.
    return grad_q, grad_k, grad_v, q.new_empty(0) if grad_s_aux is None else grad_s_aux


@_backward.register_fake
def _(
    grad: Tensor, output: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_s_aux = q.new_empty(0) if s_aux is None else s_aux.new_empty(s_aux.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_s_aux


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, s_aux, starts_q, lengths_q, max_q, starts_k, lengths_k, max_k, *options, _, first_q, first_k = inputs
    ctx.save_for_backward(*output, q, k, v, s_aux, starts_q, lengths_q, starts_k, lengths_k, first_q, first_k)
    ctx.numbers = max_q, max_k, options
    ctx.plan = plan_by_key(options[-2])  # kept alive until then


def _backward_of_forward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    output, lse, q, k, v, s_aux, starts_q, lengths_q, starts_k, lengths_k, first_q, first_k = ctx.saved_tensors
    if lse.shape != output.shape[:2]:
        raise ValueError("with_lse: False is not allowed where gradients are wanted")
    max_q, max_k, options = ctx.numbers
    packing = (starts_q, lengths_q, max_q, starts_k, lengths_k, max_k)
    *grads, grad_s_aux = _backward(grad, output, lse, q, k, v, s_aux, *packing, *options, first_q, first_k)
    return (*grads, None if s_aux is None else grad_s_aux, *(None for _ in range(9 + len(options))))


_forward.register_autograd(_backward_of_forward, setup_context=_save_for_backward)
