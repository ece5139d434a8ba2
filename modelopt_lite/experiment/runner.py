"""Runs an experiment: every variant of a model on every window of text, and one continuation each."""

from __future__ import annotations

import dataclasses
import itertools
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import __version__
from ..conversion import LayerSummary, Summary, sparsify, summary, unsparsify
from ..errors import ConfigError
from ..stats import ModelStatistics, collect_statistics
from .assets import Progress, check_context, load_model, read_text
from .config import DENSE, ExperimentConfig
from .quality import Measurement, VariantResult, compare_predictions, summarize
from .report import write_report

WARM_UP = 128  # tokens


@dataclass(frozen=True)
class Window:
    """A stretch of text that is scored by itself.

    Attributes:
        document: the text's name in the configuration.
        index: the window's number in its document, from 0.
        tokens: ``[length]`` token ids.
    """

    document: str
    index: int
    tokens: Tensor


@dataclass(frozen=True)
class ExperimentResult:
    """What an experiment found.

    Attributes:
        folder: where config.yaml, results.jsonl, report.md and quality.png are.
        variants: one result a variant, the dense model first.
        layers: what each attention layer did, by variant; without the dense model.
        continuations: the prompt's greedy continuation by variant; empty without a prompt.
    """

    folder: Path
    variants: tuple[VariantResult, ...]
    layers: dict[str, Summary]
    continuations: dict[str, str]


def run_experiment(
    config: ExperimentConfig, progress: Progress, on_results: Callable[[Sequence[VariantResult]], None]
) -> ExperimentResult:
    """Run an experiment and write its run folder, a new one inside ``config.output_dir``.

    Results are written as they come, so an interrupted run keeps what it measured.

    Args:
        config: what to run.
        progress: told what is being done and how far it is.
        on_results: given the results so far after each window of a variant; variants that have none are missing.

    Raises:
        ConfigError: if the model, the texts and the variants do not go together; nothing has been written then.
        UnsupportedError: if the model is not supported.
        AssetError: if a built-in model or text cannot be had.
    """
    texts = [(name, read_text(name, f"text.{i}")) for i, name in enumerate(config.text)]
    config = config.resolve()
    model, tokenizer = load_model(config.model, getattr(torch, config.dtype), config.device, progress)
    windows = _cut_windows(config, texts, model, tokenizer)
    for name in config.variants:  # one that does not fit is found before hours of work, kernels get compiled untimed
        _switch(model, config, name)
        _logits(model, windows[0].tokens[:WARM_UP])
    folder = _create_run_folder(config.output_dir)
    config.save(folder / "config.yaml")
    environment = describe_environment(config.device)

    measurements: list[Measurement] = []
    seconds: dict[str, float] = {}
    variants: list[VariantResult] = []
    totals = {name: ModelStatistics() for name, sparsity in config.variants.items() if sparsity is not None}
    layers: dict[str, Summary] = {}
    continuations: dict[str, str] = {}
    steps = itertools.count()
    total = len(config.variants) * (len(windows) + (config.prompt is not None))
    with (folder / "results.jsonl").open("w", encoding="utf-8") as lines:

        def write(kind: str, row: Measurement | VariantResult | LayerSummary, **more: str) -> None:
            lines.write(json.dumps({"kind": kind, **more, **dataclasses.asdict(row), **environment}) + "\n")
            lines.flush()

        for window in windows:
            dense_logits: Tensor | None = None  # of this window only: they are large
            for name in config.variants:
                progress(f"{name} on {window.document}, window {window.index + 1}", next(steps), total)
                _switch(model, config, name)
                if window is windows[0]:
                    seconds[name] = _forward_seconds(model, window.tokens)
                with collect_statistics(model) as statistics:
                    logits = _logits(model, window.tokens)
                dense_logits = logits if dense_logits is None else dense_logits
                cross_entropy, divergence = compare_predictions(logits, dense_logits, window.tokens)
                del logits
                measurements.append(
                    Measurement(
                        variant=name,
                        document=window.document,
                        window=window.index,
                        tokens=window.tokens.numel() - 1,
                        cross_entropy=cross_entropy,
                        divergence=divergence,
                        mass_kept=statistics.total.mass_kept,
                        sparsity=statistics.total.sparsity,
                    )
                )
                write("window", measurements[-1])
                if name in totals:
                    totals[name].merge(statistics)
                    layers[name] = summary(model, totals[name])
                variants = summarize(measurements, seconds, DENSE)
                on_results(variants)
        for variant in variants:
            write("variant", variant)
            for layer in layers.get(variant.variant, ()):
                write("layer", layer, variant=variant.variant)
    if config.prompt is not None:
        for name in config.variants:
            progress(f"{name} continues the prompt", next(steps), total)
            _switch(model, config, name)
            continuations[name] = _continue(model, tokenizer, config.prompt, config.max_new_tokens)
    progress("done", total, total)
    write_report(folder, config, variants, layers, continuations, environment)
    return ExperimentResult(folder, tuple(variants), layers, continuations)


def _cut_windows(
    config: ExperimentConfig,
    texts: Sequence[tuple[str, str]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Window]:
    """Tokenize each text as a whole and take its first windows, side by side."""
    check_context(model, config.window_length, "window_length")
    windows = []
    for i, (name, text) in enumerate(texts):
        tokens = torch.tensor(tokenizer(text).input_ids, device=config.device)
        needed = config.window_length * config.windows_per_text
        if tokens.numel() < needed:
            raise ConfigError(
                f"text.{i}: {name!r} is not allowed; must have window_length * windows_per_text = {needed} tokens, "
                f"has {tokens.numel()}"
            )
        windows += [Window(name, j, part) for j, part in enumerate(tokens[:needed].split(config.window_length))]
    return windows


def _switch(model: PreTrainedModel, config: ExperimentConfig, variant: str) -> None:
    """Make the model the given variant; a dense one is the model as it was loaded."""
    sparsity = config.variants[variant]
    if sparsity is None:
        unsparsify(model)
        return
    try:
        sparsify(model, sparsity)
    except ConfigError as error:
        raise ConfigError(f"variants.{variant}.{error}") from error


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Return the logits ``[length, vocabulary]`` of a forward pass."""
    logits: Tensor = model(tokens[None], use_cache=False).logits[0]
    return logits


def _forward_seconds(model: PreTrainedModel, tokens: Tensor) -> float:
    """Return how long a forward pass takes."""
    _wait_for(tokens.device)
    start = time.perf_counter()
    _logits(model, tokens)
    _wait_for(tokens.device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int) -> str:
    """Return what the model adds to the prompt, greedily."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    generator: Any = model  # Transformers types generate() for a protocol that its model classes do not declare
    output = generator.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return cast(str, tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))


def _create_run_folder(parent: Path) -> Path:
    """Create a folder that is named after the current time and did not exist."""
    name = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = parent / name
    attempt = 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # another run that started in the same second
            attempt += 1
            folder = parent / f"{name}-{attempt}"
        except OSError as error:
            raise ConfigError(
                f"output_dir: {str(parent)!r} is not allowed ; must be a folder to write in ({error.strerror})"
            ) from error


def describe_environment(device: str) -> dict[str, Any]:
    """Return what results depend on besides the configuration: date, name of the device, versions."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": name,
        "versions": {
            "python": platform.python_version(),
            "modelopt_lite": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
