"""Attention kernels: tensors in, tensors out; nothing here knows a model or a configuration file."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..plan import AttentionPlan
from .arguments import check_request, is_count
from .blocks import KeyBlocks
from .choice import Backend, Prepared, Run, prepared, run
from .operator import compute, gradients, hold, is_traced, pack
from .request import MAX_QUERIES, AttentionRequest
from .sdpa import sdpa, sdpa_call
from .selection import count_visited, select_blocks
from .statistics import COUNTS, AttentionStatistics, check_packing, count, count_prefill, with_lists
from .top_n import top_n_plan

__all__ = [
    "COUNTS",
    "MAX_QUERIES",
    "AttentionRequest",
    "AttentionStatistics",
    "Backend",
    "KeyBlocks",
    "Prepared",
    "Run",
    "attention",
    "attention_statistics",
    "compute",
    "count_kept",
    "count_prefill",
    "gradients",
    "hold",
    "is_traced",
    "pack",
    "prepared",
    "request_statistics",
    "run",
    "sdpa",
    "sdpa_call",
    "select_blocks",
    "visited_blocks",
    "with_lists",
]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b_start_loc: Tensor,
    b_seq_len: Tensor,
    max_input_len: int,
    is_causal: bool = True,
    softmax_scale: float | None = None,
    b_start_loc_k: Tensor | None = None,
    b_seq_len_k: Tensor | None = None,
    max_input_len_k: int | None = None,
    *,
    b_first_q: Tensor | None = None,
    b_first_k: Tensor | None = None,
    sparsity_n: int = 0,
    sparsity_m: int = 4,
    num_sink_tokens: int = 0,
    dense_window_size: int = 64,
    plan: AttentionPlan | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    blocks: KeyBlocks | None = None,
    backend: Backend = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute (sparse) softmax attention over packed sequences; differentiable in ``q``, ``k``, ``v`` and ``s_aux``.

    Sequence ``b`` owns rows ``b_start_loc[b] : b_start_loc[b] + b_seq_len[b]`` of ``q``, and likewise of ``k`` and
    ``v``. With more keys than queries (chunked prefill, decode) the queries are the sequence's last tokens. Without
    the three ``_k`` arguments, keys have the layout of the queries. Sequences may share rows of ``k`` and ``v``; the
    gradient of such a row is their sum on the torch backend, but incomplete on the triton backend, where all write to
    it and what came last stays, which may differ from run to run.

    Args:
        q: queries, ``[total_q, query_heads, head_dim]``; FP16, BF16, FP32 or FP64.
        k: keys, ``[total_k, kv_heads, head_dim]``; ``query_heads`` is a multiple of ``kv_heads``.
        v: values, ``[total_k, kv_heads, value_dim]``.
        b_start_loc: first row of each sequence in ``q``, ``[batch]``, integers.
        b_seq_len: number of queries of each sequence, ``[batch]``, integers; 0 is allowed.
        max_input_len: an upper bound of ``b_seq_len``.
        is_causal: whether a query sees only keys at its own position and before.
        softmax_scale: factor on the scores, > 0; by default ``head_dim ** -0.5``.
        b_start_loc_k: first row of each sequence in ``k`` and ``v``, ``[batch]``.
        b_seq_len_k: number of keys of each sequence, ``[batch]``; if causal, at least its number of queries.
        max_input_len_k: an upper bound of ``b_seq_len_k``.
        sparsity_n: short for a plan of N:M sparse softmax: keys kept of each group; 0 is dense.
        sparsity_m: keys in a group, 2, 4, 8 or 16.
        num_sink_tokens: leading keys of each sequence that are always kept.
        dense_window_size: most recent keys of each query that are always kept, itself included.
        plan: any other sparsity, instead of the four numbers before.
        b_first_q: position of each sequence's first query, ``[batch]``; by default the queries are the last tokens.
            Positions count from the sequence's first token.
        b_first_k: position of each sequence's first key, ``[batch]``, for a cache that has dropped the keys before
            it; by default 0.
        sliding_window: a query sees only the keys fewer than ``sliding_window`` positions away from it, >= 1.
        softcap: scores become ``softcap * tanh(scores / softcap)``; > 0.
        s_aux: a further logit per query head in every softmax, without a value (a learnable sink),
            ``[query_heads]``.
        blocks: lists of the key blocks that each query block looks at; not together with a plan that chooses them.
        backend: ``"torch"``, ``"triton"``, or ``"auto"``: triton for CUDA tensors, torch for all others.
        return_lse: also return the logarithm of each row's softmax denominator, without gradient. The output may
            round differently with it, and where a gradient is recorded.

    Returns:
        The output ``[total_q, query_heads, value_dim]`` in the type of ``q``, and if ``return_lse`` the logarithms
        ``[total_q, query_heads]`` in FP32 (FP64 for FP64 inputs). A row in no sequence is 0 with -inf, and so is one
        that keeps no key, whose logarithm is ``s_aux`` if it is given.

    Raises:
        ValueError: if an argument is wrong; the message names it. Starts and lengths are checked value by value on
            the CPU and by the torch backend. On a GPU they are not checked, as a check would stall it.
        UnsupportedError: if the backend asked for cannot run these arguments.
    """
    if plan is None or sparsity_n != 0 or num_sink_tokens != 0 or sparsity_m != 4 or dense_window_size != 64:
        plan = _plan(plan, sparsity_n, sparsity_m, num_sink_tokens, dense_window_size)
    if b_start_loc_k is None and b_seq_len_k is None and max_input_len_k is None:
        _check_rows(q, k)
        b_start_loc_k, b_seq_len_k, max_input_len_k = b_start_loc, b_seq_len, max_input_len
    # In the order of the fields, as short calls take Python longer than the GPU: by names, it takes twice as long.
    request = AttentionRequest(
        q, k, v, s_aux,
        b_start_loc, b_seq_len, max_input_len,
        b_start_loc_k, b_seq_len_k, max_input_len_k,  # type: ignore[arg-type] # checked later, as all are
        is_causal, _scale(q, softmax_scale), sliding_window, softcap, plan, b_first_q, b_first_k,
        with_lse=return_lse,
        blocks=None if blocks is None else _blocks(blocks, plan),
    )  # fmt: skip
    try:
        output, lse = compute(request, backend)
    except (AttributeError, TypeError):
        try:
            check_request(request)  # says which argument is of a wrong type
        except ValueError as refused:
            raise refused from None
        raise
    return (output, cast(Tensor, lse)) if return_lse else output


