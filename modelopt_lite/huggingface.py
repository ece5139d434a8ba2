"""The attention functions that Transformers calls, and what makes a model call them.

The attention function and the mask function of :mod:`~.transformers_masks` are registered with Transformers under one
name. The mask function hands a :class:`~.layout.Layout` to the attention function in the place of a mask. Continuous
batching has an attention function of its own, under a second name.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from .discovery import ATTENTION_NAME
from .errors import UnsupportedError
from .layout import Layout, attend, layer_name, whole_layout
from .module import original_class, sparse_modules
from .transformers_masks import attention_mask

# In continuous batching Transformers goes by the name: it is "flash" that takes packed sequences without a mask.
PAGED_ATTENTION_NAME = "modelopt_lite_paged_flash"
PAGING_SINCE = (5, 19)  # before, it knew only "paged|..." names and handed the cache's indices to it

# What models pass on to every layer and what does not bear on the result, or is in the layout already.
IRRELEVANT_ARGUMENTS = frozenset(
    {
        "cache_position",
        "deterministic",
        "logits_indices",
        "logits_processor_args",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
# What continuous batching hands to every layer for its cache.
PAGING_ARGUMENTS = ("block_table", "cu_seq_lens_k", "max_length_k", "read_index", "write_index")
_NO_WEIGHTS = "output_attentions is not supported; unsparsify the model and use attn_implementation='eager'"
_HOOKS_ATTRIBUTE = "_hooks_of_sparsity"

logger = logging.getLogger(__name__)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Layout | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the form Transformers calls it; reads the module's flags.

    Args:
        module: the attention module; without flags it is dense.
        query: ``[batch, query_heads, len_q, head_dim]``.
        key: ``[batch, kv_heads, slots, head_dim]``, cached keys first.
        value: ``[batch, kv_heads, slots, value_dim]``.
        attention_mask: what :func:`attention_mask` made, or None if the model asked for none.
        scaling: factor on the scores.
        dropout: must be 0.
        softcap: bound of the scores, if the model has one.
        s_aux: learnable sink logits ``[query_heads]``, if the model has them.
        is_causal: whether the attention is causal where there is no mask; by default what the module says, else true.
        sliding_window: not needed beside a mask, which holds it.
        cu_seq_lens_q: cumulative lengths of packed sequences, ``[sequences + 1]``.
        cu_seq_lens_k: must come along, and equal the former.
        max_length_q: the longest of them.
        max_length_k: the same.
        kwargs: whatever else the model passes on; anything that would change the result is refused.

    Returns:
        The output ``[batch, len_q, query_heads, value_dim]``, 0 at padding, and no attention weights.

    Raises:
        UnsupportedError: if the call asks for something this attention cannot do; names the layer.
    """
    refusal = _refused_argument(attention_mask, dropout, kwargs)
    if refusal:
        raise UnsupportedError(f"{layer_name(module)}: {refusal}")
    if isinstance(attention_mask, Layout):
        layout = attention_mask
    else:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        layout = _layout_without_mask(module, query, key, is_causal, sliding_window)
    if cu_seq_lens_q is not None:
        layout = _layout_of_lengths(module, layout, cu_seq_lens_q, cu_seq_lens_k, max_length_q)
    return attend(module, query, key, value, layout, scaling=scaling, softcap=softcap, s_aux=s_aux), None


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    cache: Any = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    position_ids: Tensor | None = None,
    is_causal: bool = True,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the form Transformers' continuous batching calls it; reads the module's flags.

    The one row of the batch holds pieces of many sequences: of prompts, and single tokens, which are decode steps.

    Args:
        module: the attention module; without flags it is dense.
        query: ``[1, query_heads, len_q, head_dim]``.
        key: ``[1, kv_heads, len_q, head_dim]``; the cache stores it and gives all keys of each piece's sequence.
        value: ``[1, kv_heads, len_q, value_dim]``, likewise.
        attention_mask: None, as Transformers builds no mask for this attention.
        scaling: factor on the scores.
        dropout: must be 0.
        softcap: bound of the scores, if the model has one.
        s_aux: learnable sink logits ``[query_heads]``, if the model has them.
        sliding_window: the layer's own window, if it has one; the cache has dropped what lies before it.
        cache: the paged cache.
        cu_seq_lens_q: cumulative numbers of queries, ``[pieces + 1]``.
        max_length_q: the largest number of queries.
        position_ids: positions of the queries, ``[1, len_q]``; needed with a sliding window.
        is_causal: whether the attention is causal.
        kwargs: what the cache needs, and whatever else the model passes on; anything that would change the result is
            refused.

    Returns:
        The output ``[1, len_q, query_heads, value_dim]`` and no attention weights.

    Raises:
        UnsupportedError: if the call asks for something this attention cannot do; names the layer.
    """
    paging = {name: kwargs.pop(name, None) for name in PAGING_ARGUMENTS}
    refusal = _refused_argument(attention_mask, dropout, kwargs)
    if cache is None or cu_seq_lens_q is None:
        refusal = (
            "there is no paged cache; inside continuous_batching() only continuous batching can run the model, and its "
            "layers must pass on what Transformers hands to them for it"
        )
    elif sliding_window is not None and position_ids is None:
        refusal = "its model does not pass position_ids on, without which a sliding window's keys cannot be placed"
    if refusal or cu_seq_lens_q is None:
        raise UnsupportedError(f"{layer_name(module)}: {refusal}")
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=paging)
    starts_q, lengths_q = cu_seq_lens_q[:-1], cu_seq_lens_q.diff()
    starts_k, lengths_k = paging["cu_seq_lens_k"][:-1], paging["cu_seq_lens_k"].diff()
    first_k = None
    if sliding_window is not None and position_ids is not None:
        # Behind the last piece there may be empty ones.
        last = position_ids[0, (starts_q + lengths_q - 1).clamp(min=0)]
        first_k = last + 1 - lengths_k
    layout = Layout(
        1,
        query.shape[2],
        key.shape[2],
        is_causal,
        sliding_window,
        True,
        starts_q,
        lengths_q,
        max_length_q,
        starts_k,
        lengths_k,
        paging["max_length_k"],
        None,
        first_k,
    )
    return attend(module, query, key, value, layout, scaling=scaling, softcap=softcap, s_aux=s_aux), None


def _refused_argument(mask: Layout | Tensor | None, dropout: float, kwargs: dict[str, Any]) -> str | None:
    if isinstance(mask, Tensor):
        return (
            f"an attention mask with {mask.dim()} dimensions of one's own is not supported; pass the 2-D padding mask "
            "to the model"
        )
    if dropout:
        return f"attention dropout ({dropout}) is not supported; set the model's attention_dropout to 0 or call eval()"
    if kwargs.pop("output_attentions", False):
        return _NO_WEIGHTS
    for name, value in kwargs.items():
        if value is not None and name not in IRRELEVANT_ARGUMENTS:
            return f"the argument {name}={type(value).__name__} of the model's attention is not supported"
    return None


def _layout_without_mask(
    module: nn.Module, query: Tensor, key: Tensor, is_causal: bool, sliding_window: int | None
) -> Layout:
    """Lay out a call for which the model asked for no mask, as some do where nothing is masked but the future."""
    batch, len_q, slots = query.shape[0], query.shape[2], key.shape[2]
    if is_causal and 1 < len_q != slots:
        raise UnsupportedError(f"{layer_name(module)}: {len_q} queries, {slots} keys and no mask is not supported")
    if sliding_window is not None and sliding_window < slots:
        raise UnsupportedError(
            f"{layer_name(module)}: a sliding window ({sliding_window}) without a mask is not supported"
        )
    return whole_layout(batch, len_q, slots, query.device, is_causal=is_causal)


def _layout_of_lengths(
    module: nn.Module, layout: Layout, lengths_q: Tensor, lengths_k: Tensor | None, longest: int | Tensor | None
) -> Layout:
    """Lay out packed sequences that are given by their cumulative lengths over the flattened batch."""
    refusal = None
    if not layout.unpadded or layout.len_q != layout.slots:
        refusal = "cu_seq_lens_q together with padding or a cache is not supported"
    elif not isinstance(lengths_k, Tensor) or not _may_equal(lengths_q, lengths_k):
        refusal = "cu_seq_lens_k is missing or does not match cu_seq_lens_q; packed sequences need both, and equal ones"
    if refusal:
        raise UnsupportedError(f"{layer_name(module)}: {refusal}")
    starts, lengths = lengths_q[:-1], lengths_q.diff()
    packing = (starts, lengths, longest if isinstance(longest, int) else layout.batch * layout.len_q)
    return layout._replace(
        starts_q=starts,
        lengths_q=lengths,
        max_q=packing[2],
        starts_k=starts,
        lengths_k=lengths,
        max_k=packing[2],
    )


def _may_equal(one: Tensor, other: Tensor) -> bool:
    """Compare shapes, and values where that waits for nothing."""
    can_read = one.device.type == other.device.type == "cpu" and not torch.compiler.is_compiling()
    return one.shape == other.shape and (not can_read or bool((one == other).all()))


def interface_configs(model: PreTrainedModel, names: Iterable[str]) -> list[PreTrainedConfig]:
    """Return the configs that say which attention function some layers call, and which masks their model makes.

    These are the configs of the layers and of the modules that they are inside of. Other parts of the model keep their
    implementation, unless they share one of these configs.

    Args:
        model: the model.
        names: dotted names of layers in it that go through Transformers' attention interface.

    Raises:
        UnsupportedError: if one of the layers has no config; names it.
    """
    modules = dict(model.named_modules())
    found: dict[int, PreTrainedConfig] = {}
    for name in names:
        if not isinstance(getattr(modules[name], "config", None), PreTrainedConfig):
            raise UnsupportedError(
                f"{name} ({original_class(modules[name]).__name__}): its attention implementation cannot be set, as it "
                "has no config of Transformers"
            )
        parts = name.split(".") if name else []
        for depth in range(len(parts) + 1):
            config = getattr(modules[".".join(parts[:depth])], "config", None)
            if isinstance(config, PreTrainedConfig):
                found[id(config)] = config
    return list(found.values())


def own_configs(root: nn.Module, name: str) -> None:
    """Give a Transformers model configs of its own, equal to those it has, which another model may share.

    Args:
        root: what the model is inside of, or itself; what wraps the model gets the same configs.
        name: the model's dotted name in it.
    """
    copies: dict[int, Any] = {}
    model = root.get_submodule(name)
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, PreTrainedConfig):
                copy.deepcopy(value, copies)
    wrappers = [each for outer, each in root.named_modules() if not outer or name.startswith(f"{outer}.")]
    for module in (*wrappers, *model.modules()):
        for attribute, value in vars(module).items():
            if isinstance(value, PreTrainedConfig) and id(value) in copies:
                vars(module)[attribute] = copies[id(value)]


def set_implementation(configs: Iterable[PreTrainedConfig], name: str) -> list[tuple[PreTrainedConfig, str | None]]:
    """Set the attention implementation in some configs; return what :func:`restore_implementations` restores."""
    before = [(config, config._attn_implementation) for config in configs]
    for config, _ in before:
        # Not by set_attn_implementation, which takes every name with "flash" in it for a package to import, and knows
        # no parts without an implementation. The mapping keeps what is set in the parts of a config.
        config._attn_implementation = {"": name}
    return before


def restore_implementations(before: Iterable[tuple[PreTrainedConfig, str | None]]) -> None:
    """Restore the attention implementations of configs, but for those that something else has changed since."""
    for config, name in before:
        if config._attn_implementation in (ATTENTION_NAME, PAGED_ATTENTION_NAME):
            config._attn_implementation = {"": name}


def watch(model: PreTrainedModel) -> None:
    """Refuse to return attention weights, and warn if adapters are saved without the sparsity, until :func:`unwatch`.

    Args:
        model: a sparse model; its parts refuse as well.
    """
    hooks = [model.register_state_dict_pre_hook(_warn_of_adapters)]
    # All of them: wrappers, such as those of PEFT, call the outermost model's forward itself, past its hooks.
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            hooks.append(part.register_forward_pre_hook(_refuse_attention_weights, with_kwargs=True))
    setattr(model, _HOOKS_ATTRIBUTE, hooks)


def unwatch(model: nn.Module) -> None:
    """Undo :func:`watch`."""
    for hook in vars(model).pop(_HOOKS_ATTRIBUTE):
        hook.remove()


def _refuse_attention_weights(model: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
    """Refuse, before a model's forward, to return attention weights; not all models tell their layers."""
    wanted = kwargs.get("output_attentions")
    if wanted is None:
        wanted = getattr(model.config, "output_attentions", False)
    if wanted and (modules := sparse_modules(model)):
        raise UnsupportedError(f"{layer_name(next(iter(modules.values())))}: {_NO_WEIGHTS}")


