"""Kernels in CUDA C++ for Hopper GPUs: compiled by NVRTC, kept in the user's cache, loaded by the driver.

NVRTC takes a second or two when a kernel is first needed; other processes find the machine code in the cache. NVRTC
comes with CUDA builds of PyTorch, and ``cuda-bindings`` finds it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...cache import COMPILED_KERNELS, cached

try:
    from cuda.bindings import nvrtc
except ImportError:  # an optional extra; newer CUDA builds of PyTorch bring it along
    nvrtc = None

# Of CUDA's driver interface, cuda.h
MAX_DYNAMIC_SHARED_SIZE_BYTES, CAPTURE_MODE_RELAXED = 8, 2

COMPILER_OPTIONS = (b"--gpu-architecture=sm_90a", b"--std=c++17", b"--ptxas-options=-v")

logger = logging.getLogger(__name__)


class CudaKernel(NamedTuple):
    """A kernel in CUDA C++ for compute capability 9.0.

    Attributes:
        name: of its source beside this file, without the suffix ``.cu``.
        entry: the function to launch.
        options: what the compiler is told beside ``COMPILER_OPTIONS``.
        shared_bytes: dynamic shared memory of a program.
    """

    name: str
    entry: str
    options: tuple[bytes, ...]
    shared_bytes: int

    def compiled(self) -> tuple[bytes, str]:
        """Compile it, with no need for a GPU.

        Returns:
            The machine code, and what the compiler says about it.

        Raises:
            RuntimeError: if it cannot be compiled.
        """
        return _compile(self.name, self.source(), (*COMPILER_OPTIONS, *self.options), "CUBIN")

    def source(self) -> bytes:
        """Return its source."""
        return (Path(__file__).parent / f"{self.name}.cu").read_bytes()


_handles: dict[tuple[torch.device, CudaKernel], ctypes.c_void_p | None] = {}


def handle(device: torch.device, kernel: CudaKernel, without_it: str) -> ctypes.c_void_p | None:
    """Return the kernel on a device, compiled and loaded the first time.

    Args:
        device: a GPU of compute capability 9.0.
        kernel: which one.
        without_it: what a warning says if that fails, before the reason.

    Returns:
        What the driver launches; None if it could not be loaded, or can not while a CUDA graph is captured.
    """
    key = (device, kernel)
    if key not in _handles:
        if torch.cuda.is_current_stream_capturing():
            return None
        _handles[key] = _load(device, kernel, without_it)
    return _handles[key]


def _load(device: torch.device, kernel: CudaKernel, without_it: str) -> ctypes.c_void_p | None:
    try:
        if nvrtc is None:
            raise RuntimeError("cuda-bindings is not installed (extra sparse-cores)")
        code, module, function = code_of(kernel), ctypes.c_void_p(), ctypes.c_void_p()
        name, size = kernel.name, kernel.shared_bytes
        with _in_context(device, name), _beside_captures(name):
            check(name, driver().cuModuleLoadData(ctypes.byref(module), ctypes.c_char_p(code)))
            check(name, driver().cuModuleGetFunction(ctypes.byref(function), module, kernel.entry.encode()))
            check(name, driver().cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_SIZE_BYTES, size))
    except (RuntimeError, OSError) as error:  # OSError: there is no driver
        logger.warning("%s: %s", without_it, error)
        return None
    return function


@functools.cache
def code_of(kernel: CudaKernel) -> bytes:
    """Return a kernel's machine code, from the cache if it is there."""
    key = (kernel.source(), compiler(), *COMPILER_OPTIONS, *kernel.options)
    return cached(COMPILED_KERNELS, key, lambda: kernel.compiled()[0])


def compiler() -> bytes:
    """Return what tells builds of the compiler apart, of which it names itself only in what it compiles, to PTX."""
    return _compile("nothing", b"", (b"--gpu-architecture=compute_90a",), "PTX")[0]


def _compile(name: str, source: bytes, options: tuple[bytes, ...], result: str) -> tuple[bytes, str]:
    """Compile a program, and return its CUBIN or PTX and the compiler's log."""
    failed, program = nvrtc.nvrtcCreateProgram(source, f"{name}.cu".encode(), 0, [], [])
    _check_compiler(name, failed)
    try:
        (failed,) = nvrtc.nvrtcCompileProgram(program, len(options), list(options))
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        text = log.decode().rstrip("\0 ")
        _check_compiler(name, failed, text)
        _, size = getattr(nvrtc, f"nvrtcGet{result}Size")(program)
        code = b" " * size
        (failed,) = getattr(nvrtc, f"nvrtcGet{result}")(program, code)
        _check_compiler(name, failed)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return code, text


def _check_compiler(name: str, failed: Any, log: str = "") -> None:
    if failed:
        raise RuntimeError(f"kernel: '{name}' does not compile: {failed} {log}".rstrip())


def check(name: str, failed: int, remedy: str = "") -> None:
    """Check what a function of the driver returned.

    Args:
        name: of the kernel that it was called for.
        failed: what it returned.
        remedy: what the user may do, for the message.

    Raises:
        RuntimeError: if it failed.
    """
    if failed:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(failed, ctypes.byref(text))
        raise RuntimeError(f"kernel: '{name}' does not run: {(text.value or b'').decode()} ({failed}){remedy}")


@contextlib.contextmanager
def _in_context(device: torch.device, name: str) -> Iterator[None]:
    """Make PyTorch's context of a device the current one, also in a thread that has none yet.

    It is held as long as the process runs, as what is loaded is. Nothing is synchronized, which would break a capture.
    """
    number, context = ctypes.c_int(), ctypes.c_void_p()
    check(name, driver().cuDeviceGet(ctypes.byref(number), device.index))
    check(name, driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), number))
    check(name, driver().cuCtxPushCurrent_v2(context))
    try:
        yield
    finally:
        check(name, driver().cuCtxPopCurrent_v2(ctypes.byref(context)))


@contextlib.contextmanager
def _beside_captures(name: str) -> Iterator[None]:
    """Let this thread load code while others capture CUDA graphs, which would otherwise break their captures."""
    mode = ctypes.c_int(CAPTURE_MODE_RELAXED)
    check(name, driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)))
    try:
        yield
    finally:
        check(name, driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)))


@functools.cache
def driver() -> Any:
    """Return CUDA's driver interface.

    Raises:
        OSError: if there is none.
    """
    return ctypes.CDLL("libcuda.so.1")
