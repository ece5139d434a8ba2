"""Launches the kernel that counts what a plan keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from .device import cdiv, launch
from .portable import launch as portable_launch
from .request import AttentionRequest
from .settings import (
    Settings,
    block_dim,
    capability_of,
    default_settings,
    distances,
    hook_arguments,
)
from .statistics_kernel import count_scores

refusal = portable_launch.refusal
"""Says why the kernel cannot run a request, or None if it can."""


def settings_for(request: AttentionRequest) -> Settings:
    """Return tiles and warps: those of the portable forward, which holds more at a time."""
    r, block_d = request, block_dim(request.q.shape[2])
    settings = default_settings(
        capability_of(r.q.device), r.q.dtype, block_d, r.group, r.is_causal, portable_launch.SETTINGS
    )
    return portable_launch.fitted(settings._replace(frozen=False, descriptors=False), r.blocks)


def count(request: AttentionRequest, settings: Settings | None = None) -> Tensor:
    """Count what a request keeps, without waiting for its device.

    Args:
        request: what is counted, with its lists if the plan chooses blocks; :func:`refusal` has been asked.
        settings: tiles and warps, instead of the usual ones.

    Returns:
        For each query head, how many queries see any key, the keys that they see, those of them that are kept, and the
        sum over its queries of the share of the dense softmax that is kept, FP64 ``[query_heads, 4]``.
    """
    r = request.readable()
    settings = settings or settings_for(r)
    heads, batch = r.q.shape[1], r.starts_q.shape[0]
    options = portable_launch.options_for(r, settings)._replace(keeps_group_max=False, unlisted=r.blocks is not None)
    programs = cdiv(r.max_q + settings.block_m - 1, settings.block_m) * batch * heads
    counts = torch.empty(programs, 4, dtype=torch.float64, device=r.q.device)
    listed = None
    if r.blocks is not None:
        mask = r.blocks.mask()
        shape = (heads // mask.shape[0], *mask.shape[1:])
        listed = (mask.contiguous().view(torch.int8), r.blocks.starts.contiguous(), *shape)
    if programs:
        sequences = (r.starts_q, r.lengths_q, r.starts_k, r.lengths_k, *r.first_positions())
        launch(
            count_scores, programs,
            (
                r.q, r.k, counts, (r.q.stride()[:2], r.k.stride()[:2]), sequences,
                (heads, heads // r.k.shape[1]), (r.softmax_scale, r.softcap or 0.0), batch, *distances(r), listed,
                hook_arguments(r.plan),
            ),
            (r.plan.score_hook, options), num_warps=settings.num_warps, num_stages=settings.num_stages,
        )  # fmt: skip
    return counts.view(-1, heads, 4).sum(0)
