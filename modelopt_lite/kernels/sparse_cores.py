"""Runs the kernel of ``sparse_cores.cu``: 2:4 attention on the sparse tensor cores of Hopper GPUs.

Neither Triton nor Gluon has matrix instructions for sparse operands, so the kernel is CUDA C++. NVRTC compiles it when
a process first needs it, in a second or two; it comes with CUDA builds of PyTorch, and ``cuda-bindings`` finds it.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..plan import AttentionPlan
from .problem import AttentionProblem
from .tiles import LOG2E

try:
    from cuda.bindings import nvrtc
except ImportError:  # an optional extra; newer CUDA builds of PyTorch bring it along
    nvrtc = None

HEAD_DIM = 128
ROWS, TILE = 64, 128
"""Queries of a warpgroup, and of an item; a tile has as many keys as an item queries."""
SHARED_BYTES = 6 * 32768 + 512 + 1023
THREADS = 384
# Of CUDA's driver interface, cuda.h
BFLOAT16, NO_INTERLEAVE, SWIZZLE_128_BYTES, L2_256_BYTES, FILL_WITH_ZEROS = 9, 0, 3, 3, 0
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

_kernels: dict[torch.device, ctypes.c_void_p | None] = {}

logger = logging.getLogger(__name__)


class _Problem(ctypes.Structure):
    """``Problem`` of ``sparse_cores.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("starts_q", "lengths_q", "starts_k", "lengths_k")),
        *((name, ctypes.c_void_p) for name in ("out", "lse", "counter")),
        *((name, ctypes.c_longlong) for name in ("out_token_stride", "out_head_stride")),
        *((name, ctypes.c_int) for name in ("query_head_stride", "key_head_stride", "value_head_stride", "wide")),
        *((name, ctypes.c_int) for name in ("batch", "heads", "heads_per_kv", "tiles_per_head", "heads_per_wave")),
        *(
            (name, ctypes.c_int)
            for name in ("key_rows", "tail_start", "num_sinks", "window", "causal", "sparse_decode")
        ),
        *((name, ctypes.c_float) for name in ("scale", "no_factor")),
    )


def can_run(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> bool:
    """Say whether the kernel runs these tensors on a GPU of compute capability 9.0.

    They must be aligned as the tensor memory accelerator needs it, and there be no softcap, sliding window, ``s_aux``
    or positions from outside. The first time that is so, the kernel is compiled and loaded; if that fails, a warning
    says why. While a CUDA graph is captured, it cannot be loaded, and runs nothing if it is not there yet.
    """
    return (
        plan.group == 4
        and plan.keeps_top == 2
        and q.dtype == torch.bfloat16
        and q.shape[2] == v.shape[2] == HEAD_DIM
        and all(_width(x) < 2**31 for x in (q, k, v))
        and _kernel(q.device) is not None
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    counter: Tensor,
    key_tail: Tensor,
    tail_start: int,
    problem: AttentionProblem,
    heads_per_wave: int,
    num_sinks: int,
    window: int,
    processors: int,
) -> None:
    """Launch the kernel on the current stream of the current device.

    Args:
        q: as in :func:`modelopt_lite.kernels.launch.forward`, like all that is not named here.
        k: see there.
        v: see there.
        out: see there; rows of no sequence are not written.
        lse: ``[tokens, query heads]`` in FP32, or None.
        counter: one int32, 0.
        key_tail: the last ``TILE`` keys, or all if there are fewer, and rows of any content, ``2 * TILE`` together; as
            ``k``, contiguous.
        tail_start: the row of the first of these keys.
        problem: see there.
        heads_per_wave: of how many heads keys and values fit into the L2 cache, >= 1.
        num_sinks: the plan's sink tokens, below 2^31.
        window: its dense window, below 2^31.
        processors: multiprocessors of the GPU.

    Raises:
        RuntimeError: if the kernel cannot be launched; :func:`can_run` has been asked.
    """
    p, heads = problem, q.shape[1]
    batch, tiles = p.starts_q.shape[0], -(-min(p.max_q, q.shape[0]) // TILE)
    if batch * tiles == 0:
        return
    packing = (p.starts_q, p.lengths_q, p.starts_k, p.lengths_k)
    numbers = _Problem(
        *(x.data_ptr() for x in packing),
        out.data_ptr(),
        None if lse is None else lse.data_ptr(),
        counter.data_ptr(),
        *out.stride()[:2],
        *(x.stride(1) for x in (q, k, v)),
        sum((x.dtype == torch.int64) << index for index, x in enumerate(packing)),
        batch,
        heads,
        heads // k.shape[1],
        tiles,
        min(heads_per_wave, batch * heads),
        k.shape[0],
        tail_start,
        num_sinks,
        window,
        p.is_causal,
        p.plan.sparse_decode,
        p.softmax_scale * LOG2E.value,
        0.0,
    )
    arguments = (
        _tensor_map(q, [q.shape[0]], [q.stride(0)], [ROWS]),
        _key_map(k),
        _key_map(key_tail),
        _tensor_map(v, [v.shape[0]], [v.stride(0)], [TILE]),
        numbers,
    )
    slots = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
    programs = min(batch * heads * tiles, processors)
    stream = ctypes.c_void_p(torch.cuda.current_stream(q.device).cuda_stream)
    sizes = map(ctypes.c_uint, (programs, 1, 1, THREADS, 1, 1, SHARED_BYTES))
    failed = _driver().cuLaunchKernel(_kernel(q.device), *sizes, stream, slots, None)
    _check(failed, "; MODELOPT_LITE_KERNEL=hopper chooses another")


def compiled() -> tuple[bytes, str]:
    """Compile the kernel for compute capability 9.0, with no need for a GPU.

    Returns:
        The machine code, and what the compiler says about it.

    Raises:
        RuntimeError: if it cannot be compiled.
    """
    source = (Path(__file__).parent / "sparse_cores.cu").read_bytes()
    options = [b"--gpu-architecture=sm_90a", b"--std=c++17", b"--use_fast_math", b"--ptxas-options=-v"]
    failed, program = nvrtc.nvrtcCreateProgram(source, b"sparse_cores.cu", 0, [], [])
    _check_compiler(failed)
    (failed,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * size
    nvrtc.nvrtcGetProgramLog(program, log)
    text = log.decode().rstrip("\0 ")
    _check_compiler(failed, text)
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    code = b" " * size
    (failed,) = nvrtc.nvrtcGetCUBIN(program, code)
    _check_compiler(failed)
    nvrtc.nvrtcDestroyProgram(program)
    return code, text


def _kernel(device: torch.device) -> ctypes.c_void_p | None:
    """Return the kernel on a device, or None if it could not be loaded, or can not while a graph is captured."""
    if device not in _kernels:
        if torch.cuda.is_current_stream_capturing():
            return None
        _kernels[device] = _load(device)
    return _kernels[device]


def _load(device: torch.device) -> ctypes.c_void_p | None:
    """Compile and load the kernel for a device; warn and return None if that fails."""
    try:
        if nvrtc is None:
            raise RuntimeError("cuda-bindings is not installed (extra sparse-cores)")
        code, module, kernel = _code(), ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # a thread that has done nothing yet has no context
            _check(_driver().cuModuleLoadData(ctypes.byref(module), ctypes.c_char_p(code)))
            _check(_driver().cuModuleGetFunction(ctypes.byref(kernel), module, b"attend"))
            _check(_driver().cuFuncSetAttribute(kernel, MAX_DYNAMIC_SHARED_SIZE_BYTES, SHARED_BYTES))
    except (RuntimeError, OSError) as error:  # OSError: there is no driver
        logger.warning("2:4 is left to other kernels than sparse_cores, which would be faster: %s", error)
        return None
    return kernel


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _check_compiler(failed: Any, log: str = "") -> None:
    if failed:
        raise RuntimeError(f"kernel: 'sparse_cores' does not compile: {failed} {log}".rstrip())


def _check(failed: int, remedy: str = "") -> None:
    if failed:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(failed, ctypes.byref(text))
        raise RuntimeError(f"kernel: 'sparse_cores' does not run: {(text.value or b'').decode()} ({failed}){remedy}")


@functools.cache
def _code() -> bytes:
    return compiled()[0]


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
    _check(
        _driver().cuTensorMapEncodeTiled(
            tensor_map,
            BFLOAT16,
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
        )
    )
    return tensor_map
