"""Dense attention of batches without padding by PyTorch's own ``scaled_dot_product_attention``."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .language import tl

if tl is not None:
    from .device import compute_capability
    from .hopper.forward_launch import HOPPER, HOPPER_TRITON

MAX_HEAD_DIM = 256
_FUSED_DTYPES = (torch.float16, torch.bfloat16)
OURS_FROM = {64: 1.2e9, 128: 1.3e8}
"""Pairs of queries and keys, over all heads and sequences, from which on the Hopper kernel pays, by head_dim. By itself
it is faster from about 1e8 on. But a launch of it keeps Python busy for longer than PyTorch's, and that is what layers
of a small model wait for: those of SmolLM2-135M up to 8192 tokens, those of Llama-3.1-8B below 2048; see
benchmarks/results/model-nvidia-h200.json."""


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor | None:
    """Compute a dense call if PyTorch's attention can in linear memory, and at least as fast as our own kernels.

    The rows of the batch are one sequence each, without padding, and the queries are its last tokens.

    Args:
        query: ``[batch, query_heads, len_q, head_dim]``.
        key: ``[batch, kv_heads, len_k, head_dim]``.
        value: ``[batch, kv_heads, len_k, value_dim]``.
        is_causal: whether a query sees only keys at its own position and before.
        scale: factor on the scores, by default ``head_dim ** -0.5``.
        sliding_window: a query sees only the keys fewer positions away; None: all.
        softcap: bound of the scores, or None.
        s_aux: learnable sink logits, or None.

    Returns:
        ``[batch, query_heads, len_q, head_dim]``, or None if PyTorch's attention does not suit.
    """
    if softcap is not None or s_aux is not None:
        return None
    call = sdpa_call(query, key, value, is_causal=is_causal, sliding_window=sliding_window)
    return None if call is None else call(query, key, value, scale=scale)


def sdpa_call(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, sliding_window: int | None = None
) -> Callable[..., Tensor] | None:
    """Return what :func:`sdpa` calls with such queries, keys, values and ``scale``, None if it would not.

    That depends on their shapes, type, device and whether gradients are recorded, not on their strides or contents.
    """
    (_, heads, len_q, head_dim), (_, kv_heads, len_k, _) = query.shape, key.shape
    # On a CPU, it does not look whether there are as many values as keys.
    if value.shape != key.shape or value.shape[3] != head_dim or len_q == 0 or len_k == 0:
        return None
    if sliding_window is not None and sliding_window < len_k:
        return None
    is_causal = is_causal and len_q > 1
    if is_causal and len_q != len_k:
        return None  # its causal mask is for as many queries as keys
    if query.is_cuda:
        if query.dtype not in _FUSED_DTYPES or head_dim > MAX_HEAD_DIM or head_dim % 8:
            return None  # its fused kernels take nothing else
        if (
            head_dim in OURS_FROM
            and query.shape[0] * heads * len_q * len_k >= OURS_FROM[head_dim]
            and _has_hopper_kernel(query.device)
            # Training has not been measured with our backward pass in this place.
            and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
        ):
            return None
    elif query.device.type != "cpu":
        return None
    elif heads > kv_heads:
        return functools.partial(_with_repeated_heads, is_causal=is_causal)
    return functools.partial(scaled_dot_product_attention, is_causal=is_causal, enable_gqa=heads > kv_heads)


def _with_repeated_heads(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float | None) -> Tensor:
    """Compute grouped heads on a CPU, where PyTorch would hold all scores at once."""
    repeats = (-1, -1, query.shape[1] // key.shape[1], -1, -1)
    key, value = (x[:, :, None].expand(repeats).flatten(1, 2) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_hopper_kernel(device: torch.device) -> bool:
    """Whether the Hopper kernel runs on a GPU."""
    return tl is not None and HOPPER_TRITON and compute_capability(device) == HOPPER
