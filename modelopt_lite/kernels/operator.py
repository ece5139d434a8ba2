"""Attention as a PyTorch operator: its gradients, and its shapes for ``torch.compile``, which does not look inside.

Operators take tensors, numbers and strings, so a request passes through them flattened. Where nothing traces, there is
no operator in between, because that takes the host longer than short kernels take the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import UnsupportedError
from . import choice
from .arguments import check_request
from .blocked import backward_blocked
from .blocks import KeyBlocks
from .choice import Backend, Gradients
from .grid_tables import grid_shape
from .request import SCHEMA, AttentionRequest, ForwardResult
from .selection import select_blocks

_NAMES = (*SCHEMA, "backend")
_ARGUMENTS = ", ".join(f"{kind} {name}" for name, kind in {**SCHEMA, "backend": "str"}.items())
_TENSORS = tuple(name for name, kind in SCHEMA.items() if kind.startswith("Tensor"))
_PACKING = ("starts_q", "lengths_q", "starts_k", "lengths_k", "first_q", "first_k")
_NOTHING_SAVED: dict[str, Any] = dict.fromkeys(("q", "k", "v", "s_aux", *_PACKING, "blocks", "grids"))

torch.library.define("modelopt_lite::attention", f"({_ARGUMENTS}) -> (Tensor, Tensor)")
torch.library.define("modelopt_lite::attention_without_gradient", f"({_ARGUMENTS}) -> Tensor")
torch.library.define(
    "modelopt_lite::attention_backward",
    f"(Tensor grad, Tensor output, Tensor lse, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "modelopt_lite::select_blocks",
    f"({', '.join(f'{kind} {name}' for name, kind in SCHEMA.items())}) -> (Tensor, Tensor, Tensor)",
)
torch.library.define("modelopt_lite::pack", "(Tensor is_first) -> (Tensor, Tensor, Tensor)")
torch.library.define("modelopt_lite::hold", "(Tensor[] tensors) -> Tensor[]")


def compute(request: AttentionRequest, backend: Backend = "auto") -> tuple[Tensor, Tensor | None]:
    """Check and compute a request; differentiable in ``q``, ``k``, ``v`` and ``s_aux``.

    Args:
        request: what is to be computed.
        backend: as in :func:`modelopt_lite.kernels.attention`.

    Returns:
        The output, ``[total_q, query_heads, value_dim]``, and the logarithms of the softmax denominators, ``[total_q,
        query_heads]``, without gradient; the latter may be None or empty if the request does not want them.

    Raises:
        ValueError: if an argument is wrong; the message names it.
        UnsupportedError: if the backend asked for cannot run the request.
    """
    is_traced_call = is_traced(request.q)
    if not (is_traced_call or _needs_gradient(request)):
        return choice.run(request, backend)
    if request.plan.chooses_blocks and request.blocks is None:
        check_request(request)
        request = request.without_needless_choice(knows_lengths=not is_traced_call)
        if request.plan.chooses_blocks:
            request = _with_blocks(request)
    if _needs_gradient(request):
        request = request._replace(with_lse=True)
    may_have_gradient = request.with_lse or not torch.compiler.is_compiling() or _may_want_gradients_later()
    if request.output_rows is not None and may_have_gradient:
        check_request(request)
        found, found_lse = compute(request._replace(output_rows=None), backend)
        # An LSE that is not wanted may be empty.
        return request.placed(found), request.placed(found_lse) if request.with_lse and found_lse is not None else None
    if not is_traced_call:
        if request.page_table is not None:  # a known signature that wants no gradient is not checked again
            check_request(request)
        q, k, v, s_aux = request.q, request.k, request.v, request.s_aux
        recorded: tuple[Tensor, Tensor] = _Recorded.apply(q, k, v, s_aux, request, backend)  # type: ignore[no-untyped-call]
        return recorded
    check_request(request)
    choice.check_backend(request, backend)
    inputs = (*request.flatten(), backend)
    if not may_have_gradient:
        return torch.ops.modelopt_lite.attention_without_gradient(*inputs), None
    if torch.compiler.is_compiling():
        output, lse = torch.ops.modelopt_lite.attention(*inputs)
    else:
        output, lse = _Transformed.apply(*inputs)  # type: ignore[no-untyped-call]
    return output, lse.detach()


def gradients(
    grad: Tensor, output: Tensor, lse: Tensor, request: AttentionRequest, backend: Backend = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of a request without recording anything.

    Args:
        grad: gradient of the output.
        output: the output, over all keys, of which the request may have a part.
        lse: the logarithms of its softmax denominators, likewise.
        request: what was computed, with the lists of blocks if its plan chooses any.
        backend: as for the forward pass.

    Returns:
        The gradients of ``q``, ``k``, ``v`` and ``s_aux``, the last one empty if there is none.
    """
    grads: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.modelopt_lite.attention_backward(
        grad, output, lse, *request.flatten(), backend
    )
    return grads


def _with_blocks(request: AttentionRequest) -> AttentionRequest:
    """Return a request with the key blocks that its plan chooses, which has no gradient."""
    if not is_traced(request.q):
        return request._replace(blocks=select_blocks(request))
    with torch.no_grad():
        counts, indices, starts = torch.ops.modelopt_lite.select_blocks(*request.flatten())
    return request._replace(blocks=KeyBlocks(counts, indices, starts, *request.grid))


def pack(is_first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the sequences that follow each other in the rows of a batch.

    In a graph an operator does it, so that the graph has no lengths.

    It waits for the device, unless a CUDA graph is captured, where there are as many sequences as tokens, nearly all of
    them empty.

    Args:
        is_first: where a sequence begins, booleans ``[batch, length]``; each row begins one in any case.

    Returns:
        The first row and the length of each sequence over the flattened batch, ``[batch * length]`` each, those that
        are there coming first; and :attr:`AttentionRequest.counts`.
    """
    starts, lengths, counts = (torch.ops.modelopt_lite.pack if is_traced(is_first) else _pack)(is_first)
    return starts, lengths, counts


def _pack(is_first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    begins = torch.cat([torch.ones_like(is_first[:, :1]), is_first[:, 1:]], dim=1).flatten()
    sequence = begins.cumsum(0) - 1
    lengths = torch.zeros_like(sequence).scatter_add(0, sequence, torch.ones_like(sequence))
    if is_first.is_cuda and torch.cuda.is_current_stream_capturing():
        counts = torch.tensor([is_first.numel(), is_first.shape[1]], device="cpu")
    else:
        counts = torch.stack([begins.sum(), lengths.max()]).cpu()
    return lengths.cumsum(0) - lengths, lengths, counts


torch.library.impl("modelopt_lite::pack", "default", _pack)


@torch.library.register_fake("modelopt_lite::pack")  # type: ignore[untyped-decorator]
def _(is_first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    starts = is_first.new_empty(is_first.numel(), dtype=torch.int64)
    return starts, torch.empty_like(starts), torch.empty(2, dtype=torch.int64, device="cpu")


def hold(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies that a traced graph computes once.

    PyTorch's compiler has small tensors computed again, each by a kernel of its own, for every operator that they go
    into.
    """
    copies: list[Tensor] = torch.ops.modelopt_lite.hold(tensors)
    return copies


@torch.library.impl("modelopt_lite::hold", "default")
def _hold(tensors: list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_add(tensors, 0))  # copies all in one launch


@torch.library.register_fake("modelopt_lite::hold")  # type: ignore[untyped-decorator]
def _(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x) for x in tensors]


torch.library.register_vmap(
    "modelopt_lite::hold", lambda _, in_dims, tensors: (torch.ops.modelopt_lite.hold(tensors), in_dims[0])
)


