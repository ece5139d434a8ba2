"""What Triton kernels know at compile time, and how they are launched: tiles, warps, stages."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, NamedTuple

import torch
import triton
from triton.language import constexpr

from ..plan import AttentionPlan
from .device import TRITON, compute_capability
from .request import AttentionRequest

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST = 80
"""Compute capability from which on GPUs have what the kernels need."""
INTERPRETER_WORKS = TRITON >= (3, 7) or tuple(map(int, version("numpy").split(".")[:2])) < (2, 4)
"""Whether kernels run in Triton's interpreter. Before 3.7 it converts an array of one element to a Python integer where
a loop begins or ends, and NumPy refuses that from 2.4 on."""
FAR = 2**30
"""A distance in tokens beyond all others, with room to add the difference of two positions to it in 32 bits."""
SHORT = 2**25
"""Scores of all heads up to which :func:`is_short`."""
LIGHT = 4_000_000_000
"""Tokens times the square of a layer's width up to which :func:`is_light`, by SmolLM2-135M on an H200."""
SMALL = 0
"""Compute capability that 8.6, 8.9 and 12.0 or later count as in the tables: these GPUs offer a program 99 KB of shared
memory, where 8.0 offers 163 KB, and multiply matrices as 8.0 does."""


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
    keeps_top: int
    sparse_decode: bool
    frozen: bool
    hopper: bool
    positions: bool = False
    pair: int = 1
    unlisted: bool = False
    """Whether masked tiles may be unlisted, so that only their sinks and recent keys take part."""
    block_size: int = 0
    """Keys of a listed key block, where a kernel walks the lists itself; else 0."""
    block_rows: int = 0
    """Positions of its query block."""


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


def default_settings(
    capability: int,
    dtype: torch.dtype,
    block_d: int,
    group: int,
    is_causal: bool,
    table: tuple[SettingsRow, ...],
    is_backward: bool = False,
) -> Settings:
    """Return a table's launch settings.

    Args:
        capability: the GPU's compute capability, ``10 * major + minor``.
        dtype: type of the tensors.
        block_d: the larger of both head dimensions, a power of two.
        group: keys a group.
        is_causal: whether a query sees only keys at its own position and before.
        table: the kernel's table.
        is_backward: whether it is a kernel of the backward pass.
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
    if group == 1 and not is_causal and (block_d == 256 or is_backward):
        # The ptxas that Triton 3.6 brings along crashes on these with descriptors.
        settings = settings._replace(descriptors=False)
    return settings


def refuses_blocks(request: AttentionRequest) -> str | None:
    """Say why a kernel that visits all blocks of keys cannot run a request, or None if it can."""
    if request.blocks is None and not request.plan.chooses_blocks:
        return None
    return "the method or the call chooses blocks of keys, and this kernel visits all of them"


def gpu_refusal(request: AttentionRequest) -> str | None:
    """Say why no GPU kernel can run a request, or None if this leaves it to each kernel."""
    r = request
    if r.q.is_cuda:
        if compute_capability(r.q.device) < OLDEST:
            return f"the GPU's compute capability is {compute_capability(r.q.device) / 10}, not {OLDEST / 10} or later"
    elif not triton.knobs.runtime.interpret:
        return f"the tensors are on {r.q.device}, not on a CUDA GPU, and TRITON_INTERPRET=1 is not set"
    elif not INTERPRETER_WORKS:
        versions = f"Triton {version('triton')} does not work with NumPy {version('numpy')}"
        return f"the interpreter of {versions}; install Triton 3.7 or later, or NumPy before 2.4"
    if r.plan.keep is not None and r.plan.score_hook is None:
        return "the method has no score_hook, only a rule in PyTorch"
    for name, x in (("q", r.q), ("k", r.k), ("v", r.v)):
        if x.dtype not in DTYPES:
            return f"{name} is {x.dtype}, not one of {', '.join(map(str, DTYPES))}"
    return None


def capability_of(device: torch.device) -> int:
    """Return the compute capability to look settings up for; Triton's interpreter, on a CPU, takes the simplest."""
    return compute_capability(device) if device.type == "cuda" else OLDEST


def options_of(request: AttentionRequest, settings: Settings) -> Options:
    """Return what a kernel has to know of a request at compile time."""
    r, plan = request, request.plan
    head_dim, value_dim = r.q.shape[2], r.v.shape[2]
    return Options(
        block_m=settings.block_m,
        block_n=settings.block_n,
        block_d=block_dim(head_dim),
        block_dv=block_dim(value_dim),
        head_dim=head_dim,
        value_dim=value_dim,
        group=r.group,
        causal=r.is_causal,
        sliding=r.sliding_window is not None,
        softcap=r.softcap is not None,
        sinks=plan.num_sink_tokens > 0 or r.has_positions,
        prescale=not (plan.keep is None or plan.scale_free),
        keeps_group_max=plan.keep is None or plan.keeps_group_max,
        keeps_nothing=plan.keeps_nothing,
        keeps_top=plan.keeps_top,
        sparse_decode=plan.sparse_decode,
        frozen=settings.frozen and not r.has_positions,
        # From Hopper on, the compiler lays out a tile's products alike without help.
        hopper=settings.descriptors,
        positions=r.has_positions,
        unlisted=r.blocks is not None and (plan.num_sink_tokens > 0 or plan.dense_window_size > 0),
    )


def is_short(request: AttentionRequest) -> bool:
    """Whether a launch costs as much as the kernel: up to about 1024 tokens of 32 heads."""
    r = request
    return r.q.shape[0] * r.q.shape[1] * min(r.max_k, r.k.shape[0]) <= SHORT


def is_light(request: AttentionRequest) -> bool:
    """Whether layers of a model with such attention keep the GPU busy for less time than Python, if none is trained.

    Then a kernel that takes Python one launch is faster than one that takes it two, though by itself it is slower. The
    rest of a layer has as much work as there are tokens times the square of its width, which for a head dimension of 64
    is about the width of the heads together. So SmolLM2-135M is light up to its 8192 tokens, with twice as many not;
    Llama-3.2-1B below 1000. Layers with lists of blocks do not count as light: they have not been timed.
    """
    r = request
    tokens, heads, head_dim = r.q.shape
    if head_dim != 64 or r.with_lse or r.blocks is not None:
        return False
    return tokens * (heads * head_dim) ** 2 <= LIGHT


def block_dim(dim: int) -> int:
    """Return the tile width for a head dimension: matrix instructions want powers of two from 16 on."""
    return max(16, 1 << (dim - 1).bit_length())


def distances(request: AttentionRequest) -> tuple[int, int, int]:
    """Return the sink tokens, the dense window and the sliding window, in tokens."""
    plan = request.plan
    lengths = (plan.num_sink_tokens, plan.dense_window_size, request.sliding_window or 0)
    sinks, window, sliding_window = (min(x, FAR) for x in lengths)
    return sinks, window, sliding_window


def hook_arguments(plan: AttentionPlan) -> tuple[Any, ...]:
    """Return the ``args`` of a plan's hooks."""
    return (*map(constexpr, plan.hook_constants), *map(float, plan.hook_args))
