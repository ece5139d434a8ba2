"""What a run found: read from its folder, summed up, shown as tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .config import ExperimentConfig
from .quality import QualityRow, TaskRow, summarize_quality, summarize_tasks
from .records import CONFIG, Continuation, Failure, HarnessScore, Record, Session, read_results
from .speed import SpeedRow, summarize_speed
from .tables import Table, harness_table, html_table, quality_table, speed_table, task_table, text_table

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class ExperimentResult:
    """What an experiment found so far; prints as tables, in a notebook too.

    Attributes:
        folder: where config.yaml, the results as JSON lines and the report are.
        config: what was run.
        sessions: the processes that measured.
        records: every measurement.
    """

    folder: Path
    config: ExperimentConfig
    sessions: Sequence[Session]
    records: Sequence[Record]

    @classmethod
    def load(cls, folder: str | os.PathLike[str], announce: Callable[[str], None] = lambda _: None) -> Self:
        """Read a run folder, finished or not.

        Args:
            folder: where the run is.
            announce: told what the configuration imports, before it runs.

        Raises:
            ConfigError: if it is none.
        """
        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise ConfigError(f"{folder}: is not a run folder; must hold {CONFIG}")
        return cls(folder, ExperimentConfig.load(folder / CONFIG, announce=announce), *read_results(folder))

    @cached_property
    def variants(self) -> list[str]:
        """Names of the variants, the dense model first."""
        return list(self.config.variants)

    @cached_property
    def quality(self) -> list[QualityRow]:
        """How well text is predicted, by model, length and variant."""
        return summarize_quality(self.records, self.variants, self.config.seed)

    @cached_property
    def tasks(self) -> list[TaskRow]:
        """Scores of the generated tasks, by model, task, length and variant."""
        return summarize_tasks(self.records, self.variants, self.config.seed)

    @cached_property
    def speed(self) -> list[SpeedRow]:
        """Times, by model, measure, length and variant."""
        return summarize_speed(self.records, self.variants)

    @cached_property
    def harness(self) -> list[HarnessScore]:
        """Scores of lm-evaluation-harness."""
        return [r for r in self.records if isinstance(r, HarnessScore)]

    @cached_property
    def continuations(self) -> dict[tuple[str, str], str]:
        """How the prompt goes on, by model and variant."""
        return {(r.model, r.variant): r.text for r in self.records if isinstance(r, Continuation)}

    @cached_property
    def failures(self) -> list[Failure]:
        """Cells that could not be measured."""
        return [r for r in self.records if isinstance(r, Failure)]

    def tables(self) -> list[Table]:
        """Return the tables that sum the run up; those without rows are left out."""
        tables = [
            *quality_table(self.quality),
            *task_table(self.tasks, self.variants, self.config.tasks.threshold if self.config.tasks else 1.0),
            *harness_table(self.harness, self.variants),
            *speed_table(self.speed),
        ]
        return [table for table in tables if table.rows]

    def __str__(self) -> str:
        """Return the tables as plain text."""
        return "\n\n".join([*map(text_table, self.tables()), *(f"failed: {f.what}: {f.error}" for f in self.failures)])

    def _repr_html_(self) -> str:
        return "\n".join(map(html_table, self.tables()))
