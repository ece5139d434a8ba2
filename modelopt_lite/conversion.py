"""The entry points: make a model sparse, switch it off and on, look at it, and undo it all."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from textwrap import fill
from typing import Any, TypeAlias, TypeVar, cast

from rich.console import Console
from rich.table import Table
from torch import nn

from .config import ConfigSource, SparsityConfig, abbreviate, match_names
from .errors import ConfigError, UnsupportedError
from .models.discovery import (
    ATTENTION_NAME,
    attention_modules,
    check_found,
    check_modules,
    pretrained_models,
    unreachable_modules,
    uses_interface,
)
from .models.huggingface import (
    PAGED_ATTENTION_NAME,
    check_paging,
    forget_own_attention,
    interface_configs,
    own_configs,
    remember_own_attention,
    restore_implementations,
    set_implementation,
    unwatch,
    watch,
)
from .models.interception import InterceptedAttentionModule
from .models.module import (
    SparseAttentionFlags,
    SparseAttentionModule,
    check_revertible,
    convert,
    follow,
    forbid_recomputation,
    original_class,
    present_decision,
    revert,
    run_dense,
    sparse_modules,
)
from .stats import ModelStatistics

ModelT = TypeVar("ModelT", bound=nn.Module)
AttentionChoice: TypeAlias = "str | type[nn.Module] | tuple[type[nn.Module], ...]"

CONFIG_ATTRIBUTE = "modelopt_lite_sparsity"
CONFIG_VERSION = 1
_BEFORE_ATTRIBUTE = "_before_sparsify"


@dataclass
class _Before:
    """What :func:`unsparsify` restores, kept on each Transformers model.

    Attributes:
        implementations: the configs whose attention implementation was set, and what it was.
        config_entry: what stood in the model's config where the sparsity's configuration is.
    """

    implementations: list[tuple[Any, str | None]]
    config_entry: Any


def sparsify(
    model: ModelT,
    config: ConfigSource,
    *,
    attention: AttentionChoice | None = None,
) -> ModelT:
    """Make a model's attention sparse during prefill, in place. Decode stays dense unless a method says otherwise.

    Two kinds of attention modules are found without help. The first are modules of Transformers models that go through
    Transformers' attention interface. The second are modules whose forward calls
    ``torch.nn.functional.scaled_dot_product_attention``, itself or in a method or function that the forward calls by
    name. If another object inside a module makes that call, the module stays dense unless ``attention`` names it.

    A second call replaces the configuration. The model gets copies of its configs, because another model may share
    them. ``model.save_pretrained`` then writes the configuration into the model's ``config.json``, where
    :func:`~modelopt_lite.checkpoint.from_pretrained` finds it. For adapters of PEFT, use
    :func:`~modelopt_lite.checkpoint.save_pretrained`.

    Args:
        model: a Transformers model, a model that holds or wraps one, or any module.
        config: a :class:`~modelopt_lite.config.SparsityConfig`, a mapping with the same fields, or the path of a YAML,
            JSON or TOML file with them. For one method in all layers also the method itself, a mapping with its
            fields, its name, or N:M such as ``"2:4"``.
        attention: further attention modules, by class or by a pattern of dotted names; their calls of
            ``scaled_dot_product_attention`` are intercepted.

    Returns:
        The model.

    Raises:
        ConfigError: if the configuration is wrong, or one of its patterns or ``attention`` matches no module.
        UnsupportedError: if the model has a layer that is not supported, or a sparse layer whose class something else
            has swapped since (see :func:`unsparsify`). The message names the layer. After either error the model is as
            it was.
    """
    config = SparsityConfig.load(config)
    chosen = _chosen_modules(model, attention)
    modules = attention_modules(model, chosen)
    unreachable = unreachable_modules(model, modules)
    check_found(model, [*modules, *unreachable])
    methods = config.assign([name for name, _ in model.named_modules() if name in modules or name in unreachable])
    check_modules(model, modules, methods, chosen)
    methods = {name: method for name, method in methods.items() if name in modules}
    check_revertible(model)
    plans = {name: method.shared_plan() for name, method in methods.items()}

    transformers = {name: each for name, each in pretrained_models(model).items() if _inside(name, methods)}
    through_interface = {
        name: [inner for inner, path in _inside(name, methods).items() if uses_interface(modules[path])]
        for name in transformers
    }
    for name, transformer in transformers.items():
        interface_configs(transformer, through_interface[name])  # raises if there is a layer without one

    has_own_configs = {name for name, transformer in transformers.items() if _BEFORE_ATTRIBUTE in vars(transformer)}
    reverted = _undo(model)
    remember_own_attention(model)
    for name, transformer in transformers.items():
        if name not in has_own_configs:
            own_configs(model, name)
        remember_own_attention(transformer)
        configs = interface_configs(transformer, through_interface[name])
        before = _Before(
            set_implementation(configs, ATTENTION_NAME), getattr(transformer.config, CONFIG_ATTRIBUTE, None)
        )
        setattr(transformer, _BEFORE_ATTRIBUTE, before)
        watch(transformer)
    for name, method in methods.items():
        module = modules[name]
        flags = SparseAttentionFlags(name, method, plans[name], enabled=method.enable)
        convert(module, flags, SparseAttentionModule if uses_interface(module) else InterceptedAttentionModule)
    for module, flags in reverted.items():
        if not isinstance(module, SparseAttentionModule):
            forbid_recomputation(module, flags)
    if "" in transformers:
        # JSON readers and writers may reorder a mapping, and the order of patterns counts: so pairs.
        entries = [list(entry) for entry in config.model_dump(mode="json")["sparse_cfg"].items()]
        setattr(transformers[""].config, CONFIG_ATTRIBUTE, {"version": CONFIG_VERSION, "sparse_cfg": entries})
    return model


def _inside(name: str, paths: Iterable[str]) -> dict[str, str]:
    """Return those of some modules' paths that are inside of a module, by their path inside of it."""
    prefix = f"{name}." if name else ""
    return {path.removeprefix(prefix): path for path in paths if path.startswith(prefix)}


