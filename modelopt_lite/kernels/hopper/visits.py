"""From lists of key blocks to what the kernels for Hopper GPUs visit: tiles in their order, and items, longest first.

A small kernel writes for each *item*, 128 queries of one head, the tiles of 128 keys that it visits: first those with
keys that are masked or exempt, then those that are listed and need no mask. The main kernel then has nothing to decide.
It also sorts the items of a wave of heads by the length of their lists, so that long ones begin first.

The backward goes the other way: two more kernels write for each tile of keys which tiles of 64 queries visit it, and
how many tiles of keys these visit before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..lists import floor_div

TILE = tl.constexpr(128)
"""Queries of an item, and keys of a tile."""
HEADER = tl.constexpr(5)
"""Numbers before the tiles of an item: sequence, first row, tiles, how many of these are masked, and how many of the
masked ones, the last ones, the second half of the queries needs no mask for."""
UNLISTED = tl.constexpr(1)
"""Added to the first key of a tile: it is visited for its sinks and recent keys alone."""
CHUNK = tl.constexpr(256)
HALF = tl.constexpr(64)
"""Queries that the backward visits at a time."""
PLAIN = tl.constexpr(1)
MASKED = tl.constexpr(2)
TILES_FROM = tl.constexpr(1 << 15)
"""What the numbers of tiles are multiplied by in an entry: there are fewer than half as many tiles of keys."""
RANKED = tl.constexpr(32)
"""Items of a program that sorts; it compares them with four times as many at a time."""


@triton.jit
def sequence_of(starts_ptr, row, batch):
    """Return the sequence of a row of the lists: the last one that begins there or before."""
    found = batch * 0
    for first in range(0, batch, 32):
        numbers = first + tl.arange(0, 32)
        exist = numbers < batch
        starts = tl.load(starts_ptr + numbers, mask=exist, other=0)
        found += tl.sum((exist & (starts <= row)).to(tl.int32), 0)
    return tl.maximum(found - 1, 0)


@triton.jit
def is_listed(list_ptr, count, block):
    """Say whether a list names a key block."""
    found = count * 0
    for first in range(0, count, CHUNK):
        places = first + tl.arange(0, CHUNK)
        blocks = tl.load(list_ptr + places, mask=places < count, other=-1)
        found = tl.maximum(found, tl.max((blocks == block).to(tl.int32), 0))
    return found != 0


@triton.jit
def reach_of(first_position, last_position, rules, OPTIONS: tl.constexpr):
    """Return the first and the last key that any of an item's queries sees."""
    length, _, _, sliding_window = rules
    begin = first_position * 0
    end = length - 1
    if OPTIONS.causal:
        end = tl.minimum(end, last_position)
    if OPTIONS.sliding:
        begin = tl.maximum(begin, first_position - sliding_window + 1)
    return begin, end


@triton.jit
def needs_no_mask(blocks, first_position, last_position, rules, SPARSE: tl.constexpr, OPTIONS: tl.constexpr):
    """Say of which tiles all queries see all keys and, beside a rule, none is exempt."""
    length, num_sinks, window, sliding_window = rules
    low = blocks * TILE
    high = low + TILE - 1
    plain = (high < length) & (low >= 0)
    if OPTIONS.causal:
        plain = plain & (high <= first_position)
    if OPTIONS.sliding:
        plain = plain & (low > last_position - sliding_window)
    if SPARSE:
        plain = plain & (low >= num_sinks)
        if OPTIONS.causal:
            plain = plain & (high <= first_position - window)
        else:
            plain = plain & ((high <= first_position - window) | (low > last_position))
    return plain


