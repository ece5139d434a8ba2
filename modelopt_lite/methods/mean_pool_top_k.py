"""A fixed share of key blocks, by mean queries and mean keys."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..kernels.block_scores import BlockChoice, mean_scores
from ..kernels.blocks import BlockGrid
from ..kernels.reference import SequenceBlocks
from ..registry import register_sparse_method
from .blocks import BlockMethod
from .calibrated import CalibratedMethod, Knob


@register_sparse_method
class MeanPoolTopK(BlockMethod, CalibratedMethod):
    """The key blocks whose mean key scores highest with the mean query of a query block: a simple baseline.

    Close to the rule that MoBA (https://arxiv.org/abs/2502.13189) trains models with. Of the key blocks of which a
    query block sees any key, the share ``keep`` is kept, rounded up. The first and the recent blocks count as part of
    it; if they are more, all of them are kept. MoBA scores the mean of a block's keys with each query.
    Here the mean of a whole query block replaces each query, so that all queries of the block look at the same keys.
    """

    knob: ClassVar[Knob] = Knob("keep", "linear", tuple(0.05 * i for i in range(1, 20)), high=1.0)

    method: Literal["mean_pool_top_k"] = Field(default="mean_pool_top_k", description="the method's name")
    keep: float = Field(default=0.25, ge=0, le=1, description="share of the key blocks that are kept, rounded up")

    def reference_scores(self, view: SequenceBlocks) -> Tensor:
        """Score mean queries with mean keys."""
        of_queries, of_keys = view.queries_in(self.block_rows), view.keys_in(self.block_size)
        mean_q = torch.einsum("bq,qhd->bhd", of_queries / of_queries.sum(-1, keepdim=True), view.q)
        mean_k = torch.einsum("bk,khd->bhd", of_keys / of_keys.sum(-1, keepdim=True), view.k)
        return view.scores(mean_q, mean_k)

    def scores(self, grid: BlockGrid) -> Tensor:
        """Score the blocks of all sequences."""
        return mean_scores(grid)

    def choice(self, seen: Tensor, _: torch.dtype) -> BlockChoice:
        """Keep the share with the largest scores, the forced ones first."""
        return BlockChoice("largest", self.knob_of(seen, torch.float64))
