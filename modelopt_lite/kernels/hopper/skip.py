"""Skip-softmax in the attention forward for Hopper GPUs: it decides in the main loop, so each score is computed once.

The structure is that of :mod:`modelopt_lite.kernels.hopper.forward`, for BF16 and a head dimension of 128. Masked tiles
hold all keys that a query's reference comes from: those exempt or in the diagonal block. So the references of an item
are found first, from the keys of its masked tiles. Then each tile is decided as soon as its scores are there.

Both warpgroups of an item have to agree, as a key block is skipped for a whole query block. So each tells the other
what it found, and the next tile's scores are computed while they wait. One warp loads keys. Another one loads values:
those of masked tiles, and of the others that are not skipped.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..tiles import select_scores, split_groups
from .forward import (
    NUMBERS,
    ONLINE,
    ROWS,
    SLOTS,
    add_sum,
    announce,
    clear_rows,
    find_tile,
    load_rows,
    read_number,
    read_numbers,
    spread,
    store_item,
    sum_in_thread,
    synchronize,
    update_softmax,
    visits_of,
    write_number,
)
from .visits import UNLISTED

WARPGROUPS = gl.constexpr(2)
KEY_STAGES = gl.constexpr(3)
VALUE_STAGES = gl.constexpr(2)
VOTES = gl.constexpr(4)
"""Tiles that a warpgroup has voted on and whose votes are not yet read by all."""
UNKNOWN = gl.constexpr(2)
"""In place of a vote of 0 or 1: this warpgroup has not voted yet."""


@gluon.jit
def load_keys(work, OPTIONS: gl.constexpr):
    """Post items and load their keys: those of masked tiles, then those of all tiles, then as many as votes need."""
    descriptors, buffers, mail, barriers, _, problem = work
    keys, key_memory = descriptors[1], buffers[1]
    posted_items, tiles_of_stages, _, _ = mail
    _, _, _, loaded, freed, _, _ = barriers
    KEY_BYTES: gl.constexpr = OPTIONS.block_n * OPTIONS.block_d * 2
    step = 0
    post = 0
    idle = 0
    announce(0, work, True, OPTIONS)
    while idle < 2:
        memory = posted_items.index(post % SLOTS)
        item = read_number(memory.slice(0, 1))
        idle = gl.where(item < 0, idle + 1, 0)
        if item >= 0:
            tiles, masked, first_key = read_numbers(memory, 6, 3)
            kv_head = read_number(memory.slice(2, 1)) // problem[1][1]
            place = visits_of(item % ONLINE, problem[6])[0]
            for index in range(masked + masked + loads_of_hot(tiles - masked)):
                number = gl.minimum(gl.where(index < masked, index, index - masked), tiles - 1)
                stage = step % KEY_STAGES
                tile = find_tile(number, place, masked, problem, OPTIONS)
                row = first_key + tile // OPTIONS.block_n * OPTIONS.block_n
                mbarrier.wait(freed.index(stage), (step // KEY_STAGES & 1) ^ 1)
                write_number(tiles_of_stages.index(stage), tile)
                mbarrier.expect(loaded.index(stage), KEY_BYTES)
                load_rows(keys, row, kv_head, loaded.index(stage), key_memory.index(stage), OPTIONS)
                step += 1
        # Here, while there is still something to compute.
        if idle < 2:
            announce(post + 1, work, True, OPTIONS)
        post += 1


@gluon.jit
def loads_of_hot(hot):
    """Return how many products the hot loop makes, which goes two steps at a time and is one product ahead."""
    return gl.where(hot > 0, (hot + 1) // 2 * 2 + 1, 0)


@gluon.jit
def load_values(work, OPTIONS: gl.constexpr):
    """Load values of the tiles that are masked or not skipped: the part of one warp."""
    descriptors, buffers, mail, barriers, votes, problem = work
    values, value_memory = descriptors[2], buffers[2]
    posted_items = mail[0]
    posted, done, loaded, freed, decided, keys_loaded, keys_freed = barriers
    VALUE_BYTES: gl.constexpr = OPTIONS.block_n * OPTIONS.block_dv * 2
    step = 0
    key_step = 0
    vote = 0
    post = 0
    idle = 0
    while idle < 2:
        slot = post % SLOTS
        memory = posted_items.index(slot)
        mbarrier.wait(posted.index(slot), post // SLOTS & 1)
        item = read_number(memory.slice(0, 1))
        idle = gl.where(item < 0, idle + 1, 0)
        if item >= 0:
            tiles, masked, first_key = read_numbers(memory, 6, 3)
            kv_head = read_number(memory.slice(2, 1)) // problem[1][1]
            place = visits_of(item % ONLINE, problem[6])[0]
            # Keys stay until the vote on them has been read, so that votes are not overwritten before.
            for _ in range(masked):
                stage = key_step % KEY_STAGES
                mbarrier.wait(keys_loaded.index(stage), key_step // KEY_STAGES & 1)
                mbarrier.arrive(keys_freed.index(stage), count=1)
                key_step += 1
            for index in range(masked + loads_of_hot(tiles - masked)):
                is_wanted = gl.where(index < masked, 1, 0)
                for warpgroup in gl.static_range(WARPGROUPS):
                    if is_wanted == 0:
                        is_wanted = find_vote(vote, votes, decided, warpgroup)
                if is_wanted != 0:
                    stage = step % VALUE_STAGES
                    tile = find_tile(index, place, masked, problem, OPTIONS)
                    row = first_key + tile // OPTIONS.block_n * OPTIONS.block_n
                    mbarrier.wait(freed.index(stage), (step // VALUE_STAGES & 1) ^ 1)
                    mbarrier.expect(loaded.index(stage), VALUE_BYTES)
                    load_rows(values, row, kv_head, loaded.index(stage), value_memory.index(stage), OPTIONS)
                    step += 1
                for warpgroup in gl.static_range(WARPGROUPS):
                    mbarrier.wait(decided.index(vote % VOTES + warpgroup * VOTES), vote // VOTES & 1)
                mbarrier.arrive(keys_freed.index(key_step % KEY_STAGES), count=1)
                vote += 1
                key_step += 1
        mbarrier.arrive(done.index(slot), count=1)
        post += 1


@gluon.jit
def post_vote(flags, vote, votes, decided, WARPGROUP: gl.constexpr):
    """Tell whether any of this warpgroup's ``flags``, ``[ROWS, 4]``, two a thread, is above 0; return it as 0 or 1."""
    # [warps, lanes]
    of_warps = gl.sum(flags.reshape([ROWS // 16, 2, 8, 4]), 1).reshape([ROWS // 16, 32])
    place = vote % VOTES + WARPGROUP * VOTES
    votes.index(place).store(gl.max(of_warps, 1))
    found = read_vote(votes.index(place))
    mbarrier.arrive(decided.index(place), count=1)
    return found


@gluon.jit
def find_vote(vote, votes, decided, WARPGROUP: gl.constexpr):
    """Wait for a warpgroup's vote and return it, 0 or 1."""
    place = vote % VOTES + WARPGROUP * VOTES
    mbarrier.wait(decided.index(place), vote // VOTES & 1)
    return read_vote(votes.index(place))


@gluon.jit
def read_vote(memory):
    """Return 1 if any of a warpgroup's warps has told a number above 0."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([ROWS // 16], [32], [gl.num_warps()], [0])
    return gl.minimum(gl.max(memory.load(LAYOUT), 0), 1)


@gluon.jit
def largest_in_thread(tile):
    """Return the largest of what a thread has of each row, without a shuffle: ``[ROWS, 4]``."""
    return gl.max(gl.max(tile.reshape([ROWS, tile.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def multiply(step, query, zeros, key_memory, loaded, OPTIONS: gl.constexpr):
    """Begin to multiply queries with the next tile of keys."""
    stage = step % KEY_STAGES
    mbarrier.wait(loaded.index(stage), step // KEY_STAGES & 1)
    keys = key_memory.index(stage).reshape([OPTIONS.block_n, OPTIONS.block_d]).permute([1, 0])
    return warpgroup_mma(query, keys, zeros, use_acc=False, is_async=True)


@gluon.jit
def vote_on(products, bound, exists, vote, votes, decided, WARPGROUP: gl.constexpr):
    """Tell whether any product of a tile reaches its query's bound, and return it."""
    largest = largest_in_thread(products)
    return post_vote(((largest >= spread(bound, largest)) & exists).to(gl.int32), vote, votes, decided, WARPGROUP)


@gluon.jit
def advance(
    products, own, exists, exists_next, state, query, zeros, shift, bound, to_log2, memories, votes, barriers,
    WARPGROUP: gl.constexpr, OPTIONS: gl.constexpr,
):  # fmt: skip
    """Take a tile whose products are there into the softmax, or skip it, and multiply queries with the next keys.

    Where values are multiplied, the vote on the next tile comes beside that; else beside the product after it.
    """
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OPTIONS.block_dv, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    step, value_step, vote, accumulator, partial_sum = state
    key_memory, value_memory = memories
    loaded, freed, values_loaded, values_freed, decided = barriers
    coming = multiply(step, query, zeros, key_memory, loaded, OPTIONS)
    if own == UNKNOWN:
        own = vote_on(products, bound, exists, vote, votes, decided, WARPGROUP)
    is_kept = own
    if own == 0:
        is_kept = find_vote(vote, votes, decided, 1 - WARPGROUP)
    if is_kept != 0:
        weights = gl.exp2(products * to_log2 - spread(shift, products))
        partial_sum += gl.convert_layout(sum_in_thread(weights, OPTIONS), partial_sum.type.layout, assert_trivial=True)
        weights = gl.convert_layout(weights.to(query.dtype), OPERAND, assert_trivial=True)
        stage = value_step % VALUE_STAGES
        mbarrier.wait(values_loaded.index(stage), value_step // VALUE_STAGES & 1)
        values = value_memory.index(stage).reshape([OPTIONS.block_n, OPTIONS.block_dv])
        accumulator = warpgroup_mma(weights, values, accumulator, is_async=True)
        following = warpgroup_mma_wait(1, deps=[coming])
        mbarrier.arrive(freed.index(step % KEY_STAGES), count=1)
        own = vote_on(following, bound, exists_next, vote + 1, votes, decided, WARPGROUP)
        accumulator = warpgroup_mma_wait(0, deps=[accumulator])
        mbarrier.arrive(values_freed.index(stage), count=1)
        value_step += 1
    else:
        following = warpgroup_mma_wait(0, deps=[coming])
        mbarrier.arrive(freed.index(step % KEY_STAGES), count=1)
        own = own * 0 + UNKNOWN
    return following, own, (step + 1, value_step, vote + 1, accumulator, partial_sum)


@gluon.jit
def attend_item(
    slot, item, counters, query_memory, memories, mail, votes, overflows, barriers, cleared, pointers, out_strides,
    problem, numbers, margin_ptr, WARPGROUP: gl.constexpr, OPTIONS: gl.constexpr,
):  # fmt: skip
    """Compute one warpgroup's queries of the item that is posted in a slot; see :func:`.hopper.attend_item`."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OPTIONS.block_n, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OPTIONS.block_dv, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    step, value_step, vote, clearings = counters
    key_memory, value_memory = memories
    loaded, freed, values_loaded, values_freed, decided = barriers
    posted_items, tiles_of_stages, _, _ = mail
    query = query_memory.reshape([ROWS, OPTIONS.block_d])
    memory = posted_items.index(slot)
    row_start, head, first_query, query_length, length, tiles, masked = read_numbers(memory, 1, 7)
    num_sinks, window, sliding_window = problem[5]
    diagonal = length - query_length + row_start
    margin = gl.load(margin_ptr + item % ONLINE % problem[6][2])
    row_start += WARPGROUP * ROWS
    if not OPTIONS.sparse_decode:
        window = gl.where(query_length == 1, length, window)
    rules = (length - query_length, length, num_sinks, window, sliding_window)
    # [ROWS]; what lies before the first row or past the last one counts as that one and is not stored.
    rows = row_start + gl.arange(0, ROWS, ROW)
    stored = (rows >= 0) & (rows < query_length)
    positions = length - query_length + gl.maximum(gl.minimum(rows, query_length - 1), 0)

    accumulator = gl.full([ROWS, OPTIONS.block_dv], 0, gl.float32, OUTPUT)
    running_max = gl.full([ROWS], float("-inf"), gl.float32, ROW)
    zeros = gl.full([ROWS, OPTIONS.block_n], 0, gl.float32, SCORES)
    partial_sum = sum_in_thread(zeros, OPTIONS)
    if pointers[2] is not None:
        sink_logit = gl.load(pointers[2] + head).to(gl.float32) * 1.4426950408889634
        running_max = gl.full([ROWS], 0, gl.float32, ROW) + sink_logit
        columns = gl.arange(0, partial_sum.shape[1], gl.SliceLayout(0, partial_sum.type.layout))
        partial_sum += gl.where(columns == 0, 1.0, 0.0)[None, :]

    part = split_groups(zeros, OPTIONS)[0]  # for its layout
    q_pos = spread(positions, part)
    offsets = gl.arange(0, part.shape[1], gl.SliceLayout(0, part.type.layout))[None, :]
    reference = gl.full([ROWS], float("-inf"), gl.float32, ROW)
    for _ in range(masked):
        stage = step % KEY_STAGES
        products = multiply(step, query, zeros, key_memory, loaded, OPTIONS)
        products = warpgroup_mma_wait(0, deps=[products])
        tile = read_number(tiles_of_stages.index(stage))
        mbarrier.arrive(freed.index(stage), count=1)
        step += 1
        first = tile // OPTIONS.block_n * OPTIONS.block_n
        _, _, largest = select_scores(
            products, q_pos, first + offsets, rules, (), None, OPTIONS, True,
            gl.where((first == diagonal) & (tile == first), 0, UNLISTED),
        )  # fmt: skip
        reference = gl.maximum(reference, gl.convert_layout(gl.max(largest, 1), ROW))
    # Nothing reaches NaN: rows without a query, which may hold anything, ask for no tile.
    bound = gl.where(stored, reference + margin / numbers[0], float("nan"))

    for _ in range(masked):
        stage = step % KEY_STAGES
        products = multiply(step, query, zeros, key_memory, loaded, OPTIONS)
        products = warpgroup_mma_wait(0, deps=[products])
        tile = read_number(tiles_of_stages.index(stage))
        mbarrier.arrive(freed.index(stage), count=1)
        step += 1
        first = tile // OPTIONS.block_n * OPTIONS.block_n
        behind = q_pos - (first + offsets)
        is_other = (behind >= window) & (first + offsets >= num_sinks)
        reaches = is_other & (products >= spread(bound, products))
        flags = gl.max(gl.max(reaches.to(gl.int32).reshape([ROWS, OPTIONS.block_n // 8, 4, 2]), 3), 1)
        own = post_vote(flags, vote, votes, decided, WARPGROUP)
        is_kept = (own + find_vote(vote, votes, decided, 1 - WARPGROUP) > 0) | (first == diagonal)
        vote += 1
        weights, tile_sum, rescale, running_max, _ = update_softmax(
            products, gl.where(is_kept, tile, first + UNLISTED), positions, running_max, rules, numbers, (), None,
            False, OPTIONS, True, False,
        )  # fmt: skip
        partial_sum = add_sum(partial_sum, tile_sum, rescale, None, False)
        accumulator = accumulator * spread(rescale, accumulator)
        stage = value_step % VALUE_STAGES
        mbarrier.wait(values_loaded.index(stage), value_step // VALUE_STAGES & 1)
        if first + OPTIONS.block_n > length:
            clear_rows(value_memory.index(stage), first, length, WARPGROUP, OPTIONS)
            mbarrier.arrive(cleared, count=1)
            mbarrier.wait(cleared, clearings & 1)
            clearings += 1
        values = value_memory.index(stage).reshape([OPTIONS.block_n, OPTIONS.block_dv])
        weights = gl.convert_layout(weights[0].to(query.dtype), OPERAND, assert_trivial=True)
        accumulator = warpgroup_mma(weights, values, accumulator, is_async=True)
        accumulator = warpgroup_mma_wait(0, deps=[accumulator])
        mbarrier.arrive(values_freed.index(stage), count=1)
        value_step += 1

    hot = tiles - masked
    if hot > 0:
        to_log2 = numbers[0] * 1.4426950408889634
        products = multiply(step, query, zeros, key_memory, loaded, OPTIONS)
        products = warpgroup_mma_wait(0, deps=[products])
        mbarrier.arrive(freed.index(step % KEY_STAGES), count=1)
        own = hot * 0 + UNKNOWN
        state = (step + 1, value_step, vote, accumulator, partial_sum)
        for index in range(0, hot, 2):
            # Twice, so that products need not change their registers.
            following, own, state = advance(
                products, own, True, index + 1 < hot, state, query, zeros, running_max, bound, to_log2, memories,
                votes, barriers, WARPGROUP, OPTIONS,
            )  # fmt: skip
            products, own, state = advance(
                following, own, index + 1 < hot, index + 2 < hot, state, query, zeros, running_max, bound,
                to_log2, memories, votes, barriers, WARPGROUP, OPTIONS,
            )  # fmt: skip
        step, value_step, vote, accumulator, partial_sum = state
        if own == UNKNOWN:  # on the product that is ahead, which the loader of values expects
            vote_on(products, bound, False, vote, votes, decided, WARPGROUP)
        vote += 1

    store_item(
        accumulator, partial_sum, running_max, tiles > masked, rows, row_start, query, overflows, pointers, out_strides,
        (head, first_query, query_length), problem[1], OPTIONS,
    )  # fmt: skip
    return step, value_step, vote, clearings


@gluon.jit
def attend_items(work, margin_ptr, WARPGROUP: gl.constexpr, OPTIONS: gl.constexpr):
    """Compute the items that are posted: the part of a warpgroup."""
    buffers, mail, votes, posts, barriers, cleared, pointers, out_strides, problem, numbers = work
    query_memory, key_memory, value_memory = buffers
    posted_items, _, overflows, _ = mail
    posted, done, query_loaded = posts
    counters = (0, 0, 0, 0)
    post = 0
    idle = 0
    while idle < 2:
        slot = post % SLOTS
        mbarrier.wait(posted.index(slot), post // SLOTS & 1)
        item = read_number(posted_items.index(slot).slice(0, 1))
        if item >= 0:
            mbarrier.wait(query_loaded.index(slot), post // SLOTS & 1)
            counters = attend_item(
                slot, item, counters, query_memory.index(WARPGROUPS * slot + WARPGROUP), (key_memory, value_memory),
                mail, votes, overflows.index(WARPGROUPS * slot + WARPGROUP), barriers, cleared, pointers, out_strides,
                problem, numbers, margin_ptr, WARPGROUP, OPTIONS,
            )  # fmt: skip
        mbarrier.arrive(done.index(slot), count=1)
        post += 1
        idle = gl.where(item < 0, idle + 1, 0)


@gluon.jit(
    do_not_specialize=["batch", "tiles_per_head", "heads_per_wave", "num_sinks", "window", "sliding_window",
                       "list_rows", "visits_stride", "heads_per_list"]
)  # fmt: skip
def skip_forward_hopper(
    query_descriptor, key_descriptor, value_descriptor, out_ptr, lse_ptr, sink_logits_ptr, counter_ptr, margin_ptr,
    out_strides, sequences, heads_of, numbers, batch, tiles_per_head, heads_per_wave, num_sinks, window, sliding_window,
    visits_ptr, order_ptr, list_rows, visits_stride, heads_per_list, OPTIONS: gl.constexpr,
):  # fmt: skip
    """Compute attention with skip-softmax of packed sequences, and its log-sum-exp.

    ``margin_ptr`` is the logarithm of each query block's threshold; the rest is as in
    :func:`modelopt_lite.kernels.hopper.forward.attention_forward_hopper` with lists.
    """
    ELEMENT: gl.constexpr = query_descriptor.dtype
    query_memory = gl.allocate_shared_memory(
        ELEMENT, [SLOTS * WARPGROUPS, ROWS, 1, OPTIONS.block_d], query_descriptor.layout
    )
    TILE: gl.constexpr = [1, OPTIONS.block_n, 1, 1]
    key_memory = gl.allocate_shared_memory(ELEMENT, [KEY_STAGES] + TILE + [OPTIONS.block_d], key_descriptor.layout)
    value_memory = gl.allocate_shared_memory(
        ELEMENT, [VALUE_STAGES] + TILE + [OPTIONS.block_dv], value_descriptor.layout
    )
    NUMBER: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    posted_items = gl.allocate_shared_memory(gl.int32, [SLOTS, NUMBERS], NUMBER)
    tiles_of_stages = gl.allocate_shared_memory(gl.int32, [KEY_STAGES, 1], NUMBER)
    overflows = gl.allocate_shared_memory(gl.int32, [SLOTS * WARPGROUPS, ROWS], NUMBER)
    votes = gl.allocate_shared_memory(gl.int32, [WARPGROUPS * VOTES, ROWS // 16], NUMBER)
    posted = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    done = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    query_loaded = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    loaded = gl.allocate_shared_memory(gl.int64, [KEY_STAGES, 1], BARRIER)
    freed = gl.allocate_shared_memory(gl.int64, [KEY_STAGES, 1], BARRIER)
    values_loaded = gl.allocate_shared_memory(gl.int64, [VALUE_STAGES, 1], BARRIER)
    values_freed = gl.allocate_shared_memory(gl.int64, [VALUE_STAGES, 1], BARRIER)
    decided = gl.allocate_shared_memory(gl.int64, [WARPGROUPS * VOTES, 1], BARRIER)
    cleared = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(posted.index(slot), count=1)
        mbarrier.init(done.index(slot), count=WARPGROUPS + 1)
        mbarrier.init(query_loaded.index(slot), count=1)
    for stage in gl.static_range(KEY_STAGES):
        mbarrier.init(loaded.index(stage), count=1)
        mbarrier.init(freed.index(stage), count=WARPGROUPS + 1)
    for stage in gl.static_range(VALUE_STAGES):
        mbarrier.init(values_loaded.index(stage), count=1)
        mbarrier.init(values_freed.index(stage), count=WARPGROUPS)
    for place in gl.static_range(WARPGROUPS * VOTES):
        mbarrier.init(decided.index(place), count=1)
    mbarrier.init(cleared, count=WARPGROUPS)
    fence_async_shared()
    synchronize()

    keys = (key_descriptor, None, 0)
    values = (value_descriptor, None, 0)
    descriptors = (query_descriptor, keys, values)
    buffers = (query_memory, key_memory, value_memory)
    mail = (posted_items, tiles_of_stages, overflows, None)
    lists = (visits_ptr, order_ptr, list_rows, visits_stride, heads_per_list)
    problem = (sequences, heads_of, batch, tiles_per_head, heads_per_wave, (num_sinks, window, sliding_window), lists)
    barriers = (loaded, freed, values_loaded, values_freed, decided)
    pointers = (out_ptr, lse_ptr, sink_logits_ptr)
    work = (
        buffers, mail, votes, (posted, done, query_loaded), barriers, cleared, pointers, out_strides, problem, numbers,
    )  # fmt: skip
    of_keys = (posted, done, query_loaded, loaded, freed, None, None)
    of_values = (posted, done, values_loaded, values_freed, decided, loaded, freed)
    gl.warp_specialize(
        [
            (attend_items, (work, margin_ptr, 0, OPTIONS)),
            (attend_items, (work, margin_ptr, 1, OPTIONS)),
            (load_keys, ((descriptors, buffers, mail, of_keys, counter_ptr, problem), OPTIONS)),
            (load_values, ((descriptors, buffers, mail, of_values, votes, problem), OPTIONS)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )
