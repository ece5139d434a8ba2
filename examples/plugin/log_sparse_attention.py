"""LogSparse attention: the keys at distances that are powers of two."""

from __future__ import annotations

import dataclasses
from typing import Literal

from torch import Tensor

import modelopt_lite as mtsa
from modelopt_lite.kernels.language import jit, tl  # noqa: F401 - Triton's interpreter looks for it here


@jit
def power_of_two_hook(scores, q_pos, k_pos, args):  # noqa: ANN001, ANN201 - Triton
    """Keep keys at distances of 0, 1, 2, 4, 8 and so on."""
    distance = q_pos - k_pos[0]
    return ((distance & (distance - 1)) == 0,)


@mtsa.register_sparse_method
class LogSparse(mtsa.SparseAttentionMethod):
    """LogSparse attention (https://arxiv.org/abs/1907.00235): each query sees keys at exponentially growing distances.

    A query attends to itself and to the keys 1, 2, 4, 8, ... tokens before it, and to sinks and dense window.
    """

    method: Literal["log_sparse"] = "log_sparse"

    def reference(self, scores: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """Keep keys at distances of 0, 1, 2, 4, 8 and so on."""
        distance = q_pos - k_pos
        return ((distance & (distance - 1)) == 0).expand(scores.shape)

    def plan(self) -> mtsa.AttentionPlan:
        """Return the plan of the rule, with its fused form."""
        return dataclasses.replace(super().plan(), score_hook=power_of_two_hook, scale_free=True)
