"""Runs the kernel of ``sparse_cores.cu``: 2:4 attention on the sparse tensor cores of Hopper GPUs.

Neither Triton nor Gluon has matrix instructions for sparse operands, so the kernel is CUDA C++.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..device import cdiv, compute_capability, current_stream, heads_per_wave, is_aligned, processors
from ..portable.launch import results_of
from ..request import AttentionRequest
from ..settings import distances, gpu_refusal, is_light, options_of
from ..tiles import LOG2E
from .cuda_code import CudaKernel, check, driver, handle
from .forward_launch import HOPPER, WorkPreparation, hopper_settings
from .visits_launch import Schedule, Visits
from .visits_launch import refusal as lists_refusal

ROWS, TILE = 64, 128
"""Queries of a warpgroup, and keys of a tile."""
LONG = 2048
"""Queries of a sequence, on average, above which three warpgroups are faster than two."""
# Of CUDA's driver interface, cuda.h
FLOAT16, BFLOAT16, NO_INTERLEAVE, SWIZZLE_128_BYTES, L2_256_BYTES, FILL_WITH_ZEROS = 6, 9, 0, 3, 3, 0

NAME = "sparse_cores"
WITHOUT_IT = "2:4 is left to other kernels than sparse_cores, which would be faster"


class Variant(NamedTuple):
    """What is known of a problem when the kernel is compiled.

    Attributes:
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        head_dim: 64 or 128.
        warpgroups: how many compute, 2 or 3: an item has 64 queries for each.
    """

    dtype: torch.dtype
    head_dim: int
    warpgroups: int

    @property
    def item_rows(self) -> int:
        """Queries of an item."""
        return ROWS * self.warpgroups

    @property
    def shared_bytes(self) -> int:
        """Shared memory: two items' queries, the stages of keys and values, barriers, and what alignment may take."""
        stages = 256 // self.head_dim
        return 2 * self.head_dim * (2 * self.item_rows + 2 * stages * TILE) + 512 + 1023

    @property
    def kernel(self) -> CudaKernel:
        """What is compiled for it."""
        sizes = (b"-DDIM=%d" % self.head_dim, b"-DWARPGROUPS=%d" % self.warpgroups)
        types = (b"-DFP16",) if self.dtype == torch.float16 else ()
        return CudaKernel(NAME, "attend", (b"--use_fast_math", *sizes, *types), self.shared_bytes)


def variant_of(request: AttentionRequest) -> Variant:
    """Return the variant that runs a request.

    A head dimension of 64 leaves registers for a third warpgroup. It pays for long sequences, as more of its larger
    items is masked. Lists of visits are for items of 128 queries.
    """
    r, head_dim = request, request.q.shape[2]
    long = r.q.shape[0] > LONG * r.starts_q.shape[0]
    return Variant(r.q.dtype, head_dim, 3 if head_dim == 64 and long and r.blocks is None else 2)


class _Problem(ctypes.Structure):
    """``Problem`` of ``sparse_cores.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("starts_q", "lengths_q", "starts_k", "lengths_k")),
        *((name, ctypes.c_void_p) for name in ("out", "lse", "counter", "visits", "order")),
        *((name, ctypes.c_longlong) for name in ("out_token_stride", "out_head_stride")),
        *((name, ctypes.c_int) for name in ("query_head_stride", "key_head_stride", "value_head_stride", "wide")),
        *((name, ctypes.c_int) for name in ("batch", "heads", "heads_per_kv", "tiles_per_head", "heads_per_wave")),
        *(
            (name, ctypes.c_int)
            for name in ("key_rows", "tail_start", "num_sinks", "window", "causal", "sparse_decode")
        ),
        *((name, ctypes.c_int) for name in ("list_rows", "visits_stride", "heads_per_list")),
        *((name, ctypes.c_float) for name in ("scale", "no_factor")),
    )


def refusal(request: AttentionRequest) -> str | None:
    """Say why the kernel cannot run a request, or None if it can.

    The first time that nothing else is in the way, the kernel is compiled and loaded; if that fails, a warning says
    why. While a CUDA graph is captured, it cannot be loaded.
    """
    r = request
    if (reason := gpu_refusal(r) or lists_refusal(r)) is not None:
        return reason
    if not r.q.is_cuda or compute_capability(r.q.device) != HOPPER:
        return "it is made for GPUs of compute capability 9.0"
    if r.plan.group != 4 or r.plan.keeps_top != 2:
        return "the plan is not 2:4"
    if r.q.dtype not in (torch.bfloat16, torch.float16):
        return f"the tensors are {r.q.dtype}, not torch.float16 or torch.bfloat16"
    if r.q.shape[2] != r.v.shape[2] or r.q.shape[2] not in (64, 128):
        return f"head dimensions are {r.q.shape[2]} and {r.v.shape[2]}, not both 64 or both 128"
    for name, value in (("sliding_window", r.sliding_window), ("softcap", r.softcap), ("s_aux", r.s_aux)):
        if value is not None:
            return f"there is a {name}"
    if r.has_positions:
        return "first positions are given"
    if not all(is_aligned(x) and _width(x) < 2**31 for x in (r.q, r.k, r.v)):
        return "addresses or strides of q, k or v are not multiples of 16 bytes"
    if handle(r.q.device, variant_of(r).kernel, WITHOUT_IT) is None:
        return "it could not be compiled or loaded (a warning says why), or a CUDA graph is being captured"
    return None


def pays(request: AttentionRequest) -> bool:
    """Whether the kernel is the fastest: not with 64 queries, which leave half of a program idle, nor few tiles."""
    r = request
    if not r.q.is_cuda or is_light(r):  # on a CPU, Triton's interpreter runs other kernels
        return False
    items = r.q.shape[0] * r.q.shape[1] / variant_of(r).item_rows
    return r.q.shape[0] > ROWS * r.starts_q.shape[0] and items > 1.5 * processors(r.q.device)


def prepare(request: AttentionRequest) -> Callable[[AttentionRequest], tuple[Tensor, Tensor | None]]:
    """Compute what requests of one signature have in common; as :func:`modelopt_lite.kernels.portable.launch.prepare`.

    Raises:
        RuntimeError: by the function returned, if the kernel cannot be launched.
        ValueError: if there may be more tiles than 32 bits count.
    """
    r, variant = request, variant_of(request)
    total, heads, head_dim = r.q.shape
    batch, tiles = r.starts_q.shape[0], cdiv(min(r.max_q, total), variant.item_rows)
    options = options_of(r, hopper_settings(r.q.dtype, head_dim, r.group, r.blocks is not None))
    tail_start = max(0, r.k.shape[0] - TILE)
    prepare_work = WorkPreparation(r, options, tail_start)
    schedule = None if r.blocks is None else Schedule(r, options)
    items = batch * heads * tiles if schedule is None else heads * schedule.rows
    num_sinks, window, _ = distances(r)
    packing = (r.starts_q, r.lengths_q, r.starts_k, r.lengths_k)
    numbers = _Problem(
        out_token_stride=heads * head_dim,
        out_head_stride=head_dim,
        query_head_stride=r.q.stride(1),
        key_head_stride=r.k.stride(1),
        value_head_stride=r.v.stride(1),
        wide=sum((x.dtype == torch.int64) << index for index, x in enumerate(packing)),
        batch=batch,
        heads=heads,
        heads_per_kv=heads // r.k.shape[1],
        tiles_per_head=tiles,
        heads_per_wave=min(heads_per_wave(r.max_k, r.k, r.v) * (heads // r.k.shape[1]), batch * heads),
        key_rows=r.k.shape[0],
        tail_start=tail_start,
        num_sinks=num_sinks,
        window=window,
        causal=r.is_causal,
        sparse_decode=r.plan.sparse_decode,
        list_rows=0 if schedule is None else schedule.rows,
        visits_stride=0 if schedule is None else schedule.shape[2],
        heads_per_list=0 if schedule is None else schedule.heads_per_list,
        scale=r.softmax_scale * LOG2E.value,
        no_factor=0.0,
    )
    # It loads whole tiles, those that reach past the last key from a copy.
    tail_shape = (2 * TILE, *r.k.shape[1:])
    maps = [
        _tensor_map(r.q, [r.q.shape[0]], [r.q.stride(0)], [ROWS]),
        _key_map(r.k),
        _key_map(r.k.new_empty(*tail_shape)),
        _tensor_map(r.v, [r.v.shape[0]], [r.v.stride(0)], [TILE]),
    ]
    new_results = results_of(r)
    launch = _Launch(r.q.device, variant, min(items, processors(r.q.device)), numbers, maps)

    def run(r: AttentionRequest) -> tuple[Tensor, Tensor | None]:
        out, lse = new_results(r.q)
        if total:
            key_tail = r.k.new_empty(*tail_shape)
            counter = prepare_work(r, out, lse, key_tail, None)
            visits = None if schedule is None else schedule(r)
            launch(r, out, lse, counter, key_tail, visits)
        return out, lse

    return run


class _Launch:
    """The kernel's arguments in the memory that the driver reads them from; only addresses change between launches."""

    def __init__(
        self, device: torch.device, variant: Variant, programs: int, numbers: _Problem, maps: list[Any]
    ) -> None:
        self.device, self.kernel, self.numbers, self.maps = device, variant.kernel, numbers, maps
        self.lock = threading.Lock()
        arguments = (*maps, numbers)
        self.slots = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        threads = 128 * (1 + variant.warpgroups)
        self.sizes = tuple(map(ctypes.c_uint, (programs, 1, 1, threads, 1, 1, variant.shared_bytes)))

    def __call__(
        self,
        r: AttentionRequest,
        out: Tensor,
        lse: Tensor | None,
        counter: Tensor,
        key_tail: Tensor,
        visits: Visits | None = None,
    ) -> None:
        """Launch on the current stream of the device; rows of no sequence are not written."""
        if self.sizes[0].value == 0:
            return
        if self.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                self(r, out, lse, counter, key_tail, visits)
            return
        numbers, stream = self.numbers, current_stream(self.device)
        # Launches copy the arguments, so the next one may change them.
        with self.lock:
            replace = driver().cuTensorMapReplaceAddress
            failed = 0
            for tensor_map, x in zip(self.maps, (r.q, r.k, key_tail, r.v), strict=True):
                failed = failed or replace(tensor_map, ctypes.c_void_p(x.data_ptr()))
            check(NAME, failed)
            numbers.starts_q, numbers.lengths_q = r.starts_q.data_ptr(), r.lengths_q.data_ptr()
            numbers.starts_k, numbers.lengths_k = r.starts_k.data_ptr(), r.lengths_k.data_ptr()
            numbers.out, numbers.counter = out.data_ptr(), counter.data_ptr()
            numbers.lse = None if lse is None else lse.data_ptr()
            if visits is not None:
                numbers.visits, numbers.order = visits.tiles.data_ptr(), visits.order.data_ptr()
            function = handle(self.device, self.kernel, WITHOUT_IT)
            failed = driver().cuLaunchKernel(function, *self.sizes, ctypes.c_void_p(stream), self.slots, None)
        check(NAME, failed, "; MODELOPT_LITE_KERNEL=hopper chooses another")


