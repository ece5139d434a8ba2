"""Lists of blocks as the portable kernels walk them: the tiles of one listed block after the other.

A list is a tuple ``(pointer, count, origin)``: ``count`` block numbers, ascending, to each of which ``origin`` is to be
added, so that block ``i`` begins at position ``i * SIZE`` of its sequence. Listed positions, laid end to end, have
*places*: loops over hot tiles run over places instead of positions, and are otherwise those without lists.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = tl.constexpr(128)
"""Blocks of a list that are looked at together."""


@triton.jit
def floor_div(x, y):
    """Divide and round down, also below 0."""
    quotient = x // y
    return quotient - (quotient * y > x).to(tl.int32)


@triton.jit
def floor_mod(x, SIZE: tl.constexpr):
    """Return what is left where :func:`floor_div` divides; never below 0."""
    return x - floor_div(x, SIZE) * SIZE


@triton.jit
def rows_exist(rows, length, OPTIONS: tl.constexpr):
    """Say which rows a sequence has; only with lists does a tile begin before the first one."""
    exist = rows < length
    if OPTIONS.block_rows > 0:
        exist = exist & (rows >= 0)
    return exist


@triton.jit
def list_of_queries(lists, head, sequence, first_query, first_key, position, OPTIONS: tl.constexpr):
    """Return the list of the key blocks that a query at a position looks at.

    Args:
        lists: see :func:`~modelopt_lite.kernels.portable.forward.attention_forward`.
        head: query head.
        sequence: number of the sequence.
        first_query: position of its first query.
        first_key: position of its first key.
        position: the query's.
        OPTIONS: :class:`modelopt_lite.kernels.settings.Options`.
    """
    counts_ptr, indices_ptr, starts_ptr, heads_per_list, rows, columns = lists
    row = tl.load(starts_ptr + sequence) + head // heads_per_list * rows
    row += floor_div(position, OPTIONS.block_rows) - floor_div(first_query, OPTIONS.block_rows)
    return indices_ptr + row.to(tl.int64) * columns, tl.load(counts_ptr + row), first_key // OPTIONS.block_size


@triton.jit
def list_of_keys(lists, head, sequence, first_query, first_key, position, OPTIONS: tl.constexpr):
    """Return the list of the query blocks that look at a key at a position; see :func:`list_of_queries`."""
    begins_ptr, indices_ptr, starts_ptr, heads_per_list, rows, columns, batch = lists
    block = position // OPTIONS.block_size - first_key // OPTIONS.block_size
    column = (head // heads_per_list * columns + block).to(tl.int64)
    begins_ptr += column * (batch + 1) + sequence
    begin = tl.load(begins_ptr, mask=block < columns, other=0)
    end = tl.load(begins_ptr + 1, mask=block < columns, other=0)
    origin = floor_div(first_query, OPTIONS.block_rows) - tl.load(starts_ptr + sequence)
    return indices_ptr + column * rows + begin, end - begin, origin


@triton.jit
def find_block(blocks, block):
    """Return how many blocks a list has before one, and whether it has this one."""
    pointer, count, origin = blocks
    before = count * 0
    listed = count * 0
    for first in range(0, count, CHUNK):
        places = first + tl.arange(0, CHUNK)
        exist = places < count
        numbers = tl.load(pointer + places, mask=exist, other=0) + origin
        before += tl.sum((exist & (numbers < block)).to(tl.int32), 0)
        listed += tl.sum((exist & (numbers == block)).to(tl.int32), 0)
    return before, listed > 0


@triton.jit
def place_of(blocks, position, SIZE: tl.constexpr):
    """Return how many listed positions there are before a position."""
    block = floor_div(position, SIZE)
    before, listed = find_block(blocks, block)
    return before * SIZE + tl.where(listed, position - block * SIZE, 0)


@triton.jit
def position_at(blocks, place, SIZE: tl.constexpr):
    """Undo :func:`place_of`."""
    pointer, _, origin = blocks
    return (tl.load(pointer + place // SIZE) + origin) * SIZE + place % SIZE


@triton.jit
def places_of(blocks, bounds, SIZE: tl.constexpr):
    """Return the places of several positions."""
    places = ()
    for index in tl.static_range(len(bounds)):
        places = places + (place_of(blocks, bounds[index], SIZE),)
    return places


@triton.jit
def look_up(
    blocks, position, first_key, first_query, rules, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Look for a masked tile in a list.

    Args:
        blocks: the list.
        position: which position to look for, of the tile's first query or of its first key.
        first_key: position of its first key.
        first_query: position of its first query.
        rules: see :func:`~modelopt_lite.kernels.tiles.select_scores`.
        SIZE: positions of a listed block.
        BLOCK_M: queries of the tile.
        BLOCK_N: keys of the tile.

    Returns:
        ``(unlisted, visited)``: 1 if the tile is not listed and else 0, and whether any key may take part.
    """
    num_sinks, window = rules[2], rules[3]
    _, listed = find_block(blocks, floor_div(position, SIZE))
    recent = (window > 0) & (first_key < first_query + BLOCK_M) & (first_key + BLOCK_N > first_query - window + 1)
    return 1 - listed.to(tl.int32), listed | recent | (first_key < num_sinks)
