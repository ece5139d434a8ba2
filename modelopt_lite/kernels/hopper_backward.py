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

from .hopper import load_rows, spread, synchronize
from .tiles import join_groups, key_of_row, scale_scores, select_scores, split_groups, weigh

ROWS = tl.constexpr(64)
"""Queries of a tile, and keys of a warpgroup."""
WARPGROUPS = tl.constexpr(2)


@builtin
def add_to_global(descriptor, coordinates, memory, _semantic=None):
    """Have a tile in shared memory added to one in global memory."""
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, coordinates, memory.handle
    )


@gluon.jit
def find_tile(item, phase, problem):
    """Return head, sequence, first key, whether it exists, and the tiles of queries (begin, end)."""
    sequences, heads_of, batch, tiles_per_head, _ = problem
    kv_heads = heads_of[0]
    pairs = (tiles_per_head + 1) // 2
    head = item // pairs
    pair = item % pairs
    tile = gl.where(phase == 0, tiles_per_head - 1 - pair, pair)
    sequence = head // kv_heads
    length = gl.load(sequences[3] + sequence).to(gl.int32)
    query_length = gl.load(sequences[1] + sequence).to(gl.int32)
    first = tile * (ROWS * WARPGROUPS)
    exists = (first < length) & ((phase == 0) | (tile != tiles_per_head - 1 - pair))
    begin = gl.maximum(first - (length - query_length), 0) // ROWS
    masked = gl.maximum(first + ROWS * WARPGROUPS - 1 - (length - query_length), 0)
    masked = gl.minimum((masked + ROWS - 1) // ROWS, (query_length + ROWS - 1) // ROWS)
    end = (query_length + ROWS - 1) // ROWS
    begin = gl.where(exists, begin, end)
    return head % kv_heads, sequence, first, exists, begin, gl.maximum(masked, begin), end


@gluon.jit
def tile_in_order(index, phase, begin, end):
    """Return the tile of queries that comes at a place in the order of a phase: ascending, then descending."""
    return gl.where(phase == 0, begin + index, end - 1 - index)


@gluon.jit
def load_part(work, OPTIONS: gl.constexpr, STAGES: gl.constexpr):
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
            kv_head, sequence, first, exists, begin, masked, end = find_tile(item, phase, problem)
            if exists:
                first_query = gl.load(sequences[0] + sequence).to(gl.int32)
                first_key = gl.load(sequences[2] + sequence).to(gl.int32)
                mbarrier.wait(keys_freed, (turn & 1) ^ 1)
                mbarrier.expect(keys_loaded, 2 * WARPGROUPS * BYTES)
                for w in gl.static_range(WARPGROUPS):
                    load_rows(keys, first_key + first + w * ROWS, kv_head, keys_loaded, key_memory.index(w), OPTIONS)
                    load_rows(
                        values, first_key + first + w * ROWS, kv_head, keys_loaded, value_memory.index(w), OPTIONS
                    )
                turn += 1
                for member in range(heads_of[1]):
                    head = kv_head * heads_of[1] + member
                    for index in range(0, end - begin):
                        row = first_query + tile_in_order(index, phase, begin, end) * ROWS
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
def tiles_that_see(tile, length, query_length):
    """Return the first tile of queries that sees some of a tile of keys, and how many see it."""
    first = tile * (ROWS * WARPGROUPS)
    end = (query_length + ROWS - 1) // ROWS
    begin = gl.maximum(first - (length - query_length), 0) // ROWS
    return begin, gl.where(first < length, gl.maximum(end - begin, 0), 0)


@gluon.jit
def time_of(tile, member, query_tile, length, query_length, tiles_per_head, heads_per_kv):
    """Return when a tile of keys would meet a tile of queries if all steps took the same time, and its item."""
    pair = gl.minimum(tile, tiles_per_head - 1 - tile)
    begin, count = tiles_that_see(tile, length, query_length)
    _, count_before = tiles_that_see(tiles_per_head - 1 - pair, length, query_length)
    is_first = tile == tiles_per_head - 1 - pair
    index = gl.where(is_first, query_tile - begin, begin + count - 1 - query_tile)
    time = member * count + index + gl.where(is_first, 0, heads_per_kv * count_before)
    return time, pair, (index >= 0) & (index < count)


@gluon.jit
def rank_of(tile, item, member, query_tile, problem, length, query_length):
    """Return how many tiles of keys come before one in adding to the gradient of a tile of queries."""
    _, heads_of, _, tiles_per_head, _ = problem
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    programs = gl.num_programs(0)
    pairs = (tiles_per_head + 1) // 2
    time, pair, _ = time_of(tile, member, query_tile, length, query_length, tiles_per_head, heads_of[1])
    round_ = item // programs
    before = gl.full([32], 0, gl.int32, LANES)
    for chunk in range(0, tiles_per_head, 32):
        others = chunk + gl.arange(0, 32, LANES)
        times, other_pairs, meet = time_of(
            others, member, query_tile, length, query_length, tiles_per_head, heads_of[1]
        )
        rounds = (item - pair + other_pairs) // programs
        earlier = (times < time) | ((times == time) & (others < tile))
        earlier = (rounds < round_) | ((rounds == round_) & earlier)
        before += (earlier & meet & (others < tiles_per_head)).to(gl.int32)
    return gl.sum(before, 0)


@gluon.jit
def write_part(descriptor, memory, barriers, problem, semaphore_ptr, tiles_of_queries, ORDER: gl.constexpr):
    full, empty = barriers
    sequences, heads_of, batch, tiles_per_head, _ = problem
    items = batch * heads_of[0] * ((tiles_per_head + 1) // 2)
    step = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        for phase in range(2):
            kv_head, sequence, first, exists, begin, masked, end = find_tile(item, phase, problem)
            first_query = gl.load(sequences[0] + sequence).to(gl.int32)
            query_length = gl.load(sequences[1] + sequence).to(gl.int32)
            length = gl.load(sequences[3] + sequence).to(gl.int32)
            for member in range(heads_of[1]):
                head = kv_head * heads_of[1] + member
                for index in range(0, end - begin):
                    tile = tile_in_order(index, phase, begin, end)
                    if ORDER:
                        rank = rank_of(first // (ROWS * WARPGROUPS), item, member, tile, problem, length, query_length)
                        turn_ptr = semaphore_ptr + (sequence * heads_of[0] * heads_of[1] + head) * tiles_of_queries + tile
                    mbarrier.wait(full, step & 1)
                    if ORDER:
                        while gl.load(turn_ptr, volatile=True) != rank:
                            pass
                        gl.inline_asm_elementwise(
                            "fence.acq_rel.gpu; fence.proxy.async; mov.b32 $0, 0;", "=r,r", [rank], dtype=gl.int32, is_pure=False, pack=1
                        )
                    for w in gl.static_range(WARPGROUPS):
                        add_to_global(
                            descriptor, [head, first_query + tile * ROWS, w * ROWS], memory.index(w)
                        )
                    tma.store_wait(0)
                    mbarrier.arrive(empty, count=1)
                    if ORDER:
                        gl.inline_asm_elementwise(
                            "cp.async.bulk.wait_group 0; bar.warp.sync 0xffffffff; fence.proxy.async; fence.acq_rel.gpu; mov.b32 $0, 0;", "=r,r", [rank], dtype=gl.int32,
                            is_pure=False, pack=1,
                        )
                        gl.atomic_add(turn_ptr, 1, sem="release")
                    step += 1


@gluon.jit
def differentiate(
    step, row, first, q_offset, dk, dv, shift_ptr, delta_ptr, length, query_length, rules, numbers, hook_args, buffers, barriers,
    WARPGROUP: gl.constexpr, SCORE_HOOK: gl.constexpr, OPTIONS: gl.constexpr, STAGES: gl.constexpr,
    MASKED: gl.constexpr, VARIANT: gl.constexpr,
):  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    query_memory, grad_memory, key_memory, value_memory, weight_memory, score_memory, out_memory = buffers
    query_loaded, grad_loaded, freed, scores_full, out_full, out_empty = barriers
    ELEMENT: gl.constexpr = query_memory.dtype
    D: gl.constexpr = OPTIONS.block_d
    stage = step % STAGES
    rows = row + gl.arange(0, ROWS, ROW)
    exist = rows < query_length
    shift = gl.load(shift_ptr + rows, mask=exist, other=float("inf"))
    delta = gl.load(delta_ptr + rows, mask=exist, other=0.0)
    query = query_memory.index(stage).reshape([ROWS, D])
    grad = grad_memory.index(stage).reshape([ROWS, D])
    keys = key_memory.index(WARPGROUP).reshape([ROWS, D])
    values = value_memory.index(WARPGROUP).reshape([ROWS, D])
    zeros = gl.full([ROWS, ROWS], 0, gl.float32, SCORES)
    mbarrier.wait(query_loaded.index(stage), step // STAGES & 1)
    products = warpgroup_mma(query, keys.permute([1, 0]), zeros, use_acc=False, is_async=True)
    mbarrier.wait(grad_loaded.index(stage), step // STAGES & 1)
    grad_weights = warpgroup_mma(grad, values.permute([1, 0]), zeros, use_acc=False, is_async=True)
    products = warpgroup_mma_wait(1, deps=[products])

    scores, to_log2 = scale_scores(products, numbers, OPTIONS)
    part = split_groups(scores, OPTIONS)[0]
    PART: gl.constexpr = part.type.layout
    groups = first + OPTIONS.group * gl.arange(0, part.shape[1], gl.SliceLayout(0, PART))[None, :]
    q_pos = spread(q_offset + rows, part)
    parts, keep, _ = select_scores(scores, q_pos, groups, rules, hook_args, SCORE_HOOK, OPTIONS, MASKED, 0)
    weights = ()
    for r in gl.static_range(len(parts)):
        weight = gl.exp2(parts[r] * to_log2 - spread(shift, parts[r]))
        if len(keep) > 0:
            weight = weigh(weight, keep[r])
        weights = weights + (weight,)
    weights = gl.convert_layout(join_groups(weights, OPTIONS), SCORES, assert_trivial=True)

    weight_memory.index(WARPGROUP).store(weights.to(ELEMENT))
    if VARIANT & 1:
        fence_async_shared()
        synchronize()
        dv = warpgroup_mma(weight_memory.index(WARPGROUP).permute([1, 0]), grad, dv, is_async=True)
        grad_weights = warpgroup_mma_wait(1, deps=[grad_weights])
    else:
        grad_weights = warpgroup_mma_wait(0, deps=[grad_weights])
    grad_scores = weights * (grad_weights - delta[:, None])
    buffer = step % 2
    own = score_memory.index(2 * buffer + WARPGROUP)
    own.store(grad_scores.to(ELEMENT))
    fence_async_shared()
    synchronize()
    mbarrier.arrive(scores_full.index(buffer), count=1)
    if not (VARIANT & 1):
        dv = warpgroup_mma(weight_memory.index(WARPGROUP).permute([1, 0]), grad, dv, is_async=True)
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])
    dq = gl.full([ROWS, D // 2], 0, gl.float32, DQ)
    if VARIANT & 2:
        dk = warpgroup_mma(own.permute([1, 0]), query, dk, is_async=True)
    mbarrier.wait(scores_full.index(buffer), step // 2 & 1)
    for w in gl.static_range(WARPGROUPS):
        half = key_memory.index(w).reshape([ROWS, D]).slice(WARPGROUP * (D // 2), D // 2, 1)
        dq = warpgroup_mma(score_memory.index(2 * buffer + w), half, dq, use_acc=w > 0, is_async=True)
    if not (VARIANT & 2):
        dk = warpgroup_mma(own.permute([1, 0]), query, dk, is_async=True)
        dq = warpgroup_mma_wait(1, deps=[dq])
    else:
        dq, dk, dv = warpgroup_mma_wait(0, deps=[dq, dk, dv])
        synchronize()
        mbarrier.arrive(freed.index(stage), count=1)
    mbarrier.wait(out_empty, (step & 1) ^ 1)
    out_memory.index(WARPGROUP).reshape([ROWS, D // 2]).store(dq)
    fence_async_shared()
    synchronize()
    mbarrier.arrive(out_full, count=1)
    if not (VARIANT & 2):
        dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
        synchronize()
        mbarrier.arrive(freed.index(stage), count=1)
    return dk, dv


@gluon.jit
def compute_part(
    work, hook_args, WARPGROUP: gl.constexpr, SCORE_HOOK: gl.constexpr, OPTIONS: gl.constexpr, STAGES: gl.constexpr,
    VARIANT: gl.constexpr,
):  # fmt: skip
    buffers, barriers, key_barriers, pointers, strides, problem, numbers = work
    keys_loaded, keys_freed = key_barriers
    shift_ptr, delta_ptr, grad_key_ptr, grad_value_ptr, total = pointers
    sequences, heads_of, batch, tiles_per_head, distances = problem
    num_sinks, window, sliding_window = distances
    items = batch * heads_of[0] * ((tiles_per_head + 1) // 2)
    D: gl.constexpr = OPTIONS.block_d
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    step = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        for phase in range(2):
            kv_head, sequence, first, exists, begin, masked, end = find_tile(item, phase, problem)
            if exists:
                length = gl.load(sequences[3] + sequence).to(gl.int32)
                query_length = gl.load(sequences[1] + sequence).to(gl.int32)
                first_query = gl.load(sequences[0] + sequence).to(gl.int64)
                first_key = gl.load(sequences[2] + sequence).to(gl.int64)
                rules = (length - query_length, length, num_sinks, window, sliding_window)
                dk = gl.full([ROWS, D], 0, gl.float32, OUTPUT)
                dv = gl.full([ROWS, D], 0, gl.float32, OUTPUT)
                mbarrier.wait(keys_loaded, turn & 1)
                turn += 1
                own = first + WARPGROUP * ROWS
                # Ascending, masked tiles come first; descending, they come last.
                for turn_of in range(2 * heads_of[1]):
                    member = turn_of // 2
                    half = turn_of % 2
                    offset = (kv_head * heads_of[1] + member).to(gl.int64) * total + first_query
                    for index in range(0, gl.where(half == phase, masked - begin, 0)):
                        tile = tile_in_order(index, phase, begin, masked)
                        dk, dv = differentiate(
                            step, tile * ROWS, own, length - query_length, dk, dv, shift_ptr + offset, delta_ptr + offset, length,
                            query_length, rules, numbers, hook_args, buffers, barriers, WARPGROUP, SCORE_HOOK, OPTIONS,
                            STAGES, True, VARIANT,
                        )  # fmt: skip
                        step += 1
                    for index in range(0, gl.where(half == 0, end - masked, 0)):
                        tile = tile_in_order(index, phase, masked, end)
                        dk, dv = differentiate(
                            step, tile * ROWS, own, length - query_length, dk, dv, shift_ptr + offset, delta_ptr + offset, length,
                            query_length, rules, numbers, hook_args, buffers, barriers, WARPGROUP, SCORE_HOOK, OPTIONS,
                            STAGES, False, VARIANT,
                        )  # fmt: skip
                        step += 1
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


@gluon.jit(do_not_specialize=["tail_start", "batch", "tiles_per_head", "num_sinks", "window", "sliding_window", "hook_args"])
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
    score_memory = gl.allocate_shared_memory(ELEMENT, [2 * WARPGROUPS, ROWS, ROWS], SQUARE)
    out_memory = gl.allocate_shared_memory(gl.float32, [WARPGROUPS, 1, ROWS, D // 2], grad_query_descriptor.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    query_loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    grad_loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    freed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    scores_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    keys_loaded = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    keys_freed = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    out_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    out_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    for stage in gl.static_range(STAGES):
        mbarrier.init(query_loaded.index(stage), count=1)
        mbarrier.init(grad_loaded.index(stage), count=1)
        mbarrier.init(freed.index(stage), count=WARPGROUPS)
    for buffer in gl.static_range(2):
        mbarrier.init(scores_full.index(buffer), count=WARPGROUPS)
    mbarrier.init(keys_loaded, count=1)
    mbarrier.init(keys_freed, count=WARPGROUPS)
    mbarrier.init(out_full, count=WARPGROUPS)
    mbarrier.init(out_empty, count=1)
    fence_async_shared()
    synchronize()

    keys = (key_descriptor, key_tail_descriptor, tail_start)
    values = (value_descriptor, value_tail_descriptor, tail_start)
    problem = (sequences, heads_of, batch, tiles_per_head, (num_sinks, window, sliding_window))
    tiles = (query_memory, grad_memory, key_memory, value_memory)
    to_load = ((query_descriptor, grad_descriptor, keys, values), tiles,
               (query_loaded, grad_loaded, freed, keys_loaded, keys_freed), problem)  # fmt: skip
    barriers = (query_loaded, grad_loaded, freed, scores_full, out_full, out_empty)
    buffers = tiles + (weight_memory, score_memory, out_memory)
    pointers = (shift_ptr, delta_ptr, grad_key_ptr, grad_value_ptr, total)
    key_barriers = (keys_loaded, keys_freed)
    work = (buffers, barriers, key_barriers, pointers, strides, problem, numbers)
    gl.warp_specialize(
        [
            (compute_part, (work, hook_args, 0, SCORE_HOOK, OPTIONS, STAGES, VARIANT)),
            (compute_part, (work, hook_args, 1, SCORE_HOOK, OPTIONS, STAGES, VARIANT)),
            (load_part, (to_load, OPTIONS, STAGES)),
            (write_part, (grad_query_descriptor, out_memory, (out_full, out_empty), problem, semaphore_ptr, tiles_of_queries, ORDER)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )
