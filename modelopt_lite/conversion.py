"""The entry points: make a model sparse, switch it off and on, look at it, and undo it all."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from rich.console import Console
from rich.table import Table
from torch import nn

from .config import SparsityConfig, abbreviate, match_names
from .errors import ConfigError
from .huggingface import ATTENTION_NAME, attention_modules, check_model
from .module import SparseAttentionFlags, SparseAttentionModule, convert, original_class, revert, sparse_modules

ModelT = TypeVar("ModelT", bound=nn.Module)

CONFIG_ATTRIBUTE = "sparse_attention_config"
CONFIG_VERSION = 1
_BEFORE_ATTRIBUTE = "_before_sparsify"


@dataclass
class _Before:
    """What :func:`unsparsify` restores, kept on the model."""

    attn_implementation: str
    config_entry: Any


def sparsify(model: ModelT, config: SparsityConfig | dict[str, Any] | str | os.PathLike[str]) -> ModelT:
    """Make a model's attention sparse during prefill, in place; decode stays dense.

    Calling it again replaces the configuration. ``model.save_pretrained`` then writes the configuration into the
    model's ``config.json``, from where :func:`~modelopt_lite.checkpoint.from_pretrained` takes it.

    Args:
        model: a Transformers model whose attention layers are causal and go through Transformers' attention
            interface, as those of the Llama family do.
        config: a :class:`~modelopt_lite.config.SparsityConfig`, the like as a mapping, or the path of a YAML, JSON or
            TOML file that holds it.

    Returns:
        The model.

    Raises:
        ConfigError: if the configuration is wrong, or one of its patterns matches no attention module.
        UnsupportedError: if the model has a layer that is not supported; names it.
        In both cases the model is untouched.
    """
    config = SparsityConfig.load(config)
    transformer = check_model(model)
    modules = attention_modules(model)
    methods = config.assign(modules)
    plans = {name: method.plan() for name, method in methods.items()}

    if not hasattr(model, _BEFORE_ATTRIBUTE):
        config_entry = getattr(transformer.config, CONFIG_ATTRIBUTE, None)
        before = _Before(transformer.config._attn_implementation, config_entry)
        transformer.set_attn_implementation(ATTENTION_NAME)
        setattr(model, _BEFORE_ATTRIBUTE, before)
    for name, module in modules.items():
        if name in methods:
            method = methods[name]
            convert(module, SparseAttentionFlags(name, method, plans[name], enabled=method.enable))
        elif isinstance(module, SparseAttentionModule):
            revert(module)
    # JSON readers and writers may reorder a mapping, and the order of patterns counts: so pairs.
    entries = [list(entry) for entry in config.model_dump(mode="json")["sparse_cfg"].items()]
    setattr(transformer.config, CONFIG_ATTRIBUTE, {"version": CONFIG_VERSION, "sparse_cfg": entries})
    return model


def unsparsify(model: ModelT) -> ModelT:
    """Give a model back its own attention: classes, attention implementation and config as before :func:`sparsify`.

    Args:
        model: a model, sparse or not; one that is not stays as it is.

    Returns:
        The model.
    """
    if not hasattr(model, _BEFORE_ATTRIBUTE):
        return model
    before = cast(_Before, getattr(model, _BEFORE_ATTRIBUTE))
    transformer = cast(Any, model)
    for module in sparse_modules(model).values():
        revert(module)
    transformer.set_attn_implementation(before.attn_implementation)
    if before.config_entry is None:
        delattr(transformer.config, CONFIG_ATTRIBUTE)
    else:
        setattr(transformer.config, CONFIG_ATTRIBUTE, before.config_entry)
    delattr(model, _BEFORE_ATTRIBUTE)
    return model


@contextmanager
def disabled(model: ModelT) -> Iterator[ModelT]:
    """Run a model dense inside the ``with`` block; afterwards its layers are on or off as before.

    Args:
        model: a model after :func:`sparsify`.

    Yields:
        The model.
    """
    states = [(module.sparse_attention, module.sparse_attention.enabled) for module in sparse_modules(model).values()]
    for flags, _ in states:
        flags.enabled = False
    try:
        yield model
    finally:
        for flags, enabled in states:
            flags.enabled = enabled


def enable_sparse_attention(model: ModelT, pattern: str = "*") -> ModelT:
    """Switch the sparsity of some of a model's sparse layers on.

    Args:
        model: a model after :func:`sparsify`.
        pattern: dotted names of the layers, as in ``sparse_cfg``.

    Returns:
        The model.

    Raises:
        ConfigError: if the pattern matches no sparse layer.
    """
    return _switch(model, pattern, True)


def disable_sparse_attention(model: ModelT, pattern: str = "*") -> ModelT:
    """Switch the sparsity of some of a model's sparse layers off; they stay prepared, and dense.

    Args, returns and raises as :func:`enable_sparse_attention`.
    """
    return _switch(model, pattern, False)


def _switch(model: ModelT, pattern: str, enabled: bool) -> ModelT:
    modules = sparse_modules(model)
    matched = match_names(modules, pattern)
    if not matched:
        raise ConfigError(f"pattern: {pattern!r} matches no sparse attention module; there are {abbreviate(modules)}")
    for name in matched:
        modules[name].sparse_attention.enabled = enabled
    return model


@dataclass(frozen=True)
class LayerSummary:
    """One attention module of a model.

    Attributes:
        name: dotted name.
        class_name: the model's own class.
        method: name of the sparsity method, or None if the module was left as it is.
        settings: the method's fields.
        enabled: whether the module is sparse now.
    """

    name: str
    class_name: str
    method: str | None
    settings: dict[str, Any]
    enabled: bool


class Summary(list[LayerSummary]):
    """The attention modules of a model, in order; prints as a table."""

    def __str__(self) -> str:
        """Return the table as plain text."""
        table = Table("module", "class", "method", "settings", "on")
        for layer in self:
            settings = " ".join(f"{key}={value}" for key, value in layer.settings.items())
            table.add_row(layer.name, layer.class_name, layer.method or "-", settings, "on" if layer.enabled else "off")
        console = Console(file=io.StringIO(), width=200, color_system=None)
        console.print(table)
        return cast(io.StringIO, console.file).getvalue()


def summary(model: nn.Module) -> Summary:
    """Say what each attention module of a model does.

    Args:
        model: a model, sparse or not.

    Returns:
        A list of :class:`LayerSummary` whose ``str()`` is a table.
    """
    rows = Summary()
    for name, module in attention_modules(model).items():
        if isinstance(module, SparseAttentionModule):
            flags = module.sparse_attention
            class_name = original_class(module).__name__
            rows.append(LayerSummary(name, class_name, flags.method.method, flags.method.settings(), flags.enabled))
        else:
            rows.append(LayerSummary(name, type(module).__name__, None, {}, False))
    return rows
