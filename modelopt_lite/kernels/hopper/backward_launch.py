"""Launches the backward kernel for Hopper GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..device import Described, Launch, cdiv, is_aligned, processors, rebased
from ..portable.launch import gradient_of_sink_logits
from ..request import AttentionRequest, ForwardResult, HookRefusedError
from ..settings import Options, Settings, distances, hook_arguments, options_of
from . import forward_launch as hopper_launch
from .backward import (
    CLEARED,
    DIVIDED,
    KEYS,
    LINE,
    ROWS,
    WARPGROUPS,
    add_parts,
    attention_backward_hopper,
    prepare_gradients,
    round_gradients,
)
from .forward_launch import key_descriptor, shared_descriptor, tail_of
from .visits import TILES_FROM, gather_tiles, mark_tiles

Backward: TypeAlias = (
    "Callable[[Tensor, ForwardResult, AttentionRequest], tuple[Tensor, Tensor, Tensor, Tensor | None]]"
)

SETTINGS = Settings(ROWS.value, KEYS.value, 4, 2, True, False)
HEAD_DIMS = (64, 128)
MAX_GROUP = 8
LONGEST_LISTED = KEYS.value * TILES_FROM.value // 2
"""Tokens of a sequence whose tiles can be numbered in an entry of a list."""
STEPS_OF_LAUNCH = 14
"""How many steps a program could take in the time that one more launch costs."""
DIVIDED_FROM = 8
"""From how many tiles of keys a sequence, on average, the first ones are divided by heads of queries, with lists.

All queries may list the first keys. Their tile is also the first to add to gradients of queries, so others would
wait."""
SLOWER = 1.04
"""How much longer several launches may take, by their steps, as they save memory."""

_UNCOMPILABLE: dict[Any, str] = {}
"""Why Gluon cannot compile a hook."""


def refusal(request: AttentionRequest) -> str | None:
    """Say why the kernel cannot compute a request's gradients, or None if it can."""
    r = request
    if (reason := hopper_launch.refusal(r)) is not None:
        return reason
    if r.blocks is not None and max(r.max_q, r.max_k) > LONGEST_LISTED:
        return f"with lists of key blocks, sequences have more than {LONGEST_LISTED} tokens"
    if r.plan.keeps_nothing:
        return "the plan keeps sinks and recent keys alone"
    if 0 in (r.q.shape[0], r.k.shape[0], r.starts_q.shape[0]):
        return "there are no queries, no keys or no sequences"
    if r.q.shape[2] not in HEAD_DIMS:
        return f"head dimensions are {r.q.shape[2]}, not one of {HEAD_DIMS}"
    if r.group > MAX_GROUP:
        return f"groups have {r.group} keys, more than {MAX_GROUP}"
    return _UNCOMPILABLE.get(r.plan.score_hook)


def pays(request: AttentionRequest) -> bool:
    """Whether the kernel is faster than the portable ones: if there is a tile of keys for each multiprocessor."""
    keys, heads, _ = request.k.shape
    return bool(keys * heads >= KEYS.value * processors(request.q.device))


def readable(grad: Tensor) -> Tensor:
    """Return the gradient of the output as the kernel reads it."""
    is_readable = is_aligned(grad) and grad.stride(2) == 1
    return grad if is_readable else grad.clone(memory_format=torch.contiguous_format)


