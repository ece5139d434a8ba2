"""N:M selection: of every M consecutive visible keys, the N with the largest scores."""

from __future__ import annotations

import functools
from itertools import combinations

import torch
from torch import Tensor

from ..plan import DENSE, AttentionPlan, canonical_name, keep_plan
from .top_n_hooks import keep_top_n_hook, nth_largest_weight


def keep_top_n(scores: Tensor, q_pos: Tensor, k_pos: Tensor, *, n: int) -> Tensor:
    """Keep the ``n`` largest scores of each group, equal scores going to the lower key.

    Args:
        scores: ``[..., groups, group]``, one group along the last dimension, ``-inf`` where a key is not visible.
        q_pos: unused; positions do not matter to this rule.
        k_pos: unused.
        n: how many to keep, ``0 <= n <= group``.

    Returns:
        Booleans of the shape of ``scores``, exactly ``n`` true in each group. As keys that are not visible rank
        behind all others, the visible ones among them number exactly ``min(n, visible)``.
    """
    keys = scores.unbind(-1)
    # A key's rank is the number of keys in its group that go before it.
    ranks = [torch.zeros(key.shape, dtype=torch.int8, device=key.device) for key in keys]
    for lower, higher in combinations(range(len(keys)), 2):
        lower_first = keys[lower] >= keys[higher]
        ranks[higher] += lower_first
        ranks[lower] += ~lower_first
    # Stacked along -2 so that keys stored group member by group member, as the tiles have them, stay so.
    return torch.stack([rank < n for rank in ranks], dim=-2).mT


@functools.cache
def top_n_plan(n: int, m: int, num_sink_tokens: int, dense_window_size: int) -> AttentionPlan:
    """Return the plan of N:M sparse softmax; ``n`` of 0 or ``m`` is dense.

    Its name is that of the method's configuration, so that the method's own plan is the same object.

    Args:
        n: keys kept of every group, ``0 <= n <= m``.
        m: group size, one of 2, 4, 8, 16.
        num_sink_tokens: leading keys that stay dense, >= 0.
        dense_window_size: recent keys that stay dense, >= 0.

    Raises:
        ValueError: if a number is out of its range.
    """
    if m not in (2, 4, 8, 16):
        raise ValueError(f"sparsity_m: {m!r} is not allowed; one of 2, 4, 8, 16")
    if not 0 <= n <= m:
        raise ValueError(f"sparsity_n: {n!r} is not allowed; an integer from 0 (dense) to sparsity_m = {m}")
    if n in (0, m):
        return DENSE
    configuration = {
        "method": "sparse_softmax",
        "sparsity_n": n,
        "sparsity_m": m,
        "num_sink_tokens": num_sink_tokens,
        "dense_window_size": dense_window_size,
    }
    plan = AttentionPlan(
        keep=functools.partial(keep_top_n, n=n),
        group=m,
        num_sink_tokens=num_sink_tokens,
        dense_window_size=dense_window_size,
        score_hook=keep_top_n_hook,
        quick_hook=nth_largest_weight if m >= 8 else None,
        hook_constants=(n,),
        keeps_group_max=True,
        scale_free=True,
        keeps_top=n,
    )
    return keep_plan(plan, canonical_name(configuration))
