"""Tables of results: built once, shown on a terminal, in Markdown and in HTML."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import rich.table
from rich import box
from rich.console import Console, Group
from rich.markup import escape

from .config import DENSE
from .quality import Estimate, QualityRow, TaskRow, effective_length, mapped
from .records import HarnessScore, LayerShare, ordered
from .speed import SpeedRow

QUALITY_COLUMNS = ("variant", "perplexity", "change, %", "KL", "top-1", "mass kept", "sparsity", "seconds")
QUALITY_NOTES = {
    "perplexity": "exponential of the mean cross-entropy of the next token, within each window; every token of a "
    "window is predicted but its first",
    "change": "of the perplexity, against the dense model on the same windows. In brackets, here and elsewhere: 95 % "
    "confidence intervals from a percentile bootstrap over windows, paired with the dense model's (Efron and "
    "Tibshirani 1993). Windows of one document are not independent, so with few documents the intervals are too narrow",
    "KL": "divergence of the variant's next-token distribution from the dense model's, KL(dense || variant), in nats "
    "a token",
    "top-1": "share of positions where the variant's most likely next token is the dense model's",
    "mass kept": "share of the dense attention that lies on the kept keys, mean over queries, heads and sparse layers",
    "sparsity": "share of the visible attention scores that are dropped, over all sparse layers",
    "seconds": "median duration of a forward pass over a window, without the measurement of the attention",
}
SPEED_NOTES = {
    "dense": "the model with PyTorch's own attention (SDPA); dense (modelopt-lite) is the same on this package's "
    "kernels",
    "time": "median of measurements that the contenders take in turns, with their quartiles in brackets",
    "kernel": "one causal attention call of one layer over random tensors",
    "prefill": "a forward pass over the prompt, up to the logits of its last token: the time to first token without "
    "tokenizing",
    "decode": "one more token, with the prompt in the cache",
    "memory": "most GPU memory allocated meanwhile, weights included",
}


@dataclass(frozen=True)
class Table:
    """A table for people.

    Attributes:
        title: stands above it.
        columns: heads; the first column is aligned left, the others right.
        rows: cells.
        notes: what the columns mean.
        folded: whether a report shows the title only, until it is opened.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: dict[str, str] = field(default_factory=dict)
    folded: bool = False


def quality_table(rows: Sequence[QualityRow]) -> list[Table]:
    """Return a table for each model and length."""
    tables = []
    for model, length in dict.fromkeys((row.model, row.length) for row in rows):
        mine = [row for row in rows if (row.model, row.length) == (model, length)]
        cells = []
        for row in mine:
            dense = row.variant == DENSE
            cells.append(
                (
                    row.variant,
                    f"{row.perplexity.value:.2f}",
                    "" if dense else interval(row.change_percent, "+.2f"),
                    "0" if dense else f"{row.divergence.value:.4f}",
                    "" if dense else percent(row.agreement.value),
                    percent(row.mass_kept),
                    percent(row.sparsity),
                    f"{row.seconds:.3g}",
                )
            )
        windows = f"{mine[0].windows} window{'s' if mine[0].windows > 1 else ''} of {length} tokens"
        tables.append(Table(f"{short(model)}: {windows}", QUALITY_COLUMNS, cells, QUALITY_NOTES))
    return tables


