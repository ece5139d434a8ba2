"""Attention modules that call ``torch.nn.functional.scaled_dot_product_attention`` themselves.

While such a module's forward runs, a :class:`torch.overrides.TorchFunctionMode` sees PyTorch's functions before they
run, and takes that one over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedError
from .layout import READABLE_MASKS, Layout, attend, layer_name, layout_of_mask, refuse_context_parallel, whole_layout
from .module import SparseAttentionModule, decide
from .recomputation import Decision


class InterceptedAttentionModule(SparseAttentionModule):
    """Mixed in before an attention class that calls PyTorch's attention; takes these calls over.

    Switched off, and for single queries (decode) unless the method is sparse there too, PyTorch's attention runs.
    """

    # Not ``forward``: device maps put one onto the instance, and keep the one that was there.
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        with _Interception(self):
            return super().__call__(*args, **kwargs)


class _Interception(TorchFunctionMode):
    def __init__(self, module: InterceptedAttentionModule) -> None:
        super().__init__()
        self.module = module

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        query: Tensor = args[0] if args else kwargs["query"]
        is_decode = query.shape[-2] == 1
        decision = decide(self.module, is_decode)
        if not decision.is_on or (is_decode and not decision.plan.sparse_decode):
            return func(*args, **kwargs)
        return _attention(self.module, decision, *args, **kwargs)


def _attention(
    module: nn.Module,
    decision: Decision,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute what ``scaled_dot_product_attention`` would, sparsely; arguments and result as of that function.

    Raises:
        UnsupportedError: if the mask is neither causal nor bidirectional with padding, or there is dropout; names the
            layer.
    """
    shape = query.shape
    refusal = refuse_context_parallel()
    if refusal is not None:
        raise UnsupportedError(f"{layer_name(module)}: {refusal}")
    if dropout_p:
        refusal = f"attention dropout ({dropout_p}) is not supported; call eval() or set it to 0"
    elif query.dim() not in (3, 4) or key.dim() != query.dim() or value.dim() != query.dim():
        refusal = f"queries with {query.dim()} dimensions are not supported; [batch, heads, tokens, dim] are"
    elif not enable_gqa and query.dim() == 4 and key.shape[1] not in (1, query.shape[1]):
        refusal = f"{query.shape[1]} query heads and {key.shape[1]} key heads need enable_gqa"
    if refusal is None and query.dim() == 3:  # [batch, tokens, dim]
        query, key, value = query[:, None], key[:, None], value[:, None]
        attn_mask = attn_mask[:, None] if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
    layout = None
    if refusal is None:
        layout = _layout(query, key, attn_mask, is_causal)
    if layout is None:
        refusal = refusal or (f"its attention mask is not supported; it {READABLE_MASKS}")
        raise UnsupportedError(f"{layer_name(module)}: {refusal}")
    output = attend(module, query, key, value, layout, scaling=scale, decision=decision).transpose(1, 2)
    return output[:, 0] if len(shape) == 3 else output


def _layout(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> Layout | None:
    """Return the layout of a call, None if there is none that says the same as its mask."""
    batch, _, len_q, _ = query.shape
    slots = key.shape[2]
    if mask is None:
        # PyTorch's causal mask counts queries and keys alike from 0, so with fewer queries the last keys go unused.
        first_q = 0 if len_q != slots else None
        return whole_layout(batch, len_q, slots, query.device, is_causal=is_causal, first_q=first_q)
    if is_causal or torch.compiler.is_compiling():
        return None
    return layout_of_mask(mask, batch, len_q, slots)
