"""The side of this package that Transformers sees: its attention function, its mask function, a model's layers.

Both functions are registered with Transformers under one name. With an attention function alone, Transformers builds
no mask for it, and padding would be ignored without a word. The mask function hands a :class:`~.layout.Layout` to the
attention function in the place of a mask, which models pass on untouched. Continuous batching has an attention function
of its own, under a second name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple, cast

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel, masking_utils
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, causal_mask_function

from .errors import UnsupportedError
from .layout import Layout, attend, layer_name, packed_layout, padded_layout, whole_layout
from .module import original_class, sparse_modules

ATTENTION_NAME = "modelopt_lite"
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
# What some models hand to their attention function beside queries and keys, and what no layout can say.
UNSUPPORTED_ARGUMENTS = {
    "position_bias": "adds a position bias to its scores",
    "indices": "chooses its own keys",
    "block_indices": "chooses its own keys",
}
# What continuous batching hands to every layer for its cache.
PAGING_ARGUMENTS = ("block_table", "cu_seq_lens_k", "max_length_k", "read_index", "write_index")
_NO_WEIGHTS = "output_attentions is not supported; unsparsify the model and use attn_implementation='eager'"
_HOOK_ATTRIBUTE = "_refuses_attention_weights"
SUPPORTED_LAYERS = (None, "full_attention", "sliding_attention")


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


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | Layout | None = None,
    **hints: Any,
) -> Layout:
    """Mask in the form Transformers asks for it: what a query sees, and which slots hold real tokens.

    Args:
        batch_size: number of sequences.
        q_length: number of queries.
        kv_length: number of key slots that the attention will get, used or not.
        q_offset: slot of the first query, counting slots that the cache has dropped.
        kv_offset: slots the cache has dropped at its front.
        mask_function: the model's mask pattern.
        attention_mask: the padding mask ``[batch, used slots]``, booleans, or None if there is no padding; or what
            this function made before.
        hints: what Transformers offers to other masks.

    Returns:
        The layout.

    Raises:
        UnsupportedError: if the pattern is anything but causal, bidirectional, either with a sliding window, or packed
            sequences of these.
    """
    if isinstance(attention_mask, Layout):
        return attention_mask
    device = hints.get("device")
    if device is None:
        device = "cpu" if attention_mask is None else attention_mask.device
    pattern = _recognise(mask_function, hints)
    options: dict[str, Any] = {"is_causal": pattern.is_causal, "sliding_window": pattern.sliding_window}
    if attention_mask is None and q_length == kv_length and pattern.may_be_packed:
        is_first = pattern.first_tokens(mask_function, batch_size, q_length, device)
        return packed_layout(is_first, **options)
    if attention_mask is None:
        if pattern.is_causal:
            return whole_layout(
                batch_size,
                q_length,
                kv_length,
                device,
                used=q_offset - kv_offset + q_length,
                dropped=kv_offset,
                **options,
            )
        first_q = None if q_length == kv_length else q_offset
        return whole_layout(batch_size, q_length, kv_length, device, dropped=kv_offset, first_q=first_q, **options)

    if isinstance(q_offset, Tensor) and not torch.compiler.is_compiling():
        q_offset = int(q_offset)
    columns = attention_mask.shape[1]
    total = kv_offset + kv_length
    if isinstance(q_offset, int) and pattern.is_causal and columns < q_offset + q_length:
        raise UnsupportedError(
            f"attention_mask: {columns} columns are not enough; {q_offset + q_length} tokens, cached ones included"
        )
    real = pad(attention_mask, (0, max(0, total - columns)))[:, :total]
    if pattern.is_causal:
        real = real & (torch.arange(total, device=real.device) < q_offset + q_length)
    return padded_layout(real, q_length, q_offset, dropped=kv_offset, **options)


class _Pattern(NamedTuple):
    """What a mask function of Transformers says.

    Attributes:
        is_causal: whether a query sees only keys up to its own position.
        sliding_window: a query sees only keys fewer positions away; None: all.
        sequence_ids: for packed sequences, a number for each token's sequence, ``[batch, length]``.
        may_be_packed: whether there may be packed sequences.
    """

    is_causal: bool
    sliding_window: int | None = None
    sequence_ids: Tensor | None = None
    may_be_packed: bool = False

    def first_tokens(self, mask_function: Callable[..., Any], batch: int, length: int, device: Any) -> Tensor:
        """Return where sequences begin, ``[batch, length]``."""
        slots = torch.arange(length, device=device)
        if self.sequence_ids is None:
            # In a traced graph: a token begins a sequence if it does not see the one before it.
            rows = torch.arange(batch, device=device)[:, None]
            sees: Tensor = mask_function(rows, torch.zeros_like(rows), slots[None], (slots[None] - 1).clamp(min=0))
            return ~sees.expand(batch, length)
        ids = self.sequence_ids.expand(batch, length)
        return ids.ne(ids.roll(1, dims=1))


def _code_of(factory_name: str, *arguments: Any) -> CodeType | None:
    """Return the code of the functions that a factory of Transformers makes, None if this version has none such."""
    factory = getattr(masking_utils, factory_name, None)
    code: CodeType | None = None if factory is None else factory(*arguments).__code__
    return code


_AND = _code_of("and_masks", causal_mask_function)
_SLIDING = _code_of("sliding_window_overlay", 1)
_SLIDING_BOTH_WAYS = _code_of("sliding_window_bidirectional_overlay", 1)
_PACKED = _code_of("packed_sequence_mask_function", torch.zeros(1, 1))
_REMAPPED = _code_of("remap_positions_for_packed_sequence", causal_mask_function, torch.zeros(1, 1))

_UNKNOWN_PATTERN = (
    "this model's or this call's attention mask is not supported: it is neither causal nor bidirectional, with or "
    "without a sliding window, but has chunks, blocks or a pattern of its own"
)


def _recognise(mask_function: Callable[..., Any], hints: dict[str, Any]) -> _Pattern:
    """Return what a mask function says, or refuse it.

    Transformers composes mask functions of a few of its own, so they are told by the code they run and read by the
    variables they close over. PyTorch's compiler cannot look at the latter; there the hints decide.
    """
    if mask_function is causal_mask_function:
        return _Pattern(True)
    if mask_function is bidirectional_mask_function:
        return _Pattern(False)
    if torch.compiler.is_compiling():
        return _recognise_while_tracing(mask_function, hints)
    is_causal = is_bidirectional = False
    window = window_both_ways = ids = None
    for part in _parts(mask_function):
        if part is causal_mask_function:
            is_causal = True
        elif part is bidirectional_mask_function:
            is_bidirectional = True
        elif part.__code__ is _SLIDING and window is None:
            window = _closed_over(part, "sliding_window")
        elif part.__code__ is _SLIDING_BOTH_WAYS and window_both_ways is None:
            window_both_ways = _closed_over(part, "sliding_window")
        elif part.__code__ is _PACKED and ids is None:
            ids = _closed_over(part, "packed_sequence_mask")
        else:
            raise UnsupportedError(_UNKNOWN_PATTERN)
    if is_causal and not is_bidirectional and window_both_ways is None:
        return _Pattern(True, window, ids, ids is not None)
    if is_bidirectional and not is_causal and window is None:
        return _Pattern(False, None if window_both_ways is None else window_both_ways + 1, ids, ids is not None)
    raise UnsupportedError(_UNKNOWN_PATTERN)


def _parts(mask_function: Any) -> Iterator[Any]:
    """Yield the functions whose conjunction a mask function is."""
    code = getattr(mask_function, "__code__", None)
    if code is None:
        raise UnsupportedError(_UNKNOWN_PATTERN)
    if code is _AND:
        for part in _closed_over(mask_function, "mask_functions"):
            yield from _parts(part)
    elif code is _REMAPPED:
        # The same rule by positions instead of slots; beside the packed sequences it stands with, that is the same.
        yield from _parts(_closed_over(mask_function, "mask_function"))
    else:
        yield mask_function


def _closed_over(function: Any, name: str) -> Any:
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _recognise_while_tracing(mask_function: Callable[..., Any], hints: dict[str, Any]) -> _Pattern:
    chunk_size = getattr(hints.get("config"), "attention_chunk_size", None)
    # With use_vmap the caller has mixed in functions of its own.
    if getattr(mask_function, "__code__", None) is not _AND or hints.get("use_vmap") or chunk_size is not None:
        raise UnsupportedError(_UNKNOWN_PATTERN)
    window = hints.get("local_size")
    if "allow_is_bidirectional_skip" in hints:
        return _Pattern(False, None if window is None else window + 1)
    return _Pattern(True, window, may_be_packed=True)


def uses_interface(module: nn.Module) -> bool:
    """Whether a module's forward looks up its attention function in Transformers' interface."""
    return "ALL_ATTENTION_FUNCTIONS" in _code(module).co_names


def calls_sdpa(module: nn.Module) -> bool:
    """Whether a module's forward calls PyTorch's scaled_dot_product_attention, or a helper that calls it.

    Helpers are functions that the forward knows by one name: of its file, or methods of its class and of bases.
    """
    cls = original_class(module)
    forward = _function(cls.forward)
    names = _names(forward.__code__)
    helpers = [forward.__globals__.get(name) for name in names]
    helpers += [getattr(base, name, None) for base in cls.__mro__ for name in names]
    return any(_names_sdpa(_function(found)) for found in (forward, *helpers))


def _names_sdpa(function: FunctionType) -> bool:
    names = _names(function.__code__)
    return "scaled_dot_product_attention" in names or any(
        function.__globals__.get(name) is scaled_dot_product_attention for name in names
    )


def _names(code: CodeType) -> set[str]:
    """Return the globals and attributes that a function's code names, functions inside of it included."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _code(module: nn.Module) -> CodeType:
    return _function(original_class(module).forward).__code__