_saving_sparsity: ContextVar[bool] = ContextVar("modelopt_lite_saving", default=False)


@contextmanager
def saving_sparsity() -> Iterator[None]:
    """Let adapters be saved inside the ``with`` block, as the caller saves the sparsity beside them."""
    token = _saving_sparsity.set(True)
    try:
        yield
    finally:
        _saving_sparsity.reset(token)


def _warn_of_adapters(model: nn.Module, _prefix: str, _keep_vars: bool) -> None:
    """Warn, where the weights of a model with adapters are asked for, that PEFT saves nothing else."""
    if getattr(model, "peft_config", None) and not _saving_sparsity.get():
        _warn_once(type(model).__name__)


@functools.cache
def _warn_once(class_name: str) -> None:
    logger.warning(
        "%s is sparse and has adapters: PEFT saves them without the sparsity; use "
        "modelopt_lite.save_pretrained(model, folder) instead of model.save_pretrained(folder)",
        class_name,
    )


def check_paging() -> None:
    """Check that this version of Transformers has a place for this package in continuous batching.

    Raises:
        UnsupportedError: if not.
    """
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < PAGING_SINCE:
        wanted = ".".join(map(str, PAGING_SINCE))
        raise UnsupportedError(
            f"continuous batching needs Transformers {wanted} or later, not {transformers.__version__}"
        )


AttentionInterface.register(ATTENTION_NAME, attention_forward)
AttentionInterface.register(PAGED_ATTENTION_NAME, paged_attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, attention_mask)
