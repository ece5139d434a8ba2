"""Launches the Triton kernels: the one place that chooses tiles, warps and how keys are loaded."""

from __future__ import annotations

import functools
import logging
import os
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as SharedDescriptor
from triton.language import constexpr
from triton.tools.tensor_descriptor import TensorDescriptor

from ..plan import AttentionPlan
from . import sparse_cores
from .backward import gradient_of_keys, gradient_of_queries, gradient_rows
from .forward import attention_forward
from .hopper import ROWS, attention_forward_hopper, prepare
from .problem import AttentionProblem
from .tiles import LOG2E

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
FAR = 2**30
"""A distance in tokens beyond all others, with room to add the difference of two positions to it in 32 bits."""
L2_SHARE = 24 * 2**20
"""Bytes of keys and values of the heads that are computed at one time: half of the L2 cache of an A100 or H100."""


class Options(NamedTuple):
    """What a kernel knows at compile time beside the score hook."""

    block_m: int
    block_n: int
    block_d: int
    block_dv: int
    head_dim: int
    value_dim: int
    group: int
    causal: bool
    sliding: bool
    softcap: bool
    sinks: bool
    prescale: bool
    keeps_group_max: bool
    keeps_nothing: bool
    sparse_decode: bool
    frozen: bool
    hopper: bool
    placed: bool = False
    pair: int = 1


