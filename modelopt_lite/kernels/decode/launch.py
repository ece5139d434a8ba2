"""Launches the kernels for few queries over many keys: decode, and steps of a few tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...plan import DENSE
from ..device import Launch, cdiv, processors
from ..portable.launch import results_of
from ..request import MAX_QUERIES, AttentionRequest
from ..settings import (
    SMALL,
    Options,
    Settings,
    block_dim,
    capability_of,
    distances,
    gpu_refusal,
    hook_arguments,
    options_of,
    refuses_blocks,
)
from .kernel import attend_pieces, merge_pieces

MAX_BATCH = 4096
"""Sequences up to which they run, as every program looks at all lengths."""
MAX_HEAD_DIM = 576
"""The largest head_dim, that of keys which hold a compressed value and a rotary part; values go up to 512."""
MAX_PROGRAMS = 2**31 - 1
LEAST_KEYS = 256
"""Keys of the longest sequence from which on splitting them pays; below, merging costs as much as it saves."""
IN_TURNS = 8
"""Pieces on each multiprocessor, beside one of each unit, where they run in turns."""
MERGED_ELEMENTS = 8192
"""Elements of pieces that a program merges at one time: 64 registers a thread."""
MERGE_WARPS = 4


class DecodeSettings(NamedTuple):
    """How the kernels are launched.

    Attributes:
        block_n: keys a tile.
        num_warps: warps a program.
        num_stages: tiles that are loaded ahead, and the one in use.
        programs: how many pieces there are to be on each multiprocessor, if all run together.
        least_tiles: tiles that a piece has at least, if its sequence has so many.
        peel: whether tiles that need no masks run in a loop of their own, which is faster for each, but waits once more
            for memory before the others.
    """

    block_n: int
    num_warps: int
    num_stages: int
    programs: int
    least_tiles: int
    peel: bool


class DecodeRow(NamedTuple):
    """Settings for GPUs from ``capability`` on and everything up to the other bounds; ``rows`` are a unit's."""

    capability: int
    itemsize: int
    block_d: int
    rows: int
    group: int
    settings: DecodeSettings


# The first row that fits. For capability 90 and up to 16 rows, a head_dim of 128 is what benchmarks/decode.py --tune
# found fastest on an H200 with BF16, when batches were divided in another way; the others fit the GPU, and have not
# been tuned.
# settings: block_n, num_warps, num_stages, programs, least_tiles, peel
SETTINGS = (
    DecodeRow(90, 2, 64, 16, 1, DecodeSettings(128, 4, 3, 2, 2, False)),
    DecodeRow(90, 2, 128, 16, 1, DecodeSettings(64, 4, 3, 2, 4, False)),
    DecodeRow(90, 2, 128, 16, 8, DecodeSettings(128, 4, 2, 4, 2, True)),
    DecodeRow(90, 2, 128, 64, 1, DecodeSettings(64, 4, 3, 4, 4, True)),
    DecodeRow(90, 2, 128, 64, 8, DecodeSettings(64, 8, 3, 4, 4, True)),
    DecodeRow(90, 2, 128, 64, 16, DecodeSettings(128, 8, 2, 4, 2, True)),
    DecodeRow(90, 2, 256, 64, 16, DecodeSettings(64, 8, 2, 4, 2, True)),
    DecodeRow(90, 2, 1024, 64, 16, DecodeSettings(32, 8, 2, 2, 4, True)),
    DecodeRow(SMALL, 2, 128, 64, 16, DecodeSettings(64, 8, 2, 4, 4, True)),
    DecodeRow(SMALL, 2, 256, 64, 16, DecodeSettings(32, 8, 2, 4, 4, True)),
    DecodeRow(SMALL, 2, 1024, 64, 16, DecodeSettings(16, 8, 1, 2, 4, True)),
    DecodeRow(SMALL, 4, 128, 64, 16, DecodeSettings(32, 8, 2, 4, 4, True)),
    DecodeRow(SMALL, 4, 256, 64, 16, DecodeSettings(16, 4, 2, 4, 4, True)),
    DecodeRow(SMALL, 4, 1024, 64, 16, DecodeSettings(16, 8, 1, 2, 4, True)),
)


