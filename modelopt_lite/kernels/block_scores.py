"""What selectors of key blocks are made of: scores of pairs of blocks, and choices by these scores.

Each function runs as Triton kernels on a CUDA GPU, and elsewhere as PyTorch operations, with the same result up to
FP32 rounding. None of them waits for the device.
A user's own method calls them in its ``scores`` and its ``choose``; the methods ``flash_prefill``, ``xattention`` and
``mean_pool_top_k`` consist of little else.
"""

from __future__ import annotations

import functools
import logging
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .blocks import BlockGrid
from .language import tl

if tl is not None:
    from . import block_launch

logger = logging.getLogger(__name__)


def mean_keys(grid: BlockGrid) -> Tensor:
    """Return the mean of each block's keys in the call.

    Returns:
        ``[batch, key_blocks, kv_heads, head_dim]``, FP32 (FP64 for FP64 inputs); 0 for a block without keys.
    """
    return block_launch.mean_keys(grid) if _runs_kernels(grid) else grid.mean_keys()


def mean_queries(grid: BlockGrid) -> Tensor:
    """Return the mean of each query block's queries in the call.

    Returns:
        ``[query_blocks, query_heads, head_dim]``, FP32 (FP64 for FP64 inputs); 0 for a block without queries.
    """
    if _runs_kernels(grid):
        return block_launch.mean_queries(grid)
    number = (grid.high_q - grid.low_q + 1).clamp(min=1)
    found = [grid.request.q.new_empty(0, *grid.request.q.shape[1:], dtype=grid.dtype)]
    for part in grid.parts(grid.request.q.shape[1] * grid.block_rows * grid.request.q.shape[2]):
        found.append(part.queries().sum(-2).flatten(1, 2) / number[part.rows, None, None])
    return torch.cat(found)


def mean_scores(grid: BlockGrid) -> Tensor:
    """Return the scores of each query block's mean query with each key block's mean key, scaled and capped.

    Returns:
        ``[query_heads, query_blocks, key_blocks]``, FP32 (FP64 for FP64 inputs); anything where nothing is seen.
    """
    if _runs_kernels(grid):
        return block_launch.mean_scores(grid)
    keys, queries, found = mean_keys(grid), mean_queries(grid), []
    queries = queries.unflatten(1, (keys.shape[2], -1))[:, :, :, None]
    for part in grid.parts(grid.request.q.shape[1] * grid.shape[1]):
        found.append(part.scores(queries[part.rows], part.of_keys(keys)).squeeze(-2))
    return torch.cat(found).flatten(1, 2).transpose(0, 1)


def softmax_mass(grid: BlockGrid, pooled: Tensor | None = None) -> Tensor:
    """Let each query attend to one pooled key of every key block, and sum the weights over the queries of a block.

    A query's softmax is over the key blocks of which it sees at least one key. So the masses of a query block sum up to
    the number of its queries that see any key.

    Args:
        grid: the query blocks of all sequences, and their key blocks.
        pooled: what stands for the keys of each block, ``[batch, key_blocks, kv_heads, head_dim]``; by default
            :func:`mean_keys`. The kernels take FP32 numbers as the sum of two of the inputs' type, of FP16 or BF16.

    Returns:
        ``[query_heads, query_blocks, key_blocks]``, FP32 (FP64 for FP64 inputs); anything where nothing is seen.

    Raises:
        ValueError: if ``pooled`` has another shape.
    """
    shape = (*grid.low_k.shape, *grid.request.k.shape[1:])
    if pooled is not None and pooled.shape != shape:
        raise ValueError(f"pooled: {list(pooled.shape)} is not allowed; must be {list(shape)}")
    if _runs_kernels(grid):
        return block_launch.softmax_mass(grid, pooled)
    pooled, found = mean_keys(grid) if pooled is None else pooled, []
    for part in grid.parts(grid.request.q.shape[1] * grid.block_rows * (grid.shape[1] + grid.request.q.shape[2])):
        logits = part.scores(part.queries(), part.of_keys(pooled))
        found.append(softmax_over(logits, part.sees()[:, None, None]).sum(-2))
    return torch.cat(found).flatten(1, 2).transpose(0, 1)


