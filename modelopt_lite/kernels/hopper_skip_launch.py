"""Launches the kernel for Hopper GPUs that decides on skip-softmax in its main loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .device import Launch, processors, rebased
from .hopper import ROWS
from .hopper_launch import WorkPreparation, _key_descriptor, _shared_descriptor, hopper_settings
from .hopper_skip import skip_forward_hopper
from .portable import new_results
from .request import AttentionRequest
from .settings import distances, options_of
from .visits_launch import Schedule


def prepare(request: AttentionRequest) -> Callable[[AttentionRequest, Tensor], tuple[Tensor, Tensor | None]]:
    """Compute what requests of one signature have in common."""
    r = request
    assert r.blocks is not None
    total, query_heads, head_dim = r.q.shape
    settings = hopper_settings(r.q.dtype, head_dim, 1, True)
    options = options_of(r, settings)._replace(unlisted=True)
    heads = (query_heads, query_heads // r.v.shape[1])
    rest = (heads, (r.softmax_scale, 0.0), r.starts_q.shape[0], 0, 0, *distances(r))
    queries = _shared_descriptor(r.q, list(r.q.shape), list(r.q.stride()), [ROWS.value, 1, head_dim])
    keys, values = (_key_descriptor(x, options) for x in (r.k, r.v))
    prepare_work = WorkPreparation(r, options, r.k.shape[0])
    launch = Launch(skip_forward_hopper, r.q.device, options, num_warps=settings.num_warps, enable_fp_fusion=True)
    schedule = Schedule(r, options, is_sparse=True)
    programs = min(query_heads * schedule.rows, processors(r.q.device))

    def run(r: AttentionRequest, margins: Tensor) -> tuple[Tensor, Tensor | None]:
        out, lse = new_results(r)
        if total == 0:
            return out, lse
        visits: tuple[Any, ...] = (*schedule(r), schedule.rows, schedule.shape[2], schedule.heads_per_list)
        counter = prepare_work(r, out, lse, None, None)
        launch(
            programs, rebased(queries, r.q), rebased(keys, r.k), rebased(values, r.v), out, lse, r.s_aux, counter,
            margins, out.stride()[:2], (r.starts_q, r.lengths_q, r.starts_k, r.lengths_k), *rest, *visits,
        )  # fmt: skip
        return out, lse

    return run
