"""Random attention problems for property tests."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from modelopt_lite.kernels.problem import AttentionProblem
from modelopt_lite.kernels.top_n import top_n_plan

SCALE = 0.25  # a power of two: scores of the inputs below are exact in every precision


@dataclass
class Case:
    """Packed tensors and everything else an attention call takes.

    Queries and keys are small multiples of 1/2, so that all scores are exact in FP32 and many of them equal: a
    selection has to agree to the key, ties included. Rows that belong to no sequence hold NaN.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    s_aux: Tensor | None
    problem: AttentionProblem
    n: int
    m: int

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of ``attention``."""
        p = self.problem
        return {
            "b_start_loc": p.starts_q,
            "b_seq_len": p.lengths_q,
            "max_input_len": p.max_q,
            "is_causal": p.is_causal,
            "softmax_scale": p.softmax_scale,
            "b_start_loc_k": p.starts_k,
            "b_seq_len_k": p.lengths_k,
            "max_input_len_k": p.max_k,
            "b_first_q": p.first_q,
            "b_first_k": p.first_k,
            "sliding_window": p.sliding_window,
            "softcap": p.softcap,
            "s_aux": self.s_aux,
        }

    def selection(self) -> dict[str, Any]:
        """Return the keyword arguments of the brute force."""
        p = self.problem
        return {
            "n": self.n,
            "m": self.m,
            "sinks": p.plan.num_sink_tokens,
            "window": p.plan.dense_window_size,
            "causal": p.is_causal,
            "sliding_window": p.sliding_window,
        }


@st.composite
def cases(draw: st.DrawFn, longest: int = 80, batch: int = 3, placed: bool = False) -> Case:
    """Draw a problem: ragged lengths with 0 and 1 among them, suffix queries, any heads, masks and N:M.

    With ``placed``, also positions that are not the default, and windows without causality.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    is_causal = draw(st.booleans())
    lengths_k = draw(st.lists(st.integers(0, longest), min_size=1, max_size=batch))
    lengths_q = [draw(st.integers(0, length if is_causal else longest)) for length in lengths_k]
    kv_heads, repeat = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    head_dim, value_dim = draw(st.sampled_from([(8, 8), (16, 12), (5, 3)]))
    m = draw(st.sampled_from([2, 4, 8, 16]))
    n = draw(st.integers(0, m))
    plan = top_n_plan(n, m, draw(st.integers(0, 9)), draw(st.sampled_from([0, 1, 3, 16, 200])))

    def packed(lengths: list[int]) -> tuple[Tensor, Tensor, int]:
        gaps = [draw(st.integers(0, 2)) for _ in lengths]
        starts, row = [], 0
        for length, gap in zip(lengths, gaps, strict=True):
            starts.append(row + gap)
            row += gap + length
        return torch.tensor(starts), torch.tensor(lengths), row + draw(st.integers(0, 2))

    def tensor(starts: Tensor, lengths: Tensor, rows: int, heads: int, dim: int, exact: bool) -> Tensor:
        x = torch.full((rows, heads, dim), torch.nan)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            shape = (length, heads, dim)
            values = (
                torch.randint(-2, 3, shape, generator=generator) / 2
                if exact
                else torch.randn(shape, generator=generator)
            )
            x[start : start + length] = values
        return x

    starts_q, len_q, rows_q = packed(lengths_q)
    starts_k, len_k, rows_k = packed(lengths_k)
    first_q = draw(st.none() | st.just([draw(st.integers(0, longest)) for _ in lengths_q])) if placed else None
    first_k = draw(st.none() | st.just([draw(st.integers(0, 40)) for _ in lengths_k])) if placed else None
    problem = AttentionProblem(
        starts_q,
        len_q,
        max(lengths_q),
        starts_k,
        len_k,
        max(lengths_k),
        is_causal,
        SCALE,
        draw(st.none() | st.integers(1, longest)) if is_causal or placed else None,
        draw(st.none() | st.just(2.0)),
        plan,
        None if first_q is None else torch.tensor(first_q),
        None if first_k is None else torch.tensor(first_k),
    )
    return Case(
        q=tensor(starts_q, len_q, rows_q, kv_heads * repeat, head_dim, exact=True),
        k=tensor(starts_k, len_k, rows_k, kv_heads, head_dim, exact=True),
        v=tensor(starts_k, len_k, rows_k, kv_heads, value_dim, exact=False),
        s_aux=draw(st.none() | st.just(torch.randn(kv_heads * repeat, generator=generator))),
        problem=problem,
        n=n,
        m=m,
    )
