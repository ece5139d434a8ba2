"""The oracle: what every kernel computes, in FP64, one sequence at a time, written to be read.

It holds all scores of a sequence at once, so memory is quadratic in the length; use it to check, not to run models.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .problem import AttentionProblem


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, problem: AttentionProblem
) -> tuple[Tensor, Tensor]:
    """Compute attention by its definition.

    Args:
        q: packed queries of all sequences, ``[total_q, query_heads, head_dim]``.
        k: packed keys, ``[total_k, kv_heads, head_dim]``.
        v: packed values, ``[total_k, kv_heads, value_dim]``.
        s_aux: one more logit per query head in every softmax, ``[query_heads]``, without a value; or None.
        problem: lengths, masks, scale and plan.

    Returns:
        The output, ``[total_q, query_heads, value_dim]``, FP64 and differentiable, and the logarithms of the softmax
        denominators, ``[total_q, query_heads]``, FP64. Rows of no sequence are 0 and -inf.
    """
    q, k, v = q.double(), k.double(), v.double()
    output = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_full(q.shape[:2], -torch.inf)
    for queries, keys in problem.sequences():
        output[queries], lse[queries] = _one_sequence(q[queries], k[keys], v[keys], s_aux, problem)
    return output, lse


def _one_sequence(
    q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, problem: AttentionProblem
) -> tuple[Tensor, Tensor]:
    len_q, len_k, query_heads = q.shape[0], k.shape[0], q.shape[1]
    plan = problem.plan_for(len_q)
    padding = -len_k % plan.group  # to whole groups, with keys that are not visible
    q_pos = torch.arange(len_q, device=q.device) + len_k - len_q
    k_pos = torch.arange(len_k + padding, device=q.device)
    behind = q_pos[:, None] - k_pos  # [len_q, len_k + padding]

    visible = (k_pos < len_k).expand_as(behind)
    if problem.is_causal:
        visible = visible & (behind >= 0)
    if problem.sliding_window is not None:
        visible = visible & (behind < problem.sliding_window)

    k, v = (x.repeat_interleave(query_heads // x.shape[1], dim=1) for x in (k, v))
    scores = problem.softmax_scale * torch.einsum("qhd,khd->hqk", q, k)
    if problem.softcap is not None:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    scores = pad(scores, (0, padding)).masked_fill(~visible, -torch.inf)

    kept = visible
    if plan.keep is not None:
        groups = scores.detach().unflatten(-1, (-1, plan.group))
        chosen = plan.keep(groups, q_pos[:, None, None], k_pos.unflatten(0, (-1, plan.group))).flatten(-2)
        sink = k_pos < plan.num_sink_tokens
        recent = (behind >= 0) & (behind < plan.dense_window_size)
        kept = visible & (chosen | sink | recent)
    scores = scores.masked_fill(~kept, -torch.inf)

    # Softmax, with 0 for a row that keeps nothing.
    highest = (
        scores.detach().amax(-1).clamp(min=torch.finfo(scores.dtype).min) if len_k else q.new_zeros(scores.shape[:2])
    )
    if s_aux is not None:
        highest = highest.maximum(s_aux.detach().double()[:, None])
    weights = torch.exp(scores - highest[..., None])
    total = weights.sum(-1)
    if s_aux is not None:
        total = total + torch.exp(s_aux.double()[:, None] - highest)
    weights = weights / torch.where(total == 0, 1.0, total)[..., None]
    output = torch.einsum("hqk,khd->qhd", weights[..., :len_k], v)
    return output, (highest + total.detach().log()).T