def task_table(rows: Sequence[TaskRow], variants: Sequence[str], threshold: float) -> list[Table]:
    """Return, for each model, a table of variants by length as RULER has it, and one of each task."""
    tables = []
    for model in dict.fromkeys(row.model for row in rows):
        mine = {(row.variant, row.task, row.length): row for row in rows if row.model == model}
        lengths = sorted({length for _, _, length in mine})
        tasks = list(dict.fromkeys(task for _, task, _ in mine))
        names = ordered([variant for variant, _, _ in mine], variants)
        found = {variant: _mean_scores(mine, variant, lengths) for variant in names}
        complete = len(mine) == len(names) * len({(task, length) for _, task, length in mine})
        lacking = "" if complete else "; where a variant lacks a task, the mean of all is over the others"
        cells = []
        for variant, means in found.items():
            longest = effective_length(means, threshold)
            average = percent(math.fsum(means.values()) / len(means) if len(means) == len(lengths) else None)
            cells.append((variant, *(percent(means.get(x)) for x in lengths), str(longest or "none"), average))
        notes = {
            "score": f"mean over the tasks {', '.join(tasks)}, {_samples(rows)}{lacking}",
            "effective": f"largest length up to which the mean score is at least {threshold:.1%} "
            "(RULER, https://arxiv.org/abs/2404.06654)",
        }
        columns = ("variant", *map(str, lengths), "effective", "average")
        tables.append(Table(f"{short(model)}: task scores by length", columns, cells, notes))
        by_task = [
            (
                f"{task}, {variant}",
                *(_task_cell(mine.get((variant, task, length)), variant == DENSE) for length in lengths),
            )
            for task in tasks
            for variant in names
        ]
        notes = {"score": "with the change against the dense model on the same samples and its 95 % interval (paired)"}
        columns = ("task, variant", *map(str, lengths))
        tables.append(Table(f"{short(model)}: each task", columns, by_task, notes, folded=True))
    return tables


def _mean_scores(
    rows: Mapping[tuple[str, str, int], TaskRow], variant: str, lengths: Sequence[int]
) -> dict[int, float]:
    """Return a variant's mean scores by length, over the tasks that all variants with scores at that length share."""
    means = {}
    for length in lengths:
        done: dict[str, set[str]] = {}
        for name, task, where in rows:
            if where == length:
                done.setdefault(name, set()).add(task)
        if variant in done and (shared := set.intersection(*done.values())):
            means[length] = math.fsum(rows[variant, task, length].score.value for task in shared) / len(shared)
    return means


def _samples(rows: Sequence[TaskRow]) -> str:
    counts = sorted({row.samples for row in rows})
    return f"{'-'.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} samples of each"


def _task_cell(row: TaskRow | None, dense: bool) -> str:
    if row is None:
        return "-"
    if dense:
        return percent(row.score.value)
    return f"{percent(row.score.value)}  {interval(mapped(row.change, lambda x: 100 * x), '+.1f')}"


def harness_table(scores: Sequence[HarnessScore], variants: Sequence[str]) -> list[Table]:
    """Return, for each model, a table of variants by task and metric."""
    tables = []
    for model in dict.fromkeys(score.model for score in scores):
        mine = {(s.variant, s.task, s.metric): s for s in scores if s.model == model}
        heads = list(dict.fromkeys((task, metric) for _, task, metric in mine))
        cells = []
        for task, metric in heads:
            row = [f"{task}, {metric.removesuffix(',none')}"]
            for variant in (names := ordered([variant for variant, _, _ in mine], variants)):
                s = mine.get((variant, task, metric))
                row.append("-" if s is None else f"{s.value:.4g}{'' if not s.stderr else f' ± {s.stderr:.2g}'}")
            cells.append(row)
        notes = {"±": "the harness' own standard error"}
        tables.append(Table(f"{short(model)}: lm-evaluation-harness", ("task, metric", *names), cells, notes))
    return tables


def speed_table(rows: Sequence[SpeedRow]) -> list[Table]:
    """Return a table for each model and measure: contenders by length."""
    tables = []
    for model, measure in dict.fromkeys((row.model, row.measure) for row in rows):
        mine = [row for row in rows if (row.model, row.measure) == (model, measure)]
        lengths = sorted({row.length for row in mine})
        found = {(row.variant, row.length): row for row in mine}
        cells = []
        for variant in dict.fromkeys(row.variant for row in mine):
            cells.append((variant, *(_speed_cell(found.get((variant, length))) for length in lengths)))
        notes = {key: note for key, note in SPEED_NOTES.items() if key in ("dense", "time", measure, "memory")}
        if all(row.peak_bytes is None for row in mine):
            notes.pop("memory", None)
        tables.append(Table(f"{short(model)}: {measure} time by length", ("variant", *map(str, lengths)), cells, notes))
    return tables


