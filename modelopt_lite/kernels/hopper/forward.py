"""The attention forward for Hopper GPUs (compute capability 9.0), in Gluon: the same rules as the portable kernel's.

As many programs as multiprocessors take *items*, 128 or 192 queries of one head, from a common counter, longest first.
In a program, one warp loads (queries, then keys and values through the tensor memory accelerator into a ring of stages)
and two or three warpgroups compute 64 queries each, some in turns, so that one's matrix products run under the others'
softmax. In a warpgroup, the product of queries and keys of one tile is issued before that of weights and values of the
tile before; so a stage of the ring holds the keys of tile ``t`` and the values of tile ``t - 1``.

The structure is FlashAttention-3's (https://arxiv.org/abs/2407.08608). What differs is the selection of scores, the
phases (:func:`modelopt_lite.kernels.tiles.key_spans`), and ``OPTIONS.frozen``: masked tiles come first, and their row
maximum stays the reference of the others, as in :mod:`modelopt_lite.kernels.portable.forward`. An item whose sums
overflow is posted a second time, to be computed with the ordinary online softmax. A hot tile in which a plan's quick
hook keeps too many keys is computed a second time at once, while its keys are still there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..portable.forward import LN2, fill_gap
from ..tiles import (
    LOG2E,
    MAX_HALVINGS,
    join_groups,
    key_of_row,
    key_spans,
    scale_scores,
    select_scores,
    split_groups,
    weigh,
)
from .visits import HEADER

ROWS = tl.constexpr(64)
"""Queries of a warpgroup."""
SLOTS = tl.constexpr(2)
"""Items that are posted and not yet done."""
NUMBERS = tl.constexpr(32)
"""Numbers that are posted of an item; see :func:`post_item`."""
ONLINE = tl.constexpr(1 << 30)
"""Added to an item's number, of which there are fewer: compute it with the ordinary online softmax."""
NOTHING = tl.constexpr(-1)
"""Posted in place of an item's number; twice in a row, it is the end."""
synchronize = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed in Triton 3.7
PIECE = tl.constexpr(16)
"""Rows that are cleared at a time."""
IN_TURN = tl.constexpr(4)
"""Groups of more keys take so long to select from, and a head_dim of 64 so short to multiply, that waiting for other
warpgroups does not pay. Not to select where nothing is to be selected pays with them only."""

# A store that never happens, as sums are not negative: without it, the assembler lets the wait for the product of
# weights and values come before the softmax that is to run beside it.
PIN = tl.constexpr(
    "{ .reg .pred p; .reg .b32 a; mov.b32 a, 0; setp.lt.f32 p, $2, 0fBF800000; setp.lt.or.f32 p, $3, 0fBF800000, p; "
    "@p st.shared.b32 [a], $2; mov.b32 $0, 0; mov.b32 $1, 0; }"
)

# Stores that never happen, as lengths are not negative: without them, the assembler may round weights only when it has
# the turn that the other warpgroup waits for, and until then keeps them in registers that it has to spill others for.
# Operands are 32 registers out, the 32 with all 64 weights of a thread, and the length, once for each weight.
PIN_ROUNDED = tl.constexpr(
    "{ .reg .pred p; setp.lt.s32 p, $64, 0; "
    + " ".join(f"@p st.volatile.shared.v4.b32 [$64], {{${r}, ${r + 1}, ${r + 2}, ${r + 3}}};" for r in range(32, 64, 4))
    + " ".join(f"mov.b32 ${r}, 0;" for r in range(32))
    + " }"
)
PIN_ROUNDED_OPERANDS = tl.constexpr(",".join(["=r"] * 32 + ["r"] * 32 + ["r"] * 64))


def _keep_from(m: int) -> str:
    """Write PTX that makes the weights of a group of ``m`` that are below a bound 0, and counts the others.

    Operands are the weights and their number, then the weights as they were, and the bound. NaN is kept.
    """
    number, bound = f"${m}", f"${2 * m + 1}"
    lines = [f".reg .pred p; mov.f32 {number}, 0f00000000;"]
    for r in range(m):
        lines += [f"setp.geu.f32 p, ${m + 1 + r}, {bound};", f"selp.f32 ${r}, ${m + 1 + r}, 0f00000000, p;"]
        lines += [f"@p add.f32 {number}, {number}, 0f3F800000;"]
    return "{ " + " ".join(lines) + " }"


def _find_below(m: int) -> str:
    """Write PTX that finds the weights of a group of ``m`` that are below a bound.

    Operands are a mask for each two places, all ones in the lower half if the first weight is below the bound and in
    the upper half if the second one is; the sum of the masks; then the weights, and the bound. A weight is below if its
    difference with the bound has a sign. NaN has none.
    """
    pairs = m // 2
    lines = [".reg .f32 x, y; .reg .b32 first, second;", f"mov.b32 ${pairs}, 0;"]
    for pair in range(pairs):
        for difference, bits, place in (("x", "first", 2 * pair), ("y", "second", 2 * pair + 1)):
            lines += [f"sub.rn.f32 {difference}, ${pairs + 1 + place}, ${pairs + 1 + m};"]
            lines += [f"mov.b32 {bits}, {difference};"]
        lines += [f"prmt.b32 ${pair}, first, second, 0xFFBB;"]  # the sign of the last byte of each, twice
        lines += [f"add.s32 ${pairs}, ${pairs}, ${pair};"]
    return "{ " + " ".join(lines) + " }"


def _of_each(program: Callable[[int], str]) -> Any:
    """Make a constant of a program for every size of a group."""
    return tl.constexpr(tuple(program(m) if m in (2, 4, 8, 16) else "" for m in range(17)))


