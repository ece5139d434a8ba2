"""Loading sparse models that were saved with ``save_pretrained``."""

from __future__ import annotations

import os
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .conversion import CONFIG_ATTRIBUTE, CONFIG_VERSION, sparsify
from .errors import ConfigError


def from_pretrained(path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Load a Transformers model and make it sparse as it was when it was saved.

    Saving needs nothing special: ``model.save_pretrained(path)`` after ``sparsify`` writes the configuration into
    ``config.json``, under ``sparse_attention_config``. Transformers' own ``from_pretrained`` loads the same folder
    dense. Only safetensors weights are read.

    The model's class is the one that was saved, as ``architectures`` in ``config.json`` names it; if it names none,
    ``AutoModelForCausalLM`` chooses. A class that comes with the model instead of Transformers is loaded only if
    ``auto_map`` in ``config.json`` names it and ``trust_remote_code=True`` is passed, which runs its code.

    Args:
        path: a folder, or a name that Transformers knows.
        kwargs: passed on to the class's ``from_pretrained``.

    Returns:
        The sparse model.

    Raises:
        ConfigError: if the saved config holds no sparsity configuration, or one of another version, or names a class
            that is neither a model of Transformers nor to be trusted.
        ValueError: by Transformers, if it names no class, and the one in ``auto_map`` is not to be trusted.
        UnsupportedError: if the model has a layer that is not supported.
    """
    config, _ = PreTrainedConfig.get_config_dict(path, **kwargs)
    saved = config.get(CONFIG_ATTRIBUTE)
    if saved is None:
        raise ConfigError(f"{path}: config.json holds no {CONFIG_ATTRIBUTE}; load the model and call sparsify")
    if not isinstance(saved, dict) or saved.get("version") != CONFIG_VERSION:
        version = saved.get("version") if isinstance(saved, dict) else saved
        raise ConfigError(f"{path}: {CONFIG_ATTRIBUTE}.version: {version!r} is not allowed; {CONFIG_VERSION}")
    names = config.get("architectures") or []
    loader: Any = AutoModelForCausalLM
    if names:
        # "module.Class", by the class of Transformers that loads it; tokenizers and configs are there, too
        places = (config.get("auto_map") or {}).items()
        own = {str(place).rpartition(".")[2]: auto for auto, place in places if auto.startswith("AutoModel")}
        trusted = own.get(names[0]) if kwargs.get("trust_remote_code") else None
        loader = getattr(transformers, trusted or names[0], None)
        if not (isinstance(loader, type) and (trusted or issubclass(loader, PreTrainedModel))):
            raise ConfigError(
                f"{path}: architectures: {names[0]!r} is not allowed; must be a model of Transformers, or a class that "
                "auto_map names for one of Transformers' AutoModel classes, loaded with trust_remote_code=True, which "
                "runs the model's own code"
            )
    # Where nothing is said of trust, Transformers would ask at a terminal.
    options = {"trust_remote_code": False, **kwargs, "use_safetensors": True}
    model: PreTrainedModel = loader.from_pretrained(path, **options)
    return sparsify(model, {"sparse_cfg": dict(saved["sparse_cfg"])})
