"""The oracle: what every kernel computes, in FP64, one sequence at a time, written to be read.

It holds all scores of a sequence at once, so memory is quadratic in the length; use it to check, not to run models.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .request import AttentionRequest


def attention_reference(request: AttentionRequest) -> tuple[Tensor, Tensor]:
    """Compute attention by its definition.

    Args:
        request: tensors, lengths, masks, scale and plan.

    Returns:
        The output, ``[total_q, query_heads, value_dim]``, FP64 and differentiable, and the logarithms of the softmax
        denominators, ``[total_q, query_heads]``, FP64. Rows of no sequence are 0 and -inf.
    """
    request = request.without_pages()
    q, k, v = request.q.double(), request.k.double(), request.v.double()
    output = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_full(q.shape[:2], -torch.inf)
    for sequence in request.sequences():
        rows, keys = sequence.queries, sequence.keys
        scores = kept_scores(q[rows], k[keys], request, sequence.first_q, sequence.first_k)
        output[rows], lse[rows] = _softmax(scores, v[keys], request.s_aux)
    return output, lse


def kept_scores(
    q: Tensor, k: Tensor, request: AttentionRequest, first_q: int | None = None, first_k: int = 0
) -> Tensor:
    """Return one sequence's scores, ``-inf`` for every key that takes no part in the softmax.

    Args:
        q: ``[len_q, query_heads, head_dim]``, FP64.
        k: ``[len_k, kv_heads, head_dim]``, FP64.
        request: masks, scale and plan.
        first_q: position of the first query, counted from the sequence's first token; None if the queries are the last.
        first_k: position of the first key.

    Returns:
        ``[query_heads, len_q, len_k]``.
    """
    len_q, end_k = q.shape[0], first_k + k.shape[0]
    plan = request.plan_for(len_q)
    padding = (first_k % plan.group, -end_k % plan.group)  # to whole groups, with keys that are not visible
    q_pos = torch.arange(len_q, device=q.device) + (end_k - len_q if first_q is None else first_q)
    k_pos = torch.arange(first_k - padding[0], end_k + padding[1], device=q.device)
    behind = q_pos[:, None] - k_pos  # [len_q, keys]

    visible = ((k_pos >= first_k) & (k_pos < end_k)).expand_as(behind)
    if request.is_causal:
        visible = visible & (behind >= 0)
    if request.sliding_window is not None:
        visible = visible & (behind.abs() < request.sliding_window)

    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = request.softmax_scale * torch.einsum("qhd,khd->hqk", q, k)
    if request.softcap is not None:
        scores = request.softcap * torch.tanh(scores / request.softcap)
    scores = pad(scores, padding).masked_fill(~visible, -torch.inf)

    kept = visible
    if plan.keep is not None:
        groups = scores.detach().unflatten(-1, (-1, plan.group))
        chosen = plan.keep(groups, q_pos[:, None, None], k_pos.unflatten(0, (-1, plan.group))).flatten(-2)
        sink = k_pos < plan.num_sink_tokens
        recent = (behind >= 0) & (behind < plan.dense_window_size)
        kept = visible & (chosen | sink | recent)
    return scores.masked_fill(~kept, -torch.inf)[..., padding[0] :][..., : k.shape[0]]


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
    return output, (highest + total.detach().log()).T
