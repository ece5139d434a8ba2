"""What the kernels' launchers need to know of a GPU, and launches without Triton's own look-ups."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

L2_SHARE = 24 * 2**20
"""Bytes of keys and values of the heads that are computed at one time: half of the L2 cache of an A100 or H100."""


@functools.cache
def compute_capability(device: torch.device) -> int:
    """Return a GPU's compute capability as ``10 * major + minor``."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def processors(device: torch.device) -> int:
    """Return a GPU's number of multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def is_aligned(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can read ``[tokens, heads, dim]``: 16 bytes divide address and strides."""
    return (
        x.shape[0] > 0
        and x.data_ptr() % 16 == 0
        and all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:2])
    )


def heads_per_wave(longest: int, x: Tensor, y: Tensor) -> int:
    """Return of how many heads ``longest`` rows of both tensors fit into the L2 cache, at least 1."""
    return max(1, L2_SHARE // max(1, longest * (x.shape[2] + y.shape[2]) * x.element_size()))


class Launch:
    """Launches a Triton kernel again and again with arguments that are specialized alike.

    Triton looks at every argument of every launch to find the compiled kernel. The caller vouches that types, alignment
    and divisibility of all arguments are those of the first launch, so that this needs to be done only once.
    """

    def __init__(self, kernel: Any, device: torch.device, *constants: Any, **options: Any) -> None:
        """Prepare launches.

        Args:
            kernel: a ``@triton.jit`` function whose last parameters are the constants.
            device: where its tensors are.
            constants: values of these parameters.
            options: ``num_warps`` and Triton's other options of a launch.
        """
        self.kernel, self.device, self.constants, self.options = kernel, device, constants, options
        self.compiled: Any = None
        self.stream: Any = None

    def __call__(self, programs: int, *arguments: Any) -> None:
        """Launch ``programs`` programs on the current stream of the tensors' device."""
        compiled, index, hooks = self.compiled, self.device.index, triton.knobs.runtime
        # Hooks are None, or chains that may be empty.
        before, after = hooks.launch_enter_hook, hooks.launch_exit_hook
        if index is not None and index != torch._C._cuda_getDevice():
            with torch.cuda.device(index):
                self(programs, *arguments)
        elif compiled is None:  # the first time, and always in the interpreter, which compiles nothing
            compiled = self.kernel[(programs,)](*arguments, *self.constants, **self.options)
            if compiled is not None:
                self.stream = triton.runtime.driver.active.get_current_stream
                self.compiled = compiled
        elif getattr(before, "calls", before) or getattr(after, "calls", after):
            compiled[programs, 1, 1](*arguments, *self.constants)
        else:  # the same without what profilers need
            compiled.run(
                programs, 1, 1, self.stream(index), compiled.function, compiled.packed_metadata, None, None, None,
                *arguments, *self.constants,
            )  # fmt: skip


_launches: dict[tuple[Any, ...], Launch] = {}
MAX_LAUNCHES = 4096
"""How many launches are remembered; then they are all forgotten."""


def launch(kernel: Any, programs: int, arguments: tuple[Any, ...], constants: tuple[Any, ...], **options: int) -> None:
    """Launch a kernel with the :class:`Launch` of arguments that are specialized alike.

    Args:
        kernel: as for :class:`Launch`.
        programs: how many programs.
        arguments: tensors, of which the first is on the device to use, numbers, None, and tuples of these.
        constants: values of the kernel's last parameters.
        options: as for :class:`Launch`.
    """
    device = arguments[0].device
    key = (kernel.__name__, device, constants, *options.values(), _kinds(arguments))
    found = _launches.get(key)
    if found is None:
        if len(_launches) >= MAX_LAUNCHES:
            _launches.clear()
        found = _launches[key] = Launch(kernel, device, *constants, **options)
    found(programs, *arguments)


def _kinds(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return all that Triton looks at to find the compiled kernel, and more: numbers as they are."""
    kinds: list[Any] = []
    for x in arguments:
        if isinstance(x, Tensor):
            kinds += (x.dtype, x.data_ptr() & 15)
        else:
            kinds.append(_kinds(x) if type(x) is tuple else x)
    return tuple(kinds)


def current_stream(device: torch.device) -> int:
    """Return the handle of the current stream of a GPU."""
    stream: int = triton.runtime.driver.active.get_current_stream(device.index)
    return stream


def rebased(descriptor: Any, x: Tensor | None) -> Any:
    """Return a tensor descriptor for another tensor of the same shape and strides, without checking it again."""
    if descriptor is None:
        return None
    copied = object.__new__(type(descriptor))
    copied.__dict__.update(descriptor.__dict__)
    copied.base = x
    return copied


def cdiv(x: int, y: int) -> int:
    """Divide and round up."""
    return -(-x // y)