class Split(NamedTuple):
    """What the kernels know at compile time beside the score hook and :class:`~modelopt_lite.kernels.settings.Options`.

    Attributes:
        kv_heads: heads of the keys.
        heads_per_kv: query heads that share one.
        single: whether there is one sequence.
        batch_block: an upper bound of the sequences, a power of two.
        sizes: how many sizes of pieces are tried.
        rows: rows of a slot.
        block_tail: width of the part of ``head_dim`` behind ``block_d``, or 0.
        page_size: see :class:`~modelopt_lite.kernels.request.AttentionRequest`.
        peel: see :class:`DecodeSettings`.
        merge_block: pieces that are merged at one time.
        overlaps: whether the second kernel starts while the first one runs.
    """

    kv_heads: int
    heads_per_kv: int
    single: bool
    batch_block: int
    sizes: int
    rows: int
    block_tail: int
    page_size: int
    peel: bool
    merge_block: int
    overlaps: bool


def refusal(request: AttentionRequest) -> str | None:
    """Say why the kernels cannot run a request, or None if they can."""
    r = request
    if (reason := gpu_refusal(r) or refuses_blocks(r)) is not None:
        return reason
    if r.max_q > MAX_QUERIES:
        return f"there are up to {r.max_q} queries in a sequence, above {MAX_QUERIES}"
    if r.starts_q.shape[0] > MAX_BATCH:
        return f"there are {r.starts_q.shape[0]} sequences, above {MAX_BATCH}"
    if r.q.shape[2] > MAX_HEAD_DIM or r.v.shape[2] > 512:
        return f"head dimensions are {r.q.shape[2]} and {r.v.shape[2]}, above {MAX_HEAD_DIM} and 512"
    tiles = r.starts_q.shape[0] * r.q.shape[1] * r.max_q * cdiv(r.max_k, 16)
    if max(tiles, r.q.shape[0] * r.q.shape[1]) > MAX_PROGRAMS:
        return "there are more tiles than 32 bits count"
    return None


def pays(request: AttentionRequest) -> bool:
    """Whether the kernels are faster than those that do not split keys; to be asked only of what is not refused."""
    return request.max_q <= MAX_QUERIES and request.max_k >= LEAST_KEYS


