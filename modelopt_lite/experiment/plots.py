"""Pictures of results: they hold with two rows and with forty, and colour-blind readers can tell them apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from .config import DENSE, OURS
from .quality import Estimate, QualityRow, TaskRow
from .records import Answer, Attention, Record, ordered
from .speed import SpeedRow

# The palette of Okabe and Ito, which people with any colour vision can tell apart (https://jfly.uni-koeln.de/color/).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
GREY = "#7a7a7a"
STYLES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX<>*"
HEAT = "cividis"
COLUMNS = 4  # of small pictures side by side; 6 of many
PATTERNS = 8  # pictures of patterns, which show little more in greater numbers
LABELLED = 12  # points of a scatter plot that get their names
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "svg.hashsalt": "modelopt-lite",
    "font.family": "DejaVu Sans",
}


@dataclass(frozen=True)
class Plot:
    """A picture with what stands below it.

    Attributes:
        name: of its file, without a suffix.
        figure: the picture.
        caption: what it shows, as a sentence.
    """

    name: str
    figure: Figure
    caption: str


def _figure(width: float, height: float) -> Figure:
    with mpl.rc_context(STYLE):
        return Figure(figsize=(width, height), layout="constrained")


def _tidy(*axes: Axes) -> None:
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        panel.set_axisbelow(True)


def _errors(estimates: Sequence[Estimate]) -> list[list[float]] | None:
    """Return how far intervals reach below and above their values, None if there are none."""
    if any(e.low is None or e.high is None for e in estimates):
        return None
    return [
        [max(0.0, e.value - cast(float, e.low)) for e in estimates],
        [max(0.0, cast(float, e.high) - e.value) for e in estimates],
    ]


def draw_quality(rows: Sequence[QualityRow]) -> Figure:
    """Draw what each variant costs and what it leaves out, one row a variant.

    Args:
        rows: of one model and length.
    """
    rows = [row for row in rows if row.variant != DENSE] or list(rows)
    is_measured = any(row.sparsity is not None for row in rows)
    figure = _figure(11, 1.5 + 0.32 * len(rows))
    with mpl.rc_context(STYLE):
        change, divergence, *others = figure.subplots(1, 3 if is_measured else 2, sharey=True)
        places = list(range(len(rows)))
        for axes, estimates, title in (
            (change, [row.change_percent for row in rows], "perplexity against dense, %"),
            (divergence, [row.divergence for row in rows], "KL to dense, nats a token"),
        ):
            values = [estimate.value for estimate in estimates]
            axes.errorbar(values, places, xerr=_errors(estimates), fmt="o", color=COLORS[0], capsize=3, markersize=5)
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_title(title)
            _spread(axes, values)
        for share in others:
            _draw_what_is_left_out(share, rows)
        change.set_yticks(places, [row.variant for row in rows])
        change.set_ylim(len(rows) - 0.4, -0.6)
        _tidy(change, divergence, *others)
    return figure


def _draw_what_is_left_out(axes: Axes, rows: Sequence[QualityRow]) -> None:
    """Draw the shares of scores and of attention mass that variants leave out, where they were measured."""
    dropped = [math.nan if row.sparsity is None else 100 * row.sparsity for row in rows]
    lost = [math.nan if row.mass_kept is None else 100 * (1 - row.mass_kept) for row in rows]
    for offset, color, label, values in ((-0.19, GREY, "scores", dropped), (0.19, COLORS[1], "attention mass", lost)):
        bars = axes.barh([i + offset for i in range(len(rows))], values, height=0.36, color=color, label=label)
        axes.bar_label(bars, ["" if math.isnan(x) else f"{x:.1f}" for x in values], padding=3, fontsize=8)
    axes.set_title("left out, %")
    axes.margins(x=0.18)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _spread(axes: Axes, values: Sequence[float]) -> None:
    """Make an axis logarithmic around 0 where values lie far apart."""
    sizes = sorted(abs(x) for x in values if x)
    if sizes and sizes[-1] > 200 * sizes[len(sizes) // 2]:
        axes.set_xscale("symlog", linthresh=sizes[len(sizes) // 2])


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return which points no other beats, in order of the first coordinate.

    Args:
        points: of the first coordinate more is better, of the second less.
    """
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], points[i][1]))
    front: list[int] = []
    for i in order:
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front[::-1]


