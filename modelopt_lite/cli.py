"""The command line: run experiments, and look up what configurations may hold."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import transformers
import typer
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import __version__
from .config import SparsityConfig
from .errors import ConfigError, UnsupportedError
from .experiment import AssetError, ExperimentConfig, ExperimentResult, VariantResult, run_experiment
from .experiment.report import COLUMNS, table_row
from .registry import list_sparse_methods

app = typer.Typer(
    help="Sparse attention for Transformers models.", no_args_is_help=True, pretty_exceptions_enable=False
)


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turn what the user can mend into one line per problem; anything else is a bug and keeps its traceback."""
    try:
        yield
    except (AssetError, ConfigError, UnsupportedError) as error:
        for line in str(error).splitlines():
            typer.echo(f"error: {line}", err=True)
        raise typer.Exit(2) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Sparse attention for Transformers models."""


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="Experiment in YAML, JSON or TOML, such as examples/quickstart.yaml.")],
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder in which the run makes its own; instead of the file's output_dir.")
    ] = None,
) -> None:
    """Evaluate a model dense and sparse on real text; write a table, a picture and a report."""
    # This program's own display stands in for theirs.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console()
    with _user_errors():
        experiment = ExperimentConfig.load(config)
        if output_dir is not None:
            experiment = experiment.model_copy(update={"output_dir": output_dir})
        display = _Display(experiment)
        with Live(display, console=console, refresh_per_second=4, transient=True):
            result = run_experiment(experiment, display.progress, display.results)
    console.print(display.table())
    _print_continuations(console, experiment, result)
    console.print(f"\nWritten to {escape(str(result.folder))}: report.md, quality.png, results.jsonl, config.yaml")


class _Display:
    """What is on the screen while an experiment runs: the table so far, and a bar."""

    def __init__(self, config: ExperimentConfig) -> None:
        self._config = config
        self._results: Sequence[VariantResult] = ()
        self._bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()
        )
        self._task = self._bar.add_task("starting", total=None)

    def progress(self, what: str, done: float, total: float) -> None:
        self._bar.update(self._task, description=what, completed=done, total=total or None)

    def results(self, results: Sequence[VariantResult]) -> None:
        self._results = results

    def __rich__(self) -> Group:
        return Group(self.table(), self._bar)

    def table(self) -> Table:
        cells = {result.variant: table_row(result) for result in self._results}
        table = Table(
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            title=f"{escape(self._config.model)}: {self._config.window_length}-token windows",
        )
        for column in COLUMNS:
            table.add_column(column, justify="left" if column == COLUMNS[0] else "right", no_wrap=True)
        for name in self._config.variants:
            row = cells.get(name, (name, *["..."] * (len(COLUMNS) - 1)))
            table.add_row(*(escape(cell) for cell in row), style="" if name in cells else "dim")
        return table


def _print_continuations(console: Console, config: ExperimentConfig, result: ExperimentResult) -> None:
    if config.prompt is None:
        return
    console.print(Panel(escape(config.prompt.strip()), title="prompt", box=box.ROUNDED))
    table = Table(box=box.SIMPLE_HEAD, title="continued greedily", show_lines=True)
    table.add_column("variant", no_wrap=True)
    table.add_column("continuation")
    for name, text in result.continuations.items():
        table.add_row(escape(name), escape(text.strip()))
    console.print(table)


@app.command()
def schema() -> None:
    """Print the JSON schema of sparsity configurations, with which editors complete and check them."""
    typer.echo(json.dumps(SparsityConfig.model_json_schema(), indent=2))


@app.command()
def methods() -> None:
    """List the sparsity methods that are installed, with the type, the default and the meaning of their fields."""
    for name, cls in list_sparse_methods().items():
        typer.echo(f"{name}: {inspect.getdoc(cls)}\n")
        for field, info in cls.model_fields.items():
            kind = ", ".join([inspect.formatannotation(info.annotation), *map(str, info.metadata)])
            default = "" if info.is_required() else f" = {info.get_default(call_default_factory=True)!r}"
            typer.echo(f"  {field}: {kind}{default}")
            if info.description:
                typer.echo(f"      {info.description}")
        typer.echo()
