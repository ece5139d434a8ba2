"""One attention computation without its tensors' values: lengths, masks, scale and plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ..plan import DENSE, AttentionPlan


@dataclass(frozen=True)
class AttentionProblem:
    """What every backend is given beside query, key and value; the fields are those of :func:`kernels.attention`."""

    starts_q: Tensor
    lengths_q: Tensor
    max_q: int
    starts_k: Tensor
    lengths_k: Tensor
    max_k: int
    is_causal: bool
    softmax_scale: float
    sliding_window: int | None
    softcap: float | None
    plan: AttentionPlan

    def sequences(self) -> Iterator[tuple[slice, slice]]:
        """Yield each sequence's rows in the packed queries and in the packed keys."""
        columns = (self.starts_q, self.lengths_q, self.starts_k, self.lengths_k)
        for start_q, len_q, start_k, len_k in zip(*(column.tolist() for column in columns), strict=True):
            yield slice(start_q, start_q + len_q), slice(start_k, start_k + len_k)

    def plan_for(self, len_q: int) -> AttentionPlan:
        """Return the plan of a sequence with ``len_q`` queries: a single query is decode, dense by default."""
        return DENSE if len_q == 1 and not self.plan.sparse_decode else self.plan