def draw_trade(rows: Sequence[QualityRow], gains: Sequence[float], label: str) -> Figure:
    """Draw what is gained against what it costs, with the variants that none beats joined by a line.

    Args:
        rows: of one model and length.
        gains: of each row, on the horizontal axis; more is better.
        label: of that axis.
    """
    fronts = [
        pareto_front([(gain, cost(row).value) for gain, row in zip(gains, rows, strict=True)])
        for cost in _COSTS.values()
    ]
    named = sorted(set().union(*fronts) if len(rows) > LABELLED else range(len(rows)), key=lambda i: gains[i])
    numbers = {i: str(number) for number, i in enumerate(named, 1)}
    figure = _figure(11, max(4.2, 0.2 * len(named) + 0.8))
    with mpl.rc_context(STYLE):
        panels = figure.subplots(1, 2)
        for axes, front, (title, cost) in zip(panels, fronts, _COSTS.items(), strict=True):
            estimates = [cost(row) for row in rows]
            costs = [estimate.value for estimate in estimates]
            axes.errorbar(gains, costs, yerr=_errors(estimates), fmt="none", ecolor=GREY, alpha=0.5, capsize=2)
            others = [i for i in range(len(rows)) if i not in front]
            axes.scatter([gains[i] for i in others], [costs[i] for i in others], color=GREY, s=22, label="others")
            axes.plot([gains[i] for i in front], [costs[i] for i in front], "o-", color=COLORS[0], label="Pareto front")
            for place, i in enumerate(named):
                offset = (5, -11) if place % 2 == 0 else (-5, 5)
                side = "left" if place % 2 == 0 else "right"
                axes.annotate(numbers[i], (gains[i], costs[i]), offset, textcoords="offset points", ha=side, fontsize=8)
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set_xlabel(label)
            axes.set_title(title)
            axes.margins(x=0.08, y=0.12)
            _tidy(axes)
        handles, labels = panels[0].get_legend_handles_labels()
        empty = Line2D([], [], linestyle="none")
        handles, labels = handles[::-1], labels[::-1]
        handles += [empty] * len(named)
        labels += [f"{numbers[i]}  {rows[i].variant}" for i in named]
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    return figure


_COSTS: dict[str, Callable[[QualityRow], Estimate]] = {
    "perplexity against dense, %": lambda row: row.change_percent,
    "KL to dense, nats a token": lambda row: row.divergence,
}


def line_styles() -> Iterator[dict[str, Any]]:
    """Yield ways to draw lines that differ from each other: 28 of them, then again."""
    marks = itertools.cycle(MARKERS)
    return (
        {"color": color, "linestyle": style, "marker": next(marks), "markersize": 4.5}
        for style, color in itertools.cycle(itertools.product(STYLES, COLORS))
    )


def draw_speed(rows: Sequence[SpeedRow]) -> Figure:
    """Draw times against lengths, a panel for each measure: medians, with their quartiles as bands.

    Args:
        rows: of one model.
    """
    measures = list(dict.fromkeys(row.measure for row in rows))
    names = ordered([row.variant for row in rows], [DENSE, OURS])
    styles = dict(zip(names, line_styles(), strict=False))
    figure = _figure(11, max(3.6, 0.22 * len(names) + 0.6))
    with mpl.rc_context(STYLE):
        panels = figure.subplots(1, len(measures), squeeze=False)[0]
        for axes, measure in zip(panels, measures, strict=True):
            for name in names:
                mine = [row for row in rows if (row.measure, row.variant) == (measure, name)]
                lengths = [row.length for row in mine]
                axes.plot(lengths, [row.median for row in mine], label=name, **styles[name])
                axes.fill_between(
                    lengths,
                    [row.low for row in mine],
                    [row.high for row in mine],
                    color=styles[name]["color"],
                    alpha=0.15,
                )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            lengths = sorted({row.length for row in rows if row.measure == measure})
            axes.set_xticks(lengths, [f"{x // 1024}k" if x % 1024 == 0 else str(x) for x in lengths])
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(FuncFormatter(_seconds))
            axes.yaxis.set_minor_formatter(FuncFormatter(_seconds) if _narrow(axes) else NullFormatter())
            axes.set_title(
                {"kernel": "one attention call", "prefill": "time to first token"}.get(measure, "one more token")
            )
            axes.set_xlabel("tokens")
            _tidy(axes)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _narrow(axes: Axes) -> bool:
    low, high = axes.get_ylim()
    return high < 8 * low


def _seconds(value: float, _: int) -> str:
    unit, factor = ("s", 1.0) if value >= 1 else ("ms", 1e3) if value >= 1e-3 else ("us", 1e6)
    return f"{value * factor:.3g} {unit}"


def draw_tasks(rows: Sequence[TaskRow], variants: Sequence[str]) -> Figure:
    """Draw scores against lengths, a panel for each task.

    Args:
        rows: of one model.
        variants: in the order of the legend.
    """
    tasks = list(dict.fromkeys(row.task for row in rows))
    names = ordered([row.variant for row in rows], variants)
    styles = dict(zip(names, line_styles(), strict=False))
    lines = math.ceil(len(tasks) / COLUMNS)
    figure = _figure(11, max(0.4 + 2.1 * lines, 0.22 * len(names) + 0.6))
    with mpl.rc_context(STYLE):
        panels = figure.subplots(lines, min(len(tasks), COLUMNS), squeeze=False, sharey=True).flat
        for axes in panels[len(tasks) :]:
            axes.set_visible(False)
        for axes, task in zip(panels, tasks, strict=False):
            lengths = sorted({row.length for row in rows if row.task == task})
            for name in names:
                mine = sorted((r.length, r.score.value) for r in rows if (r.task, r.variant) == (task, name))
                axes.plot([lengths.index(x) for x, _ in mine], [100 * y for _, y in mine], label=name, **styles[name])
            axes.set_xticks(range(len(lengths)), [f"{x // 1024}k" if x % 1024 == 0 else str(x) for x in lengths])
            axes.set_ylim(-5, 105)
            axes.set_title(task)
            _tidy(axes)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
        figure.supylabel("score, %", fontsize=10)
    return figure


