"""The attention backward for Hopper GPUs (compute capability 9.0), in Gluon: one pass, five matrix products."""

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

from .hopper import PIECE, load_rows, spread, synchronize
from .backward import gradient_rows, query_spans
from .tiles import join_groups, key_of_row, scale_scores, select_scores, split_groups, weigh

ROWS = tl.constexpr(64)
"""Queries of a tile, and keys of a warpgroup."""
WARPGROUPS = tl.constexpr(2)
CLEARED = tl.constexpr(8192)
"""Numbers that a program clears."""
KEYS = tl.constexpr(128)
"""Keys of a tile: ``ROWS`` of each warpgroup."""

# Everything that other programs have added is there; everything that this warp has added is there for others.
ACQUIRE = tl.constexpr("fence.acq_rel.gpu; fence.proxy.async; mov.b32 $0, 0;")
RELEASE = tl.constexpr(
    "cp.async.bulk.wait_group 0; bar.warp.sync 0xffffffff; fence.proxy.async; fence.acq_rel.gpu; mov.b32 $0, 0;"
)


@triton.jit(do_not_specialize=["batch", "total", "tiles_of_queries"])
def prepare_gradients(
    grad_ptr, out_ptr, lse_ptr, shift_ptr, delta_ptr, sums_ptr, turns_ptr, grad_key_ptr, grad_value_ptr, strides,
    starts_ptr, lengths_ptr, heads, batch, total, tiles_of_queries, size, DIM: tl.constexpr,
):  # fmt: skip
    """Prepare rows as :func:`~modelopt_lite.kernels.backward.gradient_rows` does, and clear what is added up.

    First come its programs. Then come those of a sequence and a head: they clear the turns, and the sums of the last
    tile of queries if it has fewer than others; what comes first in another is stored and not added. The others clear
    ``CLEARED`` of the ``size`` numbers of the gradients of keys and values each, as rows may belong to no sequence.
    """
    program = tl.program_id(0)
    row_programs = tl.cdiv(total, ROWS) * heads
    if program < row_programs:
        gradient_rows(
            grad_ptr, out_ptr, lse_ptr, shift_ptr, delta_ptr, strides, heads, total, VALUE_DIM=DIM, BLOCK_M=ROWS,
            BLOCK_DV=DIM,
        )  # fmt: skip
    elif program < row_programs + batch * heads:
        program -= row_programs
        start, length = tl.load(starts_ptr + program // heads), tl.load(lengths_ptr + program // heads)
        for first in range(0, tiles_of_queries, 128):
            tiles = first + tl.arange(0, 128)
            tl.store(turns_ptr + program * tiles_of_queries + tiles, 0, mask=tiles < tiles_of_queries)
        rows = length // ROWS * ROWS + tl.arange(0, ROWS)
        places = (program % heads).to(tl.int64) * total + start + rows
        sums_pointers = sums_ptr + places[:, None] * DIM + tl.arange(0, DIM)[None, :]
        tl.store(sums_pointers, tl.zeros([ROWS, DIM], tl.float32), mask=(rows < length)[:, None])
    else:
        numbers = (program - row_programs - batch * heads).to(tl.int64) * CLEARED + tl.arange(0, CLEARED)
        zeros = tl.zeros([CLEARED], grad_key_ptr.dtype.element_ty)
        tl.store(grad_key_ptr + numbers, zeros, mask=numbers < size)
        tl.store(grad_value_ptr + numbers, zeros, mask=numbers < size)


@triton.jit(do_not_specialize=["total"])
def round_gradients(sums_ptr, shift_ptr, grad_ptr, scale, total, heads, strides, DIM: tl.constexpr):
    """Scale and round gradients of queries; those of rows without a key are 0. A program takes ``ROWS`` of one head."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) // heads * ROWS + tl.arange(0, ROWS)
    exist = rows < total
    has_keys = tl.load(shift_ptr + head * total + rows, mask=exist, other=float("inf")) != float("inf")
    columns = tl.arange(0, DIM)[None, :]
    sums = tl.load(sums_ptr + (head * total + rows)[:, None] * DIM + columns, mask=has_keys[:, None], other=0.0)
    pointers = grad_ptr + head * strides[1] + (rows[:, None] * strides[0] + columns)
    tl.store(pointers, (sums * scale).to(grad_ptr.dtype.element_ty), mask=exist[:, None])


@builtin
def add_to_global(descriptor, coordinates, memory, _semantic=None):
    """Have a tile in shared memory added to one in global memory."""
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, coordinates, memory.handle
    )


@gluon.jit
def find_tile(item, phase, problem):
    """Return the kv head, the sequence and the number of an item's tile of keys, and whether it is one.

    An item is two tiles of keys of one head, the n-th from the end and then the n-th, which under causal attention have
    as much to do together as any other two.
    """
    _, heads_of, _, tiles_per_head, _ = problem
    pairs = (tiles_per_head + 1) // 2
    head, pair = item // pairs, item % pairs
    tile = gl.where(phase == 0, tiles_per_head - 1 - pair, pair)
    is_one = (phase == 0) | (tile != tiles_per_head - 1 - pair)
    return head % heads_of[0], head // heads_of[0], tile, is_one


@gluon.jit
def tiles_that_see(tile, lengths, problem, OPTIONS: gl.constexpr):
    """Return the first tile of queries that sees some of a tile of keys, or of tiles, and how many see it."""
    query_length, length = lengths
    sliding_window = problem[4][2]
    own = tile * KEYS - (length - query_length)  # the row of the query at the position of the first key
    begin = tile * 0
    rows_end = query_length
    if OPTIONS.causal:
        begin = gl.maximum(own, 0) // ROWS
    elif OPTIONS.sliding:
        begin = gl.maximum(own - sliding_window + 1, 0) // ROWS
    if OPTIONS.sliding:
        rows_end = gl.minimum(query_length, gl.maximum(own + KEYS - 1 + sliding_window, 0))
    end = (rows_end + ROWS - 1) // ROWS
    return begin, gl.where(tile * KEYS < length, gl.maximum(end - begin, 0), 0)


@gluon.jit
def tile_in_order(index, phase, begin, end):
    """Return the tile of queries that comes at a place in the order of a phase: ascending, then descending."""
    return gl.where(phase == 0, begin + index, end - 1 - index)


@gluon.jit
def lengths_of(sequence, problem):
    """Return how many queries and keys a sequence has."""
    sequences = problem[0]
    return gl.load(sequences[1] + sequence).to(gl.int32), gl.load(sequences[3] + sequence).to(gl.int32)


@gluon.jit
def load_part(work, OPTIONS: gl.constexpr, STAGES: gl.constexpr):
    """Load keys and values of each item, then queries and gradients of the output, tile by tile: the part of one warp."""
    descriptors, buffers, barriers, problem = work
    query_descriptor, grad_descriptor, keys, values = descriptors
    query_memory, grad_memory, key_memory, value_memory = buffers
    query_loaded, grad_loaded, freed, keys_loaded, keys_freed = barriers
    sequences, heads_of, batch, tiles_per_head, _ = problem
    items = batch * heads_of[0] * ((tiles_per_head + 1) // 2)
    BYTES: gl.constexpr = ROWS * OPTIONS.block_d * 2
    step = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        for phase in range(2):
            kv_head, sequence, tile, is_one = find_tile(item, phase, problem)
            lengths = lengths_of(sequence, problem)
            if is_one & (tile * KEYS < lengths[1]):
                begin, count = tiles_that_see(tile, lengths, problem, OPTIONS)
                first_query = gl.load(sequences[0] + sequence).to(gl.int32)
                first_key = gl.load(sequences[2] + sequence).to(gl.int32) + tile * KEYS
                mbarrier.wait(keys_freed, (turn & 1) ^ 1)
                mbarrier.expect(keys_loaded, 2 * WARPGROUPS * BYTES)
                for w in gl.static_range(WARPGROUPS):
                    load_rows(keys, first_key + w * ROWS, kv_head, keys_loaded, key_memory.index(w), OPTIONS)
                    load_rows(values, first_key + w * ROWS, kv_head, keys_loaded, value_memory.index(w), OPTIONS)
                turn += 1
                for member in range(heads_of[1]):
                    head = kv_head * heads_of[1] + member
                    for index in range(count):
                        row = first_query + tile_in_order(index, phase, begin, begin + count) * ROWS
                        stage = step % STAGES
                        mbarrier.wait(freed.index(stage), (step // STAGES & 1) ^ 1)
                        mbarrier.expect(query_loaded.index(stage), BYTES)
                        tma.async_copy_global_to_shared(
                            query_descriptor, [row, head, 0], query_loaded.index(stage), query_memory.index(stage)
                        )
                        mbarrier.expect(grad_loaded.index(stage), BYTES)
                        tma.async_copy_global_to_shared(
                            grad_descriptor, [row, head, 0], grad_loaded.index(stage), grad_memory.index(stage)
                        )
                        step += 1


@gluon.jit
def time_of(tile, member, query_tile, lengths, problem, OPTIONS: gl.constexpr):
    """Return when a tile of keys, or each of several, meets a tile of queries if all steps took the same time.

    Returns:
        The step of its program in its item; the item's number among those of the head; and whether the two meet at all.
    """
    _, heads_of, _, tiles_per_head, _ = problem
    last = tiles_per_head - 1
    pair = gl.minimum(tile, last - tile)
    is_first = tile == last - pair
    begin, count = tiles_that_see(tile, lengths, problem, OPTIONS)
    _, count_before = tiles_that_see(last - pair, lengths, problem, OPTIONS)
    index = gl.where(is_first, query_tile - begin, begin + count - 1 - query_tile)
    time = member * count + index + gl.where(is_first, 0, heads_of[1] * count_before)
    return time, pair, (index >= 0) & (index < count)


@gluon.jit
def rank_of(tile, item, member, query_tile, lengths, problem, OPTIONS: gl.constexpr):
    """Return how many tiles of keys come before one in adding to the gradient of a tile of queries.

    Any order would do that follows from numbers alone; this one makes nobody wait as long as programs keep step.
    """
    tiles_per_head = problem[3]
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    programs = gl.num_programs(0)
    time, pair, _ = time_of(tile, member, query_tile, lengths, problem, OPTIONS)
    before = gl.full([32], 0, gl.int32, LANES)
    for chunk in range(0, tiles_per_head, 32):
        others = chunk + gl.arange(0, 32, LANES)
        times, pairs, meet = time_of(others, member, query_tile, lengths, problem, OPTIONS)
        rounds = (item - pair + pairs) // programs - item // programs
        earlier = (times < time) | ((times == time) & (others < tile))
        earlier = (rounds < 0) | ((rounds == 0) & earlier)
        before += (earlier & meet & (others < tiles_per_head)).to(gl.int32)
    return gl.sum(before, 0)


@gluon.jit
def write_part(work, OPTIONS: gl.constexpr, ORDER: gl.constexpr):
    """Add gradients of queries to what other programs have added, in an order: the part of one warp."""
    descriptor, memory, full, empty, turns_ptr, tiles_of_queries, problem = work
    sequences, heads_of, batch, tiles_per_head, _ = problem
    items = batch * heads_of[0] * ((tiles_per_head + 1) // 2)
    step = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        for phase in range(2):
            kv_head, sequence, tile, is_one = find_tile(item, phase, problem)
            lengths = lengths_of(sequence, problem)
            first_query = gl.load(sequences[0] + sequence).to(gl.int32)
            begin, count = tiles_that_see(tile, lengths, problem, OPTIONS)
            count = gl.where(is_one, count, 0)
            for member in range(heads_of[1]):
                head = kv_head * heads_of[1] + member
                for index in range(count):
                    query_tile = tile_in_order(index, phase, begin, begin + count)
                    rank = rank_of(tile, item, member, query_tile, lengths, problem, OPTIONS)
                    turn_ptr = turns_ptr + (sequence * heads_of[0] * heads_of[1] + head) * tiles_of_queries + query_tile
                    if ORDER:
                        while gl.load(turn_ptr, volatile=True) != rank:
                            pass
                        gl.inline_asm_elementwise(ACQUIRE, "=r,r", [rank], dtype=gl.int32, is_pure=False, pack=1)
                    mbarrier.wait(full, step & 1)
                    row = query_tile * ROWS
                    is_new = (rank == 0) & (row + ROWS <= lengths[0])
                    for w in gl.static_range(WARPGROUPS):
                        coordinates = [head, first_query + row, w * (OPTIONS.block_d // 2)]
                        if is_new & (ORDER != 0):
                            tma.async_copy_shared_to_global(descriptor, coordinates, memory.index(w))
                        else:
                            add_to_global(descriptor, coordinates, memory.index(w))
                    tma.store_wait(0)
                    mbarrier.arrive(empty, count=1)
                    if ORDER:
                        gl.inline_asm_elementwise(RELEASE, "=r,r", [rank], dtype=gl.int32, is_pure=False, pack=1)
                        gl.atomic_add(turn_ptr, 1, sem="release")
                    step += 1


@gluon.jit
def clear_beyond(memory, first, limit, GROUP: gl.constexpr, PAIR: gl.constexpr, WARPS_OF: gl.constexpr, SHARE: gl.constexpr):
    """Clear rows of a tile at positions from ``limit`` on: what lies there may be anything, and 0 * NaN is not 0.

    The tile is cleared by ``WARPS_OF`` warpgroups, of which this one is number ``SHARE``.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for piece in gl.static_range(SHARE, ROWS // PIECE, WARPS_OF):
        rows = piece * PIECE + gl.arange(0, PIECE, gl.SliceLayout(1, LAYOUT))
        exist = first + key_of_row(rows, ROWS, GROUP, PAIR) < limit
        part = memory.slice(piece * PIECE, PIECE, 0)
        found = part.load(LAYOUT)
        part.store(gl.where(exist[:, None], found, gl.zeros_like(found)))
    fence_async_shared()
    synchronize()


@gluon.jit
def load_numbers(row, query_length, shift_ptr, delta_ptr):
    """Load the shift and delta of a tile's rows; see :func:`modelopt_lite.kernels.backward.gradient_rows`."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    exist = (rows >= 0) & (rows < query_length)
    shift = gl.load(shift_ptr + rows, mask=exist, other=float("inf"))
    delta = gl.load(delta_ptr + rows, mask=exist, other=0.0)
    return shift, delta


@gluon.jit
def multiply_keys(score_memory, key_memory, buffer, WARPGROUP: gl.constexpr, OPTIONS: gl.constexpr):
    """Issue the product of gradients of scores, of both warpgroups, and half of the columns of keys."""
    HALF: gl.constexpr = OPTIONS.block_d // 2
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    dq = gl.full([ROWS, HALF], 0, gl.float32, DQ)
    for w in gl.static_range(WARPGROUPS):
        half = key_memory.index(w).reshape([ROWS, OPTIONS.block_d]).slice(WARPGROUP * HALF, HALF, 1)
        dq = warpgroup_mma(score_memory.index(2 * buffer + w), half, dq, use_acc=w > 0, is_async=True)
    return dq


@gluon.jit
def hand_over(dq, step, memory, full, empty, WARPGROUP: gl.constexpr):
    """Hand half of the columns of a step's gradient of queries to the warp that adds them up."""
    mbarrier.wait(empty, (step & 1) ^ 1)
    memory.index(WARPGROUP).reshape([dq.shape[0], dq.shape[1]]).store(dq)
    fence_async_shared()
    synchronize()
    mbarrier.arrive(full, count=1)


@gluon.jit
def differentiate(
    step, row, first, clearings, dk, dv, shift, delta, next_row, has_before, shift_ptr, delta_ptr, query_length, rules,
    numbers, hook_args, buffers, barriers, WARPGROUP: gl.constexpr, SCORE_HOOK: gl.constexpr, OPTIONS: gl.constexpr, STAGES: gl.constexpr,
    MASKED: gl.constexpr, VARIANT: gl.constexpr,
):  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    query_memory, grad_memory, key_memory, value_memory, weight_memory, score_memory, out_memory = buffers
    query_loaded, grad_loaded, freed, scores_full, out_full, out_empty, cleared = barriers
    ELEMENT: gl.constexpr = query_memory.dtype
    D: gl.constexpr = OPTIONS.block_d
    stage = step % STAGES
    rows = row + gl.arange(0, ROWS, ROW)
    if VARIANT & 16:
        next_shift, next_delta = load_numbers(next_row, query_length, shift_ptr, delta_ptr)
    else:
        shift, delta = load_numbers(row, query_length, shift_ptr, delta_ptr)
        next_shift, next_delta = shift, delta
    query = query_memory.index(stage).reshape([ROWS, D])
    grad = grad_memory.index(stage).reshape([ROWS, D])
    keys = key_memory.index(WARPGROUP).reshape([ROWS, D])
    values = value_memory.index(WARPGROUP).reshape([ROWS, D])
    zeros = gl.full([ROWS, ROWS], 0, gl.float32, SCORES)
    mbarrier.wait(query_loaded.index(stage), step // STAGES & 1)
    if MASKED:  # noqa: SIM102 - conditions at compile time and at run time do not mix
        if row + ROWS > query_length:
            mbarrier.wait(grad_loaded.index(stage), step // STAGES & 1)
            clear_beyond(query, row, query_length, 1, 1, WARPGROUPS, WARPGROUP)
            clear_beyond(grad, row, query_length, 1, 1, WARPGROUPS, WARPGROUP)
            mbarrier.arrive(cleared, count=1)
            mbarrier.wait(cleared, clearings & 1)
            clearings += 1
    products = warpgroup_mma(query, keys.permute([1, 0]), zeros, use_acc=False, is_async=True)
    if VARIANT & 4:
        products = warpgroup_mma_wait(0, deps=[products])
        mbarrier.wait(grad_loaded.index(stage), step // STAGES & 1)
    else:
        mbarrier.wait(grad_loaded.index(stage), step // STAGES & 1)
        grad_weights = warpgroup_mma(grad, values.permute([1, 0]), zeros, use_acc=False, is_async=True)
        products = warpgroup_mma_wait(1, deps=[products])

    scores, to_log2 = scale_scores(products, numbers, OPTIONS)
    part = split_groups(scores, OPTIONS)[0]
    PART: gl.constexpr = part.type.layout
    groups = first + OPTIONS.group * gl.arange(0, part.shape[1], gl.SliceLayout(0, PART))[None, :]
    q_pos = spread(rules[0] + rows, part)
    parts, keep, _ = select_scores(scores, q_pos, groups, rules, hook_args, SCORE_HOOK, OPTIONS, MASKED, 0)
    weights = ()
    for r in gl.static_range(len(parts)):
        weight = gl.exp2(parts[r] * to_log2 - spread(shift, parts[r]))
        if len(keep) > 0:
            weight = weigh(weight, keep[r])
        weights = weights + (weight,)
    weights = gl.convert_layout(join_groups(weights, OPTIONS), SCORES, assert_trivial=True)

    weight_memory.index(WARPGROUP).store(weights.to(ELEMENT))
    if VARIANT & 4:
        grad_weights = warpgroup_mma(grad, values.permute([1, 0]), zeros, use_acc=False, is_async=True)
    if VARIANT & 1:
        fence_async_shared()
        synchronize()
        dv = warpgroup_mma(weight_memory.index(WARPGROUP).permute([1, 0]), grad, dv, is_async=True)
        grad_weights = warpgroup_mma_wait(1, deps=[grad_weights])
    else:
        grad_weights = warpgroup_mma_wait(0, deps=[grad_weights])
    grad_scores = weights * (grad_weights - delta[:, None])
    if OPTIONS.softcap:
        tanh_of_scores = scores / numbers[1]
        grad_scores *= 1.0 - tanh_of_scores * tanh_of_scores
    if VARIANT & 8:
        # Of the step before: so neither warpgroup has to wait for the other one's scores of this step.
        buffer = step % 3
        before = (step + 2) % 3
        mbarrier.wait(scores_full.index(before), (step + 2) // 3 - 1 & 1)
    else:
        buffer = step % 2
        before = buffer
    own = score_memory.index(2 * buffer + WARPGROUP)
    own.store(grad_scores.to(ELEMENT))
    fence_async_shared()
    synchronize()
    mbarrier.arrive(scores_full.index(buffer), count=1)
    if not (VARIANT & 1):
        dv = warpgroup_mma(weight_memory.index(WARPGROUP).permute([1, 0]), grad, dv, is_async=True)
    if not (VARIANT & 8):
        mbarrier.wait(scores_full.index(buffer), step // 2 & 1)
    dq = multiply_keys(score_memory, key_memory, before, WARPGROUP, OPTIONS)
    dk = warpgroup_mma(own.permute([1, 0]), query, dk, is_async=True)
    dq = warpgroup_mma_wait(1, deps=[dq])
    if VARIANT & 8:
        if has_before:
            hand_over(dq, step - 1, out_memory, out_full, out_empty, WARPGROUP)
    else:
        hand_over(dq, step, out_memory, out_full, out_empty, WARPGROUP)
    dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
    synchronize()
    mbarrier.arrive(freed.index(stage), count=1)
    return clearings, dk, dv, next_shift, next_delta


@gluon.jit
def runs_of(number, phase, bounds):
    """Return the tiles of one of three runs, each of masked tiles and then of hot ones, in the order of a phase.

    Bounds are those of masked, hot, masked, hot and masked tiles, ascending.
    """
    begin, hot_begin, band_begin, band_end, full_end, end = bounds
    from_end = gl.where(phase == 0, number, 2 - number)
    masked_begin = gl.where(from_end == 0, begin, gl.where(from_end == 1, band_begin, full_end))
    masked_end = gl.where(from_end == 0, hot_begin, gl.where(from_end == 1, band_end, end))
    hot_number = gl.where(phase == 0, number, 1 - number)  # 0 or 1, or there are none
    hot_first = gl.where(hot_number == 0, hot_begin, band_end)
    hot_last = gl.where(hot_number == 0, band_begin, full_end)
    exists = (hot_number == 0) | (hot_number == 1)
    return masked_begin, masked_end, hot_first, gl.where(exists, hot_last, hot_first)


@gluon.jit
def compute_part(
    work, hook_args, WARPGROUP: gl.constexpr, SCORE_HOOK: gl.constexpr, OPTIONS: gl.constexpr, STAGES: gl.constexpr,
    VARIANT: gl.constexpr,
):  # fmt: skip
    buffers, barriers, key_barriers, pointers, strides, problem, numbers = work
    key_memory, value_memory = buffers[2], buffers[3]
    keys_loaded, keys_freed = key_barriers
    shift_ptr, delta_ptr, grad_key_ptr, grad_value_ptr, total = pointers
    sequences, heads_of, batch, tiles_per_head, distances = problem
    num_sinks, window, sliding_window = distances
    items = batch * heads_of[0] * ((tiles_per_head + 1) // 2)
    D: gl.constexpr = OPTIONS.block_d
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    step = 0
    turn = 0
    clearings = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        for phase in range(2):
            kv_head, sequence, tile, is_one = find_tile(item, phase, problem)
            query_length, length = lengths_of(sequence, problem)
            first = tile * KEYS
            if is_one & (first < length):
                first_query = gl.load(sequences[0] + sequence).to(gl.int64)
                first_key = gl.load(sequences[2] + sequence).to(gl.int64)
                window_of = window
                if not OPTIONS.sparse_decode:
                    window_of = gl.where(query_length == 1, length, window)
                rules = (length - query_length, length, num_sinks, window_of, sliding_window)
                begin, count = tiles_that_see(tile, (query_length, length), problem, OPTIONS)
                spans = query_spans(
                    first, query_length, length - query_length, rules, SCORE_HOOK is not None, OPTIONS
                )
                hot_begin, band_begin, band_end, full_end = spans[1] // ROWS, spans[2] // ROWS, spans[3] // ROWS, spans[4] // ROWS
                bounds = (begin, hot_begin, band_begin, band_end, full_end, begin + count)
                dk = gl.full([ROWS, D], 0, gl.float32, OUTPUT)
                dv = gl.full([ROWS, D], 0, gl.float32, OUTPUT)
                mbarrier.wait(keys_loaded, turn & 1)
                turn += 1
                own = first + WARPGROUP * ROWS
                if own + ROWS > length:
                    clear_beyond(key_memory.index(WARPGROUP).reshape([ROWS, D]), own, length, OPTIONS.group, OPTIONS.pair, 1, 0)
                    clear_beyond(value_memory.index(WARPGROUP).reshape([ROWS, D]), own, length, OPTIONS.group, OPTIONS.pair, 1, 0)
                first_step = step
                direction = gl.where(phase == 0, ROWS, -ROWS)
                shift, delta = load_numbers(query_length, query_length, shift_ptr, delta_ptr)
                for turn_of in range(3 * heads_of[1]):
                    offset = (kv_head * heads_of[1] + turn_of // 3).to(gl.int64) * total + first_query
                    masked_begin, masked_end, hot_first, hot_end = runs_of(turn_of % 3, phase, bounds)
                    if VARIANT & 16:
                        if turn_of % 3 == 0:
                            row = tile_in_order(0, phase, begin, begin + count) * ROWS
                            shift, delta = load_numbers(row, query_length, shift_ptr + offset, delta_ptr + offset)
                    for index in range(masked_end - masked_begin):
                        row = tile_in_order(index, phase, masked_begin, masked_end) * ROWS
                        clearings, dk, dv, shift, delta = differentiate(
                            step, row, own, clearings, dk, dv, shift, delta, row + direction, step > first_step,
                            shift_ptr + offset, delta_ptr + offset, query_length, rules, numbers, hook_args, buffers, barriers,
                            WARPGROUP, SCORE_HOOK, OPTIONS, STAGES, True, VARIANT,
                        )  # fmt: skip
                        step += 1
                    for index in range(hot_end - hot_first):
                        row = tile_in_order(index, phase, hot_first, hot_end) * ROWS
                        clearings, dk, dv, shift, delta = differentiate(
                            step, row, own, clearings, dk, dv, shift, delta, row + direction, step > first_step,
                            shift_ptr + offset, delta_ptr + offset, query_length, rules, numbers, hook_args, buffers, barriers,
                            WARPGROUP, SCORE_HOOK, OPTIONS, STAGES, False, VARIANT,
                        )  # fmt: skip
                        step += 1
                if VARIANT & 8:
                    if step > first_step:
                        last = (step + 2) % 3
                        mbarrier.wait(barriers[3].index(last), (step + 2) // 3 - 1 & 1)
                        dq = multiply_keys(buffers[5], key_memory, last, WARPGROUP, OPTIONS)
                        dq = warpgroup_mma_wait(0, deps=[dq])
                        hand_over(dq, step - 1, buffers[6], barriers[4], barriers[5], WARPGROUP)
                synchronize()
                mbarrier.arrive(keys_freed, count=1)
                places = gl.arange(0, ROWS, gl.SliceLayout(1, OUTPUT))
                positions = own + key_of_row(places, ROWS, OPTIONS.group, OPTIONS.pair)
                offsets = gl.arange(0, D, gl.SliceLayout(0, OUTPUT))[None, :]
                rows = (first_key + positions)[:, None]
                mask = (positions < length)[:, None]
                at = kv_head.to(gl.int64) * strides[1] + rows * strides[0] + offsets
                gl.store(grad_key_ptr + at, (dk * numbers[0]).to(grad_key_ptr.dtype.element_ty), mask=mask)
                gl.store(grad_value_ptr + at, dv.to(grad_value_ptr.dtype.element_ty), mask=mask)


@gluon.jit(do_not_specialize=["tail_start", "tiles_of_queries", "total", "batch", "tiles_per_head", "num_sinks", "window", "sliding_window", "hook_args"])
def attention_backward_hopper(
    query_descriptor, grad_descriptor, key_descriptor, value_descriptor, key_tail_descriptor, value_tail_descriptor,
    tail_start, grad_query_descriptor, shift_ptr, delta_ptr, grad_key_ptr, grad_value_ptr, semaphore_ptr, tiles_of_queries, total, strides,
    sequences, heads_of, numbers, batch, tiles_per_head, num_sinks, window, sliding_window, hook_args,
    SCORE_HOOK: gl.constexpr, OPTIONS: gl.constexpr, STAGES: gl.constexpr, VARIANT: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    ELEMENT: gl.constexpr = query_descriptor.dtype
    D: gl.constexpr = OPTIONS.block_d
    query_memory = gl.allocate_shared_memory(ELEMENT, [STAGES, ROWS, 1, D], query_descriptor.layout)
    grad_memory = gl.allocate_shared_memory(ELEMENT, [STAGES, ROWS, 1, D], grad_descriptor.layout)
    PAIR: gl.constexpr = OPTIONS.pair
    TILE: gl.constexpr = [WARPGROUPS, OPTIONS.group // PAIR, ROWS // OPTIONS.group, PAIR, 1, D]
    key_memory = gl.allocate_shared_memory(ELEMENT, TILE, key_descriptor.layout)
    value_memory = gl.allocate_shared_memory(ELEMENT, TILE, value_descriptor.layout)
    SQUARE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    weight_memory = gl.allocate_shared_memory(ELEMENT, [WARPGROUPS, ROWS, ROWS], SQUARE)
    BUFFERS: gl.constexpr = 3 if VARIANT & 8 else 2
    score_memory = gl.allocate_shared_memory(ELEMENT, [BUFFERS * WARPGROUPS, ROWS, ROWS], SQUARE)
    out_memory = gl.allocate_shared_memory(gl.float32, [WARPGROUPS, 1, ROWS, D // 2], grad_query_descriptor.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    query_loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    grad_loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    freed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    scores_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARRIER)
    keys_loaded = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    keys_freed = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    out_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    out_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    cleared = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    for stage in gl.static_range(STAGES):
        mbarrier.init(query_loaded.index(stage), count=1)
        mbarrier.init(grad_loaded.index(stage), count=1)
        mbarrier.init(freed.index(stage), count=WARPGROUPS)
    for buffer in gl.static_range(BUFFERS):
        mbarrier.init(scores_full.index(buffer), count=WARPGROUPS)
    mbarrier.init(keys_loaded, count=1)
    mbarrier.init(keys_freed, count=WARPGROUPS)
    mbarrier.init(out_full, count=WARPGROUPS)
    mbarrier.init(out_empty, count=1)
    mbarrier.init(cleared, count=WARPGROUPS)
    fence_async_shared()
    synchronize()

    keys = (key_descriptor, key_tail_descriptor, tail_start)
    values = (value_descriptor, value_tail_descriptor, tail_start)
    problem = (sequences, heads_of, batch, tiles_per_head, (num_sinks, window, sliding_window))
    tiles = (query_memory, grad_memory, key_memory, value_memory)
    to_load = ((query_descriptor, grad_descriptor, keys, values), tiles,
               (query_loaded, grad_loaded, freed, keys_loaded, keys_freed), problem)  # fmt: skip
    barriers = (query_loaded, grad_loaded, freed, scores_full, out_full, out_empty, cleared)
    buffers = tiles + (weight_memory, score_memory, out_memory)
    pointers = (shift_ptr, delta_ptr, grad_key_ptr, grad_value_ptr, total)
    key_barriers = (keys_loaded, keys_freed)
    work = (buffers, barriers, key_barriers, pointers, strides, problem, numbers)
    to_write = (grad_query_descriptor, out_memory, out_full, out_empty, semaphore_ptr, tiles_of_queries, problem)
    gl.warp_specialize(
        [
            (compute_part, (work, hook_args, 0, SCORE_HOOK, OPTIONS, STAGES, VARIANT)),
            (compute_part, (work, hook_args, 1, SCORE_HOOK, OPTIONS, STAGES, VARIANT)),
            (load_part, (to_load, OPTIONS, STAGES)),
            (write_part, (to_write, OPTIONS, ORDER)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )
