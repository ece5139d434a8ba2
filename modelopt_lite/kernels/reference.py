"""The oracle: what every kernel computes, in FP64, one sequence at a time, written to be read.

It holds all scores of a sequence at once, so memory is quadratic in the length; use it to check, not to run models.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from ..plan import BlockSelector, SkipRule
from .blocks import visible_keys
from .request import AttentionRequest, PackedSequence


def attention_reference(request: AttentionRequest) -> tuple[Tensor, Tensor]:
    """Compute attention by its definition.

    Args:
        request: tensors, lengths, masks, scale and plan. Lists of key blocks, if it has them, take the place of the
            plan's selector and skip rule.

    Returns:
        The output, ``[total_q, query_heads, value_dim]``, FP64 and differentiable, and the logarithms of the softmax
        denominators, ``[total_q, query_heads]``, FP64. Rows of no sequence are 0 and -inf. Rows are where
        ``output_rows`` says.
    """
    request = request.without_pages()
    q, k, v = request.q.double(), request.k.double(), request.v.double()
    output = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_full(q.shape[:2], -torch.inf)
    for number, sequence in enumerate(request.sequences()):
        rows, keys = sequence.queries, sequence.keys
        listed = listed_blocks(request, number)
        scores = kept_scores(q[rows], k[keys], request, sequence.first_q, sequence.first_k, listed)
        output[rows], lse[rows] = _softmax(scores, v[keys], request.s_aux)
    return request.placed(output), request.placed(lse)


def kept_scores(
    q: Tensor,
    k: Tensor,
    request: AttentionRequest,
    first_q: int | None = None,
    first_k: int = 0,
    listed: Tensor | None = None,
) -> Tensor:
    """Return one sequence's scores, ``-inf`` for every key that takes no part in the softmax.

    Args:
        q: ``[len_q, query_heads, head_dim]``, FP64.
        k: ``[len_k, kv_heads, head_dim]``, FP64.
        request: masks, scale and plan.
        first_q: position of the first query, counted from the sequence's first token; None if the queries are the last.
        first_k: position of the first key.
        listed: which key blocks the request lists for this sequence, from :func:`listed_blocks`.

    Returns:
        ``[query_heads, len_q, len_k]``.
    """
    len_q, end_k = q.shape[0], first_k + k.shape[0]
    plan = request.plan_for(len_q)
    padding = (first_k % plan.group, -end_k % plan.group)  # to whole groups, with keys that are not visible
    q_pos = torch.arange(len_q, device=q.device) + (end_k - len_q if first_q is None else first_q)
    k_pos = torch.arange(first_k - padding[0], end_k + padding[1], device=q.device)
    behind = q_pos[:, None] - k_pos  # [len_q, keys]

    visible = (k_pos >= first_k) & (k_pos < end_k) & visible_keys(request, q_pos[:, None], k_pos)

    scores = pad(model_scores(q, k, request), padding).masked_fill(~visible, -torch.inf)

    kept = visible.expand_as(scores)
    has_blocks = len_q > 0 and k.shape[0] > 0
    if plan.keep is not None:
        groups = scores.detach().unflatten(-1, (-1, plan.group))
        kept = kept & plan.keep(groups, q_pos[:, None, None], k_pos.unflatten(0, (-1, plan.group))).flatten(-2)
    if listed is None and plan.blocks is not None and has_blocks:
        here = slice(padding[0], padding[0] + k.shape[0])
        listed = selected_blocks(SequenceBlocks(q, k, q_pos, k_pos[here], visible[:, here], request), plan.blocks)
    if listed is not None and has_blocks:
        size, rows = request.grid
        query_block, key_block = _numbers(q_pos, rows), _numbers(k_pos, size)
        kept = kept & listed.repeat_interleave(len(scores) // len(listed), 0)[:, query_block][:, :, key_block]

    sink = k_pos < plan.num_sink_tokens
    recent = (behind >= 0) & (behind < plan.dense_window_size)
    exempt = visible & (sink | recent)
    kept = kept | exempt
    if plan.skip is not None and request.blocks is None and has_blocks:
        skip = plan.skip.of_decode() if len_q == 1 else plan.skip
        kept = kept & ~_skipped(scores.detach(), visible, kept, exempt, q_pos, k_pos, skip)
    return scores.masked_fill(~kept, -torch.inf)[..., padding[0] :][..., : k.shape[0]]


def model_scores(q: Tensor, k: Tensor, request: AttentionRequest) -> Tensor:
    """Return the scores ``[query_heads, n, m]`` of ``[n, query_heads, dim]`` and ``[m, kv_heads, dim]``."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return _scaled(torch.einsum("qhd,khd->hqk", q, k), request)


def _scaled(products: Tensor, request: AttentionRequest) -> Tensor:
    scores = request.softmax_scale * products
    if request.softcap is not None:
        scores = request.softcap * torch.tanh(scores / request.softcap)
    return scores


class SequenceBlocks(NamedTuple):
    """One sequence as the reference of a block selector sees it.

    Attributes:
        q: queries, ``[len_q, query_heads, head_dim]``, FP64.
        k: keys, ``[len_k, kv_heads, head_dim]``, FP64.
        q_pos: positions of the queries, ``[len_q]``, counted from the sequence's first token.
        k_pos: positions of the keys, ``[len_k]``.
        visible: which keys each query sees, ``[len_q, len_k]``.
        request: scale, softcap and plan.
    """

    q: Tensor
    k: Tensor
    q_pos: Tensor
    k_pos: Tensor
    visible: Tensor
    request: AttentionRequest

    @classmethod
    def of(cls, request: AttentionRequest, sequence: PackedSequence) -> SequenceBlocks:
        """Return the view of one sequence of a request."""
        q, k = request.q[sequence.queries].double(), request.k[sequence.keys].double()
        q_pos = sequence.first_q + torch.arange(q.shape[0], device=q.device)
        k_pos = sequence.first_k + torch.arange(k.shape[0], device=k.device)
        return cls(q, k, q_pos, k_pos, visible_keys(request, q_pos[:, None], k_pos), request)

    def queries_in(self, size: int) -> Tensor:
        """Return which queries are in each block of ``size`` positions, FP64 zeros and ones ``[blocks, len_q]``."""
        return _members(self.q_pos, size)

    def keys_in(self, size: int) -> Tensor:
        """Return which keys are in each block of ``size`` positions, FP64 zeros and ones ``[blocks, len_k]``."""
        return _members(self.k_pos, size)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the scores ``[query_heads, n, m]`` of ``[n, query_heads, dim]`` and ``[m, kv_heads, dim]``."""
        return model_scores(q, k, self.request)

    def scale(self, products: Tensor) -> Tensor:
        """Scale and cap products of queries and keys as the model does."""
        return _scaled(products, self.request)


def selected_blocks(view: SequenceBlocks, selector: BlockSelector) -> Tensor:
    """Return which key blocks a selector keeps in one sequence, by its reference.

    Returns:
        ``[heads, query_blocks, key_blocks]``, numbered from the blocks of the first query and of the first key;
        ``heads`` is the number of query heads, or that of heads of keys if these share a choice.
    """
    size, rows = selector.block_size, selector.block_rows
    seen = view.queries_in(rows) @ view.visible.double() @ view.keys_in(size).T > 0
    query_block = torch.arange(seen.shape[0], device=seen.device)[:, None] + view.q_pos[:1] // rows
    key_block = torch.arange(seen.shape[1], device=seen.device) + view.k_pos[:1] // size
    forced = key_block < selector.first_blocks
    if selector.recent_blocks:
        first_diagonal = query_block * (rows // size)
        end_of_diagonal = first_diagonal + rows // size
        recent = (key_block > first_diagonal - selector.recent_blocks) & (key_block < end_of_diagonal)
        forced = forced | recent
    scores = selector.reference(view)
    if selector.per_kv_head:
        scores = scores.unflatten(0, (view.k.shape[1], -1)).sum(1)
    return seen & (forced | selector.choose(scores, seen, forced & seen))


def listed_blocks(request: AttentionRequest, number: int) -> Tensor | None:
    """Return which key blocks a request lists for a sequence, ``[heads, query_blocks, key_blocks]``; None if all."""
    if request.blocks is None or request.is_decode(int(request.lengths_q[number])):
        return None
    return request.blocks.mask()[:, int(request.blocks.starts[number]) :]


def _skipped(
    scores: Tensor, visible: Tensor, kept: Tensor, exempt: Tensor, q_pos: Tensor, k_pos: Tensor, skip: SkipRule
) -> Tensor:
    """Return which scores skip-softmax drops, ``[heads, queries, keys]``, of those that are kept so far."""
    in_query_block, in_key_block = _members(q_pos, skip.block_rows), _members(k_pos, skip.block_size)
    query_block, key_block = _numbers(q_pos, skip.block_rows), _numbers(k_pos, skip.block_size)
    diagonal = q_pos[:, None] // skip.block_rows == k_pos // skip.block_rows
    is_reference = kept & (exempt | diagonal)
    reference = scores.masked_fill(~is_reference, -torch.inf).amax(-1, keepdim=True)
    others = kept & ~is_reference
    blocks_seen = in_query_block @ visible.double() @ in_key_block.T > 0
    log_threshold = skip.log_threshold(blocks_seen.sum(-1, keepdim=True) * skip.block_size)[query_block]
    matter = others & (scores >= reference + log_threshold)
    # One score that matters keeps the block for all queries.
    blocks_kept = in_query_block @ matter.double() @ in_key_block.T > 0
    return others & ~blocks_kept[:, query_block][:, :, key_block]


def _numbers(positions: Tensor, size: int) -> Tensor:
    """Return the block of each position, counted from that of the first one."""
    return positions // size - positions[0] // size


def _members(positions: Tensor, size: int) -> Tensor:
    """Return which positions are in each block, FP64 zeros and ones ``[blocks, positions]``."""
    return one_hot(_numbers(positions, size)).T.double()


def _softmax(scores: Tensor, v: Tensor, s_aux: Tensor | None) -> tuple[Tensor, Tensor]:
    v = v.repeat_interleave(scores.shape[0] // v.shape[1], dim=1)
    # Softmax, with 0 for a row that keeps nothing.
    highest = scores.new_full(scores.shape[:2], torch.finfo(scores.dtype).min)
    if v.shape[0]:
        highest = highest.maximum(scores.detach().amax(-1))
    if s_aux is not None:
        highest = highest.maximum(s_aux.detach().double()[:, None])
    weights = torch.exp(scores - highest[..., None])
    total = weights.sum(-1)
    if s_aux is not None:
        total = total + torch.exp(s_aux.double()[:, None] - highest)
    weights = weights / torch.where(total == 0, 1.0, total)[..., None]
    output = torch.einsum("hqk,khd->qhd", weights, v)
    # A constant, so that nothing gets a gradient from such a row, not even 0 times NaN.
    output = output.masked_fill(~(scores > -torch.inf).any(-1).T[..., None], 0.0)
    return output, (highest + total.detach().log()).T
