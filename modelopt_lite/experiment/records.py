"""What a run has measured, as lines of JSON: written as it comes, read to go on, to report and to compare."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from ..errors import ConfigError

RESULTS = "results.jsonl"
SAMPLES = "samples.jsonl"
CONFIG = "config.yaml"


@dataclass(frozen=True)
class Session:
    """One process that measured; the records behind its line are its own.

    Attributes:
        date: when it began, ISO 8601 in UTC.
        device: name of the device.
        versions: of the packages, by name.
    """

    kind: ClassVar[str] = "session"
    date: str
    device: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Window:
    """One variant on one window of text.

    Attributes:
        model: the model, as the experiment names it.
        variant: name of the variant.
        text: the text source, as the experiment names it.
        document: name of the document in it.
        length: tokens of the window.
        window: the window's number in its source, from 0.
        tokens: how many tokens were predicted: all of the window but its first.
        cross_entropy: of the true next token, nats a token; perplexity is its exponential.
        divergence: KL(dense || variant) of the next-token distributions, nats a token.
        agreement: share of positions where the variant's most likely token is the dense model's, 0 to 1.
        seconds: duration of the forward pass, divided by the number of windows in its batch.
    """

    kind: ClassVar[str] = "window"
    model: str
    variant: str
    text: str
    document: str
    length: int
    window: int
    tokens: int
    cross_entropy: float
    divergence: float
    agreement: float
    seconds: float

    @property
    def cell(self) -> tuple[Any, ...]:
        """What was measured, apart from what was found."""
        return self.kind, self.model, self.variant, self.text, self.length, self.window


@dataclass(frozen=True)
class LayerShare:
    """What one attention layer kept.

    Attributes:
        name: dotted name.
        class_name: the model's own class.
        method: name of its method, or None if no pattern matched.
        enabled: whether the method is switched on.
        active: whether its forward reached this package's attention.
        mass_kept: mean share of the dense attention on kept keys, 0 to 1; None if nothing was counted.
        sparsity: share of its visible scores that were dropped, 0 to 1; None if nothing was counted.
        heads: ``mass_kept`` of each query head, where it was measured.
    """

    name: str
    class_name: str
    method: str | None
    enabled: bool
    active: bool | None
    mass_kept: float | None
    sparsity: float | None
    heads: list[float] | None = None


@dataclass(frozen=True)
class Attention:
    """What a variant's attention kept of one window.

    Attributes:
        model, variant, text, length, window: as in :class:`Window`.
        mass_kept: share of the dense attention mass on kept keys, mean over queries, heads and sparse layers.
        sparsity: share of the visible scores that were dropped, over all sparse layers.
        layers: the same for each layer.
        pattern: which keys the queries of one head keep, one string of ``.`` (not visible), ``-`` (dropped) and ``#``
            (kept) for each query; None if not recorded.
        pattern_of: name of the layer and number of the head of ``pattern``.
    """

    kind: ClassVar[str] = "attention"
    model: str
    variant: str
    text: str
    length: int
    window: int
    mass_kept: float
    sparsity: float
    layers: list[LayerShare]
    pattern: list[str] | None = None
    pattern_of: str | None = None

    @property
    def cell(self) -> tuple[Any, ...]:
        """What was measured, apart from what was found."""
        return self.kind, self.model, self.variant, self.text, self.length, self.window


@dataclass(frozen=True)
class Answer:
    """A variant's answer to one sample of a task.

    Attributes:
        model, variant: as in :class:`Window`.
        task: name of the task.
        length: upper bound of the tokens of prompt and answer.
        depth: where the needle was, 0 to 1; None if the task has no depth.
        index: number of the sample.
        tokens: length of the prompt.
        score: 0 to 1.
        output: what the model wrote.
    """

    kind: ClassVar[str] = "answer"
    model: str
    variant: str
    task: str
    length: int
    depth: float | None
    index: int
    tokens: int
    score: float
    output: str

    @property
    def cell(self) -> tuple[Any, ...]:
        """What was measured, apart from what was found."""
        return self.kind, self.model, self.variant, self.task, self.length, self.depth, self.index


@dataclass(frozen=True)
class HarnessScore:
    """What lm-evaluation-harness found for one metric of one task.

    Attributes:
        model, variant: as in :class:`Window`.
        task: name of the task.
        metric: name of the metric and its filter, such as ``acc,none``.
        value: the metric.
        stderr: its standard error; None where the harness gives none.
        samples: how many documents were used.
        higher_is_better: whether more is better; None if the harness does not say.
    """

    kind: ClassVar[str] = "lm_eval"
    model: str
    variant: str
    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int
    higher_is_better: bool | None = None

    @property
    def cell(self) -> tuple[Any, ...]:
        """What was measured, apart from what was found."""
        return self.kind, self.model, self.variant, self.task, self.metric


@dataclass(frozen=True)
class Speed:
    """How long something takes.

    Attributes:
        model, variant: as in :class:`Window`; the variant may also be the dense model on this package's kernels.
        measure: ``kernel`` (one attention call of one layer), ``prefill`` (time to first token), ``decode`` (a token).
        length: tokens of the prompt, or keys in the cache.
        seconds: every measurement, in the order of the turns.
        peak_bytes: most GPU memory that was allocated meanwhile; None on a CPU.
    """

    kind: ClassVar[str] = "speed"
    model: str
    variant: str
    measure: str
    length: int
    seconds: list[float]
    peak_bytes: int | None

    @property
    def cell(self) -> tuple[Any, ...]:
        """What was measured, apart from what was found."""
        return self.kind, self.model, self.variant, self.measure, self.length


@dataclass(frozen=True)
class Continuation:
    """How a variant continues the prompt.

    Attributes:
        model, variant: as in :class:`Window`.
        text: what it adds.
        seconds: how long that took.
    """

    kind: ClassVar[str] = "continuation"
    model: str
    variant: str
    text: str
    seconds: float

    @property
    def cell(self) -> tuple[Any, ...]:
        """What was measured, apart from what was found."""
        return self.kind, self.model, self.variant


@dataclass(frozen=True)
class Failure:
    """A cell that could not be measured; it is tried again when the run goes on.

    Attributes:
        model, variant: as in :class:`Window`.
        what: the cell in words.
        failed: the cell.
        error: type and message.
    """

    kind: ClassVar[str] = "failure"
    model: str
    variant: str
    what: str
    failed: list[Any]
    error: str

    @property
    def cell(self) -> tuple[Any, ...]:
        """What was measured, apart from what was found."""
        return tuple(self.failed)


Record: TypeAlias = Window | Attention | Answer | HarnessScore | Speed | Continuation | Failure
_KINDS: dict[str, Any] = {
    cls.kind: cls for cls in (Session, Window, Attention, Answer, HarnessScore, Speed, Continuation, Failure)
}


class RunFile:
    """The results of one process of a run: a file of JSON lines that only grows.

    Args:
        path: the file; it is made if it is not there, and a last line that was cut off by a kill is removed.
    """

    def __init__(self, path: Path) -> None:
        if path.exists():
            content = path.read_bytes()
            if not content.endswith(b"\n"):
                path.write_bytes(content[: content.rfind(b"\n") + 1])
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record | Session) -> None:
        """Add a record; it is in the file when this returns."""
        self._file.write(json.dumps({"kind": record.kind, **dataclasses.asdict(record)}, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def results_file(folder: Path, share: int | None = None) -> Path:
    """Return the results file of a run, or that of one of several processes."""
    return folder / (RESULTS if share is None else f"results-{share}.jsonl")


def read_results(folder: Path) -> tuple[list[Session], list[Record]]:
    """Return what a run's processes wrote: sessions, and records of which the last of a cell counts.

    A failure that a later measurement made good is left out.

    Raises:
        ConfigError: if a line cannot be read; names it.
    """
    sessions: list[Session] = []
    records: dict[tuple[Any, ...], Record] = {}
    files = [path for path in folder.glob("results*.jsonl") if re.fullmatch(r"results(-\d+)?\.jsonl", path.name)]
    for path in sorted(files):
        for record in _read(path):
            if isinstance(record, Session):
                sessions.append(record)
            elif not isinstance(record, Failure) or record.cell not in records:
                records[record.cell] = record
    return sessions, list(records.values())


def _read(path: Path) -> Iterator[Record | Session]:
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], 1):  # behind the last line break is nothing, or a line that was cut off
        try:
            content = json.loads(line)
            cls = _KINDS[content.pop("kind")]
            if cls is Attention:
                content["layers"] = [LayerShare(**layer) for layer in content["layers"]]
            yield cls(**content)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}: line {number} is not a result: {type(error).__name__}: {error}") from None


def ordered(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return distinct names in the order of ``known``, and behind them those that are not in it."""
    distinct = dict.fromkeys(names)
    first = [name for name in dict.fromkeys(known) if name in distinct]
    return [*first, *(name for name in distinct if name not in known)]
