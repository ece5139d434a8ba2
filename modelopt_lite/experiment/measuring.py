"""What calibration and search share: windows of text, a journal to go on from, a bar, and the check of the model."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ..errors import ConfigError
from ..models.module import sparse_modules
from .assets import check_context, read_documents
from .config import TextDataset, TextSource
from .tasks import TASKS, make_sample

RULER = "ruler"
RULER_TASKS = tuple(task for task in TASKS if task not in ("passkey", "copy"))

Data: TypeAlias = "Tensor | TextSource | Sequence[Tensor | TextSource]"
"""Windows as token ids, names of texts, or :data:`RULER` for samples of generated tasks."""


def read_windows(
    data: Data, model: nn.Module, tokenizer: Any, lengths: Sequence[int], windows: int, seed: int
) -> list[Tensor]:
    """Return windows of tokens, each ``[length]`` on the CPU.

    Args:
        data: windows as token ids ``[length]``, which are taken as they are; texts, as an experiment's
            ``quality.text`` names them; or ``"ruler"`` for samples of the generated tasks, each of another task.
        model: the model that will read them.
        tokenizer: its tokenizer; only texts need one.
        lengths: tokens of a window; of each text and length there are ``windows``.
        windows: how many.
        seed: of the choice of documents, and of the samples.

    Raises:
        ConfigError: if there are too few tokens, a window does not fit into the model's context, or a tokenizer is
            missing; names the argument.
    """
    found: list[Tensor] = []
    for i, source in enumerate([data] if isinstance(data, Tensor | str | TextDataset) else data):
        if isinstance(source, Tensor):
            if source.dim() != 1 or source.dtype.is_floating_point or source.numel() < 2:
                shape = f"{list(source.shape)} of {source.dtype}"
                raise ConfigError(f"data.{i}: {shape} is not allowed; must be two or more token ids, [length]")
            check_context(model, source.numel(), f"data.{i}")  # type: ignore[arg-type] # only reads its config
            found.append(source.cpu())
            continue
        if tokenizer is None:
            raise ConfigError("tokenizer: None is not allowed; texts need the model's tokenizer")
        for length in lengths:
            check_context(model, length, "lengths")  # type: ignore[arg-type]
        found += _text_windows(source, f"data.{i}", tokenizer, lengths, windows, seed)
    if not found:
        raise ConfigError("data: is empty; must have at least one window or text")
    return found


def _text_windows(
    source: TextSource, path: str, tokenizer: Any, lengths: Sequence[int], windows: int, seed: int
) -> Iterator[Tensor]:
    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, verbose=False).input_ids
        return ids

    if source == RULER:
        for length in lengths:
            for i in range(windows):
                task = RULER_TASKS[i % len(RULER_TASKS)]
                depth = random.Random(f"{seed}/{length}/{i}").random() if task == "needle" else None
                try:
                    sample = make_sample(task, length, depth, i, seed, lambda text: len(encode(text)))
                except ValueError as error:
                    raise ConfigError(f"lengths: {error}") from None
                yield torch.tensor(encode(sample.prompt.text))
        return
    documents = read_documents(source, path)
    names = list(documents)
    random.Random(f"{seed}/{source}").shuffle(names)
    tokens: dict[str, Tensor] = {}

    def tokens_of(name: str) -> Tensor:
        if name not in tokens:
            tokens[name] = torch.tensor(encode(documents[name]))
        return tokens[name]

    for length in lengths:
        parts = cut_windows(names, tokens_of, length, windows)
        if len(parts) < windows:
            raise ConfigError(
                f"{path}: {source!r} is not allowed; must have windows = {windows} windows of {length} tokens, has "
                f"{len(parts)}"
            )
        yield from (part for _, part in parts)


def cut_windows(
    names: Sequence[str], tokens_of: Callable[[str], Tensor], length: int, count: int
) -> list[tuple[str, Tensor]]:
    """Cut windows: of several documents the first of each, then the second of each, and so on.

    Args:
        names: the documents, in order.
        tokens_of: returns a document's tokens.
        length: tokens of a window.
        count: how many windows are wanted.

    Returns:
        At most ``count`` windows, each with the name of its document.
    """
    found: list[tuple[str, Tensor]] = []
    left = list(names)
    turn = 0
    while left and len(found) < count:
        still = []
        for name in left:
            if len(found) == count:
                break
            part = tokens_of(name)[turn * length : (turn + 1) * length]
            if len(part) == length:
                found.append((name, part))
                still.append(name)
        left, turn = still, turn + 1
    return found


def digest(tokens: Tensor) -> str:
    """Return a name for a window that depends on its tokens alone."""
    return hashlib.sha256(json.dumps(tokens.tolist()).encode()).hexdigest()[:16]


def check_dense(model: nn.Module) -> None:
    """Check that a model is not sparse, as measuring makes it sparse in its own way.

    Raises:
        ConfigError: if it is.
    """
    if sparse_modules(model):
        raise ConfigError("model: is sparse already, which is not allowed here; call unsparsify(model) first")


def describe_model(model: nn.Module) -> list[Any]:
    """Return what tells one model from another in a journal: its class, its size, and sums over some of its weights."""
    parameters = list(model.parameters())
    some = parameters[:: max(1, len(parameters) // 8)]
    return [
        type(model).__name__,
        sum(parameter.numel() for parameter in parameters),
        *(f"{parameter.detach().double().sum().item():.6g}" for parameter in some),
    ]


class Journal:
    """What has been measured, by name; kept in a file if there is one, so that an interrupted measurement goes on."""

    def __init__(self, path: str | Path | None, header: Mapping[str, Any]) -> None:
        """Read the file, or begin it.

        Args:
            path: file of lines of JSON; None keeps nothing.
            header: all that the measurements depend on besides their names.

        Raises:
            ConfigError: if the file holds something else.
        """
        self._path = None if path is None else Path(path)
        self._found: dict[str, Any] = {}
        header = json.loads(json.dumps(header))
        if self._path is None:
            return
        if not self._path.exists():
            self._write(header)
            return
        text = self._path.read_text(encoding="utf-8")
        complete, _, rest = text.rpartition("\n")  # an interruption may leave half a line
        try:
            first, *lines = map(json.loads, complete.splitlines())
            self._found = {line["name"]: line["value"] for line in lines}
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{self._path}: is not the state of an earlier measurement; give another path") from None
        if first != header:
            differ = [key for key in header if not isinstance(first, dict) or first.get(key) != header[key]]
            raise ConfigError(
                f"{self._path}: is the state of another measurement ({', '.join(differ)}); give another path"
            )
        if rest:
            self._path.write_text(complete + "\n", encoding="utf-8")

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return what was measured under a name; measure it if nothing was. It must be something that JSON can hold."""
        if name not in self._found:
            value = measure()
            self._found[name] = value
            if self._path is not None:
                self._write({"name": name, "value": value})
        return self._found[name]

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._path is not None
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise ConfigError(f"{self._path}: cannot be written: {error.strerror}") from None


@contextmanager
def progress_bar(show: bool, total: int) -> Iterator[Callable[[str], None]]:
    """Draw a bar on the terminal's error output while something is measured.

    Args:
        show: false draws nothing.
        total: number of steps.

    Yields:
        A function that is called before each step with what it does.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not show) as bar:
        task = bar.add_task("starting", total=total)
        begun = 0

        def step(what: str) -> None:
            nonlocal begun
            bar.update(task, description=what, completed=begun)
            begun += 1

        yield step