class Settings(NamedTuple):
    """How a kernel is launched; ``frozen`` is for the forward alone."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool
    frozen: bool


class SettingsRow(NamedTuple):
    """Settings for GPUs from ``capability`` on and everything up to the three other bounds."""

    capability: int
    itemsize: int
    block_d: int
    group: int
    settings: Settings


OLDEST = 80
"""Compute capability from which on GPUs have what the kernel needs."""
SMALL = 0
"""Compute capability that 8.6, 8.9 and 12.0 or later count as in the tables: these GPUs offer a program 99 KB of shared
memory, where 8.0 offers 163 KB, and multiply matrices as 8.0 does."""

# The first row that fits. Those of capability 90 for 16-bit types up to a dimension of 128 are what
# benchmarks/tune.py found fastest on an H200 with BF16; the others fit the GPU, and have not been timed.
# settings: block_m, block_n, num_warps, num_stages, descriptors, frozen
SETTINGS = (
    SettingsRow(100, 2, 128, 16, Settings(128, 64, 8, 2, True, False)),
    SettingsRow(100, 2, 256, 16, Settings(128, 32, 8, 2, True, False)),
    SettingsRow(90, 2, 64, 4, Settings(64, 64, 4, 3, True, True)),
    SettingsRow(90, 2, 64, 16, Settings(64, 128, 4, 2, True, True)),
    SettingsRow(90, 2, 128, 8, Settings(64, 64, 4, 3, True, True)),
    SettingsRow(90, 2, 128, 16, Settings(128, 128, 8, 2, True, True)),
    SettingsRow(90, 2, 256, 16, Settings(128, 64, 8, 2, True, False)),
    SettingsRow(SMALL, 2, 128, 16, Settings(128, 64, 8, 2, False, False)),
    SettingsRow(SMALL, 2, 256, 4, Settings(32, 32, 4, 2, False, False)),
    SettingsRow(SMALL, 2, 256, 16, Settings(16, 64, 4, 2, False, False)),
    SettingsRow(SMALL, 4, 64, 16, Settings(32, 32, 8, 1, False, False)),
    SettingsRow(SMALL, 4, 256, 16, Settings(16, 32, 8, 1, False, False)),
)
# The Hopper kernel's; block_m is 64 for each warpgroup, and the warps are those of one.
HOPPER_SETTINGS = (
    SettingsRow(90, 2, 64, 4, Settings(192, 64, 4, 4, True, True)),
    SettingsRow(90, 2, 128, 16, Settings(128, 128, 4, 2, True, True)),
)
PORTABLE_UP_TO = {
    64: {0: 4096, 1: 4096, 2: 4096, 4: 4096, 8: 2048, 16: 8192},
    128: {0: 64, 1: 2048, 2: 2048, 4: 2048, 8: 2048, 16: 64},
}
"""Queries of a sequence, on average, up to which the portable kernel is the faster one, or nearly so, in causal
attention, by the Hopper kernel's head dimensions and the group (0: dense): for short sequences large tiles do not pay,
and up to 64 queries leave a warpgroup idle. Groups of 1 and 2 are taken to be like 4; the others are in
benchmarks/results/attention-nvidia-h200.json."""
FORWARD_KERNELS = ("hopper", "portable", "sparse_cores")
HOPPER_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)
"""Whether Triton is new enough for the Hopper kernel."""
# The same for both kernels of the backward, but that only these rows, and no other candidates, have been timed.
QUERY_SETTINGS = (
    SettingsRow(100, 2, 128, 16, Settings(128, 64, 8, 2, True, False)),
    SettingsRow(90, 2, 64, 8, Settings(64, 64, 4, 3, True, False)),
    SettingsRow(90, 2, 128, 8, Settings(64, 64, 4, 2, True, False)),
    SettingsRow(90, 2, 128, 16, Settings(64, 128, 4, 2, True, False)),
    SettingsRow(90, 2, 256, 16, Settings(128, 32, 8, 2, True, False)),
    SettingsRow(SMALL, 2, 64, 16, Settings(128, 64, 8, 2, False, False)),
    SettingsRow(SMALL, 2, 128, 16, Settings(128, 32, 8, 2, False, False)),
    SettingsRow(SMALL, 2, 256, 16, Settings(64, 32, 8, 1, False, False)),
    SettingsRow(SMALL, 4, 64, 16, Settings(32, 32, 8, 1, False, False)),
    SettingsRow(SMALL, 4, 256, 16, Settings(16, 32, 8, 1, False, False)),
)
KEY_SETTINGS = (
    SettingsRow(100, 2, 128, 16, Settings(128, 64, 8, 1, True, False)),
    SettingsRow(100, 2, 256, 16, Settings(64, 64, 8, 1, True, False)),
    SettingsRow(90, 2, 64, 16, Settings(64, 64, 4, 3, True, False)),
    SettingsRow(90, 2, 128, 16, Settings(64, 64, 4, 2, True, False)),
    SettingsRow(90, 2, 256, 4, Settings(128, 64, 8, 1, True, False)),
    SettingsRow(90, 2, 256, 16, Settings(32, 64, 8, 1, False, False)),
    SettingsRow(SMALL, 2, 64, 16, Settings(64, 32, 8, 1, False, False)),
    SettingsRow(SMALL, 2, 128, 16, Settings(32, 64, 8, 1, False, False)),
    SettingsRow(SMALL, 2, 256, 16, Settings(32, 32, 8, 1, False, False)),
    SettingsRow(SMALL, 4, 128, 16, Settings(16, 32, 8, 1, False, False)),
    SettingsRow(80, 4, 256, 16, Settings(16, 32, 8, 1, False, False)),
    SettingsRow(SMALL, 4, 256, 16, Settings(16, 16, 8, 1, False, False)),
)
WAVE = 512
"""Programs of ``gradient_of_keys`` that are in flight at one time, at least: some more than an H200 holds."""
BLOCK_ROWS = 64
"""Tokens a program of ``gradient_rows``."""
_PORTABLE_ONLY: set[Any] = set()
"""Hooks, each with its quick one or None, that Gluon was found not to compile."""

logger = logging.getLogger(__name__)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor,
    lengths_q: Tensor,
    max_q: int,
    starts_k: Tensor,
    lengths_k: Tensor,
    max_k: int,
    *,
    is_causal: bool,
    softmax_scale: float,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
    plan: AttentionPlan,
    first_q: Tensor | None = None,
    first_k: Tensor | None = None,
    with_lse: bool = True,
    out: Tensor | None = None,
    settings: Settings | None = None,
    kernel: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention on the GPU that holds the tensors, without waiting for it; :func:`refusal` has been asked.

    Args:
        q: ``[tokens, query heads, head_dim]``, FP16, BF16 or FP32; any token and head strides, as for all tensors.
        k: ``[key tokens, kv heads, head_dim]``.
        v: ``[key tokens, kv heads, value_dim]``.
        starts_q: first row of each sequence in ``q``, ``[batch]``, int32 or int64, contiguous.
        lengths_q: number of queries of each sequence.
        max_q: an upper bound of ``lengths_q``.
        starts_k: first row of each sequence in ``k`` and ``v``.
        lengths_k: number of keys of each sequence; without ``first_q`` at least that of queries if causal.
        max_k: an upper bound of ``lengths_k``.
        is_causal: whether a query sees only keys at its own position and before.
        softmax_scale: factor on the scores, > 0.
        sliding_window: a query sees only the keys fewer positions away; None: all.
        softcap: bound of the scores, > 0, or None.
        s_aux: a further logit per query head in every softmax, ``[query heads]``, or None.
        plan: which of the visible keys take part.
        first_q: position of each sequence's first query, ``[batch]``; by default the queries are the last tokens.
        first_k: position of each sequence's first key, ``[batch]``; by default 0.
        with_lse: whether to return logarithms of the softmax denominators; without, weights may be summed rounded, as
            they are multiplied with the values.
        out: where to write, ``[tokens, query heads, value_dim]``; allocated if None.
        settings: tiles and warps of the portable kernel, instead of the table's.
        kernel: ``"portable"``, ``"hopper"`` or ``"sparse_cores"``, instead of what :func:`kernel_for` chooses.

    Returns:
        ``out`` and the logarithms of the softmax denominators, ``[tokens, query heads]`` in FP32, or None. Rows without
        a visible key and rows of no sequence are 0 and -inf.

    Raises:
        ValueError: if ``kernel`` is not the portable one and the settings or the problem are for that alone, if it is
            ``"sparse_cores"`` and cannot run this, or if there are more tiles than 32 bits count.
    """
    if out is None:
        out = torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if with_lse else None
    if q.shape[0] == 0:
        return out, lse
    packing = starts_q, lengths_q, max_q, starts_k, lengths_k, max_k
    problem = AttentionProblem(*packing, is_causal, softmax_scale, sliding_window, softcap, plan, first_q, first_k)
    if settings is not None or problem.is_placed:
        if kernel not in (None, "portable"):
            raise ValueError(f"kernel: {kernel!r} is not allowed with settings or positions; only portable takes these")
        kernel = "portable"
    is_plain = sliding_window is None and softcap is None and s_aux is None and _is_aligned(out)
    if kernel == "sparse_cores" and not (is_plain and sparse_cores_can(q, k, v, plan)):
        raise ValueError(
            "kernel: 'sparse_cores' is not allowed; it takes aligned BF16 with a head_dim of 128, 2:4 and no "
            "sliding_window, softcap or s_aux, on compute capability 9.0; while a CUDA graph is captured, it has to be "
            "loaded already, and if it cannot be compiled or loaded, a warning says why"
        )
    with torch.cuda.device_of(q):
        chosen = kernel or kernel_for(q, k, v, starts_q.shape[0], plan, is_plain)
        if chosen == "sparse_cores":
            _launch_sparse_cores(q, k, v, out, lse, problem)
            return out, lse
        if chosen == "hopper":
            try:
                _launch_hopper(q, k, v, out, lse, s_aux, problem)
                return out, lse
            except CompilationError as error:
                if plan.score_hook is None or kernel == "hopper":
                    raise
                hooks = plan.score_hook, plan.quick_hook
                _PORTABLE_ONLY.add(hooks)
                logger.warning(
                    "the hook %s is left to the portable kernel, as Gluon cannot compile it: %s",
                    " or ".join(hook.__name__ for hook in hooks if hook is not None),
                    error,
                )
        _launch_portable(q, k, v, out, lse, s_aux, problem, settings)
    return out, lse


