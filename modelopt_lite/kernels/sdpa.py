"""Dense attention of batches without padding by PyTorch's own ``scaled_dot_product_attention``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .language import tl

if tl is not None:
    from .device import compute_capability
    from .hopper_launch import HOPPER, HOPPER_TRITON

MAX_HEAD_DIM = 256
_FUSED_DTYPES = (torch.float16, torch.bfloat16)
OURS_FROM = {64: 4096, 128: 1024}
"""Queries of all heads and sequences beyond which the Hopper kernel is faster than PyTorch's forward pass, by head_dim;
see benchmarks/results/model-nvidia-h200.json."""


def suits_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> bool:
    """Whether PyTorch's attention computes a dense call in linear memory, and at least as fast as our own kernels.

    The rows of the batch are one sequence each, without padding, and the queries are its last tokens.

    Args:
        query: ``[batch, query_heads, len_q, head_dim]``.
        key: ``[batch, kv_heads, len_k, head_dim]``.
        value: ``[batch, kv_heads, len_k, value_dim]``.
        is_causal: whether a query sees only keys at its own position and before.
        sliding_window: a query sees only the keys fewer positions away; None: all.
        softcap: bound of the scores, or None.
        s_aux: learnable sink logits, or None.
    """
    (_, _, len_q, head_dim), len_k = query.shape, key.shape[2]
    if softcap is not None or s_aux is not None or value.shape[3] != head_dim or len_q == 0 or len_k == 0:
        return False
    if sliding_window is not None and sliding_window < len_k:
        return False
    if is_causal and len_q != len_k and len_q != 1:
        return False  # its causal mask is for as many queries as keys
    if not query.is_cuda:
        return query.device.type == "cpu"
    if query.dtype not in _FUSED_DTYPES or head_dim > MAX_HEAD_DIM or head_dim % 8:
        return False  # its fused kernels take nothing else
    longest = OURS_FROM.get(head_dim)
    if longest is None or len_q <= longest or tl is None or not HOPPER_TRITON:
        return True
    if compute_capability(query.device) != HOPPER:
        return True
    # Its backward pass is faster.
    return torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)


def sdpa(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float | None) -> Tensor:
    """Compute what :func:`suits_sdpa`; arguments as there, and a factor on the scores.

    Returns:
        ``[batch, query_heads, len_q, head_dim]``.
    """
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1 and not query.is_cuda:
        # With grouped heads, PyTorch would hold all scores at once on a CPU.
        key, value = (x[:, :, None].expand(-1, -1, repeat, -1, -1).flatten(1, 2) for x in (key, value))
        repeat = 1
    is_causal = is_causal and query.shape[2] > 1
    return scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=repeat > 1)
