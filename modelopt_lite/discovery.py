"""Which modules of a model do attention, and whether they can run on this package's attention."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable
from types import CodeType, FunctionType
from typing import Any, cast

from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from .errors import UnsupportedError
from .module import original_class

# What some models hand to their attention function beside queries and keys, and what no layout can say.
UNSUPPORTED_ARGUMENTS = {
    "position_bias": "adds a position bias to its scores",
    "indices": "chooses its own keys",
    "block_indices": "chooses its own keys",
}
SUPPORTED_LAYERS = (None, "full_attention", "sliding_attention")


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
