"""Where the query blocks and the key blocks of a request lie: tables that are found without waiting for its device."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .request import AttentionRequest


class GridTables(NamedTuple):
    """The blocks of a request; see :class:`~modelopt_lite.kernels.blocks.BlockGrid`, whose attributes these are."""

    starts: Tensor
    sequence: Tensor
    origin_q: Tensor
    low_q: Tensor
    high_q: Tensor
    origin_k: Tensor
    low_k: Tensor
    high_k: Tensor
    row_q: Tensor
    row_k: Tensor


def grid_tables(request: AttentionRequest, block_size: int, block_rows: int) -> GridTables:
    """Find the blocks of a request with PyTorch operations."""
    batch, device = request.starts_q.shape[0], request.q.device
    lengths_q, lengths_k = request.lengths_q.long(), request.lengths_k.long()
    first_k = torch.zeros_like(lengths_k) if request.first_k is None else request.first_k.long()
    first_q = first_k + lengths_k - lengths_q if request.first_q is None else request.first_q.long()

    rows, columns = grid_shape(request, block_size, block_rows)
    first_block = first_q.div(block_rows, rounding_mode="floor")
    last_block = (first_q + lengths_q - 1).div(block_rows, rounding_mode="floor")
    ends = (last_block - first_block + 1).where(lengths_q > 0, 0).cumsum(0)
    number = torch.arange(rows, device=device)
    sequence = torch.searchsorted(ends, number, right=True).clamp(max=max(0, batch - 1))
    starts = torch.nn.functional.pad(ends, (1, 0))[:-1]
    origin_q = (first_block - starts)[sequence] * block_rows + number * block_rows

    column = torch.arange(columns, device=device)
    origin_k = (first_k[:, None] // block_size + column) * block_size
    return GridTables(
        starts=starts.to(torch.int32),
        sequence=sequence,
        origin_q=origin_q,
        low_q=origin_q.maximum(first_q[sequence]),
        high_q=(origin_q + block_rows).minimum((first_q + lengths_q)[sequence]) - 1,
        origin_k=origin_k,
        low_k=origin_k.maximum(first_k[:, None]),
        high_k=(origin_k + block_size).minimum((first_k + lengths_k)[:, None]) - 1,
        row_q=request.starts_q.long() - first_q,
        row_k=request.starts_k.long() - first_k,
    )


def grid_shape(request: AttentionRequest, block_size: int, block_rows: int) -> tuple[int, int]:
    """Return upper bounds of the query blocks of all sequences and of the key blocks of one, from sizes alone."""
    r, batch = request, request.starts_q.shape[0]
    longest, keys = torch.sym_min(r.max_q, r.q.shape[0]), torch.sym_min(r.max_k, r.k.shape[0])
    # A sequence may begin and end in the middle of a block.
    each = torch.sym_min(longest, (longest + 2 * block_rows - 2) // block_rows)
    rows = torch.sym_min(batch * each, r.q.shape[0] // block_rows + 2 * batch)
    if r.first_k is None:
        return rows, (keys + block_size - 1) // block_size
    return rows, torch.sym_min(keys, (keys + 2 * block_size - 2) // block_size)
