"""The Hopper kernel without a GPU: when it is chosen, what its launch makes sure of, and its machine code.

Like the portable kernel's test, this file runs itself as a program to compile.
"""

import dataclasses
import json
import os
import sys
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from cases import OnGpu, one_sequence
from machine_code import classify, inspect
from test_forward_compile import pretend_gpu, zeros

from modelopt_lite.kernels import AttentionRequest, KeyBlocks
from modelopt_lite.kernels.choice import choose
from modelopt_lite.kernels.hopper import forward_launch as hopper_launch
from modelopt_lite.kernels.hopper import sparse_cores, visits_launch
from modelopt_lite.kernels.hopper.forward import attention_forward_hopper, prepare
from modelopt_lite.kernels.hopper.visits import schedule
from modelopt_lite.kernels.settings import SHORT
from modelopt_lite.kernels.tiles import join_groups, key_of_row, split_groups
from modelopt_lite.kernels.top_n import top_n_plan
from modelopt_lite.plan import DENSE, GROUP_SIZES

BF16, FP16 = torch.bfloat16, torch.float16
SHARED_LIMIT = 227 * 1024
REGISTERS = {2: 168, 3: 128}  # of a thread at the launch, by warpgroups that compute; then they give and take
VARIANTS = [
    # dtype, head_dim, (n, m) or None, causal, with LSE
    (BF16, 128, None, True, True),
    (BF16, 128, (2, 4), True, True),
    (BF16, 128, (2, 4), True, False),
    (BF16, 128, (4, 8), True, False),
    (BF16, 64, (2, 4), False, True),
    (BF16, 64, (2, 4), True, False),
    (BF16, 64, (4, 8), True, False),
    (BF16, 64, (4, 8), True, True),
    (FP16, 64, (2, 4), True, False),
    (FP16, 128, (2, 4), True, True),
    (FP16, 128, (4, 8), True, True),
    (BF16, 128, (8, 16), False, True),
]
LISTED = [
    # the same with lists of key blocks, and the numbers of sinks and recent keys that are exempt
    (BF16, 128, None, True, True, 0, 0),
    (BF16, 128, None, True, False, 4, 64),
    (BF16, 128, (2, 4), True, True, 0, 64),
    (BF16, 128, (4, 8), True, True, 4, 64),
    (FP16, 128, None, True, True, 0, 0),
    (BF16, 64, None, False, True, 0, 0),
    (BF16, 64, (2, 4), True, False, 0, 64),
]
# Shuffles, accesses to shared memory and spills in the hot loop, besides stores that pin the order and never happen.
# With FP16 there are the rows' maxima, two shuffles for each of two rows; with a quick hook warps tell each other
# whether any has to compute again.
TRAFFIC = {
    (FP16, 64, (2, 4)): (4, 0, 0),
    (FP16, 128, None): (4, 0, 0),
    (FP16, 128, (2, 4)): (4, 0, 2),
    (FP16, 128, (4, 8)): (4, 4, 0),
    (BF16, 64, (4, 8)): (0, 4, 0),
    (BF16, 128, (4, 8)): (0, 4, 0),
    (BF16, 128, (8, 16)): (0, 4, 0),
}


