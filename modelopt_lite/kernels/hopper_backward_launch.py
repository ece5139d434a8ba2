"""Launches the backward kernel for Hopper GPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import hopper_launch
from .device import cdiv, is_aligned, processors, rebased
from .hopper_backward import CLEARED, KEYS, ROWS, attention_backward_hopper, prepare_gradients, round_gradients
from .hopper_launch import key_descriptor, shared_descriptor, tail_of
from .portable import gradient_of_sink_logits
from .request import AttentionRequest, HookRefusedError
from .settings import Options, Settings, distances, hook_arguments, options_of

SETTINGS = Settings(ROWS.value, KEYS.value, 4, 2, True, False)
HEAD_DIM = 128
MAX_GROUP = 8
FASTER_FROM = 1024
"""Queries of a sequence, on average, from which on this kernel is faster than the portable ones."""

_UNCOMPILABLE: dict[Any, str] = {}
"""Why Gluon cannot compile a hook."""


def refusal(request: AttentionRequest) -> str | None:
    """Say why the kernel cannot compute a request's gradients, or None if it can."""
    r = request
    if (reason := hopper_launch.refusal(r)) is not None:
        return reason
    if r.blocks is not None or r.plan.chooses_blocks:
        return "there are lists of key blocks"
    if r.plan.keeps_nothing:
        return "the plan keeps sinks and recent keys alone"
    if r.q.shape[2] != HEAD_DIM:
        return f"head dimensions are {r.q.shape[2]}, not {HEAD_DIM}"
    if r.group > MAX_GROUP:
        return f"groups have {r.group} keys, more than {MAX_GROUP}"
    return _UNCOMPILABLE.get(r.plan.score_hook)


def pays(request: AttentionRequest) -> bool:
    """Whether the kernel is faster than the portable ones."""
    return request.q.shape[0] >= FASTER_FROM * max(1, request.starts_q.shape[0])


def backward(
    grad: Tensor, out: Tensor, lse: Tensor, request: AttentionRequest
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute gradients as :func:`modelopt_lite.kernels.portable.backward` does.

    Raises:
        HookRefusedError: if Gluon cannot compile the plan's hook.
    """
    r, plan = request, request.plan
    (total, query_heads, head_dim), kv_heads, batch = r.q.shape, r.k.shape[1], r.starts_q.shape[0]
    heads = (kv_heads, query_heads // kv_heads)
    if not is_aligned(grad) or grad.stride(2) != 1:
        grad = grad.contiguous()
    options = options_of(r, SETTINGS)._replace(pair=min(r.group, 2))
    tiles, query_tiles = max(1, cdiv(r.max_k, KEYS.value)), max(1, cdiv(r.max_q, ROWS.value))
    programs = min(batch * kv_heads * cdiv(tiles, 2), processors(r.q.device))
    sequences = (r.starts_q, r.lengths_q, r.starts_k, r.lengths_k)
    shift, delta, sums = (
        r.q.new_empty(query_heads, total, *dims, dtype=torch.float32) for dims in ((), (), (head_dim,))
    )
    turns = torch.empty(batch * query_heads * query_tiles, dtype=torch.int32, device=r.q.device)
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=3)
    sums_descriptor = TensorDescriptor(sums, [*sums.shape], [*sums.stride()], [1, ROWS.value, head_dim // 2], layout)
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (r.q, r.k, r.v))
    tiles_of_rows = cdiv(total, ROWS.value) * query_heads
    with torch.cuda.device_of(r.q):
        prepare_gradients[(tiles_of_rows + batch * query_heads + cdiv(grad_k.numel(), CLEARED.value),)](
            grad, out, lse, shift, delta, sums, turns, grad_k, grad_v, (grad.stride()[:2], out.stride()[:2]),
            r.starts_q, r.lengths_q, query_heads, batch, total, query_tiles, grad_k.numel(), head_dim,
        )  # fmt: skip
        try:
            attention_backward_hopper[(programs,)](
                *_descriptors(r, grad, options), sums_descriptor, shift, delta, grad_k, grad_v, turns, query_tiles,
                total, grad_k.stride()[:2], sequences, heads, (r.softmax_scale, r.softcap or 0.0), batch,
                tiles, *distances(r), hook_arguments(plan), SCORE_HOOK=plan.score_hook, OPTIONS=options,
                num_warps=SETTINGS.num_warps, enable_fp_fusion=True, launch_cooperative_grid=True,
            )  # fmt: skip
        except CompilationError as error:
            if plan.score_hook is None:
                raise
            _UNCOMPILABLE[plan.score_hook] = f"Gluon cannot compile the hook {plan.score_hook.__name__}: {error}"
            raise HookRefusedError(_UNCOMPILABLE[plan.score_hook]) from None
        round_gradients[(tiles_of_rows,)](
            sums, shift, grad_q, r.softmax_scale, total, query_heads, grad_q.stride()[:2], head_dim
        )
    return grad_q, grad_k, grad_v, gradient_of_sink_logits(r, shift, delta)


def _descriptors(request: AttentionRequest, grad: Tensor, options: Options) -> tuple[Any, ...]:
    """Return how to load tiles of queries, gradients, keys, values and their tails, and where tails begin."""
    r = request
    boxes = options._replace(block_n=ROWS.value)
    rows = (shared_descriptor(x, [*x.shape], [*x.stride()], [ROWS.value, 1, x.shape[2]]) for x in (r.q, grad))
    tail_rows, tail_start = tail_of(r.k.shape[0], r.group, ROWS.value)
    tails: list[Any] = [None, None]
    if tail_rows:
        for index, x in enumerate((r.k, r.v)):
            copy = x.new_empty(tail_rows, *x.shape[1:])
            copy[: x.shape[0] - tail_start] = x[tail_start:]
            tails[index] = rebased(key_descriptor(copy, boxes), copy)
    keys = (rebased(key_descriptor(x, boxes), x) for x in (r.k, r.v))
    return (*map(rebased, rows, (r.q, grad)), *keys, *tails, tail_start)
