"""Runs an experiment cell by cell: what is measured is written at once, what fails is noted, what is there is kept."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__
from ..errors import ConfigError, UnsupportedError
from .assets import AssetError, Progress
from .config import DENSE, ExperimentConfig
from .harness import Harness
from .plan import HARNESS, Unit, cells_of, plan_units
from .records import CONFIG, SAMPLES, Failure, HarnessScore, Record, RunFile, Session, read_results, results_file
from .report import write_report
from .result import ExperimentResult
from .work import ModelWork


def run_experiment(
    config: ExperimentConfig | Mapping[str, Any] | str | os.PathLike[str],
    progress: Progress = lambda what, done, total: None,
    on_records: Callable[[Sequence[Record]], None] = lambda records: None,
    *,
    resume: str | os.PathLike[str] | None = None,
    jobs: int = 1,
    share: int | None = None,
) -> ExperimentResult:
    """Run an experiment and write its run folder, a new one inside ``output_dir``.

    Results are written as they come, so that an interrupted run keeps what it measured and can go on.

    Args:
        config: what to run: an experiment, a mapping, or the path of a YAML, JSON or TOML file.
        progress: told what is being done and how far it is.
        on_records: given all records so far after each that is new.
        resume: folder of an earlier run of the same experiment, which is continued: only what is missing or failed is
            measured.
        jobs: processes that share the work, each with a GPU of its own if there are any.
        share: which of ``jobs`` shares this process does, into the folder ``resume``; for its processes.

    Returns:
        What was measured, with the folder.

    Raises:
        ConfigError: if the configuration is wrong, or the model, the texts and the variants do not go together; nothing
            has been written then.
        UnsupportedError: if the first model is not supported.
        AssetError: if a built-in model or text cannot be had.
        Interrupted: a ``KeyboardInterrupt`` that knows the folder with what was measured, which ``resume`` takes.
    """
    experiment = ExperimentConfig.load(config).resolve()
    harness = None if experiment.lm_eval is None else Harness(experiment.lm_eval)
    folder = None if resume is None else Path(resume)
    if jobs > 1 and share is None:
        folder = create_run_folder(experiment) if folder is None else folder
        try:
            _run_shares(experiment, folder, jobs, progress)
        except KeyboardInterrupt:
            raise Interrupted(folder) from None
    runner = _Runner(experiment, harness, progress, on_records, folder, jobs, share)
    try:
        runner.run()
    except KeyboardInterrupt:
        raise Interrupted(runner.made) from None
    sessions, records = read_results(runner.folder)
    result = ExperimentResult(runner.folder, experiment, sessions, records)
    if share is None:
        progress("writing the report", 0, 0)
        write_report(result)
    return result


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run.

    Attributes:
        folder: where what was measured is; None if nothing was.
    """

    def __init__(self, folder: Path | None) -> None:
        super().__init__()
        self.folder = folder


def _run_shares(config: ExperimentConfig, folder: Path, jobs: int, progress: Progress) -> None:
    """Let other processes do a share each, and wait; what one leaves undone is done afterwards."""
    processes = []
    for i in range(jobs):
        environment = os.environ | gpu_of_share(config, i)
        command = [sys.executable, "-m", "modelopt_lite.experiment.share", str(folder), str(jobs), str(i)]
        log = (folder / f"share-{i}.log").open("w", encoding="utf-8")
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        log.close()
    try:
        while any(process.poll() is None for process in processes):
            ended = sum(process.poll() is not None for process in processes)
            progress(f"{jobs} processes", ended, jobs)
            time.sleep(0.5)
    finally:
        for process in processes:
            process.terminate()  # does nothing to one that has ended
        for process in processes:
            process.wait()


def gpu_of_share(config: ExperimentConfig, share: int) -> dict[str, str]:
    """Return the environment that gives one of several processes a GPU of its own, of those that this process may use.

    An experiment that names its GPU or a device map keeps all of them.
    """
    gpus = torch.cuda.device_count()
    if gpus < 2 or config.device != "cuda" or config.device_map is not None:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = visible if len(visible) == gpus else list(map(str, range(gpus)))
    return {"CUDA_VISIBLE_DEVICES": names[share % gpus].strip()}


