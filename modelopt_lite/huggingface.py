"""The side of this package that Transformers sees: its attention function, its mask function, a model's layers.

Both functions are registered with Transformers under one name. With an attention function alone, Transformers builds
no mask for it, and padding would be ignored without a word.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from .errors import UnsupportedError
from .kernels import Backend, attention, attention_statistics
from .module import SparseAttentionModule
from .plan import DENSE

ATTENTION_NAME = "modelopt_lite"

# What models pass on to every layer and what does not bear on a causal softmax over cached keys.
IRRELEVANT_ARGUMENTS = frozenset(
    {
        "cache_position",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the form Transformers calls it; reads the module's flags.

    Args:
        module: the attention module; without flags it is dense.
        query: ``[batch, query_heads, len_q, head_dim]``.
        key: ``[batch, kv_heads, slots, head_dim]``, cached keys first.
        value: ``[batch, kv_heads, slots, value_dim]``.
        attention_mask: which of the first slots hold real tokens, ``[batch, used slots]``, as made by
            :func:`attention_mask_2d`; None if all do.
        scaling: factor on the scores.
        dropout: must be 0.
        softcap: bound of the scores, if the model has one.
        s_aux: learnable sink logits ``[query_heads]``, if the model has them.
        kwargs: whatever else the model passes on; anything that would change the result is refused.

    Returns:
        The output ``[batch, len_q, query_heads, value_dim]``, 0 at padding, and no attention weights.

    Raises:
        UnsupportedError: if the call asks for something this attention cannot do; names the layer.
    """
    refusal = _refused_argument(module, attention_mask, dropout, kwargs)
    if refusal:
        raise UnsupportedError(f"{layer_name(module)}: {refusal}")
    flags = module.sparse_attention if isinstance(module, SparseAttentionModule) else None
    plan = DENSE if flags is None else flags.plan
    batch, _, len_q, _ = query.shape
    len_k = key.shape[2] if attention_mask is None else attention_mask.shape[1]

    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # [batch, tokens, heads, dim]
    sequences = torch.arange(batch, device=query.device)
    if attention_mask is None:
        lengths_q, lengths_k = torch.full_like(sequences, len_q), torch.full_like(sequences, len_k)
    else:
        # Pack each sequence's real tokens at the front of its slots, in order: no length has to leave the device,
        # and padding may be anywhere.
        rows = sequences[:, None]
        real_q, real_k = attention_mask[:, len_k - len_q :], attention_mask
        lengths_q, lengths_k = real_q.sum(-1), real_k.sum(-1)
        order_q, order_k = (real.int().argsort(dim=-1, descending=True, stable=True) for real in (real_q, real_k))
        query, key, value = query[rows, order_q], key[rows, order_k], value[rows, order_k]

    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    arguments: dict[str, Any] = {
        "b_start_loc": sequences * len_q,
        "b_seq_len": lengths_q,
        "max_input_len": len_q,
        "b_start_loc_k": sequences * len_k,
        "b_seq_len_k": lengths_k,
        "max_input_len_k": len_k,
        "softmax_scale": scaling,
        "softcap": softcap,
        "plan": plan,
    }
    if flags is not None and flags.statistics is not None and flags.enabled and len_q > 1:
        flags.statistics.add(attention_statistics(query, key, **arguments))
    backend: Backend = "auto" if flags is None else flags.method.backend
    output = cast(Tensor, attention(query, key, value, **arguments, s_aux=s_aux, backend=backend))
    output = output.unflatten(0, (batch, len_q))
    if attention_mask is not None:
        output = output[rows, order_q.argsort(dim=-1)]
    return output, None


