"""The attention backward for Hopper GPUs (compute capability 9.0), in Gluon: all gradients in one pass.

As many programs as multiprocessors compute items one after the other, an item each in every *wave*. An item is a tile
of 128 keys of one head, whose gradients stay in registers. Queries and gradients of the output of all query heads that
share it, or of some of these, stream through shared memory, 64 rows a step. The first keys of all heads come first, as
under causal attention most queries see them; and in every other wave programs come in the reverse order, so that all
have about as much to do. With lists of key blocks, items differ more, and programs take them from a counter. The first
tiles of a sequence, which all queries may list, are then divided into an item for each head of queries, and
:func:`add_parts` adds up their gradients of keys and values. In a program, one warp loads, two warpgroups compute, for
64 keys each, and two warps add up gradients of queries. A step is five matrix products where two passes need seven,
because scores are computed and keys selected once.

With a hook, scores are computed in the orientation of the forward, so that all scores of a group are in one thread and
hooks see the same numbers. Weights and gradients of scores then pass through shared memory, where matrix instructions
read them transposed. Without a hook, scores are computed *transposed*, keys by queries. So weights and gradients of
scores are operands in registers for the gradients of values and keys, and only the latter go to shared memory, for the
gradients of queries.

Many programs give a part of the gradient of a query. The parts are added in global memory in FP32, by the tensor memory
accelerator, in an order that follows from numbers alone, so that every run gives the same bits: of a tile of queries, a
counter says whose turn it is. :func:`rank_of` says why hardly anybody waits. Programs wait for each other, so all have
to run at the same time.

What is asked of shapes, masks and the selection is as in :mod:`modelopt_lite.kernels.portable.backward`.
FlashAttention-3 (https://arxiv.org/abs/2407.08608) has the same roles of warps, transposed scores, and an order that
waits longer.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..lists import floor_mod
from ..portable.backward import query_spans
from ..tiles import LOG2E, join_groups, key_of_row, scale_scores, select_scores, split_groups, weigh
from .forward import PIECE, SLOTS, load_rows, read_number, spread, synchronize, write_number
from .visits import TILES_FROM, sequence_of

ROWS = tl.constexpr(64)
"""Queries of a step, and keys of a warpgroup."""
WARPGROUPS = tl.constexpr(2)
KEYS = tl.constexpr(128)
"""Keys of a tile: ``ROWS`` of each warpgroup."""
STAGES = tl.constexpr(2)
"""Steps whose queries are in shared memory."""
ADDERS = tl.constexpr(2)
"""Warps that add gradients of queries: one those of even steps, one those of odd steps."""
BUFFERS = tl.constexpr(3)
"""Steps whose gradients of scores have room: one is written, one read by this warpgroup, one still by the other."""
LINE = tl.constexpr(32)
"""Numbers of a line of sums: 128 bytes."""
CLEARED = tl.constexpr(8192)
"""Numbers that a program clears."""
DIVIDED = tl.constexpr(2)
"""How many tiles of keys of a sequence, the first ones, may be divided by heads of queries, as all may list them."""
EARLY = tl.constexpr(4)
"""Selection from groups of more keys needs the registers of a product that could run beside it."""

# Sums are written by the tensor memory accelerator alone, so that no fence has to come between it and other accesses.
AWAIT_TURN = tl.constexpr("""{
.reg .pred others;
again:
ld.acquire.gpu.global.u32 $0, [$1];
setp.ne.u32 others, $0, $2;
@others bra again;
}""")
AWAIT_SUMS = tl.constexpr("cp.async.bulk.wait_group 0; bar.warp.sync 0xffffffff; mov.b32 $0, 0;")

# Barriers of the hardware, by number; the compiler itself uses the first ones. An mbarrier would do as well, but there
# one thread arrives for its warpgroup, and before and after it the compiler has the warps wait for each other. Here,
# each warp arrives by itself. All are pairs: even steps use the first one. Two are enough for two stages and two
# adders, and for warpgroups of which one is at most a step ahead.
FREED = tl.constexpr(8)
"""Both warpgroups are done with a step's queries."""
SUMS_FULL = tl.constexpr(10)
"""A step's gradients of queries are there, to be added."""
SCORES_FULL = tl.constexpr((12, 14))
"""The first or the second warpgroup has stored its gradients of scores."""
THREADS_OF_STEP = tl.constexpr(2 * 128 + 32)
"""Both warpgroups and a warp."""
THREADS_OF_BOTH = tl.constexpr(2 * 128)
THREADS_OF_ONE = tl.constexpr(128 + 32)
"""A warpgroup and a warp."""


@gluon.constexpr_function
def at_barrier(what, pair, threads):
    """Write PTX that comes to the one barrier of a pair if a number is even, and to the other one if it is odd."""
    instructions = f"@p {what} {pair + 1}, {threads}; @!p {what} {pair}, {threads};"
    return (
        "{ .reg .pred p; .reg .b32 odd; and.b32 odd, $1, 1; setp.ne.b32 p, odd, 0; "
        + instructions
        + " mov.b32 $0, 0; }"
    )