def _function(found: Any) -> FunctionType:
    """Return the Python function that something is or decorates, one that does nothing if it is none."""
    # Only of functions, as other objects may make up the attributes they are asked for.
    function = inspect.unwrap(found) if isinstance(found, FunctionType) else None
    return function if isinstance(function, FunctionType) else cast(FunctionType, _nothing)


def _nothing() -> None:
    pass


def pretrained_models(model: nn.Module) -> dict[str, PreTrainedModel]:
    """Return the outermost Transformers models inside a model, or itself, by dotted name."""
    found: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and _outer(name, found) is None:
            found[name] = module
    return found


def _outer(name: str, models: Iterable[str]) -> str | None:
    """Return the name of the one of ``models`` that a module is inside of."""
    return next((outer for outer in models if outer in ("", name) or name.startswith(f"{outer}.")), None)


def attention_modules(model: nn.Module, chosen: Collection[str] = ()) -> dict[str, nn.Module]:
    """Return a model's attention modules by dotted name: those that do the attention, not what wraps them.

    Args:
        model: any model.
        chosen: names of modules that are such although nothing shows it.
    """
    models = pretrained_models(model)
    named = {
        name: module
        for name, module in model.named_modules()
        if uses_interface(module)
        or calls_sdpa(module)
        or name in chosen
        or (_outer(name, models) is not None and "Attention" in original_class(module).__name__)
    }
    return {
        name: module
        for name, module in named.items()
        if uses_interface(module) or calls_sdpa(module) or not any(other.startswith(f"{name}.") for other in named)
    }