class _Runner:
    """One process' work on one experiment."""

    def __init__(
        self,
        config: ExperimentConfig,
        harness: Harness | None,
        progress: Progress,
        on_records: Callable[[Sequence[Record]], None],
        folder: Path | None,
        jobs: int,
        share: int | None,
    ) -> None:
        self.config = config
        self.harness = harness
        self.on_records = on_records
        self._progress = progress
        self._folder = folder
        self._share = share
        self._file: RunFile | None = None
        units = plan_units(config)
        self.units = [unit for i, unit in enumerate(units) if share is None or i % jobs == share]
        self.records: dict[tuple[Any, ...], Record] = {}
        if folder is not None:
            self.records = {record.cell: record for record in read_results(folder)[1]}
        self.step = 0
        self.total = len(self.units) * len(config.variants)

    @property
    def made(self) -> Path | None:
        """Where results go, None if there are none yet."""
        return self._folder

    @property
    def folder(self) -> Path:
        """Where results go; made when the first is written."""
        if self._folder is None:
            self._folder = create_run_folder(self.config)
        return self._folder

    def run(self) -> None:
        """Do what is not done yet, model by model."""
        try:
            for i, name in enumerate(self.config.models):
                self._run_model(name, is_first=i == 0)
        finally:
            if self._file is not None:
                self._file.close()
        self.progress("done")
        self.folder  # noqa: B018 - makes it, if nothing was to be measured

    def _run_model(self, name: str, is_first: bool) -> None:
        units = [unit for unit in self.units if unit.model == name]
        unfinished = [unit for unit in units if not self._is_done(unit)]
        self.step += (len(units) - len(unfinished)) * len(self.config.variants)
        if not unfinished:
            return
        try:
            work = ModelWork(self, name, unfinished)
        except (ConfigError, UnsupportedError, AssetError) as error:
            if is_first and not self.records:
                raise
            self.fail(name, DENSE, "loading the model", ("model", name), error)
            return
        for unit in unfinished:
            work.run(unit)
        del work
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _is_done(self, unit: Unit) -> bool:
        cells = cells_of(unit, self.config)
        return bool(cells) and all(self.has(cell) for cell in cells)

    def has(self, cell: tuple[Any, ...]) -> bool:
        """Whether a cell has been measured."""
        if cell[0] == HARNESS:
            return any(isinstance(r, HarnessScore) and (r.model, r.variant) == cell[1:] for r in self.records.values())
        return cell in self.records and not isinstance(self.records[cell], Failure)

    def progress(self, what: str) -> None:
        """Say what is being done."""
        self._progress(what, min(self.step, self.total), self.total)

    def prepare(self, what: str, done: float, total: float) -> None:
        """Say how far something is that belongs to no cell."""
        self._progress(what, done, total)

    def write(self, *records: Record) -> None:
        """Keep records, in the file too."""
        if self._file is None:
            self._file = RunFile(results_file(self.folder, self._share))
            self._file.write(Session(**describe_environment(self.config.device)))
        for record in records:
            self._file.write(record)
            self.records[record.cell] = record
        self.on_records(list(self.records.values()))

    def fail(self, model: str, variant: str, what: str, cell: tuple[Any, ...], error: Exception) -> None:
        """Note that a cell could not be measured."""
        reason = f"{type(error).__name__}: {str(error).strip()}"[:2000]
        self.write(Failure(model, variant, what, list(cell), reason))

    def samples_file(self, suffix: str = "") -> Path:
        """Return the file that samples go to."""
        share = "" if self._share is None else f"-{self._share}"
        return self.folder / f"{Path(SAMPLES).stem}{suffix}{share}.jsonl"


def create_run_folder(config: ExperimentConfig) -> Path:
    """Create a folder that is named after the current time and did not exist, with the configuration in it.

    Raises:
        ConfigError: if it cannot be made.
    """
    parent = config.output_dir
    name = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = parent / name
    attempt = 1
    while True:
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:  # another run that started in the same second
            attempt += 1
            folder = parent / f"{name}-{attempt}"
        except OSError as error:
            raise ConfigError(
                f"output_dir: {str(parent)!r} is not allowed; must be a folder to write in ({error.strerror})"
            ) from error
    config.save(folder / CONFIG)
    return folder


def describe_environment(device: str) -> dict[str, Any]:
    """Return what results depend on besides the configuration: date, name of the device, versions."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": name,
        "versions": {
            "python": platform.python_version(),
            "modelopt_lite": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