def attention_statistics(
    q: Tensor,
    k: Tensor,
    b_start_loc: Tensor,
    b_seq_len: Tensor,
    max_input_len: int,
    is_causal: bool = True,
    softmax_scale: float | None = None,
    b_start_loc_k: Tensor | None = None,
    b_seq_len_k: Tensor | None = None,
    max_input_len_k: int | None = None,
    *,
    b_first_q: Tensor | None = None,
    b_first_k: Tensor | None = None,
    plan: AttentionPlan,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> AttentionStatistics:
    """Measure what a plan keeps, without computing the attention; arguments as in :func:`attention`.

    Runs on any device without waiting for it. It computes all scores once more: on a GPU in a kernel, unless the plan
    has a rule without a hook, and else as the torch backend does, which costs about half of its forward pass.

    Raises:
        ValueError: if an argument is wrong; the message names it. Starts and lengths are checked value by value on the
            CPU alone.
    """
    request = _request(
        q, k, k, (b_start_loc, b_seq_len, max_input_len), (b_start_loc_k, b_seq_len_k, max_input_len_k), softmax_scale,
        s_aux=None, is_causal=is_causal, sliding_window=sliding_window, softcap=softcap, plan=plan,
        first_q=b_first_q, first_k=b_first_k,
    )  # fmt: skip
    return request_statistics(request)


def request_statistics(request: AttentionRequest) -> AttentionStatistics:
    """Measure what the plan of a request keeps; as :func:`attention_statistics`."""
    return AttentionStatistics.of_counts(count_kept(request))


@torch.compiler.disable  # type: ignore[untyped-decorator] # a graph would hold every tile
def count_kept(request: AttentionRequest) -> Tensor:
    """Count what the plan of a request keeps; see :func:`~modelopt_lite.kernels.statistics.count`."""
    check_packing(request)
    with torch.autocast(request.q.device.type, enabled=False):
        return count(request)


@torch.compiler.disable  # type: ignore[untyped-decorator] # it belongs to no graph
def visited_blocks(request: AttentionRequest, plans: Sequence[AttentionPlan]) -> tuple[Tensor, Tensor]:
    """Count the key blocks that each of several plans visits; see :func:`~.selection.count_visited`."""
    check_request(request)
    with torch.autocast(request.q.device.type, enabled=False):
        return count_visited(request, plans)


def _request(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: tuple[Tensor, Tensor, int],
    keys: tuple[Tensor | None, Tensor | None, int | None],
    softmax_scale: float | None,
    **fields: Any,
) -> AttentionRequest:
    """Make a request; starts, lengths and longest of the keys are by default those of the queries."""
    if keys[0] is None and keys[1] is None and keys[2] is None:
        _check_rows(q, k)
        keys = queries
    starts_q, lengths_q, max_q = queries
    starts_k, lengths_k, max_k = keys
    return AttentionRequest(
        q=q,
        k=k,
        v=v,
        starts_q=starts_q,
        lengths_q=lengths_q,
        max_q=max_q,
        starts_k=starts_k,  # type: ignore[arg-type] # checked later, as all are
        lengths_k=lengths_k,  # type: ignore[arg-type]
        max_k=max_k,  # type: ignore[arg-type]
        softmax_scale=_scale(q, softmax_scale),
        **fields,
    )


def _check_rows(q: Tensor, k: Tensor) -> None:
    """Check that there are as many keys as queries, where nothing else is said of them."""
    if isinstance(q, Tensor) and isinstance(k, Tensor) and q.shape[:1] != k.shape[:1]:
        raise ValueError(f"k: {k.shape[0]} rows, q has {q.shape[0]}; then b_start_loc_k is needed")


def _scale(q: Tensor, softmax_scale: float | None) -> float:
    if softmax_scale is None:
        return q.shape[-1] ** -0.5 if isinstance(q, Tensor) and q.dim() and q.shape[-1] else 1.0
    # Other types stay as they are, to be refused.
    return float(softmax_scale) if type(softmax_scale) is int else softmax_scale


def _blocks(blocks: KeyBlocks, plan: AttentionPlan | None) -> KeyBlocks:
    if isinstance(plan, AttentionPlan) and plan.chooses_blocks:
        raise ValueError("blocks: not allowed together with a plan that chooses blocks itself; give one of them")
    return blocks


def _plan(plan: AttentionPlan | None, sparsity_n: int, sparsity_m: int, sinks: int, window: int) -> AttentionPlan:
    """Return the plan that is given, or that of four numbers; both are refused."""
    if plan is None:
        return _plan_of_numbers(sparsity_n, sparsity_m, sinks, window)
    numbers = {
        "sparsity_n": (sparsity_n, 0),
        "sparsity_m": (sparsity_m, 4),
        "num_sink_tokens": (sinks, 0),
        "dense_window_size": (window, 64),
    }
    given = [name for name, (number, default) in numbers.items() if number != default]
    if given:
        raise ValueError(f"{', '.join(given)}: not allowed together with plan; the plan says it all")
    return plan


@functools.lru_cache(maxsize=None, typed=True)
def _plan_of_numbers(sparsity_n: int, sparsity_m: int, num_sink_tokens: int, dense_window_size: int) -> AttentionPlan:
    numbers = {"sparsity_n": sparsity_n, "sparsity_m": sparsity_m}
    for name, number in {**numbers, "num_sink_tokens": num_sink_tokens, "dense_window_size": dense_window_size}.items():
        if not is_count(number, 0):
            raise ValueError(f"{name}: {number!r} is not allowed; an integer >= 0")
    return top_n_plan(sparsity_n, sparsity_m, num_sink_tokens, dense_window_size)
