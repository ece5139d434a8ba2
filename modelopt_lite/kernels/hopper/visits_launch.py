"""Launches the kernel that makes lists of key blocks into visits, for the kernels for Hopper GPUs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..device import Launch, cdiv, heads_per_wave
from ..request import AttentionRequest
from ..settings import Options, distances
from .visits import HEADER, RANKED, TILE, schedule


class Visits(NamedTuple):
    """What the items of a call visit.

    Attributes:
        tiles: int32 ``[heads of lists, rows, HEADER + tiles]``: for each item five numbers, then the first keys of its
            tiles. Rows are those of the lists, or as many to each as it has blocks of 128 queries. An item of no
            queries has no tiles, every other has at least one.
        order: int32 ``[query_heads * rows]``: numbers ``head * rows + row`` of the items, in the order of their start.
    """

    tiles: Tensor
    order: Tensor


def refusal(request: AttentionRequest) -> str | None:
    """Say why the lists of a request do not suit kernels that visit tiles of 128 keys, or None if they do."""
    blocks = request.blocks
    if blocks is None:
        return "the plan chooses blocks of keys, which are not listed" if request.plan.chooses_blocks else None
    if blocks.block_size != TILE.value or blocks.block_rows % TILE.value:
        return (
            f"key blocks have {blocks.block_size} keys for {blocks.block_rows} positions, not {TILE.value} for a "
            f"multiple of {TILE.value}"
        )
    return None


class Schedule:
    """Finds the :class:`Visits` of requests with lists, without waiting for their device."""

    def __init__(self, request: AttentionRequest, options: Options) -> None:
        """Prepare for requests of one signature; :func:`refusal` has been asked.

        Args:
            request: one of them.
            options: the main kernel's.

        Raises:
            ValueError: if there may be more items or tiles than 32 bits count.
        """
        r, blocks = request, request.blocks
        assert blocks is not None
        (lists, list_rows), heads = blocks.counts.shape, r.q.shape[1]
        rows_each, batch = blocks.block_rows // TILE.value, r.starts_q.shape[0]
        self.rows, self.heads_per_list = list_rows * rows_each if batch else 0, heads // lists
        if heads * self.rows >= 2**30:
            raise ValueError(
                f"blocks.counts: {list_rows} lists for each of {heads} heads are not allowed; pass fewer sequences at "
                f"a time, so that there are fewer than 2^30 tiles of {TILE.value} queries"
            )
        width = max(1, cdiv(min(r.max_k, r.k.shape[0]), TILE.value))
        self.shape = (lists, self.rows, HEADER.value + width)
        wave = min(heads, heads_per_wave(r.k.shape[0], r.k, r.v) * (heads // r.k.shape[1]))
        sizes = (list_rows, blocks.indices.shape[2], rows_each, batch, width)
        self.numbers = (*sizes, heads, self.heads_per_list, wave, *distances(r))
        self.programs = cdiv(heads, wave) * cdiv(wave * self.rows, RANKED.value) + lists * self.rows
        self.launch = Launch(schedule, r.q.device, r.plan.score_hook is not None, options, num_warps=1)

    def __call__(self, request: AttentionRequest) -> Visits:
        """Launch, and return the visits."""
        r, blocks = request, request.blocks
        assert blocks is not None
        tiles = r.q.new_empty(*self.shape, dtype=torch.int32)  # PyTorch reads a tuple more slowly
        order = r.q.new_empty(r.q.shape[1] * self.rows, dtype=torch.int32)
        lists = (blocks.counts.contiguous(), blocks.indices.contiguous(), blocks.starts.contiguous())
        self.launch(self.programs, tiles, order, *lists, (r.lengths_q, r.lengths_k), *self.numbers)
        return Visits(tiles, order)