@triton.jit
def list_tiles(
    visits_ptr, counts_ptr, indices_ptr, starts_ptr, lengths, sizes, distances, number, SPARSE: tl.constexpr,
    OPTIONS: tl.constexpr,
):  # fmt: skip
    """Write what one item visits."""
    list_rows, columns, rows_each, batch, width = sizes
    num_sinks, window, sliding_window = distances
    head = number // (list_rows * rows_each)
    row = number % (list_rows * rows_each)
    list_row = head * list_rows + row // rows_each
    sequence = sequence_of(starts_ptr, row // rows_each, batch)
    query_length = tl.load(lengths[0] + sequence).to(tl.int32)
    length = tl.load(lengths[1] + sequence).to(tl.int32)
    first_query = length - query_length
    # Positions where the item's queries begin, whether or not the call has the first of them.
    query_block = floor_div(first_query, TILE * rows_each) + row // rows_each - tl.load(starts_ptr + sequence)
    begin = (query_block * rows_each + row % rows_each) * TILE
    first_position = tl.maximum(begin, first_query)
    last_position = tl.minimum(begin + TILE, length) - 1
    visits_ptr += number.to(tl.int64) * (width + HEADER)

    is_dense = query_length == 1
    if OPTIONS.sparse_decode:
        is_dense = query_length < 0
    window = tl.where(is_dense, length, window)
    rules = (length, num_sinks, window, sliding_window)
    reach_begin, reach_end = reach_of(first_position, last_position, rules, OPTIONS)
    lowest = reach_begin // TILE
    highest = tl.where(reach_end < reach_begin, lowest - 1, reach_end // TILE)
    masked = 0
    spared = 0
    hot = 0
    if first_position <= last_position:
        count = tl.load(counts_ptr + list_row)
        list_ptr = indices_ptr + list_row.to(tl.int64) * columns
        # Tiles that may need a mask: the last ones, of which the one that reaches past the sequence has to come first,
        # the first ones, and those around the queries, backwards, of which later queries need less.
        tail_begin = tl.maximum(lowest, tl.minimum(length // TILE, highest + 1))
        band_end = tail_begin
        if OPTIONS.causal:
            band_begin = first_position // TILE
        else:
            band_begin = highest + 1
        if SPARSE or OPTIONS.unlisted:
            band_begin = tl.minimum(band_begin, tl.maximum(first_position - tl.maximum(window - 1, 0), 0) // TILE)
            if not OPTIONS.causal:
                band_end = tl.minimum(band_end, last_position // TILE + 1)
        front_end = lowest
        if SPARSE or OPTIONS.unlisted:
            front_end = tl.maximum(front_end, tl.cdiv(num_sinks, TILE))
        if OPTIONS.sliding:
            front_end = tl.maximum(front_end, tl.cdiv(last_position - sliding_window + 1, TILE))
        front_end = tl.minimum(front_end, tail_begin)
        band_begin = tl.maximum(band_begin, front_end)
        band_end = tl.maximum(band_end, band_begin)
        middle = tl.minimum(tl.maximum(begin + TILE // 2, first_position), last_position)
        tail = highest + 1 - tail_begin
        front = front_end - lowest
        for index in range(tail + front + band_end - band_begin):
            block = tl.where(index < tail + front, front_end - 1 + tail - index, band_end - 1 + tail + front - index)
            block = tl.where(index < tail, highest - index, block)
            low = block * TILE
            exempt = (low < num_sinks) | (
                (window > 0) & (low <= last_position) & (low + TILE - 1 > first_position - window)
            )
            listed = is_dense | is_listed(list_ptr, count, block)
            plain = needs_no_mask(block, first_position, last_position, rules, SPARSE, OPTIONS)
            if (listed & (plain == 0)) | (exempt & (listed == 0)):
                tl.store(visits_ptr + HEADER + masked, low + tl.where(listed, 0, UNLISTED))
                plain = needs_no_mask(block, middle, last_position, rules, SPARSE, OPTIONS)
                spared = tl.where(listed & plain & (masked > 0), spared + 1, 0)
                masked += 1
        if not OPTIONS.keeps_nothing:
            # The others, backwards too, as far as they are listed.
            number_of_blocks = tl.where(is_dense, highest + 1, count)
            for first in range(0, number_of_blocks, CHUNK):
                places = number_of_blocks - 1 - first - tl.arange(0, CHUNK)
                blocks = tl.load(list_ptr + places, mask=(places >= 0) & (is_dense == 0), other=-1)
                blocks = tl.where(is_dense, places, blocks)
                plain = needs_no_mask(blocks, first_position, last_position, rules, SPARSE, OPTIONS)
                plain = plain & (blocks >= lowest) & (blocks <= highest)
                after = masked + hot + tl.cumsum(plain.to(tl.int32), 0) - 1
                tl.store(visits_ptr + HEADER + after, blocks * TILE, mask=plain)
                hot += tl.sum(plain.to(tl.int32), 0)
        if masked + hot == 0:
            # Nothing is visited: a tile behind the sequence, of which nothing is seen.
            tl.store(visits_ptr + HEADER, tl.cdiv(length, TILE) * TILE)
            masked = 1
        # Of the first tile, masked or not, comes what the others' weights are relative to.
        hot -= tl.where(masked == 0, 1, 0)
        masked = tl.maximum(masked, 1)
    tl.store(visits_ptr, sequence)
    tl.store(visits_ptr + 1, begin - first_query)
    tl.store(visits_ptr + 2, masked + hot)
    tl.store(visits_ptr + 3, masked)
    tl.store(visits_ptr + 4, spared)


@triton.jit
def sort_items(order_ptr, counts_ptr, sizes, heads_of, wave, first):
    """Find the places of some items of a wave of heads: by the length of their lists, then last queries first."""
    list_rows, _, rows_each, _, _ = sizes
    heads, heads_per_list, heads_per_wave = heads_of
    rows = list_rows * rows_each
    first_head = wave * heads_per_wave
    heads_here = tl.minimum(heads_per_wave, heads - first_head)
    items = first + tl.arange(0, RANKED)
    head = first_head + items % heads_here
    row = rows - 1 - items // heads_here
    exist = items < heads_here * rows
    lengths = tl.load(counts_ptr + head // heads_per_list * list_rows + row // rows_each, mask=exist, other=0)
    ranks = tl.zeros([RANKED], tl.int32)
    for begin in range(0, heads_here * rows, 4 * RANKED):
        others = begin + tl.arange(0, 4 * RANKED)
        their_list = (first_head + others % heads_here) // heads_per_list * list_rows
        their_row = (rows - 1 - others // heads_here) // rows_each
        theirs = tl.load(counts_ptr + their_list + their_row, mask=others < heads_here * rows, other=-1)
        before = (theirs[None, :] > lengths[:, None]) | (
            (theirs[None, :] == lengths[:, None]) & (others[None, :] < items[:, None])
        )
        ranks += tl.sum(before.to(tl.int32), 1)
    tl.store(order_ptr + first_head * rows + ranks, head * rows + row, mask=exist)


@triton.jit(
    do_not_specialize=[
        "list_rows", "columns", "rows_each", "batch", "width", "heads", "heads_per_list", "heads_per_wave", "num_sinks",
        "window", "sliding_window",
    ]
)  # fmt: skip
def schedule(
    visits_ptr, order_ptr, counts_ptr, indices_ptr, starts_ptr, lengths, list_rows, columns, rows_each, batch, width,
    heads, heads_per_list, heads_per_wave, num_sinks, window, sliding_window, SPARSE: tl.constexpr,
    OPTIONS: tl.constexpr,
):  # fmt: skip
    """Sort items, ``RANKED`` a program, then write what they visit, an item a program."""
    sizes = (list_rows, columns, rows_each, batch, width)
    heads_of = (heads, heads_per_list, heads_per_wave)
    distances = (num_sinks, window, sliding_window)
    program = tl.program_id(0)
    rows = list_rows * rows_each
    each = tl.cdiv(heads_per_wave * rows, RANKED)
    sorting = tl.cdiv(heads, heads_per_wave) * each
    if program < sorting:
        wave = program // each
        if program % each * RANKED < tl.minimum(heads_per_wave, heads - wave * heads_per_wave) * rows:
            sort_items(order_ptr, counts_ptr, sizes, heads_of, wave, program % each * RANKED)
    else:
        list_tiles(
            visits_ptr, counts_ptr, indices_ptr, starts_ptr, lengths, sizes, distances, program - sorting, SPARSE,
            OPTIONS,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "list_rows", "columns", "rows_each", "batch", "width", "num_sinks", "window", "sliding_window"
    ]
)  # fmt: skip
def mark_tiles(
    marks_ptr, counts_ptr, indices_ptr, starts_ptr, lengths, list_rows, columns, rows_each, batch, width, num_sinks,
    window, sliding_window, SPARSE: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Mark which tiles of keys a tile of ``HALF`` queries of one list visits, a tile of queries a program.

    Marks are ``[lists, tiles of keys, tiles of queries]``: 0 where none is visited, else one of ``PLAIN``, ``MASKED``
    and ``MASKED + UNLISTED``, plus 4 for each tile of keys before it that these queries visit.
    """
    rows = list_rows * rows_each
    head, row = tl.program_id(0) // rows, tl.program_id(0) % rows
    list_row = head * list_rows + row // rows_each
    sequence = sequence_of(starts_ptr, row // rows_each, batch)
    query_length = tl.load(lengths[0] + sequence).to(tl.int32)
    length = tl.load(lengths[1] + sequence).to(tl.int32)
    first_query = length - query_length
    query_block = floor_div(first_query, HALF * rows_each) + row // rows_each - tl.load(starts_ptr + sequence)
    begin = (query_block * rows_each + row % rows_each) * HALF
    first_position = tl.maximum(begin, first_query)
    last_position = tl.minimum(begin + HALF, length) - 1
    is_dense = query_length == 1
    if OPTIONS.sparse_decode:
        is_dense = query_length < 0
    window = tl.where(is_dense, length, window)
    rules = (length, num_sinks, window, sliding_window)
    reach_begin, reach_end = reach_of(first_position, last_position, rules, OPTIONS)
    is_whole = (begin >= first_query) & (begin + HALF <= length)
    count = tl.load(counts_ptr + list_row)
    list_ptr = indices_ptr + list_row.to(tl.int64) * columns
    before = count * 0
    for first in range(0, width, TILE):
        tiles = first + tl.arange(0, TILE)
        found = tl.zeros([TILE], tl.int32)
        for place in range(0, count, 32):
            places = place + tl.arange(0, 32)
            blocks = tl.load(list_ptr + places, mask=places < count, other=-1)
            found = tl.maximum(found, tl.max((blocks[None, :] == tiles[:, None]).to(tl.int32), 1))
        low = tiles * TILE
        listed = is_dense | (found != 0)
        exempt = (low < num_sinks) | (
            (window > 0) & (low <= last_position) & (low + TILE - 1 > first_position - window)
        )
        seen = (low <= reach_end) & (low + TILE > reach_begin) & (first_position <= last_position)
        visited = seen & (listed | exempt)
        plain = needs_no_mask(tiles, first_position, last_position, rules, SPARSE, OPTIONS) & listed & is_whole
        kinds = tl.where(plain, PLAIN, MASKED + tl.where(listed, 0, UNLISTED))
        ranks = before + tl.cumsum(visited.to(tl.int32), 0) - 1
        places = (head * width + tiles).to(tl.int64) * rows + row
        tl.store(marks_ptr + places, tl.where(visited, kinds + 4 * ranks, 0), mask=tiles < width)
        before += tl.sum(visited.to(tl.int32), 0)


@triton.jit(do_not_specialize=["list_rows", "rows_each", "batch", "width"])
def gather_tiles(
    entries_ptr, numbers_ptr, marks_ptr, starts_ptr, lengths, list_rows, rows_each, batch, width,
):  # fmt: skip
    """Gather which tiles of queries visit a tile of keys, of one sequence and one list a program.

    Entries, ``[lists, tiles of keys, tiles of queries]``, begin where the sequence's tiles do: first those with a mask,
    then the others, both ascending. An entry is ``tile * TILES_FROM + rank * 2 + unlisted``. Numbers, ``[lists, tiles
    of keys, batch, 2]``, are those of entries with a mask, and of all.
    """
    rows = list_rows * rows_each
    column, sequence = tl.program_id(0) // batch, tl.program_id(0) % batch
    query_length = tl.load(lengths[0] + sequence).to(tl.int32)
    length = tl.load(lengths[1] + sequence).to(tl.int32)
    size = HALF * rows_each
    first_query = length - query_length
    before = first_query - floor_div(first_query, size) * size
    tiles = tl.where(query_length > 0, (before + query_length + HALF - 1) // HALF, 0)
    begin = tl.load(starts_ptr + sequence) * rows_each
    tiles = tl.minimum(tiles, rows - begin)
    marks_ptr += column.to(tl.int64) * rows + begin
    entries_ptr += column.to(tl.int64) * rows + begin
    masked = tiles * 0
    for first in range(0, tiles, CHUNK):
        places = first + tl.arange(0, CHUNK)
        marks = tl.load(marks_ptr + places, mask=places < tiles, other=0)
        masked += tl.sum((marks % 4 >= MASKED).to(tl.int32), 0)
    after_masked = tiles * 0
    after_plain = masked
    for first in range(0, tiles, CHUNK):
        places = first + tl.arange(0, CHUNK)
        marks = tl.load(marks_ptr + places, mask=places < tiles, other=0)
        has_mask = (marks % 4 >= MASKED).to(tl.int32)
        is_plain = (marks % 4 == PLAIN).to(tl.int32)
        # Counted from the tile that has the first query.
        numbers = (places - before // HALF) * TILES_FROM + marks // 4 * 2
        unlisted = (marks % 4 == MASKED + UNLISTED).to(tl.int32)
        to = after_masked + tl.cumsum(has_mask, 0) - 1
        tl.store(entries_ptr + to, numbers + unlisted, mask=has_mask != 0)
        to = after_plain + tl.cumsum(is_plain, 0) - 1
        tl.store(entries_ptr + to, numbers, mask=is_plain != 0)
        after_masked += tl.sum(has_mask, 0)
        after_plain += tl.sum(is_plain, 0)
    tl.store(numbers_ptr + 2 * tl.program_id(0), masked)
    tl.store(numbers_ptr + 2 * tl.program_id(0) + 1, after_plain)
