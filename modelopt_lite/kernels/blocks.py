"""Blocks of keys: the lists that kernels visit, and the grid that a selector scores."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .grid_tables import GridTables, grid_tables
from .language import tl

if tl is not None:
    from . import block_launch

if TYPE_CHECKING:
    from .block_scores import BlockChoice
    from .request import AttentionRequest

T = TypeVar("T")

PART_ELEMENTS = 1 << 24
"""About how many numbers a selector's fast form holds at a time, beyond its inputs and scores."""
MAX_SIGNATURES = 4096
"""How many kinds of grids are remembered; then they are all forgotten."""

_prepared: dict[tuple[Any, ...], dict[Any, Any]] = {}


class KeyBlocks(NamedTuple):
    """Which key blocks the queries of each query block look at; what block-sparse kernels are given.

    Blocks are numbered from that of the first query and that of the first key of their sequence in this call. With
    ``first_q`` and ``first_k`` the positions of these two, the query at position ``p`` is in query block
    ``p // block_rows - first_q // block_rows`` of its sequence, and key ``j`` in key block
    ``j // block_size - first_k // block_size``. The query blocks of all sequences stand one after the other.

    The lists are final: the plan's selector and its skip rule have been applied. Its rule over groups and its
    exemptions have not. A listed block may hold keys that some of the queries do not see, but at least one that one of
    them sees. A sequence with a single query is dense unless the plan asks for sparse decode; kernels then keep
    all it sees, whatever its list says.

    Attributes:
        counts: how many key blocks are listed, int32 ``[heads, query_blocks]``. ``heads`` is the number of query heads,
            or that of the heads of keys where the query heads that share keys share a list. There may be more query
            blocks than the sequences have; those behind the last one list nothing.
        indices: the listed key blocks, ascending, int32 ``[heads, query_blocks, key_blocks]``; what follows the first
            ``counts`` means nothing.
        starts: number of each sequence's first query block, int32 ``[batch]``.
        block_size: keys in a key block.
        block_rows: positions in a query block, a multiple of ``block_size``.
    """

    counts: Tensor
    indices: Tensor
    starts: Tensor
    block_size: int
    block_rows: int

    @classmethod
    def from_mask(cls, mask: Tensor, starts: Tensor, block_size: int, block_rows: int) -> KeyBlocks:
        """List what a mask keeps, without waiting for its device.

        Args:
            mask: ``[heads, query_blocks, key_blocks]``, booleans, numbered as above.
            starts: number of each sequence's first query block, ``[batch]``.
            block_size: keys in a key block.
            block_rows: positions in a query block.
        """
        counts, indices = _listed(mask)
        return cls(counts, indices, starts.to(torch.int32), block_size, block_rows)

    @classmethod
    def of_choice(cls, chosen: Tensor, seen: Tensor, forced: Tensor, grid: BlockGrid) -> KeyBlocks:
        """List the blocks that are chosen and seen, or forced; as :meth:`from_mask`.

        Args:
            chosen: ``[heads, query_blocks, key_blocks]``, booleans.
            seen: from :meth:`BlockGrid.marked`, like what is forced.
            forced: which of these are kept in any case.
            grid: the blocks.
        """
        if _runs_kernels(chosen):
            counts, indices = block_launch.listed(chosen, seen, forced)
            return cls(counts, indices, grid.starts, grid.block_size, grid.block_rows)
        return cls.from_mask((chosen & seen) | forced, grid.starts, grid.block_size, grid.block_rows)

    @classmethod
    def from_masks(cls, masks: Sequence[Tensor], block_size: int, block_rows: int) -> KeyBlocks:
        """List what the masks of several sequences keep.

        Args:
            masks: of each sequence ``[heads, query_blocks, key_blocks]``, booleans, numbered as above; those of a
                sequence without queries or keys have no blocks.
            block_size: keys in a key block.
            block_rows: positions in a query block.
        """
        columns = max(mask.shape[2] for mask in masks)
        padded = [torch.nn.functional.pad(mask, (0, columns - mask.shape[2])) for mask in masks]
        rows = torch.tensor([0, *(mask.shape[1] for mask in masks)], device=masks[0].device)
        return cls.from_mask(torch.cat(padded, 1), rows.cumsum(0)[:-1], block_size, block_rows)

    def mask(self) -> Tensor:
        """Return the lists as a mask, ``[heads, query_blocks, key_blocks]``."""
        listed = torch.arange(self.indices.shape[2], device=self.indices.device) < self.counts[..., None]
        return torch.zeros_like(listed).scatter_(-1, self.indices.long(), listed)

    def transposed(self) -> QueryBlocks:
        """Return for each key block the query blocks that list it, without waiting for the device."""
        mask = self.mask().transpose(1, 2)
        _, indices = _listed(mask)
        before = torch.nn.functional.pad(mask.cumsum(-1, dtype=torch.int32), (1, 0))
        ends = torch.nn.functional.pad(self.starts.long(), (0, 1), value=mask.shape[2])
        return QueryBlocks(before[..., ends], indices)

    def on_cpu(self) -> KeyBlocks:
        """Return the lists in the CPU's memory; waits for their device."""
        return self._replace(counts=self.counts.cpu(), indices=self.indices.cpu(), starts=self.starts.cpu())

    def signature(self) -> tuple[object, ...]:
        """Return all that a kernel's preparation may depend on: everything but addresses and contents."""
        tensors = ((x.dtype, x.shape, x.stride(), x.device) for x in (self.counts, self.indices, self.starts))
        return (*tensors, self.block_size, self.block_rows)