def prepare(
    request: AttentionRequest, settings: DecodeSettings | None = None
) -> Callable[[AttentionRequest], tuple[Tensor, Tensor | None]]:
    """Compute what requests of one signature have in common; as :func:`modelopt_lite.kernels.portable.launch.prepare`.

    Args:
        request: one of them; :func:`refusal` has been asked.
        settings: instead of the table's.
    """
    r = request
    if r.max_q == 1 and not r.plan.sparse_decode:
        r = r._replace(plan=DENSE)
    (total, query_heads, _), value_dim, batch = r.q.shape, r.v.shape[2], r.starts_q.shape[0]
    settings = settings or default_settings(r)
    options = _options(r, settings)
    units = _units(r, options)
    multiprocessors = processors(r.q.device)
    run_together = 2 * units <= settings.programs * multiprocessors
    split = _split(r, settings, options, run_together)
    max_pieces = _max_pieces(units, settings.programs, multiprocessors, run_together)
    slots = _slots(r, options, units, max_pieces, settings.least_tiles)
    page_stride = 0 if r.page_table is None else r.page_table.stride(0)
    numbers = (r.softmax_scale, r.softcap or 0.0)
    strides = tuple(x.stride()[:2] for x in (r.q, r.k, r.v))
    work = (batch, slots, max_pieces, settings.least_tiles)
    rules = distances(r)
    size = slots * split.rows * (value_dim + 1)
    # The compiler gives the loads of page numbers half of the stages.
    num_stages = 2 * settings.num_stages - 1 if split.page_size else settings.num_stages
    attend = Launch(
        attend_pieces, r.q.device, r.plan.score_hook, options, split,
        num_warps=settings.num_warps, num_stages=num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    overlapping = {"launch_pdl": True} if split.overlaps else {}
    merge = Launch(merge_pieces, r.q.device, options, split, num_warps=MERGE_WARPS, **overlapping)
    hook_args, new_results = hook_arguments(r.plan), results_of(r)

    def run(r: AttentionRequest) -> tuple[Tensor, Tensor | None]:
        out, lse = new_results(r.q)
        if total == 0:
            return out, lse
        partial = torch.empty(size, dtype=torch.float32, device=r.q.device)
        sequences = (r.starts_q, r.lengths_q, r.starts_k, r.lengths_k, r.first_q, r.first_k)
        if slots:
            attend(
                slots, r.q, r.k, r.v, partial, r.page_table, strides, sequences, numbers, *work, page_stride, *rules,
                hook_args,
            )  # fmt: skip
        merge(total * query_heads, partial, out, lse, r.s_aux, sequences, *work, *rules)
        return out, lse

    return run


def default_settings(request: AttentionRequest) -> DecodeSettings:
    """Return the table's settings for a request."""
    r = request
    capability = capability_of(r.q.device)
    if capability in (86, 89) or capability >= 120:
        capability = SMALL
    block_d = block_dim(max(r.q.shape[2], r.v.shape[2]))
    return next(
        row.settings
        for row in SETTINGS
        if capability >= row.capability
        and r.q.dtype.itemsize <= row.itemsize
        and block_d <= row.block_d
        and _block_m(r) <= row.rows
        and r.group <= row.group
    )


def _options(r: AttentionRequest, settings: DecodeSettings) -> Options:
    options = options_of(
        r, Settings(_block_m(r), settings.block_n, settings.num_warps, settings.num_stages, False, False)
    )
    return options._replace(block_d=_blocks_d(r.q.shape[2])[0])


def _split(r: AttentionRequest, settings: DecodeSettings, options: Options, run_together: bool) -> Split:
    batch, kv_heads = r.starts_q.shape[0], r.k.shape[1]
    heads_per_kv = r.q.shape[1] // kv_heads
    # With 1 instead of 2, a head_dim of 576 has no registers left.
    batch_block = 2 if batch == 1 else max(16, 1 << max(0, batch - 1).bit_length())
    return Split(
        kv_heads=kv_heads,
        heads_per_kv=heads_per_kv,
        single=batch == 1,
        batch_block=batch_block,
        # Where pieces run in turns, their size matters little, and each program spends time on finding it.
        sizes=max(1, min(16, 1024 // batch_block)) if run_together else 1,
        rows=min(options.block_m, heads_per_kv * max(1, r.max_q)),
        block_tail=_blocks_d(r.q.shape[2])[1],
        page_size=r.page_size,
        peel=settings.peel,
        merge_block=max(16, MERGED_ELEMENTS // options.block_dv),
        overlaps=capability_of(r.q.device) >= 90,
    )


def _units(r: AttentionRequest, options: Options) -> int:
    """Return how many units there may be."""
    kv_heads = r.k.shape[1]
    return r.starts_q.shape[0] * kv_heads * cdiv(r.q.shape[1] // kv_heads * r.max_q, options.block_m)


def _max_pieces(units: int, programs: int, multiprocessors: int, run_together: bool) -> int:
    """Return how many pieces there may be, all of which run together, or in turns.

    They do the former where each unit can have two. Where it cannot, some would be twice as long as others and run
    alone in the end, so there are more and shorter ones.
    """
    if not run_together:
        return units + IN_TURNS * multiprocessors
    # 16 sequences of 8192 keys take 1 % longer on an H200 if the last few programs are launched, too.
    return programs * multiprocessors - programs * multiprocessors // 64


def _slots(r: AttentionRequest, options: Options, units: int, max_pieces: int, least_tiles: int) -> int:
    """Return how many programs are enough, whatever the lengths."""
    longest = r.max_k
    if r.sliding_window is not None:
        longest = min(longest, (1 if r.is_causal else 2) * r.sliding_window + r.max_q)
    # Keys may begin inside a tile.
    begins_inside = r.has_positions or r.sliding_window is not None
    pieces = cdiv(cdiv(longest, options.block_n) + begins_inside, least_tiles)
    return min(units * pieces, max_pieces)


def _block_m(r: AttentionRequest) -> int:
    """Return how many rows a unit has: few, or as many as a warpgroup multiplies at one time and registers hold."""
    rows = r.q.shape[1] // r.k.shape[1] * r.max_q
    most = 16 if r.q.dtype.itemsize == 4 else 32 if r.v.shape[2] > 256 else 64
    return min(most, block_dim(max(1, rows)))


def _blocks_d(head_dim: int) -> tuple[int, int]:
    """Divide a head dimension into two powers of two, the second of which may be 0, where that is less than one."""
    whole = block_dim(head_dim)
    first = whole // 2
    if head_dim > first >= 16:
        second = block_dim(head_dim - first)
        if first + second < whole:
            return first, second
    return whole, 0
