"""What is left of an experiment for people to read: a Markdown report and a picture."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..conversion import Summary
from .config import ExperimentConfig
from .quality import VariantResult

COLORS = ("#0072b2", "#8c8c8c", "#d55e00")  # the colour-blind can tell them apart too
COLUMNS = ("variant", "perplexity", "change", "KL", "mass kept", "sparsity", "seconds")
COLUMN_NOTES = {
    "perplexity": "exponential of the mean cross-entropy of the next token, within each window; "
    "every token of a window is predicted but its first",
    "change": "of the perplexity, against the dense model on the same windows",
    "KL": "divergence of the variant's next-token distribution from the dense model's, KL(dense || variant), "
    "in nats a token",
    "mass kept": "share of the dense attention that lies on the kept keys, mean over queries, heads and sparse layers",
    "sparsity": "share of the visible attention scores that are dropped, over all sparse layers",
    "seconds": "duration of a forward pass over the first window, timed by itself, without the statistics",
}

LAYER_COLUMNS = ("layer", "class", "matched", "active", "mass kept", "sparsity")
LAYER_NOTE = (
    "*Matched* names the method of the pattern that fits the layer. *Active* says whether the layer's forward reached "
    "the sparse attention. The shares are those of the layer alone, over all windows."
)


def table_row(result: VariantResult) -> tuple[str, ...]:
    """Return a result as the cells under :data:`COLUMNS`."""
    return (
        result.variant,
        f"{result.perplexity:.2f}",
        f"{result.change_percent:+.2f} %",
        f"{result.divergence:.4f}",
        f"{100 * result.mass_kept:.1f} %",
        f"{100 * result.sparsity:.1f} %",
        f"{result.seconds:.1f}",
    )


def write_report(
    folder: Path,
    config: ExperimentConfig,
    results: Sequence[VariantResult],
    layers: Mapping[str, Summary],
    continuations: Mapping[str, str],
    environment: Mapping[str, Any],
) -> None:
    """Write ``report.md`` and its picture ``quality.png`` into a run folder.

    Args:
        folder: an existing folder that holds the run's config.yaml.
        config: what was run.
        results: one a variant, the dense model first.
        layers: what each attention layer did, by variant, with its statistics.
        continuations: the prompt's continuation by variant; empty without a prompt.
        environment: date, device and versions.
    """
    draw_quality(results, config.model).savefig(folder / "quality.png", dpi=150)
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    windows = f"windows of {config.window_length} tokens, {config.windows_per_text} from the start of each"
    lines = [
        f"# Sparse attention quality: {config.model}",
        "",
        f"- Model: `{config.model}`, {config.dtype}, on {environment['device']}",
        f"- Text: {', '.join(f'`{name}`' for name in config.text)}; {windows}",
        f"- Date: {environment['date']}",
        f"- Versions: {versions}",
        "- To repeat it: `modelopt-lite run config.yaml`; every single window, and every layer, is in `results.jsonl`",
        "",
        *markdown_table(COLUMNS, [table_row(result) for result in results]),
        "",
        *(f"- **{column}**: {note}." for column, note in COLUMN_NOTES.items()),
        "",
        "![Perplexity, divergence and sparsity of each variant](quality.png)",
        *layer_tables(layers),
    ]
    if config.prompt is not None:
        lines += ["", "## The same prompt, continued greedily", "", *_quote(config.prompt)]
        for variant, text in continuations.items():
            lines += ["", f"**{variant}**", "", *_quote(text)]
    (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def layer_tables(layers: Mapping[str, Summary]) -> list[str]:
    """Return a section with a table of the layers for each variant, folded up as models have many."""
    lines = ["", "## Layers", "", LAYER_NOTE] if layers else []
    for variant, summary in layers.items():
        matched = sum(layer.method is not None for layer in summary)
        active = sum(layer.active is True for layer in summary)
        counts = f"{matched} of {len(summary)} layers matched, {active} active"
        lines += ["", f"<details><summary>{html.escape(variant)}: {counts}</summary>", ""]
        rows = []
        for layer in summary:
            shares = ("-" if x is None else f"{100 * x:.1f} %" for x in (layer.mass_kept, layer.sparsity))
            method = "-" if layer.method is None else layer.method + ("" if layer.enabled else " (off)")
            active_or_not = {None: "-", True: "yes", False: "no"}[layer.active]
            rows.append((layer.name, layer.class_name, method, active_or_not, *shares))
        lines += [*markdown_table(LAYER_COLUMNS, rows), "", "</details>"]
    return lines


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table whose first column is left-aligned and whose others are right-aligned."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def _quote(text: str) -> list[str]:
    """Return text as a fenced block, in which a model's output cannot be taken for Markdown."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [f"{fence}text", *text.strip("\n").split("\n"), fence]


def draw_quality(results: Sequence[VariantResult], title: str) -> Figure:
    """Draw what each variant costs in quality and what it leaves out, one row a variant.

    Args:
        results: one a variant, the dense model first.
        title: stands above the picture.
    """
    figure = Figure(figsize=(12, 1.7 + 0.5 * len(results)), layout="constrained")
    figure.suptitle(title, fontweight="bold")
    change, divergence, share = figure.subplots(1, 3, sharey=True)
    rows = range(len(results))

    bars = change.barh(rows, [r.change_percent for r in results], color=COLORS[0])
    change.bar_label(bars, [f"{r.perplexity:.2f} ({r.change_percent:+.2f} %)" for r in results], padding=4)
    change.set_title("Perplexity")
    change.set_xlabel("change against dense (%)")

    bars = divergence.barh(rows, [r.divergence for r in results], color=COLORS[0])
    divergence.bar_label(bars, [f"{r.divergence:.4f}" for r in results], padding=4)
    divergence.set_title("KL divergence from the dense model")
    divergence.set_xlabel("nats a token")

    for offset, color, label, values in (
        (-0.2, COLORS[1], "scores", [100 * r.sparsity for r in results]),
        (0.2, COLORS[2], "attention mass", [100 * (1 - r.mass_kept) for r in results]),
    ):
        bars = share.barh([row + offset for row in rows], values, height=0.38, color=color, label=label)
        share.bar_label(bars, fmt="%.1f", padding=4)
    share.set_title("Left out")
    share.set_xlabel("share (%)")
    share.legend(loc="upper right", frameon=False)

    change.set_yticks(rows, [result.variant for result in results])
    change.invert_yaxis()
    for axes in (change, divergence, share):
        axes.margins(x=0.5)  # room for the labels at the ends of the bars
        axes.axvline(0, color="black", linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
    return figure
