"""Attention kernels: tensors in, tensors out; nothing here knows a model or a configuration file."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..plan import AttentionPlan
from .blocked import AttentionStatistics, statistics_blocked
from .language import tl
from .operator import attention_operator
from .problem import AttentionProblem
from .top_n import top_n_plan

if tl is not None:
    from . import launch

__all__ = ["AttentionStatistics", "Backend", "attention", "attention_statistics"]

Backend: TypeAlias = Literal["auto", "triton", "torch"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NO_PLAN_NUMBERS = {"sparsity_n": 0, "sparsity_m": 4, "num_sink_tokens": 0, "dense_window_size": 64}


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
        backend: ``"torch"``, ``"triton"``, or ``"auto"``: triton for CUDA tensors, torch for all others.
        return_lse: also return the logarithm of each row's softmax denominator, without gradient. The output may
            round differently with it, and where a gradient is recorded.

    Returns:
        The output ``[total_q, query_heads, value_dim]`` in the type of ``q``, and if ``return_lse`` the logarithms
        ``[total_q, query_heads]`` in FP32 (FP64 for FP64 inputs). A row with no visible key, or in no sequence, is 0
        with -inf.

    Raises:
        ValueError: if an argument is wrong; the message names it. Starts and lengths are checked value by value on
            the CPU and by the torch backend; on a GPU the caller vouches for them, as a check would stall it.
        UnsupportedError: if the backend asked for cannot run these arguments.
    """
    problem = _checked_problem(
        q,
        k,
        v,
        (b_start_loc, b_seq_len, max_input_len),
        (b_start_loc_k, b_seq_len_k, max_input_len_k),
        is_causal,
        softmax_scale,
        {
            "sparsity_n": sparsity_n,
            "sparsity_m": sparsity_m,
            "num_sink_tokens": num_sink_tokens,
            "dense_window_size": dense_window_size,
        },
        plan,
        sliding_window,
        softcap,
        b_first_q,
        b_first_k,
    )
    fits = s_aux is None or (s_aux.shape == q.shape[1:2] and s_aux.is_floating_point() and s_aux.device == q.device)
    if not fits:
        raise ValueError(
            f"s_aux: {_describe(s_aux)}; must be floating-point [query_heads = {q.shape[1]}] on {q.device}"
        )
    use_triton = _choose_backend(backend, q, k, v, problem) == "triton"
    output, lse = attention_operator(q, k, v, s_aux, problem, use_triton, return_lse)
    return (output, lse) if return_lse else output


