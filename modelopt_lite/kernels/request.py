"""One attention call: tensors, packing, masks and plan, made once and handed on whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..plan import BLOCK_SIZE, DENSE, AttentionPlan, plan_by_name
from .blocks import KeyBlocks

T = TypeVar("T")

SCHEMA = {
    "q": "Tensor",
    "k": "Tensor",
    "v": "Tensor",
    "s_aux": "Tensor?",
    "starts_q": "Tensor",
    "lengths_q": "Tensor",
    "max_q": "SymInt",
    "starts_k": "Tensor",
    "lengths_k": "Tensor",
    "max_k": "SymInt",
    "is_causal": "bool",
    "softmax_scale": "float",
    "sliding_window": "SymInt?",
    "softcap": "float?",
    "plan": "str",
    "first_q": "Tensor?",
    "first_k": "Tensor?",
    "counts": "Tensor?",
    "output_rows": "Tensor?",
    "page_table": "Tensor?",
    "page_size": "SymInt",
    "with_lse": "bool",
    "block_counts": "Tensor?",
    "block_indices": "Tensor?",
    "block_starts": "Tensor?",
    "block_size": "int",
    "block_rows": "int",
}
"""The fields of a request, in their order, and what PyTorch's operators call their types.

A plan travels by its name, the lists of key blocks by their fields, which come last.
"""
MAX_QUERIES = 16
"""Queries of a sequence up to which a call is a step of decode, for which there are kernels of its own."""
_FIELDS = tuple(SCHEMA)[: -len(KeyBlocks._fields)]
_PLAN = _FIELDS.index("plan")
_NO_BLOCKS = (None, None, None, BLOCK_SIZE, BLOCK_SIZE)


class HookRefusedError(Exception):
    """A kernel found at its first launch that it cannot compile the plan's hook; another one has to run."""


