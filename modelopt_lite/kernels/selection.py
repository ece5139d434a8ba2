"""Which key blocks a request visits: the plan's selector, then skip-softmax, made into lists before the main loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..plan import AttentionPlan, BlockSelector, SkipRule
from .block_scores import skip_excess
from .blocked import tile_scores
from .blocks import BlockGrid, GridPart, KeyBlocks, visible_keys
from .language import tl
from .reference import SequenceBlocks, selected_blocks
from .request import AttentionRequest

if tl is not None:
    from .hopper import bounds


def select_blocks(request: AttentionRequest, shared: dict[Any, Any] | None = None) -> KeyBlocks:
    """Return the key blocks that the request's plan visits; without gradients and autocast.

    It does not wait for the device unless the selector has a reference alone.

    Args:
        request: a checked request without lists, whose plan chooses blocks.
        shared: what is prepared for requests with this signature; None: found by the signature.
    """
    device = request.q.device.type
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return select_blocks(request, shared)
    if torch.is_grad_enabled():
        with torch.no_grad():
            return _select_blocks(request, shared)
    return _select_blocks(request, shared)


def _select_blocks(request: AttentionRequest, shared: dict[Any, Any] | None) -> KeyBlocks:
    request, selector = request.without_pages(), request.plan.blocks
    grid = BlockGrid(request, *request.grid, shared)
    if selector is not None and selector.scores is not None and request.plan.skip is None and 0 not in grid.shape:
        seen, forced = grid.marked(selector.first_blocks, selector.recent_blocks)
        scores, choice = _scores(selector, grid), grid.choice(seen)
        if choice is not None and (lists := choice.listed(scores, seen, forced)) is not None:
            return KeyBlocks(*lists, grid.starts, *request.grid)
        chosen = (selector.choose if choice is None else choice.chosen)(scores, seen, forced)
        if chosen.shape != scores.shape:
            raise ValueError(
                f"selector.choose: returns {list(chosen.shape)}; must be the shape of the scores, {list(scores.shape)}"
            )
        if chosen.dtype != torch.bool:
            raise ValueError(f"selector.choose: returns {chosen.dtype}; must be torch.bool")
        return KeyBlocks.of_choice(chosen, seen, forced, grid)
    selected, skipped = chosen_blocks(request, grid)
    mask = selected if skipped is None else selected & ~skipped
    return KeyBlocks.from_mask(mask, grid.starts, *request.grid)


@torch.no_grad()
def chosen_blocks(request: AttentionRequest, grid: BlockGrid | None = None) -> tuple[Tensor, Tensor | None]:
    """Return which key blocks the plan's selector keeps, and which of all its skip rule skips, None without one.

    Both are booleans ``[heads, query_blocks, key_blocks]``, as in :class:`~modelopt_lite.kernels.blocks.KeyBlocks`.
    The grid is that of the request.
    """
    plan = request.plan
    grid = grid or BlockGrid(request, *request.grid)
    seen = grid.seen()
    if plan.blocks is None or 0 in grid.shape:
        selected = seen.expand(request.q.shape[1], *seen.shape)
    else:
        (selected,) = _selected(request, grid, seen, [plan.blocks])
    if plan.skip is None or 0 in grid.shape:
        return selected, None
    selected = selected.repeat_interleave(request.q.shape[1] // selected.shape[0], 0)
    (skipped,) = _skipped(request, grid, seen, selected, [plan.skip])
    return selected, skipped


@torch.no_grad()
def count_visited(request: AttentionRequest, plans: Sequence[AttentionPlan]) -> tuple[Tensor, Tensor]:
    """Count the key blocks that each of several plans visits, from one computation of the scores.

    The plans differ in one number alone: in what their selector does with its scores, or, without a selector, in the
    threshold of their skip rule. So all of them choose by the scores of the first.

    Args:
        request: a checked request without lists; its own plan is not used.
        plans: one or more.

    Returns:
        The blocks that a query block sees, ``[query_blocks]``, and those that it visits, ``[plans, query_heads,
        query_blocks]``.

    Raises:
        ValueError: if the plans have both a selector and a skip rule, or neither.
    """
    first = plans[0]
    if (first.blocks is None) == (first.skip is None):
        raise ValueError("plans: must have either a block selector or a skip rule")
    request = request.without_pages()._replace(plan=first)
    grid, heads = BlockGrid(request, *request.grid), request.q.shape[1]
    seen = grid.seen()
    if 0 in grid.shape:
        visited = seen.expand(len(plans), heads, *seen.shape)
    elif first.blocks is not None:
        visited = _selected(request, grid, seen, [plan.blocks for plan in plans if plan.blocks is not None])
        visited = visited.repeat_interleave(heads // visited.shape[1], 1)
    else:
        everything = seen.expand(heads, *seen.shape)
        skipped = _skipped(request, grid, seen, everything, [plan.skip for plan in plans if plan.skip is not None])
        visited = everything & ~skipped
    return seen.sum(-1), visited.sum(-1)


def _selected(request: AttentionRequest, grid: BlockGrid, seen: Tensor, selectors: Sequence[BlockSelector]) -> Tensor:
    """Return what selectors keep that score alike, ``[selectors, heads, query_blocks, key_blocks]``."""
    first = selectors[0]
    if first.scores is None:
        selected = torch.stack([_selected_by_reference(request, grid, selector) for selector in selectors])
    else:
        scores = _scores(first, grid)
        forced = grid.forced(first.first_blocks, first.recent_blocks) & seen
        selected = torch.stack([forced | selector.choose(scores, seen, forced) for selector in selectors])
    return (selected | grid.is_dense()[:, None]) & seen


def _scores(selector: BlockSelector, grid: BlockGrid) -> Tensor:
    """Return what a selector chooses by, ``[heads, query_blocks, key_blocks]``."""
    assert selector.scores is not None
    scores, shape = selector.scores(grid), (grid.request.q.shape[1], *grid.shape)
    if scores.shape != shape:
        raise ValueError(f"selector.scores: returns {list(scores.shape)}; must be {list(shape)}")
    return scores.unflatten(0, (grid.request.k.shape[1], -1)).sum(1) if selector.per_kv_head else scores


def _selected_by_reference(request: AttentionRequest, grid: BlockGrid, selector: BlockSelector) -> Tensor:
    heads = request.k.shape[1] if selector.per_kv_head else request.q.shape[1]
    mask = torch.zeros(heads, *grid.shape, dtype=torch.bool, device=request.q.device)
    for sequence, start in zip(request.sequences(), grid.starts.tolist(), strict=True):
        q, k = request.q[sequence.queries].double(), request.k[sequence.keys].double()
        if 0 in (q.shape[0], k.shape[0]):
            continue
        q_pos, k_pos = (
            first + torch.arange(x.shape[0], device=x.device)
            for first, x in ((sequence.first_q, q), (sequence.first_k, k))
        )
        view = SequenceBlocks(q, k, q_pos, k_pos, visible_keys(request, q_pos[:, None], k_pos), request)
        found = selected_blocks(view, selector)
        mask[:, start : start + found.shape[1], : found.shape[2]] = found
    return mask


def _skipped(
    request: AttentionRequest, grid: BlockGrid, seen: Tensor, selected: Tensor, rules: Sequence[SkipRule]
) -> Tensor:
    """Return which of the selected blocks are skipped by rules that differ in their threshold.

    Returns:
        ``[rules, query_heads, query_blocks, key_blocks]``.
    """

    def find() -> Tensor:
        return torch.stack([_log_thresholds(grid, seen, rule) for rule in rules]).to(grid.dtype)

    margins = grid.once((grid.starts,), (tuple(rules), request.is_causal, request.sliding_window, grid.dtype), find)
    chosen = None if request.plan.blocks is None else selected
    if len(rules) == 1 and tl is not None and bounds.refusal(grid) is None:
        skipped = ~bounds.kept_blocks(grid, chosen, margins[0])[None]
    else:
        excess = skip_excess(grid, chosen)
        if excess is None:
            excess = _excess(request, grid, seen, selected)
        skipped = (excess < margins[:, None, :, None]) & (excess > -torch.inf)
    return skipped & selected & ~grid.is_dense()[:, None]


def _log_thresholds(grid: BlockGrid, seen: Tensor, rule: SkipRule) -> Tensor:
    """Return ``ln(threshold)`` of each query block, FP64 ``[query_blocks]``."""
    lengths = grid.lengths(seen)
    log_thresholds = rule.log_threshold(lengths)
    if rule.decode_threshold is None:
        return log_thresholds
    return torch.where(grid.is_single, rule.of_decode().log_threshold(lengths), log_thresholds)


def _excess(request: AttentionRequest, grid: BlockGrid, seen: Tensor, selected: Tensor) -> Tensor:
    """Return by how much scores exceed references, as :func:`modelopt_lite.kernels.block_launch.excess` does."""
    excess = torch.full(selected.shape, -torch.inf, dtype=grid.dtype, device=selected.device)
    diagonal, needed = grid.diagonal(), None
    if request.q.device.type == "cpu":  # where it costs nothing to know what there is
        needed = seen & (selected.any(0) | diagonal | _may_be_exempt(grid, request.plan))
    step = _rows_at_a_time(request, grid)
    for begin in range(0, grid.shape[0], step):
        rows = slice(begin, min(begin + step, grid.shape[0]))
        if needed is None:
            columns = torch.arange(grid.shape[1], device=request.q.device)
        else:
            columns = needed[rows].any(0).nonzero().flatten()
        if columns.numel():
            some = _Rows(request, grid, rows, selected[:, rows], diagonal[rows])
            highest, others = some.maxima(columns)
            # Without a reference key every other key matters.
            differences = (others - highest[..., None]).masked_fill(others == -torch.inf, -torch.inf)
            excess[:, rows, columns] = differences.amax(-2).transpose(1, 2).flatten(0, 1)
    return excess


def _rows_at_a_time(request: AttentionRequest, grid: BlockGrid) -> int:
    """Return how many query blocks are looked at together: one where rows or positions of keys differ too much."""
    if request.q.device.type == "cpu" or request.first_k is not None or request.plan.keep is not None:
        return 1
    scores = request.q.shape[1] * grid.block_rows * grid.shape[1] * grid.block_size
    return max(1, tile_scores(request.q.device) // scores)


def _may_be_exempt(grid: BlockGrid, plan: AttentionPlan) -> Tensor:
    """Return where a key block holds sinks or keys that are recent for some query of a query block."""
    low_k, high_k = grid.low_k[grid.sequence], grid.high_k[grid.sequence]
    is_recent = (high_k > grid.low_q[:, None] - plan.dense_window_size) & (low_k <= grid.high_q[:, None])
    return (low_k < plan.num_sink_tokens) | is_recent


class _Rows:
    """Some query blocks with all keys that they may see.

    They are of any sequences, whose keys begin at the same position if there are several blocks.

    Attributes:
        part: which query blocks.
        query: ``[rows, kv_heads, repeat, block_rows, head_dim]``.
        q_pos: ``[rows, block_rows, 1]``.
        is_query: which of them the call has, ``[rows, block_rows, 1]``.
        selected: which key blocks the selector keeps, ``[kv_heads, rows, repeat, 1, key_blocks]``.
        diagonal: which key blocks are diagonal ones, ``[rows, key_blocks]``.
    """

    def __init__(
        self, request: AttentionRequest, grid: BlockGrid, rows: slice, selected: Tensor, diagonal: Tensor
    ) -> None:
        self.request, self.grid, self.part = request, grid, GridPart(grid, rows)
        self.query = self.part.queries()
        self.sequence = grid.sequence[rows]
        self.q_pos = (grid.origin_q[rows, None] + torch.arange(grid.block_rows, device=selected.device))[..., None]
        self.is_query = (self.q_pos >= grid.low_q[rows, None, None]) & (self.q_pos <= grid.high_q[rows, None, None])
        self.selected = selected.unflatten(0, self.query.shape[1:3]).transpose(1, 2)[..., None, :]
        self.diagonal = diagonal

    def maxima(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return the largest score of each query among the reference keys, and among the others of each key block.

        Args:
            columns: the key blocks to look at.

        Returns:
            ``[kv_heads, rows, repeat, block_rows]`` and ``[kv_heads, rows, repeat, block_rows, columns]``.
        """
        size, (rows, kv_heads, repeat, queries, _) = self.grid.block_size, self.query.shape
        highest, others = self.query.new_full((kv_heads, rows, repeat, queries), -torch.inf), []
        for few in columns.split(max(1, tile_scores(columns.device) // (highest.numel() * size))):
            scores, kept, exempt = self._scores(few)
            is_diagonal = self.diagonal[:, few].repeat_interleave(size, -1)[:, None, None]
            is_reference = kept & (exempt | is_diagonal)
            highest = highest.maximum(scores.masked_fill(~is_reference, -torch.inf).amax(-1))
            scores = scores.masked_fill_(~kept | is_reference, -torch.inf)
            others.append(scores.unflatten(-1, (-1, size)).amax(-1))
        return highest, torch.cat(others, -1)

    def _scores(self, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scores with some key blocks, which of these are kept so far, and which keys are exempt.

        They are ``[kv_heads, rows, repeat, block_rows, keys]`` or can be expanded to it.
        """
        grid, request, plan = self.grid, self.request, self.request.plan
        size = grid.block_size
        sequence = self.sequence[:1] if grid.starts.shape[0] == 1 else self.sequence  # whose keys are gathered
        k_pos = (grid.origin_k[sequence[:1]][0, columns, None] + torch.arange(size, device=columns.device)).flatten()
        key = request.k[(grid.row_k[sequence, None] + k_pos).clamp(0, request.k.shape[0] - 1)].to(grid.dtype)
        scores = self.part.scores(self.query, key).transpose(0, 1)
        low, high = grid.low_k[self.sequence].amin(1), grid.high_k[self.sequence].amax(1)
        visible = self.is_query & (k_pos >= low[:, None, None]) & (k_pos <= high[:, None, None])
        visible = (visible & visible_keys(request, self.q_pos, k_pos))[:, None]
        scores = scores.masked_fill_(~visible, -torch.inf)
        kept = visible & self.selected[..., columns].repeat_interleave(size, -1)
        if plan.keep is not None:  # then there is one query block
            groups = (
                scores.squeeze(1).unflatten(-1, (-1, plan.group)),
                self.q_pos[0, ..., None],
                k_pos.unflatten(0, (-1, plan.group)),
            )
            kept = kept & plan.keep(*groups).flatten(-2)[:, None]
        behind = (self.q_pos - k_pos)[:, None]
        exempt = visible & ((k_pos < plan.num_sink_tokens) | ((behind >= 0) & (behind < plan.dense_window_size)))
        return scores, kept | exempt, exempt
