"""Checks a request before a kernel sees it."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..plan import GROUP_SIZES, AttentionPlan
from .blocks import KeyBlocks
from .request import AttentionRequest

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_checked_rules: set[str] = set()
"""Names of the plans whose rule was found to be right."""


def check_request(request: AttentionRequest) -> None:
    """Check everything but the values of starts and lengths.

    Raises:
        ValueError: naming the argument of :func:`modelopt_lite.kernels.attention`.
    """
    r, q = request, request.q
    _check_tensors(r)
    _check_packing("", r.starts_q, r.lengths_q, r.max_q, q)
    _check_packing("_k", r.starts_k, r.lengths_k, r.max_k, q)
    if r.starts_q.shape != r.starts_k.shape:
        raise ValueError(f"b_start_loc_k: {r.starts_k.shape[0]} sequences; must be {r.starts_q.shape[0]}")
    for name, first in (("b_first_q", r.first_q), ("b_first_k", r.first_k)):
        if first is not None:
            _check_integers(name, first, q)
            if first.shape != r.starts_q.shape:
                raise ValueError(f"{name}: {first.shape[0]} sequences; must be {r.starts_q.shape[0]}")
    if r.output_rows is not None and not (
        r.output_rows.dtype == torch.int64 and r.output_rows.shape == q.shape[:1] and r.output_rows.device == q.device
    ):
        raise ValueError(f"output_rows: {describe(r.output_rows)}; must be int64 [{q.shape[0]}] on {q.device}")
    _check_pages(r)
    if not isinstance(r.is_causal, bool):
        raise ValueError(f"is_causal: {r.is_causal!r} is not allowed; True or False")
    if not _is_positive(r.softmax_scale):
        raise ValueError(f"softmax_scale: {r.softmax_scale!r} is not allowed; a finite number > 0")
    if r.sliding_window is not None and not is_count(r.sliding_window, 1):
        raise ValueError(f"sliding_window: {r.sliding_window!r} is not allowed; an integer >= 1")
    if r.softcap is not None and not _is_positive(r.softcap):
        raise ValueError(f"softcap: {r.softcap!r} is not allowed; a finite number > 0")
    if not isinstance(r.plan, AttentionPlan):
        raise ValueError(f"plan: {r.plan!r} is not allowed; an AttentionPlan")
    if r.blocks is not None:
        _check_blocks(r, r.blocks)


def check_rule(plan: AttentionPlan, device: torch.device) -> None:
    """Check a plan's rule in PyTorch: that it returns what it has to, and decides each group of each query by itself.

    Kernels call the rule with one tile of scores at a time, so a rule that looks at more would keep what the tile size
    decides. Here it sees random scores whole, and cut in three ways.

    Args:
        plan: the plan; a dense one has no rule.
        device: where to call the rule.

    Raises:
        UnsupportedError: if the rule is wrong in one of these ways.
    """
    if plan.keep is None or plan.name in _checked_rules:
        return
    keep = plan.keep
    generator = torch.Generator("cpu").manual_seed(0)
    heads, queries, groups = 2, 3, 512
    scores = 3 * torch.randn(heads, queries, groups, plan.group, generator=generator, device="cpu")
    # A group has to be visible in part, too.
    behind = torch.tensor([1, plan.group // 2 + 1, 40 * plan.group], device="cpu")
    last_visible = groups * plan.group - behind[:, None, None]
    k_pos = torch.arange(groups * plan.group, device="cpu").unflatten(0, (groups, plan.group))
    visible = (k_pos <= last_visible).expand_as(scores).to(device)
    scores, k_pos, q_pos = (
        scores.to(device).masked_fill(~visible, -torch.inf),
        k_pos.to(device),
        last_visible.to(device),
    )

    def kept(head: slice = slice(None), row: slice = slice(None), column: slice = slice(None)) -> Tensor:
        seen = scores[head, row, column].clone()
        found: object = keep(seen, q_pos[row], k_pos[column])
        if not isinstance(found, Tensor) or found.dtype != torch.bool or found.shape != seen.shape:
            raise UnsupportedError(
                f"the rule of the plan returns {describe(found)} for scores {list(seen.shape)}; it must return "
                "booleans of the shape of the scores"
            )
        if not torch.equal(seen, scores[head, row, column]):
            raise UnsupportedError("the rule of the plan changes the scores that it is given; it must work on a copy")
        return found.logical_and(visible[head, row, column])

    whole = kept()
    if not torch.equal(kept(), whole):
        raise UnsupportedError("the rule of the plan keeps other keys when it is called again with the same scores")
    cuts = pairwise((0, 1, 7, 8, 200, groups))
    by_part = {
        "heads": torch.cat([kept(head=slice(i, i + 1)) for i in range(heads)], 0),
        "queries": torch.cat([kept(row=slice(i, i + 1)) for i in range(queries)], 1),
        "groups": torch.cat([kept(column=slice(*cut)) for cut in cuts], 2),
    }
    for what, found in by_part.items():
        if not torch.equal(found, whole):
            raise UnsupportedError(
                f"the rule of the plan keeps other keys if it sees fewer {what} at a time, so that the tile size would "
                f"decide; a rule may look only at the scores of one query in one group (group_size = {plan.group})"
            )
    _checked_rules.add(plan.name)


def _check_tensors(r: AttentionRequest) -> None:
    q, k, v, s_aux = r.q, r.k, r.v, r.s_aux
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not (isinstance(x, Tensor) and x.dim() == 3 and x.dtype in DTYPES):
            raise ValueError(f"{name}: {describe(x)}; must be [tokens, heads, dim] in FP16, BF16, FP32 or FP64")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name}: {describe(x)}; must have the type and device of q, {describe(q)}")
        if 0 in x.shape[1:]:
            raise ValueError(f"{name}: {describe(x)}; needs at least one head and one dimension")
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"k: head_dim is {k.shape[2]}; must be that of q, {q.shape[2]}")
    if k.shape[:2] != v.shape[:2]:
        raise ValueError(f"v: {describe(v)}; must have the tokens and heads of k, {describe(k)}")
    if q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"q: {q.shape[1]} query heads are not allowed; a multiple of the {k.shape[1]} key/value heads")
    if s_aux is not None and not (
        isinstance(s_aux, Tensor)
        and s_aux.shape == q.shape[1:2]
        and s_aux.is_floating_point()
        and s_aux.device == q.device
    ):
        raise ValueError(f"s_aux: {describe(s_aux)}; must be floating-point [query_heads = {q.shape[1]}] on {q.device}")


def _check_packing(suffix: str, starts: object, lengths: object, longest: object, q: Tensor) -> None:
    if starts is None or lengths is None or longest is None:
        raise ValueError("b_start_loc_k, b_seq_len_k, max_input_len_k: some are missing; give all three or none")
    starts = _check_integers(f"b_start_loc{suffix}", starts, q)
    lengths = _check_integers(f"b_seq_len{suffix}", lengths, q)
    if starts.shape != lengths.shape:
        raise ValueError(f"b_seq_len{suffix}: {lengths.shape[0]} sequences; b_start_loc{suffix} has {starts.shape[0]}")
    if not is_count(longest, 0):
        raise ValueError(f"max_input_len{suffix}: {longest!r} is not allowed; an integer >= 0")


def _check_blocks(r: AttentionRequest, blocks: object) -> None:
    if not isinstance(blocks, KeyBlocks):
        raise ValueError(f"blocks: {blocks!r} is not allowed; KeyBlocks")
    size, rows = blocks.block_size, blocks.block_rows
    if not is_count(size, 1) or size % max(GROUP_SIZES):
        raise ValueError(f"blocks.block_size: {size!r} is not allowed; a multiple of {max(GROUP_SIZES)}")
    if not is_count(rows, 1) or rows % size:
        raise ValueError(f"blocks.block_rows: {rows!r} is not allowed; a multiple of block_size = {size}")
    heads = (r.q.shape[1], r.k.shape[1])
    counts, indices, starts = blocks.counts, blocks.indices, blocks.starts
    for name, x, dimensions in (("counts", counts, 2), ("indices", indices, 3), ("starts", starts, 1)):
        is_right = isinstance(x, Tensor) and x.dim() == dimensions and x.dtype == torch.int32
        if not (is_right and x.device == r.q.device):
            raise ValueError(
                f"blocks.{name}: {describe(x)}; must be int32 with {dimensions} dimensions on {r.q.device}"
            )
    if counts.shape[0] not in heads or indices.shape[:2] != counts.shape:
        raise ValueError(
            f"blocks: counts are {describe(counts)}, indices {describe(indices)}; must be [heads, query_blocks] and "
            f"[heads, query_blocks, key_blocks] with {heads[0]} (query) or {heads[1]} (key/value) heads"
        )
    if starts.shape != r.starts_q.shape:
        raise ValueError(f"blocks.starts: {starts.shape[0]} sequences; must be {r.starts_q.shape[0]}")


def _check_pages(r: AttentionRequest) -> None:
    if r.page_table is None:
        return
    table = r.page_table
    if not (table.dim() == 2 and table.dtype == torch.int32 and table.device == r.q.device):
        raise ValueError(f"page_table: {describe(table)}; must be int32 [batch, pages] on {r.q.device}")
    if table.shape[0] != r.starts_q.shape[0]:
        raise ValueError(f"page_table: {table.shape[0]} sequences; must be {r.starts_q.shape[0]}")
    if not is_count(r.page_size, 1) or r.k.shape[0] % r.page_size:
        raise ValueError(
            f"page_size: {r.page_size!r} is not allowed; >= 1, and a divisor of the {r.k.shape[0]} rows of k"
        )
    if r.q.requires_grad or r.k.requires_grad or r.v.requires_grad:
        raise ValueError("page_table: not allowed where gradients are wanted; they are for a cache")


def _check_integers(name: str, x: object, q: Tensor) -> Tensor:
    if not (isinstance(x, Tensor) and x.dim() == 1 and x.dtype in (torch.int32, torch.int64) and x.device == q.device):
        raise ValueError(f"{name}: {describe(x)}; must be int32 or int64 [batch] on {q.device}")
    return x


def is_count(x: object, least: int) -> bool:
    """Whether something is an integer of at least ``least``."""
    return isinstance(x, int | torch.SymInt) and not isinstance(x, bool) and bool(x >= least)


def _is_positive(x: object) -> bool:
    # Not by isfinite, which a graph cannot trace where the compiler has made a variable of the number.
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf


def describe(x: object) -> str:
    """Describe a value in an error message; a tensor by its type, shape and device."""
    if not isinstance(x, Tensor):
        return repr(x)
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