def antidiagonal_mass(grid: BlockGrid, stride: int) -> Tensor:
    """Estimate the attention mass of key blocks by sums of scores along antidiagonals, as XAttention does.

    Queries and keys are cut into groups of ``stride`` positions. The logit of two groups is the mean score on the
    antidiagonal of their square; scores of tokens that are not in the call count as 0. A query group's softmax is over
    the key groups of which it sees any key, and is summed over the groups of both blocks.

    Args:
        grid: the query blocks of all sequences, and their key blocks.
        stride: tokens in a group, a divisor of ``grid.block_size``.

    Returns:
        ``[query_heads, query_blocks, key_blocks]``, FP32 (FP64 for FP64 inputs); anything where nothing is seen.

    Raises:
        ValueError: if ``stride`` does not divide the block size.
    """
    if stride < 1 or grid.block_size % stride:
        raise ValueError(f"stride: {stride!r} is not allowed; a divisor of block_size = {grid.block_size}")
    if _runs_kernels(grid):
        return block_launch.antidiagonal_mass(grid, stride)
    request, found = grid.request, []
    heads, kv_heads, dim = request.q.shape[1], request.k.shape[1], request.q.shape[2]
    keys_held = grid.shape[1] * grid.block_size
    groups_held = heads * (grid.block_rows // stride) * (keys_held // stride)
    keys = None
    is_one_sequence = grid.starts.shape[0] == 1
    for part in grid.parts(
        groups_held + heads * grid.block_rows * dim + (0 if is_one_sequence else keys_held * kv_heads * dim)
    ):
        if keys is None or not is_one_sequence:
            # [.., groups, heads, stride * dim]
            keys = part.keys().unflatten(1, (-1, stride)).transpose(2, 3).flatten(3)
        queries = part.queries().unflatten(3, (-1, stride)).flip(4).flatten(4)
        logits = part.scores(queries, keys, 1 / stride)
        weights = softmax_over(logits, part.sees(stride, stride)[:, None, None])
        found.append(weights.sum(-2).unflatten(-1, (-1, grid.block_size // stride)).sum(-1))
    return torch.cat(found).flatten(1, 2).transpose(0, 1)


def blocks_above(scores: Tensor, seen: Tensor, fraction: float | Tensor) -> Tensor:
    """Choose the blocks whose score is at least a fraction of the largest one.

    Args:
        scores: ``[heads, query_blocks, key_blocks]``, >= 0 where seen.
        seen: where any query sees any key, ``[query_blocks, key_blocks]``.
        fraction: from 0 to 1; a number, or one of each query block, ``[query_blocks, 1]``.

    Returns:
        Booleans like ``scores``. What they say of blocks that are not seen does not matter.
    """
    if _chooses_by_kernel(scores):
        return block_launch.chosen(scores, seen, None, "above", fraction)
    return scores >= fraction * scores.masked_fill(~seen, 0.0).amax(-1, keepdim=True)


def heaviest_blocks(scores: Tensor, seen: Tensor, forced: Tensor, share: float | Tensor) -> Tensor:
    """Choose the blocks with the largest mass, the forced ones before all others, until they hold enough of it.

    Args:
        scores: masses ``[heads, query_blocks, key_blocks]``, >= 0 where seen.
        seen: where any query sees any key, ``[query_blocks, key_blocks]``.
        forced: which of these are kept in any case.
        share: how much of the mass they are to hold, from 0 to 1; a number, or one of each query block,
            ``[query_blocks, 1]``.

    Returns:
        Booleans like ``scores``; of equal blocks the lower is chosen. What they say of forced blocks and of those not
        seen does not matter.
    """
    if _chooses_by_kernel(scores):
        return block_launch.chosen(scores, seen, forced, "heaviest", share)
    order = _largest_first(scores, seen, forced)
    mass = scores.masked_fill(~seen, 0.0).gather(-1, order)
    before = mass.cumsum(-1) - mass
    return _in_order(before < share * mass.sum(-1, keepdim=True), order)


def largest_blocks(scores: Tensor, seen: Tensor, forced: Tensor, share: float | Tensor) -> Tensor:
    """Choose a share of the blocks that are seen, rounded up: the forced ones, then those with the largest scores.

    Args:
        scores: ``[heads, query_blocks, key_blocks]``, not NaN where seen.
        seen: where any query sees any key, ``[query_blocks, key_blocks]``.
        forced: which of these are kept in any case.
        share: from 0 to 1; a number, or one of each query block, FP64 ``[query_blocks, 1]``.

    Returns:
        Booleans like ``scores``, as :func:`heaviest_blocks` returns them.
    """
    if _chooses_by_kernel(scores):
        return block_launch.chosen(scores, seen, forced, "largest", share)
    number = seen.sum(-1, keepdim=True, dtype=torch.float64) * share
    rank = torch.arange(scores.shape[-1], device=scores.device)
    kept = rank < (number - 1e-9).ceil()  # 0.7 * 10 is a little more than 7
    return _in_order(kept.expand_as(scores), _largest_first(scores, seen, forced))


class BlockChoice(NamedTuple):
    """A choice of blocks by their scores, with the number that it depends on; made once for all layers of a forward.

    Attributes:
        rule: ``"above"``, ``"heaviest"`` or ``"largest"``: that of :func:`blocks_above`, :func:`heaviest_blocks` or
            :func:`largest_blocks`.
        number: the fraction or the share; a number, or one of each query block, ``[query_blocks, 1]``.
    """

    rule: Literal["above", "heaviest", "largest"]
    number: float | Tensor

    def chosen(self, scores: Tensor, seen: Tensor, forced: Tensor) -> Tensor:
        """Return the blocks that are chosen, as the function of the rule does."""
        if self.rule == "above":
            return blocks_above(scores, seen, self.number)
        choose = heaviest_blocks if self.rule == "heaviest" else largest_blocks
        return choose(scores, seen, forced, self.number)

    def listed(self, scores: Tensor, seen: Tensor, forced: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return lists of the blocks that are chosen and seen, or forced, or None where no kernel makes them at once.

        Returns:
            ``counts`` and ``indices`` of :class:`~modelopt_lite.kernels.blocks.KeyBlocks`.
        """
        if _chooses_by_kernel(scores):
            return block_launch.listed_choice(scores, seen, forced, *self)
        return None


def softmax_over(logits: Tensor, seen: Tensor) -> Tensor:
    """Take the softmax over the last dimension where ``seen`` is true; 0 elsewhere, also in rows that see nothing."""
    weights: Tensor = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    return weights.masked_fill(~seen, 0.0)


def _largest_first(scores: Tensor, seen: Tensor, forced: Tensor) -> Tensor:
    """Order blocks: the forced ones, then the others by descending score, equal ones by number, then those not seen."""
    ranked = scores.masked_fill(~seen, -torch.inf).masked_fill(forced, torch.inf)
    return ranked.argsort(dim=-1, descending=True, stable=True)


def _in_order(values: Tensor, order: Tensor) -> Tensor:
    """Return ``values``, which are in the order of :func:`_largest_first`, by the blocks' numbers."""
    return torch.empty_like(values).scatter_(-1, order, values)


def skip_excess(grid: BlockGrid, selected: Tensor | None = None) -> Tensor | None:
    """Return what :func:`~modelopt_lite.kernels.block_launch.excess` finds, or None where its kernel does not run.

    On a GPU where it cannot run, it says once why.
    """
    if tl is None or not block_launch.runs_on(grid.request.q) or not _can_run(block_launch.excess_refusal(grid)):
        return None
    return block_launch.excess(grid, selected)


def _runs_kernels(grid: BlockGrid) -> bool:
    """Whether the kernels score; says once why, if they do not on a GPU."""
    return tl is not None and grid.request.q.is_cuda and grid.prepared(_scores_by_kernel)


def _scores_by_kernel(grid: BlockGrid) -> bool:
    return _can_run(block_launch.refusal(grid))


def _chooses_by_kernel(scores: Tensor) -> bool:
    """Whether the kernel chooses; says once why, if it does not on a GPU."""
    if tl is None or not block_launch.runs_on(scores):
        return False
    reason = None
    if scores.dtype != torch.float32:
        reason = f"scores are {scores.dtype}, not torch.float32"
    elif scores.shape[-1] > block_launch.MAX_COLUMNS:
        reason = f"there are {scores.shape[-1]} key blocks, more than {block_launch.MAX_COLUMNS}"
    return _can_run(reason)


def _can_run(reason: str | None) -> bool:
    if reason is not None:
        _warn_once(reason)
    return reason is None


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("key blocks are chosen with PyTorch operations, which are slow on a GPU: %s", reason)