def draw_needles(records: Sequence[Record], model: str, task: str, variants: Sequence[str]) -> Figure | None:
    """Draw how often a needle is found, by length and depth, a picture for each variant; None without answers."""
    answers = [r for r in records if isinstance(r, Answer) and (r.model, r.task) == (model, task)]
    if not answers:
        return None
    lengths = sorted({r.length for r in answers})
    depths = sorted({r.depth for r in answers if r.depth is not None})
    pictures = []
    for name in ordered([r.variant for r in answers], variants):
        grid = [[math.nan] * len(lengths) for _ in depths]
        for (i, depth), (j, length) in itertools.product(enumerate(depths), enumerate(lengths)):
            found = [r.score for r in answers if (r.variant, r.depth, r.length) == (name, depth, length)]
            if found:
                grid[i][j] = 100 * sum(found) / len(found)
        pictures.append((name, grid))
    figure, panels = _pictures(len(pictures), 0.9 + 0.3 * len(depths))
    with mpl.rc_context(STYLE):
        for axes, (name, grid) in zip(panels, pictures, strict=False):
            image = axes.imshow(grid, cmap=HEAT, vmin=0, vmax=100, aspect="auto")
            for i, j in itertools.product(range(len(depths)), range(len(lengths))):
                if not math.isnan(grid[i][j]):
                    color = "white" if grid[i][j] < 60 else "black"
                    axes.text(j, i, f"{grid[i][j]:.0f}", ha="center", va="center", color=color, fontsize=8)
            axes.set_title(name, fontsize=9)
            axes.set_xticks(range(len(lengths)), [f"{x // 1024}k" if x % 1024 == 0 else str(x) for x in lengths])
            axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        figure.supxlabel("length in tokens", fontsize=9)
        figure.supylabel("depth of the needle", fontsize=9)
        figure.colorbar(image, ax=list(panels), label="found, %", shrink=_bar_share(panels), anchor=(0, 1))
    return figure


def _pictures(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with room for pictures of one height, and their axes."""
    most, width = (COLUMNS, 2.9) if count <= 3 * COLUMNS else (6, 1.9)
    lines, columns = math.ceil(count / most), min(count, most)
    figure = _figure(width * columns + 1.0, height * lines + 0.4)
    with mpl.rc_context(STYLE):
        panels = list(figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def _bar_share(panels: Sequence[Axes]) -> float:
    """Return how much of a figure's height a bar of colors takes that is as high as two pictures at most."""
    lines = len({axes.get_subplotspec().rowspan.start for axes in panels})  # type: ignore[union-attr]
    return min(0.9, 1.8 / lines)


def draw_heads(measured: Sequence[Attention]) -> Figure | None:
    """Draw the attention mass that each head of each layer keeps, a picture for each variant; None without heads."""
    pictures = []
    for found in measured:
        grid = [layer.heads for layer in found.layers if layer.heads is not None]
        if grid:
            widest = max(map(len, grid))
            pictures.append(
                (found.variant, [[100 * x for x in row] + [math.nan] * (widest - len(row)) for row in grid])
            )
    if not pictures:
        return None
    lowest = min(x for _, grid in pictures for row in grid for x in row if not math.isnan(x))
    figure, panels = _pictures(len(pictures), 1.0 + min(3.2, 0.12 * len(pictures[0][1])))
    with mpl.rc_context(STYLE):
        for axes, (name, grid) in zip(panels, pictures, strict=True):
            image = axes.imshow(grid, cmap=HEAT, vmin=min(lowest, 99), vmax=100, aspect="auto", interpolation="nearest")
            axes.set_title(name, fontsize=9)
        figure.supxlabel("head", fontsize=9)
        figure.supylabel("layer", fontsize=9)
        figure.colorbar(image, ax=panels, label="mass kept, %", shrink=_bar_share(panels), anchor=(0, 1))
    return figure


def draw_patterns(measured: Sequence[Attention]) -> Figure | None:
    """Draw which keys the queries of one head keep, a picture for each variant; None if none was recorded."""
    pictures = [(found.variant, found.pattern) for found in measured if found.pattern is not None][:PATTERNS]
    if not pictures:
        return None
    figure, panels = _pictures(len(pictures), 2.9)
    colors = ListedColormap(["white", "#d9d9d9", COLORS[0]])
    with mpl.rc_context(STYLE):
        for axes, (name, rows) in zip(panels, pictures, strict=True):
            size = len(rows)
            kept = torch.tensor([[int(row, 16) >> j & 1 for j in range(size)] for row in rows])
            visible = torch.ones(size, size, dtype=torch.long).tril()
            axes.imshow((visible + kept).tolist(), cmap=colors, vmin=0, vmax=2, interpolation="nearest")
            axes.set_title(name, fontsize=9)
        figure.supxlabel("key", fontsize=9)
        figure.supylabel("query", fontsize=9)
    return figure
