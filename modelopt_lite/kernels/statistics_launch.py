"""Launches the kernel that counts what a plan keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from .device import cdiv, launch
from .portable import launch as portable_launch
from .request import AttentionRequest
from .settings import Settings, block_dim, capability_of, default_settings, distances, hook_arguments
from .statistics_kernel import count_scores, join_parts

PROGRAMS = 8192
"""Programs up to which keys are cut into parts: more than a GPU runs at once, so that none waits for a long one."""
SHORTEST_PART = 1024
"""Keys of a part, at least, of the last queries; over a causal sequence parts have half as many on average."""
MOST_PARTS = 32
"""How many parts one program joins, in registers."""
refusal = portable_launch.refusal
"""Says why the kernel cannot run a request, or None if it can."""


def settings_for(request: AttentionRequest) -> Settings:
    """Return tiles and warps: those of the portable forward, which holds more at a time."""
    r, block_d = request, block_dim(request.q.shape[2])
    settings = default_settings(
        capability_of(r.q.device), r.q.dtype, block_d, r.group, r.is_causal, portable_launch.SETTINGS
    )
    return portable_launch.fitted(settings._replace(frozen=False, descriptors=False), r.blocks)


def count(
    request: AttentionRequest, settings: Settings | None = None, parts: int | None = None, *, skips: bool = False
) -> Tensor:
    """Count what a request keeps, without waiting for its device.

    Args:
        request: what is counted, with its lists if the plan chooses blocks; :func:`refusal` has been asked.
        settings: tiles and warps, instead of the usual ones.
        parts: into how many parts the keys of a tile of queries are cut, instead of so many that the GPU is busy.
        skips: whether a skip rule alone has made the lists, so that it has skipped what is not listed.

    Returns:
        For each query head, how many queries see any key, the keys that they see, those of them that are kept, and the
        sum over its queries of the share of the dense softmax that is kept; and how many key blocks query blocks see,
        how many of them are listed and how many are skipped, 0 without lists. FP64 ``[query_heads, 7]``.
    """
    r = request.readable()
    settings = settings or settings_for(r)
    heads, batch = r.q.shape[1], r.starts_q.shape[0]
    options = portable_launch.options_for(r, settings)._replace(keeps_group_max=False, unlisted=r.blocks is not None)
    programs = cdiv(r.max_q + settings.block_m - 1, settings.block_m) * batch * heads
    if programs == 0:
        return torch.zeros(heads, 7, dtype=torch.float64, device=r.q.device)
    if parts is None:
        keys = min(r.max_k, r.k.shape[0])
        parts = max(1, min(PROGRAMS // programs, keys // SHORTEST_PART, MOST_PARTS))
    states = torch.empty(programs, parts, 4, settings.block_m, dtype=torch.float32, device=r.q.device)
    counts = torch.empty(programs, 7, dtype=torch.float64, device=r.q.device)
    lists = None
    if r.blocks is not None:
        blocks = r.blocks
        shape = (heads // blocks.counts.shape[0], *blocks.indices.shape[1:])
        lists = (blocks.counts.contiguous(), blocks.indices.contiguous(), blocks.starts.contiguous(), *shape)
    sequences = (r.starts_q, r.lengths_q, r.starts_k, r.lengths_k, *r.first_positions())
    sinks, window, sliding_window = distances(r)
    launch(
        count_scores, programs * parts,
        (
            r.q, r.k, states, (r.q.stride()[:2], r.k.stride()[:2]), sequences, (heads, heads // r.k.shape[1]),
            (r.softmax_scale, r.softcap or 0.0), programs, parts, batch, sinks, window, sliding_window, lists,
            hook_arguments(r.plan),
        ),
        (r.plan.score_hook, options), num_warps=settings.num_warps, num_stages=settings.num_stages,
    )  # fmt: skip
    launch(
        join_parts, programs, (states, counts, sequences, heads, parts, batch, sliding_window, lists),
        (skips, 1 << (parts - 1).bit_length(), options), num_warps=4,
    )  # fmt: skip
    return counts.view(-1, heads, 7).sum(0)