KEEP_FROM = _of_each(_keep_from)
KEEP_FROM_OPERANDS = _of_each(lambda m: ",".join(["=&f"] * (m + 1) + ["f"] * (m + 1)))
FIND_BELOW = _of_each(_find_below)
FIND_BELOW_OPERANDS = _of_each(lambda m: ",".join(["=&r"] * (m // 2 + 1) + ["f"] * (m + 1)))

# Two weights, rounded, or 0 where their half of a mask is all ones.
ROUND_KEPT = "{ .reg .b32 both, kept; cvt.rn.TYPE.f32 both, $2, $1; not.b32 kept, $3; and.b32 $0, both, kept; }"
ROUND_KEPT_BF16 = tl.constexpr(ROUND_KEPT.replace("TYPE", "bf16x2"))
ROUND_KEPT_FP16 = tl.constexpr(ROUND_KEPT.replace("TYPE", "f16x2"))

# 1 for all threads of a warp if any of them has a number above another.
ANY_ABOVE = tl.constexpr(
    "{ .reg .pred p; setp.gt.f32 p, $1, $2; vote.sync.any.pred p, p, 0xffffffff; selp.b32 $0, 1, 0, p; }"
)

# The same if the sum of masks has fewer halves of all ones than a number. Such a half counts as -1 if it is the lower
# one, and also borrows from the upper half, or as -65536. So the lower half of the sum is minus the number of lower
# ones, and the rest 65536 times the difference of both numbers.
ANY_FEWER = tl.constexpr(
    "{ .reg .pred p; .reg .b32 low, rest; bfe.s32 low, $1, 0, 16; sub.s32 rest, $1, low; shr.s32 rest, rest, 16; "
    "add.s32 rest, rest, low; add.s32 rest, rest, low; neg.s32 rest, rest; setp.lt.s32 p, rest, $2; "
    "vote.sync.any.pred p, p, 0xffffffff; selp.b32 $0, 1, 0, p; }"
)


@triton.jit(do_not_specialize=["batch", "total", "tail_start", "key_rows"])
def prepare(
    counter_ptr, out_ptr, lse_ptr, key_ptr, value_ptr, key_tail_ptr, value_tail_ptr, out_strides, key_strides,
    value_strides, starts_ptr, lengths_ptr, batch, total, heads, tail_start, key_rows, kv_heads, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Set the counter of items to 0, fill what belongs to no sequence, and copy the last keys and values.

    First come the programs that fill, ``ROWS`` tokens each, then those that copy, ``ROWS`` keys of one head each.
    """
    program = tl.program_id(0)
    if program == 0:
        tl.store(counter_ptr, 0)
    fillers = tl.cdiv(total, ROWS)
    if program < fillers:
        fill_gap(
            out_ptr, lse_ptr, None, out_strides, starts_ptr, lengths_ptr, batch, total, heads, program * ROWS, ROWS,
            OPTIONS,
        )  # fmt: skip
    elif key_tail_ptr is not None:
        head = (program - fillers) % kv_heads
        # [ROWS, 1]
        rows = (program - fillers) // kv_heads * ROWS + tl.arange(0, ROWS)[:, None]
        count = key_rows - tail_start
        copy_rows(key_ptr, key_tail_ptr, key_strides, tail_start, rows, count, head, kv_heads, OPTIONS.block_d)
        if value_tail_ptr is not None:
            copy_rows(
                value_ptr, value_tail_ptr, value_strides, tail_start, rows, count, head, kv_heads, OPTIONS.block_dv
            )


@triton.jit
def copy_rows(source_ptr, tail_ptr, strides, tail_start, rows, count, head, heads, BLOCK_D: tl.constexpr):
    """Copy one head of rows ``[ROWS, 1]`` of a tail, of which there are ``count``."""
    offsets_d = tl.arange(0, BLOCK_D)[None, :]
    mask = rows < count
    far_rows = tail_start + rows.to(tl.int64)
    tile = tl.load(source_ptr + head.to(tl.int64) * strides[1] + far_rows * strides[0] + offsets_d, mask=mask)
    tl.store(tail_ptr + (rows * heads + head) * BLOCK_D + offsets_d, tile, mask=mask)


@gluon.jit
def read_number(memory):
    """Read one number from shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(memory.load(layout), 0)


@gluon.jit
def write_number(memory, number):
    """Write one number to shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    memory.store(gl.full([1], 0, gl.int32, layout) + number)


@gluon.jit
def read_numbers(memory, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """Read numbers that lie beside each other in shared memory, as a tuple."""
    numbers = ()
    for place in gl.static_range(COUNT):
        numbers = numbers + (read_number(memory.slice(FIRST + place, 1)),)
    return numbers


@gluon.jit
def write_numbers(memory, FIRST: gl.constexpr, numbers):
    """Write a tuple of numbers beside each other in shared memory."""
    for place in gl.static_range(len(numbers)):
        write_number(memory.slice(FIRST + place, 1), numbers[place])


@gluon.jit
def find_rows(item, problem, OPTIONS: gl.constexpr):
    """Return the first row, the sequence and the head of an item of a call without lists of key blocks.

    Items come in waves of heads whose keys and values fit into the L2 cache; in a wave, the longest tiles first.
    """
    _, heads_of, batch, tiles_per_head, heads_per_wave, _, _ = problem
    heads = heads_of[0]
    wave = item // (tiles_per_head * heads_per_wave)
    item -= wave * tiles_per_head * heads_per_wave
    heads_in_wave = gl.minimum(heads_per_wave, batch * heads - wave * heads_per_wave)
    row_start = (tiles_per_head - 1 - item // heads_in_wave) * OPTIONS.block_m
    head = wave * heads_per_wave + item % heads_in_wave
    return row_start, head // heads, head % heads


@gluon.jit
def find_keys(row_start, sequence, online, problem, SPARSE: gl.constexpr, OPTIONS: gl.constexpr):
    """Return which tiles an item's queries may see, in a call without lists of key blocks.

    Returns:
        ``(ranges, tiles, masked, spared)``: where tiles lie, for :func:`locate_tile`; how many there are, and how many
        of these, the first ones, are masked; and for each warpgroup how many of the masked ones it needs no mask for.
    """
    sequences, _, _, _, _, distances, _ = problem
    num_sinks, window, sliding_window = distances
    query_length = gl.load(sequences[1] + sequence).to(gl.int32)
    length = gl.load(sequences[3] + sequence).to(gl.int32)
    first_position = length - query_length + row_start
    last_position = length - query_length + gl.minimum(row_start + OPTIONS.block_m, query_length) - 1
    if not OPTIONS.sparse_decode:
        window = gl.where(query_length == 1, length, window)
    rules = (first_position, length, num_sinks, window, sliding_window)
    spans = key_spans(first_position, last_position, rules, SPARSE, OPTIONS)
    keys_begin, hot_begin, band_begin, band_end, _, _, keys_end = spans
    last = gl.maximum(keys_begin, (keys_end - 1) // OPTIONS.block_n * OPTIONS.block_n)
    if online:
        hot_begin = last
    hot_begin = gl.minimum(gl.maximum(hot_begin, keys_begin), last)
    band_begin = gl.minimum(gl.maximum(band_begin, hot_begin), last)
    band_end = gl.minimum(gl.maximum(band_end, band_begin), last)
    masked = 1 + (hot_begin - keys_begin + band_end - band_begin) // OPTIONS.block_n
    hot = (band_begin - hot_begin + last - band_end) // OPTIONS.block_n
    if OPTIONS.keeps_nothing:
        hot = hot * 0
    spared = (masked * 0,)
    for w in gl.static_range(1, OPTIONS.block_m // ROWS):
        fewer = masked * 0
        if OPTIONS.causal or SPARSE:
            # Of the band, which comes backwards, this warpgroup's queries need less.
            begin = first_position + w * ROWS
            if SPARSE:
                begin -= gl.maximum(window - 1, 0)
            begin = begin // OPTIONS.block_n * OPTIONS.block_n
            fewer = (gl.minimum(gl.maximum(begin, band_begin), band_end) - band_begin) // OPTIONS.block_n
        spared = spared + (fewer,)
    return (keys_begin, hot_begin, band_begin, band_end, last), masked + hot, masked, spared


@gluon.jit
def locate_tile(index, ranges, masked, OPTIONS: gl.constexpr):
    """Return the first key of an item's tile.

    The last keys come first, then what is before the hot tiles, then the band backwards, then the hot tiles.
    """
    keys_begin, hot_begin, band_begin, band_end, last = ranges
    before_hot = keys_begin + (index - 1) * OPTIONS.block_n
    in_band = band_end - OPTIONS.block_n - (before_hot - hot_begin)
    hot = hot_begin + (index - masked) * OPTIONS.block_n
    hot += gl.where(hot >= band_begin, band_end - band_begin, 0)
    first = gl.where(index >= masked, hot, gl.where(before_hot < hot_begin, before_hot, in_band))
    return gl.where(index == 0, last, first)


@gluon.jit
def load_rows(source, row, head, barrier, memory, OPTIONS: gl.constexpr):
    """Have a tile of keys or values loaded, deinterleaved.

    The source is ``(descriptor, descriptor of the tail, the tail's first row)``, and that row is a multiple of the
    group; see :func:`modelopt_lite.kernels.hopper.forward_launch.tail_of`.
    """
    descriptor, tail, tail_start = source
    GROUP: gl.constexpr = OPTIONS.group
    PAIR: gl.constexpr = OPTIONS.pair
    pair = row % GROUP // PAIR
    if GROUP == 1:
        tma.async_copy_global_to_shared(descriptor, [0, row, 0, head, 0], barrier, memory)
    elif row < tail_start:
        tma.async_copy_global_to_shared(descriptor, [pair, row // GROUP, row % PAIR, head, 0], barrier, memory)
    else:
        group = (row - tail_start) // GROUP
        tma.async_copy_global_to_shared(tail, [pair, group, row % PAIR, head, 0], barrier, memory)


@gluon.jit
def next_item(counter_ptr, problem, OPTIONS: gl.constexpr):
    """Take items from the counter until one has queries; ``NOTHING`` if there is none any more."""
    sequences, heads_of, batch, tiles_per_head, _, _, lists = problem
    items = batch * heads_of[0] * tiles_per_head
    if lists is not None:
        items = heads_of[0] * lists[2]
    item = gl.to_tensor(NOTHING)
    candidate = gl.atomic_add(counter_ptr, 1, sem="relaxed")
    looking = candidate < items
    while looking:
        number = candidate
        if lists is not None:
            number = gl.load(lists[1] + candidate)
            exists = gl.load(visits_of(number, lists)[0] + 2) > 0
        else:
            found = find_rows(candidate, problem, OPTIONS)
            exists = found[0] < gl.load(sequences[1] + found[1]).to(gl.int32)
        if exists:
            item = number
            looking = False
        else:
            candidate = gl.atomic_add(counter_ptr, 1, sem="relaxed")
            looking = candidate < items
    return item


@gluon.jit
def visits_of(number, lists):
    """Return where an item's :class:`~modelopt_lite.kernels.hopper.visits_launch.Visits` are, and its head."""
    visits_ptr, _, rows, stride, heads_per_list = lists
    head = number // rows
    row = head // heads_per_list * rows + number % rows
    return visits_ptr + row.to(gl.int64) * stride, head


@gluon.jit
def post_item(item, memory, problem, SPARSE: gl.constexpr, OPTIONS: gl.constexpr):
    """Find what an item is, and write it to shared memory: the item itself, then what is read one by one below.

    Returns:
        The first row of its queries, and its head.
    """
    sequences, _, _, _, _, _, lists = problem
    number = item % ONLINE
    if lists is None:
        row_start, sequence, head = find_rows(number, problem, OPTIONS)
        ranges, tiles, masked, spared = find_keys(row_start, sequence, item >= ONLINE, problem, SPARSE, OPTIONS)
    else:
        visits, head = visits_of(number, lists)
        sequence, row_start = gl.load(visits), gl.load(visits + 1)
        tiles, masked = gl.load(visits + 2), gl.load(visits + 3)
        spared = (masked * 0, gl.where(item >= ONLINE, 0, gl.load(visits + 4)))
        masked = gl.where(item >= ONLINE, tiles, masked)
        ranges = (number,)
    first_query = gl.load(sequences[0] + sequence).to(gl.int32)
    query_length = gl.load(sequences[1] + sequence).to(gl.int32)
    first_key = gl.load(sequences[2] + sequence).to(gl.int32)
    length = gl.load(sequences[3] + sequence).to(gl.int32)
    write_numbers(memory, 1, (row_start, head, first_query, query_length, length, tiles, masked, first_key))
    write_numbers(memory, 9, spared)
    write_numbers(memory, 12, ranges)
    return first_query + row_start, head


@gluon.jit
def announce(post, work, SPARSE: gl.constexpr, OPTIONS: gl.constexpr):
    """Post the next item and have its queries loaded, once what was in its place is done."""
    descriptors, buffers, mail, barriers, counter_ptr, problem = work
    query_descriptor, query_memory = descriptors[0], buffers[0]
    posted_items, _, overflows, _ = mail
    posted, done, query_loaded, _, _, _, _ = barriers
    WARPGROUPS: gl.constexpr = OPTIONS.block_m // ROWS
    slot = post % SLOTS
    memory = posted_items.index(slot)
    mbarrier.wait(done.index(slot), (post // SLOTS & 1) ^ 1)
    ROW: gl.constexpr = gl.BlockedLayout([ROWS // 32], [32], [1], [0])
    overflowed = 0
    before = gl.to_tensor(NOTHING)
    if post >= SLOTS:
        before = read_number(memory.slice(0, 1))
    if before >= 0:
        for w in gl.static_range(WARPGROUPS):
            overflowed |= gl.max(overflows.index(WARPGROUPS * slot + w).load(ROW), 0)
    if overflowed != 0:
        item = before + ONLINE
    else:
        item = next_item(counter_ptr, problem, OPTIONS)
    if item >= 0:
        first_row, head = post_item(item, memory, problem, SPARSE, OPTIONS)
        mbarrier.expect(query_loaded.index(slot), OPTIONS.block_m * OPTIONS.block_d * 2)
        for w in gl.static_range(WARPGROUPS):
            tma.async_copy_global_to_shared(
                query_descriptor, [first_row + w * ROWS, head, 0], query_loaded.index(slot),
                query_memory.index(WARPGROUPS * slot + w),
            )  # fmt: skip
    write_number(memory.slice(0, 1), item)
    mbarrier.arrive(posted.index(slot), count=1)


@gluon.jit
def find_tile(index, place, masked, problem, OPTIONS: gl.constexpr):
    """Return the first key of an item's tile, plus ``UNLISTED`` if it is not listed."""
    if problem[6] is None:
        tile = locate_tile(index, place, masked, OPTIONS)
    else:
        tile = gl.load(place + HEADER + index)
    return tile


@gluon.jit
def load_items(work, SPARSE: gl.constexpr, OPTIONS: gl.constexpr, STAGES: gl.constexpr):
    """Post items and load what they need: the part of one warp."""
    descriptors, buffers, mail, barriers, _, problem = work
    _, keys, values = descriptors
    _, key_memory, value_memory = buffers
    posted_items, tiles_of_stages, _, _ = mail
    _, _, _, loaded, freed, _, _ = barriers
    KEY_BYTES: gl.constexpr = OPTIONS.block_n * OPTIONS.block_d * 2
    VALUE_BYTES: gl.constexpr = OPTIONS.block_n * OPTIONS.block_dv * 2

    step = 0
    post = 0
    idle = 0
    announce(0, work, SPARSE, OPTIONS)
    while idle < 2:
        memory = posted_items.index(post % SLOTS)
        item = read_number(memory.slice(0, 1))
        idle = gl.where(item < 0, idle + 1, 0)
        row = 0
        kv_head = 0
        if item >= 0:
            tiles, masked, first_key = read_numbers(memory, 6, 3)
            kv_head = read_number(memory.slice(2, 1)) // problem[1][1]
            if problem[6] is None:
                place = read_numbers(memory, 12, 5)
            else:
                place = visits_of(item % ONLINE, problem[6])[0]
            # keys of the first tile, keys and values of two tiles, values of the last tile
            tile = find_tile(0, place, masked, problem, OPTIONS)
            row = first_key + tile // OPTIONS.block_n * OPTIONS.block_n
            stage = step % STAGES
            mbarrier.wait(freed.index(stage), (step // STAGES & 1) ^ 1)
            write_number(tiles_of_stages.index(stage), tile)
            mbarrier.expect(loaded.index(stage), KEY_BYTES)
            load_rows(keys, row, kv_head, loaded.index(stage), key_memory.index(stage), OPTIONS)
            step += 1
            for index in range(1, tiles):
                stage = step % STAGES
                row_before = row
                tile = find_tile(index, place, masked, problem, OPTIONS)
                row = first_key + tile // OPTIONS.block_n * OPTIONS.block_n
                mbarrier.wait(freed.index(stage), (step // STAGES & 1) ^ 1)
                write_number(tiles_of_stages.index(stage), tile)
                mbarrier.expect(loaded.index(stage), KEY_BYTES + VALUE_BYTES)
                load_rows(keys, row, kv_head, loaded.index(stage), key_memory.index(stage), OPTIONS)
                load_rows(values, row_before, kv_head, loaded.index(stage), value_memory.index(stage), OPTIONS)
                step += 1
        # Here, while there is still something to compute.
        if idle < 2:
            announce(post + 1, work, SPARSE, OPTIONS)
        if item >= 0:
            stage = step % STAGES
            mbarrier.wait(freed.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(loaded.index(stage), VALUE_BYTES)
            load_rows(values, row, kv_head, loaded.index(stage), value_memory.index(stage), OPTIONS)
            step += 1
        post += 1


@gluon.jit
def sum_in_thread(tile, OPTIONS: gl.constexpr):
    """Sum what a thread has of each row of one place's scores, without a shuffle: ``[ROWS, 4]``."""
    BESIDE: gl.constexpr = 2 // OPTIONS.pair  # neighbouring columns that a thread has
    return gl.sum(gl.sum(tile.reshape([ROWS, tile.shape[1] // (4 * BESIDE), 4, BESIDE]), 3), 1)


@gluon.jit
def keep_from(weights, bound, OPTIONS: gl.constexpr):
    """Return a group's weights, 0 where they are below a bound, and how many are not."""
    found = gl.inline_asm_elementwise(
        KEEP_FROM[OPTIONS.group], KEEP_FROM_OPERANDS[OPTIONS.group], weights + (bound,),
        dtype=(gl.float32,) * (OPTIONS.group + 1), is_pure=True, pack=1,
    )  # fmt: skip
    return found[: OPTIONS.group], found[OPTIONS.group]


@gluon.jit
def find_below(weights, bound, OPTIONS: gl.constexpr):
    """Return masks of a group's weights that are below a bound, for two places each, and the sum of the masks."""
    PAIRS: gl.constexpr = OPTIONS.group // 2
    found = gl.inline_asm_elementwise(
        FIND_BELOW[OPTIONS.group], FIND_BELOW_OPERANDS[OPTIONS.group], weights + (bound,),
        dtype=(gl.int32,) * (PAIRS + 1), is_pure=True, pack=1,
    )  # fmt: skip
    return found[:PAIRS], found[PAIRS]


@gluon.jit
def no_masks(tile, OPTIONS: gl.constexpr):
    """Return masks by which all weights of a tile stay."""
    mask = split_groups(tile, OPTIONS)[0].to(gl.int32) * 0
    masks = ()
    for _ in gl.static_range(OPTIONS.group // 2):
        masks = masks + (mask,)
    return masks


@gluon.jit
def round_weights(weights, dtype: gl.constexpr, OPTIONS: gl.constexpr):
    """Round a tile of weights, the first of a tuple; masks that may follow it say which become 0."""
    tile = weights[0]
    if len(weights) == 1:
        result = tile.to(dtype)
    else:
        parts = split_groups(tile, OPTIONS)
        ROUND: gl.constexpr = ROUND_KEPT_BF16 if dtype == gl.bfloat16 else ROUND_KEPT_FP16
        rounded = ()
        for pair in gl.static_range(len(parts) // 2):
            operands = [parts[2 * pair], parts[2 * pair + 1], weights[1 + pair]]
            both = gl.inline_asm_elementwise(ROUND, "=r,f,f,r", operands, dtype=gl.int32, is_pure=True, pack=1)
            for upper in gl.static_range(2):
                rounded = rounded + ((both >> 16 * upper).to(gl.int16).to(dtype, bitcast=True),)
        result = gl.convert_layout(join_groups(rounded, OPTIONS), tile.type.layout, assert_trivial=True)
    return result


@gluon.jit
def is_undecided(counted, memory, OPTIONS: gl.constexpr):
    """Say whether more weights of any group of a warpgroup's rows are kept than ``OPTIONS.keeps_top``.

    ``counted`` is of each group the number of weights that are kept, or the sum of the masks of the others. All wait
    for the answer, and a reduction would need five shuffles and two rounds through shared memory. Callers take turns
    with two places in memory, so that one is read by all before it is written again.
    """
    # [warps * lanes]
    numbers = gl.sum(sum_in_thread(counted, OPTIONS).reshape([ROWS // 16, 2, 8, 4]), 1).reshape([ROWS // 16 * 32])
    GROUPS: gl.constexpr = OPTIONS.block_n // OPTIONS.group // 2  # of a thread
    if counted.dtype == gl.float32:
        operands = [numbers, gl.to_tensor(1.0 * GROUPS * OPTIONS.keeps_top)]
        flags = gl.inline_asm_elementwise(ANY_ABOVE, "=r,f,f", operands, dtype=gl.int32, is_pure=False, pack=1)
    else:
        operands = [numbers, gl.to_tensor(GROUPS * (OPTIONS.group - OPTIONS.keeps_top))]
        flags = gl.inline_asm_elementwise(ANY_FEWER, "=r,r,r", operands, dtype=gl.int32, is_pure=False, pack=1)
    memory.store(flags)
    found = 0
    for warp in gl.static_range(ROWS // 16):
        found |= read_number(memory.slice(32 * warp, 1))
    return found != 0


@gluon.jit
def take_turn(turn, step, WARPGROUP: gl.constexpr):
    """Wait for the warpgroup before to have issued its matrix products."""
    if turn is not None:
        mbarrier.wait(turn.index(WARPGROUP), step & 1)


@gluon.jit
def pass_turn(turn, WARPGROUP: gl.constexpr, OPTIONS: gl.constexpr):
    """Let the next warpgroup issue its matrix products."""
    WARPGROUPS: gl.constexpr = OPTIONS.block_m // ROWS
    if turn is not None:
        mbarrier.arrive(turn.index((WARPGROUP + 1) % WARPGROUPS), count=1)


@gluon.jit
def spread(numbers, tile):
    """Bring a number a row to where the rows of a tile are."""
    return gl.convert_layout(numbers, gl.SliceLayout(1, tile.type.layout))[:, None]


@gluon.jit
def update_softmax(
    scores, tile, positions, running_max, rules, numbers, hook_args, HOOK: gl.constexpr, QUICK: gl.constexpr,
    OPTIONS: gl.constexpr, MASKED: gl.constexpr, FROZEN: gl.constexpr, MASKS: gl.constexpr = False,
):  # fmt: skip
    """Take products of queries and keys of a tile, as :func:`find_tile` returns it, into the softmax.

    Returns:
        A tuple of the weights, laid out as the scores, and if ``MASKS``, the masks by which :func:`round_weights` drops
        some of them; what a thread has of their sums, which is not valid then; the factor for what was summed before,
        and the new maximum; and in a tuple, what :func:`is_undecided` is to look at if ``HOOK`` is the ``QUICK`` one.
        If ``FROZEN``, the maximum stays and the factor is 1.
    """
    SCORES: gl.constexpr = scores.type.layout
    scores, to_log2 = scale_scores(scores, numbers, OPTIONS)
    first = tile // OPTIONS.block_n * OPTIONS.block_n
    part = split_groups(scores, OPTIONS)[0]  # for its layout
    PART: gl.constexpr = part.type.layout
    groups = first + OPTIONS.group * gl.arange(0, part.shape[1], gl.SliceLayout(0, PART))[None, :]
    q_pos = spread(positions, part)
    SCORE_HOOK: gl.constexpr = None if QUICK else HOOK
    parts, keep, largest = select_scores(
        scores, q_pos, groups, rules, hook_args, SCORE_HOOK, OPTIONS, MASKED, tile % OPTIONS.block_n
    )  # fmt: skip
    shift = running_max
    rescale = 1.0
    if not FROZEN:
        tile_max = gl.convert_layout(gl.max(largest, 1), gl.SliceLayout(1, SCORES)) * to_log2
        new_max = gl.maximum(running_max, tile_max)
        shift = new_max
        if MASKED or not OPTIONS.keeps_group_max:
            # Nothing kept so far: any finite number does.
            shift = gl.where(new_max == float("-inf"), 0.0, new_max)
        rescale = gl.exp2(running_max - shift)
        running_max = new_max
    weights = ()
    for r in gl.static_range(len(parts)):
        if QUICK:
            # Rounded once and everywhere alike, or the order of scores would not be that of weights.
            weight = gl.exp2(gl.fma(parts[r], to_log2, spread(-shift, parts[r])))
        else:
            weight = gl.exp2(parts[r] * to_log2 - spread(shift, parts[r]))
        if len(keep) > 0:
            weight = weigh(weight, keep[r])
        weights = weights + (weight,)
    counted = ()
    masks = ()
    if QUICK:
        k_pos = ()
        for r in gl.static_range(len(parts)):
            k_pos = k_pos + (groups + r,)
        bound = HOOK(weights, q_pos, k_pos, hook_args)
        if MASKS:
            masks, number = find_below(weights, bound, OPTIONS)
        else:
            weights, number = keep_from(weights, bound, OPTIONS)
        counted = (number,)
    # Summed place by place before they are joined, which is faster than in the order of columns; and in halves, as the
    # flags of a half are of one kind.
    sums = weights
    for _ in gl.static_range(MAX_HALVINGS):
        if len(sums) > 1:
            halves = ()
            for r in gl.static_range(len(sums) // 2):
                halves = halves + (sums[r] + sums[len(sums) // 2 + r],)
            sums = halves
    weights = gl.convert_layout(join_groups(weights, OPTIONS), SCORES, assert_trivial=True)
    return (weights,) + masks, sum_in_thread(sums[0], OPTIONS), rescale, running_max, counted


@gluon.jit
def add_sum(partial_sum, tile_sum, rescale, ones_memory, FROZEN: gl.constexpr):
    """Add a tile's sum of weights, unless they are summed later, by a product with ones."""
    if not FROZEN:
        partial_sum = partial_sum * spread(rescale, partial_sum)
    if ones_memory is None:
        partial_sum += gl.convert_layout(tile_sum, partial_sum.type.layout, assert_trivial=True)
    return partial_sum


@gluon.jit
def advance(
    step, positions, query, weights, accumulator, running_max, partial_sum, rules, numbers, hook_args, key_memory,
    value_memory, ones_memory, tiles_of_stages, undecided_memory, loaded, freed, turn, WARPGROUP: gl.constexpr,
    SCORE_HOOK: gl.constexpr, QUICK_HOOK: gl.constexpr, OPTIONS: gl.constexpr, STAGES: gl.constexpr,
    MASKED: gl.constexpr, FROZEN: gl.constexpr,
):  # fmt: skip
    """Multiply queries with the keys of one tile, weights with the values of the tile before, and take the softmax."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OPTIONS.block_n, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OPTIONS.block_dv, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    stage = step % STAGES
    mbarrier.wait(loaded.index(stage), step // STAGES & 1)
    tile = read_number(tiles_of_stages.index(stage))
    # Here, behind a loop that waits, rounding cannot move to where the registers of the product before are in use.
    weights = gl.convert_layout(round_weights(weights, query.dtype, OPTIONS), OPERAND, assert_trivial=True)
    if OPTIONS.block_n == 128:
        gl.inline_asm_elementwise(
            PIN_ROUNDED, PIN_ROUNDED_OPERANDS, [weights, rules[1]], dtype=query.dtype, is_pure=False, pack=64
        )
    take_turn(turn, step, WARPGROUP)
    keys = key_memory.index(stage).reshape([OPTIONS.block_n, OPTIONS.block_d]).permute([1, 0])
    values = value_memory.index(stage).reshape([OPTIONS.block_n, OPTIONS.block_dv])
    zeros = gl.full([ROWS, OPTIONS.block_n], 0, gl.float32, SCORES)
    scores = warpgroup_mma(query, keys, zeros, use_acc=False, is_async=True)
    BEHIND: gl.constexpr = 1 if ones_memory is None else 2  # products that are issued after that of keys
    if ones_memory is not None:
        partial_sum = warpgroup_mma(weights, ones_memory.permute([1, 0]), partial_sum, is_async=True)
    accumulator = warpgroup_mma(weights, values, accumulator, is_async=True)
    pass_turn(turn, WARPGROUP, OPTIONS)
    scores = warpgroup_mma_wait(BEHIND, deps=[scores])
    QUICK: gl.constexpr = QUICK_HOOK is not None and not MASKED
    HOOK: gl.constexpr = QUICK_HOOK if QUICK else SCORE_HOOK
    MASKS: gl.constexpr = QUICK and ones_memory is not None
    weights, tile_sum, rescale, new_max, counted = update_softmax(
        scores, tile, positions, running_max, rules, numbers, hook_args, HOOK, QUICK, OPTIONS, MASKED, FROZEN, MASKS
    )  # fmt: skip
    if QUICK:
        again = is_undecided(counted[0], undecided_memory.index(2 * WARPGROUP + step % 2), OPTIONS)
    if ones_memory is None:
        new_sum = add_sum(partial_sum, tile_sum, rescale, ones_memory, FROZEN)
        gl.inline_asm_elementwise(PIN, "=r,=r,r,r", [new_sum], dtype=gl.int32, is_pure=False, pack=2)
        accumulator = warpgroup_mma_wait(0, deps=[accumulator])
    else:
        # Nothing depends on all weights, so what pins the order is a loop: waiting for what has long been there.
        mbarrier.wait(loaded.index(stage), step // STAGES & 1)
        accumulator, partial_sum = warpgroup_mma_wait(0, deps=[accumulator, partial_sum])
        new_sum = add_sum(partial_sum, tile_sum, rescale, ones_memory, FROZEN)
    if QUICK:  # noqa: SIM102 - conditions at compile time and at run time do not mix
        if again:
            # As rare as equal scores: not worth registers for scores that have become weights.
            scores = warpgroup_mma(query, keys, zeros, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])
            weights, tile_sum, rescale, new_max, _ = update_softmax(
                scores, tile, positions, running_max, rules, numbers, hook_args, SCORE_HOOK, False, OPTIONS, MASKED,
                FROZEN,
            )  # fmt: skip
            new_sum = add_sum(partial_sum, tile_sum, rescale, ones_memory, FROZEN)
            if MASKS:
                weights = weights + no_masks(scores, OPTIONS)
    mbarrier.arrive(freed.index(stage), count=1)
    if not FROZEN:
        accumulator = accumulator * spread(rescale, accumulator)
    return weights, accumulator, new_max, new_sum


@gluon.jit
def clear_rows(memory, first, length, WARPGROUP: gl.constexpr, OPTIONS: gl.constexpr):
    """Clear this warpgroup's share of a tile of values where it reaches past the sequence.

    What lies there may be anything, and zero times infinity is not zero.
    """
    BLOCK_N: gl.constexpr = OPTIONS.block_n
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    tile = memory.reshape([BLOCK_N, OPTIONS.block_dv])
    for piece in gl.static_range(WARPGROUP, BLOCK_N // PIECE, OPTIONS.block_m // ROWS):
        rows = piece * PIECE + gl.arange(0, PIECE, gl.SliceLayout(1, LAYOUT))
        keys = first + key_of_row(rows, BLOCK_N, OPTIONS.group, OPTIONS.pair)
        part = tile.slice(piece * PIECE, PIECE, 0)
        values = part.load(LAYOUT)
        part.store(gl.where((keys < length)[:, None], values, gl.zeros_like(values)))
    fence_async_shared()


@gluon.jit
def store_item(
    accumulator, partial_sum, running_max, was_frozen, rows, row_start, query, overflows, pointers, out_strides, place,
    heads_of, OPTIONS: gl.constexpr,
):  # fmt: skip
    """Store one warpgroup's results of an item, and whether it overflowed; see :func:`attend_item`.

    Args:
        accumulator: the weighted sum of values.
        partial_sum: parts of the sums of weights, ``[ROWS, ...]``.
        running_max: what weights are relative to, in log2 space.
        was_frozen: whether any tile left it as it was.
        rows: the queries' rows in their sequence, whether or not they exist.
        row_start: the first of them.
        query: where the queries are in shared memory, which are not needed any more.
        overflows: where to write which queries overflowed.
        pointers: to the output, the LSE or None, and the sinks' logits.
        out_strides: the output's.
        place: ``(head, first_query, query_length)``.
        heads_of: how many query heads there are, and how many share keys.
        OPTIONS: the kernel's.
    """
    ROW: gl.constexpr = rows.type.layout
    # whole lines, for what is neither a factor nor a product
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // OPTIONS.block_dv, OPTIONS.block_dv // 8], [4, 1], [1, 0])
    out_ptr, lse_ptr, _ = pointers
    head, first_query, query_length = place
    # [ROWS]
    total_weight = gl.convert_layout(gl.sum(partial_sum, 1), ROW)
    stored = (rows >= 0) & (rows < query_length)
    overflowed = gl.full([ROWS], 0, gl.int32, ROW)
    if OPTIONS.frozen:
        # Zero times a finite number is zero.
        suspicious = gl.convert_layout(gl.sum(accumulator * 0.0, 1), ROW) + total_weight * 0.0 != 0.0
        # Where all tiles were masked there is no other way to compute it.
        overflowed = (suspicious & stored & was_frozen).to(gl.int32)
    overflows.store(overflowed)
    inverse = gl.where(total_weight == 0.0, 0.0, 1.0 / total_weight)
    out_rows = first_query.to(gl.int64) + rows
    if lse_ptr is not None:
        lse = (running_max + gl.log2(total_weight)) * LN2
        gl.store(lse_ptr + out_rows * heads_of[0] + head, lse, mask=stored)

    # Through shared memory, in the place of the queries, to be written in whole lines.
    query.store((accumulator * spread(inverse, accumulator)).to(query.dtype))
    result = query.load(LINES)
    fence_async_shared()  # before the next queries are loaded there
    rows = row_start + gl.arange(0, ROWS, gl.SliceLayout(1, LINES))
    out_rows = first_query.to(gl.int64) + rows
    offsets_d = gl.arange(0, OPTIONS.block_dv, gl.SliceLayout(0, LINES))
    out_pointers = (
        out_ptr + head.to(gl.int64) * out_strides[1] + (out_rows[:, None] * out_strides[0] + offsets_d[None, :])
    )
    gl.store(out_pointers, result, mask=((rows >= 0) & (rows < query_length))[:, None])


@gluon.jit
def attend_item(
    slot, step, clearings, query_memory, key_memory, value_memory, ones_memory, mail, overflows, barriers, pointers,
    out_strides, problem, numbers, hook_args, WARPGROUP: gl.constexpr, SCORE_HOOK: gl.constexpr,
    QUICK_HOOK: gl.constexpr, OPTIONS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Compute one warpgroup's queries of the item that is posted in a slot.

    What is written to ``overflows`` is not 0 for queries whose sums overflowed: then the output is not valid.

    Returns:
        How often this warpgroup has cleared rows, and the next step.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OPTIONS.block_n, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OPTIONS.block_dv, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    _, _, _, loaded, freed, turn, cleared = barriers
    sink_logits_ptr = pointers[2]
    heads_of, distances = problem[1], problem[5]
    posted_items, tiles_of_stages, _, undecided_memory = mail
    query = query_memory.reshape([ROWS, OPTIONS.block_d])
    memory = posted_items.index(slot)
    row_start, head, first_query, query_length, length, tiles, masked = read_numbers(memory, 1, 7)
    spared = read_number(memory.slice(9 + WARPGROUP, 1))
    row_start += WARPGROUP * ROWS
    num_sinks, window, sliding_window = distances
    if not OPTIONS.sparse_decode:
        window = gl.where(query_length == 1, length, window)
    rules = (length - query_length, length, num_sinks, window, sliding_window)
    # [ROWS]; what lies before the first row or past the last one counts as that one and is not stored.
    rows = row_start + gl.arange(0, ROWS, ROW)
    positions = length - query_length + gl.maximum(gl.minimum(rows, query_length - 1), 0)
    if QUICK_HOOK is not None:  # noqa: SIM102 - conditions at compile time and at run time do not mix
        if (row_start + ROWS > query_length) | (row_start < 0):
            LINES: gl.constexpr = gl.BlockedLayout(
                [1, 8], [256 // OPTIONS.block_dv, OPTIONS.block_dv // 8], [4, 1], [1, 0]
            )
            # Around a sequence's queries there are often zeros, whose scores are all equal, and never sure.
            line = row_start + gl.arange(0, ROWS, gl.SliceLayout(1, LINES))
            exist = (line >= 0) & (line < query_length)
            ones = gl.full([ROWS, OPTIONS.block_d], 1, query.dtype, LINES)
            query.store(gl.where(exist[:, None], query.load(LINES), ones))
            fence_async_shared()
            synchronize()

    accumulator = gl.full([ROWS, OPTIONS.block_dv], 0, gl.float32, OUTPUT)
    running_max = gl.full([ROWS], float("-inf"), gl.float32, ROW)
    zeros = gl.full([ROWS, OPTIONS.block_n], 0, gl.float32, SCORES)
    # [ROWS, 4], or [ROWS, 8] of which the first column is not 0; the sum of a row is that of all its columns.
    if ones_memory is None:
        partial_sum = sum_in_thread(split_groups(zeros, OPTIONS)[0], OPTIONS)
    else:
        partial_sum = gl.full([ROWS, 8], 0, gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16]))
    if sink_logits_ptr is not None:
        running_max = gl.full([ROWS], 0, gl.float32, ROW) + gl.load(sink_logits_ptr + head).to(gl.float32) * LOG2E
        columns = gl.arange(0, partial_sum.shape[1], gl.SliceLayout(0, partial_sum.type.layout))
        partial_sum += gl.where(columns == 0, 1.0, 0.0)[None, :]

    stage = step % STAGES
    mbarrier.wait(loaded.index(stage), step // STAGES & 1)
    tile = read_number(tiles_of_stages.index(stage))
    first = tile // OPTIONS.block_n * OPTIONS.block_n
    take_turn(turn, step, WARPGROUP)
    keys = key_memory.index(stage).reshape([OPTIONS.block_n, OPTIONS.block_d]).permute([1, 0])
    scores = warpgroup_mma(query, keys, zeros, use_acc=False, is_async=True)
    pass_turn(turn, WARPGROUP, OPTIONS)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(freed.index(stage), count=1)
    step += 1
    selecting = True
    if SCORE_HOOK is not None and OPTIONS.causal and OPTIONS.group > IN_TURN:
        # Nothing is to be selected where the first key is still in the window of the last query.
        selecting = first <= length - query_length + gl.minimum(row_start + ROWS, query_length) - 1 - window
    if selecting:
        weights, tile_sum, rescale, running_max, _ = update_softmax(
            scores, tile, positions, running_max, rules, numbers, hook_args, SCORE_HOOK, False, OPTIONS, True, False
        )  # fmt: skip
    else:
        weights, tile_sum, rescale, running_max, _ = update_softmax(
            scores, first, positions, running_max, rules, numbers, hook_args, None, False, OPTIONS, True, False
        )  # fmt: skip
    partial_sum = add_sum(partial_sum, tile_sum, rescale, ones_memory, False)
    if first + OPTIONS.block_n > length:
        stage = step % STAGES
        mbarrier.wait(loaded.index(stage), step // STAGES & 1)
        clear_rows(value_memory.index(stage), first, length, WARPGROUP, OPTIONS)
        mbarrier.arrive(cleared, count=1)
        mbarrier.wait(cleared, clearings & 1)
        clearings += 1

    for _ in range(1, masked - spared):
        weights, accumulator, running_max, partial_sum = advance(
            step, positions, query, weights, accumulator, running_max, partial_sum, rules, numbers, hook_args,
            key_memory, value_memory, ones_memory, tiles_of_stages, undecided_memory, loaded, freed, turn, WARPGROUP,
            SCORE_HOOK, QUICK_HOOK, OPTIONS, STAGES, True, False,
        )  # fmt: skip
        step += 1
    if QUICK_HOOK is not None and ones_memory is not None:
        weights = weights + no_masks(scores, OPTIONS)
    for _ in range(masked - spared, tiles):
        weights, accumulator, running_max, partial_sum = advance(
            step, positions, query, weights, accumulator, running_max, partial_sum, rules, numbers, hook_args,
            key_memory, value_memory, ones_memory, tiles_of_stages, undecided_memory, loaded, freed, turn, WARPGROUP,
            SCORE_HOOK, QUICK_HOOK, OPTIONS, STAGES, False, OPTIONS.frozen,
        )  # fmt: skip
        step += 1

    stage = step % STAGES
    mbarrier.wait(loaded.index(stage), step // STAGES & 1)
    take_turn(turn, step, WARPGROUP)
    values = value_memory.index(stage).reshape([OPTIONS.block_n, OPTIONS.block_dv])
    weights = gl.convert_layout(round_weights(weights, query.dtype, OPTIONS), OPERAND, assert_trivial=True)
    if ones_memory is not None:
        partial_sum = warpgroup_mma(weights, ones_memory.permute([1, 0]), partial_sum, is_async=True)
    accumulator = warpgroup_mma(weights, values, accumulator, is_async=True)
    pass_turn(turn, WARPGROUP, OPTIONS)
    accumulator, partial_sum = warpgroup_mma_wait(0, deps=[accumulator, partial_sum])
    mbarrier.arrive(freed.index(stage), count=1)

    store_item(
        accumulator, partial_sum, running_max, tiles > masked - spared, rows, row_start, query, overflows, pointers,
        out_strides, (head, first_query, query_length), heads_of, OPTIONS,
    )  # fmt: skip
    return clearings, step + 1


@gluon.jit
def attend_items(
    work, hook_args, WARPGROUP: gl.constexpr, SCORE_HOOK: gl.constexpr, QUICK_HOOK: gl.constexpr,
    OPTIONS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Compute the items that are posted: the part of a warpgroup."""
    buffers, ones_memory, mail, barriers, pointers, out_strides, problem, numbers = work
    query_memory, key_memory, value_memory = buffers
    posted_items, _, overflows, _ = mail
    posted, done, query_loaded, _, _, turn, _ = barriers
    WARPGROUPS: gl.constexpr = OPTIONS.block_m // ROWS
    if WARPGROUP == 0 and turn is not None:
        mbarrier.arrive(turn.index(0), count=1)
    step = 0
    clearings = 0
    post = 0
    idle = 0
    while idle < 2:
        slot = post % SLOTS
        mbarrier.wait(posted.index(slot), post // SLOTS & 1)
        item = read_number(posted_items.index(slot).slice(0, 1))
        if item >= 0:
            mbarrier.wait(query_loaded.index(slot), post // SLOTS & 1)
            clearings, step = attend_item(
                slot, step, clearings, query_memory.index(WARPGROUPS * slot + WARPGROUP), key_memory, value_memory,
                ones_memory, mail, overflows.index(WARPGROUPS * slot + WARPGROUP), barriers, pointers, out_strides,
                problem, numbers, hook_args, WARPGROUP, SCORE_HOOK, QUICK_HOOK, OPTIONS, STAGES,
            )  # fmt: skip
        mbarrier.arrive(done.index(slot), count=1)
        post += 1
        idle = gl.where(item < 0, idle + 1, 0)


@gluon.jit(
    do_not_specialize=[
        "tail_start", "batch", "tiles_per_head", "heads_per_wave", "num_sinks", "window", "sliding_window",
        "list_rows", "visits_stride", "heads_per_list", "hook_args",
    ]
)  # fmt: skip
def attention_forward_hopper(
    query_descriptor, key_descriptor, value_descriptor, key_tail_descriptor, value_tail_descriptor, tail_start, out_ptr,
    lse_ptr, sink_logits_ptr, counter_ptr, out_strides, sequences, heads_of, numbers, batch, tiles_per_head,
    heads_per_wave, num_sinks, window, sliding_window, visits_ptr, order_ptr, list_rows, visits_stride, heads_per_list,
    hook_args,
    SCORE_HOOK: gl.constexpr, QUICK_HOOK: gl.constexpr, OPTIONS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Compute attention of packed sequences, and its log-sum-exp; see :mod:`.forward_launch`.

    With lists of key blocks there are :class:`modelopt_lite.kernels.hopper.visits_launch.Visits`; without, None.
    """
    ELEMENT: gl.constexpr = query_descriptor.dtype
    WARPGROUPS: gl.constexpr = OPTIONS.block_m // ROWS
    query_memory = gl.allocate_shared_memory(
        ELEMENT, [SLOTS * WARPGROUPS, ROWS, 1, OPTIONS.block_d], query_descriptor.layout
    )
    PAIR: gl.constexpr = OPTIONS.pair
    TILE: gl.constexpr = [STAGES, OPTIONS.group // PAIR, OPTIONS.block_n // OPTIONS.group, PAIR, 1]
    key_memory = gl.allocate_shared_memory(ELEMENT, TILE + [OPTIONS.block_d], key_descriptor.layout)
    value_memory = gl.allocate_shared_memory(ELEMENT, TILE + [OPTIONS.block_dv], value_descriptor.layout)
    NUMBER: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    posted_items = gl.allocate_shared_memory(gl.int32, [SLOTS, NUMBERS], NUMBER)
    tiles_of_stages = gl.allocate_shared_memory(gl.int32, [STAGES, 1], NUMBER)
    overflows = gl.allocate_shared_memory(gl.int32, [SLOTS * WARPGROUPS, ROWS], NUMBER)
    undecided_memory = gl.allocate_shared_memory(gl.int32, [2 * WARPGROUPS, 32 * ROWS // 16], NUMBER)
    posted = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    done = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    query_loaded = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    freed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    cleared = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(posted.index(slot), count=1)
        mbarrier.init(done.index(slot), count=WARPGROUPS)
        mbarrier.init(query_loaded.index(slot), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(loaded.index(stage), count=1)
        mbarrier.init(freed.index(stage), count=WARPGROUPS)
    turn: gl.constexpr = None
    if OPTIONS.group <= IN_TURN and OPTIONS.block_d > 64:
        turn = gl.allocate_shared_memory(gl.int64, [WARPGROUPS, 1], BARRIER)
        for warpgroup in gl.static_range(WARPGROUPS):
            mbarrier.init(turn.index(warpgroup), count=1)
    mbarrier.init(cleared, count=WARPGROUPS)
    # Beside a selection and a head_dim of 64, with three warpgroups, the matrix units have time to sum weights: as they
    # are rounded, which the LSE could not bear.
    ones_memory: gl.constexpr = None
    if lse_ptr is None and SCORE_HOOK is not None and WARPGROUPS == 3:
        LINES: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        ones_memory = gl.allocate_shared_memory(
            ELEMENT, [8, OPTIONS.block_n], gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        )
        is_first = gl.arange(0, 8, gl.SliceLayout(1, LINES))[:, None] == 0
        ones_memory.store(gl.where(is_first, gl.full([8, OPTIONS.block_n], 1, ELEMENT, LINES), 0))
    fence_async_shared()
    synchronize()

    keys = (key_descriptor, key_tail_descriptor, tail_start)
    values = (value_descriptor, value_tail_descriptor, tail_start)
    descriptors = (query_descriptor, keys, values)
    buffers = (query_memory, key_memory, value_memory)
    mail = (posted_items, tiles_of_stages, overflows, undecided_memory)
    barriers = (posted, done, query_loaded, loaded, freed, turn, cleared)
    pointers = (out_ptr, lse_ptr, sink_logits_ptr)
    lists: gl.constexpr = None
    if visits_ptr is not None:
        lists = (visits_ptr, order_ptr, list_rows, visits_stride, heads_per_list)
    problem = (sequences, heads_of, batch, tiles_per_head, heads_per_wave, (num_sinks, window, sliding_window), lists)
    # Numbers known at compile time would not be so any more inside a tuple in a tuple.
    work = (buffers, ones_memory, mail, barriers, pointers, out_strides, problem, numbers)
    to_load = (descriptors, buffers, mail, barriers, counter_ptr, problem)
    if WARPGROUPS == 3:
        gl.warp_specialize(
            [
                (attend_items, (work, hook_args, 0, SCORE_HOOK, QUICK_HOOK, OPTIONS, STAGES)),
                (attend_items, (work, hook_args, 1, SCORE_HOOK, QUICK_HOOK, OPTIONS, STAGES)),
                (attend_items, (work, hook_args, 2, SCORE_HOOK, QUICK_HOOK, OPTIONS, STAGES)),
                (load_items, (to_load, SCORE_HOOK is not None, OPTIONS, STAGES)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )
    else:
        gl.warp_specialize(
            [
                (attend_items, (work, hook_args, 0, SCORE_HOOK, QUICK_HOOK, OPTIONS, STAGES)),
                (attend_items, (work, hook_args, 1, SCORE_HOOK, QUICK_HOOK, OPTIONS, STAGES)),
                (load_items, (to_load, SCORE_HOOK is not None, OPTIONS, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )
