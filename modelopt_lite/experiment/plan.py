"""What an experiment consists of: units of work, the cells that they measure, and what they cost."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from .config import BUILT_IN_MODEL, DENSE, OURS, RANDOM_PREFIX, ExperimentConfig
from .records import Answer, Attention, Continuation, Speed, Window
from .speed import wait_for
from .tasks import DEPTH_TASKS, TaskName

HARNESS = "harness"
"""The kind of the cells of lm-evaluation-harness, whose metrics are not known before it has run."""


@dataclass(frozen=True)
class Unit:
    """Work that is done at once for every variant in turn, and shared out among processes as a whole.

    Attributes:
        kind: quality, attention, tasks, lm_eval, speed or generation.
        model: name of the model.
        where: text, length and range of windows; task, length and range of samples; measure and length.
        tokens: how many tokens a variant's forward passes have.
        length: how long the sequences are.
    """

    kind: str
    model: str
    where: tuple[Any, ...]
    tokens: int
    length: int

    @property
    def name(self) -> str:
        """Say what is done, for people."""
        parts = (f"{part.start + 1}-{part.stop}" if isinstance(part, range) else str(part) for part in self.where)
        return " ".join([self.kind, *parts])


def plan_units(config: ExperimentConfig) -> list[Unit]:
    """Return everything that an experiment does, in order; needs neither models nor texts."""
    units: list[Unit] = []
    for model in config.models:
        if config.quality is not None:
            q = config.quality
            for length, text in itertools.product(q.window_lengths, map(text_name, q.text)):
                for part in _batches(q.windows, q.batch_size):
                    units.append(Unit("quality", model, (text, length, part), len(part) * length, length))
                for i in range(min(q.attention_windows, q.windows)):
                    units.append(Unit("attention", model, (text, length, range(i, i + 1)), length, length))
        if config.tasks is not None:
            t = config.tasks
            for task, length in itertools.product(t.names, t.lengths):
                count = t.samples * (len(t.depths) if task in DEPTH_TASKS else 1)
                for part in _batches(count, t.batch_size):
                    units.append(Unit("tasks", model, (task, length, part), len(part) * length, length))
        if config.lm_eval is not None:
            units.append(Unit("lm_eval", model, tuple(config.lm_eval.tasks), 0, 0))
        if config.speed is not None:
            s = config.speed
            for measure, length in itertools.product(s.measure, s.lengths):
                # Of a kernel only one layer runs, which counts little beside a model.
                runs = {"kernel": 0, "prefill": s.repeats + 1, "decode": 1}[measure]
                units.append(Unit("speed", model, (measure, length), runs * s.batch_size * length, length))
        if config.generation is not None:
            units.append(Unit("generation", model, (), len(config.generation.prompt) // 4, 0))
    return units


def text_name(text: Any) -> str:
    """Return a text source's name in records."""
    if isinstance(text, str):
        return Path(text).name if Path(text).is_absolute() else text
    return "/".join(filter(None, (text.dataset, text.config, text.split)))


def _batches(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def cells_of(unit: Unit, config: ExperimentConfig) -> list[tuple[Any, ...]]:
    """Return the cells of a unit; those of the harness are not known before it has run."""
    variants: list[str] = list(config.variants)
    model, where = unit.model, unit.where
    if unit.kind == "quality":
        text, length, part = where
        return [(Window.kind, model, variant, text, length, i) for i in part for variant in variants]
    if unit.kind == "attention":
        text, length, part = where
        sparse = [variant for variant in variants if config.variants[variant] is not None]
        return [(Attention.kind, model, variant, text, length, i) for i in part for variant in sparse]
    if unit.kind == "tasks":
        task, length, part = where
        places = [sample_place(config, task, i) for i in part]
        return [(Answer.kind, model, variant, task, length, *place) for place in places for variant in variants]
    if unit.kind == "speed":
        sparse = [variant for variant in variants if config.variants[variant] is not None]
        return [(Speed.kind, model, variant, *where) for variant in (DENSE, OURS, *sparse)]
    if unit.kind == "generation":
        return [(Continuation.kind, model, variant) for variant in variants]
    return [(HARNESS, model, variant) for variant in variants]


def sample_place(config: ExperimentConfig, task: TaskName, number: int) -> tuple[float | None, int]:
    """Return the depth and the index of a task's sample, by its number among all of one length."""
    tasks = config.tasks
    assert tasks is not None
    if task not in DEPTH_TASKS:
        return None, number
    return tasks.depths[number % len(tasks.depths)], number // len(tasks.depths)


@dataclass(frozen=True)
class Cost:
    """What an experiment costs, roughly.

    Attributes:
        cells: how many there are.
        tokens: of all forward passes.
        petaflop: of all forward passes, 2 a parameter and token, and 4 times width, layers and half the length.
        seconds: at half the speed that this machine multiplies matrices with; None if a model's size is not known.
    """

    cells: int
    tokens: int
    petaflop: float | None
    seconds: float | None


def estimate_cost(config: ExperimentConfig) -> Cost:
    """Estimate an experiment's cost without loading weights; of answers and the harness' tasks little is counted."""
    units = plan_units(config)
    cells = sum(len(cells_of(unit, config)) for unit in units)
    tokens = sum(unit.tokens for unit in units) * len(config.variants)
    try:
        flop = sum(_flop_of_token(unit) * unit.tokens for unit in units) * len(config.variants)
    except (OSError, ValueError):
        return Cost(cells, tokens, None, None)
    return Cost(cells, tokens, flop / 1e15, flop / (0.5 * _flop_per_second(config)))


def _flop_of_token(unit: Unit) -> float:
    name = unit.model.removeprefix(RANDOM_PREFIX)
    if name == BUILT_IN_MODEL:
        parameters, width, layers = 135e6, 576, 30
    else:
        shape: Any = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
        with torch.device("meta"):
            model: Any = transformers.AutoModelForCausalLM.from_config(shape)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        text = shape.get_text_config()
        width, layers = text.hidden_size, text.num_hidden_layers
    return float(2 * parameters + 4 * width * layers * unit.length / 2)


def _flop_per_second(config: ExperimentConfig) -> float:
    size = 4096 if config.device.startswith("cuda") else 768
    x = torch.ones(size, size, dtype=getattr(torch, config.dtype), device=config.device)
    x @ x
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < 0.2:
        x @ x
        wait_for(x.device)
        calls += 1
    return 2 * size**3 * calls / (time.perf_counter() - start)
