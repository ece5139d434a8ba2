"""Launches the Gluon kernel for Hopper GPUs, and prepares work for both kernels made for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..device import (
    TRITON,
    Described,
    Launch,
    cdiv,
    compute_capability,
    heads_per_wave,
    is_aligned,
    processors,
    rebased,
)
from ..portable.launch import results_of
from ..request import AttentionRequest, HookRefusedError
from ..settings import (
    Options,
    Settings,
    SettingsRow,
    distances,
    gpu_refusal,
    hook_arguments,
    is_light,
    is_short,
    options_of,
)
from .forward import ROWS, attention_forward_hopper
from .forward import prepare as prepare_kernel
from .visits_launch import Schedule
from .visits_launch import refusal as lists_refusal

HOPPER = 90
HOPPER_TRITON = TRITON >= (3, 6)
"""Whether Triton is new enough for the Gluon kernel."""

# block_m is 64 for each warpgroup, and the warps are those of one.
HOPPER_SETTINGS = (
    SettingsRow(90, 2, 64, 8, Settings(192, 64, 4, 4, True, True)),
    SettingsRow(90, 2, 128, 16, Settings(128, 128, 4, 2, True, True)),
)
LIST_SETTINGS = {64: Settings(128, 128, 4, 4, True, True), 128: Settings(128, 128, 4, 2, True, True)}
PORTABLE_UP_TO = {
    64: {0: 4096, 1: 4096, 2: 4096, 4: 4096, 8: 2048, 16: 8192},
    128: {0: 64, 1: 2048, 2: 2048, 4: 2048, 8: 2048, 16: 64},
}
"""Queries of a sequence, on average, up to which the portable kernel is the faster one, or nearly so, in causal
attention, by the Hopper kernel's head dimensions and the group (0: dense): for short sequences large tiles do not pay,
and up to 64 queries leave a warpgroup idle. Groups of 1 and 2 are taken to be like 4; the others are in
benchmarks/results/attention-nvidia-h200.json."""

_UNCOMPILABLE: dict[Any, str] = {}
"""Why Gluon cannot compile hooks, by the hook and its quick one or None."""


def hopper_settings(dtype: torch.dtype, head_dim: int, group: int, has_lists: bool = False) -> Settings:
    """Return the Gluon kernel's launch settings for a head_dim of 64 or 128 and a group size.

    Args:
        dtype: type of the tensors.
        head_dim: their head dimension.
        group: keys a group.
        has_lists: whether there are lists of key blocks, of 128 keys for 128 positions or a multiple.
    """
    row = next(row for row in HOPPER_SETTINGS if head_dim <= row.block_d and group <= row.group)
    settings = LIST_SETTINGS[head_dim] if has_lists else row.settings
    return settings._replace(frozen=dtype == torch.bfloat16)


def refusal(request: AttentionRequest) -> str | None:
    """Say why the Gluon kernel cannot run a request, or None if it can."""
    r = request
    if (reason := lists_refusal(r)) is not None:
        return reason
    if (reason := gpu_refusal(r)) is not None:
        return reason
    if not r.q.is_cuda or compute_capability(r.q.device) != HOPPER:
        return "it is made for GPUs of compute capability 9.0"
    if not HOPPER_TRITON:
        return f"Triton is {triton.__version__}, not 3.6 or later"
    if r.q.dtype not in (torch.float16, torch.bfloat16):
        return f"the tensors are {r.q.dtype}, not torch.float16 or torch.bfloat16"
    if not (r.q.shape[2] == r.v.shape[2] and r.q.shape[2] in PORTABLE_UP_TO):
        allowed = " or both ".join(map(str, PORTABLE_UP_TO))
        return f"head dimensions are {r.q.shape[2]} and {r.v.shape[2]}, not both {allowed}"
    if not all(map(is_aligned, (r.q, r.k, r.v))):
        return "addresses or strides of q, k or v are not multiples of 16 bytes"
    if r.has_positions:
        return "first positions are given, or there is a sliding window without causality"
    return _UNCOMPILABLE.get((r.plan.score_hook, r.plan.quick_hook))


def pays(request: AttentionRequest) -> bool:
    """Whether the Gluon kernel is faster than the portable one, of which one launch is enough.

    The mean length decides, not the longest: with one long sequence among decode steps, most of large tiles would be
    empty.
    """
    r = request
    mean_length = r.q.shape[0] / max(1, r.starts_q.shape[0])
    limits = PORTABLE_UP_TO.get(r.q.shape[2])
    if limits is None or is_short(r) or is_light(r):
        return False
    return mean_length > limits[0 if r.plan.keep is None else r.plan.group]


def prepare(request: AttentionRequest) -> Callable[[AttentionRequest], tuple[Tensor, Tensor | None]]:
    """Compute what requests of one signature have in common; as :func:`modelopt_lite.kernels.portable.launch.prepare`.

    Raises:
        ValueError: if there may be more tiles than 32 bits count.
        HookRefusedError: by the function returned, at its first call, if Gluon cannot compile the plan's hook.
    """
    r, plan = request, request.plan
    (total, query_heads, head_dim), kv_heads, batch = r.q.shape, r.v.shape[1], r.starts_q.shape[0]
    settings = hopper_settings(r.q.dtype, head_dim, r.group, r.blocks is not None)
    options = options_of(r, settings)._replace(pair=min(r.group, 2))
    tiles = cdiv(r.max_q, settings.block_m)
    heads = (query_heads, query_heads // kv_heads)
    items = batch * query_heads * tiles
    wave = min(heads_per_wave(r.max_k, r.k, r.v) * heads[1], batch * query_heads)
    numbers = (r.softmax_scale, r.softcap or 0.0)
    rest = (heads, numbers, batch, tiles, wave, *distances(r))
    queries = shared_descriptor(r.q, list(r.q.shape), list(r.q.stride()), [ROWS.value, 1, head_dim])
    keys, values = (key_descriptor(x, options) for x in (r.k, r.v))
    tail_rows, tail_start = tail_of(r.k.shape[0], r.group, settings.block_n)
    tail_shape = (2, tail_rows, *r.k.shape[1:])
    tail_of_keys = None if tail_rows == 0 else key_descriptor(r.k.new_empty(*tail_shape)[0], options)
    prepare_work = WorkPreparation(r, options, tail_start)
    launch = Launch(
        attention_forward_hopper, r.q.device, plan.score_hook, plan.quick_hook, options, settings.num_stages,
        num_warps=settings.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    schedule = None if r.blocks is None else Schedule(r, options)
    if schedule is not None:
        items = query_heads * schedule.rows
    programs, hook_args, new_results = min(items, processors(r.q.device)), hook_arguments(plan), results_of(r)

    def run(r: AttentionRequest) -> tuple[Tensor, Tensor | None]:
        out, lse = new_results(r.q)
        if total == 0:
            return out, lse
        visits: tuple[Any, ...] = (None,) * 5
        if schedule is not None:
            visits = (*schedule(r), schedule.rows, schedule.shape[2], schedule.heads_per_list)
        tails = () if tail_of_keys is None else r.k.new_empty(*tail_shape).unbind()
        counter = prepare_work(r, out, lse, *(tails or (None, None)))
        try:
            launch(
                programs, Described(queries, r.q), Described(keys, r.k), Described(values, r.v),
                *([Described(tail_of_keys, x) for x in tails] or (None, None)), tail_start, out, lse, r.s_aux,
                counter, out.stride()[:2], (r.starts_q, r.lengths_q, r.starts_k, r.lengths_k), *rest,
                *visits, hook_args,
            )  # fmt: skip
        except CompilationError as error:
            hooks = (r.plan.score_hook, r.plan.quick_hook)
            if hooks == (None, None):
                raise
            names = " or ".join(hook.__name__ for hook in hooks if hook is not None)
            _UNCOMPILABLE[hooks] = f"Gluon cannot compile the hook {names}: {error}"
            raise HookRefusedError(_UNCOMPILABLE[hooks]) from None
        return out, lse

    return run


class WorkPreparation:
    """Fills what belongs to no sequence, copies the last keys and values, and makes a counter of items, at 0."""

    def __init__(self, request: AttentionRequest, options: Options, tail_start: int) -> None:
        """Prepare for requests of one signature.

        Args:
            request: one of them.
            options: the kernel's.
            tail_start: the first row of the keys that is copied.

        Raises:
            ValueError: if there may be more items than the counter can hold.
        """
        r = request
        (total, query_heads, value_dim), (key_rows, kv_heads, _) = (*r.q.shape[:2], r.v.shape[2]), r.k.shape
        batch = r.starts_q.shape[0]
        if batch * query_heads * cdiv(r.max_q, ROWS.value) >= 2**30:
            raise ValueError(
                f"max_q: {r.max_q} is not allowed with {batch} sequences and {query_heads} heads; pass fewer sequences "
                f"at a time, so that there are fewer than 2^30 tiles of {ROWS.value} queries"
            )
        self.strides = ((query_heads * value_dim, value_dim), r.k.stride()[:2], r.v.stride()[:2])
        self.numbers = (batch, total, query_heads, tail_start, key_rows, kv_heads)
        self.fillers = cdiv(total, ROWS.value)
        self.copies = cdiv(key_rows - tail_start, ROWS.value) * kv_heads
        self.launch = Launch(prepare_kernel, r.q.device, options)

    def __call__(
        self, r: AttentionRequest, out: Tensor, lse: Tensor | None, key_tail: Tensor | None, value_tail: Tensor | None
    ) -> Tensor:
        """Launch, and return the counter; the tails are where the last keys and values go, or None."""
        counter = out.new_empty(1, dtype=torch.int32)
        self.launch(
            self.fillers + self.copies, counter, out, lse, r.k, r.v, key_tail, value_tail, *self.strides,
            r.starts_q, r.lengths_q, *self.numbers,
        )  # fmt: skip
        return counter


def shared_descriptor(x: Tensor, shape: list[int], strides: list[int], box: list[int]) -> TensorDescriptor:
    """Describe a tensor without its address, and how its boxes lie in shared memory for matrix instructions."""
    return rebased(TensorDescriptor(x, shape, strides, box, _shared_layout(len(box))), None)


@functools.cache
def _shared_layout(rank: int) -> NVMMASharedLayout:
    return NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)


def key_descriptor(x: Tensor, options: Options) -> TensorDescriptor:
    """Describe keys or values, or a tail of them, as ``[pair of a group, group, key of a pair, head, dim]``.

    So one box holds groups deinterleaved by pairs. A sequence may begin anywhere, so there are about twice as many
    pairs in a group, and keys in a pair: rows overlap, each has several addresses. As each dimension is bounded by
    itself, boxes reach up to ``2 * group - 2`` rows further. So many rows are left out, that none reaches past the
    last; a tensor of so few rows that this leaves none is not loaded from; see :func:`tail_of`.
    """
    group, pair = options.group, options.pair
    pairs = group // pair
    rows = max(1, x.shape[0] - (2 * group - 2))
    shape = [2 * pairs - 1, triton.cdiv(rows, group), 2 * pair - 1, *x.shape[1:]]
    strides = [pair * x.stride(0), group * x.stride(0), *x.stride()]
    return shared_descriptor(x, shape, strides, [pairs, options.block_n // group, pair, 1, x.shape[2]])


def tail_of(rows: int, group: int, block_n: int) -> tuple[int, int]:
    """Return how many rows the copies of the last keys and values have, and the first row that is copied.

    Boxes reach further than their tile; see :func:`key_descriptor`. Tiles that begin before that row are whole in what
    :func:`key_descriptor` describes. The others are loaded from the copies, which have as many rows more as their
    descriptors leave out: what these hold does not matter, as they belong to no sequence. Without groups there are no
    copies.
    """
    if group == 1:
        return 0, rows
    start = max(0, rows // group * group - block_n)
    return rows - start + 2 * group - 2, start