def _listed(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return how often a mask is set along its last dimension, and where: those numbers first, then all others."""
    if _runs_kernels(mask):
        return block_launch.listed(mask)
    counts = mask.sum(-1, dtype=torch.int32)
    return counts, (~mask).to(torch.uint8).argsort(dim=-1, stable=True).to(torch.int32)


def _runs_kernels(x: Tensor) -> bool:
    return tl is not None and block_launch.runs_on(x)


class QueryBlocks(NamedTuple):
    """Which query blocks look at each key block: :class:`KeyBlocks` the other way round, for gradients of keys.

    The query blocks of sequence ``b`` that list its key block ``j`` are
    ``indices[head, j, begins[head, j, b] : begins[head, j, b + 1]]``, ascending.

    Attributes:
        begins: where each sequence's part of a list begins, int32 ``[heads, key_blocks, batch + 1]``.
        indices: query blocks, numbered over all sequences, int32 ``[heads, key_blocks, query_blocks]``.
    """

    begins: Tensor
    indices: Tensor


def visible_keys(request: AttentionRequest, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """Return which keys each query sees by their positions, ``[queries, keys]``, of ``[queries, 1]`` and ``[keys]``."""
    behind = q_pos - k_pos
    visible = torch.ones_like(behind, dtype=torch.bool)
    if request.is_causal:
        visible = behind >= 0
    if request.sliding_window is not None:
        visible = visible & (behind.abs() < request.sliding_window)
    return visible


def any_visible(request: AttentionRequest, low_q: Tensor, high_q: Tensor, low_k: Tensor, high_k: Tensor) -> Tensor:
    """Whether a query at ``low_q`` to ``high_q`` sees any key at ``low_k`` to ``high_k``; positions, both inclusive."""
    seen = (low_q <= high_q) & (low_k <= high_k)
    if request.is_causal:
        seen = seen & (low_k <= high_q)
    if request.sliding_window is not None:
        seen = seen & (low_q - high_k < request.sliding_window)
        if not request.is_causal:
            seen = seen & (low_k - high_q < request.sliding_window)
    return seen


class BlockGrid:
    """The query blocks and key blocks of a request, found without waiting for its device.

    A selector's fast form reads it. Query blocks of all sequences stand one after the other; there may be more than the
    sequences have. All positions are counted from the sequence's first token; where a block holds no token of the call,
    the last position is before the first one.

    Attributes:
        request: the attention call.
        block_size: keys in a key block.
        block_rows: positions in a query block.
        starts: number of each sequence's first query block, int32 ``[batch]``.
        sequence: which sequence each query block belongs to, ``[query_blocks]``.
        origin_q: position where each query block begins, whether or not the call has this query, ``[query_blocks]``.
        low_q: position of its first query in the call, ``[query_blocks]``.
        high_q: position of its last query in the call.
        origin_k: position where each key block begins, ``[batch, key_blocks]``.
        low_k: position of its first key, ``[batch, key_blocks]``.
        high_k: position of its last key.
        row_q: row of the packed queries where each sequence's position 0 would be, ``[batch]``.
        row_k: row of the packed keys where it would be.
    """

    def __init__(
        self, request: AttentionRequest, block_size: int, block_rows: int, shared: dict[Any, Any] | None = None
    ) -> None:
        """Find the blocks.

        Args:
            request: the attention call.
            block_size: keys in a key block.
            block_rows: positions in a query block.
            shared: what :meth:`prepared` keeps, for grids of this size and of requests with one signature; None: found
                by the signature when it is needed.
        """
        self.request, self.block_size, self.block_rows, self._shared = request, block_size, block_rows, shared
        r = request
        packing = (r.starts_q, r.lengths_q, r.starts_k, r.lengths_k, r.first_q, r.first_k)
        sizes = (r.max_q, r.max_k, r.q.shape[0], r.k.shape[0], block_size, block_rows)
        tables, self._of_tables = self.once(packing, sizes, self._tables)
        self.starts, self.sequence, self.origin_q, self.low_q, self.high_q = tables[:5]
        self.origin_k, self.low_k, self.high_k, self.row_q, self.row_k = tables[5:]

    def _tables(self) -> tuple[GridTables, dict[Any, Any]]:
        """Return the tables, and a dictionary for what else depends on them alone."""
        if _runs_kernels(self.request.q):
            return block_launch.grid_tables(self), {}
        return grid_tables(self.request, self.block_size, self.block_rows), {}

    @property
    def dtype(self) -> torch.dtype:
        """Type in which to compute: FP32, or FP64 for FP64 inputs."""
        return torch.promote_types(self.request.q.dtype, torch.float32)

    @property
    def is_single(self) -> Tensor:
        """Whether the query block's sequence has a single query in the call, ``[query_blocks]``."""
        return (self.request.lengths_q == 1)[self.sequence]

    @property
    def shape(self) -> tuple[int, int]:
        """How many query blocks and key blocks there are."""
        return self.origin_q.shape[0], self.origin_k.shape[1]

    def seen(self) -> Tensor:
        """Return where any query of a query block sees any key of a key block, ``[query_blocks, key_blocks]``."""
        low_k, high_k = self.low_k[self.sequence], self.high_k[self.sequence]
        return any_visible(self.request, self.low_q[:, None], self.high_q[:, None], low_k, high_k)

    def lengths(self, seen: Tensor) -> Tensor:
        """Return the lengths of query blocks as :class:`~modelopt_lite.plan.LengthCurve` counts them.

        Args:
            seen: rows of :meth:`seen`, ``[..., key_blocks]``.
        """
        return seen.sum(-1) * self.block_size

    def is_dense(self) -> Tensor:
        """Return which query blocks are decode that stays dense, ``[query_blocks]``."""
        return torch.zeros_like(self.is_single) if self.request.plan.sparse_decode else self.is_single

    def diagonal(self, blocks_before: int = 0) -> Tensor:
        """Return where a key block holds the positions of a query block, ``[query_blocks, key_blocks]``.

        Args:
            blocks_before: so many key blocks before these are included.
        """
        low = self.origin_q[:, None] - blocks_before * self.block_size
        origin_k = self.origin_k[self.sequence]
        return (origin_k >= low) & (origin_k < self.origin_q[:, None] + self.block_rows)

    def forced(self, first_blocks: int, recent_blocks: int) -> Tensor:
        """Return the first and the recent key blocks, seen or not, ``[query_blocks, key_blocks]``."""
        first = self.origin_k[self.sequence] < first_blocks * self.block_size
        return first | self.diagonal(recent_blocks - 1) if recent_blocks else first

    def marked(self, first_blocks: int, recent_blocks: int) -> tuple[Tensor, Tensor]:
        """Return what is seen and what of that is kept in any case, booleans ``[query_blocks, key_blocks]``.

        That are the blocks of :meth:`forced`, and all blocks of decode that stays dense.
        """
        r = self.request
        masks = (first_blocks, recent_blocks, r.is_causal, r.sliding_window, r.plan.sparse_decode)
        found: tuple[Tensor, Tensor] | None = self._of_tables.get(masks)
        if found is None:
            found = self._of_tables[masks] = self._marked(first_blocks, recent_blocks)
        return found

    def choice(self, seen: Tensor) -> BlockChoice | None:
        """Return how the plan's selector chooses, if it says so.

        Args:
            seen: from :meth:`marked`.
        """
        r = self.request
        assert r.plan.blocks is not None
        if (find := r.plan.blocks.choice) is None:
            return None
        key = (r.plan.name, r.q.dtype, r.is_causal, r.sliding_window)
        found: BlockChoice | None = self._of_tables.get(key)
        if found is None:
            found = self._of_tables[key] = find(seen, self.dtype)
        return found

    def _marked(self, first_blocks: int, recent_blocks: int) -> tuple[Tensor, Tensor]:
        if _runs_kernels(self.request.q):
            return block_launch.marked(self, first_blocks, recent_blocks)
        seen = self.seen()
        return seen, (self.forced(first_blocks, recent_blocks) | self.is_dense()[:, None]) & seen

    def once(self, tensors: tuple[Tensor | None, ...], numbers: tuple[Any, ...], find: Callable[[], T]) -> T:
        """Return what was found for the same tensors and numbers before, where calls share it."""
        return self.request.once(tensors, numbers, find)

    def prepared(self, prepare: Callable[..., T], *options: Hashable) -> T:
        """Return what ``prepare(grid, *options)`` returned for a grid like this one.

        Grids are alike if they have the same size, and their requests the same
        :meth:`~modelopt_lite.kernels.AttentionRequest.signature`. What is prepared may depend on nothing else.
        """
        shared = self._shared
        if shared is None:
            key = (self.block_size, self.block_rows, *self.request.signature())
            if key not in _prepared and len(_prepared) >= MAX_SIGNATURES:
                _prepared.clear()
            shared = self._shared = _prepared.setdefault(key, {})
        key = (prepare, *options)
        if key not in shared:
            shared[key] = prepare(self, *options)
        found: T = shared[key]
        return found

    def mean_keys(self) -> Tensor:
        """Return the mean of each block's keys, ``[batch, key_blocks, kv_heads, head_dim]``; 0 if there are none."""
        k = self.request.k
        batch, columns = self.low_k.shape
        low, high = self.low_k.flatten(), self.high_k.flatten()
        origin = self.origin_k.flatten()
        row = self.row_k.repeat_interleave(columns)
        found = [k.new_empty(0, *k.shape[1:], dtype=self.dtype)]
        step = max(1, PART_ELEMENTS // max(1, self.block_size * k.shape[1] * k.shape[2]))
        for begin in range(0, batch * columns, step):
            part = slice(begin, begin + step)
            total = self.gathered(k, row[part], origin[part], low[part], high[part], self.block_size)
            number = (high[part] - low[part] + 1).clamp(min=1)
            found.append(total.sum(1, dtype=self.dtype) / number[:, None, None])
        return torch.cat(found).view(batch, columns, *k.shape[1:])

    def parts(self, elements: int) -> Iterator[GridPart]:
        """Yield all query blocks, a few at a time.

        Args:
            elements: how many numbers the caller holds for each query block.
        """
        step = max(1, PART_ELEMENTS // max(1, elements))
        for begin in range(0, self.shape[0], step):
            yield GridPart(self, slice(begin, min(begin + step, self.shape[0])))

    def gathered(self, x: Tensor, row: Tensor, origin: Tensor, low: Tensor, high: Tensor, size: int) -> Tensor:
        """Gather rows ``[blocks, size, heads, dim]`` of packed ``x`` from position ``origin`` on; 0 where none is."""
        position = origin[:, None] + torch.arange(size, device=x.device)
        absent = (position < low[:, None]) | (position > high[:, None])
        index = (row[:, None] + position).clamp(0, x.shape[0] - 1)
        return x[index].masked_fill(absent[:, :, None, None], 0)


class GridPart:
    """Some of the query blocks of a :class:`BlockGrid`."""

    def __init__(self, grid: BlockGrid, rows: slice) -> None:
        self.grid, self.rows = grid, rows
        self._sequence = grid.sequence[rows]

    def queries(self) -> Tensor:
        """Return the queries, ``[query_blocks, kv_heads, repeat, block_rows, head_dim]``; 0 where the call has none."""
        grid, q, kv_heads = self.grid, self.grid.request.q, self.grid.request.k.shape[1]
        origin, low, high = grid.origin_q[self.rows], grid.low_q[self.rows], grid.high_q[self.rows]
        x = grid.gathered(q, grid.row_q[self._sequence], origin, low, high, grid.block_rows).to(grid.dtype)
        by_head: Tensor = x.unflatten(2, (kv_heads, -1))
        return by_head.permute(0, 2, 3, 1, 4)

    def keys(self) -> Tensor:
        """Return the keys of the query blocks' sequences, ``[query_blocks, key_blocks * block_size, kv_heads, dim]``.

        Keys that are not there are 0. If the batch is one sequence, the first dimension is 1.
        """
        grid = self.grid
        sequence = self._sequence[:1] if grid.starts.shape[0] == 1 else self._sequence
        columns, size = grid.shape[1], grid.block_size
        origin, low, high = (x[sequence] for x in (grid.origin_k[:, 0], grid.low_k[:, 0], grid.high_k.amax(1)))
        return grid.gathered(grid.request.k, grid.row_k[sequence], origin, low, high, columns * size).to(grid.dtype)

    def of_keys(self, x: Tensor) -> Tensor:
        """Return of ``x``, ``[batch, ...]``, what belongs to each query block; if the batch is one sequence, ``x``."""
        return x if x.shape[0] == 1 else x[self._sequence]

    def sees(self, rows_each: int = 1, keys_each: int | None = None) -> Tensor:
        """Return which queries see any key of a key block, or likewise for smaller groups.

        Args:
            rows_each: how many queries count together, a divisor of ``block_rows``.
            keys_each: how many keys count together, a divisor of ``block_size``; by default a key block.

        Returns:
            ``[query_blocks, block_rows / rows_each, key_blocks * block_size / keys_each]``.
        """
        grid, rows, sequence = self.grid, self.rows, self._sequence
        keys_each = keys_each or grid.block_size
        low_q, high_q = _split(grid.origin_q[rows], grid.low_q[rows], grid.high_q[rows], grid.block_rows, rows_each)
        low_k, high_k = _split(grid.origin_k, grid.low_k, grid.high_k, grid.block_size, keys_each)
        low_k, high_k = low_k.flatten(1)[sequence, None], high_k.flatten(1)[sequence, None]
        return any_visible(grid.request, low_q[:, :, None], high_q[:, :, None], low_k, high_k)

    def scores(self, q: Tensor, k: Tensor, factor: float = 1.0) -> Tensor:
        """Multiply queries and keys, and scale and cap the products as the model does.

        Args:
            q: ``[query_blocks, kv_heads, repeat, rows, dim]``.
            k: ``[query_blocks or 1, keys, kv_heads, dim]``.
            factor: an additional factor on the products.

        Returns:
            ``[query_blocks, kv_heads, repeat, rows, keys]``.
        """
        k = k.permute(0, 2, 3, 1)
        if k.shape[0] == 1:  # one large product per head of keys
            blocks, kv_heads, repeat, rows, _ = q.shape
            product = q.transpose(0, 1).flatten(1, 3) @ k[0]
            product = product.view(kv_heads, blocks, repeat, rows, -1).transpose(0, 1)
        else:
            product = (q.flatten(2, 3) @ k).unflatten(2, q.shape[2:4])
        return scaled(product, self.grid.request, factor)


def scaled(products: Tensor, request: AttentionRequest, factor: float = 1.0) -> Tensor:
    """Scale and cap products of queries and keys as the model does, in place."""
    products.mul_(request.softmax_scale * factor)
    if request.softcap is not None:
        products.div_(request.softcap).tanh_().mul_(request.softcap)
    return products


def _split(origin: Tensor, low: Tensor, high: Tensor, size: int, each: int) -> tuple[Tensor, Tensor]:
    """Cut blocks into groups; return the first and last position in each, ``[..., size / each]``."""
    begin = origin[..., None] + torch.arange(0, size, each, device=origin.device)
    return begin.maximum(low[..., None]), (begin + each - 1).minimum(high[..., None])