class PackedSequence(NamedTuple):
    """One sequence of a request.

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


@dataclass
class ForwardResult:
    """What a forward pass left for its backward pass.

    Attributes:
        output: ``[total_q, query_heads, value_dim]``. A kernel that has read it sets this to None. So its memory is
            free for what the kernel needs next, unless somebody else holds the output.
        lse: the logarithms of the softmax denominators, ``[total_q, query_heads]``.
    """

    output: Tensor | None
    lse: Tensor


class AttentionRequest(NamedTuple):
    """A checked attention call; what every kernel is given.

    A tuple because it is made at every call, and nothing immutable is made faster; its fields are read by name.

    Attributes:
        q: queries of all sequences, ``[total_q, query_heads, head_dim]``, any strides.
        k: keys, ``[total_k, kv_heads, head_dim]``.
        v: values, ``[total_k, kv_heads, value_dim]``.
        s_aux: one more logit per query head in every softmax, ``[query_heads]``, or None.
        starts_q: row of each sequence's first query, ``[batch]``, int32 or int64.
        lengths_q: its number of queries.
        max_q: an upper bound of ``lengths_q``.
        starts_k: row of its first key.
        lengths_k: its number of keys.
        max_k: an upper bound of ``lengths_k``.
        is_causal: whether a query sees only keys at its own position and before.
        softmax_scale: factor on the scores, > 0.
        sliding_window: a query sees only the keys fewer positions away; None: all.
        softcap: bound of the scores, > 0, or None.
        plan: which of the visible keys take part.
        first_q: position of each sequence's first query; None if the queries are the last tokens.
        first_k: position of each sequence's first key; None if 0.
        counts: ``[sequences, longest]``, on the CPU: how many of the sequences are there, and an upper bound of their
            lengths, where :func:`~modelopt_lite.kernels.operator.pack` found them; None if all are.
        output_rows: the row that the result of each row of ``q`` goes to, a permutation of all rows, ``[total_q]``,
            int64; None: the same row.
        page_table: where keys and values lie in pages, which sequences own in any order, the pages of each sequence,
            ``[batch, pages of the longest]``, int32; else None. ``k`` and ``v`` are then all pages, flattened, and key
            ``j`` of sequence ``b`` lies in row ``page_table[b, j // page_size] * page_size + j % page_size``;
            ``starts_k`` is not used, nor are entries beyond a sequence's keys.
        page_size: keys a page.
        with_lse: whether logarithms of the softmax denominators are wanted.
        blocks: the key blocks that each query block looks at; None: all. They are final: where there are lists, no
            kernel applies the plan's selector or skip rule.
        grids: where calls with the same packing, such as the layers of a forward pass, share what they find out about
            their blocks; None: nothing is shared.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    s_aux: Tensor | None
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
    counts: Tensor | None = None
    output_rows: Tensor | None = None
    page_table: Tensor | None = None
    page_size: int = 0
    with_lse: bool = False
    blocks: KeyBlocks | None = None
    grids: dict[Any, Any] | None = None

    def flatten(self) -> tuple[Any, ...]:
        """Return the fields as PyTorch's operators take them, in the order of :data:`SCHEMA`."""
        blocks = _NO_BLOCKS if self.blocks is None else self.blocks
        return (*(self.plan.name if name == "plan" else getattr(self, name) for name in _FIELDS), *blocks)

    @classmethod
    def unflatten(cls, values: Sequence[Any]) -> AttentionRequest:
        """Undo :meth:`flatten`."""
        fields, blocks = list(values[: len(_FIELDS)]), values[len(_FIELDS) :]
        fields[_PLAN] = plan_by_name(fields[_PLAN])
        fields.append(None if blocks[0] is None else KeyBlocks(*blocks))
        return cls(*fields)

    def present(self) -> AttentionRequest:
        """Keep only the sequences that ``counts`` says are there."""
        if self.counts is None:
            return self
        number, longest = self.counts.tolist()
        starts, lengths, starts_k, lengths_k = self.starts_q, self.lengths_q, self.starts_k, self.lengths_k
        starts_q, lengths_q = starts[:number], lengths[:number]
        return self._replace(
            counts=None,
            starts_q=starts_q,
            lengths_q=lengths_q,
            max_q=longest,
            starts_k=starts_q if starts_k is starts else starts_k[:number],
            lengths_k=lengths_q if lengths_k is lengths else lengths_k[:number],
            max_k=longest,
            blocks=self.blocks and self.blocks._replace(starts=self.blocks.starts[:number]),
        )

    def readable(self) -> AttentionRequest:
        """Return the request with copies of what kernels could not read: they take any strides but the last ones."""
        changes = {name: x.contiguous() for name in ("q", "k", "v") if (x := getattr(self, name)).stride(2) != 1}
        packing = ("starts_q", "lengths_q", "starts_k", "lengths_k", "first_q", "first_k", "output_rows")
        for name in ("s_aux", *packing, "page_table"):
            x = getattr(self, name)
            if x is not None and not x.is_contiguous():
                changes[name] = x.contiguous()
        return self._replace(**changes) if changes else self

    def placed(self, result: Tensor) -> Tensor:
        """Return a result, which has its rows in the order of ``q``, with each where it goes."""
        # Not in place, for which torch.vmap has no rule.
        return result if self.output_rows is None else torch.empty_like(result).index_copy(0, self.output_rows, result)

    def without_pages(self) -> AttentionRequest:
        """Return the request with the keys of each sequence in one place, for kernels that read no page table."""
        if self.page_table is None:
            return self
        batch, pages = self.page_table.shape
        slots = pages * self.page_size
        page = torch.arange(slots, device=self.k.device) // self.page_size
        rows = (
            self.page_table.long()[:, page] * self.page_size
            + torch.arange(slots, device=self.k.device) % self.page_size
        )
        # Entries beyond a sequence's keys may be anything.
        rows = rows.masked_fill(torch.arange(slots, device=rows.device) >= self.lengths_k[:, None], 0).flatten()
        starts = torch.arange(batch, device=rows.device, dtype=self.starts_k.dtype) * slots
        return self._replace(k=self.k[rows], v=self.v[rows], starts_k=starts, page_table=None, page_size=0)

    def signature(self) -> tuple[Any, ...]:
        """Return all that preparations for a request may depend on: everything but its tensors' addresses and contents.

        Of an address, Triton looks at whether 16 divides it. Written out, as it is computed at every call.
        """
        q, k, v, s_aux, first_q, first_k = self.q, self.k, self.v, self.s_aux, self.first_q, self.first_k
        starts_q, lengths_q, starts_k, lengths_k = self.starts_q, self.lengths_q, self.starts_k, self.lengths_k
        return (
            q.device, q.dtype, q.shape, q.stride(), q.data_ptr() & 15,
            k.device, k.dtype, k.shape, k.stride(), k.data_ptr() & 15,
            v.device, v.dtype, v.shape, v.stride(), v.data_ptr() & 15,
            None if s_aux is None else _small(s_aux),
            _small(starts_q), _small(lengths_q),
            starts_k is starts_q or _small(starts_k), lengths_k is lengths_q or _small(lengths_k),
            first_q if first_q is None else _small(first_q), first_k if first_k is None else _small(first_k),
            None if self.output_rows is None else _small(self.output_rows),
            None if self.page_table is None else (_small(self.page_table), self.page_size),
            self.max_q, type(self.max_q), self.max_k, type(self.max_k), self.is_causal, type(self.is_causal),
            self.softmax_scale, self.sliding_window, self.softcap, self.plan.name, self.with_lse,
            None if self.blocks is None else self.blocks.signature(),
        )  # fmt: skip

    def once(self, tensors: tuple[Tensor | None, ...], key: tuple[Any, ...], find: Callable[[], T]) -> T:
        """Return what was found for the same tensors and the same key before, where calls share it in ``grids``."""
        if self.grids is None:
            return find()
        key = (*map(id, tensors), *key)
        found: tuple[tuple[Tensor | None, ...], T] | None = self.grids.get(key)
        if found is None:  # as long as the tensors are held, no others have their identity
            found = self.grids[key] = (tensors, find())
        return found[1]

    @property
    def group(self) -> int:
        """How many consecutive keys one decision of the plan's rule looks at; 1 if it has no rule."""
        return 1 if self.plan.keep is None else self.plan.group

    @property
    def has_positions(self) -> bool:
        """Whether positions are given, or a window without causality makes them matter."""
        window_without_causality = self.sliding_window is not None and not self.is_causal
        return self.first_q is not None or self.first_k is not None or window_without_causality

    @property
    def may_lack_keys(self) -> bool:
        """Whether a query of a sequence with keys may see or keep none of them."""
        plan = self.plan
        if self.has_positions:
            return True
        if self.is_causal and plan.dense_window_size > 0:
            return False
        if not (plan.keep is None or plan.keeps_group_max):
            return True
        return self.blocks is not None and not (self.is_causal and plan.keeps_diagonal)

    def first_positions(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Return the positions of each sequence's first query and first key; without waiting for their device."""
        if not self.has_positions:
            return None, None
        first_k = torch.zeros_like(self.starts_k) if self.first_k is None else self.first_k
        return first_k + self.lengths_k - self.lengths_q if self.first_q is None else self.first_q, first_k

    def sequences(self) -> Iterator[PackedSequence]:
        """Yield each sequence's rows and positions; waits for their device."""
        columns = [x.tolist() for x in (self.starts_q, self.lengths_q, self.starts_k, self.lengths_k)]
        firsts_k = [0] * len(columns[0]) if self.first_k is None else self.first_k.tolist()
        firsts_q = [None] * len(columns[0]) if self.first_q is None else self.first_q.tolist()
        for start_q, len_q, start_k, len_k, first_q, first_k in zip(*columns, firsts_q, firsts_k, strict=True):
            if first_q is None:
                first_q = first_k + len_k - len_q
            yield PackedSequence(slice(start_q, start_q + len_q), slice(start_k, start_k + len_k), first_q, first_k)

    def is_decode(self, len_q: int) -> bool:
        """Whether a sequence with ``len_q`` queries is decode that stays dense: a single query is, by default."""
        return len_q == 1 and not self.plan.sparse_decode

    def plan_for(self, len_q: int) -> AttentionPlan:
        """Return the plan of a sequence with ``len_q`` queries: a single query is decode, dense by default."""
        return DENSE if self.is_decode(len_q) else self.plan

    def without_needless_choice(self, *, knows_lengths: bool = True) -> AttentionRequest:
        """Return a request whose plan chooses no blocks if there is no choice.

        Args:
            knows_lengths: whether the upper bounds of lengths are numbers, and not what a graph will know.
        """
        if self.is_decode(self.max_q):
            return self._replace(plan=DENSE)
        if not knows_lengths or self.first_q is not None or self.first_k is not None:
            return self
        return self._replace(plan=self.plan.for_keys(self.max_k, self.is_causal))

    @property
    def grid(self) -> tuple[int, int]:
        """The keys of a key block and the positions of a query block, where there are any blocks."""
        of = self.blocks or self.plan.blocks or self.plan.skip
        return (BLOCK_SIZE, BLOCK_SIZE) if of is None else (of.block_size, of.block_rows)

    def check_values(self) -> None:
        """Check starts and lengths of every sequence against the rows there are; waits for their device.

        Raises:
            ValueError: naming the sequence, or ``output_rows`` if these are no permutation.
        """
        occupied: list[tuple[int, int]] = []
        for b, (queries, keys, first_q, first_k) in enumerate(self.sequences()):
            for suffix, rows, longest, total in (
                ("", queries, self.max_q, self.q.shape[0]),
                ("_k", keys, self.max_k, self.k.shape[0]),
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
        if self.blocks is not None:
            self._check_lists(self.blocks.on_cpu())
        if self.output_rows is not None and self.output_rows.sort().values.tolist() != [*range(self.q.shape[0])]:
            raise ValueError(f"output_rows: not a permutation of the {self.q.shape[0]} rows of q")
        occupied.sort()
        for (_, stop), (start, _) in pairwise(occupied):
            if stop > start:
                raise ValueError(f"b_start_loc: row {start} belongs to two sequences; each query row belongs to one")

    def _check_lists(self, blocks: KeyBlocks) -> None:
        """Check that the lists name key blocks that are there."""
        size, rows = blocks.block_size, blocks.block_rows
        for b, (queries, keys, first_q, first_k) in enumerate(self.sequences()):
            len_q, len_k = queries.stop - queries.start, keys.stop - keys.start
            if len_q == 0:
                continue
            start, here = int(blocks.starts[b]), (first_q + len_q - 1) // rows - first_q // rows + 1
            if not 0 <= start <= blocks.counts.shape[1] - here:
                raise ValueError(
                    f"blocks.starts[{b}]: {start} is not allowed; the sequence has {here} query blocks, and there are "
                    f"{blocks.counts.shape[1]} lists"
                )
            counts, indices = blocks.counts[:, start : start + here], blocks.indices[:, start : start + here]
            there = (first_k + len_k - 1) // size - first_k // size + 1 if len_k else 0
            listed = torch.arange(indices.shape[2], device="cpu") < counts[..., None]
            if not bool(((counts >= 0) & (counts <= indices.shape[2])).all()):
                raise ValueError(f"blocks.counts: of sequence {b}, not all are from 0 to {indices.shape[2]}")
            if not bool(((indices >= 0) & (indices < there) | ~listed).all()):
                raise ValueError(f"blocks.indices: of sequence {b}, not all are from 0 to {there - 1}, its key blocks")
            if not bool(((indices.diff(dim=-1) > 0) | ~listed[..., 1:]).all()):
                raise ValueError(f"blocks.indices: of sequence {b}, not all are in ascending order")


def _small(x: Tensor) -> tuple[Any, ...]:
    return x.dtype, x.shape, x.stride(), x.device, x.data_ptr() & 15