@triton.jit(do_not_specialize=["batch", "total", "tiles"])
def prepare_gradients(
    grad_ptr, out_ptr, lse_ptr, shift_ptr, delta_ptr, grad_query_ptr, turns_ptr, begins_ptr, grad_key_ptr,
    grad_value_ptr, strides, starts_ptr, lengths, heads, batch, total, tiles, size, DIM: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Prepare the rows of ``tiles`` tiles of queries of each head, and clear what nothing is written to.

    First come the programs of tiles. Shifts and deltas are those of
    :func:`~modelopt_lite.kernels.portable.backward.gradient_rows`, but ``[heads, tiles, ROWS]``, so that the tensor
    memory accelerator can load them, which wants addresses that are multiples of 16 bytes; rows lie as
    :func:`place_of` says, and deltas are negative, as they are to be added; turns are 0. Then each sequence's program
    finds the number of its first tile, and sets the counter of items, which lies behind the turns, to 0. Then come
    those that clear gradients of queries without a key or a sequence; the logarithms of the latter may be anything. The
    others clear ``CLEARED`` of the ``size`` numbers of gradients of keys and values each.
    """
    program = tl.program_id(0)
    row_programs = tl.cdiv(total, ROWS) * heads
    columns = tl.arange(0, DIM)[None, :]
    if program < tiles * heads:
        head, tile = (program % heads).to(tl.int64), program // heads
        sequence, begin = sequence_of_tile(lengths, tile, batch)
        exists = sequence < batch
        tokens, exist = tokens_of(tile - begin, starts_ptr, lengths, sequence, exists)
        lse = tl.load(lse_ptr + tokens * heads + head, mask=exist, other=float("-inf"))
        alive = lse != float("-inf")
        grad_pointers = grad_ptr + head * strides[0][1] + (tokens[:, None] * strides[0][0] + columns)
        out_pointers = out_ptr + head * strides[1][1] + (tokens[:, None] * strides[1][0] + columns)
        grad = tl.load(grad_pointers, mask=alive[:, None], other=0.0).to(tl.float32)
        out = tl.load(out_pointers, mask=alive[:, None], other=0.0).to(tl.float32)
        places = (head * tiles + tile) * ROWS + place_of(tl.arange(0, ROWS), TRANSPOSED)
        tl.store(shift_ptr + places, tl.where(alive, lse * LOG2E, float("inf")))
        tl.store(delta_ptr + places, -tl.sum(grad * out, 1))
        tl.store(turns_ptr + head * tiles + tile, 0)
    elif program < tiles * heads + batch:
        sequence = program - tiles * heads
        begin = sequence * 0
        for first in range(0, sequence, 32):
            numbers = first + tl.arange(0, 32)
            begin += tl.sum(tiles_of(lengths, numbers, numbers < sequence), 0)
        tl.store(begins_ptr + sequence, begin)
        tl.store(turns_ptr + heads * tiles, 0)
    elif program < tiles * heads + batch + row_programs:
        program -= tiles * heads + batch
        head = (program % heads).to(tl.int64)
        tokens = program.to(tl.int64) // heads * ROWS + tl.arange(0, ROWS)
        dead = tl.load(lse_ptr + tokens * heads + head, mask=tokens < total, other=0.0) == float("-inf")
        dead = (dead | (belong_to_any(tokens, starts_ptr, lengths, batch) == 0)) & (tokens < total)
        pointers = grad_query_ptr + head * strides[2][1] + (tokens[:, None] * strides[2][0] + columns)
        tl.store(pointers, tl.zeros([ROWS, DIM], grad_query_ptr.dtype.element_ty), mask=dead[:, None])
    else:
        program -= tiles * heads + batch + row_programs
        numbers = program.to(tl.int64) * CLEARED + tl.arange(0, CLEARED)
        zeros = tl.zeros([CLEARED], grad_key_ptr.dtype.element_ty)
        tl.store(grad_key_ptr + numbers, zeros, mask=numbers < size)
        tl.store(grad_value_ptr + numbers, zeros, mask=numbers < size)


@triton.jit
def skipped_rows(lengths, sequences, exist):
    """Return how many queries some sequences have, and how many rows before the first one their first tiles begin."""
    length = tl.load(lengths[0] + sequences, mask=exist, other=0).to(tl.int32)
    before = length * 0
    if lengths[1] is not None:
        before = floor_mod(tl.load(lengths[1] + sequences, mask=exist, other=0).to(tl.int32) - length, ROWS)
    return length, before


@triton.jit
def tiles_of(lengths, sequences, exist):
    """Return how many tiles of queries some sequences have."""
    length, before = skipped_rows(lengths, sequences, exist)
    return tl.where(length > 0, (before + length + ROWS - 1) // ROWS, 0)


@triton.jit
def sequence_of_tile(lengths, tile, batch):
    """Return which sequence a tile of queries belongs to, ``batch`` if to none, and the number of its first tile."""
    sequence, begin, before = tile * 0, tile * 0, tile * 0
    for first in range(0, batch, 32):
        numbers = first + tl.arange(0, 32)
        found = tiles_of(lengths, numbers, numbers < batch)
        ends = before + tl.cumsum(found, 0)
        passed = (numbers < batch) & (ends <= tile)
        sequence += tl.sum(passed.to(tl.int32), 0)
        begin = tl.maximum(begin, tl.max(tl.where(passed, ends, 0), 0))
        before += tl.sum(found, 0)
    return sequence, begin


@triton.jit
def tokens_of(tile, starts_ptr, lengths, sequence, exists):
    """Return the tokens of a sequence's tile, and which of them exist."""
    length, before = skipped_rows(lengths, sequence, exists)
    rows = tile * ROWS - before + tl.arange(0, ROWS)
    tokens = tl.load(starts_ptr + sequence, mask=exists, other=0).to(tl.int64) + rows
    return tokens, (rows >= 0) & (rows < length)


@triton.jit
def belong_to_any(tokens, starts_ptr, lengths, batch):
    """Return which tokens belong to a sequence."""
    found = tokens < 0
    for first in range(0, batch, 32):
        numbers = first + tl.arange(0, 32)
        begins = tl.load(starts_ptr + numbers, mask=numbers < batch, other=0).to(tl.int64)
        ends = begins + tl.load(lengths[0] + numbers, mask=numbers < batch, other=0)
        inside = (tokens[:, None] >= begins[None, :]) & (tokens[:, None] < ends[None, :])
        found = found | (tl.max(inside.to(tl.int32), 1) > 0)
    return found


@triton.jit(do_not_specialize=["batch", "tiles", "first_head"])
def round_gradients(
    sums_ptr, shift_ptr, turns_ptr, grad_ptr, begins_ptr, starts_ptr, lengths, scale, batch, tiles, first_head, heads,
    strides, DIM: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Scale and round gradients of queries, except those of queries without a key.

    A program takes a tile of one of ``heads`` heads from ``first_head`` on, which the sums are of. A tile that nobody
    has added to has no sums: its queries see no key of this call, and their gradients are 0.
    """
    number, tile = (tl.program_id(0) % heads).to(tl.int64), tl.program_id(0) // heads
    head = first_head + number
    sequence = sequence_of(begins_ptr, tile, batch)
    tokens, _ = tokens_of(tile - tl.load(begins_ptr + sequence), starts_ptr, lengths, sequence, True)
    places = (head * tiles + tile) * ROWS + place_of(tl.arange(0, ROWS), TRANSPOSED)
    has_keys = tl.load(shift_ptr + places) != float("inf")
    columns = tl.arange(0, DIM)[None, :]
    offsets = order_of(tl.arange(0, ROWS)[:, None], columns, DIM)
    has_sums = has_keys & (tl.load(turns_ptr + head * tiles + tile) > 0)
    sums = tl.load(sums_ptr + (number * tiles + tile) * (ROWS * DIM) + offsets, mask=has_sums[:, None], other=0.0)
    pointers = grad_ptr + head * strides[1] + (tokens[:, None] * strides[0] + columns)
    tl.store(pointers, (sums * scale).to(grad_ptr.dtype.element_ty), mask=has_keys[:, None])


@triton.jit(do_not_specialize=["heads", "members"])
def add_parts(
    parts_ptr, grad_key_ptr, grad_value_ptr, starts_ptr, lengths_ptr, strides, heads, members, DIM: tl.constexpr
):  # fmt: skip
    """Add up and round gradients of one of the ``DIVIDED`` first tiles of keys, of one sequence and head a program.

    Parts are ``[2, batch, heads, DIVIDED, members, KEYS, DIM]``, where 2 are keys and values.
    """
    program = tl.program_id(0)
    sequence, head, tile = program // (heads * DIVIDED), program // DIVIDED % heads, program % DIVIDED
    rows, columns = tl.arange(0, KEYS)[:, None], tl.arange(0, DIM)[None, :]
    tokens = tile * KEYS + rows
    exist = tokens < tl.load(lengths_ptr + sequence)
    places = (tl.load(starts_ptr + sequence).to(tl.int64) + tokens) * strides[0] + head * strides[1] + columns
    for which in tl.static_range(2):
        first = (which * tl.num_programs(0) + program).to(tl.int64) * members * KEYS
        total = tl.zeros([KEYS, DIM], tl.float32)
        for member in range(members):
            total += tl.load(parts_ptr + (first + member * KEYS + rows) * DIM + columns, mask=exist, other=0.0)
        grad_ptr = grad_key_ptr if which == 0 else grad_value_ptr
        tl.store(grad_ptr + places, total.to(grad_ptr.dtype.element_ty), mask=exist)


@triton.jit
def place_of(row, TRANSPOSED: tl.constexpr):
    """Return where the shift and the delta of a row of a tile lie: transposed, four that a thread needs together."""
    place = row
    if TRANSPOSED:
        place = row // 16 * 16 + row % 8 // 2 * 4 + row % 16 // 8 * 2 + row % 2
    return place


@triton.jit
def order_of(row, column, DIM: tl.constexpr):
    """Return where a number of a tile of sums lies: threads store what they have, 16 bytes at a time.

    Of each half of the columns, and of each 16 rows, blocks of eight columns follow each other. In a block, there are
    two columns of a row, the same two of the row eight further on, and then the next two.
    """
    HALF: tl.constexpr = DIM // 2
    block = (column // HALF * (ROWS // 16) + row // 16) * (HALF // 8) + column % HALF // 8
    return block * 128 + row % 8 * 16 + column % 8 // 2 * 4 + row % 16 // 8 * 2 + column % 2


@gluon.jit
def tell(step, PAIR: gl.constexpr, THREADS: gl.constexpr):
    """Tell the others at a step's barrier that this thread has come to it, and go on."""
    PROGRAM: gl.constexpr = at_barrier("bar.arrive", PAIR, THREADS)
    gl.inline_asm_elementwise(PROGRAM, "=r,r", [gl.to_tensor(step)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def meet(step, PAIR: gl.constexpr, THREADS: gl.constexpr):
    """Wait until all of so many threads have come to a step's barrier."""
    PROGRAM: gl.constexpr = at_barrier("bar.sync", PAIR, THREADS)
    gl.inline_asm_elementwise(PROGRAM, "=r,r", [gl.to_tensor(step)], dtype=gl.int32, is_pure=False, pack=1)


@builtin
def add_to_global(descriptor, coordinates, memory, _semantic=None):
    """Have a tile in shared memory added to one in global memory, like ``tma.async_copy_shared_to_global``."""
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, coordinates, memory.handle
    )


@triton.jit
def item_of(wave, program, programs):
    """Return which item a program computes in a wave: in odd waves the programs' order is reversed."""
    return wave * programs + tl.where(wave % 2 == 0, program, programs - 1 - program)


@gluon.jit
def count_items(problem):
    """Return how many items there are for all programs; see :func:`find_tile`."""
    _, heads_of, batch, tiles_per_head, _, lists, _ = problem
    tiles = tiles_per_head
    if lists is not None:
        tiles += (heads_of[3] - 1) * DIVIDED
    return batch * heads_of[0] * tiles


@gluon.jit
def count_waves(problem):
    """Return how many items a program computes at most, without lists."""
    return (count_items(problem) + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def post_item(wave, problem):
    """Take an item from the counter for all warps of this program, and return it: the part of the warp that loads.

    With lists, items differ in length, so no program gets a fixed share. A wave is the number of items it took before.
    """
    counter_ptr, items, posted, taken = problem[6]
    slot = wave % SLOTS
    mbarrier.wait(taken.index(slot), (wave // SLOTS & 1) ^ 1)
    item = gl.atomic_add(counter_ptr, 1, sem="relaxed")
    write_number(items.index(slot), item)
    mbarrier.arrive(posted.index(slot), count=1)
    return item


@gluon.jit
def posted_item(wave, problem):
    """Return the item that was posted: the part of all warps but the one that loads."""
    _, items, posted, taken = problem[6]
    slot = wave % SLOTS
    mbarrier.wait(posted.index(slot), wave // SLOTS & 1)
    item = read_number(items.index(slot))
    mbarrier.arrive(taken.index(slot), count=1)
    return item


@triton.jit
def share_of(item, heads, members, shares):
    """Return what an item is: the first items are the first tiles of keys of all heads.

    Args:
        item: its number.
        heads: heads of keys, of all sequences.
        members: how many heads of queries share one.
        shares: into how many items each of the ``DIVIDED`` first tiles of keys is divided, by heads of queries.

    Returns:
        The head of keys, its tile, and of the heads of queries the first one and the one behind the last one.
    """
    head, number = item % heads, item // heads
    divided = number < shares * DIVIDED
    tile = tl.where(divided, number // shares, number - (shares - 1) * DIVIDED)
    each = tl.where(divided, members // shares, members)
    first = tl.where(divided, number % shares * each, 0)
    return head, tile, first, first + each


@gluon.jit
def find_tile(item, problem):
    """Return what an item is.

    Returns:
        ``(kv_head, sequence, tile, exists, lengths, members)``: the head; the tile's number in it; whether there is
        any, with keys; how many queries and keys the sequence has; and which heads of queries, as in :func:`share_of`.
    """
    sequences, heads_of, batch, tiles_per_head, _, lists, _ = problem
    heads = batch * heads_of[0]
    if lists is None:
        head, tile = item % heads, item // heads
        members = (0, heads_of[1])
    else:
        head, tile, first, end = share_of(item, heads, heads_of[1], heads_of[3])
        members = (first, end)
    sequence = head // heads_of[0]
    lengths = (gl.load(sequences[1] + sequence).to(gl.int32), gl.load(sequences[3] + sequence).to(gl.int32))
    exists = (tile < tiles_per_head) & (tile * KEYS < lengths[1])
    return heads_of[2] + head % heads_of[0], sequence, tile, exists, lengths, members


@gluon.jit
def entries_of(head, sequence, tile, problem):
    """Return where the entries of a tile of keys begin, how many have a mask, and how many there are.

    See :func:`modelopt_lite.kernels.hopper.visits.gather_tiles`.
    """
    _, _, batch, tiles_per_head, _, lists, _ = problem
    entries_ptr, numbers_ptr, starts_ptr, rows, rows_each, heads_per_list = lists
    column = (head // heads_per_list * tiles_per_head + tile).to(gl.int64)
    numbers_ptr += 2 * (column * batch + sequence)
    entries_ptr += column * rows + gl.load(starts_ptr + sequence) * rows_each
    return entries_ptr, gl.load(numbers_ptr), gl.load(numbers_ptr + 1)


@gluon.jit
def rows_before(lengths, problem):
    """Return how many rows before the first query the first tile of queries begins: with lists, as blocks do."""
    before = lengths[0] * 0
    if problem[5] is not None:
        before = floor_mod(lengths[1] - lengths[0], ROWS)
    return before


@triton.jit
def tiles_that_see(tile, lengths, sliding_window, OPTIONS: tl.constexpr):
    """Return which tiles of queries see some of a tile of keys: the first one, and the one behind the last one."""
    query_length, length = lengths
    own = tile * KEYS - (length - query_length)  # the row of the query at the position of the first key
    begin = own * 0
    rows_end = query_length
    if OPTIONS.causal:
        begin = tl.maximum(own, 0) // ROWS
    if OPTIONS.sliding:
        rows_end = tl.minimum(query_length, tl.maximum(own + KEYS - 1 + sliding_window, 0))
    return begin, tl.maximum((rows_end + ROWS - 1) // ROWS, begin)


@triton.jit
def count_within(begin, end, first, last):
    """Return how many numbers two ranges have in common."""
    return tl.maximum(tl.minimum(end, last) - tl.maximum(begin, first), 0)


@triton.jit
def rank_of(wave, program, query_tile, lengths, sliding_window, heads, programs, OPTIONS: tl.constexpr):
    """Return how many tiles of keys come before a program's in adding to the gradient of a tile of queries.

    First come the tiles of earlier waves; then in even waves the last keys first, and in odd waves the first keys
    first. Keys further to the right are seen by fewer queries. So in an even wave, which all begin at about the same
    time, they meet a tile of queries earlier, in either order of :func:`descends`; and they are done earlier, so that
    in an odd wave those further to the left come first. After it, all programs have done about as much.

    Args:
        wave: the wave of the program's item.
        program: its number.
        query_tile: the tile of queries' number in its sequence.
        lengths: how many queries and keys the sequence has.
        sliding_window: as in the request.
        heads: heads of keys of the launch, of all sequences.
        programs: how many there are.
        OPTIONS: the kernel's.
    """
    query_length, length = lengths
    offset = length - query_length
    # tiles of keys of which some are seen
    first = query_tile * 0
    last = (length + KEYS - 1) // KEYS
    if OPTIONS.causal:
        last = tl.minimum(last, ((query_tile + 1) * ROWS + offset + KEYS - 1) // KEYS)
    if OPTIONS.sliding:
        beyond = query_tile * ROWS + offset - (KEYS - 1) - sliding_window
        first = tl.where(beyond < 0, 0, beyond // KEYS + 1)
    item = item_of(wave, program, programs)
    head, tile = item % heads, item // heads
    # the head's tiles of this wave
    begin = (wave * programs - head + heads - 1) // heads
    end = ((wave + 1) * programs - head + heads - 1) // heads
    before_begin = tl.where(wave % 2 == 0, tile + 1, begin)
    before_end = tl.where(wave % 2 == 0, end, tile)
    return count_within(first, last, 0, begin) + count_within(first, last, before_begin, before_end)


@triton.jit
def descends(wave, member, lists):
    """Say whether a program meets the queries of a head, the ``member``-th of those that share it, last ones first.

    It does so in even waves with all heads but the first. Then the program that comes next in the order of
    :func:`rank_of` meets a tile of queries ``2 * member`` steps later, or two steps for the first head, and not ``2 *
    member + 2``: more tiles and their sums are still in the L2 cache.
    """
    descending = (wave % 2 == 0) & (member > 0)
    if lists is not None:
        descending = False
    return descending


@triton.jit
def nth_tile(place, begin, end, descending):
    """Return which tile of queries comes at a place of their order."""
    return tl.where(descending, end - 1 - place, begin + place)


@triton.jit
def runs_of(number, begin, spans, end, descending):
    """Return one of three runs of tiles of queries, each of masked tiles and then of hot ones.

    Returns:
        The places in their order where the masked tiles begin, where they end and the hot ones begin, and where these
        end.
    """
    hot_begin, band_begin, band_end, full_end = spans
    first = begin
    masked_begin = tl.where(number == 0, begin, tl.where(number == 1, band_begin, full_end))
    masked_end = tl.where(number == 0, hot_begin, tl.where(number == 1, band_end, end))
    hot_end = tl.where(number == 0, band_begin, tl.where(number == 1, full_end, end))
    if descending:
        first = end
        masked_begin = tl.where(number == 0, end, tl.where(number == 1, band_end, hot_begin))
        masked_end = tl.where(number == 0, full_end, tl.where(number == 1, band_begin, begin))
        hot_end = tl.where(number == 0, band_end, tl.where(number == 1, hot_begin, begin))
    return tl.abs(masked_begin - first), tl.abs(masked_end - first), tl.abs(hot_end - first)


@gluon.jit
def load_item(wave, item, step, turn, work, OPTIONS: gl.constexpr):
    """Do an item's part of :func:`load_items`, and return how many steps and items are loaded."""
    descriptors, buffers, barriers, begins_ptr, tiles_of_queries, problem = work
    query_descriptor, grad_descriptor, shift_descriptor, delta_descriptor, keys, values = descriptors
    query_memory, grad_memory, shift_memory, delta_memory, key_memory, value_memory = buffers
    query_loaded, grad_loaded, keys_loaded, keys_freed = barriers
    sequences, heads_of, _, _, _, lists, _ = problem
    BYTES: gl.constexpr = ROWS * OPTIONS.block_d * 2
    kv_head, sequence, tile, exists, lengths, members = find_tile(item, problem)
    if exists:
        begin, end = tiles_that_see(tile, lengths, problem[4][2], OPTIONS)
        first_query = gl.load(sequences[0] + sequence).to(gl.int32) - rows_before(lengths, problem)
        begin_of_sequence = gl.load(begins_ptr + sequence)
        first_key = gl.load(sequences[2] + sequence).to(gl.int32) + tile * KEYS
        mbarrier.wait(keys_freed, (turn & 1) ^ 1)
        mbarrier.expect(keys_loaded, 2 * WARPGROUPS * BYTES)
        for w in gl.static_range(WARPGROUPS):
            place = first_key + w * ROWS
            load_rows(keys, place, kv_head, keys_loaded, key_memory.index(w), OPTIONS)
            load_rows(values, place, kv_head, keys_loaded, value_memory.index(w), OPTIONS)
        turn += 1
        for member in range(members[0], members[1]):
            head = kv_head * heads_of[1] + member
            if lists is not None:
                entries_ptr, _masked, end = entries_of(head, sequence, tile, problem)
                begin = end * 0
            for place in range(end - begin):
                query_tile = nth_tile(place, begin, end, descends(wave, member, lists))
                if lists is not None:
                    query_tile = gl.load(entries_ptr + place) // TILES_FROM
                row = first_query + query_tile * ROWS
                line = head * tiles_of_queries + begin_of_sequence + query_tile
                stage = step % STAGES
                if step >= STAGES:
                    meet(step, FREED, THREADS_OF_STEP)
                mbarrier.expect(query_loaded.index(stage), BYTES + ROWS * 4)
                tma.async_copy_global_to_shared(
                    query_descriptor, [row, head, 0], query_loaded.index(stage), query_memory.index(stage)
                )
                tma.async_copy_global_to_shared(
                    shift_descriptor, [line, 0], query_loaded.index(stage), shift_memory.index(stage)
                )
                mbarrier.expect(grad_loaded.index(stage), BYTES + ROWS * 4)
                tma.async_copy_global_to_shared(
                    grad_descriptor, [row, head, 0], grad_loaded.index(stage), grad_memory.index(stage)
                )
                tma.async_copy_global_to_shared(
                    delta_descriptor, [line, 0], grad_loaded.index(stage), delta_memory.index(stage)
                )
                step += 1
    return step, turn


@gluon.jit
def load_items(work, OPTIONS: gl.constexpr):
    """Load the keys and values of each tile, then queries and gradients of the output: the part of one warp."""
    step = 0
    turn = 0
    problem = work[5]
    if problem[6] is None:
        for wave in range(count_waves(problem)):
            item = item_of(wave, gl.program_id(0), gl.num_programs(0))
            step, turn = load_item(wave, item, step, turn, work, OPTIONS)
    else:
        wave = 0
        item = post_item(wave, problem)
        while item < count_items(problem):
            step, turn = load_item(wave, item, step, turn, work, OPTIONS)
            wave += 1
            item = post_item(wave, problem)


@gluon.jit
def add_item(wave, item, step, work, ADDER: gl.constexpr, TRANSPOSED: gl.constexpr, OPTIONS: gl.constexpr):
    """Do an item's part of :func:`add_items`, and return how many steps are done."""
    descriptor, memory, empty, turns_ptr, begins_ptr, tiles_of_queries, problem = work
    _, heads_of, batch, _, _, lists, _ = problem
    LINES: gl.constexpr = memory.shape[1]
    kv_head, sequence, tile, exists, lengths, members = find_tile(item, problem)
    if exists:
        begin, end = tiles_that_see(tile, lengths, problem[4][2], OPTIONS)
        begin_of_sequence = gl.load(begins_ptr + sequence)
        for member in range(members[0], members[1]):
            head = kv_head * heads_of[1] + member
            first_tile = head * tiles_of_queries + begin_of_sequence
            first_sum = first_tile - heads_of[2] * heads_of[1] * tiles_of_queries
            entry = 0
            if lists is not None:
                entries_ptr, _masked, end = entries_of(head, sequence, tile, problem)
                begin = end * 0
                entry = gl.load(entries_ptr)
            for place in range(end - begin):
                if lists is None:
                    query_tile = nth_tile(place, begin, end, descends(wave, member, lists))
                    rank = rank_of(
                        wave, gl.program_id(0), query_tile, lengths, problem[4][2], batch * heads_of[0],
                        gl.num_programs(0), OPTIONS,
                    )  # fmt: skip
                else:
                    query_tile, rank = entry // TILES_FROM, entry % TILES_FROM // 2
                    entry = gl.load(entries_ptr + place + 1)  # ahead, as it takes long
                if step % ADDERS == ADDER:
                    turn_ptr = turns_ptr + first_tile + query_tile
                    gl.inline_asm_elementwise(
                        AWAIT_TURN, "=r,l,r", [turn_ptr, rank], dtype=gl.int32, is_pure=False, pack=1
                    )
                    meet(step, SUMS_FULL, THREADS_OF_STEP if TRANSPOSED else THREADS_OF_ONE)
                    for w in gl.static_range(WARPGROUPS):
                        line = ((first_sum + query_tile) * WARPGROUPS + w) * LINES
                        if rank == 0:
                            tma.async_copy_shared_to_global(descriptor, [line, 0], memory.index(w))
                        else:
                            add_to_global(descriptor, [line, 0], memory.index(w))
                    tma.store_wait(0)
                    mbarrier.arrive(empty.index(ADDER), count=1)
                    gl.inline_asm_elementwise(AWAIT_SUMS, "=r,r", [rank], dtype=gl.int32, is_pure=False, pack=1)
                    gl.atomic_add(turn_ptr, 1, sem="release")
                step += 1
    return step


@gluon.jit
def add_items(work, ADDER: gl.constexpr, TRANSPOSED: gl.constexpr, OPTIONS: gl.constexpr):
    """Add gradients of queries to what other programs have added: the part of one of ``ADDERS`` warps.

    They take turns: what passes until others may add takes longer than a step.
    """
    step = 0
    problem = work[6]
    if problem[6] is None:
        for wave in range(count_waves(problem)):
            item = item_of(wave, gl.program_id(0), gl.num_programs(0))
            step = add_item(wave, item, step, work, ADDER, TRANSPOSED, OPTIONS)
    else:
        wave = 0
        item = posted_item(wave, problem)
        while item < count_items(problem):
            step = add_item(wave, item, step, work, ADDER, TRANSPOSED, OPTIONS)
            wave += 1
            item = posted_item(wave, problem)


@gluon.jit
def clear_beyond(
    memory, first, limit, OPTIONS: gl.constexpr, GROUP: gl.constexpr, SHARES: gl.constexpr, SHARE: gl.constexpr
):
    """Clear rows of a tile before position 0 and from ``limit`` on: there may be anything, and 0 * NaN is not 0.

    The tile's groups of ``GROUP`` are deinterleaved; of ``SHARES`` equal shares, this warpgroup clears one.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    tile = memory.reshape([ROWS, OPTIONS.block_d])
    for piece in gl.static_range(SHARE, ROWS // PIECE, SHARES):
        rows = piece * PIECE + gl.arange(0, PIECE, gl.SliceLayout(1, LAYOUT))
        positions = first + key_of_row(rows, ROWS, GROUP, OPTIONS.pair if GROUP > 1 else 1)
        exist = (positions >= 0) & (positions < limit)
        part = tile.slice(piece * PIECE, PIECE, 0)
        found = part.load(LAYOUT)
        part.store(gl.where(exist[:, None], found, gl.zeros_like(found)))
    fence_async_shared()
    synchronize()


@gluon.jit
def await_scores(step, WARPGROUP: gl.constexpr):
    """Wait, once for each step, until the other warpgroup has stored its gradients of scores."""
    meet(step, SCORES_FULL[1 - WARPGROUP], THREADS_OF_BOTH)


@gluon.jit
def hands_over(step, WARPGROUP: gl.constexpr, TRANSPOSED: gl.constexpr):
    """Say whether a warpgroup has a part in a step's gradient of queries.

    Transposed, both have, for half of the columns each: both read all gradients of scores, but the product is short.
    Else they take turns, each with all columns, which reads less shared memory.
    """
    has_part = True
    if not TRANSPOSED:
        has_part = step % WARPGROUPS == WARPGROUP
    return has_part


@gluon.jit
def begin_sums(
    step, score_memory, key_memory, WARPGROUP: gl.constexpr, TRANSPOSED: gl.constexpr, OPTIONS: gl.constexpr
):
    """Begin to multiply a step's gradients of scores, of both warpgroups, with a warpgroup's columns of the keys."""
    COLUMNS: gl.constexpr = OPTIONS.block_d // 2 if TRANSPOSED else OPTIONS.block_d
    FIRST: gl.constexpr = WARPGROUP * COLUMNS if TRANSPOSED else 0
    buffer = (step + BUFFERS) % BUFFERS
    sums = gl.full([ROWS, COLUMNS], 0, gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16]))
    for w in gl.static_range(WARPGROUPS):
        keys = key_memory.index(w).reshape([ROWS, OPTIONS.block_d]).slice(FIRST, COLUMNS, 1)
        scores = by_query(score_memory.index(WARPGROUPS * buffer + w), TRANSPOSED)
        sums = warpgroup_mma(scores, keys, sums, use_acc=w > 0, is_async=True)
    return sums


@gluon.jit
def hand_over(sums, step, memory, empty, WARPGROUP: gl.constexpr, OPTIONS: gl.constexpr):
    """Hand a warpgroup's columns of a step's gradient of queries to the warp that adds them up."""
    HALF: gl.constexpr = OPTIONS.block_d // 2
    LINES: gl.constexpr = ROWS * HALF // LINE
    THREADS: gl.constexpr = THREADS_OF_STEP if sums.shape[1] == HALF else THREADS_OF_ONE
    before = step + ADDERS - 1  # ADDERS steps after the one whose sums must be out of the way
    mbarrier.wait(empty.index(before % ADDERS), (before // ADDERS & 1) ^ 1)
    # What a thread has, four numbers after the other; see order_of.
    if sums.shape[1] == HALF:
        sums = sums.reshape([ROWS // 16, 2, 8, HALF // 8, 4, 2]).permute([0, 3, 2, 4, 1, 5])
        memory.index(WARPGROUP).store(sums.reshape([LINES, LINE]))
    else:
        halves = sums.reshape([ROWS // 16, 2, 8, 2, HALF // 8, 4, 2]).permute([0, 4, 2, 5, 1, 6, 3]).split()
        for half in gl.static_range(2):
            memory.index(half).store(halves[half].reshape([LINES, LINE]))
    fence_async_shared()
    tell(step, SUMS_FULL, THREADS)


@gluon.jit
def weigh_scores(
    products, rows, first, shift, rules, numbers, hook_args, SCORE_HOOK: gl.constexpr, OPTIONS: gl.constexpr,
    MASKED: gl.constexpr, unlisted,
):  # fmt: skip
    """Compute softmax weights of products of queries and keys again; also returns the scores."""
    scores, to_log2 = scale_scores(products, numbers, OPTIONS)
    part = split_groups(scores, OPTIONS)[0]  # for its layout
    columns = gl.arange(0, part.shape[1], gl.SliceLayout(0, part.type.layout))
    groups = first + OPTIONS.group * columns[None, :]
    q_pos = spread(rules[0] + rows, part)
    parts, keep, _ = select_scores(scores, q_pos, groups, rules, hook_args, SCORE_HOOK, OPTIONS, MASKED, unlisted)
    weights = ()
    for r in gl.static_range(len(parts)):
        weight = gl.exp2(parts[r] * to_log2 - spread(shift, parts[r]))
        if len(keep) > 0:
            weight = weigh(weight, keep[r])
        weights = weights + (weight,)
    return gl.convert_layout(join_groups(weights, OPTIONS), products.type.layout, assert_trivial=True), scores


@gluon.jit
def begin_product(queries, keys, TRANSPOSED: gl.constexpr):
    """Begin to multiply 64 queries, or gradients of the output, and 64 keys, or values."""
    zeros = gl.full([ROWS, ROWS], 0, gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16]))
    if TRANSPOSED:
        product = warpgroup_mma(keys, queries.permute([1, 0]), zeros, use_acc=False, is_async=True)
    else:
        product = warpgroup_mma(queries, keys.permute([1, 0]), zeros, use_acc=False, is_async=True)
    return product


@gluon.jit
def load_rows_of(memory, TRANSPOSED: gl.constexpr):
    """Load a number of each query, which lie as :func:`place_of` says."""
    OF_ROWS: gl.constexpr = gl.SliceLayout(
        0 if TRANSPOSED else 1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    )
    if TRANSPOSED:
        FOUR: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 0, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0], [2, 0, 0, 0]],
            [[0, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
            [[0, 0, 0, 0], [0, 0, 0, 0]],
            [],
            [ROWS // 16, 4, 2, 2],
        )
        numbers = memory.reshape([ROWS // 16, 4, 2, 2]).load(FOUR).permute([0, 2, 1, 3]).reshape([ROWS])
        numbers = gl.convert_layout(numbers, OF_ROWS, assert_trivial=True)
    else:
        numbers = memory.reshape([ROWS]).load(OF_ROWS)
    return numbers


@gluon.jit
def begin_difference(queries, keys, memory, TRANSPOSED: gl.constexpr):
    """Begin to multiply like :func:`begin_product`, and to add a number of each query, which is in shared memory.

    These numbers take the place of the product, so reading them early needs no registers.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    numbers = load_rows_of(memory, TRANSPOSED)
    numbers = gl.expand_dims(numbers, 0 if TRANSPOSED else 1)
    numbers, _ = gl.broadcast(numbers, gl.full([ROWS, ROWS], 0, gl.float32, SCORES))
    if TRANSPOSED:
        product = warpgroup_mma(keys, queries.permute([1, 0]), numbers, is_async=True)
    else:
        product = warpgroup_mma(queries, keys.permute([1, 0]), numbers, is_async=True)
    return product


@gluon.jit
def by_query(product, TRANSPOSED: gl.constexpr):
    """Return a product as ``[queries, keys]``, or bring such a tile back to how the product lies; nothing moves."""
    return product.permute([1, 0]) if TRANSPOSED else product


@gluon.jit
def as_operand(tile, OPTIONS: gl.constexpr):
    """Turn ``[queries, keys]`` of a transposed product into the operand ``[keys, queries]``, which moves nothing."""
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OPTIONS.block_d, 16])
    return gl.convert_layout(tile.permute([1, 0]), gl.DotOperandLayout(0, OUTPUT, 2), assert_trivial=True)


@gluon.jit
def differentiate(
    step, row, first, grad_key, grad_value, clearings, has_before, lengths, rules, numbers, hook_args,
    buffers, barriers, WARPGROUP: gl.constexpr, SCORE_HOOK: gl.constexpr, OPTIONS: gl.constexpr, MASKED: gl.constexpr,
    unlisted=0,
):  # fmt: skip
    """Add to the gradients of a warpgroup's keys, from position ``first`` on, what the queries from ``row`` on give.

    The gradient of queries is that of the step before, if the tile of keys has one: so neither warpgroup waits for the
    other one's scores.

    Returns:
        The gradients, and how often tiles of queries have been cleared.
    """
    query_memory, grad_memory, key_memory, value_memory, weight_memory, score_memory, sum_memory, of_rows = buffers
    shift_memory, delta_memory = of_rows
    query_loaded, grad_loaded, sums_empty, cleared = barriers
    ELEMENT: gl.constexpr = query_memory.dtype
    LATE: gl.constexpr = OPTIONS.group > EARLY
    TRANSPOSED: gl.constexpr = SCORE_HOOK is None
    TILE: gl.constexpr = [ROWS, OPTIONS.block_d]
    query_length = lengths[0]
    stage = step % STAGES
    query = query_memory.index(stage).reshape(TILE)
    grad = grad_memory.index(stage).reshape(TILE)
    keys = key_memory.index(WARPGROUP).reshape(TILE)
    values = value_memory.index(WARPGROUP).reshape(TILE)

    mbarrier.wait(query_loaded.index(stage), step // STAGES & 1)
    if MASKED:  # noqa: SIM102 - conditions at compile time and at run time do not mix
        if (row < 0) | (row + ROWS > query_length):
            mbarrier.wait(grad_loaded.index(stage), step // STAGES & 1)
            clear_beyond(query, row, query_length, OPTIONS, 1, WARPGROUPS, WARPGROUP)
            clear_beyond(grad, row, query_length, OPTIONS, 1, WARPGROUPS, WARPGROUP)
            mbarrier.arrive(cleared, count=1)
            mbarrier.wait(cleared, clearings & 1)
            clearings += 1
    products = begin_product(query, keys, TRANSPOSED)
    if LATE:
        products = warpgroup_mma_wait(0, deps=[products])
        shift = load_rows_of(shift_memory.index(stage), TRANSPOSED)
        mbarrier.wait(grad_loaded.index(stage), step // STAGES & 1)
    else:
        mbarrier.wait(grad_loaded.index(stage), step // STAGES & 1)
        grad_weights = begin_difference(grad, values, delta_memory.index(stage), TRANSPOSED)
        # Before the wait, which hides how long it takes: transposed, a thread reads 16 of them.
        shift = load_rows_of(shift_memory.index(stage), TRANSPOSED)
        products = warpgroup_mma_wait(1, deps=[products])
    products = by_query(products, TRANSPOSED)
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, products.type.layout))
    weights, scores = weigh_scores(
        products, rows, first, shift, rules, numbers, hook_args, SCORE_HOOK, OPTIONS, MASKED, unlisted
    )  # fmt: skip
    if TRANSPOSED:
        own_weights = as_operand(weights.to(ELEMENT), OPTIONS)
    else:
        own_weights = weight_memory.index(WARPGROUP)
        own_weights.store(weights.to(ELEMENT))
        if LATE:
            grad_weights = begin_difference(grad, values, delta_memory.index(stage), TRANSPOSED)
        fence_async_shared()
        synchronize()
        own_weights = own_weights.permute([1, 0])
    grad_value = warpgroup_mma(own_weights, grad, grad_value, is_async=True)
    grad_weights = by_query(warpgroup_mma_wait(1, deps=[grad_weights]), TRANSPOSED)
    grad_scores = weights * grad_weights
    if OPTIONS.softcap:
        tanh_of_scores = scores / numbers[1]
        grad_scores *= 1.0 - tanh_of_scores * tanh_of_scores
    grad_scores = grad_scores.to(ELEMENT)
    buffer = step % BUFFERS
    own_scores = score_memory.index(WARPGROUPS * buffer + WARPGROUP)
    has_part = has_before & hands_over(step - 1, WARPGROUP, TRANSPOSED)
    # When both have the scores of the step before, both are done with what is in the place of these.
    if has_before:
        await_scores(step - 1, WARPGROUP)
    if TRANSPOSED:
        # Products first: what is stored is not needed before the next step.
        sums = begin_sums(step - 1, score_memory, key_memory, WARPGROUP, TRANSPOSED, OPTIONS)
        grad_key = warpgroup_mma(as_operand(grad_scores, OPTIONS), query, grad_key, is_async=True)
        own_scores.store(by_query(grad_scores, TRANSPOSED))
        fence_async_shared()
        tell(step, SCORES_FULL[WARPGROUP], THREADS_OF_BOTH)
        sums = warpgroup_mma_wait(1, deps=[sums])
        if has_part:
            hand_over(sums, step - 1, sum_memory, sums_empty, WARPGROUP, OPTIONS)
    else:
        own_scores.store(grad_scores)
        fence_async_shared()
        tell(step, SCORES_FULL[WARPGROUP], THREADS_OF_BOTH)
        synchronize()
        grad_key = warpgroup_mma(own_scores.permute([1, 0]), query, grad_key, is_async=True)
        if has_part:
            sums = begin_sums(step - 1, score_memory, key_memory, WARPGROUP, TRANSPOSED, OPTIONS)
            sums = warpgroup_mma_wait(0, deps=[sums])
            hand_over(sums, step - 1, sum_memory, sums_empty, WARPGROUP, OPTIONS)
    grad_key, grad_value = warpgroup_mma_wait(0, deps=[grad_key, grad_value])
    tell(step, FREED, THREADS_OF_STEP)
    if not TRANSPOSED:
        synchronize()  # before the next weights are stored in the place of these
    return grad_key, grad_value, clearings


@gluon.jit
def store_keys(grad, pointer, stride, first, length, OPTIONS: gl.constexpr):
    """Store the gradient of a warpgroup's keys or values, as far as they exist, where the sequence's rows begin."""
    LAYOUT: gl.constexpr = grad.type.layout
    positions = first + key_of_row(gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)), ROWS, OPTIONS.group, OPTIONS.pair)
    columns = gl.arange(0, OPTIONS.block_d, gl.SliceLayout(0, LAYOUT))[None, :]
    pointers = pointer + (positions[:, None].to(gl.int64) * stride + columns)
    gl.store(pointers, grad.to(pointer.dtype.element_ty), mask=(positions < length)[:, None])


@gluon.jit
def differentiate_item(
    wave,
    item,
    step,
    turn,
    clearings,
    work,
    hook_args,
    WARPGROUP: gl.constexpr,
    SCORE_HOOK: gl.constexpr,
    OPTIONS: gl.constexpr,
):
    """Do an item's part of :func:`differentiate_items`, and return how many steps, items and clearings are done."""
    buffers, barriers, key_barriers, pointers, strides, problem, numbers = work
    grad_key_ptr, grad_value_ptr, parts_ptr = pointers
    sequences, heads_of, batch, _, distances, lists, _ = problem
    num_sinks, window, sliding_window = distances
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OPTIONS.block_d, 16])
    RUNS: gl.constexpr = 3 if lists is None else 1
    kv_head, sequence, tile, exists, lengths, members = find_tile(item, problem)
    if exists:
        query_length, length = lengths
        first_key = gl.load(sequences[2] + sequence).to(gl.int64)
        exempt = window
        if not OPTIONS.sparse_decode:
            exempt = gl.where(query_length == 1, length, window)
        rules = (length - query_length, length, num_sinks, exempt, sliding_window)
        begin, end = tiles_that_see(tile, lengths, problem[4][2], OPTIONS)
        spans = query_spans(
            tile * KEYS, query_length, length - query_length, rules, SCORE_HOOK is not None, OPTIONS
        )  # fmt: skip
        spans = (spans[1] // ROWS, spans[2] // ROWS, spans[3] // ROWS, spans[4] // ROWS)
        grad_key = gl.full([ROWS, OPTIONS.block_d], 0, gl.float32, OUTPUT)
        grad_value = gl.full([ROWS, OPTIONS.block_d], 0, gl.float32, OUTPUT)
        first = tile * KEYS + WARPGROUP * ROWS
        mbarrier.wait(key_barriers[0], turn & 1)
        turn += 1
        if first + ROWS > length:
            clear_beyond(buffers[2].index(WARPGROUP), first, length, OPTIONS, OPTIONS.group, 1, 0)
            clear_beyond(buffers[3].index(WARPGROUP), first, length, OPTIONS, OPTIONS.group, 1, 0)
        first_step = step
        before = rows_before(lengths, problem)
        for run in range(RUNS * members[0], RUNS * members[1]):
            entry = 0
            descending = False
            if lists is None:
                descending = descends(wave, run // RUNS, lists)
                masked_begin, masked_end, hot_end = runs_of(run % RUNS, begin, spans, end, descending)
            else:
                head = kv_head * heads_of[1] + run
                entries_ptr, masked_end, hot_end = entries_of(head, sequence, tile, problem)
                masked_begin = masked_end * 0
                entry = gl.load(entries_ptr)
            for place in range(masked_begin, masked_end):
                query_tile, unlisted = nth_tile(place, begin, end, descending), 0
                if lists is not None:
                    query_tile, unlisted = entry // TILES_FROM, entry % 2
                    entry = gl.load(entries_ptr + place + 1)  # ahead, as it takes long
                grad_key, grad_value, clearings = differentiate(
                    step, query_tile * ROWS - before, first, grad_key, grad_value, clearings,
                    step > first_step, lengths, rules, numbers, hook_args, buffers, barriers,
                    WARPGROUP, SCORE_HOOK, OPTIONS, True, unlisted,
                )  # fmt: skip
                step += 1
            for place in range(masked_end, hot_end):
                query_tile = nth_tile(place, begin, end, descending)
                if lists is not None:
                    query_tile = entry // TILES_FROM
                    entry = gl.load(entries_ptr + place + 1)
                grad_key, grad_value, clearings = differentiate(
                    step, query_tile * ROWS - before, first, grad_key, grad_value, clearings,
                    step > first_step, lengths, rules, numbers, hook_args, buffers, barriers,
                    WARPGROUP, SCORE_HOOK, OPTIONS, False,
                )  # fmt: skip
                step += 1
        if step > first_step:
            await_scores(step - 1, WARPGROUP)
        if (step > first_step) & hands_over(step - 1, WARPGROUP, SCORE_HOOK is None):
            sums = begin_sums(step - 1, buffers[5], buffers[2], WARPGROUP, SCORE_HOOK is None, OPTIONS)
            sums = warpgroup_mma_wait(0, deps=[sums])
            hand_over(sums, step - 1, buffers[6], barriers[2], WARPGROUP, OPTIONS)
        synchronize()
        mbarrier.arrive(key_barriers[1], count=1)
        grad_key *= numbers[0]
        own = first_key * strides[0] + kv_head.to(gl.int64) * strides[1]
        if lists is not None:
            # Both are stored, one of them masked out: Triton 3.6 cannot compile these stores in a branch.
            is_part = (tile < DIVIDED) & (heads_of[3] > 1)
            end_of_part = gl.where(is_part, length, 0)
            length = gl.where(is_part, 0, length)
            of_head = ((sequence * heads_of[0] + kv_head) * DIVIDED + tile) * heads_of[1] + members[0]
            of_values = batch * heads_of[0] * DIVIDED * heads_of[1]
            part = parts_ptr + of_head.to(gl.int64) * (KEYS * OPTIONS.block_d) - tile * (KEYS * OPTIONS.block_d)
            store_keys(grad_key, part, OPTIONS.block_d, first, end_of_part, OPTIONS)
            part += of_values.to(gl.int64) * (KEYS * OPTIONS.block_d)
            store_keys(grad_value, part, OPTIONS.block_d, first, end_of_part, OPTIONS)
        store_keys(grad_key, grad_key_ptr + own, strides[0], first, length, OPTIONS)
        store_keys(grad_value, grad_value_ptr + own, strides[0], first, length, OPTIONS)
    return step, turn, clearings


@gluon.jit
def differentiate_items(work, hook_args, WARPGROUP: gl.constexpr, SCORE_HOOK: gl.constexpr, OPTIONS: gl.constexpr):
    """Compute the gradients of keys and values, and parts of those of queries: the part of a warpgroup."""
    step = 0
    turn = 0
    clearings = 0
    problem = work[5]
    if problem[6] is None:
        for wave in range(count_waves(problem)):
            item = item_of(wave, gl.program_id(0), gl.num_programs(0))
            step, turn, clearings = differentiate_item(
                wave, item, step, turn, clearings, work, hook_args, WARPGROUP, SCORE_HOOK, OPTIONS
            )
    else:
        wave = 0
        item = posted_item(wave, problem)
        while item < count_items(problem):
            step, turn, clearings = differentiate_item(
                wave, item, step, turn, clearings, work, hook_args, WARPGROUP, SCORE_HOOK, OPTIONS
            )
            wave += 1
            item = posted_item(wave, problem)


@gluon.jit(
    do_not_specialize=[
        "tail_start", "tiles_of_queries", "first_head", "batch", "tiles_per_head", "num_sinks", "window",
        "sliding_window", "list_rows", "rows_each", "heads_per_list", "hook_args",
    ]
)  # fmt: skip
def attention_backward_hopper(
    query_descriptor, grad_descriptor, key_descriptor, value_descriptor, key_tail_descriptor, value_tail_descriptor,
    tail_start, sums_descriptor, shift_descriptor, delta_descriptor, grad_key_ptr, grad_value_ptr, parts_ptr,
    turns_ptr, begins_ptr, tiles_of_queries, strides, sequences, heads_of, first_head, numbers, batch, tiles_per_head,
    num_sinks, window, sliding_window, entries, list_rows, rows_each, heads_per_list, hook_args,
    SCORE_HOOK: gl.constexpr, OPTIONS: gl.constexpr,
):  # fmt: skip
    """Compute gradients of packed queries, keys and values; see :mod:`.backward_launch`.

    It does so for ``heads_of[0]`` heads of keys from ``first_head`` on, and ``heads_of[1]`` heads of queries of each.
    With lists, ``heads_of[2]`` items, 1 or one for each head of queries, share each of the ``DIVIDED`` first tiles of
    keys of a head. If they are not 1, their gradients of keys and values are parts that :func:`add_parts` adds up.
    Gradients of keys and values of no sequence are left as they are. Those of queries are added up in FP32, unscaled,
    ``[heads of the launch, tiles_of_queries, ROWS * dim]`` in lines, through a descriptor. Of each head, tiles of all
    sequences follow each other, and begin at ``begins_ptr``, ``[batch]``. Turns are ``[heads, tiles_of_queries]``, 0 at
    first.
    """
    gl.static_assert((STAGES == 2) & (ADDERS == 2), "barriers of the hardware are pairs")
    ELEMENT: gl.constexpr = query_descriptor.dtype
    DIM: gl.constexpr = OPTIONS.block_d
    PAIR: gl.constexpr = OPTIONS.pair
    TILE: gl.constexpr = [WARPGROUPS, OPTIONS.group // PAIR, ROWS // OPTIONS.group, PAIR, 1, DIM]
    SQUARE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    query_memory = gl.allocate_shared_memory(ELEMENT, [STAGES, ROWS, 1, DIM], query_descriptor.layout)
    grad_memory = gl.allocate_shared_memory(ELEMENT, [STAGES, ROWS, 1, DIM], grad_descriptor.layout)
    shift_memory = gl.allocate_shared_memory(gl.float32, [STAGES, 1, ROWS], shift_descriptor.layout)
    delta_memory = gl.allocate_shared_memory(gl.float32, [STAGES, 1, ROWS], delta_descriptor.layout)
    key_memory = gl.allocate_shared_memory(ELEMENT, TILE, key_descriptor.layout)
    value_memory = gl.allocate_shared_memory(ELEMENT, TILE, value_descriptor.layout)
    # Without a hook it is not used, and the compiler leaves it out.
    weight_memory = gl.allocate_shared_memory(ELEMENT, [WARPGROUPS, ROWS, ROWS], SQUARE)
    score_memory = gl.allocate_shared_memory(ELEMENT, [BUFFERS * WARPGROUPS, ROWS, ROWS], SQUARE)
    sum_memory = gl.allocate_shared_memory(
        gl.float32, [WARPGROUPS, ROWS * DIM // WARPGROUPS // LINE, LINE], sums_descriptor.layout
    )
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    query_loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    grad_loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    keys_loaded = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    keys_freed = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    sums_empty = gl.allocate_shared_memory(gl.int64, [ADDERS, 1], BARRIER)
    cleared = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    for stage in gl.static_range(STAGES):
        mbarrier.init(query_loaded.index(stage), count=1)
        mbarrier.init(grad_loaded.index(stage), count=1)
    mbarrier.init(keys_loaded, count=1)
    mbarrier.init(keys_freed, count=WARPGROUPS)
    for adder in gl.static_range(ADDERS):
        mbarrier.init(sums_empty.index(adder), count=1)
    mbarrier.init(cleared, count=WARPGROUPS)
    lists: gl.constexpr = None
    queue: gl.constexpr = None
    if entries is not None:
        lists = (entries[0], entries[1], entries[2], list_rows, rows_each, heads_per_list)
        items = gl.allocate_shared_memory(gl.int32, [SLOTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        posted = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
        taken = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
        for slot in gl.static_range(SLOTS):
            mbarrier.init(posted.index(slot), count=1)
            mbarrier.init(taken.index(slot), count=WARPGROUPS + ADDERS)
        # The number behind those of all turns is the counter.
        queue = (turns_ptr + heads_of[0] * heads_of[1] * tiles_of_queries, items, posted, taken)
    fence_async_shared()
    synchronize()

    keys = (key_descriptor, key_tail_descriptor, tail_start)
    values = (value_descriptor, value_tail_descriptor, tail_start)
    # heads of keys, heads of queries for each, the first head of keys, items of a divided tile
    heads_of = (heads_of[0], heads_of[1], first_head, heads_of[2])
    problem = (sequences, heads_of, batch, tiles_per_head, (num_sinks, window, sliding_window), lists, queue)
    tiles = (query_memory, grad_memory, shift_memory, delta_memory, key_memory, value_memory)
    loading = (query_loaded, grad_loaded, keys_loaded, keys_freed)
    descriptors = (query_descriptor, grad_descriptor, shift_descriptor, delta_descriptor, keys, values)
    to_load = (descriptors, tiles, loading, begins_ptr, tiles_of_queries, problem)
    to_add = (sums_descriptor, sum_memory, sums_empty, turns_ptr, begins_ptr, tiles_of_queries, problem)
    of_rows = (shift_memory, delta_memory)
    buffers = (query_memory, grad_memory, key_memory, value_memory, weight_memory, score_memory, sum_memory, of_rows)
    barriers = (query_loaded, grad_loaded, sums_empty, cleared)
    pointers = (grad_key_ptr, grad_value_ptr, parts_ptr)
    work = (buffers, barriers, (keys_loaded, keys_freed), pointers, strides, problem, numbers)
    gl.warp_specialize(
        [
            (differentiate_items, (work, hook_args, 0, SCORE_HOOK, OPTIONS)),
            (differentiate_items, (work, hook_args, 1, SCORE_HOOK, OPTIONS)),
            (load_items, (to_load, OPTIONS)),
            (add_items, (to_add, 0, SCORE_HOOK is None, OPTIONS)),
            (add_items, (to_add, 1, SCORE_HOOK is None, OPTIONS)),
        ],
        [4, 1, 1, 1],
        [240, 24, 24, 24],
    )
