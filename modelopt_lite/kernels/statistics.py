"""Counts what a plan keeps of a computation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import check_request
from .blocked import count_blocked
from .blocks import BlockGrid, KeyBlocks
from .language import tl
from .request import AttentionRequest
from .selection import chosen_blocks, select_blocks

if tl is not None:
    from . import statistics_launch

COUNTS = ("rows", "visible", "kept", "mass", "blocks", "blocks_visited", "blocks_skipped")
"""What is counted for each head; see :class:`AttentionStatistics`."""
MASS, SKIPPED = COUNTS.index("mass"), COUNTS.index("blocks_skipped")
SAMPLED_BLOCKS = 4
"""Query blocks of a long sequence that are sampled, at least."""
WHOLE_BLOCKS = 16
"""Query blocks of a sequence from which on there is a sample."""


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
    request, skipped = request.without_pages()._replace(s_aux=None), None
    if request.blocks is None and request.plan.chooses_blocks:
        grid = BlockGrid(request, *request.grid)
        mask, skipping = chosen_blocks(request, grid)
        if skipping is not None:
            mask, skipped = mask & ~skipping, skipping.sum((1, 2))
        request = request._replace(blocks=KeyBlocks.from_mask(mask, grid.starts, *request.grid))
    if (run := _kernel(request)) is not None:
        counts = run(request, None)
    else:
        counts = torch.nn.functional.pad(count_blocked(request), (0, len(COUNTS) - MASS - 1))
        if request.blocks is not None:
            counts[:, MASS + 1 :] = _count_blocks(request, request.blocks)
    if skipped is not None:
        counts[:, SKIPPED] = skipped
    return counts


@torch.compiler.disable  # type: ignore[untyped-decorator] # a graph would hold every tile
def with_lists(request: AttentionRequest) -> AttentionRequest:
    """Return a request with the blocks that its plan chooses, for attention and for counting.

    It comes back as it is where attention makes no lists, and where both a selector and a skip rule choose: lists do
    not say which of them left a block out.
    """
    plan = request.plan
    if request.blocks is not None or (plan.blocks is None) == (plan.skip is None):
        return request
    if not request.without_needless_choice().plan.chooses_blocks:
        return request
    check_packing(request)
    return request._replace(blocks=select_blocks(request))


@torch.compiler.disable  # type: ignore[untyped-decorator] # a graph would hold every tile
def count_prefill(request: AttentionRequest, totals: Tensor | None = None, *, is_exact: bool) -> tuple[Tensor, int]:
    """Count what a request keeps of all sequences with more than one query, as :func:`count`.

    Args:
        request: the call.
        totals: what to add the counts to; it may be changed.
        is_exact: whether to count all query blocks, and not a sample of them; see :func:`sample`.

    Returns:
        The counts, with the totals if given; and of how many query blocks one was counted, 1 if all were.
    """
    every = 1 if is_exact else sample_interval(request)
    if request.page_table is None and (run := _kernel(request, every, is_prefill=True)) is not None:
        return run(request, totals), every
    check_packing(request)
    with torch.no_grad(), _without_autocast(request):
        if every > 1:
            counts = count(sample(request, every))
        else:
            lengths = request.lengths_q
            counts = count(request._replace(lengths_q=lengths.masked_fill(lengths == 1, 0)))
        totals = counts * every if totals is None else torch.add(totals, counts, alpha=every)
    return totals, every


def check_packing(request: AttentionRequest) -> None:
    """Check a request, on a CPU with the values of starts and lengths."""
    check_request(request)
    if request.q.device.type == "cpu":
        request.check_values()


def _without_autocast(request: AttentionRequest) -> AbstractContextManager[Any]:
    device = request.q.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _kernel(request: AttentionRequest, every: int = 1, is_prefill: bool = False) -> statistics_launch.Count | None:
    if tl is None or not request.q.is_cuda:
        return None
    return statistics_launch.find(request, every, is_prefill)


def _count_blocks(request: AttentionRequest, blocks: KeyBlocks) -> Tensor:
    """Return how many key blocks are seen, listed, and skipped by a skip rule alone, of each query head."""
    grid, heads = BlockGrid(request, *request.grid), request.q.shape[1]
    if 0 in blocks.counts.shape:
        return blocks.counts.new_zeros(heads, 3)
    row = (blocks.starts - grid.starts)[grid.sequence] + torch.arange(grid.shape[0], device=blocks.starts.device)
    exists = grid.low_q <= grid.high_q
    listed = blocks.counts[:, row.clamp(0, blocks.counts.shape[1] - 1)].where(exists, 0).sum(1)
    listed = listed.repeat_interleave(heads // len(listed))
    seen = grid.seen().sum().expand(heads)
    return torch.stack([seen, listed, (seen - listed) * request.plan.only_skips], 1)


def sample_interval(request: AttentionRequest) -> int:
    """Return for how many query blocks of a prefill one is sampled; 1 if all are counted.

    With ``n`` query blocks in the longest sequence that is the largest power of two up to ``n / SAMPLED_BLOCKS``, so
    that the cost grows as the length, not as its square. It is a power of two, so that a prompt in chunks is sampled as
    evenly as one at once; and no more than the query blocks of the call, so that every call counts some. All are
    counted below ``WHOLE_BLOCKS``, and where queries are not the last of the keys that they see.
    """
    rows, longest = request.grid[1], min(request.max_q, request.q.shape[0])
    if not request.is_causal or request.first_q is not None or longest == 0:
        return 1
    blocks = -(-request.max_k // rows)
    if blocks < WHOLE_BLOCKS:
        return 1
    most = min(blocks // SAMPLED_BLOCKS, -(-longest // rows))
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
        starts, last = r.blocks.starts, r.blocks.counts.shape[1] - 1
        # Each sequence's list is one of those that are there.
        starts = r.once(
            (starts, row), ("sampled lists", last), lambda: (starts[:, None] + row).flatten().clamp(0, last).int()
        )
        changes["blocks"] = r.blocks._replace(starts=starts)
    return r._replace(counts=None, max_q=min(rows, r.max_q), **changes)


def _sampled_packing(request: AttentionRequest, rows: int, every: int) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """Return the packing of sampled query blocks, and which of their sequence's they are, ``[batch, blocks]``."""
    r, step, offset = request, rows * every, every // 2 * rows
    end = r.lengths_k if r.first_k is None else r.first_k + r.lengths_k
    first_q = (end - r.lengths_q)[:, None]
    # The first sampled block that has queries of the call, and as many more as there may be.
    each = torch.arange(0, (r.max_q + rows - 2) // step * step + 1, step, device=end.device, dtype=end.dtype)
    origin = (first_q - (offset + rows)) // step * step + (each + (step + offset))
    begin = origin.maximum(first_q)
    stop = (origin + rows).minimum(end[:, None])
    number = stop - begin
    exists = number > 1
    keys = stop if r.first_k is None else stop - r.first_k[:, None]
    starts_q, lengths_q, lengths_k = (
        (x * exists).flatten() for x in (begin + (r.starts_q[:, None] - first_q), number, keys)
    )
    starts_k, firsts_k = (None if x is None else x.repeat_interleave(len(each)) for x in (r.starts_k, r.first_k))
    block = origin // rows - first_q // rows
    return (starts_q, lengths_q, starts_k, lengths_k, firsts_k), block
