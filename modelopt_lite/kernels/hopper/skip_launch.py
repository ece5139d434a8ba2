"""Launches the kernel for Hopper GPUs that decides on skip-softmax in its main loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..device import Launch, processors, rebased
from ..portable.launch import new_results
from ..request import AttentionRequest
from ..selection import select_before_skipping
from ..settings import distances, options_of
from . import forward_launch as hopper_launch
from .forward import ROWS
from .forward_launch import WorkPreparation, hopper_settings
from .skip import skip_forward_hopper
from .visits import TILE
from .visits_launch import Schedule

HEAD_DIM = 128


def refusal(request: AttentionRequest) -> str | None:
    """Say why the kernel cannot run a request, or None if it can."""
    r, plan = request, request.plan
    if plan.skip is None or r.blocks is not None:
        return "there is nothing to decide in the loop: the plan has no skip rule, or the key blocks are listed"
    if plan.keep is not None:
        return "the plan has a rule beside its skip rule"
    if plan.blocks is not None and plan.blocks.recent_blocks == 0:
        return "the selector may drop diagonal blocks, which hold what scores are compared with"
    if r.grid != (TILE.value, TILE.value):
        return f"key blocks have {r.grid[0]} keys for {r.grid[1]} positions, not {TILE.value} for {TILE.value}"
    if not r.is_causal or r.sliding_window is not None or r.softcap is not None:
        return "the attention is not causal, or has a sliding window or a softcap"
    if not r.softmax_scale > 0:
        return f"softmax_scale is {r.softmax_scale}, not above 0"
    if r.q.dtype != torch.bfloat16 or r.q.shape[2] != HEAD_DIM:
        return f"q is {r.q.dtype} with a head_dim of {r.q.shape[2]}, not torch.bfloat16 with {HEAD_DIM}"
    return hopper_launch.device_refusal(r)


def prepare(request: AttentionRequest) -> Callable[[AttentionRequest], tuple[Tensor, Tensor | None]]:
    """As :func:`~modelopt_lite.kernels.hopper.forward_launch.prepare`: what requests of a signature have in common."""
    r = request
    total, query_heads, head_dim = r.q.shape
    settings = hopper_settings(r.q.dtype, head_dim, 1, True)
    options = options_of(r, settings)._replace(unlisted=True)
    heads = (query_heads, query_heads // r.v.shape[1])
    rest = (heads, (r.softmax_scale, 0.0), r.starts_q.shape[0], 0, 0, *distances(r))
    queries = hopper_launch.shared_descriptor(r.q, list(r.q.shape), list(r.q.stride()), [ROWS.value, 1, head_dim])
    keys, values = (hopper_launch.key_descriptor(x, options) for x in (r.k, r.v))
    prepare_work = WorkPreparation(r, options, r.k.shape[0])
    launch = Launch(skip_forward_hopper, r.q.device, options, num_warps=settings.num_warps, enable_fp_fusion=True)
    # The lists of one signature are alike.
    schedule = Schedule(r._replace(blocks=select_before_skipping(r)[0]), options, is_sparse=True)
    programs = min(query_heads * schedule.rows, processors(r.q.device))

    def run(r: AttentionRequest) -> tuple[Tensor, Tensor | None]:
        out, lse = new_results(r)
        if total == 0:
            return out, lse
        blocks, log_thresholds = select_before_skipping(r)
        visits = schedule(r._replace(blocks=blocks))
        counter = prepare_work(r, out, lse, None, None)
        launch(
            programs, rebased(queries, r.q), rebased(keys, r.k), rebased(values, r.v), out, lse, r.s_aux, counter,
            log_thresholds, out.stride()[:2], (r.starts_q, r.lengths_q, r.starts_k, r.lengths_k), *rest, *visits,
            schedule.rows, schedule.shape[2], schedule.heads_per_list,
        )  # fmt: skip
        return out, lse

    return run
