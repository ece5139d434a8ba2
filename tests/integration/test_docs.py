"""The code of the README and the docs: Python blocks run, configurations load, commands and files exist.

The Python blocks of a page run one after the other in one namespace, in a folder with the tiny models that they load.
A block that cannot run here is preceded by a line that says why: ``*Not run by the tests: it needs a GPU.*``
"""

import importlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
import typer
import yaml
from tiny_model import TEXT, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import modelopt_lite as mtsa
from modelopt_lite import registry
from modelopt_lite.cli import app
from modelopt_lite.experiment import ExperimentConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
FENCE = re.compile(
    r"^(?:\*Not run by the tests: (?P<reason>[^*]+)\*\n\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LOADED = ["path/to/model", "meta-llama/Llama-3.1-8B"]
"""Folders that blocks load a model from."""
OPTIMIZED = "a-checkpoint-of-model-optimizer"
RUN_ELSEWHERE = {"docs/writing_a_method.md": "tests/kernels/test_writing_a_method.py"}


def blocks(name, *languages):
    """Blocks of a page in these languages, with the number of their first line."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        if match["language"] in languages:
            yield text[: match.start("code")].count("\n"), match["code"], match["reason"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), context=2048)


@pytest.fixture
def folder(tmp_path, monkeypatch, models):
    for name in LOADED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(models)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shutil.copytree(models, tmp_path / OPTIMIZED)
    config = json.loads((models / "config.json").read_text())
    sparsity = json.loads((Path(__file__).parent / "modelopt" / "sparse_softmax.json").read_text())
    (tmp_path / OPTIMIZED / "config.json").write_text(json.dumps(config | sparsity))
    (tmp_path / "notes.txt").write_text(TEXT * 4)
    monkeypatch.chdir(tmp_path)
    mtsa.list_sparse_methods()
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))  # pages register methods
    return tmp_path


def with_python():
    return [name for name in NAMES if name not in RUN_ELSEWHERE and any(blocks(name, "python"))]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # in PEFT
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("name", with_python())
def test_python_blocks_run(name, folder):
    model = AutoModelForCausalLM.from_pretrained("path/to/model")
    tokenizer = AutoTokenizer.from_pretrained("path/to/model")
    input_ids = tokenizer("The quick brown fox jumps over the lazy dog. " * 2, return_tensors="pt").input_ids
    namespace = {"mtsa": mtsa, "torch": torch, "model": model, "tokenizer": tokenizer, "input_ids": input_ids}
    for line, code, reason in blocks(name, "python"):
        if reason is None:
            # The lines above, so that a traceback names the page's own line.
            exec(compile("\n" * line + code, str(ROOT / name), "exec"), namespace)


@pytest.mark.parametrize("name", with_python())
def test_blocks_that_are_not_run_are_python_at_least(name):
    for _, code, reason in blocks(name, "python"):
        if reason is not None:
            compile(code, name, "exec")


def configurations():
    """Blocks that hold a whole sparsity configuration or experiment, as dictionaries."""
    parsers = {"yaml": yaml.safe_load, "toml": tomllib.loads}
    for name in NAMES:
        for language, parse in parsers.items():
            for line, code, _ in blocks(name, language):
                content = parse(code)
                if content.keys() & {"sparse_cfg", "models"}:
                    yield pytest.param(content, id=f"{name}:{line}")


@pytest.mark.parametrize("content", list(configurations()))
def test_configurations_load(content, folder):
    if "sparse_cfg" in content:
        mtsa.SparsityConfig.model_validate(content)
        return
    (folder / "my_methods.py").write_text("")
    (folder / "my_variant.yaml").write_text("sparse_cfg: {'*': {method: sparse_softmax}}")
    (folder / "experiment.yaml").write_text(yaml.safe_dump(content))
    ExperimentConfig.load(folder / "experiment.yaml")


def commands():
    """Every command of a block of bash, as words, without assignments in front of it."""
    for name in NAMES:
        for _, code, _ in blocks(name, "bash"):
            for line in re.split(r"\n|&&", code.replace("\\\n", " ")):
                words = shlex.split(line, comments=True)
                while words and re.fullmatch(r"\w+=.*", words[0]):
                    del words[0]
                if words:
                    yield pytest.param(words, id=f"{name}: {' '.join(words)[:60]}")


@pytest.mark.parametrize("words", list(commands()))
def test_commands_exist(words):
    if words[0] == "modelopt-lite":
        command = typer.main.get_command(app).commands[words[1]]
        command.make_context(words[1], words[2:])
    elif words[0] in ("python", "torchrun"):
        script = next((word for word in words[1:] if word.endswith(".py")), None)
        if script is not None:
            source = (ROOT / script).read_text(encoding="utf-8")
            for option in (word for word in words[words.index(script) :] if word.startswith("--")):
                # As argparse has it, or as a parameter of typer.
                assert f'"{option}"' in source or f" {option[2:].replace('-', '_')}: " in source
    elif words[:2] == ["pip", "install"]:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for extra in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
            assert set(extra.split(",")) <= project["optional-dependencies"].keys()


INLINE = re.compile(r"`modelopt-lite ([a-z]+)([^`\n]*)`")


@pytest.mark.parametrize("name", NAMES)
def test_inline_commands_exist(name):
    known = typer.main.get_command(app).commands
    for command, rest in INLINE.findall((ROOT / name).read_text(encoding="utf-8")):
        options = {option for parameter in known[command].params for option in parameter.opts}
        assert {word for word in rest.split() if word.startswith("--")} <= options, (command, rest)


@pytest.mark.parametrize("module", ["modelopt_lite", "modelopt_lite.experiment", "modelopt_lite.methods"])
def test_every_public_name_is_in_the_api_reference(module):
    pages = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("api.md", "experiments.md"))
    assert {name for name in importlib.import_module(module).__all__ if not re.search(rf"\b{name}\b", pages)} == set()
