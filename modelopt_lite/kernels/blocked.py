"""The torch backend: the oracle's mathematics in tiles, for any device PyTorch runs on.

Flash attention (https://arxiv.org/abs/2205.14135) in PyTorch operations: an online softmax over key blocks, FP32
accumulation, and a backward pass that computes the tiles again. Memory beyond the inputs is one tile and a few copies
of the inputs, never length times length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..plan import GROUP_SIZES
from .blocks import KeyBlocks
from .request import AttentionRequest, PackedSequence

QUERY_BLOCK = 256
# Scores in one tile over all heads; the fastest of the powers of two tried on a two-core CPU.
TILE_SCORES = 1 << 19
# On a GPU, tiles have as many times the scores, so that Python keeps it busy.
TILES_ON_GPU = 64


def tile_scores(device: torch.device) -> int:
    """Return how many scores of all heads are computed at a time on a device."""
    return TILE_SCORES if device.type == "cpu" else TILES_ON_GPU * TILE_SCORES


@dataclass
class _Tile:
    """The scores of one block of queries against one block of keys.

    Within a block the keys are deinterleaved, column ``r * groups + i`` being key ``r`` of group ``i``, so that the
    members of a group are whole, contiguous runs and rules over groups become element-wise operations.

    Attributes:
        scores: ``[kv_heads, repeat * queries, keys]``, scaled and capped, ``-inf`` where not visible.
        kept: booleans like ``scores``, or None if all visible keys are kept.
        block: which block of keys, or which ones.
    """

    scores: Tensor
    kept: Tensor | None
    block: int | Tensor

    def kept_scores(self) -> Tensor:
        """Return the scores with ``-inf`` for every key that is not kept; overwrites them."""
        return self.scores if self.kept is None else self.scores.masked_fill_(~self.kept, -torch.inf)


class _Sequence:
    """One sequence's tensors in the layout the tiles are computed in.

    Attributes:
        q: ``[kv_heads, repeat, len_q, head_dim]``.
        k: ``[blocks, kv_heads, block, head_dim]``, deinterleaved, zeros around the keys.
        v: the same with ``value_dim``.
        first_q: position of the first query.
        first_k: position of the first key.
        origin: position of the first slot of ``k``, where the first key's group begins.
        end_k: position behind the last key.
        heads: the query heads that are computed.
        heads_k: their heads of keys.
    """

    def __init__(
        self,
        sequence: PackedSequence,
        request: AttentionRequest,
        heads: slice = slice(None),
        heads_k: slice = slice(None),
    ) -> None:
        self.request, self.heads, self.heads_k = request, heads, heads_k
        q = request.q[sequence.queries, heads]
        k, v = request.k[sequence.keys, heads_k], request.v[sequence.keys, heads_k]
        self.len_q, self.len_k = q.shape[0], k.shape[0]
        self.first_q, self.first_k = sequence.first_q, sequence.first_k
        self.end_k = self.first_k + self.len_k
        self.kv_heads, self.repeat = k.shape[1], q.shape[1] // k.shape[1]
        self.plan = request.plan_for(self.len_q)
        self.group = self.plan.group
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.origin = self.first_k // self.alignment * self.alignment
        self.block = self.keys_of_a_block()
        self.q = self.heads_first(q)
        self.k, self.v = self.deinterleave(k), self.deinterleave(v)

    @property
    def alignment(self) -> int:
        """What the position of every block's first key is a multiple of."""
        return max(GROUP_SIZES)

    def keys_of_a_block(self) -> int:
        """Return how many keys a block holds."""
        rows = max(1, min(self.len_q, QUERY_BLOCK)) * self.kv_heads * self.repeat
        span = self.end_k - self.origin
        most = tile_scores(self.request.q.device) // rows
        width = min(most, span + self.alignment - 1) // self.alignment * self.alignment
        return max(self.alignment, width)

    def heads_first(self, x: Tensor) -> Tensor:
        """``[len_q, query_heads, dim]`` to ``[kv_heads, repeat, len_q, dim]`` in the accumulation type."""
        heads: Tensor = x.to(self.dtype).unflatten(1, (self.kv_heads, self.repeat))
        return heads.permute(1, 2, 0, 3)

    def heads_last(self, x: Tensor) -> Tensor:
        """Undo :meth:`heads_first`, except the conversion of the type."""
        return x.permute(2, 0, 1, 3).flatten(1, 2)

    def deinterleave(self, x: Tensor) -> Tensor:
        """``[len_k, kv_heads, dim]`` to ``[blocks, kv_heads, block, dim]`` in the accumulation type."""
        before = self.first_k - self.origin
        x = pad(x.to(self.dtype), (0, 0, 0, 0, before, -(before + self.len_k) % self.block))
        x = x.unflatten(0, (-1, self.block // self.group, self.group))  # [blocks, groups, group, kv_heads, dim]
        return x.permute(0, 3, 2, 1, 4).flatten(2, 3)

    def interleave(self, x: Tensor) -> Tensor:
        """Undo :meth:`deinterleave`, except the conversion of the type."""
        x = x.unflatten(2, (self.group, -1)).permute(0, 3, 2, 1, 4)
        return x.flatten(0, 2)[self.first_k - self.origin :][: self.len_k]

    def take(self, x: Tensor, block: Any) -> Tensor:
        """Return a tile's block of keys or values, ``[kv_heads, keys, dim]``."""
        taken: Tensor = x[block]
        return taken

    def add(self, grad: Tensor, block: Any, left: Tensor, right: Tensor) -> None:
        """Add the product of two matrices to the gradient of a tile's block of keys or values."""
        grad[block].baddbmm_(left, right)

    def query_blocks(self) -> Iterator[slice]:
        for start in range(0, self.len_q, QUERY_BLOCK):
            yield slice(start, min(start + QUERY_BLOCK, self.len_q))

    def rows(self, x: Tensor, queries: slice) -> Tensor:
        """Take a block of queries out of ``[kv_heads, repeat, len_q, dim]``: ``[kv_heads, repeat * queries, dim]``."""
        return x[:, :, queries].flatten(1, 2)

    def tiles(self, queries: slice) -> Iterator[_Tile]:
        """Compute the tiles of a block of queries in which any key may be kept."""
        request, device = self.request, self.q.device
        q = self.rows(self.q, queries)
        first, last = self.first_q + queries.start, self.first_q + queries.stop - 1
        q_pos = torch.arange(first, last + 1, device=device)[:, None, None]
        window = request.sliding_window
        begin = self.first_k if window is None else max(self.first_k, first - window + 1)
        end = self.end_k
        if request.is_causal:
            end = min(end, last + 1)
        elif window is not None:
            end = min(end, last + window)
        for block in range((begin - self.origin) // self.block, -(-(end - self.origin) // self.block)):
            low = self.origin + block * self.block
            high = low + self.block  # the block's keys: low <= j < high
            recent, sinks = self.plan.dense_window_size, self.plan.num_sink_tokens
            any_recent = low <= last and first - (high - 1) < recent
            if self.plan.keeps_nothing and low >= sinks and not any_recent:
                continue
            scores = _scores(q, self.k[block].mT, request)
            # The same memory as [kv_heads, repeat, queries, groups, group], and the positions stored alike.
            grouped = scores.unflatten(1, (self.repeat, -1)).unflatten(3, (self.group, -1)).mT
            k_pos = torch.arange(low, high, device=device).unflatten(0, (-1, self.group)).mT.contiguous().mT
            behind = q_pos - k_pos

            hidden = k_pos >= self.end_k if high > self.end_k else None
            if low < self.first_k:
                hidden = _union(hidden, k_pos < self.first_k)
            if request.is_causal and high - 1 > first:
                hidden = _union(hidden, behind < 0)
            if window is not None and last - low >= window:
                hidden = _union(hidden, behind >= window)
            if window is not None and not request.is_causal and high - 1 - first >= window:
                hidden = _union(hidden, behind <= -window)
            if hidden is not None:
                grouped.masked_fill_(hidden, -torch.inf)

            kept = None
            all_recent = last - low < recent and (request.is_causal or high - 1 <= first)
            if self.plan.keep is not None and not all_recent and high > sinks:
                kept = self.plan.keep(grouped, q_pos, k_pos)
                if low < sinks:
                    kept = kept | (k_pos < sinks)
                if any_recent:
                    kept = kept | ((behind >= 0) & (behind < recent))
                kept = kept.mT.flatten(3, 4).flatten(1, 2)
            yield _Tile(scores, kept, block)


class _ListedSequence(_Sequence):
    """Heads of one sequence that share lists of key blocks, of which a tile takes several at once.

    ``k`` and ``v`` are ``[blocks, kv_heads, groups, group, dim]`` here, with one head of keys.
    """

    def __init__(
        self, sequence: PackedSequence, request: AttentionRequest, blocks: KeyBlocks, head: int, number: int
    ) -> None:
        """Prepare one sequence.

        Args:
            sequence: its rows and positions.
            request: the call.
            blocks: its lists, in memory of the CPU.
            head: which of the lists' heads.
            number: which sequence.
        """
        shared = request.q.shape[1] // blocks.counts.shape[0]
        head_k = head * request.k.shape[1] // blocks.counts.shape[0]
        self.blocks, self.head, self.first_row = blocks, head, int(blocks.starts[number])
        super().__init__(sequence, request, slice(head * shared, (head + 1) * shared), slice(head_k, head_k + 1))

    @property
    def alignment(self) -> int:
        return self.blocks.block_size

    def keys_of_a_block(self) -> int:
        return self.blocks.block_size

    def deinterleave(self, x: Tensor) -> Tensor:
        before = self.first_k - self.origin
        x = pad(x.to(self.dtype), (0, 0, 0, 0, before, -(before + self.len_k) % self.block))
        blocks: Tensor = x.unflatten(0, (-1, self.block // self.group, self.group))
        return blocks.permute(0, 3, 1, 2, 4)

    def interleave(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1, 4).flatten(0, 2)[self.first_k - self.origin :][: self.len_k]

    def take(self, x: Tensor, block: Any) -> Tensor:
        taken: Tensor = x[block].permute(1, 3, 0, 2, 4).flatten(1, 3)
        return taken

    def add(self, grad: Tensor, block: Any, left: Tensor, right: Tensor) -> None:
        product = torch.bmm(left, right).unflatten(1, (self.group, len(block), -1))
        grad[block] += product.permute(2, 0, 3, 1, 4)

    def query_blocks(self) -> Iterator[slice]:
        rows = self.blocks.block_rows
        cuts = range(rows - self.first_q % rows, self.len_q, rows)
        for start, stop in pairwise([0, *cuts, self.len_q]):
            yield slice(start, stop)

    def tiles(self, queries: slice) -> Iterator[_Tile]:
        """Compute the tiles of a block of queries: of the blocks that need no mask, and of all others."""
        rows, size, device = self.blocks.block_rows, self.block, self.q.device
        first, last = self.first_q + queries.start, self.first_q + queries.stop - 1
        row = self.first_row + first // rows - self.first_q // rows
        listed = set(self.blocks.indices[self.head, row, : int(self.blocks.counts[self.head, row])].tolist())
        is_plain = {block: self._is_plain(self.origin + block * size, first, last) for block in listed}
        plain = sorted(block for block in listed if is_plain[block])
        masked = sorted((listed | self._exempt_blocks(first, last)) - set(plain))
        few = max(1, tile_scores(self.request.q.device) // (self.repeat * (queries.stop - queries.start) * size))
        q = self.rows(self.q, queries)
        q_pos = torch.arange(first, last + 1, device=device)[:, None, None]
        for blocks, has_mask in ((plain, False), (masked, True)):
            for start in range(0, len(blocks), few):
                part = blocks[start : start + few]
                is_listed = torch.tensor([block in listed for block in part], device=device)
                yield self._tile(q, q_pos, torch.tensor(part, device=device), is_listed, has_mask)

    def _is_plain(self, low: int, first: int, last: int) -> bool:
        """Whether all queries at ``first`` to ``last`` see all keys from ``low`` to the end of the block."""
        high, window = low + self.block, self.request.sliding_window
        return (
            low >= self.first_k
            and high <= self.end_k
            and (high - 1 <= first or not self.request.is_causal)
            and (window is None or max(last - low, high - 1 - first) < window)
        )

    def _exempt_blocks(self, first: int, last: int) -> set[int]:
        """Return the blocks that hold sinks or keys that are recent for some query."""
        plan, end = self.plan, self.end_k
        spans = (
            (self.first_k, min(end, plan.num_sink_tokens)),
            (max(self.first_k, first - plan.dense_window_size + 1), min(end, last + 1)),
        )
        found: set[int] = set()
        for low, high in spans if plan.dense_window_size else spans[:1]:
            if low < high:
                found.update(range((low - self.origin) // self.block, -(-(high - self.origin) // self.block)))
        return found

    def _tile(self, q: Tensor, q_pos: Tensor, block: Tensor, is_listed: Tensor, has_mask: bool) -> _Tile:
        plan, request = self.plan, self.request
        scores = _scores(q, self.take(self.k, block).mT, request)
        if plan.keep is None and not has_mask:
            return _Tile(scores, None, block)
        grouped = scores.unflatten(1, (self.repeat, -1)).unflatten(3, (self.group, -1)).mT
        slots = self.origin + block[:, None] * self.block + torch.arange(self.block, device=block.device)
        k_pos = slots.flatten().unflatten(0, (-1, self.group)).mT.contiguous().mT
        behind = q_pos - k_pos
        if has_mask:
            hidden = (k_pos < self.first_k) | (k_pos >= self.end_k)
            if request.is_causal:
                hidden = hidden | (behind < 0)
            if request.sliding_window is not None:
                hidden = hidden | (behind.abs() >= request.sliding_window)
            grouped.masked_fill_(hidden, -torch.inf)
        kept = is_listed.repeat_interleave(self.block // self.group)[:, None]
        if plan.keep is not None:
            kept = kept & plan.keep(grouped, q_pos, k_pos)
        kept = kept | (k_pos < plan.num_sink_tokens) | ((behind >= 0) & (behind < plan.dense_window_size))
        return _Tile(scores, kept.expand_as(grouped).mT.flatten(3, 4).flatten(1, 2), block)


def _sequences(request: AttentionRequest) -> Iterator[tuple[PackedSequence, _Sequence]]:
    if request.plan.chooses_blocks and request.blocks is None:
        raise ValueError("blocks: None is not allowed; the plan chooses blocks, which select_blocks() lists")
    blocks = None if request.blocks is None else request.blocks.on_cpu()
    for number, item in enumerate(request.sequences()):
        len_q = item.queries.stop - item.queries.start
        if len_q == 0:
            continue
        if blocks is None or request.is_decode(len_q):
            yield item, _Sequence(item, request)
        else:
            for head in range(blocks.counts.shape[0]):
                yield item, _ListedSequence(item, request, blocks, head, number)


def _scores(q: Tensor, k: Tensor, request: AttentionRequest) -> Tensor:
    """Multiply ``[heads, queries, head_dim]`` and ``[heads, head_dim, keys]``, and scale and cap the scores."""
    scores = torch.bmm(q, k).mul_(request.softmax_scale)
    if request.softcap is not None:
        scores.div_(request.softcap).tanh_().mul_(request.softcap)
    return scores


def _exp_(x: Tensor) -> Tensor:
    """Exponentials in the place of their arguments.

    On CPUs ``torch.exp`` takes up to twenty times as long where a result is 0 or nearly; ``exp2`` does not.
    """
    return x.mul_(1 / math.log(2)).exp2_()


def _union(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a | b


def _start_of_softmax(sequence: _Sequence, queries: slice, s_aux: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return running maximum and sum, ``[kv_heads, repeat * queries]``, before any key."""
    shape = (sequence.kv_heads, sequence.repeat, queries.stop - queries.start)
    if s_aux is None:
        highest = sequence.q.new_full(shape, -torch.inf)
        return highest.flatten(1), torch.zeros_like(highest).flatten(1)
    highest = s_aux[sequence.heads].to(sequence.dtype).view(shape[0], shape[1], 1).expand(shape).flatten(1)
    return highest, torch.ones_like(highest)


def _add_to_softmax(
    highest: Tensor, total: Tensor, scores: Tensor, kept: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Take a tile into the running maximum and sum; turns ``scores`` into weights relative to the new maximum.

    Args:
        highest: the maximum so far.
        total: the sum so far.
        scores: the tile's.
        kept: booleans like ``scores`` where weights count, among them those of each row's maximum; None if all do.

    Returns:
        The new maximum, the new sum, and the factor by which what was accumulated so far shrinks.
    """
    new = torch.maximum(highest, scores.amax(-1))
    reference = new.masked_fill(new == -torch.inf, 0.0)  # exp(-inf - -inf) would be NaN
    _exp_(scores.sub_(reference[..., None]))
    if kept is not None:
        scores.mul_(kept)
    shrink = torch.exp(highest - reference)
    return new, total * shrink + scores.sum(-1), shrink


def forward_blocked(request: AttentionRequest) -> tuple[Tensor, Tensor]:
    """Compute attention in tiles, as the oracle defines it.

    Returns:
        The output in the type of ``q``, and the logarithms of the softmax denominators in FP32 (FP64 for FP64 inputs).
    """
    q, v, s_aux = request.q, request.v, request.s_aux
    accumulated = torch.promote_types(q.dtype, torch.float32)
    output = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=accumulated)
    # Where every row's largest score is kept, masking may follow the exponential, and is cheaper there.
    masks_weights = request.plan.keeps_group_max and request.blocks is None
    for item, sequence in _sequences(request):
        for queries in sequence.query_blocks():
            highest, total = _start_of_softmax(sequence, queries, s_aux)
            value = sequence.q.new_zeros(*highest.shape, v.shape[2])
            for tile in sequence.tiles(queries):
                scores, kept = (tile.scores, tile.kept) if masks_weights else (tile.kept_scores(), None)
                highest, total, shrink = _add_to_softmax(highest, total, scores, kept)
                value.mul_(shrink[..., None]).baddbmm_(scores, sequence.take(sequence.v, tile.block))
            value /= total.masked_fill(total == 0, 1.0)[..., None]
            rows = slice(item.queries.start + queries.start, item.queries.start + queries.stop)
            heads = sequence.heads
            output[rows, heads] = sequence.heads_last(value.unflatten(1, (sequence.repeat, -1))).to(q.dtype)
            lse[rows, heads] = (highest + total.log()).unflatten(1, (sequence.repeat, -1)).permute(2, 0, 1).flatten(1)
    return output, lse


def backward_blocked(
    grad: Tensor, output: Tensor, lse: Tensor, request: AttentionRequest
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of ``q``, ``k``, ``v`` and ``s_aux`` from that of the output, computing the tiles again.

    Which keys are kept is taken as given: the selection has no gradient of its own.
    """
    q, k, v, s_aux = request.q, request.k, request.v, request.s_aux
    accumulated = lse.dtype
    grad_q, grad_k, grad_v = (x.new_zeros(x.shape, dtype=accumulated) for x in (q, k, v))
    # Rows without a key have lse -inf; with 0 instead their weights come out as exp(-inf) = 0.
    empty = lse == -torch.inf
    lse = lse.masked_fill(empty, 0.0)
    delta = (grad.to(accumulated) * output.to(accumulated)).sum(-1).masked_fill(empty, 0.0)
    for item, sequence in _sequences(request):
        in_q, in_k = (item.queries, sequence.heads), (item.keys, sequence.heads_k)
        grads = sequence.heads_first(grad[in_q])
        lses = sequence.heads_first(lse[in_q][..., None])
        deltas = sequence.heads_first(delta[in_q][..., None])
        grad_q_heads = torch.zeros_like(sequence.q)
        grad_k_blocks, grad_v_blocks = torch.zeros_like(sequence.k), torch.zeros_like(sequence.v)
        for queries in sequence.query_blocks():
            row_q, row_grad = sequence.rows(sequence.q, queries), sequence.rows(grads, queries)
            row_lse, row_delta = sequence.rows(lses, queries), sequence.rows(deltas, queries)
            row_grad_q = torch.zeros_like(row_q)
            for tile in sequence.tiles(queries):
                scores = tile.kept_scores()
                weights = _exp_(scores - row_lse)
                grad_scores = (
                    torch.bmm(row_grad, sequence.take(sequence.v, tile.block).mT).sub_(row_delta).mul_(weights)
                )
                if request.softcap is not None:
                    # d/ds of cap * tanh(s / cap); dropped scores are -inf and have weight 0
                    slope = 1 - (scores.masked_fill(scores == -torch.inf, 0.0) / request.softcap).square()
                    grad_scores.mul_(slope)
                grad_scores.mul_(request.softmax_scale)
                row_grad_q.baddbmm_(grad_scores, sequence.take(sequence.k, tile.block))
                sequence.add(grad_k_blocks, tile.block, grad_scores.mT, row_q)
                sequence.add(grad_v_blocks, tile.block, weights.mT, row_grad)
            grad_q_heads[:, :, queries] = row_grad_q.unflatten(1, (sequence.repeat, -1))
        grad_q[in_q] = sequence.heads_last(grad_q_heads)
        # Sequences may share keys, so their gradients add up.
        grad_k[in_k] += sequence.interleave(grad_k_blocks)
        grad_v[in_k] += sequence.interleave(grad_v_blocks)
    grad_s_aux = None
    if s_aux is not None:
        grad_s_aux = -(torch.exp(s_aux.to(accumulated) - lse) * delta).sum(0).to(s_aux.dtype)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_s_aux


class _Block(NamedTuple):
    """Queries of one sequence whose place and number stay on the device.

    Attributes:
        rows: rows of the packed queries, ``[queries]``.
        q_pos: positions of the queries, ``[queries, 1, 1]``.
        is_query: which of them the sequence has, ``[queries, 1, 1]``.
        is_decode: whether the sequence has no other query.
        origin: position, at the beginning of a group, before which no key is visible.
        first_k: position of the first key.
        end_k: position behind the last key.
        row_k: row of the packed keys where position 0 would be.
        first_q: position of the sequence's first query.
        sequence: which sequence it is.
        span: an upper bound of the keys from ``origin`` on that are visible.
    """

    rows: Tensor
    q_pos: Tensor
    is_query: Tensor
    is_decode: Tensor
    origin: Tensor
    first_k: Tensor
    end_k: Tensor
    row_k: Tensor
    first_q: Tensor
    sequence: Tensor
    span: int

    def listed(self, blocks: KeyBlocks, mask: Tensor, k_pos: Tensor) -> Tensor:
        """Return which groups of keys are in listed blocks, ``[heads, queries, groups, 1]``; anything at absent ones.

        Args:
            blocks: the lists.
            mask: the same as a mask.
            k_pos: positions of the keys, ``[groups, group]``.
        """
        size, rows = blocks.block_size, blocks.block_rows
        row = blocks.starts[self.sequence] + self.q_pos[:, 0, 0] // rows - self.first_q // rows
        column = k_pos[:, 0] // size - self.first_k // size
        if 0 in mask.shape:
            return mask.new_zeros(mask.shape[0], 1, 1, 1)
        row, column = row.clamp(0, mask.shape[1] - 1), column.clamp(0, mask.shape[2] - 1)
        return mask[:, row][:, :, column, None]


def _blocks(request: AttentionRequest) -> Iterator[_Block]:
    """Cut all sequences into blocks of queries, all of one size, by nothing but upper bounds of their lengths.

    The rows of all together bound the number of blocks, so that a long one among many short ones costs few.
    """
    p, device, batch = request, request.lengths_q.device, request.lengths_q.shape[0]
    total_q, total_k = p.q.shape[0], p.k.shape[0]
    longest, span = min(p.max_q, total_q), min(p.max_k, total_k)
    if 0 in (batch, longest, span):
        return
    each = -(-longest // max(1, min(QUERY_BLOCK, total_q // batch)))  # blocks of the longest sequence
    size = -(-longest // each)
    # Numbered from each sequence's end, those that exist first: the i-th has the number i // batch or a higher one.
    place = torch.arange(each * batch, device=device)
    absent = place // batch * size >= p.lengths_q[place % batch]
    place = place[absent.int().argsort(stable=True)[: total_q // size + batch]]
    number, sequence = place // batch, place % batch
    start_q, len_q, start_k, len_k = (x[sequence] for x in (p.starts_q, p.lengths_q, p.starts_k, p.lengths_k))
    first_k = torch.zeros_like(len_k) if p.first_k is None else p.first_k[sequence]
    end_k = first_k + len_k
    first_q = end_k - len_q if p.first_q is None else p.first_q[sequence]
    query = (len_q - (number + 1) * size)[:, None] + torch.arange(size, device=device)
    is_query, query = query >= 0, query.clamp(min=0)
    rows = (start_q[:, None] + query).clamp(max=total_q - 1)
    q_pos = first_q[:, None] + query
    origin, reach = first_k, span
    if p.sliding_window is not None:
        origin = origin.maximum(q_pos[:, 0] - p.sliding_window + 1)
        reach = size + (p.sliding_window - 1) * (1 if p.is_causal else 2)
    alignment = max(GROUP_SIZES)
    origin = origin // alignment * alignment
    q_pos, is_query = q_pos[:, :, None, None], is_query[:, :, None, None]
    columns = (rows, q_pos, is_query, len_q == 1, origin, first_k, end_k, start_k - first_k, first_q, sequence)
    # The last of causal queries sees all keys, the one before it one fewer, and so on.
    fewer = size if p.is_causal and p.first_q is None else 0
    spans = [max(0, min(span - i // batch * fewer, reach)) + alignment - 1 for i in range(len(place))]
    yield from map(_Block, *columns, spans)


@torch.no_grad()
def count_blocked(request: AttentionRequest) -> Tensor:
    """Count what a plan keeps of a computation, as :func:`modelopt_lite.kernels.statistics_launch.prepare` says.

    Args:
        request: the computation, with its lists if the plan chooses blocks.
    """
    q, k, plan, window = request.q, request.k, request.plan, request.sliding_window
    dtype = torch.promote_types(q.dtype, torch.float32)
    heads, kv_heads, alignment = q.shape[1], k.shape[1], max(GROUP_SIZES)
    repeat = heads // kv_heads
    rows, visible, kept = (torch.zeros(heads, dtype=torch.int64, device=q.device) for _ in range(3))
    mass = torch.zeros(heads, dtype=torch.float64, device=q.device)
    mask = None if request.blocks is None else request.blocks.mask()
    for block in _blocks(request):
        query = q[block.rows].to(dtype).unflatten(1, (kv_heads, repeat)).permute(1, 2, 0, 3).flatten(1, 2)
        highest = query.new_full(query.shape[:2], -torch.inf)
        total = kept_total = torch.zeros_like(highest)
        tiles = -(-block.span * len(block.rows) * heads // tile_scores(q.device))
        width = -(-block.span // (tiles * alignment)) * alignment
        for low in range(0, block.span, width):
            slots = torch.arange(low, low + width, device=q.device).unflatten(0, (-1, plan.group)).mT.contiguous()
            k_pos = block.origin + slots.mT  # [groups, group], stored like the scores
            key = k[(block.row_k + k_pos.mT.flatten()).clamp(0, k.shape[0] - 1)].to(dtype)
            scores = _scores(query, key.permute(1, 2, 0), request)
            grouped = scores.unflatten(1, (repeat, -1)).unflatten(3, (plan.group, -1)).mT
            behind = block.q_pos - k_pos  # [queries, groups, group]
            seen = block.is_query & (k_pos >= block.first_k) & (k_pos < block.end_k)
            if request.is_causal:
                seen &= behind >= 0
            if window is not None:
                seen &= behind.abs() < window
            grouped.masked_fill_(~seen, -torch.inf)
            visible += seen.sum()

            chosen = seen
            if plan.keep is not None or mask is not None:
                exempt = (k_pos < plan.num_sink_tokens) | ((behind >= 0) & (behind < plan.dense_window_size))
                if not plan.sparse_decode:
                    exempt |= block.is_decode
                if plan.keep is not None:
                    chosen = seen & plan.keep(grouped, block.q_pos, k_pos)
                if request.blocks is not None and mask is not None:
                    listed = block.listed(request.blocks, mask, k_pos)
                    chosen = chosen & listed.repeat_interleave(heads // len(mask), 0).unflatten(0, (kv_heads, repeat))
                chosen = chosen | (seen & exempt)
            chosen = chosen.expand_as(grouped).mT.flatten(3, 4).flatten(1, 2)
            kept += chosen.sum(-1).unflatten(1, (repeat, -1)).sum(-1).flatten()
            highest, total, shrink = _add_to_softmax(highest, total, scores)
            kept_total = kept_total * shrink + scores.mul_(chosen).sum(-1)
        rows += (total > 0).unflatten(1, (repeat, -1)).sum(-1).flatten()
        share = (kept_total / total).where(total > 0, 0.0)  # [kv_heads, repeat * queries]
        mass += share.unflatten(1, (repeat, -1)).sum(-1, dtype=torch.float64).flatten()
    return torch.stack([rows.double(), visible.double(), kept.double(), mass], 1)