def prepare(grad: Tensor, request: AttentionRequest) -> Backward:
    """Compute what backward passes of one signature have in common.

    Args:
        grad: gradient of the output, from :func:`readable`, of one of them.
        request: what was computed, of one of them.

    Returns:
        A function like that of :func:`modelopt_lite.kernels.portable.launch.prepare_backward`. Between calls only the
        addresses and contents of tensors may differ. It frees the output, if nobody else holds it, before it allocates
        memory for sums. It raises :class:`~modelopt_lite.kernels.request.HookRefusedError` if Gluon cannot compile the
        plan's hook.
    """
    r, plan, device = request, request.plan, request.q.device
    (total, query_heads, head_dim), kv_heads, batch = r.q.shape, r.k.shape[1], r.starts_q.shape[0]
    options = options_of(r, SETTINGS)._replace(pair=min(r.group, 2))
    tiles = max(1, cdiv(r.max_k, KEYS.value))
    members = query_heads // kv_heads
    heads, shares = kv_heads, 1
    if r.blocks is None:
        heads = heads_of_launch(kv_heads, batch, tiles, members, processors(device), r.is_causal)
    else:
        shares = shares_of(r.k.shape[0], batch, members)
    # With lists, the first and the last tile of a sequence may both have fewer rows.
    query_tiles = total // ROWS.value + batch * (1 if r.blocks is None else 2)
    rows, columns = query_heads * query_tiles, ROWS.value
    rows_of_launch = heads * members * query_tiles
    lines = rows_of_launch * columns * head_dim // LINE.value
    of_rows = _descriptor([rows, columns], [1, columns], 0, device)
    of_sums = _descriptor(
        [lines, LINE.value], [columns * head_dim // WARPGROUPS.value // LINE.value, LINE.value], 128, device
    )
    boxes = options._replace(block_n=ROWS.value)
    of_queries, of_grad = (
        shared_descriptor(x, [*x.shape], [*x.stride()], [ROWS.value, 1, head_dim]) for x in (r.q, grad)
    )
    of_keys, of_values = (key_descriptor(x, boxes) for x in (r.k, r.v))
    tail_rows, tail_start = tail_of(r.k.shape[0], r.group, ROWS.value)
    of_tail = None if tail_rows == 0 else key_descriptor(r.k.new_empty(tail_rows, *r.k.shape[1:]), boxes)
    grad_strides, query_strides, key_strides = (
        grad.stride()[:2],
        (query_heads * head_dim, head_dim),
        (kv_heads * head_dim, head_dim),
    )
    size = r.k.numel()
    before = (query_tiles + cdiv(total, ROWS.value)) * query_heads + batch + cdiv(size, CLEARED.value)
    launch_before = Launch(prepare_gradients, device, head_dim, plan.score_hook is None)
    launch = Launch(
        attention_backward_hopper, device, plan.score_hook, options,
        num_warps=SETTINGS.num_warps, enable_fp_fusion=True, launch_cooperative_grid=True,
    )  # fmt: skip
    parts_size = 2 * batch * query_heads * DIVIDED.value * KEYS.value * head_dim if shares > 1 else 0
    launch_parts = Launch(add_parts, device, head_dim, num_warps=8)
    launch_after = Launch(round_gradients, device, head_dim, plan.score_hook is None)
    prepare_entries, list_numbers = None, (0, 0, 0)
    if r.blocks is not None:
        prepare_entries = Entries(r, tiles, options)
        list_numbers = prepare_entries.of_lists
    programs = min(batch * heads * (tiles + (shares - 1) * DIVIDED.value), processors(device))
    rest = ((r.softmax_scale, r.softcap or 0.0), batch, tiles, *distances(r))
    hook_args = hook_arguments(plan)

    def run(grad: Tensor, result: ForwardResult, r: AttentionRequest) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        shift, delta = (torch.empty(rows, columns, dtype=torch.float32, device=device) for _ in range(2))
        turns = torch.empty(rows + 1, dtype=torch.int32, device=device)  # and a counter of items
        begins = torch.empty(batch, dtype=torch.int32, device=device)
        grad_q = r.q.new_empty(r.q.shape)
        grad_k, grad_v = (x.new_empty(x.shape) for x in (r.k, r.v))
        lengths = (r.lengths_q, None if prepare_entries is None else r.lengths_k)
        out = result.output
        assert out is not None
        launch_before(
            before, grad, out, result.lse, shift, delta, grad_q, turns, begins, grad_k, grad_v,
            (grad_strides, out.stride()[:2], query_strides), r.starts_q, lengths, query_heads, batch, total,
            query_tiles, size,
        )  # fmt: skip
        if launch.compiled is not None:  # so no other kernel has to take over
            result.output = None
        del out
        sums = torch.empty(lines, LINE.value, dtype=torch.float32, device=device)
        tails: list[Any] = [None, None]
        if of_tail is not None:
            tails = [Described(of_tail, _tail(x, tail_rows, tail_start)) for x in (r.k, r.v)]
        entries, parts = None, None
        if prepare_entries is not None:
            entries = prepare_entries(r)
            parts = torch.empty(parts_size, dtype=torch.float32, device=device)
        for first_head in range(0, kv_heads, heads):
            try:
                launch(
                    programs, Described(of_queries, r.q), Described(of_grad, grad), Described(of_keys, r.k),
                    Described(of_values, r.v), *tails, tail_start,
                    Described(of_sums, sums), Described(of_rows, shift), Described(of_rows, delta), grad_k, grad_v,
                    parts, turns, begins, query_tiles, key_strides,
                    (r.starts_q, r.lengths_q, r.starts_k, r.lengths_k), (heads, members, shares), first_head, *rest,
                    entries, *list_numbers, hook_args,
                )  # fmt: skip
            except CompilationError as error:
                if plan.score_hook is None:
                    raise
                _UNCOMPILABLE[plan.score_hook] = f"Gluon cannot compile the hook {plan.score_hook.__name__}: {error}"
                raise HookRefusedError(_UNCOMPILABLE[plan.score_hook]) from None
            launch_after(
                rows_of_launch, sums, shift, turns, grad_q, begins, r.starts_q, lengths, r.softmax_scale, batch,
                query_tiles, first_head * members, heads * members, query_strides,
            )  # fmt: skip
        if shares > 1:
            launch_parts(
                batch * kv_heads * DIVIDED.value, parts, grad_k, grad_v, r.starts_k, r.lengths_k, key_strides, kv_heads,
                shares,
            )  # fmt: skip
        del sums, entries, parts
        of_sinks = None
        if r.s_aux is not None:
            of_sinks = gradient_of_sink_logits(r, shift.view(query_heads, -1), -delta.view(query_heads, -1))
        return grad_q, grad_k, grad_v, of_sinks

    return run


def shares_of(keys: int, batch: int, members: int) -> int:
    """Return how many items, with lists, each of the first tiles of keys of a head is: one, or one for each member.

    Args:
        keys: rows of keys, of all sequences.
        batch: how many sequences.
        members: how many heads of queries share a head of keys.
    """
    return members if keys >= DIVIDED_FROM * KEYS.value * batch else 1


def heads_of_launch(kv_heads: int, batch: int, tiles: int, members: int, programs: int, is_causal: bool) -> int:
    """Return of how many heads of keys a launch computes gradients: as few as are hardly slower than any other number.

    There is memory for the sums of these alone. In long sequences few heads are even faster, as more of what programs
    read is in the L2 cache.

    Args:
        kv_heads: how many heads of keys there are.
        batch: how many sequences.
        tiles: tiles of keys of the longest one.
        members: how many heads of queries share a head of keys.
        programs: how many items are computed at the same time.
        is_causal: whether the n-th last tile has n times as much work as the last one.
    """

    def steps(heads: int) -> int:
        """Return how many steps the program with most of them takes in all launches."""
        waves = cdiv(batch * heads * tiles, programs)
        items = torch.arange(waves * programs, device="cpu").view(waves, programs)
        items[1::2] = items[1::2].flip(1)
        left = (tiles - items // (batch * heads)).clamp(min=0)
        work = left if is_causal else left.sign() * tiles
        longest: int = int(work.sum(0).max()) * members * KEYS.value // ROWS.value
        return kv_heads // heads * (longest + STEPS_OF_LAUNCH)

    found = {heads: steps(heads) for heads in range(1, kv_heads + 1) if kv_heads % heads == 0}
    return next(heads for heads in found if found[heads] <= SLOWER * min(found.values()))


def _descriptor(shape: list[int], box: list[int], swizzle: int, device: torch.device) -> TensorDescriptor:
    """Describe a contiguous FP32 matrix without its address."""
    layout = NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=32, rank=2)
    x = torch.empty(16, dtype=torch.float32, device=device)
    return rebased(TensorDescriptor(x, shape, [shape[1], 1], box, layout), None)


def _tail(x: Tensor, rows: int, start: int) -> Tensor:
    """Copy the last keys or values; see :func:`.forward_launch.tail_of`."""
    copy = x.new_empty(rows, *x.shape[1:])
    copy[: x.shape[0] - start] = x[start:]
    return copy


class Entries:
    """Finds which tiles of queries visit each tile of keys, without waiting for their device."""

    def __init__(self, request: AttentionRequest, tiles: int, options: Options) -> None:
        """Prepare for requests of one signature.

        Args:
            request: one of them, with lists of key blocks.
            tiles: tiles of keys of the longest sequence.
            options: the main kernel's.
        """
        r, blocks = request, request.blocks
        assert blocks is not None
        lists, list_rows = blocks.counts.shape
        rows_each, batch = blocks.block_rows // ROWS.value, r.starts_q.shape[0]
        self.shape = (lists, tiles, list_rows * rows_each)
        self.numbers = (list_rows, blocks.indices.shape[2], rows_each, batch, tiles, *distances(r))
        self.of_lists = (list_rows * rows_each, rows_each, r.q.shape[1] // lists)
        self.mark = Launch(mark_tiles, r.q.device, r.plan.score_hook is not None, options, num_warps=4)
        self.gather = Launch(gather_tiles, r.q.device, num_warps=1)

    def __call__(self, request: AttentionRequest) -> tuple[Any, ...]:
        """Launch, and return what :func:`.backward.entries_of` reads."""
        r, blocks = request, request.blocks
        assert blocks is not None
        (lists, tiles, rows), (list_rows, _, rows_each, batch, *_) = self.shape, self.numbers
        counts, indices, starts = (x.contiguous() for x in (blocks.counts, blocks.indices, blocks.starts))
        marks = torch.empty(self.shape, dtype=torch.int32, device=r.q.device)
        # The kernel reads an entry ahead.
        entries = torch.empty(marks.numel() + 1, dtype=torch.int32, device=r.q.device)
        numbers = torch.empty(lists, tiles, batch, 2, dtype=torch.int32, device=r.q.device)
        lengths = (r.lengths_q, r.lengths_k)
        self.mark(lists * rows, marks, counts, indices, starts, lengths, *self.numbers)
        self.gather(lists * tiles * batch, entries, numbers, marks, starts, lengths, list_rows, rows_each, batch, tiles)
        return entries, numbers, starts
