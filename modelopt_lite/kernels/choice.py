"""Which kernel runs a request: a list of records, of which the first that can and pays runs."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .arguments import check_request, check_rule
from .blocked import forward_blocked
from .language import tl
from .request import AttentionRequest, ForwardResult, HookRefusedError
from .selection import select_blocks

if tl is not None:
    from .decode import launch as decode_launch
    from .hopper import backward_launch as hopper_backward_launch
    from .hopper import forward_launch as hopper_launch
    from .hopper import sparse_cores
    from .portable import launch as portable_launch

Backend: TypeAlias = Literal["auto", "triton", "torch"]
Result: TypeAlias = "tuple[Tensor, Tensor | None]"
Run: TypeAlias = "Callable[[AttentionRequest], Result]"
Gradients: TypeAlias = "tuple[Tensor, Tensor, Tensor, Tensor | None]"
Differentiate: TypeAlias = "Callable[[Tensor, ForwardResult, AttentionRequest], Gradients]"

MAX_SIGNATURES = 4096
"""How many signatures of requests are remembered; then they are all forgotten."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernel:
    """One way to compute a request.

    Attributes:
        name: what ``MODELOPT_LITE_KERNEL`` calls it.
        refusal: says why it cannot run a request, or None if it can.
        pays: whether it is worth running, of those requests that it can run.
        prepare: computes what requests of one signature have in common, and returns what runs them.
        reads_pages: whether it reads a page table; for others, keys are copied to one place.
        places_rows: whether it writes rows where ``output_rows`` says; of others, results are copied there.
        reads_only_addresses: whether, on a GPU and without lists of blocks, what it prepares looks at no shapes and
            strides of queries, keys and values.
    """

    name: str
    refusal: Callable[[AttentionRequest], str | None]
    pays: Callable[[AttentionRequest], bool]
    prepare: Callable[[AttentionRequest], Run]
    reads_pages: bool = False
    places_rows: bool = False
    reads_only_addresses: bool = False


class Prepared(NamedTuple):
    """What runs requests of one signature.

    Attributes:
        run: computes one of them.
        reads_only_addresses: whether it looks at no shapes and strides of ``q``, ``k`` and ``v``, so that these may
            have others.
    """

    run: Run
    reads_only_addresses: bool = False


def _always(_: AttentionRequest) -> bool:
    return True


def _never_refuses(_: AttentionRequest) -> str | None:
    return None


def _prepare_blocked(_: AttentionRequest) -> Run:
    return run_blocked


def run_blocked(request: AttentionRequest) -> Result:
    """Compute a request with PyTorch operations; checks its lengths, which waits for their device."""
    request = request.without_pages()
    request.check_values()
    with torch.autocast(request.q.device.type, enabled=False):
        return forward_blocked(request)


BLOCKED = Kernel("torch", _never_refuses, _always, _prepare_blocked)
GPU_KERNELS: tuple[Kernel, ...] = ()
"""The first that can and pays runs; if none pays, the last that can."""
if tl is not None:
    GPU_KERNELS = (
        Kernel(
            "decode", decode_launch.refusal, decode_launch.pays, decode_launch.prepare,
            reads_pages=True, reads_only_addresses=True,
        ),
        Kernel(
            "sparse_cores", sparse_cores.refusal, sparse_cores.pays, sparse_cores.prepare, reads_only_addresses=True
        ),
        Kernel(
            "hopper", hopper_launch.refusal, hopper_launch.pays, hopper_launch.prepare, reads_only_addresses=True
        ),
        Kernel(
            "portable", portable_launch.refusal, _always, portable_launch.prepare,
            places_rows=True, reads_only_addresses=True,
        ),
    )  # fmt: skip

_prepared: dict[tuple[Any, ...], Prepared] = {}
_prepared_backward: dict[tuple[Any, ...], Differentiate] = {}


def prepared(request: AttentionRequest, backend: Backend) -> Prepared | None:
    """Return what runs requests like one that :func:`run` has computed, None if that was not kept."""
    return _prepared.get(signature(request, backend))


