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

from . import __version__
from .conversion import CONFIG_ATTRIBUTE, CONFIG_VERSION, sparsify
from .errors import ConfigError, UnsupportedError
from .formats import MODELOPT_KEY, AttentionLayer, from_modelopt, is_modelopt, to_modelopt
from .models.discovery import attention_modules, pretrained_models
from .models.huggingface import saving_sparsity
from .models.module import original_class, sparse_modules

ADAPTER_FILE = f"{CONFIG_ATTRIBUTE}.json"
"""What :func:`save_pretrained` writes beside an adapter: which layer has which method."""
_OLD_ADAPTER_FILE = f"{MODELOPT_KEY}.json"

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def save_pretrained(model: nn.Module, path: str | os.PathLike[str], **kwargs: Any) -> None:
    """Save a sparse model, or the adapters of PEFT around one, together with its sparsity.

    For a Transformers model this is the same as ``model.save_pretrained(path)``, which writes the configuration into
    ``config.json``. PEFT saves only the adapter. There this function also writes ``modelopt_lite_sparsity.json`` into
    the adapter's folder, which holds the method of every sparse layer.

    Args:
        model: a Transformers model or a ``PeftModel`` around one, after :func:`~modelopt_lite.conversion.sparsify`.
        path: the folder.
        kwargs: passed on to the model's ``save_pretrained``.

    Raises:
        UnsupportedError: if the model is not sparse, or if it is not one Transformers model or a wrapper around one.
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
    ``config.json``, under ``modelopt_lite_sparsity``. Transformers' own ``from_pretrained`` loads the same folder
    dense. Only safetensors weights are read. If there is no such entry, what NVIDIA Model-Optimizer wrote under
    ``sparse_attention_config`` is read.

    The model's class is the one that ``architectures`` in ``config.json`` names. If it names none,
    ``AutoModelForCausalLM`` chooses. A class whose code comes with the model is loaded only if ``auto_map`` in
    ``config.json`` names it and ``trust_remote_code=True`` is passed. That runs its code.

    Transformers loads an adapter of PEFT together with its base model. Its sparsity is the one that
    :func:`save_pretrained` wrote into the adapter's folder, or else the one in the base model's ``config.json``.

    Args:
        path: a folder, or a name that Transformers knows.
        kwargs: passed on to the class's ``from_pretrained``.

    Returns:
        The sparse model.

    Raises:
        ConfigError: if there is no sparsity configuration, if it is of another version, if Model-Optimizer's has an
            entry that is not known, or if the model's class is neither one of Transformers nor trusted.
        ValueError: from Transformers, if ``architectures`` names no class and the one in ``auto_map`` is not trusted.
        UnsupportedError: if the model has a layer that is not supported.
    """
    options = {name: value for name, value in kwargs.items() if name in _HUB_OPTIONS}
    adapter = find_adapter_config_file(str(path), **options)
    if adapter is None:
        config, _ = PreTrainedConfig.get_config_dict(path, **kwargs)
        saved = _saved(path, config)
    else:
        base = json.loads(Path(adapter).read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not base:
            raise ConfigError(f"{path}: adapter_config.json: base_model_name_or_path: {base!r} is not allowed; a path")
        of_base = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
        config, _ = PreTrainedConfig.get_config_dict(base, **of_base)
        saved = _saved_beside_adapter(path, base, config, options)
    loader = _loader(path, config, bool(kwargs.get("trust_remote_code")))
    # Where nothing is said of trust, Transformers would ask at a terminal.
    model: PreTrainedModel = loader.from_pretrained(
        path, **{"trust_remote_code": False, **kwargs, "use_safetensors": True}
    )
    if is_modelopt(saved):
        try:
            return sparsify(model, from_modelopt(saved, _layers(model)))
        except ConfigError as error:
            raise ConfigError(f"{path}: config.json: {error}") from None
    if hasattr(model.config, MODELOPT_KEY) and not is_modelopt(getattr(model.config, MODELOPT_KEY)):
        delattr(model.config, MODELOPT_KEY)  # where this package used to write
    return sparsify(model, saved)


def export_modelopt(model: nn.Module, path: str | os.PathLike[str], **kwargs: Any) -> None:
    """Save a sparse model for readers of NVIDIA Model-Optimizer's metadata, such as TensorRT-LLM.

    The folder is that of :func:`save_pretrained`, and its ``config.json`` also has ``sparse_attention_config``. That
    has a group for N:M sparse softmax, and one for skip-softmax with its calibrations and targets.

    Args:
        model: a Transformers model after :func:`~modelopt_lite.conversion.sparsify`.
        path: the folder.
        kwargs: passed on to the model's ``save_pretrained``.

    Raises:
        UnsupportedError: if the format cannot say what a layer does. The message names the layer and the reason, and
            nothing has been written. The format has no words for methods that choose blocks, for N:M that differs
            between layers or leaves some of them dense, and for skip-softmax without a calibration of the form
            ``a * exp(b * target_sparsity)`` or with other sinks, dense window or blocks than the defaults. Adapters of
            PEFT are refused too; merge them first.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(f"{type(model).__name__} is not a Transformers model; merge adapters before exporting")
    metadata = to_modelopt(_layers(model), __version__)
    save_pretrained(model, path, **kwargs)
    if not kwargs.get("is_main_process", True):
        return
    file = Path(path) / "config.json"
    content = json.loads(file.read_text(encoding="utf-8")) | {MODELOPT_KEY: metadata}
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _layers(model: nn.Module) -> dict[str, AttentionLayer]:
    """Return the attention modules of a model with their methods; those that are switched off count as dense."""
    sparse = sparse_modules(model)
    layers = {}
    for name, module in attention_modules(model, sparse).items():
        flags = sparse[name].sparse_attention if name in sparse else None
        method = flags.method if flags is not None and flags.enabled else None
        layers[name] = AttentionLayer(original_class(module).__name__, method)
    return layers


def _saved(path: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Return the saved sparsity that a ``config.json`` holds, for ``sparsify`` or in Model-Optimizer's form."""
    for key in (CONFIG_ATTRIBUTE, MODELOPT_KEY):
        if config.get(key) is not None:
            return _checked(path, f"config.json: {key}", config[key])
    raise ConfigError(f"{path}: config.json holds no {CONFIG_ATTRIBUTE}; load the model and call sparsify")


def _checked(path: Any, place: str, saved: Any) -> dict[str, Any]:
    if is_modelopt(saved):
        return dict(saved)
    if not isinstance(saved, dict) or saved.get("version") != CONFIG_VERSION:
        version = saved.get("version") if isinstance(saved, dict) else saved
        raise ConfigError(f"{path}: {place}.version: {version!r} is not allowed; {CONFIG_VERSION}")
    return {"sparse_cfg": dict(saved["sparse_cfg"])}


def _saved_beside_adapter(path: Any, base: str, config: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return the saved sparsity of an adapter, given its base model's name and config."""
    missing_is_allowed: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    for name in (ADAPTER_FILE, _OLD_ADAPTER_FILE):
        file = cached_file(str(path), name, **options, **missing_is_allowed)
        if file is not None:
            return _checked(path, name, json.loads(Path(file).read_text(encoding="utf-8")))
    if config.get(CONFIG_ATTRIBUTE) is None and config.get(MODELOPT_KEY) is None:
        raise ConfigError(
            f"{path}: this adapter of PEFT was saved without a sparsity: it has no {ADAPTER_FILE}, and config.json of "
            f"its base model {base} holds no {CONFIG_ATTRIBUTE}; load it with PEFT and call sparsify, and save it with "
            "modelopt_lite.save_pretrained(model, folder)"
        )
    return _saved(base, config)


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