@torch.compiler.disable  # type: ignore[untyped-decorator] # a graph would hold every tile
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

    Runs on any device without waiting for it, at about half the cost of a forward pass of the torch backend, more if
    lengths differ.

    Raises:
        ValueError: if an argument is wrong; the message names it. Starts and lengths are checked value by value on the
            CPU alone.
    """
    problem = _checked_problem(
        q,
        k,
        k,
        (b_start_loc, b_seq_len, max_input_len),
        (b_start_loc_k, b_seq_len_k, max_input_len_k),
        is_causal,
        softmax_scale,
        NO_PLAN_NUMBERS,
        plan,
        sliding_window,
        softcap,
        b_first_q,
        b_first_k,
    )
    if q.device.type == "cpu":
        problem.check_values(q.shape[0], k.shape[0])
    with torch.autocast(q.device.type, enabled=False):
        return statistics_blocked(q, k, problem)


def _checked_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing_q: tuple[Tensor, Tensor, int],
    packing_k: tuple[Tensor | None, Tensor | None, int | None],
    is_causal: bool,
    softmax_scale: float | None,
    plan_numbers: dict[str, int],
    plan: AttentionPlan | None,
    sliding_window: int | None,
    softcap: float | None,
    first_q: Tensor | None,
    first_k: Tensor | None,
) -> AttentionProblem:
    """Check every argument but the values of starts and lengths."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not (isinstance(x, Tensor) and x.dim() == 3 and x.dtype in DTYPES):
            raise ValueError(f"{name}: {_describe(x)}; must be [tokens, heads, dim] in FP16, BF16, FP32 or FP64")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name}: {_describe(x)}; must have the type and device of q, {_describe(q)}")
        if 0 in x.shape[1:]:
            raise ValueError(f"{name}: {_describe(x)}; needs at least one head and one dimension")
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"k: head_dim is {k.shape[2]}; must be that of q, {q.shape[2]}")
    if k.shape[:2] != v.shape[:2]:
        raise ValueError(f"v: {_describe(v)}; must have the tokens and heads of k, {_describe(k)}")
    if q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"q: {q.shape[1]} query heads are not allowed; a multiple of the {k.shape[1]} key/value heads")
    if all(x is None for x in packing_k):
        if q.shape[0] != k.shape[0]:
            raise ValueError(f"k: {k.shape[0]} rows, q has {q.shape[0]}; then b_start_loc_k is needed")
        packing_k = packing_q
    starts_q, lengths_q, max_q = _checked_packing("", packing_q, q)
    starts_k, lengths_k, max_k = _checked_packing("_k", packing_k, q)
    if starts_q.shape != starts_k.shape:
        raise ValueError(f"b_start_loc_k: {starts_k.shape[0]} sequences; must be {starts_q.shape[0]}")
    if not isinstance(is_causal, bool):
        raise ValueError(f"is_causal: {is_causal!r} is not allowed; True or False")
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    if not _is_positive(scale):
        raise ValueError(f"softmax_scale: {softmax_scale!r} is not allowed; a finite number > 0")
    if sliding_window is not None and not _is_count(sliding_window, 1):
        raise ValueError(f"sliding_window: {sliding_window!r} is not allowed; an integer >= 1")
    if softcap is not None and not _is_positive(softcap):
        raise ValueError(f"softcap: {softcap!r} is not allowed; a finite number > 0")
    if plan is None:
        for name, number in plan_numbers.items():
            if not _is_count(number, 0):
                raise ValueError(f"{name}: {number!r} is not allowed; an integer >= 0")
        plan = top_n_plan(*plan_numbers.values())
    else:
        if not isinstance(plan, AttentionPlan):
            raise ValueError(f"plan: {plan!r} is not allowed; an AttentionPlan")
        given = [name for name, number in plan_numbers.items() if number != NO_PLAN_NUMBERS[name]]
        if given:
            raise ValueError(f"{', '.join(given)}: not allowed together with plan; the plan says it all")
    for name, first in (("b_first_q", first_q), ("b_first_k", first_k)):
        if first is not None:
            _check_integers(name, first, q)
            if first.shape != starts_q.shape:
                raise ValueError(f"{name}: {first.shape[0]} sequences; must be {starts_q.shape[0]}")
    return AttentionProblem(
        starts_q,
        lengths_q,
        max_q,
        starts_k,
        lengths_k,
        max_k,
        is_causal,
        float(scale),
        sliding_window,
        softcap,
        plan,
        first_q,
        first_k,
    )


def _checked_packing(
    suffix: str, packing: tuple[Tensor | None, Tensor | None, int | None], q: Tensor
) -> tuple[Tensor, Tensor, int]:
    starts, lengths, longest = packing
    if starts is None or lengths is None or longest is None:
        raise ValueError("b_start_loc_k, b_seq_len_k, max_input_len_k: some are missing; give all three or none")
    for name, x in (("b_start_loc", starts), ("b_seq_len", lengths)):
        _check_integers(f"{name}{suffix}", x, q)
    if starts.shape != lengths.shape:
        raise ValueError(f"b_seq_len{suffix}: {lengths.shape[0]} sequences; b_start_loc{suffix} has {starts.shape[0]}")
    if not _is_count(longest, 0):
        raise ValueError(f"max_input_len{suffix}: {longest!r} is not allowed; an integer >= 0")
    return starts, lengths, longest


def _check_integers(name: str, x: object, q: Tensor) -> None:
    if not (isinstance(x, Tensor) and x.dim() == 1 and x.dtype in (torch.int32, torch.int64) and x.device == q.device):
        raise ValueError(f"{name}: {_describe(x)}; must be int32 or int64 [batch] on {q.device}")


def _choose_backend(backend: Backend, q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem) -> Backend:
    if backend not in get_args(Backend):
        raise ValueError(f"backend: {backend!r} is not allowed; one of {get_args(Backend)}")
    if backend == "torch" or (backend == "auto" and not q.is_cuda):
        return "torch"
    refusal: str | None
    refusal = "Triton is not installed" if tl is None else launch.refusal(q, k, v, problem.plan)
    if refusal is None:
        return "triton"
    if backend == "triton":
        raise UnsupportedError(f"backend: 'triton' cannot run this: {refusal}")
    return "torch"


def _is_count(x: object, least: int) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= least


def _is_positive(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) and x > 0


def _describe(x: object) -> str:
    if not isinstance(x, Tensor):
        return repr(x)
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