def run(request: AttentionRequest, backend: Backend = "auto") -> Result:
    """Compute a request with the kernel that suits it, without looking for it again if one like it has come before.

    Args:
        request: what is to be computed.
        backend: as in :func:`choose`.

    Returns:
        The output, ``[total_q, query_heads, value_dim]``, and the logarithms of the softmax denominators, ``[total_q,
        query_heads]``, which may be None if the request does not want them.

    Raises:
        UnsupportedError: if the backend asked for cannot run the request.
        ValueError: if ``MODELOPT_LITE_KERNEL`` names no kernel, or a value of the request is wrong.
    """
    key = signature(request, backend)
    known = _prepared.get(key)
    if known is not None:  # so its like was checked
        return known.run(request)
    check_request(request)
    new: Prepared | None
    if (complete := _completion(request)) is None:
        result, new = _first_run(request, backend)
    else:
        completed = complete(request)
        result, kernel = run(completed, backend), prepared(completed, backend)
        new = None if kernel is None else Prepared(lambda request: kernel.run(complete(request)))
    # A kernel may refuse for the moment while a graph is captured.
    if new is not None and not (request.q.is_cuda and torch.cuda.is_current_stream_capturing()):
        if len(_prepared) >= MAX_SIGNATURES:
            _prepared.clear()
        _prepared[key] = new
    return result


def _first_run(request: AttentionRequest, backend: Backend) -> tuple[Result, Prepared]:
    """Compute a request with the kernel that suits it; return the result, and what runs others like it."""
    check_backend(request, backend)
    check_rule(request.plan, request.q.device)
    pinned = os.environ.get("MODELOPT_LITE_KERNEL", "")
    tried: list[str] = []
    while True:
        kernel = choose(request.readable(), backend, pinned, without=tried)
        new = _prepare(kernel, request)
        try:
            return new.run(request), new
        except HookRefusedError as error:
            logger.warning("the kernel %s is left out: %s", kernel.name, error)
            tried.append(kernel.name)


def _completion(request: AttentionRequest) -> Callable[[AttentionRequest], AttentionRequest] | None:
    """Return what chooses the key blocks of requests like one, or leaves the choice out; None if there is none to make.

    What it returns is alike for requests of one signature.
    """
    if request.blocks is not None or not request.plan.chooses_blocks:
        return None
    simple = request.without_needless_choice()
    if not simple.plan.chooses_blocks:
        plan = simple.plan
        return lambda request: request._replace(plan=plan)
    shared: dict[Any, Any] = {}
    return lambda request: request._replace(blocks=select_blocks(request, shared))


def _prepare(kernel: Kernel, request: AttentionRequest) -> Prepared:
    """Prepare a kernel, with copies of what it cannot read where it lies, or cannot write where it goes."""
    if request.output_rows is not None and not kernel.places_rows:
        in_order = _prepare(kernel, request._replace(output_rows=None)).run

        def run_and_place(request: AttentionRequest) -> Result:
            rows, (output, lse) = request.output_rows, in_order(request._replace(output_rows=None))
            assert rows is not None
            # In place, because request.placed() copies the memory first that it writes over.
            placed = torch.empty_like(output).index_copy_(0, rows, output)
            return placed, None if lse is None else torch.empty_like(lse).index_copy_(0, rows, lse)

        return Prepared(run_and_place)

    def adapted(request: AttentionRequest) -> AttentionRequest:
        return (request if kernel.reads_pages else request.without_pages()).readable()

    run = kernel.prepare(adapted(request))
    if adapted(request) is request:
        return Prepared(run, kernel.reads_only_addresses and request.q.is_cuda and request.blocks is None)
    return Prepared(lambda request: run(adapted(request)))


def choose(
    request: AttentionRequest, backend: Backend = "auto", pinned: str = "", without: list[str] | None = None
) -> Kernel:
    """Return the kernel that runs a request.

    Args:
        request: what is to be computed; :func:`check_backend` has been asked.
        backend: ``"torch"`` for PyTorch operations, ``"triton"`` for GPU kernels alone, ``"auto"`` for these where they
            can run.
        pinned: the name of a GPU kernel that runs wherever it can, also where another is faster; what it cannot run is
            chosen as without it.
        without: names of kernels that are not to be chosen.

    Raises:
        ValueError: if no kernel has the name ``pinned``.
    """
    if pinned and pinned not in {kernel.name for kernel in GPU_KERNELS}:
        allowed = ", ".join(kernel.name for kernel in GPU_KERNELS)
        raise ValueError(f"MODELOPT_LITE_KERNEL: {pinned!r} is not allowed; {allowed} or nothing")
    if backend == "torch" or (backend == "auto" and not request.q.is_cuda):
        return BLOCKED
    kernels = [kernel for kernel in GPU_KERNELS if kernel.name not in (without or ())]
    # A pinned kernel comes first, and is not asked whether it pays.
    kernels.sort(key=lambda kernel: kernel.name != pinned)
    wanted = [kernel for kernel in kernels if kernel.name == pinned or kernel.pays(request)]
    for kernel in (*wanted, *reversed(kernels)):
        if kernel.refusal(request) is None:
            return kernel
    reason = refusal(request)
    if reason is not None:
        _warn_once("attention on the GPU runs with PyTorch operations, which are slow: %s", reason)
    return BLOCKED


