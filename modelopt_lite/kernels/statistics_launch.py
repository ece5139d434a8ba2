"""Launches the kernels that count what a plan keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from .arguments import check_request
from .choice import MAX_SIGNATURES, signature
from .device import Launch
from .portable import launch as portable_launch
from .request import AttentionRequest
from .settings import Settings, block_dim, capability_of, default_settings, distances, hook_arguments
from .statistics_kernel import count_scores, join_parts

Count: TypeAlias = "Callable[[AttentionRequest, Tensor | None], Tensor]"

PROGRAMS = 4096
"""Programs up to which keys are cut into parts: more than a GPU runs at once, so that none waits for a long one."""
SHORTEST_PART = 1024
"""Keys of a part, at least, of the last queries; over a causal sequence parts have half as many on average."""
MOST_PARTS = 8
"""Parts, at most; they have to be joined."""
JOINED = 2048
"""Numbers that a program joins at a time, at least those of one tile."""

_prepared: dict[tuple[object, ...], Count] = {}


def find(request: AttentionRequest, every: int = 1, is_prefill: bool = False) -> Count | None:
    """Return what counts requests like one, as :func:`prepare` does, or None if the kernels cannot run it."""
    key = (signature(request, "triton"), every, is_prefill)
    known = _prepared.get(key)
    if known is None and portable_launch.refusal(request) is None:
        check_request(request)
        if len(_prepared) >= MAX_SIGNATURES:
            _prepared.clear()
        known = _prepared[key] = prepare(request, every=every, is_prefill=is_prefill)
    return known


def settings_for(request: AttentionRequest) -> Settings:
    """Return tiles and warps: those of the portable forward, which holds more at a time.

    Two stages are enough: where the forward has three, more programs fit into the shared memory with two.
    """
    r, block_d = request, block_dim(request.q.shape[2])
    settings = default_settings(
        capability_of(r.q.device), r.q.dtype, block_d, r.group, r.is_causal, portable_launch.SETTINGS
    )
    return settings._replace(num_stages=min(settings.num_stages, 2))


def prepare(
    request: AttentionRequest,
    settings: Settings | None = None,
    parts: int | None = None,
    *,
    every: int = 1,
    is_prefill: bool = False,
) -> Count:
    """Compute what requests of one signature have in common.

    Args:
        request: one of them, with its lists if the plan chooses blocks; the portable kernel can run it.
        settings: tiles and warps, instead of the usual ones.
        parts: into how many parts the keys of a tile of queries are cut, instead of so many that the GPU is busy.
        every: of how many query blocks one is counted, as of :func:`.statistics.sample`, and stands for so many.
        is_prefill: whether sequences with a single query are left out.

    Returns:
        What counts without waiting for the device: a function of a request and of what to add the counts to in place,
        None: nothing. It returns for each query head how many queries see any key, the keys that they see, those of
        them that are kept, and the sum over its queries of the share of the dense softmax that is kept; and how many
        key blocks query blocks see, how many of them are visited and how many a skip rule alone skips, 0 without
        lists. FP64 ``[query_heads, 7]``.
    """
    is_readable = request.readable() is request
    r = request.readable()
    settings = portable_launch.fitted((settings or settings_for(r))._replace(frozen=False, descriptors=False), r.blocks)
    rows = r.grid[1] if every > 1 else settings.block_m
    settings = settings._replace(block_m=math.gcd(settings.block_m, rows))
    heads, batch = r.q.shape[1], r.starts_q.shape[0]
    tiles = _most_tiles(r, every, rows) * (rows // settings.block_m)
    options = portable_launch.options_for(r, settings)._replace(keeps_group_max=False, unlisted=r.blocks is not None)
    if parts is None:
        keys = min(r.max_k, r.k.shape[0])
        parts = max(1, min(PROGRAMS // max(1, tiles * heads), keys // SHORTEST_PART, MOST_PARTS))
    padded = 1 << (parts - 1).bit_length()
    together = max(1, min(1 << (tiles - 1).bit_length(), JOINED // (padded * settings.block_m)))
    device, strides = r.q.device, (r.q.stride()[:2], r.k.stride()[:2])
    counts = Launch(
        count_scores, device, r.plan.score_hook, options, num_warps=settings.num_warps, num_stages=settings.num_stages
    )
    joins = {
        adds: Launch(join_parts, device, adds, r.plan.only_skips, together, padded, options, num_warps=8)
        for adds in (False, True)
    }
    numbers = (r.softmax_scale, r.softcap or 0.0)
    rest = (tiles, parts, batch, (every, rows, 2 if is_prefill else 1), *distances(r))
    heads_of, hook_args = (heads, heads // r.k.shape[1]), hook_arguments(r.plan)
    size = tiles * heads * (4 * parts + 2) * settings.block_m

    def run(request: AttentionRequest, totals: Tensor | None = None) -> Tensor:
        r = request if is_readable else request.readable()
        if tiles == 0:
            return torch.zeros(heads, 7, dtype=torch.float64, device=device) if totals is None else totals
        lists, adds = None, totals is not None
        if r.blocks is not None:
            blocks = r.blocks
            shape = (heads // blocks.counts.shape[0], *blocks.indices.shape[1:])
            lists = (blocks.counts.contiguous(), blocks.indices.contiguous(), blocks.starts.contiguous(), *shape)
        sequences = (r.starts_q, r.lengths_q, r.starts_k, r.lengths_k, *r.first_positions())
        states = torch.empty(size, dtype=torch.float32, device=device)
        if totals is None:
            totals = torch.empty(heads, 7, dtype=torch.float64, device=device)
        counts(
            tiles * heads * parts, r.q, r.k, states, strides, sequences, heads_of, numbers, *rest, lists, hook_args,
        )  # fmt: skip
        joins[adds](heads, states, totals, tiles, heads, parts, every)
        return totals

    return run


def _most_tiles(request: AttentionRequest, every: int, rows: int) -> int:
    """Return how many query blocks of ``rows`` positions are counted at most, over all sequences."""
    r, batch = request, request.starts_q.shape[0]
    total, longest = r.q.shape[0], min(r.max_q, r.q.shape[0])
    if total == 0 or longest == 0:
        return 0
    # Of n consecutive blocks at most (n - 1) // every + 1 are counted, and L queries lie in at most 1 + (L + rows - 2)
    # // rows blocks. Sequences share no queries.
    of_each = batch * ((longest + rows - 2) // (rows * every) + 1)
    return min(of_each, (total + batch * (rows - 2)) // (rows * every) + batch)
