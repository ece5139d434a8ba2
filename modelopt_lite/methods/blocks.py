"""What the methods that choose blocks of keys have in common."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from ..kernels.block_scores import BlockChoice
from ..kernels.blocks import BlockGrid
from ..kernels.reference import SequenceBlocks
from ..plan import AttentionPlan, BlockSelector
from .base import SparseAttentionMethod, WindowSize

BlockSize: TypeAlias = Annotated[
    Literal[16, 32, 64, 128], Field(description="keys in a key block; it divides block_rows")
]
BlockRows: TypeAlias = Annotated[
    Literal[16, 32, 64, 128], Field(description="positions in a query block, whose queries look at the same key blocks")
]


class GridMethod(SparseAttentionMethod):
    """A method that decides about blocks of keys for blocks of queries."""

    block_size: BlockSize = 128
    block_rows: BlockRows = 128

    @field_validator("block_size", "block_rows", mode="before")
    @classmethod
    def _whole_number(cls, value: object) -> object:
        # A literal compares by value, so that 64.0 would pass for 64.
        if isinstance(value, float):
            raise ValueError("Input should be 16, 32, 64 or 128")
        return value

    @field_validator("block_rows", mode="after")
    @classmethod
    def _whole_blocks(cls, rows: int, info: ValidationInfo) -> int:
        size = info.data.get("block_size")  # missing if it is wrong itself
        if size is not None and rows % size:
            raise ValueError(f"Input should be a multiple of block_size = {size}")
        return rows


class BlockMethod(GridMethod):
    """A method that keeps whole blocks of keys for each block of queries, chosen before the scores are computed.

    A subclass scores pairs of a query block and a key block: in FP64, written to be read, in
    :meth:`reference_scores`, and fast in :meth:`scores`. How it chooses by these scores, it says in :meth:`choice`, or
    does in :meth:`choose`. The documentation says under Semantics what blocks are and what a choice may depend on.
    """

    dense_window_size: WindowSize = 0
    first_blocks: int = Field(default=1, ge=0, description="first key blocks of each sequence, always kept")
    recent_blocks: int = Field(
        default=1, ge=0, description="last key blocks up to the diagonal, always kept; 1 is the diagonal alone"
    )
    per_kv_head: bool = Field(
        default=False, description="true: all query heads that share keys share one choice, by the sum of their scores"
    )

    def reference_scores(self, view: SequenceBlocks) -> Tensor:
        """Score the blocks of one sequence: the method's definition.

        Args:
            view: the sequence's queries and keys, in FP64.

        Returns:
            ``[query_heads, query_blocks, key_blocks]``; where no query sees any key, anything.
        """
        raise NotImplementedError(f"{type(self).__name__} defines neither reference_scores() nor plan()")

    def scores(self, grid: BlockGrid) -> Tensor:
        """Score the blocks of all sequences at once, in FP32 and without waiting for the device.

        A class that leaves it out is slow: :meth:`reference_scores` is called for one sequence after the other.

        Args:
            grid: the query blocks of all sequences, and their key blocks.

        Returns:
            ``[query_heads, query_blocks, key_blocks]``; where no query sees any key, anything.
        """
        raise NotImplementedError(f"{type(self).__name__} has no fast form")

    def choice(self, seen: Tensor, dtype: torch.dtype) -> BlockChoice:
        """Say how blocks are chosen by their scores, if it is one of the ways that kernels know.

        Args:
            seen: where any query sees any key, booleans ``[query_blocks, key_blocks]``.
            dtype: that of the scores, FP32 or FP64.
        """
        raise NotImplementedError(f"{type(self).__name__} defines neither choice(), choose() nor plan()")

    def choose(self, scores: Tensor, seen: Tensor, forced: Tensor) -> Tensor:
        """Choose blocks by their scores, by default as :meth:`choice` says.

        Args:
            scores: ``[heads, query_blocks, key_blocks]``, FP32 or FP64.
            seen: where any query sees any key, booleans ``[query_blocks, key_blocks]``.
            forced: which of these are kept in any case.

        Returns:
            Booleans of the shape of ``scores``; those where nothing is seen are ignored.
        """
        return self.choice(seen, scores.dtype).chosen(scores, seen, forced)

    def plan(self) -> AttentionPlan:
        """Return the plan of the method's selector."""
        selector = BlockSelector(
            reference=self.reference_scores,
            choose=self.choose,
            scores=None if type(self).scores is BlockMethod.scores else self.scores,
            block_size=self.block_size,
            block_rows=self.block_rows,
            first_blocks=self.first_blocks,
            recent_blocks=self.recent_blocks,
            per_kv_head=self.per_kv_head,
            choice=self.choice if type(self).choose is BlockMethod.choose else None,
        )
        return AttentionPlan(
            blocks=selector, num_sink_tokens=self.num_sink_tokens, dense_window_size=self.dense_window_size
        )
