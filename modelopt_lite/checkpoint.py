"""Saving and loading sparse models, and adapters around them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from .conversion import CONFIG_ATTRIBUTE, CONFIG_VERSION, sparsify
from .discovery import pretrained_models
from .errors import ConfigError, UnsupportedError
from .huggingface import saving_sparsity
from .module import sparse_modules

ADAPTER_FILE = f"{CONFIG_ATTRIBUTE}.json"
"""What :func:`save_pretrained` writes beside an adapter: which layer has which method."""

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def save_pretrained(model: nn.Module, path: str | os.PathLike[str], **kwargs: Any) -> None:
    """Save a sparse model, or the adapters of PEFT around one, together with its sparsity.

    For a Transformers model it is the same as ``model.save_pretrained(path)``, which writes the configuration into
    ``config.json``. PEFT saves the adapter alone; beside it this writes ``sparse_attention_config.json``, which holds
    the method of every sparse layer.

    Args:
        model: a Transformers model or a ``PeftModel`` around one, after :func:`~modelopt_lite.conversion.sparsify`.
        path: the folder.
        kwargs: passed on to the model's ``save_pretrained``.

    Raises:
        UnsupportedError: if the model is not sparse, or is not, holds or wraps a single Transformers model.
    """
    found = list(pretrained_models(model).values())
    layers = sparse_modules(found[0]) if len(found) == 1 else {}
    if not layers:
        raise UnsupportedError(f"{type(model).__name__} is not a sparse Transformers model, or an adapter around one")
    with saving_sparsity():
        cast(Any, model).save_pretrained(path, **kwargs)
    if not kwargs.get("is_main_process", True):
        return
    methods = {name: module.sparse_attention.method.model_dump(mode="json") for name, module in layers.items()}
    text = json.dumps({"version": CONFIG_VERSION, "sparse_cfg": list(methods.items())}, indent=2)
    for name in ("", *getattr(found[0], "peft_config", {})):
        folder = Path(path) / name
        if (folder / "adapter_config.json").is_file():
            (folder / ADAPTER_FILE).write_text(text, encoding="utf-8")


def from_pretrained(path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Load a Transformers model and make it sparse as it was when it was saved.

    Saving needs nothing special: ``model.save_pretrained(path)`` after ``sparsify`` writes the configuration into
    ``config.json``, under ``sparse_attention_config``. Transformers' own ``from_pretrained`` loads the same folder
    dense. Only safetensors weights are read.

    The model's class is the one that was saved, as ``architectures`` in ``config.json`` names it; if it names none,
    ``AutoModelForCausalLM`` chooses. A class that comes with the model instead of Transformers is loaded only if
    ``auto_map`` in ``config.json`` names it and ``trust_remote_code=True`` is passed, which runs its code.

    An adapter of PEFT is loaded by Transformers together with its base model. Its sparsity is the one that
    :func:`save_pretrained` wrote beside it, else the one in the base model's ``config.json``.

    Args:
        path: a folder, or a name that Transformers knows.
        kwargs: passed on to the class's ``from_pretrained``.

    Returns:
        The sparse model.

    Raises:
        ConfigError: if the saved config, or the adapter and its base model, hold no sparsity configuration, or one of
            another version, or name a class that is neither a model of Transformers nor to be trusted.
        ValueError: by Transformers, if it names no class, and the one in ``auto_map`` is not to be trusted.
        UnsupportedError: if the model has a layer that is not supported.
    """
    options = {name: value for name, value in kwargs.items() if name in _HUB_OPTIONS}
    adapter = find_adapter_config_file(str(path), **options)
    if adapter is None:
        config, _ = PreTrainedConfig.get_config_dict(path, **kwargs)
        entries = _entries(path, "config.json", config.get(CONFIG_ATTRIBUTE))
    else:
        base = json.loads(Path(adapter).read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not base:
            raise ConfigError(f"{path}: adapter_config.json: base_model_name_or_path: {base!r} is not allowed; a path")
        of_base = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
        config, _ = PreTrainedConfig.get_config_dict(base, **of_base)
        entries = _entries_of_adapter(path, base, config, options)
    loader = _loader(path, config, bool(kwargs.get("trust_remote_code")))
    # Where nothing is said of trust, Transformers would ask at a terminal.
    model: PreTrainedModel = loader.from_pretrained(
        path, **{"trust_remote_code": False, **kwargs, "use_safetensors": True}
    )
    return sparsify(model, {"sparse_cfg": entries})


def _entries(path: Any, file: str, saved: Any) -> dict[str, Any]:
    """Return the patterns and methods of a saved configuration."""
    if saved is None:
        raise ConfigError(f"{path}: {file} holds no {CONFIG_ATTRIBUTE}; load the model and call sparsify")
    if not isinstance(saved, dict) or saved.get("version") != CONFIG_VERSION:
        version = saved.get("version") if isinstance(saved, dict) else saved
        raise ConfigError(f"{path}: {CONFIG_ATTRIBUTE}.version: {version!r} is not allowed; {CONFIG_VERSION}")
    return dict(saved["sparse_cfg"])


def _entries_of_adapter(path: Any, base: str, config: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return the patterns and methods of an adapter, given its base model's name and config."""
    missing_is_allowed: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    file = cached_file(str(path), ADAPTER_FILE, **options, **missing_is_allowed)
    if file is not None:
        return _entries(path, ADAPTER_FILE, json.loads(Path(file).read_text(encoding="utf-8")))
    if CONFIG_ATTRIBUTE not in config:
        raise ConfigError(
            f"{path}: this adapter of PEFT was saved without a sparsity: it has no {ADAPTER_FILE}, and config.json of "
            f"its base model {base} holds no {CONFIG_ATTRIBUTE}; load it with PEFT and call sparsify, and save it with "
            "modelopt_lite.save_pretrained(model, folder)"
        )
    return _entries(base, "config.json", config[CONFIG_ATTRIBUTE])


def _loader(path: Any, config: dict[str, Any], is_trusted: bool) -> Any:
    """Return the class of Transformers that loads a model."""
    names = config.get("architectures") or []
    if not names:
        return AutoModelForCausalLM
    # "module.Class", by the class of Transformers that loads it; tokenizers and configs are there, too
    places = (config.get("auto_map") or {}).items()
    own = {str(place).rpartition(".")[2]: auto for auto, place in places if auto.startswith("AutoModel")}
    trusted = own.get(names[0]) if is_trusted else None
    loader = getattr(transformers, trusted or names[0], None)
    if not (isinstance(loader, type) and (trusted or issubclass(loader, PreTrainedModel))):
        raise ConfigError(
            f"{path}: architectures: {names[0]!r} is not allowed; must be a model of Transformers, or a class that "
            "auto_map names for one of Transformers' AutoModel classes, loaded with trust_remote_code=True, which "
            "runs the model's own code"
        )
    return loader