def _width(x: Tensor) -> int:
    """Return over how many elements the heads of a token are spread: they are one dimension of tensor maps."""
    return (x.shape[1] - 1) * x.stride(1) + x.shape[2]


def _key_map(k: Tensor) -> Any:
    """Describe keys in boxes of every other pair of a tile, as ``[span of 16, group, key of a pair, dim]``.

    A sequence may begin anywhere, so rows have several addresses. The kernel only loads boxes that are whole.
    """
    row = k.stride(0)
    return _tensor_map(k, [5, 7, k.shape[0] // 16 + 1], [row, 4 * row, 16 * row], [2, 4, TILE // 16])


def _tensor_map(x: Tensor, sizes: list[int], strides: list[int], box: list[int]) -> Any:
    """Describe a tensor for the tensor memory accelerator, in boxes of 64 elements of a token.

    Args:
        x: the tensor.
        sizes: of the dimensions beside the one in a token, fastest first.
        strides: of these, of elements.
        box: their size in a box.
    """
    rank = 1 + len(sizes)
    memory = (ctypes.c_uint64 * 24)()  # 128 bytes, to be aligned to 64
    unaligned = ctypes.addressof(memory) % 64
    tensor_map = (ctypes.c_uint64 * 16).from_buffer(memory, (64 - unaligned) % 64)
    check(
        NAME,
        driver().cuTensorMapEncodeTiled(
            tensor_map,
            BFLOAT16 if x.dtype == torch.bfloat16 else FLOAT16,
            ctypes.c_uint32(rank),
            ctypes.c_void_p(x.data_ptr()),
            (ctypes.c_uint64 * rank)(_width(x), *sizes),
            (ctypes.c_uint64 * (rank - 1))(*(x.element_size() * stride for stride in strides)),
            (ctypes.c_uint32 * rank)(64, *box),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            NO_INTERLEAVE,
            SWIZZLE_128_BYTES,
            L2_256_BYTES,
            FILL_WITH_ZEROS,
        ),
    )
    return tensor_map
