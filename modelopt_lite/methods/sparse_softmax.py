"""N:M sparse softmax."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from ..kernels.top_n import keep_top_n, top_n_plan
from ..plan import AttentionPlan
from ..registry import register_sparse_method
from .base import SparseAttentionMethod


@register_sparse_method
class SparseSoftmax(SparseAttentionMethod):
    """N:M sparse softmax: of every M consecutive keys, each query attends to the N with the largest scores.

    Groups are aligned to the first token of the sequence. Exactly ``min(N, visible)`` keys of a group are kept, and
    of equal scores the lower key. Sink tokens and the recent window are kept in addition. The method applies to
    prefill; decode stays dense.

    The method and its defaults come from NVIDIA Model-Optimizer's ``triton_sparse_softmax``
    (https://github.com/NVIDIA/Model-Optimizer). Here sinks and window are exact to the token, not to the tile. With
    equal scores exactly N keys are kept, groups never start in padding, and M may also be 2 or 16.
    """

    method: Literal["sparse_softmax", "triton_sparse_softmax"] = Field(
        default="sparse_softmax", description="the method's name; the second is Model-Optimizer's"
    )
    sparsity_m: Literal[2, 4, 8, 16] = Field(default=4, description="M, the number of consecutive keys in a group")
    sparsity_n: int = Field(
        default=2, ge=0, description="N, the number of keys kept in each group, from 0 to M; 0 and M are dense"
    )

    @field_validator("sparsity_m", mode="before")
    @classmethod
    def _whole_number(cls, value: object) -> object:
        # A literal compares by value, so that 4.0 would pass for 4.
        if isinstance(value, float):
            raise ValueError("Input should be 2, 4, 8 or 16")
        return value

    @field_validator("sparsity_n", mode="after")
    @classmethod
    def _at_most_m(cls, n: int, info: ValidationInfo) -> int:
        m = info.data.get("sparsity_m")  # missing if it is wrong itself
        if m is not None and n > m:
            raise ValueError(f"Input should be at most sparsity_m = {m}")
        return n

    def reference(self, scores: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """Keep the N largest scores of each group, see :func:`~modelopt_lite.kernels.top_n.keep_top_n`."""
        return keep_top_n(scores, q_pos, k_pos, n=self.sparsity_n)

    def plan(self) -> AttentionPlan:
        """Return the N:M plan, which every kernel has in fused form."""
        return top_n_plan(self.sparsity_n, self.sparsity_m, self.num_sink_tokens, self.dense_window_size)