def compile_all():
    """Launch all variants for a GPU that is not there.

    Returns:
        The kernels, and how many more are compiled for other lengths and windows.
    """

    def run(lengths, dtype, head_dim, n_of_m, causal, with_lse, sinks=0, window=64, listed=False):
        plan = dataclasses.replace(top_n_plan(*(n_of_m or (0, 4)), 0, 0), num_sink_tokens=sinks)
        plan = dataclasses.replace(plan, dense_window_size=window if listed or n_of_m else 0)
        options = {"is_causal": causal, "softmax_scale": 1.0, "with_lse": with_lse}
        request = zeros(lengths, plan, head_dim=head_dim, dtype=dtype, **options)
        if listed:
            masks = [torch.ones(4, -(-length // 128), -(-length // 128), dtype=torch.bool) for length in lengths]
            request = request._replace(blocks=KeyBlocks.from_masks(masks, 128, 128))
        hopper_launch.prepare(request)(request)

    def number():
        kernels = (attention_forward_hopper, prepare, schedule)
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    found = []
    pretend_gpu(hopper_launch, attention_forward_hopper, prepare, compiled=found)
    pretend_gpu(visits_launch, schedule, compiled=found)
    hopper_launch.processors = lambda device: 132
    for variant in VARIANTS:
        run([300], *variant)
    for variant in LISTED:
        run([300], *variant, listed=True)
    found = [kernel for kernel in found if kernel.metadata.name == "attention_forward_hopper"]
    before = number()
    several = ([1], [16], [17], [1000], [5, 6], [16] * 16)
    for lengths, window in zip(several, (0, 1, 16, 64, 100, 2**40), strict=True):
        run(lengths, *VARIANTS[1], window=window)
    for lengths, window in zip(several, (2, 1, 16, 64, 100, 2**40), strict=True):
        run(lengths, *LISTED[1][:5], sinks=window // 2 + 1, window=window, listed=True)
    return found, number() - before


def request_on_gpu(tokens, dims, dtype, plan, heads=32):
    """Make a request of sequences of so many tokens, and of so many sequences that it is not short."""
    batch = SHORT // (heads * tokens**2) + 1
    q, v = (torch.empty(batch * tokens, heads, dim, dtype=dtype).as_subclass(OnGpu) for dim in dims)
    starts = torch.arange(0, batch * tokens, tokens)
    packing = {"starts": starts, "lengths": torch.full_like(starts, tokens), "max": tokens}
    return one_sequence(q, q, v, plan, **{f"{name}_{side}": x for name, x in packing.items() for side in "qk"})


@pytest.mark.parametrize(
    ("tokens", "dims", "dtype", "plan", "expected"),
    [
        (65, (128, 128), BF16, DENSE, "hopper"),
        (2049, (128, 128), BF16, top_n_plan(2, 4, 0, 64), "hopper"),
        (4096, (128, 128), FP16, top_n_plan(4, 8, 0, 64), "hopper"),
        (4097, (64, 64), BF16, DENSE, "hopper"),
        (2049, (64, 64), BF16, top_n_plan(4, 8, 0, 64), "hopper"),
        (65, (128, 128), BF16, top_n_plan(8, 16, 0, 64), "hopper"),
        (8193, (64, 64), BF16, top_n_plan(8, 16, 0, 64), "hopper"),
        (64, (128, 128), BF16, DENSE, "short"),
        (8192, (64, 64), BF16, top_n_plan(8, 16, 0, 64), "short"),
        (2048, (128, 128), BF16, top_n_plan(2, 4, 0, 64), "short"),
        (2048, (64, 64), BF16, top_n_plan(4, 8, 0, 64), "short"),
        (4096, (64, 64), BF16, top_n_plan(2, 4, 0, 64), "short"),
        (4096, (64, 64), BF16, DENSE, "short"),
        (4096, (128, 128), torch.float32, DENSE, "portable"),
        (4096, (96, 96), BF16, DENSE, "portable"),
        (4096, (128, 64), BF16, DENSE, "portable"),
    ],
)
def test_choice(absent_gpu, monkeypatch, tokens, dims, dtype, plan, expected):
    request = request_on_gpu(tokens, dims, dtype, plan)

    def chosen(request, pinned=""):
        # s_aux keeps the kernel on sparse tensor cores out.
        return choose(request._replace(s_aux=torch.zeros(request.q.shape[1])), "auto", pinned).name

    assert chosen(request) == ("hopper" if expected == "hopper" else "portable")
    assert chosen(request, "portable") == "portable"
    assert chosen(request, "hopper") == ("portable" if expected == "portable" else "hopper")
    with pytest.raises(
        ValueError,
        match="MODELOPT_LITE_KERNEL: 'fast' is not allowed; decode, sparse_cores, hopper, portable or ",
    ):
        chosen(request, "fast")
    short = AttentionRequest(*(x[:tokens] for x in request[:3]), *request[3:])._replace(
        **{name: getattr(request, name)[:1] for name in ("starts_q", "lengths_q", "starts_k", "lengths_k")}
    )
    if tokens < 1024:
        assert chosen(short) == "portable"
    with monkeypatch.context() as patch:
        patch.setattr(hopper_launch, "HOPPER_TRITON", False)
        assert chosen(request) == chosen(request, "hopper") == "portable"
    absent_gpu(100)
    assert chosen(request) == chosen(request, "hopper") == "portable"


def test_what_knows_positions_runs_them(absent_gpu):
    request = request_on_gpu(4097, (128, 128), BF16, DENSE)
    first = torch.zeros_like(request.starts_q)
    for changes in ({"first_q": first}, {"first_k": first}, {"is_causal": False, "sliding_window": 9}):
        moved = request._replace(**changes)
        assert choose(moved).name == choose(moved, pinned="hopper").name == "portable"
    assert choose(request).name == choose(request._replace(sliding_window=9)).name == "hopper"


def test_choice_knows_every_group():
    assert all(set(up_to) == {0, *GROUP_SIZES} for up_to in hopper_launch.PORTABLE_UP_TO.values())


class Tiles(NamedTuple):
    """Those of the kernels' options that say where keys lie in a tile."""

    group: int
    pair: int


class Recorder:
    """In the place of a kernel: keeps what it is launched with."""

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **options):
        self.arguments = arguments


@pytest.fixture
def launch_for(absent_gpu, monkeypatch):
    """Launch for a few queries, and return what the kernel gets of keys and values, and its results."""
    recorder = Recorder()
    monkeypatch.setattr(hopper_launch, "attention_forward_hopper", recorder)

    def launch_for(k, v, group, tokens=1):
        q = torch.zeros(tokens, 3, k.shape[2], dtype=BF16)
        plan = DENSE if group == 1 else top_n_plan(1, group, 0, 0)
        request = one_sequence(q, k, v, plan, lengths_q=torch.tensor([1]), max_q=1)
        results = hopper_launch.prepare(request)(request)
        keys, values, key_tail, value_tail, tail_start = recorder.arguments[1:6]
        return ((keys, key_tail), (values, value_tail)), tail_start, results

    return launch_for


@pytest.mark.parametrize(("group", "head_dim"), [(2, 64), (4, 64), (1, 128), (2, 128), (4, 128), (8, 128), (16, 128)])
def test_boxes_hold_the_rows_of_their_tiles(launch_for, monkeypatch, group, head_dim):
    """What boxes of the accelerator would find is right up to the last row, and all that they can reach is memory."""
    monkeypatch.setattr(hopper_launch, "prepare_kernel", Recorder())
    block_n = hopper_launch.hopper_settings(BF16, head_dim, group).block_n
    # [pairs of a group, groups of a tile, keys of a pair]
    shape = (-(-group // 2), block_n // group, min(group, 2))
    pair, number, place = (torch.arange(size).view(-1, *(1,) * (2 - dim)) for dim, size in enumerate(shape))
    heads = 1000 * torch.arange(3)
    # Every remainder of a group's size, and the ends of tiles.
    for rows in sorted({*range(1, 401, 3), *(end + more for end in (64, 128, 192, 256, 384) for more in (-1, 0, 1))}):
        # [rows, heads, 2]; keys and values lie beside each other, and nothing lies behind the last row
        marks = torch.arange(rows)[:, None, None] + heads[:, None] + torch.tensor([0, 500])
        k, v = marks.to(torch.int16).repeat_interleave(head_dim, 2)[:, 1:].split(head_dim, 2)
        pairs, tail_start, _ = launch_for(k, v, group)
        # [first rows of tiles, *shape]
        first = torch.arange(rows)[:, None, None, None]
        expected = first + 2 * pair + group * number + place
        for x, (whole, tail) in zip((k, v), pairs, strict=True):
            if tail is not None:
                tail.base.fill_(-1)[: rows - tail_start] = x[tail_start:]
            for descriptor, start in ((whole, 0), (tail, tail_start)):
                tiles = (first < tail_start if descriptor is whole else first >= tail_start).flatten()
                if not tiles.any():
                    continue
                # Refused if any of it is outside of the storage.
                memory = descriptor.base.as_strided(descriptor.shape, descriptor.strides)
                assert descriptor.block_shape == [*expected.shape[1:], 1, head_dim]
                row = first[tiles]
                firsts = (row % group // shape[2], (row - start) // group, row % shape[2])
                places = torch.broadcast_tensors(*(x + y for x, y in zip(firsts, (pair, number, place), strict=True)))
                inside = torch.stack([x < size for x, size in zip(places, memory.shape, strict=False)]).all(0)
                found = torch.full(inside.shape, -1)
                found[inside] = memory[(*(x[inside] for x in places), 1, -1)].long()
                exist = expected[tiles] < rows
                assert torch.equal(found[exist], expected[tiles][exist] + x[0, 1, -1])


@triton.jit
def groups_of_rows(out_ptr, joined_ptr, BLOCK_N: tl.constexpr, OPTIONS: tl.constexpr):
    """Store the keys in a tile's rows, split into the places of groups, and joined again."""
    keys = key_of_row(tl.arange(0, BLOCK_N), BLOCK_N, OPTIONS.group, OPTIONS.pair)[None, :]
    parts = split_groups(keys, OPTIONS)
    groups = tl.arange(0, BLOCK_N // OPTIONS.group)[None, :]
    for place in tl.static_range(OPTIONS.group):
        tl.store(out_ptr + place * (BLOCK_N // OPTIONS.group) + groups, parts[place])
    tl.store(joined_ptr + tl.arange(0, BLOCK_N)[None, :], join_groups(parts, OPTIONS) - keys)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
@pytest.mark.parametrize("pair", [1, 2])
@pytest.mark.parametrize("group", [2, 4, 8, 16])
def test_places_of_groups(group, pair):
    block_n = 64
    places, differences = torch.full((group, block_n // group), -1), torch.full((block_n,), -1)
    groups_of_rows[(1,)](places, differences, block_n, Tiles(group, pair))
    assert torch.equal(places, torch.arange(block_n).view(-1, group).T)
    assert not differences.any()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
@pytest.mark.parametrize(("group", "rows"), [(1, 300), (2, 1), (2, 301), (4, 128), (8, 263), (16, 400)])
def test_prepare(launch_for, poison, group, rows):
    k, v = torch.randn(rows, 5, 256).to(BF16)[:, 2:].split(128, 2)
    pairs, tail_start, (out, lse) = launch_for(k, v, group, tokens=70)
    for x, (_, tail) in zip((k, v), pairs, strict=True):
        assert (tail is None) == (group == 1)
        assert tail is None or torch.equal(tail.base[: rows - tail_start], x[tail_start:])
    assert out[0].isnan().all()  # which the other kernel writes
    assert not out[1:].any()
    assert lse[1:].isneginf().all()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
@pytest.mark.parametrize("rows", [3, 128, 300])
def test_prepare_copies_keys_alone(absent_gpu, monkeypatch, rows):
    """For the kernel on sparse tensor cores."""
    launches = []
    monkeypatch.setattr(sparse_cores, "_tensor_map", lambda *arguments: None)
    monkeypatch.setattr(sparse_cores, "_Launch", lambda *prepared: lambda *each: launches.append((*prepared, *each)))
    q, k, v = torch.randn(70, 4, 128).to(BF16), *torch.randn(rows, 4, 128).to(BF16).split(2, 1)
    request = one_sequence(q, k, v, top_n_plan(2, 4, 0, 0), lengths_q=torch.tensor([1]), max_q=1)
    sparse_cores.prepare(request)(request)
    ((_, _, _, numbers, *_, key_tail, _),) = launches
    start = numbers.tail_start
    assert start == max(0, rows - 128)
    assert key_tail.shape == (256, 2, 128)
    assert torch.equal(key_tail[: rows - start], k[start:])


@pytest.mark.parametrize("kernel", [hopper_launch, sparse_cores], ids=["hopper", "sparse_cores"])
def test_too_many_items_are_refused(absent_gpu, kernel):
    q, starts = torch.zeros(2, 1, 128, dtype=BF16), torch.zeros(2, dtype=torch.int32)
    packing = {"starts": starts, "lengths": starts, "max": 2**37}
    both = {f"{name}_{side}": x for name, x in packing.items() for side in "qk"}
    with pytest.raises(ValueError, match="max_q: 137438953472 is not allowed with 2 sequences and 1 heads; pass fewer"):
        kernel.prepare(one_sequence(q, q, q, top_n_plan(2, 4, 0, 0), **both))


@pytest.mark.slow
@pytest.mark.parametrize(
    "index", range(len(VARIANTS + LISTED)), ids=lambda i: "-".join(map(str, (VARIANTS + LISTED)[i]))
)
def test_kernel_fits_the_gpu(compiled, index):
    dtype, head_dim, n_of_m, _, with_lse = (VARIANTS + LISTED)[index][:5]
    settings = hopper_launch.hopper_settings(dtype, head_dim, n_of_m[1] if n_of_m else 1, index >= len(VARIANTS))
    found = compiled[index]
    loop = classify(found["hot loop"])
    assert found["shared"] <= SHARED_LIMIT
    assert found["registers"] == REGISTERS[settings.block_m // 64]
    # instructions that take 16 keys of the values, or 16 dimensions
    in_matrix_units = settings.block_m == 192 and n_of_m is not None and not with_lse
    sums = settings.block_n // 16 if in_matrix_units else 0
    assert loop["matrix"] == settings.block_n // 16 + head_dim // 16 + sums
    pins = (8 if settings.block_n == 128 else 0) + (0 if in_matrix_units else 1)
    assert loop["shared memory"] >= pins
    traffic = (loop["shuffles"], loop["shared memory"] - pins, loop["spills"])
    limits = TRAFFIC.get((dtype, head_dim, n_of_m), (0, 0, 0))
    assert all(x <= limit for x, limit in zip(traffic, limits, strict=True)), traffic


@pytest.mark.slow
def test_run_time_numbers_do_not_recompile(compiled):
    assert compiled[-1] == 0


if __name__ == "__main__":
    kernels, more = compile_all()
    for kernel in kernels:
        sys.stdout.write(json.dumps(inspect(kernel)) + "\n")
    sys.stdout.write(f"{more}\n")
