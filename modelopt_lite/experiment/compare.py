"""Several runs side by side, on what they have in common."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence

from ..errors import ConfigError
from .quality import summarize_quality, summarize_tasks
from .records import Answer, Attention, Record, Window
from .result import ExperimentResult
from .speed import summarize_speed
from .tables import Table, quality_table, speed_table, task_table


def compare_runs(
    folders: Sequence[str | os.PathLike[str]], announce: Callable[[str], None] = lambda _: None
) -> list[Table]:
    """Return tables of several runs: quality and tasks on the windows and samples that all of them have, and speed.

    Each run's changes are against its own dense model.

    Args:
        folders: of at least two runs.
        announce: told what the runs' configurations import, before it runs.

    Raises:
        ConfigError: if there are fewer, one is no run, or they have nothing in common.
    """
    if len(folders) < 2:
        raise ConfigError("compare: needs at least two run folders")
    runs = [ExperimentResult.load(folder, announce) for folder in folders]
    names = _names([run.folder.name for run in runs])
    shared = set.intersection(*({key for r in run.records if (key := _shared_key(r))} for run in runs))
    quality, tasks, speed = [], [], []
    for name, run in zip(names, runs, strict=True):
        records = [r for r in run.records if _shared_key(r) in shared]
        for row in summarize_quality(records, run.variants, run.config.seed):
            quality.append(dataclasses.replace(row, variant=f"{name}: {row.variant}"))
        for task in summarize_tasks(records, run.variants, run.config.seed):
            tasks.append(dataclasses.replace(task, variant=f"{name}: {task.variant}"))
        for time in summarize_speed(run.records, run.variants):
            speed.append(dataclasses.replace(time, variant=f"{name}: {time.variant}"))
    threshold = next((run.config.tasks.threshold for run in runs if run.config.tasks), 1.0)
    tables = [*quality_table(quality), *task_table(tasks, [], threshold), *speed_table(speed)]
    tables = [table for table in tables if table.rows]
    if not tables:
        raise ConfigError(f"compare: {', '.join(names)} have no windows, samples or speeds in common")
    facts = [
        (
            name,
            "; ".join(dict.fromkeys(session.device for session in run.sessions)),
            "; ".join(dict.fromkeys(str(session.versions.get("torch")) for session in run.sessions)),
            run.config.dtype,
            str(len(run.failures)),
        )
        for name, run in zip(names, runs, strict=True)
    ]
    return [Table("runs", ("run", "device", "torch", "dtype", "failed"), facts), *tables]


def _names(names: Sequence[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, 1)]


def _shared_key(record: Record) -> tuple[object, ...] | None:
    """Return what a record was measured on, apart from the variant; None if that is no window or sample."""
    if isinstance(record, Window | Attention | Answer):
        return (*record.cell[:2], *record.cell[3:])
    return None
