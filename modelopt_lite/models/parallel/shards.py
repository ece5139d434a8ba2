"""Which tokens of a batch each process has, and what follows from that for attention.

All of it is computed from the lengths of the sequences, on the CPU and without communication, once in a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, distributed

Exchange: TypeAlias = Literal["ring", "gather"]
T = TypeVar("T")


class Run(NamedTuple):
    """Tokens of one sequence that lie side by side in one process.

    Attributes:
        sequence: number of the sequence.
        first: position of the first token in its sequence.
        length: number of tokens.
        row: row of the batch.
        slot: slot of the first token in that row.
    """

    sequence: int
    first: int
    length: int
    row: int
    slot: int

    @property
    def end(self) -> int:
        """Position behind the last token."""
        return self.first + self.length

    def part(self, begin: int, end: int) -> Run:
        """Return the tokens ``begin`` to ``end - 1`` of the run."""
        return self._replace(first=self.first + begin, slot=self.slot + begin, length=end - begin)

    def precedes(self, other: Run) -> bool:
        """Whether another run continues this one, in its sequence and in its row."""
        same = (self.sequence, self.row) == (other.sequence, other.row)
        return same and (self.end, self.slot + self.length) == (other.first, other.slot)

    def overlaps(self, other: Run) -> bool:
        """Whether any slot is in both runs."""
        return self.row == other.row and max(self.slot, other.slot) < min(
            self.slot + self.length, other.slot + other.length
        )


class Segment(NamedTuple):
    """The tokens of one sequence that a forward pass adds.

    Attributes:
        sequence: number of the sequence.
        first: position of the first of them.
        columns: their columns in the batch as the caller has it.
    """

    sequence: int
    first: int
    columns: Tensor


class Pair(NamedTuple):
    """Queries and keys of one sequence that are computed together."""

    queries: Run
    keys: Run


@dataclass(frozen=True, eq=False)
class Shards:
    """How a batch is divided among processes.

    The slots of each row are cut into twice as many chunks as there are processes. Process ``i`` has chunk ``i`` and
    chunk ``i`` from the end, so that all have equally much to compute under causal attention. Each sequence begins at
    the beginning of a block, and chunks are whole blocks, so no group of keys and no block is in two processes.

    Attributes:
        group: the processes.
        rank: which of them this is.
        batch: rows of the batch.
        columns: columns of the batch as the caller has it.
        sources: the column that each slot of each process holds, -1 for none, ``[processes, batch, slots]``.
        queries: the runs of queries of each process.
        keys: the runs of keys of each process, cached ones included.
        slots_k: key slots of each row in each process.
        new: number of queries of each sequence, over all processes.
        ends: number of keys of each sequence, over all processes.
        is_replicated: whether every process has all queries.
        exchange: how keys and values come together.
    """

    group: distributed.ProcessGroup
    rank: int
    batch: int
    columns: int
    sources: Tensor
    queries: tuple[tuple[Run, ...], ...]
    keys: tuple[tuple[Run, ...], ...]
    slots_k: int
    new: dict[int, int]
    ends: dict[int, int]
    is_replicated: bool
    exchange: Exchange
    _remembered: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def size(self) -> int:
        """Number of processes."""
        return len(self.queries)

    @property
    def slots_q(self) -> int:
        """Query slots of each row in each process."""
        return self.sources.shape[2]

    @property
    def has_cache(self) -> bool:
        """Whether there are keys of earlier forward passes."""
        return self.new != self.ends

    def remembered(self, key: Any, compute: Callable[[], T]) -> T:
        """Return what was computed before under a key, so that all layers of a forward pass compute it once."""
        if key not in self._remembered:
            self._remembered[key] = compute()
        return cast(T, self._remembered[key])

    def is_single(self, run: Run) -> bool:
        """Whether a run's sequence has a single query in all processes together, which is decode."""
        return self.new[run.sequence] == 1

    def local(self, x: Tensor, fill: int) -> Tensor:
        """Return this process' part of a batch ``[batch, columns]``, ``fill`` where a slot holds no token."""
        sources = self.sources[self.rank].to(x.device)
        return x.gather(1, sources.clamp(min=0)).masked_fill(sources < 0, fill)

    def rows_of_keys(self, device: torch.device) -> tuple[Tensor, dict[int, int]]:
        """Say where the keys of all processes, one after the other, are to be found in the order of their positions.

        Returns:
            The rows in that order, and where each sequence begins in it.
        """

        def compute() -> tuple[Tensor, dict[int, int]]:
            places = sorted(
                (run.sequence, run.first, (rank * self.batch + run.row) * self.slots_k + run.slot, run.length)
                for rank, runs in enumerate(self.keys)
                for run in runs
            )
            starts: dict[int, int] = {}
            total = 0
            for sequence, _, _, length in places:
                starts.setdefault(sequence, total)
                total += length
            rows = [torch.arange(row, row + length, device="cpu") for _, _, row, length in [(0, 0, 0, 0), *places]]
            return torch.cat(rows).to(device), starts

        return self.remembered(("rows", device), compute)


