"""Attention sinks and a sliding window."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..kernels.language import jit, tl  # noqa: F401 - Triton's interpreter looks for it here
from ..plan import AttentionPlan
from ..registry import register_sparse_method
from .base import SinkTokens, SparseAttentionMethod, WindowSize


@jit
def keep_nothing_hook(scores, q_pos, k_pos, args):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201 - Triton
    """Keep no score: what stays are the sinks and the window, which belong to the kernel."""
    return (scores[0] < float("-inf"),)


@register_sparse_method
class SinkWindow(SparseAttentionMethod):
    """StreamingLLM's attention pattern: the first tokens and the most recent ones (https://arxiv.org/abs/2309.17453).

    Each query attends to ``num_sink_tokens`` tokens at the start of its sequence and to the ``dense_window_size`` most
    recent ones, itself included. Tiles of keys in between are never computed, so time grows with the window and not
    with the length. The paper also drops the keys from the cache and counts positions within it; here the cache
    stays whole, positions stay the model's own, and only prefill is sparse.
    """

    method: Literal["sink_window"] = Field(default="sink_window", description="the method's name")
    num_sink_tokens: SinkTokens = 4
    dense_window_size: WindowSize = 1024

    def reference(self, scores: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """Keep nothing; the kernels add sinks and window."""
        return torch.zeros_like(scores, dtype=torch.bool)

    def plan(self) -> AttentionPlan:
        """Return the plan, whose rule adds nothing to sinks and window."""
        return AttentionPlan(
            keep=self.reference,
            num_sink_tokens=self.num_sink_tokens,
            dense_window_size=self.dense_window_size,
            score_hook=keep_nothing_hook,
            scale_free=True,
            keeps_nothing=True,
        )