def _launch_portable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    s_aux: Tensor | None,
    problem: AttentionProblem,
    settings: Settings | None,
) -> None:
    p, plan = problem, problem.plan
    (total, query_heads, head_dim), (kv_heads, value_dim), batch = q.shape, v.shape[1:], p.starts_q.shape[0]
    block_d, block_dv = block_dim(head_dim), block_dim(value_dim)
    group = 1 if plan.is_dense else plan.group
    if settings is None:
        capability = compute_capability(q.device)
        settings = default_settings(capability, q.dtype, max(block_d, block_dv), group, p.is_causal)
    options = _options(settings, head_dim, value_dim, p.is_causal, p.sliding_window, p.softcap, plan)
    if p.is_placed:
        options = options._replace(placed=True, frozen=False, sinks=True)
    tiles = triton.cdiv(p.max_q, settings.block_m)
    heads_per_wave = _heads_per_wave(p.max_k, k, v) * (query_heads // kv_heads)
    attention_forward[(batch * query_heads * tiles + triton.cdiv(total, settings.block_m),)](
        q,
        k,
        v,
        out,
        lse,
        s_aux,
        *(_descriptor(x, group, block, settings) for x, block in ((k, block_d), (v, block_dv))),
        tuple(x.stride()[:2] for x in (q, k, v, out)),
        (p.starts_q, p.lengths_q, p.starts_k, p.lengths_k, *p.first_positions()),
        (query_heads, query_heads // kv_heads),
        (p.softmax_scale, p.softcap or 0.0),
        batch,
        total,
        tiles,
        min(heads_per_wave, batch * query_heads),
        *_distances(plan, p.sliding_window),
        _hook_args(plan),
        SCORE_HOOK=plan.score_hook,
        OPTIONS=options,
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
        enable_fp_fusion=True,
    )


def _launch_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    s_aux: Tensor | None,
    problem: AttentionProblem,
) -> None:
    p, plan = problem, problem.plan
    (_, query_heads, head_dim), (kv_heads, value_dim), batch = q.shape, v.shape[1:], p.starts_q.shape[0]
    group = 1 if plan.is_dense else plan.group
    settings = hopper_settings(q.dtype, head_dim, group)
    options = _options(settings, head_dim, value_dim, p.is_causal, p.sliding_window, p.softcap, plan)
    options = options._replace(pair=min(group, 2))
    tiles = triton.cdiv(p.max_q, settings.block_m)
    items = batch * query_heads * tiles
    tails = _tails(k, group, settings)
    key_tail, value_tail, tail_start = tails
    counter = _prepare(k, v, out, lse, tails, p, options)
    attention_forward_hopper[(min(items, processors(q.device)),)](
        _shared_descriptor(q, list(q.shape), list(q.stride()), [ROWS.value, 1, head_dim]),
        *(None if x is None else _key_descriptor(x, options) for x in (k, v, key_tail, value_tail)),
        tail_start,
        out,
        lse,
        s_aux,
        counter,
        out.stride()[:2],
        (p.starts_q, p.lengths_q, p.starts_k, p.lengths_k),
        (query_heads, query_heads // kv_heads),
        (p.softmax_scale, p.softcap or 0.0),
        batch,
        tiles,
        min(_heads_per_wave(p.max_k, k, v) * (query_heads // kv_heads), batch * query_heads),
        *_distances(plan, p.sliding_window),
        _hook_args(plan),
        SCORE_HOOK=plan.score_hook,
        QUICK_HOOK=plan.quick_hook,
        OPTIONS=options,
        STAGES=settings.num_stages,
        num_warps=settings.num_warps,
        enable_fp_fusion=True,
    )


def _launch_sparse_cores(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, problem: AttentionProblem
) -> None:
    p, (_, query_heads, head_dim), kv_heads = problem, q.shape, k.shape[1]
    settings = hopper_settings(q.dtype, head_dim, p.plan.group)
    options = _options(settings, head_dim, head_dim, p.is_causal, None, None, p.plan)
    # It loads whole tiles, those that reach past the last key from a copy.
    key_tail = k.new_empty(2 * sparse_cores.TILE, kv_heads, head_dim)
    tail_start = max(0, k.shape[0] - sparse_cores.TILE)
    counter = _prepare(k, v, out, lse, (key_tail, None, tail_start), p, options)
    heads_per_wave = _heads_per_wave(p.max_k, k, v) * (query_heads // kv_heads)
    num_sinks, window, _ = _distances(p.plan, None)
    sparse_cores.attend(
        q, k, v, out, lse, counter, key_tail, tail_start, p, heads_per_wave, num_sinks, window, processors(q.device)
    )


def _prepare(
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    tails: tuple[Tensor | None, Tensor | None, int],
    problem: AttentionProblem,
    options: Options,
) -> Tensor:
    """Fill what belongs to no sequence, copy to any :func:`_tails`, and return a counter of items, at 0.

    Raises:
        ValueError: if there may be more items than the counter can hold.
    """
    p, (total, query_heads, _), (key_rows, kv_heads, _) = problem, out.shape, k.shape
    batch = p.starts_q.shape[0]
    if batch * query_heads * triton.cdiv(p.max_q, ROWS.value) >= 2**30:
        raise ValueError(
            f"max_q: {p.max_q} is not allowed with {batch} sequences and {query_heads} heads; pass fewer sequences at "
            f"a time, so that there are fewer than 2^30 tiles of {ROWS.value} queries"
        )
    key_tail, value_tail, tail_start = tails
    counter = torch.empty(1, dtype=torch.int32, device=out.device)
    copies = triton.cdiv(key_rows - tail_start, ROWS.value) * kv_heads
    prepare[(triton.cdiv(total, ROWS.value) + copies,)](
        counter,
        out,
        lse,
        k,
        v,
        key_tail,
        value_tail,
        out.stride()[:2],
        k.stride()[:2],
        v.stride()[:2],
        p.starts_q,
        p.lengths_q,
        batch,
        total,
        query_heads,
        tail_start,
        key_rows,
        kv_heads,
        OPTIONS=options,
    )
    return counter


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_aux: Tensor | None,
    out: Tensor,
    lse: Tensor,
    starts_q: Tensor,
    lengths_q: Tensor,
    max_q: int,
    starts_k: Tensor,
    lengths_k: Tensor,
    max_k: int,
    *,
    is_causal: bool,
    softmax_scale: float,
    sliding_window: int | None,
    softcap: float | None,
    plan: AttentionPlan,
    first_q: Tensor | None = None,
    first_k: Tensor | None = None,
    settings: tuple[Settings, Settings] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute the gradients of :func:`forward` on its GPU, without waiting for it.

    Two sequences may not share keys: the gradients of shared rows would be those of one of them.

    Args:
        grad: gradient of ``out``, with its shape and type.
        q: as in :func:`forward`, like all that is not named here.
        k: see there.
        v: see there.
        s_aux: see there.
        out: the first result of :func:`forward`.
        lse: the second.
        starts_q: see there.
        lengths_q: see there.
        max_q: see there.
        starts_k: see there.
        lengths_k: see there.
        max_k: see there.
        is_causal: see there.
        softmax_scale: see there.
        sliding_window: see there.
        softcap: see there.
        plan: see there; which keys take part is taken as given.
        first_q: see there.
        first_k: see there.
        settings: tiles and warps of the gradient of queries, and of that of keys and values, instead of the tables'.

    Returns:
        The gradients of ``q``, ``k``, ``v`` and, if given, ``s_aux``, each in the type of its tensor. Rows of no
        sequence are 0.
    """
    total, query_heads, head_dim = q.shape
    kv_heads, value_dim = v.shape[1:]
    batch, heads_per_kv = starts_q.shape[0], query_heads // kv_heads
    grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if total == 0:
        return grad_q, grad_k, grad_v, None if s_aux is None else torch.zeros_like(s_aux)
    if grad.stride(2) != 1 or 0 in grad.stride():
        grad = grad.contiguous()

    block_d, block_dv = block_dim(head_dim), block_dim(value_dim)
    group = 1 if plan.is_dense else plan.group
    if settings is None:
        place = (compute_capability(q.device), q.dtype, max(block_d, block_dv), group, is_causal)
        settings = default_settings(*place, QUERY_SETTINGS), default_settings(*place, KEY_SETTINGS)
    for_queries, for_keys = settings
    packing = (starts_q, lengths_q, max_q, starts_k, lengths_k, max_k)
    p = AttentionProblem(*packing, is_causal, softmax_scale, sliding_window, softcap, plan, first_q, first_k)
    shape = (head_dim, value_dim, is_causal, sliding_window, softcap, plan)
    options = [_options(x, *shape) for x in settings]
    if p.is_placed:
        options = [x._replace(placed=True, sinks=True) for x in options]
    # Apart, so that both are aligned alike whatever the lengths.
    shift = torch.empty(query_heads, total, dtype=torch.float32, device=q.device)
    delta = torch.empty_like(shift)
    sequences = (starts_q, lengths_q, starts_k, lengths_k, *p.first_positions())
    numbers = (softmax_scale, softcap or 0.0)
    rules = (*_distances(plan, sliding_window), _hook_args(plan))
    with torch.cuda.device_of(q):
        gradient_rows[(triton.cdiv(total, BLOCK_ROWS) * query_heads,)](
            grad,
            out,
            lse,
            shift,
            delta,
            tuple(x.stride()[:2] for x in (grad, out)),
            query_heads,
            total,
            VALUE_DIM=value_dim,
            BLOCK_M=BLOCK_ROWS,
            BLOCK_DV=block_dv,
        )
        # Where keys begin inside a group, the first tile has fewer.
        tiles = triton.cdiv(max_k + (group - 1 if p.is_placed else 0), for_keys.block_n)
        # Few programs of such different lengths would leave multiprocessors idle at the end.
        heads_per_wave = max(_heads_per_wave(max_q, q, grad) // heads_per_kv, triton.cdiv(WAVE, max(tiles, 1)))
        gradient_of_keys[(batch * kv_heads * tiles,)](
            q,
            k,
            v,
            grad,
            shift,
            delta,
            grad_k,
            grad_v,
            *(_query_descriptor(x, block, for_keys) for x, block in ((q, block_d), (grad, block_dv))),
            tuple(x.stride()[:2] for x in (q, k, v, grad, grad_k, grad_v)),
            sequences,
            (kv_heads, heads_per_kv),
            numbers,
            batch,
            total,
            tiles,
            min(heads_per_wave, batch * kv_heads),
            *rules,
            SCORE_HOOK=plan.score_hook,
            OPTIONS=options[1],
            num_warps=for_keys.num_warps,
            num_stages=for_keys.num_stages,
            enable_fp_fusion=True,
        )
        tiles = triton.cdiv(max_q, for_queries.block_m)
        heads_per_wave = _heads_per_wave(max_k, k, v) * heads_per_kv
        gradient_of_queries[(batch * query_heads * tiles,)](
            q,
            k,
            v,
            grad,
            shift,
            delta,
            grad_q,
            *(_descriptor(x, group, block, for_queries) for x, block in ((k, block_d), (v, block_dv))),
            tuple(x.stride()[:2] for x in (q, k, v, grad, grad_q)),
            sequences,
            (query_heads, heads_per_kv),
            numbers,
            batch,
            total,
            tiles,
            min(heads_per_wave, batch * query_heads),
            *rules,
            SCORE_HOOK=plan.score_hook,
            OPTIONS=options[0],
            num_warps=for_queries.num_warps,
            num_stages=for_queries.num_stages,
            enable_fp_fusion=True,
        )
    grad_s_aux = None
    if s_aux is not None:
        weights = torch.exp2(s_aux.float()[:, None] * LOG2E.value - shift)
        grad_s_aux = -(weights * delta).sum(1).to(s_aux.dtype)
    return grad_q, grad_k, grad_v, grad_s_aux


def refusal(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> str | None:
    """Say why the kernel cannot run arguments that :func:`modelopt_lite.kernels.attention` takes, or None if it can."""
    if not q.is_cuda:
        return f"the tensors are on {q.device}, not on a CUDA GPU"
    if compute_capability(q.device) < OLDEST:
        return f"the GPU's compute capability is {compute_capability(q.device) / 10}, not {OLDEST / 10} or later"
    if not plan.is_dense and plan.score_hook is None:
        return "the method has no score_hook, only a rule in PyTorch"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES:
            return f"{name} is {x.dtype}, not one of {', '.join(map(str, DTYPES))}"
        if x.shape[2] > MAX_HEAD_DIM:
            return f"{name} has a head_dim of {x.shape[2]}, above {MAX_HEAD_DIM}"
        if x.stride(2) != 1:
            return f"{name} has strides {x.stride()}; the last must be 1"
    return None


def kernel_for(q: Tensor, k: Tensor, v: Tensor, batch: int, plan: AttentionPlan, is_plain: bool) -> str:
    """Say which forward kernel runs what :func:`refusal` does not refuse and has no positions: the one place to choose.

    The environment variable ``MODELOPT_LITE_KERNEL`` may name one: ``portable`` for always, ``hopper`` and
    ``sparse_cores`` for wherever these can, also where another is faster; what ``sparse_cores`` cannot run is then
    chosen as without the variable.

    Args:
        q: as in :func:`forward`, like all that is not named here.
        k: see there.
        v: see there.
        batch: number of sequences.
        plan: see there.
        is_plain: whether there is no sliding window, softcap or ``s_aux``, and ``out`` is aligned to 16 bytes.

    Returns:
        ``"sparse_cores"``, ``"hopper"`` or ``"portable"``.

    Raises:
        ValueError: if that variable is something else.
    """
    wanted = os.environ.get("MODELOPT_LITE_KERNEL", "")
    if wanted not in ("", *FORWARD_KERNELS):
        raise ValueError(f"MODELOPT_LITE_KERNEL: {wanted!r} is not allowed; {', '.join(FORWARD_KERNELS)} or nothing")
    # Not that of the longest: with one long sequence among decode steps, most of large tiles would be empty.
    mean_length = q.shape[0] / max(1, batch)
    if is_plain and wanted in ("", "sparse_cores"):
        # Up to 64 queries, half of a program idles, and few tiles are better spread over a GPU if they are smaller.
        tiles = q.shape[0] * q.shape[1] / sparse_cores.TILE
        pays = mean_length > sparse_cores.ROWS and tiles > 1.5 * processors(q.device)
        if (wanted or pays) and sparse_cores_can(q, k, v, plan):
            return "sparse_cores"
    if wanted == "portable" or not hopper_can(q, k, v, plan):
        return "portable"
    pays = mean_length > PORTABLE_UP_TO[q.shape[2]][0 if plan.is_dense else plan.group]
    return "hopper" if wanted == "hopper" or pays else "portable"


def hopper_can(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> bool:
    """Say whether the Hopper kernel runs what :func:`refusal` does not refuse and has no positions."""
    return (
        HOPPER_TRITON
        and compute_capability(q.device) == 90
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[2] == v.shape[2]
        and q.shape[2] in PORTABLE_UP_TO
        and all(map(_is_aligned, (q, k, v)))
        and (plan.score_hook, plan.quick_hook) not in _PORTABLE_ONLY
    )


def sparse_cores_can(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> bool:
    """Say the same of the kernel on sparse tensor cores, if there is no sliding window, softcap or ``s_aux`` either."""
    return (
        compute_capability(q.device) == 90 and all(map(_is_aligned, (q, k, v))) and sparse_cores.can_run(q, k, v, plan)
    )


def block_dim(dim: int) -> int:
    """Return the tile width for a head dimension: matrix instructions want powers of two from 16 on."""
    return max(16, 1 << (dim - 1).bit_length())


@functools.cache
def compute_capability(device: torch.device) -> int:
    """Return a GPU's compute capability as ``10 * major + minor``."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def processors(device: torch.device) -> int:
    """Return a GPU's number of multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def default_settings(
    capability: int,
    dtype: torch.dtype,
    block_d: int,
    group: int,
    is_causal: bool,
    table: tuple[SettingsRow, ...] = SETTINGS,
) -> Settings:
    """Return a table's launch settings.

    Args:
        capability: the GPU's compute capability, ``10 * major + minor``.
        dtype: type of the tensors.
        block_d: the larger of both head dimensions, a power of two.
        group: keys a group.
        is_causal: whether a query sees only keys at its own position and before.
        table: the kernel's table.
    """
    if capability in (86, 89) or capability >= 120:
        capability = SMALL
    row = next(
        row
        for row in table
        if capability >= row.capability
        and dtype.itemsize <= row.itemsize
        and block_d <= row.block_d
        and group <= row.group
    )
    settings = row.settings
    if dtype != torch.bfloat16:
        # FP16 probabilities overflow from 2^16 on.
        settings = settings._replace(frozen=False)
    if group == 1 and not is_causal and (block_d == 256 or table is not SETTINGS):
        # The ptxas that Triton 3.6 brings along crashes on these with descriptors.
        settings = settings._replace(descriptors=False)
    return settings


def hopper_settings(dtype: torch.dtype, head_dim: int, group: int) -> Settings:
    """Return the Hopper kernel's launch settings for a head_dim of 64 or 128 and a group size."""
    row = next(row for row in HOPPER_SETTINGS if head_dim <= row.block_d and group <= row.group)
    return row.settings._replace(frozen=dtype == torch.bfloat16)


def _options(
    settings: Settings,
    head_dim: int,
    value_dim: int,
    is_causal: bool,
    sliding_window: int | None,
    softcap: float | None,
    plan: AttentionPlan,
) -> Options:
    return Options(
        block_m=settings.block_m,
        block_n=settings.block_n,
        block_d=block_dim(head_dim),
        block_dv=block_dim(value_dim),
        head_dim=head_dim,
        value_dim=value_dim,
        group=1 if plan.is_dense else plan.group,
        causal=is_causal,
        sliding=sliding_window is not None,
        softcap=softcap is not None,
        sinks=plan.num_sink_tokens > 0,
        prescale=not (plan.is_dense or plan.scale_free),
        keeps_group_max=plan.is_dense or plan.keeps_group_max,
        keeps_nothing=plan.keeps_nothing,
        sparse_decode=plan.sparse_decode,
        frozen=settings.frozen,
        # From Hopper on, the compiler lays out a tile's products alike without help.
        hopper=settings.descriptors,
    )


def _distances(plan: AttentionPlan, sliding_window: int | None) -> tuple[int, ...]:
    """Return the sink tokens and both windows, in tokens."""
    return tuple(min(x, FAR) for x in (plan.num_sink_tokens, plan.dense_window_size, sliding_window or 0))


def _hook_args(plan: AttentionPlan) -> tuple[Any, ...]:
    return (*map(constexpr, plan.hook_constants), *map(float, plan.hook_args))


def _heads_per_wave(longest: int, x: Tensor, y: Tensor) -> int:
    """Return of how many heads ``longest`` rows of both tensors fit into the L2 cache."""
    return max(1, L2_SHARE // max(1, longest * (x.shape[2] + y.shape[2]) * x.element_size()))


def _descriptor(x: Tensor, group: int, block_d: int, settings: Settings) -> Any:
    """Describe keys or values for the tensor memory accelerator, or return None where it cannot read them."""
    if not (settings.descriptors and _is_aligned(x)):
        return None
    # [key of a group, group, head, dim]; see _key_descriptor().
    shape = [2 * group - 1, triton.cdiv(x.shape[0], group), *x.shape[1:]]
    strides = [x.stride(0), group * x.stride(0), x.stride(1), 1]
    return TensorDescriptor(x, shape, strides, [group, settings.block_n // group, 1, block_d])


def _shared_descriptor(x: Tensor, shape: list[int], strides: list[int], box: list[int]) -> SharedDescriptor:
    """Describe a tensor, and how its boxes lie in shared memory for matrix instructions."""
    return SharedDescriptor(x, shape, strides, box, _shared_layout(len(box)))


@functools.cache
def _shared_layout(rank: int) -> NVMMASharedLayout:
    return NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)


def _key_descriptor(x: Tensor, options: Options) -> SharedDescriptor:
    """Describe keys or values, or a tail of them, as ``[pair of a group, group, key of a pair, head, dim]``.

    So one box holds groups deinterleaved by pairs. A sequence may begin anywhere, so there are about twice as many
    pairs in a group, and keys in a pair: rows overlap, each has several addresses. As each dimension is bounded by
    itself, boxes reach up to ``2 * group - 2`` rows further. So many rows are left out, that none reaches past the
    last; a tensor of so few rows that this leaves none is not loaded from; see :func:`_tails`.
    """
    group, pair = options.group, options.pair
    pairs = group // pair
    rows = max(1, x.shape[0] - (2 * group - 2))
    shape = [2 * pairs - 1, triton.cdiv(rows, group), 2 * pair - 1, *x.shape[1:]]
    strides = [pair * x.stride(0), group * x.stride(0), *x.stride()]
    return _shared_descriptor(x, shape, strides, [pairs, options.block_n // group, pair, 1, x.shape[2]])


def _tails(k: Tensor, group: int, settings: Settings) -> tuple[Tensor | None, Tensor | None, int]:
    """Return where the last keys and the last values are copied to, if anywhere, and the first row that is.

    Boxes reach further than their tile; see :func:`_key_descriptor`. Values have the keys' shape here. Tiles that begin
    before that row are whole in what :func:`_key_descriptor` describes. The others are loaded from the copies, which
    have as many rows more as their descriptors leave out: what these hold does not matter, as they belong to no
    sequence.
    """
    rows = k.shape[0]
    if group == 1:
        return None, None, rows
    start = max(0, rows // group * group - settings.block_n)
    keys, values = k.new_empty(2, rows - start + 2 * group - 2, *k.shape[1:])
    return keys, values, start


def _query_descriptor(x: Tensor, block_d: int, settings: Settings) -> Any:
    """Describe queries, or gradients laid out alike, as ``[head, token, dim]``, or return None."""
    if not (settings.descriptors and _is_aligned(x)):
        return None
    shape, strides = ([x_of[1], x_of[0], x_of[2]] for x_of in (x.shape, x.stride()))
    return TensorDescriptor(x, shape, strides, [1, settings.block_m, block_d])


def _is_aligned(x: Tensor) -> bool:
    return (
        x.shape[0] > 0
        and x.data_ptr() % 16 == 0
        and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:2])
    )
