"""One attention computation without its tensors' values: lengths, masks, scale and plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..plan import DENSE, AttentionPlan


class Sequence(NamedTuple):
    """One sequence of a problem.

    Attributes:
        queries: its rows in the packed queries.
        keys: its rows in the packed keys.
        first_q: position of its first query, counted from the sequence's first token.
        first_k: position of its first key.
    """

    queries: slice
    keys: slice
    first_q: int
    first_k: int


@dataclass(frozen=True)
class AttentionProblem:
    """What every backend is given beside query, key and value; the fields are those of :func:`kernels.attention`."""

    starts_q: Tensor
    lengths_q: Tensor
    max_q: int
    starts_k: Tensor
    lengths_k: Tensor
    max_k: int
    is_causal: bool
    softmax_scale: float
    sliding_window: int | None
    softcap: float | None
    plan: AttentionPlan
    first_q: Tensor | None = None
    first_k: Tensor | None = None

    @property
    def is_placed(self) -> bool:
        """Whether positions are given, or a window without causality makes them matter."""
        window_without_causality = self.sliding_window is not None and not self.is_causal
        return self.first_q is not None or self.first_k is not None or window_without_causality

    def first_positions(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Return the positions of each sequence's first query and first key; without waiting for their device."""
        if not self.is_placed:
            return None, None
        first_k = torch.zeros_like(self.starts_k) if self.first_k is None else self.first_k
        return first_k + self.lengths_k - self.lengths_q if self.first_q is None else self.first_q, first_k

    def sequences(self) -> Iterator[Sequence]:
        """Yield each sequence's rows and positions; waits for their device."""
        columns = [x.tolist() for x in (self.starts_q, self.lengths_q, self.starts_k, self.lengths_k)]
        firsts_k = [0] * len(columns[0]) if self.first_k is None else self.first_k.tolist()
        firsts_q = [None] * len(columns[0]) if self.first_q is None else self.first_q.tolist()
        for start_q, len_q, start_k, len_k, first_q, first_k in zip(*columns, firsts_q, firsts_k, strict=True):
            if first_q is None:
                first_q = first_k + len_k - len_q
            yield Sequence(slice(start_q, start_q + len_q), slice(start_k, start_k + len_k), first_q, first_k)

    def plan_for(self, len_q: int) -> AttentionPlan:
        """Return the plan of a sequence with ``len_q`` queries: a single query is decode, dense by default."""
        return DENSE if len_q == 1 and not self.plan.sparse_decode else self.plan

    def check_values(self, total_q: int, total_k: int) -> None:
        """Check starts and lengths of every sequence against the rows there are; waits for their device.

        Raises:
            ValueError: naming the sequence.
        """
        occupied: list[tuple[int, int]] = []
        for b, (queries, keys, first_q, first_k) in enumerate(self.sequences()):
            for suffix, rows, longest, total in (
                ("", queries, self.max_q, total_q),
                ("_k", keys, self.max_k, total_k),
            ):
                length = rows.stop - rows.start
                if not (0 <= length <= longest):
                    raise ValueError(
                        f"b_seq_len{suffix}[{b}]: {length} is not allowed; 0 to max_input_len{suffix} = {longest}"
                    )
                if not (rows.start >= 0 and rows.stop <= total):
                    raise ValueError(
                        f"b_start_loc{suffix}[{b}]: rows {rows.start} to {rows.stop} are not allowed; there are {total}"
                    )
            len_q, len_k = queries.stop - queries.start, keys.stop - keys.start
            if first_k < 0:
                raise ValueError(f"b_first_k[{b}]: {first_k} is not allowed; >= 0")
            if self.first_q is not None and self.is_causal and len_q and first_q < 0:
                raise ValueError(f"b_first_q[{b}]: {first_q} is not allowed; >= 0 if causal")
            if self.first_q is None and self.is_causal and len_q > len_k:
                raise ValueError(f"b_seq_len_k[{b}]: {len_k} is not allowed; if causal, at least the {len_q} queries")
            if len_q:
                occupied.append((queries.start, queries.stop))
        occupied.sort()
        for (_, stop), (start, _) in pairwise(occupied):
            if stop > start:
                raise ValueError(f"b_start_loc: row {start} belongs to two sequences; each query row belongs to one")