@torch.library.impl("modelopt_lite::select_blocks", "default")
def _select_blocks(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    request = AttentionRequest.unflatten(inputs)
    blocks = select_blocks(request.present())
    if request.counts is None:
        return blocks.counts, blocks.indices, blocks.starts
    # A graph knows the number of sequences and their lengths by upper bounds alone.
    rows, columns = grid_shape(request, *request.grid)
    padding = (0, rows - blocks.counts.shape[1])
    indices = pad(blocks.indices, (0, columns - blocks.indices.shape[2], *padding))
    starts = pad(blocks.starts, (0, request.starts_q.shape[0] - blocks.starts.shape[0]))
    return pad(blocks.counts, padding), indices, starts


@torch.library.register_fake("modelopt_lite::select_blocks")  # type: ignore[untyped-decorator]
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    request = AttentionRequest.unflatten(inputs)
    plan, q = request.plan, request.q
    per_kv_head = plan.blocks is not None and plan.blocks.per_kv_head and plan.skip is None
    heads = request.k.shape[1] if per_kv_head else q.shape[1]
    rows, columns = grid_shape(request, *request.grid)
    counts = q.new_empty(heads, rows, dtype=torch.int32)
    return counts, q.new_empty(heads, rows, columns, dtype=torch.int32), request.starts_q.to(torch.int32)


@torch.library.impl("modelopt_lite::attention", "default")
def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    *fields, backend = inputs
    request = AttentionRequest.unflatten(fields).present()
    output, lse = choice.run(request, backend)
    return output, lse if request.with_lse and lse is not None else _no_lse(request.q)


@torch.library.impl("modelopt_lite::attention_without_gradient", "default")
def _forward_alone(*inputs: Any) -> Tensor:
    # A graph that somebody keeps, and differentiates all the same, gets PyTorch's warning that this has no gradient.
    *fields, backend = inputs
    output, _ = choice.run(AttentionRequest.unflatten(fields).present(), backend)
    return output


@torch.library.register_fake("modelopt_lite::attention_without_gradient")  # type: ignore[untyped-decorator]
def _(*inputs: Any) -> Tensor:
    fields = dict(zip(_NAMES, inputs, strict=True))
    return _new_output(fields["q"], fields["v"])


@torch.library.register_fake("modelopt_lite::attention")  # type: ignore[untyped-decorator]
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    fields = dict(zip(_NAMES, inputs, strict=True))
    q, v = fields["q"], fields["v"]
    accumulated = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty(q.shape[:2], dtype=accumulated) if fields["with_lse"] else _no_lse(q)
    return _new_output(q, v), lse


def _new_output(q: Tensor, v: Tensor) -> Tensor:
    """Return memory for an output."""
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


def _no_lse(q: Tensor) -> Tensor:
    """Return what an operator has to return where there is nothing."""
    return q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.impl("modelopt_lite::attention_backward", "default")
def _backward(grad: Tensor, output: Tensor, lse: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *fields, backend = inputs
    request = AttentionRequest.unflatten(fields).present()
    *grads, grad_s_aux = _differentiate(grad, ForwardResult(output, lse), request, backend)
    # An operator returns tensors, so no gradient is an empty one.
    return (*grads, request.q.new_empty(0) if grad_s_aux is None else grad_s_aux)  # type: ignore[return-value]


def _differentiate(grad: Tensor, result: ForwardResult, request: AttentionRequest, backend: Backend) -> Gradients:
    assert request.output_rows is None, "the gradient of rows that have been moved"
    if request.may_lack_keys:
        # Nothing depends on these rows, so their gradient may be anything, and 0 * NaN is not 0.
        grad = torch.where((result.lse == -torch.inf)[..., None], 0.0, grad)
    if choice.differentiates_on_gpu(request, backend):
        return choice.differentiate(grad, result, request)
    assert result.output is not None
    with torch.autocast(request.q.device.type, enabled=False):
        return backward_blocked(grad, result.output, result.lse, request)


@torch.library.register_fake("modelopt_lite::attention_backward")  # type: ignore[untyped-decorator]
def _(grad: Tensor, output: Tensor, lse: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fields = dict(zip(_NAMES, inputs, strict=True))
    q, s_aux = fields["q"], fields["s_aux"]
    grad_s_aux = q.new_empty(0) if s_aux is None else s_aux.new_empty(s_aux.shape)
    return (*(fields[name].new_empty(fields[name].shape) for name in ("q", "k", "v")), grad_s_aux)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
    fields = dict(zip(_NAMES, inputs, strict=True))
    ctx.save_for_backward(*output, *(fields.pop(name) for name in _TENSORS))
    ctx.fields = fields


def _backward_of_forward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    output, lse, *tensors = ctx.saved_tensors
    if lse.shape != output.shape[:2]:
        raise ValueError("with_lse: False is not allowed where gradients are wanted")
    fields = {**ctx.fields, **dict(zip(_TENSORS, tensors, strict=True))}
    grads = _recorded_gradients(grad, output, lse, [fields[name] for name in _NAMES])
    by_name = dict(zip(("q", "k", "v", "s_aux"), grads, strict=True))
    if fields["s_aux"] is None:
        del by_name["s_aux"]
    return tuple(by_name.get(name) for name in _NAMES)


def _recorded_gradients(grad: Tensor, output: Tensor, lse: Tensor, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """Compute gradients where something may look at how, from what the operator of the forward takes and returns."""
    if torch.compiler.is_compiling():
        grads: tuple[Tensor, ...] = torch.ops.modelopt_lite.attention_backward(grad, output, lse, *inputs)
    else:
        grads = _Differentiated.apply(grad, output, lse, *inputs)  # type: ignore[no-untyped-call]
    return grads


def _one_by_one(operator: Any, size: int, in_dims: Sequence[int | None], inputs: Sequence[Any]) -> tuple[Any, Any]:
    """Run an operator on each element of a dimension of its inputs, as :func:`torch.vmap` asks for it."""
    results = [
        operator(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)))
        for i in range(size)
    ]
    outputs = tuple(torch.stack(column) for column in zip(*results, strict=True))
    return outputs, (0,) * len(outputs)


class _Recorded(torch.autograd.Function):
    """A request whose gradients are wanted, where nothing traces."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, *rest: Any) -> Any:
        request, backend = rest
        output, lse = choice.run(request, backend)
        packing, blocks = [getattr(request, name) for name in _PACKING], request.blocks
        ctx.save_for_backward(output, lse, q, k, v, s_aux, *packing, *(() if blocks is None else blocks[:3]))
        # Autograd alone holds tensors: it finds out if they change, and drops or moves them as its hooks want.
        ctx.request = request._replace(**_NOTHING_SAVED)
        ctx.block_sizes, ctx.backend = request.grid, backend
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> Any:
        if grad is None:
            return (None,) * 6
        output, lse, q, k, v, s_aux, *tensors = ctx.saved_tensors
        packing, lists = dict(zip(_PACKING, tensors, strict=False)), tensors[len(_PACKING) :]
        blocks = KeyBlocks(*lists, *ctx.block_sizes) if lists else None
        request = ctx.request._replace(q=q, k=k, v=v, s_aux=s_aux, blocks=blocks, **packing)
        # Batched gradients (``is_grads_batched``) have no rules for the operations of a backward pass.
        is_batched = torch._C._functorch.is_legacy_batchedtensor(grad)
        if torch.is_grad_enabled() or is_batched or is_traced(grad):
            grads = _recorded_gradients(grad, output, lse, (*request.flatten(), ctx.backend))
            return (*grads[:3], None if request.s_aux is None else grads[3], None, None)
        result = ForwardResult(output, lse)
        # Unless the graph or the output is kept, only the result holds the output now.
        del output
        ctx.maybe_clear_saved_tensors()
        return (*_differentiate(grad, result, request, ctx.backend), None, None)


class _Transformed(torch.autograd.Function):
    """The operator where nothing is compiled, so that functions that :mod:`torch.func` transforms can call it."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return torch.ops.modelopt_lite.attention(*inputs)

    setup_context = staticmethod(_save_for_backward)
    backward = staticmethod(_backward_of_forward)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        return _one_by_one(_Transformed.apply, info.batch_size, in_dims, inputs)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise UnsupportedError(
            "forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad) are not supported; use reverse mode "
            "(torch.func.vjp), or unsparsify the model and use attn_implementation='eager'"
        )


class _Differentiated(torch.autograd.Function):
    """The operator of the gradients where nothing is compiled, so that a gradient of them is refused."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return torch.ops.modelopt_lite.attention_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep nothing: there is no gradient."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        return _one_by_one(_Differentiated.apply, info.batch_size, in_dims, inputs)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise UnsupportedError(
            "second derivatives of attention (a gradient penalty, torch.func.hessian) are not supported; unsparsify "
            "the model and use attn_implementation='eager'"
        )


torch.library.register_autograd("modelopt_lite::attention", _backward_of_forward, setup_context=_save_for_backward)
for _name in ("attention", "attention_backward", "select_blocks"):
    _operator = getattr(torch.ops.modelopt_lite, _name)
    torch.library.register_vmap(
        f"modelopt_lite::{_name}",
        lambda info, in_dims, *inputs, _operator=_operator: _one_by_one(_operator, info.batch_size, in_dims, inputs),
    )


def _needs_gradient(request: AttentionRequest) -> bool:
    return torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (request.q, request.k, request.v, request.s_aux)
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _may_want_gradients_later() -> bool:
    """Whether a graph may be differentiated though no tensor says so: in transforms, or when it has been exported."""
    return torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active()


def is_traced(x: Tensor | None = None) -> bool:
    """Whether something looks at the operators that run, or a tensor has no memory of its own."""
    return (
        torch.compiler.is_compiling()
        or (x is not None and (type(x) is not Tensor or x.is_meta))
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
    )
