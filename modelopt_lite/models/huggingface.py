"""The attention functions that Transformers calls, and what makes a model call them.

The attention function and the mask function of :mod:`~.transformers_masks` are registered with Transformers under one
name. The mask function hands a :class:`~.layout.Layout` to the attention function in the place of a mask. Continuous
batching has an attention function of its own, under a second name.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UnsupportedError
from ..kernels import MAX_QUERIES, is_traced
from .discovery import ATTENTION_NAME, forward_globals, uses_interface
from .layout import (
    READABLE_MASKS,
    Layout,
    attend,
    layer_name,
    layout_of_mask,
    likeness,
    refuse_context_parallel,
    remembered,
    whole_call,
    whole_layout,
)
from .module import SparseAttentionModule, caller_state, decide, original_class, sparse_modules
from .parallel import ARGUMENT, Shards, attend_sharded
from .recomputation import Decision, is_in_function
from .transformers_masks import Mask, RefusedMask, attention_mask, note_positions, packed_by_positions

logger = logging.getLogger(__name__)

# In continuous batching Transformers goes by the name: it is "flash" that takes packed sequences without a mask.
PAGED_ATTENTION_NAME = "modelopt_lite_paged_flash"
PAGING_SINCE = (5, 19)  # before, it knew only "paged|..." names and handed the cache's indices to it

# What models pass on to every layer and what does not bear on the result, or is in the layout already.
IRRELEVANT_ARGUMENTS = frozenset(
    {
        "cache_position",
        "deterministic",
        "ignore_index",
        "input_ids",
        "inputs_embeds",
        "labels",
        "logits_indices",
        "logits_processor_args",
        "logits_to_keep",
        "mm_token_type_ids",
        "num_items_in_batch",
        "num_logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "return_loss",
        "seq_idx",
        "shift_labels",
        "token_type_ids",
        "use_cache",
    }
)
# What changes attention, and what no layout can say.
REFUSED_ARGUMENTS = frozenset(
    {
        "alibi",
        "attention_bias",
        "attention_similarity",
        "block_indices",
        "block_mask",
        "cache",
        "context_parallel",
        "head_mask",
        "indices",
        "layer_head_mask",
        "position_bias",
        "relative_position_bias",
        "score_mod",
        "sinks",
    }
)
# What :func:`_attention` takes by name.
_READ_ARGUMENTS = frozenset(
    {
        "softcap",
        "s_aux",
        "is_causal",
        "sliding_window",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "position_ids",
    }
)
# What changes nothing in a call whose layout holds the rest.
_PLAIN_ARGUMENTS = (IRRELEVANT_ARGUMENTS - {"output_attentions"}) | {"is_causal", "sliding_window", "softcap"}
# What continuous batching hands to every layer for its cache.
PAGING_ARGUMENTS = ("block_table", "cu_seq_lens_k", "max_length_k", "read_index", "write_index")
_NO_WEIGHTS = "output_attentions is not supported; unsparsify the model and use attn_implementation='eager'"
_HOOKS_ATTRIBUTE = "_hooks_of_sparsity"
OWN_ATTRIBUTE = "_own_attention"
"""Attribute of a module: the :class:`OwnAttention` that it had before it was switched."""


class OwnAttention(NamedTuple):
    """An attention implementation of Transformers.

    Attributes:
        name: its name.
        eager: the eager attention function of the module's file, if this is the one; other functions are looked up.
    """

    name: str
    eager: Callable[..., Any] | None = None

    def __deepcopy__(self, memo: object) -> OwnAttention:
        """Return it itself: copies of functions are no use."""
        return self


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    position_ids: Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention in the form Transformers calls it; reads the module's flags.

    A module that no pattern matched does what it did before, and so does a matched one in a call that is dense and has
    a mask that no layout says.

    Args:
        module: the attention module; without flags it is dense.
        query: ``[batch, query_heads, len_q, head_dim]``.
        key: ``[batch, kv_heads, slots, head_dim]``, cached keys first.
        value: ``[batch, kv_heads, slots, value_dim]``.
        attention_mask: what :func:`~.transformers_masks.attention_mask` made; a finished mask, which is read; or None
            if the model asked for none.
        dropout: must be 0.
        scaling: factor on the scores.
        position_ids: positions of the queries, if the model passes them on.
        use_cache: what most models pass on besides; it does not matter.
        kwargs: whatever else the model passes on: what :func:`_attention` names, what does not change the result, and
            what is refused.

    Returns:
        The output ``[batch, len_q, query_heads, value_dim]``, 0 at padding, and no attention weights.

    Raises:
        UnsupportedError: if the call asks for something this attention cannot do; names the layer.
    """
    if (
        # A layer of this forward has gone the longer ways, with all their checks. What these cannot say of another
        # layer is written out here, because Python's time is the user's in short prefills and decode steps: what
        # :func:`~.module.present_decision` and :func:`~.layout.whole_call` ask.
        not is_dynamo_compiling()
        and type(attention_mask) is Layout
        and (shared := attention_mask.request) is not None
        and not kwargs
        and not dropout
        and type(query) is Tensor
        and (flags := (own_state := module.__dict__).get("sparse_attention")) is not None
        and not flags.is_sharded
        and "call_context" not in own_state
        and caller_state.get() is None
        and not torch.is_grad_enabled()
        and (position_ids is None or attention_mask.len_q == 1 or shared.packed is attention_mask)
    ):
        if (
            (dense := shared.dense) is not None
            and dense.like == (query.shape, key.shape, value.shape, query.dtype, query.device)
            and (
                flags.leaves_decode
                if dense.is_decode
                else (flags.leaves_prefill or (flags.leaves_dense and not flags.enabled)) and not is_in_function()
            )
        ):
            flags.last_call = object()
            return dense.run(query, key, value, scale=scaling).transpose(1, 2), None
        if (
            (last := shared.last) is not None
            and last.decision == (flags.sparse_decision if flags.enabled else flags.dense_decision)
            and not (attention_mask.len_q > 1 and is_in_function())
            and not torch._C._is_any_autocast_enabled()
            and not is_traced(query)
            and last.likeness == likeness(query, key, value, scaling)
        ):
            flags.last_call = object()
            return last.call(query, key, value), None
    if position_ids is not None:
        kwargs["position_ids"] = position_ids
    if use_cache is not None:
        kwargs["use_cache"] = use_cache
    if (
        type(attention_mask) is Layout
        and attention_mask.whole
        and isinstance(module, SparseAttentionModule)
        and (kwargs.keys() <= _PLAIN_ARGUMENTS or all(x in _PLAIN_ARGUMENTS or kwargs[x] is None for x in kwargs))
        and not (dropout or module.sparse_attention.is_sharded)
    ):
        layout = attention_mask
        if layout.len_q > 1 and (layout.request is None or layout.request.packed is not layout):
            layout = _by_positions(module, layout, kwargs.get("position_ids"))
        if layout is attention_mask:
            output = whole_call(module, query, key, value, layout, scaling, kwargs.get("softcap"))
            if output is not None:
                return output, None
    shards: Shards | None = kwargs.pop(ARGUMENT, None)
    if shards is not None or (isinstance(module, SparseAttentionModule) and module.sparse_attention.is_sharded):
        return _sharded_attention(module, query, key, value, attention_mask, shards, dropout, scaling, **kwargs), None
    own: OwnAttention | None = getattr(module, OWN_ATTRIBUTE, None)
    decision = None
    keeps_own = not isinstance(module, SparseAttentionModule)
    if not (keeps_own or attention_mask is None or isinstance(attention_mask, Layout)):
        is_decode = query.shape[2] == 1
        decision = decide(module, is_decode)
        keeps_own = decision.plan.is_dense or (is_decode and not decision.plan.sparse_decode)
    if own is not None and keeps_own:
        return _own_attention(own, module, query, key, value, attention_mask, dropout, scaling, kwargs)
    return _attention(module, query, key, value, attention_mask, decision, dropout, scaling, **kwargs), None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | Tensor | None,
    decision: Decision | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Compute attention on this package's kernels.

    Args beyond those of :func:`attention_forward`:
        decision: what the call does, if that has been decided already.
        softcap: bound of the scores, if the model has one.
        s_aux: learnable sink logits ``[query_heads]``, if the model has them.
        is_causal: whether the attention is causal where there is no mask; by default what the module says, else true.
        sliding_window: not needed beside a mask, which holds it.
        cu_seq_lens_q: cumulative lengths of packed sequences, ``[sequences + 1]``.
        cu_seq_lens_k: must come along, and equal the former.
        max_length_q: the longest of them.
        max_length_k: the same.
        position_ids: positions of the queries; where they begin again with 0, so does a sequence.
    """
    refusal = _refused_argument(dropout, kwargs)
    if refusal:
        raise UnsupportedError(f"{layer_name(module)}: {refusal}")
    if isinstance(mask, Layout):
        layout = _for_all_keys(mask, key)
    elif mask is None:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        layout = _layout_without_mask(module, query, key, is_causal, sliding_window)
    else:
        layout = _layout_of_other_mask(module, query, key, mask)
    if cu_seq_lens_q is not None:
        layout = _layout_of_lengths(module, layout, cu_seq_lens_q, cu_seq_lens_k, max_length_q)
    else:
        layout = _by_positions(module, layout, position_ids)
    return attend(module, query, key, value, layout, scaling=scaling, softcap=softcap, s_aux=s_aux, decision=decision)


def _by_positions(module: nn.Module, layout: Layout, position_ids: Tensor | None) -> Layout:
    """Return the layout with regard to positions that begin again, naming the layer in errors."""
    if position_ids is None or layout.len_q == 1:
        return layout
    try:
        return packed_by_positions(layout, position_ids)
    except UnsupportedError as error:
        raise UnsupportedError(f"{layer_name(module)}: {error}") from None


def _sharded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | Tensor | None,
    shards: Shards | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Compute attention over the tokens of all processes of :func:`~.parallel.context_parallel`.

    The mask says what kind of attention it is; which tokens there are is in ``shards``.
    """
    refusal = _refused_argument(dropout, kwargs)
    if shards is None:
        refusal = (
            f"was not told how the tokens are divided; inside context_parallel(), pass all that shard() returns to the "
            f"model, which must pass {ARGUMENT} on to its layers"
        )
    elif isinstance(mask, RefusedMask):
        refusal = mask.reason
    elif isinstance(mask, Tensor):
        refusal = "a finished attention mask is not supported with context parallelism; pass attention_mask to shard()"
    if refusal or shards is None:
        raise UnsupportedError(f"{layer_name(module)}: {refusal}")
    if isinstance(mask, Layout):
        is_causal, sliding_window = mask.is_causal, mask.sliding_window
    elif is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    return attend_sharded(
        module,
        query,
        key,
        value,
        shards,
        is_causal=is_causal,
        sliding_window=sliding_window,
        scaling=scaling,
        softcap=softcap,
        s_aux=s_aux,
    )


def _own_attention(
    own: OwnAttention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Compute attention as another implementation of Transformers does, with the mask that it makes itself."""
    if isinstance(mask, Layout | RefusedMask):
        mask = None if mask.request is None else mask.request.answer(own.name, query.device)
    function = own.eager or ALL_ATTENTION_FUNCTIONS[own.name]
    result: tuple[Tensor, Tensor | None] = function(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return result


def remember_own_attention(model: nn.Module) -> None:
    """Note on every module which attention implementation it has, unless it is this package's already."""
    for module in model.modules():
        name = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if not isinstance(name, str) or name == ATTENTION_NAME or not uses_interface(module):
            continue
        if name in ALL_ATTENTION_FUNCTIONS:
            setattr(module, OWN_ATTRIBUTE, OwnAttention(name))
        elif (eager := forward_globals(module).get("eager_attention_forward")) is not None:
            setattr(module, OWN_ATTRIBUTE, OwnAttention(name, eager))


def forget_own_attention(model: nn.Module) -> None:
    """Take away what :func:`remember_own_attention` noted."""
    for module in model.modules():
        vars(module).pop(OWN_ATTRIBUTE, None)


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
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
        dropout: must be 0.
        scaling: factor on the scores.
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
    refusal = _refused_argument(dropout, kwargs)
    if attention_mask is not None:
        refusal = "an attention mask is not supported in continuous batching"
    if cache is None or cu_seq_lens_q is None:
        refusal = (
            "there is no paged cache; inside continuous_batching() only continuous batching can run the model, and its "
            "layers must pass on what Transformers hands to them for it"
        )
    elif sliding_window is not None and position_ids is None:
        refusal = "its model does not pass position_ids on, without which a sliding window's keys cannot be placed"
    if refusal or cu_seq_lens_q is None:
        raise UnsupportedError(f"{layer_name(module)}: {refusal}")
    decision = decide(module, is_decode=max_length_q == 1)
    allocator = _allocator_of_pages(module, cache, max_length_q, paging, decision)
    page_table, page_size = None, 0
    if allocator is None:
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=paging)
    else:
        key, value = _write_to_pages(allocator, module, key, value, paging)
        page_table, page_size = _page_table(allocator, paging), allocator.tokens_per_page
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
        first_k=first_k,
        page_table=page_table,
        page_size=page_size,
    )
    options: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "s_aux": s_aux, "decision": decision}
    return attend(module, query, key, value, layout, **options), None


def _allocator_of_pages(
    module: nn.Module, cache: Any, max_length_q: int, paging: dict[str, Any], decision: Decision
) -> Any:
    """Return what knows a layer's pages if a kernel reads keys and values where they lie, else None.

    Other kernels, and caches of which Transformers says nothing, get a copy of all keys of all sequences.
    """
    allocator = getattr(cache, "layer_to_allocator", {}).get(module.layer_idx)
    index = None if allocator is None else paging["read_index"][allocator.index]
    plan, is_sparse = decision.plan, max_length_q > 1 or decision.plan.sparse_decode
    reads_pages = (
        index is not None
        and index.numel() > 0  # else all keys are new
        and getattr(allocator, "supports_block_table", False)
        and max_length_q <= MAX_QUERIES
        and decision.backend == "triton"
        and not (is_sparse and (plan.chooses_blocks or decision.statistics is not None))
    )
    return allocator if reads_pages else None


def _write_to_pages(
    allocator: Any, module: nn.Module, key: Tensor, value: Tensor, paging: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Store new keys and values ``[1, kv_heads, len_q, dim]``; return all pages ``[1, kv_heads, slots, dim]``."""
    for name in ("cu_seq_lens_k", "max_length_k"):
        paging[name] = paging[name][allocator.layer_type]
    index = paging["write_index"][allocator.index]
    stored = []
    for pages, new in zip(allocator.get_cache_for_block_table(module.layer_idx), (key, value), strict=True):
        rows = pages.flatten(0, 1)
        rows.index_copy_(0, index, new[0].transpose(0, 1))
        stored.append(rows.transpose(0, 1)[None])
    return stored[0], stored[1]


def _page_table(allocator: Any, paging: dict[str, Any]) -> Tensor:
    """Return the pages of each sequence, of which Transformers gives the place of every key; once in a forward."""
    index, size = paging["read_index"][allocator.index], allocator.tokens_per_page
    starts, longest = paging["cu_seq_lens_k"][:-1], paging["max_length_k"]

    def table() -> Tensor:
        first = starts[:, None].long() + torch.arange(0, longest, size, device=starts.device)
        pages: Tensor = index[first.clamp(max=index.shape[0] - 1)] // size
        return pages.to(torch.int32)

    # What a graph computes when it is captured has to be computed again whenever it runs.
    if torch.compiler.is_compiling() or (index.is_cuda and torch.cuda.is_current_stream_capturing()):
        return table()
    return remembered(index, (longest, size), table)


def _refused_argument(dropout: float, kwargs: dict[str, Any]) -> str | None:
    """Return why a call's arguments cannot be served, None if they can."""
    if dropout:
        return f"attention dropout ({dropout}) is not supported; set the model's attention_dropout to 0 or call eval()"
    if kwargs.get("output_attentions", False):
        return _NO_WEIGHTS
    for name, value in kwargs.items():
        if value is None or name in IRRELEVANT_ARGUMENTS:
            continue
        if name in REFUSED_ARGUMENTS:
            return f"the argument {name}={type(value).__name__} of the model's attention is not supported"
        _warn_of_argument(name)
    return refuse_context_parallel()


@functools.cache
def _warn_of_argument(name: str) -> None:
    logger.warning(
        "the argument %s that reaches the attention is not known to this version of modelopt_lite; it is ignored, as "
        "arguments of other parts of the model come along with those of the attention",
        name,
    )


# The compiler calls it while it traces.
torch.compiler.assume_constant_result(_warn_of_argument)


def _layout_of_other_mask(module: nn.Module, query: Tensor, key: Tensor, mask: RefusedMask | Tensor) -> Layout:
    """Lay out a call whose mask did not come as a layout."""
    if isinstance(mask, RefusedMask):
        raise UnsupportedError(f"{layer_name(module)}: {mask.reason}")
    batch, len_q, slots = query.shape[0], query.shape[2], key.shape[2]
    layout = None
    if mask.dim() == 4 and not torch.compiler.is_compiling():
        layout = layout_of_mask(mask, batch, len_q, slots)
    if layout is None:
        raise UnsupportedError(
            f"{layer_name(module)}: its attention mask {list(mask.shape)} is not supported; a finished mask, of the "
            f"caller's or of the model's own, {READABLE_MASKS}; while torch.compile traces, none is"
        )
    return layout


def _for_all_keys(layout: Layout, key: Tensor) -> Layout:
    """Return the layout of a bidirectional call that sees more keys than its model knew of, as of a tuned prefix."""
    slots = key.shape[2]
    if layout.slots == slots or layout.is_causal or not layout.unpadded or layout.sliding_window is not None:
        return layout
    return whole_layout(layout.batch, layout.len_q, slots, key.device, is_causal=False, first_q=0)


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
    """Restore the attention implementations of configs, unless something else has changed them since."""
    for config, name in before:
        if config._attn_implementation in (ATTENTION_NAME, PAGED_ATTENTION_NAME):
            config._attn_implementation = {"": name}


def watch(model: PreTrainedModel) -> None:
    """Refuse to return attention weights, and warn if adapters are saved without the sparsity, until :func:`unwatch`.

    Args:
        model: a sparse model; its parts refuse as well.
    """
    hooks = [model.register_state_dict_pre_hook(_warn_of_adapters)]
    # Not the outermost model alone: wrappers, such as those of PEFT, call its forward itself, past its hooks. A model
    # with a head leaves it to its body, which has the same config and gets the same arguments.
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    for index, part in enumerate(parts):
        inside = set(part.modules())
        if not any(other.config is part.config and other in inside for other in parts[index + 1 :]):
            hooks.append(part.register_forward_pre_hook(_refuse_attention_weights, with_kwargs=True))
    setattr(model, _HOOKS_ATTRIBUTE, hooks)


def unwatch(model: nn.Module) -> None:
    """Undo :func:`watch`."""
    for hook in vars(model).pop(_HOOKS_ATTRIBUTE):
        hook.remove()


def _refuse_attention_weights(model: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
    """Refuse, before a model's forward, to return attention weights; not all models tell their layers.

    Also takes note of the caller's positions, which may pack sequences; those that models make themselves do not.
    """
    if not torch.compiler.is_compiling():
        note_positions(kwargs.get("position_ids"), kwargs.get("attention_mask"))
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
