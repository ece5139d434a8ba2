"""FlashPrefill: key blocks whose mean key weighs enough."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..kernels.block_scores import BlockChoice, softmax_mass, softmax_over
from ..kernels.blocks import BlockGrid
from ..kernels.reference import SequenceBlocks
from ..registry import register_sparse_method
from .blocks import BlockMethod
from .calibrated import CalibratedMethod, Knob


@register_sparse_method
class FlashPrefill(BlockMethod, CalibratedMethod):
    """FlashPrefill (https://arxiv.org/abs/2603.06199): key blocks by the weight of their mean key, without sorting.

    Each query attends to the mean keys of all key blocks of which it sees a key. The score of a key block for a query
    block is the sum of the softmax weights of its mean key over these queries. Blocks with at least ``alpha`` times the
    largest score are kept, and the first and the recent ones in any case.

    The mean is that of all keys that the block has in this call. In the diagonal block some of them lie behind a query,
    so the choice of blocks, though never the attention, looks up to ``block_rows - 1`` tokens ahead, as any choice that
    queries share does. Here each query's weights are normalised before they are summed, so that all queries count
    alike. The paper also computes the last two query blocks of a prompt in full. Here no query block is special,
    because the result would then depend on how a prefill is cut into chunks.
    """

    knob: ClassVar[Knob] = Knob(
        "alpha",
        "log",
        (
            1e-7, 1e-6, 1e-5, 3e-5, *(10 ** (0.25 * i - 4) for i in range(13)),
            0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9,
        ),
        high=1.0,
    )  # fmt: skip

    method: Literal["flash_prefill"] = Field(default="flash_prefill", description="the method's name")
    alpha: float = Field(
        default=0.2, ge=0, le=1, description="least score of a key block that is kept, relative to the largest"
    )
    first_blocks: int = Field(default=2, ge=0, description="first key blocks of each sequence, always kept")
    recent_blocks: int = Field(
        default=4, ge=0, description="last key blocks up to the diagonal, always kept; 1 is the diagonal alone"
    )

    def reference_scores(self, view: SequenceBlocks) -> Tensor:
        """Sum over the queries of a block the softmax weights of each block's mean key."""
        in_block = view.keys_in(self.block_size)
        means = torch.einsum("bk,khd->bhd", in_block / in_block.sum(-1, keepdim=True), view.k)
        seen = view.visible.double() @ in_block.T > 0  # [len_q, key_blocks]
        return view.queries_in(self.block_rows) @ softmax_over(view.scores(view.q, means), seen)

    def scores(self, grid: BlockGrid) -> Tensor:
        """Score the blocks of all sequences."""
        return softmax_mass(grid)

    def choice(self, seen: Tensor, dtype: torch.dtype) -> BlockChoice:
        """Keep blocks with at least ``alpha`` times the largest score."""
        return BlockChoice("above", self.knob_of(seen, dtype))
