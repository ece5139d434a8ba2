"""Loading sparse models that were saved with ``save_pretrained``."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from .conversion import CONFIG_ATTRIBUTE, CONFIG_VERSION, sparsify
from .errors import ConfigError


def from_pretrained(path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Load a causal language model and make it sparse as it was when it was saved.

    Saving needs nothing special: ``model.save_pretrained(path)`` after ``sparsify`` writes the configuration into
    ``config.json``, under ``sparse_attention_config``. Transformers' own ``from_pretrained`` loads the same folder
    dense. Only safetensors weights are read.

    Args:
        path: a folder, or a name that Transformers knows.
        kwargs: passed on to ``AutoModelForCausalLM.from_pretrained``.

    Returns:
        The sparse model.

    Raises:
        ConfigError: if the saved config holds no sparsity configuration, or one of another version.
        UnsupportedError: if the model has a layer that is not supported.
    """
    model = AutoModelForCausalLM.from_pretrained(path, **{**kwargs, "use_safetensors": True})
    saved = getattr(model.config, CONFIG_ATTRIBUTE, None)
    if saved is None:
        raise ConfigError(f"{path}: config.json holds no {CONFIG_ATTRIBUTE}; load the model and call sparsify")
    if not isinstance(saved, dict) or saved.get("version") != CONFIG_VERSION:
        version = saved.get("version") if isinstance(saved, dict) else saved
        raise ConfigError(f"{path}: {CONFIG_ATTRIBUTE}.version: {version!r} is not allowed; {CONFIG_VERSION}")
    return sparsify(model, {"sparse_cfg": dict(saved["sparse_cfg"])})