def _undo(model: nn.Module) -> dict[nn.Module, SparseAttentionFlags]:
    """Undo what :func:`sparsify` did, but keep the model's own configs; return the flags of what was sparse."""
    reverted: dict[nn.Module, SparseAttentionFlags] = {}
    for module in sparse_modules(model).values():
        reverted[module] = revert(module)
    forget_own_attention(model)
    for part in list(model.modules()):
        before: _Before | None = vars(part).pop(_BEFORE_ATTRIBUTE, None)
        if before is None:
            continue
        unwatch(part)
        forget_own_attention(part)
        restore_implementations(before.implementations)
        config: Any = part.config
        if before.config_entry is not None:
            setattr(config, CONFIG_ATTRIBUTE, before.config_entry)
        elif hasattr(config, CONFIG_ATTRIBUTE):
            delattr(config, CONFIG_ATTRIBUTE)
    return reverted


def _chosen_modules(model: nn.Module, attention: AttentionChoice | None) -> set[str]:
    """Return the names of the modules that ``attention`` points out."""
    if attention is None:
        return set()
    modules = dict(model.named_modules())
    if isinstance(attention, str):
        names = set(match_names(modules, attention))
    else:
        names = {name for name, module in modules.items() if isinstance(module, attention)}
    if not names:
        raise ConfigError(f"attention: {attention!r} matches no module; there are {abbreviate(filter(None, modules))}")
    return names


def unsparsify(model: ModelT) -> ModelT:
    """Give a model back its own attention: classes, attention implementation and config as before :func:`sparsify`.

    If something else has set an attention implementation since then, that one stays. With gradient checkpointing, call
    ``backward()`` first: a later ``backward()`` is refused when it computes a layer again.

    Args:
        model: a model, sparse or not. A dense model stays as it is.

    Returns:
        The model.

    Raises:
        UnsupportedError: if something else has swapped the class of a sparse layer since :func:`sparsify`, as
            ``fully_shard`` does with a layer that it shards by itself. The message names the layer, and the model is as
            it was.
    """
    check_revertible(model)
    for module, flags in _undo(model).items():
        forbid_recomputation(module, flags)
    return model


@contextmanager
def disabled(model: ModelT) -> Iterator[ModelT]:
    """Run a model dense inside the ``with`` block. Afterwards its layers are on or off as before.

    This holds for calls of the thread or task that has entered the block. What gradient checkpointing computes again
    later, for a forward inside the block, is dense as well. A compiled model is dense in all threads.

    Args:
        model: a model after :func:`sparsify`.

    Yields:
        The model.
    """
    with run_dense(list(sparse_modules(model).values())):
        yield model


@contextmanager
def continuous_batching(model: ModelT) -> Iterator[ModelT]:
    """Let Transformers' continuous batching run a sparse model inside the ``with`` block.

    Other forward passes of the model are refused there.

    Transformers decides by the name of a model's attention implementation whether and how ``generate_batch`` and
    related functions run it. So the model gets a name that Transformers recognises while the block is open. Pieces of
    prompts are prefill, single tokens are decode. Layers without sparsity run on this package's attention as well.

    Args:
        model: a model after :func:`sparsify` that is, holds or wraps a Transformers model.

    Yields:
        The model.

    Raises:
        UnsupportedError: if no sparse layer goes through Transformers' attention interface, or Transformers is older
            than 5.19.
    """
    transformers = {}
    for name, transformer in pretrained_models(model).items():
        names = [inner for inner, module in sparse_modules(transformer).items() if uses_interface(module)]
        if names:
            transformers[name] = (transformer, names)
    if not transformers:
        raise UnsupportedError(
            f"{type(model).__name__} has no sparse layer that goes through Transformers' attention interface, which "
            "continuous batching needs"
        )
    check_paging()
    before = []
    try:
        for transformer, names in transformers.values():
            before += set_implementation(interface_configs(transformer, names), PAGED_ATTENTION_NAME)
        with follow(list(sparse_modules(model).values())):
            yield model
    finally:
        restore_implementations(before)


