"""Counts what a plan keeps of a computation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import DENSE
from . import choice
from .blocked import AttentionStatistics, statistics_blocked
from .blocks import BlockGrid, KeyBlocks
from .request import AttentionRequest
from .selection import chosen_blocks


@torch.no_grad()
def statistics_of(request: AttentionRequest) -> AttentionStatistics:
    """Count what a request keeps, with its lists or those that its plan chooses, without waiting for the device.

    On a GPU the attention kernels tell how much mass is kept: it is the ratio of the softmax denominators with and
    without sparsity. How many scores are kept follows from lists and positions, unless a rule looks at the scores.
    PyTorch operations compute all scores once more to count those.
    """
    request = request.without_pages()
    grid, heads, plan = BlockGrid(request, *request.grid), request.q.shape[1], request.plan
    counts: tuple[Tensor, ...] = ()
    if request.blocks is not None or plan.chooses_blocks:
        skipped = None
        if request.blocks is not None:
            visited = request.blocks.mask()
        else:
            visited, skipped = chosen_blocks(request, grid)
            visited = visited if skipped is None else visited & ~skipped
            request = request._replace(blocks=KeyBlocks.from_mask(visited, grid.starts, *request.grid))
        counts = (
            heads * grid.seen().sum(),
            visited.sum((1, 2)).repeat_interleave(heads // visited.shape[0], output_size=heads),
            grid.starts.new_zeros(heads, dtype=torch.int64) if skipped is None else skipped.sum((1, 2)),
        )
    request = request._replace(s_aux=None)
    if (plan.keep is None or plan.keeps_nothing) and _suits_kernels(request):
        return _statistics_by_denominators(request, grid, counts)
    return statistics_blocked(request, counts)


def _suits_kernels(request: AttentionRequest) -> bool:
    """Whether a GPU's kernels compute the denominators."""
    return request.q.is_cuda and choice.refusal(request._replace(with_lse=True)) is None


def _statistics_by_denominators(
    request: AttentionRequest, grid: BlockGrid, counts_of_blocks: tuple[Tensor, ...]
) -> AttentionStatistics:
    """Count what a request keeps whose plan has no rule, or one that keeps nothing.

    Args:
        request: the computation, with its lists if the plan chooses blocks.
        grid: its blocks.
        counts_of_blocks: as in :func:`~modelopt_lite.kernels.blocked.statistics_blocked`.
    """
    heads, device = request.q.shape[1], request.q.device
    visible, exempt = _scores_of_blocks(request, grid)
    listed = exempt if request.plan.keeps_nothing else visible
    is_dense = grid.is_dense()[:, None]
    listed = visible.where(is_dense, listed)
    if request.blocks is None:
        kept = listed.sum().expand(heads)
    else:
        visited = _visited(request.blocks, grid)
        kept = listed.where(visited | is_dense, exempt).sum((1, 2))
        kept = kept.repeat_interleave(heads // len(visited), output_size=heads)
    _, sparse = choice.run(request._replace(with_lse=True))
    _, dense = choice.run(request._replace(with_lse=True, plan=DENSE, blocks=None))
    assert sparse is not None
    assert dense is not None
    sees = dense > -torch.inf
    mass = (sparse.double() - dense).exp().clamp(max=1.0).where(sees, 0.0).sum(0)
    none = torch.zeros((), dtype=torch.int64, device=device), *(torch.zeros_like(kept),) * 2
    blocks, blocks_visited, skipped = counts_of_blocks or none
    return AttentionStatistics(
        rows=sees.sum(),
        visible=heads * visible.sum(),
        kept=kept.sum(),
        mass=mass.sum(),
        blocks=blocks,
        blocks_visited=blocks_visited.sum(),
        blocks_skipped=skipped.sum(),
        kept_by_head=kept,
        mass_by_head=mass,
        blocks_visited_by_head=blocks_visited,
        blocks_skipped_by_head=skipped,
    )


def _visited(blocks: KeyBlocks, grid: BlockGrid) -> Tensor:
    """Return what lists name, numbered as the grid is, ``[heads, query_blocks, key_blocks]``."""
    mask, columns = blocks.mask(), grid.shape[1]
    if 0 in mask.shape:
        return mask.new_zeros(mask.shape[0], *grid.shape)
    number = torch.arange(grid.shape[0], device=mask.device)
    row = (blocks.starts - grid.starts)[grid.sequence] + number
    # Rows behind the last one have no queries.
    mask = mask[:, row.clamp(0, mask.shape[1] - 1), :columns]
    return torch.nn.functional.pad(mask, (0, columns - mask.shape[2]))


def _scores_of_blocks(request: AttentionRequest, grid: BlockGrid) -> tuple[Tensor, Tensor]:
    """Return how many scores of each pair of blocks are visible, and how many of these exempt.

    Returns:
        ``[query_blocks, key_blocks]``, int64.
    """
    plan, window = request.plan, request.sliding_window
    found = [(grid.origin_q.new_empty(0, grid.shape[1]),) * 2]
    for part in grid.parts(grid.block_rows * grid.shape[1] * 4):
        rows = part.rows
        sequence = grid.sequence[rows]
        q_pos = grid.origin_q[rows, None, None] + torch.arange(grid.block_rows, device=request.q.device)[:, None]
        is_query = (q_pos >= grid.low_q[rows, None, None]) & (q_pos <= grid.high_q[rows, None, None])
        begin, end = grid.low_k[sequence, None], grid.high_k[sequence, None]
        if request.is_causal:
            end = end.minimum(q_pos)
        if window is not None:
            begin = begin.maximum(q_pos - window + 1)
            if not request.is_causal:
                end = end.minimum(q_pos + window - 1)
        sinks = end.clamp(max=plan.num_sink_tokens - 1) - begin + 1
        first_recent = begin.maximum(q_pos - plan.dense_window_size + 1).clamp(min=plan.num_sink_tokens)
        exempt = sinks.clamp(min=0) + (end.minimum(q_pos) - first_recent + 1).clamp(min=0)
        visible = (end - begin + 1).clamp(min=0)
        found.append((visible.where(is_query, 0).sum(1), exempt.where(is_query, 0).sum(1)))
    visible, exempt = (torch.cat(column) for column in zip(*found, strict=True))
    return visible, exempt
