"""Dense attention of batches without padding by PyTorch's own ``scaled_dot_product_attention``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .language import tl

if tl is not None:
    from .device import compute_capability
    from .hopper_launch import HOPPER, HOPPER_TRITON

MAX_HEAD_DIM = 256
OURS_FROM = {64: 4096, 128: 1024}
"""Queries of all heads and sequences beyond which the Hopper kernel is faster than PyTorch's forward pass, by head_dim;
see benchmarks/results/model-nvidia-h200.json."""


class DenseCall(NamedTuple):
    """Dense attention of a batch whose rows are one sequence each, without padding.

    Attributes:
        query: ``[batch, query_heads, len_q, head_dim]``; the last tokens of their sequences.
        key: ``[batch, kv_heads, len_k, head_dim]``.
        value: ``[batch, kv_heads, len_k, value_dim]``.
        is_causal: whether a query sees only keys at its own position and before.
        sliding_window: a query sees only the keys fewer positions away; None: all.
        softcap: bound of the scores, or None.
        s_aux: learnable sink logits, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    is_causal: bool
    sliding_window: int | None
    softcap: float | None
    s_aux: Tensor | None

    def refusal(self) -> str | None:
        """Say why PyTorch's attention cannot run the call in linear memory, or None if it can."""
        q, v, len_k = self.query, self.value, self.key.shape[2]
        if self.softcap is not None or self.s_aux is not None:
            return "it knows no softcap and no s_aux"
        if self.sliding_window is not None and self.sliding_window < len_k:
            return "it knows no sliding window"
        if self.is_causal and q.shape[2] not in (1, len_k):
            return "its causal mask is for as many queries as keys"
        if v.shape[3] != q.shape[3]:
            return "its fused kernels take one head_dim"
        if q.shape[2] == 0 or len_k == 0:
            return "there are no tokens"
        if not q.is_cuda:
            return None if q.device.type == "cpu" else f"its kernels for {q.device.type} are not known"
        if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[3] > MAX_HEAD_DIM or q.shape[3] % 8:
            return "its fused kernels take FP16 and BF16, and a head_dim that is a multiple of 8 and at most 256"
        return None

    def pays(self) -> bool:
        """Whether PyTorch's attention is at least as fast as a kernel of this package."""
        q = self.query
        if not q.is_cuda or tl is None or not HOPPER_TRITON or compute_capability(q.device) != HOPPER:
            return True
        if torch.is_grad_enabled() and (q.requires_grad or self.key.requires_grad or self.value.requires_grad):
            return True  # its backward pass is faster
        longest = OURS_FROM.get(q.shape[3])
        return longest is None or q.shape[2] <= longest

    def run(self, scale: float | None) -> Tensor:
        """Return the output, ``[batch, query_heads, len_q, head_dim]``."""
        q, k, v = self.query, self.key, self.value
        repeat = q.shape[1] // k.shape[1]
        if repeat > 1 and not q.is_cuda:
            # With grouped heads, PyTorch would hold all scores at once on a CPU.
            k, v = (x[:, :, None].expand(-1, -1, repeat, -1, -1).flatten(1, 2) for x in (k, v))
        is_causal = self.is_causal and q.shape[2] > 1
        return scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
        )