def _speed_cell(row: SpeedRow | None) -> str:
    if row is None:
        return "-"
    speedup = "" if row.speedup is None or row.variant == DENSE else f"  {row.speedup:.2f}x"
    memory = "" if row.peak_bytes is None else f"  {row.peak_bytes / 2**30:.1f} GiB"
    unit, factor = _unit(row.median)
    quartiles = "" if row.repeats < 2 else f" [{row.low * factor:.3g}, {row.high * factor:.3g}]"
    return f"{row.median * factor:.3g}{quartiles} {unit}{speedup}{memory}"


def _unit(seconds: float) -> tuple[str, float]:
    return ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)


def layer_table(title: str, layers: Sequence[LayerShare]) -> Table:
    """Return a folded table of what each layer of a variant did."""
    matched = sum(layer.method is not None for layer in layers)
    active = sum(layer.active is True for layer in layers)
    rows = []
    for layer in layers:
        method = "-" if layer.method is None else layer.method + ("" if layer.enabled else " (off)")
        reached = {None: "-", True: "yes", False: "no"}[layer.active]
        rows.append((layer.name, layer.class_name, method, reached, percent(layer.mass_kept), percent(layer.sparsity)))
    columns = ("layer", "class", "matched", "active", "mass kept", "sparsity")
    summary = f"{title}: {matched} of {len(layers)} layers matched, {active} active"
    return Table(summary, columns, rows, folded=True)


def percent(share: float | None) -> str:
    """Return a share as a percentage."""
    return "-" if share is None else f"{100 * share:.1f} %"


def interval(estimate: Estimate, form: str) -> str:
    """Return an estimate with its interval, each number in a format."""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:{form}}"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def short(model: str) -> str:
    """Return a model's name without the folders it lies in."""
    return model.rstrip("/").rpartition("/")[2] if model.startswith("/") or ":" in model else model


def rich_table(table: Table) -> Group:
    """Return a table with its title, for a terminal."""
    shown = rich.table.Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_header=any(table.columns))
    for i, column in enumerate(table.columns):
        # In a narrow terminal intervals wrap too, as otherwise the names alone would give way.
        wraps = i == 0 or not column or any("[" in row[i] for row in table.rows)
        shown.add_column(
            escape(column), justify="right" if i and column else "left", overflow="fold", no_wrap=not wraps
        )
    for row in table.rows:
        shown.add_row(*(escape(cell) for cell in row))
    return Group(f"[bold]{escape(table.title)}[/bold]", shown)


def text_table(table: Table) -> str:
    """Return a table as plain text of at most 100 columns."""
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(rich_table(table))
    return cast(io.StringIO, console.file).getvalue().rstrip()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table whose first column is left-aligned and whose others are right-aligned."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = (header, rule, *rows)
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in lines]


def html_table(table: Table) -> str:
    """Return a table as HTML with its title, and with its notes below."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = "\n".join(f"<tr>{''.join(f'<td>{_lines(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    body = f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'
    notes = "".join(f"<li><b>{html.escape(name)}</b>: {_links(note)}</li>" for name, note in table.notes.items())
    notes = f'<ul class="notes">{notes}</ul>' if notes else ""
    title = html.escape(table.title)
    if table.folded:
        return f"<details><summary>{title}</summary>{body}{notes}</details>"
    return f"<h3>{title}</h3>{body}{notes}"


def _lines(cell: str) -> str:
    """Return a cell's parts, which two spaces divide, below each other."""
    return "<br>".join(map(html.escape, cell.split("  ")))


def _links(text: str) -> str:
    words = html.escape(text).split(" ")
    return " ".join(
        f'<a href="{word.strip("(),;")}">{word}</a>' if word.strip("(),;").startswith("https://") else word
        for word in words
    )


def markdown_section(table: Table) -> list[str]:
    """Return a table as Markdown with its title, and with its notes below."""
    lines = [*markdown_table(table.columns, table.rows), ""]
    lines += [f"- **{name}**: {note}." for name, note in table.notes.items()]
    if table.folded:
        return ["", f"<details><summary>{html.escape(table.title)}</summary>", "", *lines, "", "</details>"]
    return ["", f"### {table.title}", "", *lines]
