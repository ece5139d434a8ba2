"""XAttention: key blocks by sums along antidiagonals."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from ..kernels.block_scores import BlockChoice, antidiagonal_mass, softmax_over
from ..kernels.blocks import BlockGrid
from ..kernels.reference import SequenceBlocks
from ..registry import register_sparse_method
from .blocks import BlockMethod
from .calibrated import CalibratedMethod, Knob


@register_sparse_method
class XAttention(BlockMethod, CalibratedMethod):
    """XAttention (https://arxiv.org/abs/2503.16428): key blocks by antidiagonals, up to a share of their mass.

    Queries and keys are cut into groups of ``stride`` positions. The logit of two groups is the mean of the scores on
    the antidiagonal of their square: the first query with the last key, the second with the one before it, and so on,
    so that vertical and diagonal lines in the attention are seen alike. The softmax over the key groups of which a
    query group sees any key, summed over the groups of two blocks, is the mass of a key block. Key blocks are kept in
    the order of their mass, the first and the recent ones before all others, until those that are kept hold at least
    ``threshold`` of it.

    Scores of tokens that are not in the call count as 0. Where a query group meets its own key group,
    those of keys behind their query count as well.
    """

    knob: ClassVar[Knob] = Knob(
        "threshold",
        "loglog",
        (0.02, *(0.05 * i for i in range(1, 20)), 0.98, 0.99, 0.995, 0.998, 0.999, 0.9997, 0.9999, 0.99999),
    )

    method: Literal["xattention"] = Field(default="xattention", description="the method's name")
    stride: Literal[4, 8, 16] = Field(default=8, description="tokens in a group; time falls with it")
    threshold: float = Field(default=0.9, gt=0, le=1, description="share of the estimated attention mass that is kept")

    @field_validator("stride", mode="before")
    @classmethod
    def _whole_stride(cls, value: object) -> object:
        # A literal compares by value, so that 8.0 would pass for 8.
        if isinstance(value, float):
            raise ValueError("Input should be 4, 8 or 16")
        return value

    def reference_scores(self, view: SequenceBlocks) -> Tensor:
        """Return the mass of each key block, from the mean scores on antidiagonals."""
        of_queries, of_keys = view.queries_in(self.stride), view.keys_in(self.stride)
        is_antidiagonal = view.q_pos[:, None] % self.stride + view.k_pos % self.stride == self.stride - 1
        products = torch.einsum("qhd,khd->hqk", view.q, view.k.repeat_interleave(view.q.shape[1] // view.k.shape[1], 1))
        logits = view.scale(of_queries @ (products * is_antidiagonal) @ of_keys.T / self.stride)
        seen = of_queries @ view.visible.double() @ of_keys.T > 0
        weights = softmax_over(logits, seen)  # [heads, query groups, key groups]
        # A group is in the block of any of its tokens.
        query_blocks = (view.queries_in(self.block_rows) @ of_queries.T > 0).double()
        key_blocks = (view.keys_in(self.block_size) @ of_keys.T > 0).double()
        return query_blocks @ weights @ key_blocks.T

    def scores(self, grid: BlockGrid) -> Tensor:
        """Return the masses for all sequences."""
        return antidiagonal_mass(grid, self.stride)

    def choice(self, seen: Tensor, dtype: torch.dtype) -> BlockChoice:
        """Keep the blocks with the largest mass, the forced ones first, until they hold enough of it."""
        return BlockChoice("heaviest", self.knob_of(seen, dtype))