def cut(
    segments: Sequence[Sequence[Segment]], columns: int, size: int, alignment: int
) -> tuple[Tensor, tuple[tuple[Run, ...], ...]]:
    """Divide a batch among processes.

    Args:
        segments: the sequences of each row.
        columns: columns of the batch as the caller has it.
        size: number of processes.
        alignment: where sequences and chunks begin, a multiple of this many slots.

    Returns:
        :attr:`Shards.sources` and the runs of each process.
    """
    starts: list[list[int]] = []
    longest = 1
    for row in segments:
        starts.append([])
        slot = 0
        for segment in row:
            starts[-1].append(slot)
            slot = -(-(slot + len(segment.columns)) // alignment) * alignment
        longest = max(longest, slot)
    chunk = -(-longest // (2 * size * alignment)) * alignment
    sources = torch.full((len(segments), 2 * size * chunk), -1, device="cpu")
    runs: list[list[Run]] = [[] for _ in range(size)]
    for number, (row, slots) in enumerate(zip(segments, starts, strict=True)):
        for segment, start in zip(row, slots, strict=True):
            end = start + len(segment.columns)
            sources[number, start:end] = segment.columns
            for part in range(start // chunk, -(-end // chunk)):
                low, high = max(start, part * chunk), min(end, (part + 1) * chunk)
                owner, half = (part, 0) if part < size else (2 * size - 1 - part, chunk)
                first, slot = segment.first + low - start, half + low - part * chunk
                run = Run(segment.sequence, first, high - low, number, slot)
                if runs[owner] and runs[owner][-1].precedes(run):
                    before = runs[owner].pop()
                    run = before._replace(length=before.length + run.length)
                runs[owner].append(run)
    parts = sources.unflatten(1, (2 * size, chunk))
    by_process = torch.stack([torch.cat([parts[:, i], parts[:, 2 * size - 1 - i]], 1) for i in range(size)])
    return by_process, tuple(map(tuple, runs))


def sequences_of(mask: Tensor | None, positions: Tensor | None, batch: int, columns: int) -> list[list[Tensor]]:
    """Return the columns of each sequence of each row; waits for the tensors.

    Args:
        mask: which tokens are real, ``[batch, columns]``; None: all.
        positions: positions of the tokens, ``[1 or batch, columns]``; position 0 begins a sequence. None: each row is
            one sequence.
        batch: rows.
        columns: columns.
    """
    real = torch.ones(batch, columns, dtype=torch.bool, device="cpu") if mask is None else mask.cpu().bool()
    first = torch.zeros_like(real) if positions is None else (positions.cpu() == 0).expand(batch, -1)
    found: list[list[Tensor]] = []
    for row in range(batch):
        places = real[row].nonzero()[:, 0]
        begins = first[row, places].nonzero()[:, 0].tolist()
        edges = sorted({0, *begins})[1:]
        found.append([part for part in places.tensor_split(edges) if len(part)])
    return found


def reachable(pair: Pair, is_causal: bool, sliding_window: int | None) -> bool:
    """Whether any of the queries sees any of the keys."""
    queries, keys = pair
    if queries.sequence != keys.sequence or (is_causal and keys.first >= queries.end):
        return False
    if sliding_window is None:
        return True
    apart = max(queries.first - keys.end + 1, keys.first - queries.end + 1)
    return apart < sliding_window


def calls_of(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """Put pairs together such that in each call no query and no key is in two of them."""
    calls: list[list[Pair]] = []
    for pair in pairs:
        for call in calls:
            if not any(pair.queries.overlaps(other.queries) or pair.keys.overlaps(other.keys) for other in call):
                call.append(pair)
                break
        else:
            calls.append([pair])
    return calls


def packing(pairs: Sequence[Pair], slots_q: int, slots_k: int, device: torch.device) -> dict[str, Any]:
    """Return the fields of an :class:`~modelopt_lite.kernels.AttentionRequest` that say where sequences are.

    Args:
        pairs: what the request computes.
        slots_q: query slots of each row.
        slots_k: key slots of each row.
        device: where the tensors go.
    """
    rows = [
        (q.row * slots_q + q.slot, q.length, q.first, k.row * slots_k + k.slot, k.length, k.first) for q, k in pairs
    ]
    columns = torch.tensor(rows, device="cpu").T.contiguous().to(device)
    starts_q, lengths_q, first_q, starts_k, lengths_k, first_k = columns
    return {
        "starts_q": starts_q,
        "lengths_q": lengths_q,
        "max_q": max(q.length for q, _ in pairs),
        "starts_k": starts_k,
        "lengths_k": lengths_k,
        "max_k": max(k.length for _, k in pairs),
        "first_q": first_q,
        "first_k": first_k,
    }
