"""The attention contract once more, key by key in Python loops: what the oracle is held against."""

import math

import torch
from torch import Tensor


def kept_keys(
    scores: list[float],
    position: int,
    *,
    first_key: int = 0,
    n: int,
    m: int,
    sinks: int,
    window: int,
    causal: bool,
    sliding_window: int | None,
    sparse: bool,
) -> list[int]:
    """Return the keys that one query at ``position`` attends to, given its scores with all keys there are."""
    visible = [
        j
        for j in range(first_key, first_key + len(scores))
        if (not causal or j <= position) and (sliding_window is None or abs(position - j) < sliding_window)
    ]
    if not sparse or n in (0, m):
        return visible
    kept = []
    for group in range(0, first_key + len(scores), m):
        members = [j for j in visible if group <= j < group + m]
        largest_first = sorted(members, key=lambda j: (-scores[j - first_key], j))
        kept += largest_first[:n]
    kept += [j for j in visible if j < sinks or 0 <= position - j < window]
    return sorted(set(kept))


def attention_brute_force(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    first_query: int | None = None,
    first_key: int = 0,
    **selection: object,
) -> tuple[Tensor, Tensor]:
    """Attention of one sequence, ``[tokens, heads, dim]``, FP64; also the number of keys kept, ``[queries, heads]``."""
    q, k, v = q.double(), k.double(), v.double()
    len_q, heads, _ = q.shape
    len_k, repeat = k.shape[0], heads // k.shape[1]
    output = torch.zeros(len_q, heads, v.shape[2], dtype=torch.float64)
    counts = torch.zeros(len_q, heads, dtype=torch.int64)
    for i in range(len_q):
        for head in range(heads):
            scores = (scale * (k[:, head // repeat] @ q[i, head])).tolist()
            if softcap is not None:
                scores = [softcap * math.tanh(score / softcap) for score in scores]
            position = i + (first_key + len_k - len_q if first_query is None else first_query)
            kept = kept_keys(scores, position, sparse=len_q > 1, first_key=first_key, **selection)
            kept = [j - first_key for j in kept]
            counts[i, head] = len(kept)
            extra = [] if s_aux is None else [float(s_aux[head])]
            if not kept and not extra:
                continue
            top = max([scores[j] for j in kept] + extra)
            total = sum(math.exp(scores[j] - top) for j in kept) + sum(math.exp(x - top) for x in extra)
            for j in kept:
                output[i, head] += math.exp(scores[j] - top) / total * v[j, head // repeat]
    return output, counts