def check_modules(model: nn.Module, modules: dict[str, nn.Module], chosen: Collection[str]) -> None:
    """Check that every attention layer can run on this package's attention.

    In a Transformers model the attention function serves the model as a whole, so layers that stay dense count as well.

    Args:
        model: the model.
        modules: its attention modules.
        chosen: names of those that the user pointed out.

    Raises:
        UnsupportedError: naming the layer and the reason.
    """
    if not modules:
        raise UnsupportedError(
            f"{type(model).__name__} has no attention module: none of its modules is a Transformers attention layer or "
            "calls scaled_dot_product_attention itself; if something inside one does, say which with attention="
        )
    models = pretrained_models(model)
    outers = {name: _outer(name, models) for name in modules}
    switched = {outers[name] for name, module in modules.items() if uses_interface(module)}
    for name, module in modules.items():
        outer = outers[name]
        reason = _unsupported(module, None if outer is None else models[outer], name in chosen, outer in switched)
        if reason:
            raise UnsupportedError(f"{name} ({original_class(module).__name__}): {reason}")


def _unsupported(module: nn.Module, model: PreTrainedModel | None, is_chosen: bool, is_switched: bool) -> str | None:
    if isinstance(module, nn.MultiheadAttention):
        return "its call of scaled_dot_product_attention is out of reach"
    if not uses_interface(module):
        if not (calls_sdpa(module) or is_chosen):
            return "does not go through Transformers' attention interface"
        if model is not None and (is_switched or model.config._attn_implementation != "sdpa"):
            return (
                "calls scaled_dot_product_attention itself, which is supported if the whole model does so with 'sdpa'"
            )
        return None
    if model is None:
        return "is a Transformers attention layer outside of a PreTrainedModel, which is not supported"
    if "prepare_dynamic_mask" in _code(module).co_names:
        return "makes an attention mask of its own, which is not supported"
    constants: set[Any] = set()
    for constant in _code(module).co_consts:
        constants.update(constant if isinstance(constant, tuple) else [constant])
    for argument, what in UNSUPPORTED_ARGUMENTS.items():
        if argument in constants:
            return f"{what} ({argument}), which is not supported"
    kind = _layer_kind(module)
    return None if kind in SUPPORTED_LAYERS else f"{kind} is not supported"


