"""Measures the units of one model, for every variant in turn."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..conversion import sparsify, unsparsify
from ..errors import ConfigError, UnsupportedError
from .assets import check_context, load_model, read_documents
from .attention import measure_attention
from .config import DENSE, OURS, ExperimentConfig, Metric
from .harness import Harness
from .measuring import cut_windows
from .plan import HARNESS, Unit, sample_place, text_name
from .quality import compare_predictions
from .records import Answer, Attention, Continuation, Record, Speed, Window
from .speed import SHORTEST, Call, as_ours, in_turns, kernel_calls, model_call, model_plans, shape_of, wait_for
from .tasks import TaskSample, haystack_of, make_sample, score
from .words import sentences

WARM_UP = 128  # tokens


@dataclass(frozen=True)
class TextWindow:
    """A stretch of text that is scored by itself.

    Attributes:
        text: the source's name in the configuration.
        document: the document's name in the source.
        index: the window's number in its source, from 0.
        tokens: ``[length]`` token ids.
    """

    text: str
    document: str
    index: int
    tokens: Tensor


class Keeper(Protocol):
    """Keeps what is measured; see :mod:`.runner`."""

    config: ExperimentConfig
    harness: Harness | None
    step: int

    def has(self, cell: tuple[Any, ...]) -> bool:
        """Whether a cell has been measured."""

    def write(self, *records: Record) -> None:
        """Keep records, in the file too."""

    def fail(self, model: str, variant: str, what: str, cell: tuple[Any, ...], error: Exception) -> None:
        """Note that a cell could not be measured."""

    def progress(self, what: str) -> None:
        """Say what is being done."""

    def prepare(self, what: str, done: float, total: float) -> None:
        """Say how far something is that belongs to no cell."""

    def samples_file(self, suffix: str = "") -> Path:
        """Return the file that samples go to."""


class ModelWork:
    """The units of one model: what they need is prepared before the first of them writes anything."""

    def __init__(self, keeper: Keeper, name: str, units: Sequence[Unit]) -> None:
        self.keeper = keeper
        self.config = config = keeper.config
        self.name = name
        kinds = {unit.kind for unit in units}
        documents = {}
        if config.quality is not None and kinds & {"quality", "attention"}:
            keeper.prepare("reading texts", 0, 0)
            for i, text in enumerate(config.quality.text):
                documents[text_name(text)] = (read_documents(text, f"quality.text.{i}"), f"quality.text.{i}")
        self.haystack: Callable[[random.Random], Iterator[str]] = sentences
        if config.tasks is not None and config.tasks.haystack is not None and "tasks" in kinds:
            found = read_documents(config.tasks.haystack, "tasks.haystack")
            self.haystack = haystack_of("\n\n".join(found.values()))
        dtype = getattr(torch, config.dtype)
        self.model, self.tokenizer = load_model(name, dtype, config.device, keeper.prepare, config.device_map)
        if self.tokenizer is None and kinds - {"speed"}:
            raise ConfigError(f"models: {name!r} is not allowed; a model without a tokenizer is for speed alone")
        self.windows = self._cut(documents)
        self._check_lengths()
        for variant in config.variants:  # one that does not fit is found before anything runs
            self.switch(variant)
        for variant in config.variants:  # the same for what only shows in a run; kernels get compiled
            keeper.prepare(f"checking {variant}", 0, 0)
            self.switch(variant)
            self.logits(torch.zeros(1, WARM_UP, dtype=torch.long, device=self.model.device)[:, : self._context()])

    def _context(self) -> int:
        return getattr(self.model.config, "max_position_embeddings", None) or WARM_UP

    def _check_lengths(self) -> None:
        config = self.config
        for path, section in (
            ("quality.window_lengths", config.quality and config.quality.window_lengths),
            ("tasks.lengths", config.tasks and config.tasks.lengths),
            ("speed.lengths", config.speed and config.speed.lengths),
        ):
            for i, length in enumerate(section or ()):
                check_context(self.model, length, f"{path}.{i}")

    def _cut(self, documents: Mapping[str, tuple[dict[str, str], str]]) -> dict[tuple[str, int], list[TextWindow]]:
        """Cut the windows of every text and length: of several documents the first of each, then the second, ..."""
        if not documents:
            return {}
        quality, tokenizer = self.config.quality, self.tokenizer
        assert quality is not None
        assert tokenizer is not None
        windows: dict[tuple[str, int], list[TextWindow]] = {}
        for text, (contents, path) in documents.items():
            names = list(contents)
            random.Random(f"{self.config.seed}/{text}").shuffle(names)
            tokens: dict[str, Tensor] = {}

            def tokens_of(
                name: str, tokens: dict[str, Tensor] = tokens, contents: Mapping[str, str] = contents
            ) -> Tensor:
                if name not in tokens:
                    self.keeper.prepare(f"tokenizing {name}", 0, 0)
                    tokens[name] = torch.tensor(tokenizer(contents[name], verbose=False).input_ids)
                return tokens[name]

            for length in quality.window_lengths:
                check_context(self.model, length, f"quality.window_lengths.{quality.window_lengths.index(length)}")
                parts = cut_windows(names, tokens_of, length, quality.windows)
                found = [TextWindow(text, name, i, part) for i, (name, part) in enumerate(parts)]
                if len(found) < quality.windows:
                    raise ConfigError(
                        f"{path}: {text!r} is not allowed; must have windows = {quality.windows} windows of {length} "
                        f"tokens, has {len(found)}"
                    )
                windows[text, length] = found
        return windows

    def run(self, unit: Unit) -> None:
        """Measure a unit for every variant that lacks it."""
        getattr(self, f"_run_{unit.kind}")(unit)

    def switch(self, variant: str) -> None:
        """Make the model a variant; the dense one is the model as it was loaded."""
        sparsity = self.config.variants[variant]
        if sparsity is None:
            unsparsify(self.model)
            return
        try:
            sparsify(self.model, sparsity)
        except ConfigError as error:
            raise ConfigError(f"variants.{variant}.{error}") from error
        except UnsupportedError as error:
            raise UnsupportedError(f"variants.{variant}: {error}") from error

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Return the logits ``[batch, length, vocabulary]`` of a forward pass."""
        logits: Tensor = self.model(tokens, use_cache=False).logits
        return logits

    def _variants(self, unit: Unit) -> Iterator[str]:
        """Yield the variants in turn, counting steps."""
        for variant in self.config.variants:
            self.keeper.progress(f"{variant}: {unit.name}")
            self.keeper.step += 1
            yield variant

    @contextmanager
    def _noting(self, variant: str, unit: Unit, cells: Sequence[tuple[Any, ...]]) -> Iterator[None]:
        """Record an error for the first of some cells, and go on."""
        try:
            yield
        except Exception as error:  # whatever it is, the other cells are still wanted
            self.keeper.fail(self.name, variant, f"{variant}: {unit.name}", cells[0], error)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _run_quality(self, unit: Unit) -> None:
        text, length, part = unit.where
        windows = [self.windows[text, length][i] for i in part]
        tokens = torch.stack([window.tokens for window in windows]).to(self.model.device)
        dense: Tensor | None = None  # of these windows only: they are large
        for variant in self._variants(unit):
            cells = [(Window.kind, self.name, variant, text, length, window.index) for window in windows]
            missing = [cell for cell in cells if not self.keeper.has(cell)]
            if not missing and variant != DENSE:
                continue
            with self._noting(variant, unit, missing or cells):
                self.switch(variant)
                wait_for(self.model.device)
                start = time.perf_counter()
                logits = self.logits(tokens)
                wait_for(self.model.device)
                seconds = (time.perf_counter() - start) / len(windows)
                if variant == DENSE:
                    dense = logits
                if dense is None:
                    raise RuntimeError("the dense model failed on these windows")
                records = []
                for i, window in enumerate(windows):
                    found = compare_predictions(logits[i], dense[i], tokens[i])
                    records.append(
                        Window(
                            model=self.name,
                            variant=variant,
                            text=text,
                            document=window.document,
                            length=length,
                            window=window.index,
                            tokens=length - 1,
                            seconds=seconds,
                            **found._asdict(),
                        )
                    )
                del logits
                self.keeper.write(*(record for record in records if record.cell in missing))

    def _run_attention(self, unit: Unit) -> None:
        text, length, part = unit.where
        window = self.windows[text, length][part.start]
        with_heads = (text, length, window.index) == (*next(iter(self.windows)), 0)
        for variant in self._variants(unit):
            cell = (Attention.kind, self.name, variant, text, length, window.index)
            if self.config.variants[variant] is None or self.keeper.has(cell):
                continue
            with self._noting(variant, unit, [cell]):
                self.switch(variant)
                kept = measure_attention(self.model, window.tokens.to(self.model.device), with_heads)
                fields = {field.name: getattr(kept, field.name) for field in dataclasses.fields(kept)}
                self.keeper.write(Attention(self.name, variant, text, length, window.index, **fields))

    def _run_tasks(self, unit: Unit) -> None:
        task, length, part = unit.where
        tasks, tokenizer = self.config.tasks, self.tokenizer
        assert tasks is not None
        assert tokenizer is not None
        try:
            samples = [
                make_sample(
                    task,
                    length,
                    *sample_place(self.config, task, i),
                    self.config.seed,
                    lambda text: len(tokenizer(text, verbose=False).input_ids),
                    self.haystack,
                )
                for i in part
            ]
        except ValueError as error:
            self.keeper.fail(self.name, DENSE, unit.name, (Answer.kind, self.name, DENSE, *unit.where[:2]), error)
            return
        for variant in self._variants(unit):
            cells = [self._answer_cell(variant, sample) for sample in samples]
            if all(map(self.keeper.has, cells)):
                continue
            with self._noting(variant, unit, cells):
                self.switch(variant)
                answers = self._answers([sample.prompt.text for sample in samples], samples[0].prompt.max_new_tokens)
                if variant == DENSE:
                    self._keep_samples(samples)
                records = [
                    Answer(
                        model=self.name,
                        variant=variant,
                        task=task,
                        length=length,
                        depth=sample.depth,
                        index=sample.index,
                        tokens=count,
                        score=score(sample, output),
                        output=output,
                    )
                    for sample, (output, count) in zip(samples, answers, strict=True)
                ]
                self.keeper.write(*(record for record in records if not self.keeper.has(record.cell)))

    def _answer_cell(self, variant: str, sample: TaskSample) -> tuple[Any, ...]:
        return Answer.kind, self.name, variant, sample.task, sample.length, sample.depth, sample.index

    def _keep_samples(self, samples: Sequence[TaskSample]) -> None:
        with self.keeper.samples_file().open("a", encoding="utf-8") as file:
            for sample in samples:
                content = {"model": self.name, **dataclasses.asdict(sample)}
                file.write(json.dumps(content, ensure_ascii=False) + "\n")

    @torch.no_grad()
    def _answers(self, prompts: Sequence[str], max_new_tokens: int) -> list[tuple[str, int]]:
        """Return what the model adds to each prompt, greedily, and how many tokens the prompt has."""
        tokenizer = self.tokenizer
        assert tokenizer is not None
        ids = [tokenizer(prompt, verbose=False).input_ids for prompt in prompts]
        longest, device = max(map(len, ids)), self.model.device
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        tokens = torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device)
        generator: Any = self.model  # Transformers types generate() for a protocol that its classes do not declare
        output = generator.generate(
            tokens, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad
        )
        texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
        return [(text, len(row)) for text, row in zip(texts, ids, strict=True)]

    def _run_lm_eval(self, unit: Unit) -> None:
        harness, tokenizer = self.keeper.harness, self.tokenizer
        assert harness is not None
        assert tokenizer is not None
        for variant in self._variants(unit):
            cell = (HARNESS, self.name, variant)
            if self.keeper.has(cell):
                continue
            with self._noting(variant, unit, [cell]):
                self.switch(variant)
                scores, samples = harness.evaluate(self.model, tokenizer, self.name, variant, self.config.seed)
                with self.keeper.samples_file("-lm-eval").open("a", encoding="utf-8") as file:
                    for task, rows in samples.items():
                        for row in rows:
                            content = {"model": self.name, "variant": variant, "task": task, **row}
                            file.write(json.dumps(content, ensure_ascii=False, default=str) + "\n")
                self.keeper.write(*scores)

    def _run_speed(self, unit: Unit) -> None:
        measure, length = unit.where
        speed = self.config.speed
        assert speed is not None
        sparse = [variant for variant in self.config.variants if self.config.variants[variant] is not None]
        contenders = [DENSE, OURS, *sparse]
        cells = {name: (Speed.kind, self.name, name, measure, length) for name in contenders}
        missing = [name for name in contenders if not self.keeper.has(cells[name])]
        self.keeper.progress(f"speed: {measure} at {length}")
        self.keeper.step += len(self.config.variants)
        if not missing:
            return
        device = self.model.device
        try:
            call = self._kernel_calls(length) if measure == "kernel" else self._model_calls(measure, length)
        except Exception as error:  # such as too little memory for the cache; the other lengths are still wanted
            self.keeper.fail(self.name, missing[0], unit.name, cells[missing[0]], error)
            return
        least = SHORTEST if measure == "kernel" else 0.0
        for name, found, peak in in_turns(missing, call, speed.repeats, device, least):
            if isinstance(found, Exception):
                self.keeper.fail(self.name, name, f"{name}: {unit.name}", cells[name], found)
                continue
            steps = speed.decode_tokens if measure == "decode" else 1
            seconds = [x / steps for x in found]
            self.keeper.write(Speed(self.name, name, measure, length, seconds, peak))

    def _kernel_calls(self, length: int) -> Callable[[str], Call]:
        plans = {}
        for variant, sparsity in self.config.variants.items():
            if sparsity is not None:
                self.switch(variant)
                plan = model_plans(self.model)
                if plan is not None:
                    plans[variant] = plan
        speed = self.config.speed
        assert speed is not None
        dtype = getattr(torch, self.config.dtype)
        calls = kernel_calls(shape_of(self.model), plans, length, speed.batch_size, dtype, self.model.device)
        return calls.__getitem__

    def _model_calls(self, measure: Metric, length: int) -> Callable[[str], Call]:
        speed = self.config.speed
        assert speed is not None
        self.switch(DENSE)
        run = model_call(self.model, measure, length, speed.batch_size, speed.decode_tokens)
        first = next((name for name, sparsity in self.config.variants.items() if sparsity is not None), None)

        def ours() -> object:
            with as_ours(self.model):
                return run()

        def call(name: str) -> Call:
            if name != OURS:
                self.switch(name)
                return run
            if first is None:
                sparsify(self.model, "sparse_softmax")
            else:
                self.switch(first)
            return ours

        return call

    def _run_generation(self, unit: Unit) -> None:
        generation = self.config.generation
        assert generation is not None
        for variant in self._variants(unit):
            cell = (Continuation.kind, self.name, variant)
            if self.keeper.has(cell):
                continue
            with self._noting(variant, unit, [cell]):
                self.switch(variant)
                wait_for(self.model.device)
                start = time.perf_counter()
                ((text, _),) = self._answers([generation.prompt], generation.max_new_tokens)
                self.keeper.write(Continuation(self.name, variant, text, time.perf_counter() - start))
