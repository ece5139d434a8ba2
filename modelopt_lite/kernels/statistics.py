"""Counts what a plan keeps of a computation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .blocked import count_blocked
from .blocks import BlockGrid, KeyBlocks
from .language import tl
from .request import AttentionRequest
from .selection import chosen_blocks

if tl is not None:
    from . import statistics_launch

COUNTS = ("rows", "visible", "kept", "mass", "blocks", "blocks_visited", "blocks_skipped")
"""What is counted for each head; see :class:`AttentionStatistics`."""
MASS = COUNTS.index("mass")
SAMPLED_BLOCKS = 8
"""Query blocks of a long sequence that are sampled, at least; up to twice as many are all counted."""


class AttentionStatistics(NamedTuple):
    """What a plan keeps of one computation, counted over all query heads.

    All are on the device of the computation; FP64 for the mass, integers for all else. What is counted by head has the
    shape ``[query_heads]``; all else are tensors without dimensions.

    Attributes:
        rows: rows (query and head) that see any key.
        visible: scores at visible keys.
        kept: scores that take part in the softmax.
        mass: sum over the rows of the share of the dense softmax that lies on kept keys.
        blocks: pairs of a query block and a key block of which any query sees any key; 0 if the plan knows no blocks.
        blocks_visited: those of them that are listed.
        blocks_skipped: those that the plan's selector keeps and its skip rule skips.
        kept_by_head: the kept scores of each query head.
        mass_by_head: the mass of each query head.
        blocks_visited_by_head: the listed blocks of each query head.
        blocks_skipped_by_head: the skipped blocks of each query head.
    """

    rows: Tensor
    visible: Tensor
    kept: Tensor
    mass: Tensor
    blocks: Tensor
    blocks_visited: Tensor
    blocks_skipped: Tensor
    kept_by_head: Tensor
    mass_by_head: Tensor
    blocks_visited_by_head: Tensor
    blocks_skipped_by_head: Tensor

    @classmethod
    def of_counts(cls, counts: Tensor) -> AttentionStatistics:
        """Make it of what :func:`count` returns."""
        mass = counts[:, MASS]
        rows, visible, kept, _, blocks, visited, skipped = counts.long().unbind(1)
        return cls(
            rows=rows.sum(),
            visible=visible.sum(),
            kept=kept.sum(),
            mass=mass.sum(),
            blocks=blocks.sum(),
            blocks_visited=visited.sum(),
            blocks_skipped=skipped.sum(),
            kept_by_head=kept,
            mass_by_head=mass,
            blocks_visited_by_head=visited,
            blocks_skipped_by_head=skipped,
        )


@torch.no_grad()
def count(request: AttentionRequest) -> Tensor:
    """Count what a request keeps, with its lists or those that its plan chooses, without waiting for the device.

    On a GPU a kernel computes all scores once more, or PyTorch operations if the plan's rule has no hook.

    Returns:
        For each query head what :data:`COUNTS` names, FP64 ``[query_heads, 7]``; all but the mass are exact.
    """
    request = request.without_pages()._replace(s_aux=None)
    heads, plan = request.q.shape[1], request.plan
    of_blocks = None
    if request.blocks is not None or plan.chooses_blocks:
        grid = BlockGrid(request, *request.grid)
        skipped = grid.starts.new_zeros((), dtype=torch.int64)
        if request.blocks is None:
            mask, skips = chosen_blocks(request, grid)
            if skips is not None:
                mask, skipped = mask & ~skips, skips.sum((1, 2))
            request = request._replace(blocks=KeyBlocks.from_mask(mask, grid.starts, *request.grid))
        assert request.blocks is not None
        visited = request.blocks.counts.sum(1)
        if len(visited) < heads:
            visited = visited.repeat_interleave(heads // len(visited), output_size=heads)
        masks = ("seen", request.is_causal, request.sliding_window)
        seen = grid.once((grid.starts,), masks, lambda: grid.seen().sum())
        of_blocks = torch.stack([seen.expand(heads), visited, skipped.expand(heads)], 1)
    if tl is not None and request.q.is_cuda and statistics_launch.refusal(request) is None:
        counts = statistics_launch.count(request)
    else:
        counts = count_blocked(request)
    if of_blocks is None:
        return torch.nn.functional.pad(counts, (0, len(COUNTS) - counts.shape[1]))
    return torch.cat([counts, of_blocks], 1)


def sample_interval(request: AttentionRequest) -> int:
    """Return for how many query blocks of a prefill one is sampled; 1 if all are counted.

    With ``n`` query blocks in the longest sequence that is the largest power of two up to ``n / SAMPLED_BLOCKS``, so
    that the cost grows as the length, not as its square. It is a power of two, so that a prompt in chunks is sampled as
    evenly as one at once; and no more than the query blocks of the call, so that every call counts some. All are
    counted where queries are not the last of the keys that they see.
    """
    rows, longest = request.grid[1], min(request.max_q, request.q.shape[0])
    if not request.is_causal or request.first_q is not None or longest == 0:
        return 1
    most = min(-(-request.max_k // rows) // SAMPLED_BLOCKS, -(-longest // rows))
    return 1 << max(0, most.bit_length() - 1)


def sample(request: AttentionRequest, every: int) -> AttentionRequest:
    """Return every ``every``-th query block of a prefill as a sequence of its own, with all keys that it sees.

    Query blocks are counted from their sequence's first token, and the first one taken is number ``every // 2``. What
    has a single query is left out: a sequence, because it is decode, and a query block, because it would look like it.

    Args:
        request: a checked causal request with queries, which are the last tokens; lists are taken along.
        every: at least 2.
    """
    r, rows = request.without_pages(), request.grid[1]
    packing = (r.starts_q, r.lengths_q, r.starts_k, r.lengths_k, r.first_k)
    found, row = r.once(packing, ("sample", r.max_q, rows, every), lambda: _sampled_packing(r, rows, every))
    changes: dict[str, Any] = dict(
        zip(("starts_q", "lengths_q", "starts_k", "lengths_k", "first_k"), found, strict=True)
    )
    if r.blocks is not None:
        row = (r.blocks.starts[:, None] + row).flatten().clamp(0, r.blocks.counts.shape[1] - 1)
        changes["blocks"] = r.blocks._replace(
            counts=r.blocks.counts[:, row].where(changes["lengths_q"] > 0, 0),
            indices=r.blocks.indices[:, row],
            starts=torch.arange(len(row), device=row.device, dtype=torch.int32),
        )
    return r._replace(counts=None, max_q=min(rows, r.max_q), **changes)


def _sampled_packing(request: AttentionRequest, rows: int, every: int) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """Return the packing of sampled query blocks, and which of their sequence's they are, ``[batch, blocks]``."""
    r, step = request, rows * every
    first_k = torch.zeros_like(r.lengths_k) if r.first_k is None else r.first_k
    end = first_k + r.lengths_k
    first_q = end - r.lengths_q
    # The first sampled block that has queries of the call, and as many more as there may be.
    offset = every // 2 * rows
    origin = ((first_q - offset - rows).div(step, rounding_mode="floor") + 1) * step + offset
    each = torch.arange((r.max_q + rows - 2) // step + 1, device=origin.device, dtype=origin.dtype)
    origin = origin[:, None] + each * step
    begin = origin.maximum(first_q[:, None])
    stop = (origin + rows).minimum(end[:, None])
    number = stop - begin
    number = number.where(number > 1, 0)
    starts_q = (r.starts_q[:, None] + begin - first_q[:, None]).where(number > 0, 0)
    lengths_k = (stop - first_k[:, None]).where(number > 0, 0)
    starts_k, firsts = (x[:, None].expand_as(origin) for x in (r.starts_k, first_k))
    block = origin.div(rows, rounding_mode="floor") - first_q[:, None].div(rows, rounding_mode="floor")
    found = (starts_q, number, starts_k, lengths_k, firsts)
    starts_q, lengths_q, starts_k, lengths_k, firsts = (x.flatten().contiguous() for x in found)
    return (starts_q, lengths_q, starts_k, lengths_k, None if r.first_k is None else firsts), block