def _refused_argument(
    module: nn.Module, attention_mask: Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> str | None:
    if attention_mask is not None and attention_mask.dim() != 2:
        return f"an attention mask with {attention_mask.dim()} dimensions is not supported; pass the 2-D padding mask"
    if dropout:
        return f"attention dropout ({dropout}) is not supported; set the model's attention_dropout to 0 or call eval()"
    if kwargs.pop("is_causal", None) is False or getattr(module, "is_causal", True) is False:
        return "attention that is not causal is not supported"
    if kwargs.pop("output_attentions", False):
        return "output_attentions is not supported; unsparsify the model and use attn_implementation='eager'"
    for name, value in kwargs.items():
        if value is not None and name not in IRRELEVANT_ARGUMENTS:
            return f"the argument {name}={type(value).__name__} of the model's attention is not supported"
    return None


def attention_mask_2d(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    cache_position: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Mask in the form Transformers asks for it: which slots of the cache hold real tokens.

    Args:
        batch_size: number of sequences.
        q_length: number of queries; Transformers before 5.2 passes ``cache_position`` instead.
        kv_length: number of slots in the cache, used or not.
        q_offset: slot of the first query.
        kv_offset: tokens the cache has dropped at its front.
        mask_function: the model's mask pattern.
        attention_mask: the padding mask ``[batch, used slots]``, booleans, or None if there is no padding.
        cache_position: the queries' slots.
        kwargs: hints for other masks.

    Returns:
        Booleans ``[batch, q_offset + q_length]``, or None if every slot holds a real token.

    Raises:
        UnsupportedError: if the pattern is not plain causal, or the cache has dropped tokens.
    """
    if mask_function is not causal_mask_function or kv_offset:
        raise UnsupportedError(
            "this model's or this call's attention mask is not plain causal, but has a sliding window, chunks, packed "
            "sequences, or is bidirectional or custom; that is not supported"
        )
    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], cache_position[0]
    assert q_length is not None
    used = int(q_offset) + q_length
    if attention_mask is None:
        return (
            None if used == kv_length else torch.ones(batch_size, used, dtype=torch.bool, device=kwargs.get("device"))
        )
    if attention_mask.shape[1] < used:
        raise UnsupportedError(
            f"attention_mask: {attention_mask.shape[1]} columns are not enough; {used} tokens, cached ones included"
        )
    attention_mask = attention_mask[:, :used]
    # While a graph is traced, what the mask holds is not known.
    all_real = used == kv_length and not torch.compiler.is_compiling() and bool(attention_mask.all())
    return None if all_real else attention_mask


def layer_name(module: nn.Module) -> str:
    """Name an attention module for an error message, as well as it can be known."""
    if isinstance(module, SparseAttentionModule):
        return f"{module.sparse_attention.name} ({type(module).__name__})"
    return f"layer {getattr(module, 'layer_idx', '?')} ({type(module).__name__})"


def _uses_interface(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(forward, "__code__", forward).co_names


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's attention modules by dotted name: those that do the attention, not what wraps them."""
    named = {
        name: module
        for name, module in model.named_modules()
        if "Attention" in type(module).__name__ or _uses_interface(module)
    }
    return {
        name: module
        for name, module in named.items()
        if _uses_interface(module) or not any(other.startswith(f"{name}.") for other in named)
    }


def check_model(model: nn.Module) -> PreTrainedModel:
    """Return the model if its every attention layer can run on this package's attention function.

    That function serves a model as a whole, so layers that stay dense count as well.

    Raises:
        UnsupportedError: naming the layer and the reason.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(f"{type(model).__name__} is not supported; a Transformers PreTrainedModel is")
    modules = attention_modules(model)
    if not modules:
        raise UnsupportedError(f"{type(model).__name__} has no attention module")
    for name, module in modules.items():
        reason = _unsupported(module)
        if reason:
            raise UnsupportedError(f"{name} ({type(module).__name__}): {reason}")
    return model


def _unsupported(module: nn.Module) -> str | None:
    if not _uses_interface(module):
        return "does not go through Transformers' attention interface"
    if getattr(module, "is_causal", None) is not True:
        return "attention that is not causal is not supported"
    # Some models keep the window on the layer, as layers differ, and others only in their config.
    holder = module if hasattr(module, "sliding_window") else getattr(module, "config", None)
    window = getattr(holder, "sliding_window", None)
    if window is not None:
        return f"a sliding window ({window}) is not supported"
    kind = getattr(module, "layer_type", None) or getattr(module, "attention_type", None)
    if kind not in (None, "full_attention"):
        return f"{kind} is not supported"
    return None


AttentionInterface.register(ATTENTION_NAME, attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, attention_mask_2d)