def enable_sparse_attention(model: ModelT, pattern: str = "*") -> ModelT:
    """Switch on the sparsity of some sparse layers of a model.

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
    """Switch off the sparsity of some sparse layers of a model. They are dense until they are switched on again.

    Args:
        model: a model after :func:`sparsify`.
        pattern: dotted names of the layers, as in ``sparse_cfg``.

    Returns:
        The model.

    Raises:
        ConfigError: if the pattern matches no sparse layer.
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
        method: name of the sparsity method, or None if no pattern matched and the module was left as it is.
        settings: the method's fields.
        enabled: whether the module is switched on.
        active: whether its last forward that was not compiled reached this package's attention; None before the first.
        sparsity: share of its visible scores that were dropped, if measured.
        mass_kept: mean share of the dense attention on kept keys, if measured.
    """

    name: str
    class_name: str
    method: str | None
    settings: dict[str, Any]
    enabled: bool
    active: bool | None = None
    sparsity: float | None = None
    mass_kept: float | None = None


class Summary(list[LayerSummary]):
    """The attention modules of a model, in order; prints as a table."""

    def __str__(self) -> str:
        """Return the table as plain text of at most 100 columns, with the settings below it."""
        return f"{self._render(html=False)}{self._settings()}\n"

    def _repr_html_(self) -> str:
        return f"{self._render(html=True)}<pre>{escape(self._settings())}</pre>"

    def _render(self, *, html: bool) -> str:
        measured = any(layer.sparsity is not None for layer in self)
        columns = ["module", "class", "method", "on", "active"]
        table = Table(*columns, *(["dropped", "mass kept"] if measured else []))
        numbers = self._numbers()
        for layer in self:
            shares = ["-" if x is None else f"{x:.1%}" for x in (layer.sparsity, layer.mass_kept)] if measured else []
            method = "-" if layer.method is None else numbers[layer.method, str(layer.settings)]
            active = {None: "-", True: "yes", False: "no"}[layer.active]
            table.add_row(layer.name, layer.class_name, method, "on" if layer.enabled else "off", active, *shares)
        console = Console(file=io.StringIO(), width=100, color_system=None, record=html)
        console.print(table)
        if html:
            return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
        return cast(io.StringIO, console.file).getvalue()

    def _numbers(self) -> dict[tuple[str, str], str]:
        """Return the name of each method with its settings: numbered where a method has several."""
        found = list(dict.fromkeys((layer.method, str(layer.settings)) for layer in self if layer.method is not None))
        methods = [method for method, _ in found]
        return {
            key: key[0] if methods.count(key[0]) == 1 else f"{key[0]} ({methods[: i + 1].count(key[0])})"
            for i, key in enumerate(found)
        }

    def _settings(self) -> str:
        numbers = self._numbers()
        settings = {
            numbers[layer.method, str(layer.settings)]: " ".join(f"{key}={x}" for key, x in layer.settings.items())
            for layer in self
            if layer.method is not None
        }
        lines = (f"{name}: {text}" for name, text in settings.items())
        return "\n".join(fill(line, 100, subsequent_indent="  ", break_on_hyphens=False) for line in lines)


def summary(model: nn.Module, statistics: ModelStatistics | None = None) -> Summary:
    """Say what each attention module of a model does.

    Args:
        model: a model, sparse or not.
        statistics: what :func:`~modelopt_lite.stats.collect_statistics` measured on it; adds the achieved sparsity.

    Returns:
        A list with one :class:`LayerSummary` for each attention module. It prints as a table.
    """
    rows = Summary()
    modules: dict[str, nn.Module] = {**attention_modules(model), **sparse_modules(model)}
    for name, _ in model.named_modules():
        if name not in modules:
            continue
        module = modules[name]
        class_name = original_class(module).__name__
        if not isinstance(module, SparseAttentionModule):
            rows.append(LayerSummary(name, class_name, None, {}, False))
            continue
        flags = module.sparse_attention
        measured = None if statistics is None else statistics.layers.get(name)
        shares = (None, None) if measured is None or not measured.rows else (measured.sparsity, measured.mass_kept)
        method, settings = flags.method.method, flags.method.settings()
        is_on = present_decision(module).is_on
        rows.append(LayerSummary(name, class_name, method, settings, is_on, flags.active, *shares))
    return rows
