"""The report of a run: one HTML page that needs no other file, and the same in Markdown."""

from __future__ import annotations

import dataclasses
import html
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

import yaml
from matplotlib.figure import Figure

from .config import DENSE
from .plots import Plot, draw_heads, draw_needles, draw_patterns, draw_quality, draw_speed, draw_tasks, draw_trade
from .quality import QualityRow, summarize_quality
from .records import Answer, Attention, Window
from .result import ExperimentResult
from .speed import SpeedRow
from .tables import Table, html_table, layer_table, markdown_section, quality_table, short
from .tasks import DEPTH_TASKS, TASK_NOTES

PLOTS = "plots"
PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; color: #1b1f24; background: #fff;
  max-width: 1100px; margin: 0 auto; padding: 1rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 1.2rem 0 .4rem; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .4rem; padding-top: .6rem; border-top: 1px solid #d8dee4; }
h3 { font-size: 1.02rem; margin: 1.4rem 0 .3rem; }
a { color: #0860a8; } nav a { margin-right: 1rem; white-space: nowrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .6rem 0; }
dt { color: #57606a; } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: .3rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .28rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e7ebef; }
th { border-bottom: 1.5px solid #8c959f; font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: .1rem; position: sticky; left: 0; background: #fff; }
tbody tr:hover td { background: #f2f6fa; }
.notes { font-size: .84rem; color: #57606a; padding-left: 1.1rem; margin: .5rem 0; }
figure { margin: 1rem 0; }
figure svg { width: 100%; min-width: 640px; max-width: 1100px; height: auto; display: block; }
figcaption { font-size: .87rem; color: #57606a; margin-top: .3rem; }
pre { background: #f6f8fa; padding: .8rem 1rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .86rem; border-radius: 6px; }
details { margin: .4rem 0; } summary { cursor: pointer; }
.failed { color: #a40e26; }
@media (max-width: 600px) { body { font-size: 15px; padding: .5rem .8rem 3rem; } h1 { font-size: 1.35rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .35rem; } th, td { padding: .28rem .45rem; }
  td:first-child, th:first-child { white-space: normal; min-width: 6.5rem; } }
</style>
</head>
<body>
$body
</body>
</html>
"""
)


@dataclass(frozen=True)
class Text:
    """Text as a person or a model wrote it.

    Attributes:
        title: stands above it.
        content: the text.
        folded: whether only the title is shown, until it is opened.
    """

    title: str
    content: str
    folded: bool = False


Block = Table | Plot | Text


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        title: its heading.
        lead: a sentence or two about what follows.
        blocks: what follows.
    """

    title: str
    lead: str
    blocks: Sequence[Block]


def write_report(result: ExperimentResult, folder: Path | None = None) -> None:
    """Write ``report.html``, ``report.md`` and the pictures of the latter, in ``plots``.

    Args:
        result: of a run, finished or not.
        folder: where; by default the run folder.
    """
    folder = result.folder if folder is None else folder
    sections = [_without_repeated_notes(section) for section in _sections(result)]
    (folder / "report.html").write_text(_page(_title(result), _facts(result), sections), encoding="utf-8")
    (folder / "report.md").write_text(_markdown(_title(result), _facts(result), sections), encoding="utf-8")
    (folder / PLOTS).mkdir(exist_ok=True)
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Plot):
                block.figure.savefig(folder / PLOTS / f"{block.name}.png", dpi=110)


def _without_repeated_notes(section: Section) -> Section:
    """Return a section in which a note stands below the first table that needs it, and no other."""
    seen: set[str] = set()
    blocks: list[Block] = []
    for block in section.blocks:
        if isinstance(block, Table) and not block.folded:
            new = {name: note for name, note in block.notes.items() if name not in seen}
            seen.update(new)
            block = dataclasses.replace(block, notes=new)
        blocks.append(block)
    return dataclasses.replace(section, blocks=blocks)


def _title(result: ExperimentResult) -> str:
    return f"Sparse attention: {', '.join(map(short, result.config.models))}"


def _facts(result: ExperimentResult) -> dict[str, str]:
    """Return what has to be known to repeat the run, by name."""
    config = result.config
    facts = {"models": f"{', '.join(map(short, config.models))}; {config.dtype}"}
    if result.sessions:
        facts["device"] = "; ".join(dict.fromkeys(session.device for session in result.sessions))
        facts["date"] = result.sessions[0].date
        versions = [
            ", ".join(f"{name} {version}" for name, version in session.versions.items()) for session in result.sessions
        ]
        facts["versions"] = "; ".join(dict.fromkeys(versions))
    facts["variants"] = f"{len(config.variants)}, the dense model among them; seed {config.seed}"
    if config.imports:
        facts["imports"] = ", ".join(Path(name).name for name in config.imports)
    facts["repeat it"] = "modelopt-lite run config.yaml; every measurement is a line of results.jsonl"
    if result.failures:
        facts["failed"] = f"{len(result.failures)} cells; modelopt-lite run --resume tries them again"
    return facts


def _sections(result: ExperimentResult) -> Iterator[Section]:
    if result.quality:
        yield Section(
            "Quality",
            "How well each variant predicts text, and how far it is from the dense model.",
            [*_quality_blocks(result)],
        )
    if result.tasks or result.harness:
        yield Section("Tasks", "Greedy answers; every variant gets the same samples.", list(_task_blocks(result)))
    if result.speed:
        yield Section(
            "Speed",
            "Contenders are measured in turns. Dense is the model with PyTorch's attention.",
            list(_speed_blocks(result)),
        )
    attention = [r for r in result.records if isinstance(r, Attention)]
    if attention:
        yield Section(
            "Attention kept", "Measured with the queries and keys of the model.", list(_attention_blocks(attention))
        )
    if result.continuations and result.config.generation is not None:
        blocks: list[Block] = [Text("prompt", result.config.generation.prompt)]
        several = len(result.config.models) > 1
        for (model, variant), text in result.continuations.items():
            blocks.append(Text(f"{short(model)}, {variant}" if several else variant, text))
        yield Section("The same prompt, continued greedily", "", blocks)
    if result.failures:
        rows = [(f.what, short(f.model), f.error.replace("\n", " ")[:300]) for f in result.failures]
        yield Section("Failed", "", [Table("Cells that could not be measured", ("cell", "model", "error"), rows)])
    content = yaml.safe_dump(result.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    yield Section("Configuration", "", [Text("config.yaml", content, folded=True)])


def _groups(rows: Sequence[QualityRow]) -> Iterator[tuple[str, list[QualityRow]]]:
    for model, length in dict.fromkeys((row.model, row.length) for row in rows):
        name = re.sub(r"\W+", "-", f"{short(model)}-{length}")
        yield name, [row for row in rows if (row.model, row.length) == (model, length)]


def _quality_blocks(result: ExperimentResult) -> Iterator[Block]:
    tables = quality_table(result.quality)
    speed = {(row.model, row.variant, row.measure, row.length): row for row in result.speed}
    for (name, rows), table in zip(_groups(result.quality), tables, strict=True):
        yield table
        what = f"{short(rows[0].model)}, {rows[0].windows} windows of {rows[0].length} tokens."
        yield Plot(f"quality-{name}", draw_quality(rows), f"{what} Bars are 95 % intervals, paired with dense.")
        sparse = [row for row in rows if row.variant != DENSE and row.sparsity is not None]
        if len(sparse) > 1:
            gains = [100 * row.sparsity for row in sparse if row.sparsity is not None]
            figure = draw_trade(sparse, gains, "scores dropped, %")
            yield Plot(f"sparsity-{name}", figure, f"{what} Quality against the sparsity that was achieved.")
        yield from _speed_trade(name, rows, speed)
    texts = list(dict.fromkeys(r.text for r in result.records if isinstance(r, Window)))
    if len(texts) > 1:
        for text in texts:
            for table in quality_table(summarize_quality(result.records, result.variants, result.config.seed, text)):
                yield Table(f"{text}: {table.title}", table.columns, table.rows, folded=True)


def _speed_trade(
    name: str, rows: Sequence[QualityRow], speed: dict[tuple[str, str, str, int], SpeedRow]
) -> Iterator[Block]:
    """Yield quality against speed, at the measured length that is nearest to the windows'."""
    for measure in ("prefill", "kernel"):
        lengths = {key[3] for key in speed if (key[0], key[2]) == (rows[0].model, measure)}
        if not lengths:
            continue
        length = min(lengths, key=lambda x: abs(x - rows[0].length))
        timed = [(row, speed.get((row.model, row.variant, measure, length))) for row in rows if row.variant != DENSE]
        found = [(row, times.speedup) for row, times in timed if times is not None and times.speedup is not None]
        if len(found) > 1:
            label = f"speed of {measure} at {length} tokens, dense = 1"
            figure = draw_trade([row for row, _ in found], [gain for _, gain in found], label)
            yield Plot(f"speed-{name}", figure, f"Quality against speed, {label}.")
        return


def _task_blocks(result: ExperimentResult) -> Iterator[Block]:
    tables = [table for table in result.tables() if table not in quality_table(result.quality)]
    for model in dict.fromkeys(row.model for row in result.tasks):
        rows = [row for row in result.tasks if row.model == model]
        yield from (t for t in tables if t.title.startswith((f"{short(model)}: task", f"{short(model)}: each")))
        name = re.sub(r"\W+", "-", short(model))
        notes = "; ".join(f"{task}: {TASK_NOTES[task]}" for task in TASK_NOTES if any(r.task == task for r in rows))
        yield Plot(f"tasks-{name}", draw_tasks(rows, result.variants), f"Scores by length. {notes}.")
        for task in DEPTH_TASKS:
            figure = draw_needles(result.records, model, task, result.variants)
            if figure is not None:
                caption = f"{task}: how often it is found, by length and depth; 0 % is the start of the prompt."
                yield Plot(f"{task}-{name}", figure, caption)
        yield _sample_answers(result, model)
    yield from (table for table in tables if table.title.endswith("lm-evaluation-harness"))


def _sample_answers(result: ExperimentResult, model: str) -> Table:
    """Return the first answers of a model to one sample of each task at the largest length."""
    answers = [r for r in result.records if isinstance(r, Answer) and r.model == model]
    rows = []
    for task in dict.fromkeys(r.task for r in answers):
        longest = max(r.length for r in answers if r.task == task)
        for r in answers:
            if (r.task, r.length, r.index) == (task, longest, 0) and r.depth in (None, min_depth(answers, task)):
                rows.append((f"{task}, {r.variant}", f"{r.score:.2f}", " ".join(r.output.split())[:120]))
    return Table(f"{short(model)}: one answer to each task", ("task, variant", "score", "answer"), rows, folded=True)


def min_depth(answers: Sequence[Answer], task: str) -> float | None:
    """Return the smallest depth of a task's answers, None if it has no depth."""
    return min((r.depth for r in answers if r.task == task and r.depth is not None), default=None)


def _speed_blocks(result: ExperimentResult) -> Iterator[Block]:
    for model in dict.fromkeys(row.model for row in result.speed):
        rows = [row for row in result.speed if row.model == model]
        yield from (
            t for t in result.tables() if t.title.startswith(f"{short(model)}: ") and t.title.endswith("time by length")
        )
        name = re.sub(r"\W+", "-", short(model))
        yield Plot(f"speed-{name}-lengths", draw_speed(rows), "Medians against length, with quartiles as bands.")


def _attention_blocks(attention: Sequence[Attention]) -> Iterator[Block]:
    for model in dict.fromkeys(r.model for r in attention):
        mine = [r for r in attention if r.model == model and any(layer.heads for layer in r.layers)]
        name = re.sub(r"\W+", "-", short(model))
        figure = draw_heads(mine)
        if figure is not None:
            where = f"{short(model)}, first window of {mine[0].length} tokens of {mine[0].text}"
            yield Plot(f"heads-{name}", figure, f"Attention mass kept by each head; {where}.")
        figure = draw_patterns(mine)
        if figure is not None:
            shown = next(r for r in mine if r.pattern_of)
            caption = (
                f"Keys that each query keeps (blue) and drops (grey): {shown.pattern_of}, first tokens of the window."
            )
            yield Plot(f"pattern-{name}", figure, caption)
        for r in {r.variant: r for r in reversed([r for r in attention if r.model == model])}.values():
            yield layer_table(f"{r.variant}, {r.length} tokens", r.layers)


def _page(title: str, facts: dict[str, str], sections: Sequence[Section]) -> str:
    anchors = [re.sub(r"\W+", "-", section.title.lower()) for section in sections]
    lines = [f"<h1>{html.escape(title)}</h1>"]
    facts_html = "".join(
        f"<dt>{html.escape(name)}</dt><dd{' class=failed' if name == 'failed' else ''}>{html.escape(value)}</dd>"
        for name, value in facts.items()
    )
    links = "".join(
        f'<a href="#{anchor}">{html.escape(section.title)}</a> '
        for anchor, section in zip(anchors, sections, strict=True)
    )
    lines += [f"<dl>{facts_html}</dl>", f"<nav>{links}</nav>"]
    for anchor, section in zip(anchors, sections, strict=True):
        lines.append(f'<h2 id="{anchor}">{html.escape(section.title)}</h2>')
        if section.lead:
            lines.append(f"<p>{html.escape(section.lead)}</p>")
        lines += map(_html_block, section.blocks)
    return PAGE.substitute(title=html.escape(title), body="\n".join(lines))


def _html_block(block: Block) -> str:
    if isinstance(block, Table):
        return html_table(block)
    if isinstance(block, Plot):
        caption = html.escape(block.caption)
        return (
            f'<figure><div class="wide">{_svg(block.figure, caption)}</div><figcaption>{caption}</figcaption></figure>'
        )
    title, content = html.escape(block.title), html.escape(block.content.strip("\n"))
    if block.folded:
        return f"<details><summary>{title}</summary><pre>{content}</pre></details>"
    return f"<h3>{title}</h3><pre>{content}</pre>"


def _svg(figure: Figure, label: str) -> str:
    """Return a figure as SVG that stands inside a page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    content = file.getvalue()
    return content[content.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _markdown(title: str, facts: dict[str, str], sections: Sequence[Section]) -> str:
    lines = [f"# {title}", "", *(f"- {name}: {value}" for name, value in facts.items())]
    for section in sections:
        lines += ["", f"## {section.title}"]
        if section.lead:
            lines += ["", section.lead]
        for block in section.blocks:
            if isinstance(block, Table):
                lines += markdown_section(block)
            elif isinstance(block, Plot):
                lines += ["", f"![{block.caption}]({PLOTS}/{block.name}.png)", "", f"*{block.caption}*"]
            elif block.folded:
                lines += ["", f"<details><summary>{html.escape(block.title)}</summary>", "", *_quote(block.content)]
                lines += ["", "</details>"]
            else:
                lines += ["", f"**{block.title}**", "", *_quote(block.content)]
    return "\n".join(lines) + "\n"


def _quote(text: str) -> list[str]:
    """Return text as a fenced block, in which a model's output cannot be taken for Markdown."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [f"{fence}text", *text.strip("\n").split("\n"), fence]
