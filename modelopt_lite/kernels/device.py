"""What the kernels' launchers need to know of a GPU, and launches without Triton's own look-ups."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
"""Triton's version."""
L2_SHARE = 24 * 2**20
"""Bytes of keys and values of the heads that are computed at one time: half of the L2 cache of an A100 or H100."""


def compute_capability(device: torch.device) -> int:
    """Return a GPU's compute capability as ``10 * major + minor``."""
    # torch.compile knows PyTorch's function itself, and warns of cached ones.
    major, minor = (torch.cuda.get_device_capability if torch.compiler.is_compiling() else _capability)(device)
    return 10 * major + minor


_capability = functools.cache(torch.cuda.get_device_capability)


@functools.cache
def processors(device: torch.device) -> int:
    """Return a GPU's number of multiprocessors; the interpreter on a CPU counts as one."""
    if device.type == "cpu":
        return 1
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


class Described(NamedTuple):
    """An argument of a launch: a tensor for the tensor memory accelerator.

    Attributes:
        descriptor: of any tensor of the same type, shape and strides.
        tensor: where the data are.
    """

    descriptor: Any
    tensor: Tensor


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
        self.kernel, self.index, self.constants, self.options = kernel, device.index, constants, options
        self.compiled: Any = None
        self.stream: Any = None
        self.run: Any = None
        self.rest: tuple[Any, ...] = ()
        self.encode: Callable[[list[Any]], None] | None = None

    def __call__(self, programs: int, *arguments: Any) -> None:
        """Launch ``programs`` programs on the current stream of the tensors' device.

        Args:
            programs: how many.
            arguments: of the kernel, before the constants; :class:`Described` tensors among them, not in tuples.
        """
        compiled, index, hooks = self.compiled, self.index, triton.knobs.runtime
        # Hooks are None, or chains that may be empty.
        before, after = hooks.launch_enter_hook, hooks.launch_exit_hook
        if index is not None and index != torch._C._cuda_getDevice():
            with torch.cuda.device(index):
                self(programs, *arguments)
        elif compiled is None:  # the first time, and always in the interpreter, which compiles nothing
            compiled = self.kernel[(programs,)](*map(_as_triton_takes, arguments), *self.constants, **self.options)
            if compiled is not None:
                self.stream = triton.runtime.driver.active.get_current_stream
                self.run, self.rest, self.encode = _launcher(compiled, arguments)
                self.compiled = compiled
        elif getattr(before, "calls", before) or getattr(after, "calls", after):
            compiled[programs, 1, 1](*map(_as_triton_takes, arguments), *self.constants)
        elif self.encode is None:  # the same without what profilers need
            self.run(programs, 1, 1, self.stream(index), *self.rest, *arguments, *self.constants)
        else:
            encoded = list(arguments)
            self.encode(encoded)
            self.run(programs, 1, 1, self.stream(index), *self.rest, *encoded, *self.constants)


class _Launcher(NamedTuple):
    """What launches a compiled kernel faster than Triton.

    Attributes:
        run: a function of the grid, the stream, ``rest`` and the kernel's arguments.
        rest: what is the same at each launch.
        encode: what puts into a list of arguments what ``run`` takes in place of :class:`Described` tensors; None if
            there are none.
    """

    run: Any
    rest: tuple[Any, ...]
    encode: Callable[[list[Any]], None] | None


def _launcher(compiled: Any, arguments: tuple[Any, ...]) -> _Launcher:
    """Return what launches a kernel that was just compiled for some arguments."""
    run, rest = compiled.run, (compiled.packed_metadata, None, None, None)
    descriptors = {place: x.descriptor for place, x in enumerate(arguments) if isinstance(x, Described)}
    rebase = functools.partial(_rebase, list(descriptors)) if descriptors else None
    if TRITON != (3, 6) or run.global_scratch_size != 0 or run.profile_scratch_size != 0:
        return _Launcher(run, (compiled.function, *rest), rebase)
    # Where a kernel needs no memory, Triton's launcher only adds what is always the same.
    fixed = (compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None, *rest)
    if not descriptors:
        return _Launcher(run.launch, fixed, None)
    # A function around it encodes descriptors, which takes Python longer than all else.
    launch = inspect.getclosurevars(run.launch).nonlocals.get("launcher")
    layouts = compiled.metadata.tensordesc_meta or []
    if launch is None or None in layouts or len(layouts) != len(descriptors):
        return _Launcher(run.launch, fixed, rebase)
    types = run.launch.__globals__["TMA_DTYPE_DEVICE_TO_HOST"]
    maps = [
        _Map(
            place,
            (
                of["swizzle"], of["elem_size"], types[of["elem_type"]], of["block_size"],
                x.shape, x.strides, int(x.padding == "nan"),
            ),
            (*x.shape, *x.strides),
        )
        for (place, x), of in zip(descriptors.items(), layouts, strict=True)
    ]  # fmt: skip
    return _Launcher(launch, fixed, functools.partial(_encode, maps[::-1]))


class _Map(NamedTuple):
    """How a :class:`Described` tensor is encoded.

    Attributes:
        place: which argument it is.
        layout: what Triton's function for that takes, after the address.
        numbers: what follows the result in the arguments.
    """

    place: int
    layout: tuple[Any, ...]
    numbers: tuple[int, ...]


def _encode(maps: list[_Map], arguments: list[Any]) -> None:
    """Encode descriptors, the last one first, as each takes more places than its tensor."""
    encode = triton.runtime.driver.active.utils.fill_tma_descriptor
    for place, layout, numbers in maps:
        arguments[place : place + 1] = encode(arguments[place].tensor.data_ptr(), *layout), *numbers


def _rebase(places: list[int], arguments: list[Any]) -> None:
    """Put descriptors in the places of :class:`Described` tensors."""
    for place in places:
        arguments[place] = _as_triton_takes(arguments[place])


def _as_triton_takes(argument: Any) -> Any:
    return rebased(*argument) if isinstance(argument, Described) else argument


def current_stream(device: torch.device) -> int:
    """Return the handle of the current stream of a GPU."""
    stream: int = triton.runtime.driver.active.get_current_stream(device.index)
    return stream


def rebased(descriptor: Any, x: Tensor | None) -> Any:
    """Return a tensor descriptor for another tensor of the same shape and strides, without checking it again."""
    copied = object.__new__(type(descriptor))
    copied.__dict__.update(descriptor.__dict__)
    copied.base = x
    return copied


def cdiv(x: int, y: int) -> int:
    """Divide and round up."""
    return -(-x // y)
