"""The command line: what it prints, and that a mistake of the user's gives one line and exit code 2."""

import json

import pytest
import yaml
from tiny_model import TEXT, save_tiny_model
from typer.testing import CliRunner

import modelopt_lite as mtsa
from modelopt_lite import cli

GOOD = {
    "text": "text.txt",
    "variants": {"1:4": {"sparse_cfg": {"*": {"method": "sparse_softmax", "sparsity_n": 1, "dense_window_size": 2}}}},
}


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})


def variant(**entry):
    return {"variants": {"v": {"sparse_cfg": {"*": entry}}}}


BAD = {
    "misspelt field": ({"windows": 3}, "c.yaml: windows: 3 is not allowed; unknown field; allowed: model, dtype"),
    "type": ({"window_length": "2048"}, "c.yaml: window_length: '2048' is not allowed; must be a valid integer"),
    "window of one token": ({"window_length": 1}, "c.yaml: window_length: 1 is not allowed; must be greater than"),
    "no windows": ({"windows_per_text": 0}, "c.yaml: windows_per_text: 0 is not allowed"),
    "no tokens": ({"max_new_tokens": 0}, "c.yaml: max_new_tokens: 0 is not allowed"),
    "dtype": ({"dtype": "int8"}, "c.yaml: dtype: 'int8' is not allowed; must be 'float32', 'bfloat16' or 'float16'"),
    "device": ({"device": "gpu"}, "c.yaml: device: 'gpu' is not allowed; must be auto, cpu, cuda or cuda:N"),
    "no text": ({"text": []}, "c.yaml: text: [] is not allowed"),
    "text type": ({"text": [1]}, "c.yaml: text.0: 1 is not allowed; must be a valid string"),
    "variants type": ({"variants": ["2:4"]}, "c.yaml: variants: ['2:4'] is not allowed"),
    "unquoted 2:4": ({"variants": {124: None}}, "c.yaml: variants.124"),
    "sparse dense": ({"variants": {"dense": GOOD["variants"]["1:4"]}}, "c.yaml: variants: "),
    "variant type": ({"variants": {"v": "2:4"}}, "c.yaml: variants.v: '2:4' is not allowed"),
    "variant field": ({"variants": {"v": {"cfg": {}}}}, "c.yaml: variants.v."),
    "method": (variant(method="magic"), "c.yaml: variants.v.sparse_cfg.*.method: 'magic' is not allowed"),
    "n > m": (
        variant(method="sparse_softmax", sparsity_n=5),
        "c.yaml: variants.v.sparse_cfg.*.sparsity_n: 5 is not allowed; must be at most sparsity_m = 4",
    ),
    "missing text file": ({"text": "no.txt"}, "text.0: 'no.txt' is not allowed; must be a readable text file"),
    "unknown address": ({"text": "sotu:2"}, "text.0: 'sotu:2' is not allowed; must be one of"),
    "missing model": ({"model": "/no/model"}, "model: '/no/model' is not allowed; must be smollm2-135m or"),
    "text too short": ({"window_length": 120, "windows_per_text": 9}, "text.0: "),
    "pattern": (
        {"variants": {"v": {"sparse_cfg": {"vision.*": {"enable": False}}}}},
        "variants.v.sparse_cfg.vision.*: ",
    ),
    "output": ({"output_dir": "text.txt"}, "output_dir: "),
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(tmp_path, model_folder, monkeypatch):
    """The parts of an experiment that runs in a second, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return {"model": str(model_folder), "device": "cpu", "window_length": 40, **GOOD}


@pytest.fixture(autouse=True)
def quiet_transformers_stays_in_the_test():
    """Running an experiment silences Transformers for the process."""
    logging = cli.transformers.utils.logging
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def one_line(result):
    """Return the only line of a user's mistake."""
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_config(config, tmp_path, change, message):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**config, **change}), encoding="utf-8")
    result = invoke("run", "c.yaml")
    assert one_line(result).startswith(message)
    assert result.stdout == ""
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.yaml", None, "missing.yaml: cannot be read: No such file or directory"),
        ("c.yaml", "a: [", "c.yaml: does not parse: "),
        ("c.yaml", "- a", "c.yaml: holds list; must hold a mapping"),
        ("c.yaml", "{}", "c.yaml: variants: missing; the field is required"),
        ("c.ini", "", "c.ini: suffix '.ini' is not allowed"),
    ],
)
def test_bad_file(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert one_line(invoke("run", name)).startswith(message)


def test_several_mistakes_are_a_line_each(config, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({**config, "dtype": "int8", "window_length": 0}), encoding="utf-8")
    result = invoke("run", "c.json")
    assert result.exit_code == 2
    assert [line.split(": ")[2] for line in result.stderr.splitlines()] == ["dtype", "window_length"]


def test_a_bug_keeps_its_traceback(config, tmp_path, monkeypatch):
    def bug(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "run_experiment", bug)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert isinstance(invoke("run", "c.yaml").exception, ZeroDivisionError)


def test_run(config, tmp_path):
    config = {**config, "prompt": "[b]The quick [brown] fox[/b] " * 2, "max_new_tokens": 4}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    result = invoke("run", "c.yaml", "--output-dir", "elsewhere")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    (folder,) = (tmp_path / "elsewhere").iterdir()
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    table = [line.split() for line in result.stdout.splitlines()]
    for row in rows:
        if row["kind"] == "variant":
            figures = [f"{row['perplexity']:.2f}", f"{row['change_percent']:+.2f}", "%", f"{row['divergence']:.4f}"]
            assert [row["variant"], *figures] in [cells[:5] for cells in table]
    assert "[b]The quick [brown] fox[/b]" in result.stdout
    assert folder.name in result.stdout.replace("\n", "")
    assert not (tmp_path / "runs").exists()


def test_version():
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"{mtsa.__version__}\n")


def test_schema_is_the_json_schema():
    result = invoke("schema")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == mtsa.SparsityConfig.model_json_schema()


def test_methods_lists_every_field():
    result = invoke("methods")
    assert result.exit_code == 0
    for name, cls in mtsa.list_sparse_methods().items():
        _, _, section = f"\n{result.stdout}".partition(f"\n{name}: ")
        lines = section.splitlines()
        for field, info in cls.model_fields.items():
            shown = next(line for line in lines if line.startswith(f"  {field}: "))
            assert shown.endswith(f" = {info.default!r}")
            assert info.description is None or f"      {info.description}" in lines