@functools.cache
def _warn_once(message: str, reason: str) -> None:
    logger.warning(message, reason)


def refusal(request: AttentionRequest) -> str | None:
    """Say why no GPU kernel can run a request, or None if one can.

    The last one can most, so it is asked first, and its reason is the one that counts; others may have to be loaded to
    answer.
    """
    reasons: list[str] = []
    for kernel in reversed(GPU_KERNELS):
        reason = kernel.refusal(request)
        if reason is None:
            return None
        reasons.append(reason)
    return reasons[0] if reasons else "Triton is not installed"


def differentiates_on_gpu(request: AttentionRequest, backend: Backend) -> bool:
    """Whether a GPU kernel computes the gradients of a request, and not PyTorch operations.

    Raises:
        UnsupportedError: if the backend asked for cannot.
    """
    if tl is None or backend == "torch" or (backend == "auto" and not request.q.is_cuda):
        return False
    reason = portable_launch.refusal(request)
    if reason is not None and backend == "triton":
        raise UnsupportedError(f"backend: 'triton' cannot compute gradients of this: {reason}")
    if reason is not None:
        _warn_once("gradients of attention on the GPU are computed with PyTorch operations, which are slow: %s", reason)
    return reason is None


def differentiate(grad: Tensor, result: ForwardResult, request: AttentionRequest) -> Gradients:
    """Compute gradients with the GPU kernel that suits a request, if :func:`differentiates_on_gpu`.

    Args:
        grad: gradient of the output, with its shape and type.
        result: what the forward pass left; it may lose its output.
        request: what was computed; which keys take part is taken as given.

    Returns:
        The gradients of ``q``, ``k``, ``v`` and, if given, ``s_aux``, each in the type of its tensor. Rows of no
        sequence are 0.
    """
    assert result.output is not None
    tensors = (grad, result.output, result.lse)
    key = (signature(request, "triton"), *((x.stride(), x.data_ptr() & 15) for x in tensors))
    del tensors
    known = _prepared_backward.get(key)
    if known is None:
        if len(_prepared_backward) >= MAX_SIGNATURES:
            _prepared_backward.clear()
        known = _prepared_backward[key] = _prepare_backward(grad, request)
    try:
        return known(grad, result, request)
    except HookRefusedError as error:
        logger.warning("the backward kernel for Hopper is left out: %s", error)
        portable = _prepared_backward[key] = _prepare_backward(grad, request, portable=True)
        return portable(grad, result, request)


def _prepare_backward(grad: Tensor, request: AttentionRequest, portable: bool = False) -> Differentiate:
    """Choose the kernel, if not the portable one in any case, and copy what does not lie in memory as it reads it."""
    pinned, readable_request = os.environ.get("MODELOPT_LITE_KERNEL", ""), request.readable()
    readable = portable_launch.readable
    prepare: Callable[[Tensor, AttentionRequest], Differentiate] = portable_launch.prepare_backward
    if (
        not portable
        and pinned != "portable"
        and hopper_backward_launch.refusal(readable_request) is None
        and (pinned == "hopper" or hopper_backward_launch.pays(readable_request))
    ):
        readable, prepare = hopper_backward_launch.readable, hopper_backward_launch.prepare
    readable_grad = readable(grad)
    prepared = prepare(readable_grad, readable_request)
    if readable_grad is grad and readable_request is request:
        return prepared
    return lambda grad, result, request: prepared(readable(grad), result, request.readable())


def check_backend(request: AttentionRequest, backend: Backend) -> None:
    """Check that there is such a backend, and that it can run a request.

    Raises:
        UnsupportedError: if it cannot.
        ValueError: if there is none.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend: {backend!r} is not allowed; one of {get_args(Backend)}")
    if backend == "triton" and (reason := refusal(request)) is not None:
        raise UnsupportedError(f"backend: 'triton' cannot run this: {reason}")


def signature(request: AttentionRequest, backend: Backend) -> tuple[Any, ...]:
    """Return all that a kernel's choice and preparation depend on."""
    return *request.signature(), backend, os.environ.get("MODELOPT_LITE_KERNEL", "")