def _layer_kind(module: nn.Module) -> str | None:
    for attribute in ("layer_type", "attention_type"):
        kind = getattr(module, attribute, None)
        if isinstance(kind, str):
            return kind
    kinds, index = getattr(getattr(module, "config", None), "layer_types", None), getattr(module, "layer_idx", None)
    return kinds[index] if kinds and isinstance(index, int) and index < len(kinds) else None


def implementations(model: PreTrainedModel) -> dict[str, str]:
    """Return a model's attention implementation, under ``""``, and those of its parts with a config of their own."""
    config = model.config
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    own = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    return {"": config._attn_implementation, **own}


def set_implementations(model: PreTrainedModel, names: dict[str, str]) -> None:
    """Set what :func:`implementations` returned."""
    model.set_attn_implementation(names if len(names) > 1 else names[""])
    if ATTENTION_NAME not in names.values():
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and _HOOK_ATTRIBUTE in vars(module):
                getattr(module, _HOOK_ATTRIBUTE).remove()
                delattr(module, _HOOK_ATTRIBUTE)


def _refuse_attention_weights(model: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
    """Refuse, before a model's forward, to return attention weights; not all models tell their layers."""
    wanted = kwargs.get("output_attentions")
    if wanted is None:
        wanted = getattr(model.config, "output_attentions", False)
    if wanted and (modules := sparse_modules(model)):
        raise UnsupportedError(f"{layer_name(next(iter(modules.values())))}: {_NO_WEIGHTS}")


def switch_on(model: PreTrainedModel) -> None:
    """Make all of a model's attention run on this package's attention function, unless none asks for one.

    The model and its parts refuse from then on to return attention weights, until :func:`set_implementations` sets
    others than this package's.

    Raises:
        UnsupportedError: if the model does not let itself be switched, naming the first layer; it is as before then.
    """
    # All of them: wrappers, such as those of PEFT, call the outermost model's forward itself, past its hooks.
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            hook = part.register_forward_pre_hook(_refuse_attention_weights, with_kwargs=True)
            setattr(part, _HOOK_ATTRIBUTE, hook)
    modules = {name: module for name, module in model.named_modules() if uses_interface(module)}
    if not modules:
        return
    before = implementations(model)
    set_implementations(model, dict.fromkeys(before, ATTENTION_NAME))
    for name, module in modules.items():
        if getattr(module, "config", model.config)._attn_implementation != ATTENTION_NAME:
            set_implementations(model, before)
            raise UnsupportedError(
                f"{name} ({original_class(module).__name__}): its model's attention implementation cannot be set"
            )


def switch_to_paging(model: PreTrainedModel) -> None:
    """Make all of a model's attention run in continuous batching, and nowhere else.

    Raises:
        UnsupportedError: if this version of Transformers has no place for it.
    """
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < PAGING_SINCE:
        wanted = ".".join(map(str, PAGING_SINCE))
        raise UnsupportedError(
            f"continuous batching needs Transformers {wanted} or later, not {transformers.__version__}"
        )
    # Not by set_attn_implementation, which takes every name with "flash" in it for a package to import.
    model.config._attn_implementation = PAGED_ATTENTION_NAME


AttentionInterface.register(ATTENTION_NAME, attention_forward)
AttentionInterface.register(PAGED_ATTENTION_NAME, paged_attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, attention_mask)
