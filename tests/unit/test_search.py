"""Search: what it reports is what a fresh run measures, budgets are kept, and the choice is the best there is."""

import itertools
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from tiny_model import save_tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import modelopt_lite as mtsa
from modelopt_lite import cli, layer_search
from modelopt_lite.experiment.quality import compare_predictions
from modelopt_lite.layer_search import STEPS, Run, _choose, _Frontier

CANDIDATES = {
    "2:4": {"method": "sparse_softmax", "dense_window_size": 4},
    "1:4": {"method": "sparse_softmax", "sparsity_n": 1, "dense_window_size": 4},
    "window": {"method": "sink_window", "dense_window_size": 20},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), 256)


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def windows(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (length,), generator=generator) for length in lengths]


DATA = windows(96, 160)


def search(model, candidates=CANDIDATES, data=DATA, **options):
    return mtsa.search(model, candidates, data, show_progress=False, **options)


@torch.no_grad()
def fresh(model, config, data):
    """KL, change of perplexity and sparsity, measured without any of the code that searches."""
    dense = [model(window[None]).logits[0] for window in data]
    mtsa.sparsify(model, config)
    with mtsa.collect_statistics(model) as statistics:
        sparse = [model(window[None]).logits[0] for window in data]
    mtsa.unsparsify(model)
    tokens = sum(len(window) - 1 for window in data)
    kl = change = 0.0
    for a, b, window in zip(dense, sparse, data, strict=True):
        p, q = (x[:-1].double().log_softmax(-1) for x in (a, b))
        kl += float((p.exp() * (p - q)).sum()) / tokens
        change += float((p - q).gather(1, window[1:, None]).sum()) / tokens
    scores = sum(4 * 2 * len(window) * (len(window) + 1) // 2 for window in data)  # heads, layers
    dropped = sum(layer.visible - layer.kept for layer in statistics.layers.values())
    return kl, 100 * math.expm1(change), dropped / scores


def test_what_is_reported_is_what_a_fresh_run_measures(model, folder, tmp_path):
    result = search(model, sparsity="2:4")
    result.save(tmp_path / "searched.yaml")
    other = AutoModelForCausalLM.from_pretrained(folder)
    kl, change, sparsity = fresh(other, tmp_path / "searched.yaml", DATA)
    assert result.run.kl == pytest.approx(kl, rel=1e-3)
    assert result.run.perplexity_percent == pytest.approx(change, rel=1e-3, abs=1e-3)
    assert result.run.sparsity == pytest.approx(sparsity, abs=1e-9)
    for name, run in result.everywhere.items():
        assert (run.kl, run.perplexity_percent, run.sparsity) == pytest.approx(
            fresh(other, mtsa.SparsityConfig.load(CANDIDATES[name]), DATA), rel=1e-3, abs=1e-3
        )
    assert result.run.sparsity >= result.everywhere["2:4"].sparsity - 1e-3
    assert result.run.kl <= result.everywhere["2:4"].kl
    head = (tmp_path / "searched.yaml").read_text()
    assert f"# Measured on 2 windows, 256 tokens: {result.run}" in head
    assert f"# 2:4 everywhere: {result.everywhere['2:4']}" in head
    assert "# model.layers.1.self_attn: " in head
    assert "searched" in str(result)


def test_a_loss_is_that_of_one_layer_alone(model):
    result = search(model, sparsity=0.3)
    for layer in result.layers:
        for name, method in CANDIDATES.items():
            kl, _, sparsity = fresh(model, {"sparse_cfg": {layer.layer: method}}, DATA)
            assert layer.kl[name] == pytest.approx(kl, rel=1e-3)
            # The gain is measured with both layers sparse; how many kept keys are recent depends on activations.
            assert layer.gain[name] == pytest.approx(sparsity, abs=1e-3)
    assert result.predicted_kl == pytest.approx(sum(layer.kl.get(layer.candidate, 0.0) for layer in result.layers))


@pytest.mark.parametrize("budget", ["kl", "perplexity"])
def test_a_budget_of_loss_is_kept_and_used(model, budget):
    everywhere = search(model, sparsity="2:4").everywhere
    loss = {"kl": lambda run: run.kl, "perplexity": lambda run: run.perplexity_percent}[budget]
    allowed = loss(everywhere["1:4"]) * 1.0001
    result = search(model, **{budget: allowed})
    assert loss(result.run) <= allowed
    # Some choices that nobody proposed may fit too, but at least the best candidate everywhere is reached.
    assert result.run.sparsity >= everywhere["1:4"].sparsity


def test_a_budget_that_allows_nothing_leaves_the_model_dense(model):
    nothing = search(model, kl=1e-9)
    assert nothing.run.sparsity == 0
    assert nothing.config.sparse_cfg == {}
    assert str(nothing).endswith("layers: 2 dense\n")


def test_a_speed_budget_is_met_by_measured_times(model, monkeypatch):
    times = {"sparse_softmax": {2: 0.8, 1: 0.5}, "sink_window": 0.25}

    def seconds(timer, request):
        if request.plan.is_dense:
            return 1.0
        found = times[timer.method.method]
        return found if isinstance(found, float) else found[timer.method.sparsity_n]

    monkeypatch.setattr(layer_search._Timer, "_time", seconds)
    result = search(model, speedup=1.3)
    chosen = sum({"2:4": 0.8, "1:4": 0.5, "window": 0.25, "dense": 1.0}[layer.candidate] for layer in result.layers)
    assert result.predicted_speedup == pytest.approx(2 / chosen, rel=1e-3)
    assert result.predicted_speedup >= 1.299
    with pytest.raises(mtsa.ConfigError, match="speedup: cannot be met; the candidates reach 4 at most"):
        search(model, speedup=5.0)


def test_times_are_measured(model):
    entries = layer_search._entries({"window": CANDIDATES["window"]})
    work = layer_search._Work(model, entries, windows(200), layer_search.Journal(None, {}))
    savings = work.savings(lambda _: None)
    assert all(-10 < layer["window"] < 1 and layer["window"] != layer["dense"] == 0 for layer in savings.values())
    mtsa.unsparsify(model)


@pytest.mark.parametrize("seed", range(5))
def test_the_frontier_is_the_best_choice(seed):
    generator = random.Random(seed)
    names, layers = ["dense", "a", "b", "c"], [f"layer{i}" for i in range(4)]
    gains = {layer: {name: generator.randrange(STEPS // 8) / STEPS for name in names} for layer in layers}
    losses = {layer: {name: generator.random() for name in names} for layer in layers}
    for layer in layers:
        gains[layer]["dense"] = losses[layer]["dense"] = 0.0
    frontier = _Frontier(gains, losses)
    all_choices = [
        (sum(gains[x][n] for x, n in pairs), sum(losses[x][n] for x, n in pairs))
        for pairs in (list(zip(layers, chosen, strict=True)) for chosen in itertools.product(names, repeat=4))
    ]
    for gain, loss in generator.sample(all_choices, 20):
        cheapest = frontier.least_loss(gain)
        assert sum(gains[x][n] for x, n in cheapest.items()) >= gain - 1e-9
        best = min(other for reached, other in all_choices if reached >= gain - 1e-9)
        assert sum(losses[x][n] for x, n in cheapest.items()) == pytest.approx(best)
        largest = frontier.most_gain(loss + 1e-9)
        best = max(reached for reached, other in all_choices if other <= loss + 1e-9)
        assert sum(gains[x][n] for x, n in largest.items()) == pytest.approx(best)


def test_one_candidate_everywhere_is_proposed_whatever_is_rounded():
    """Thirty layers whose gains are all rounded down do not keep a candidate from what it gains itself."""
    layers = [f"layer{i}" for i in range(30)]
    gains = {layer: {"dense": 0.0, "a": 0.01580249} for layer in layers}
    frontier = _Frontier(gains, {layer: {"dense": 0.0, "a": 1.0} for layer in layers})
    assert frontier.gain_everywhere("a") == pytest.approx(30 * 0.01580249, abs=1e-12)
    everywhere = {"a": Run(0.1, 0.0, 30 * 0.01580249)}
    work = SimpleNamespace(layers=layers, config=lambda chosen: None, run=lambda config: Run(0.2, 0.0, 0.5))
    chosen, run = _choose(work, frontier, "sparsity", everywhere["a"].sparsity, everywhere)
    assert (set(chosen.values()), run) == ({"a"}, everywhere["a"])


GAINS = {"layer0": {"dense": 0.0, "a": 0.2, "b": 0.25}, "layer1": {"dense": 0.0, "a": 0.2, "b": 0.25}}
LOSSES = {layer: {"dense": 0.0, "a": 1.0, "b": 3.0} for layer in GAINS}


def choose(goal, everywhere, runs):
    """Choose among two layers' methods, where real runs of proposals are given in turn."""
    left = iter(runs)
    work = SimpleNamespace(layers=list(GAINS), config=lambda chosen: None, run=lambda config: next(left))
    return _choose(work, _Frontier(GAINS, LOSSES), "sparsity", goal, everywhere)


def test_what_can_be_reached_is_not_rounded():
    with pytest.raises(mtsa.ConfigError, match=r"sparsity: cannot be met; the candidates reach 0\.5 at most"):
        choose(0.50001, {}, [])
    everywhere = {"b": Run(0.3, 0.0, 0.5)}
    assert choose(0.5, everywhere, [Run(0.4, 0.0, 0.5)]) == (dict.fromkeys(GAINS, "b"), everywhere["b"])


def test_more_is_asked_for_until_a_run_drops_enough():
    chosen, run = choose(0.4, {}, [Run(0.1, 0.0, 0.3999), Run(0.2, 0.0, 0.44)])
    assert (sorted(chosen.values()), run) == (["a", "b"], Run(0.2, 0.0, 0.44))


def test_a_budget_that_real_runs_miss_is_reported(model, caplog, monkeypatch):
    chosen, run = choose(0.45, {}, [Run(0.1, 0.0, 0.44), Run(0.2, 0.0, 0.445)])
    assert run == Run(0.2, 0.0, 0.445)
    frontier = _Frontier(GAINS, LOSSES)
    missed = layer_search._missed(frontier, "sparsity", 0.45, chosen, run)
    assert missed == ["sparsity: what was run reaches 0.445 at most, and not 0.45"]
    assert layer_search._missed(frontier, "sparsity", 0.445, chosen, run) == []

    monkeypatch.setattr(layer_search, "_missed", lambda *_: missed)
    assert f"warning: {missed[0]}" in str(search(model, sparsity=0.2))
    assert missed[0] in caplog.text


def test_less_perplexity_at_more_kl_is_reported(model, tmp_path, caplog, monkeypatch):
    everywhere = {"a": Run(0.2, 0.1, 0.4), "b": Run(0.9, 3.0, 0.5), "c": Run(0.0, 0.0, 0.1)}
    gains = {layer: {**gains, "c": 0.05} for layer, gains in GAINS.items()}
    frontier = _Frontier(gains, {layer: {**losses, "c": 0.1} for layer, losses in LOSSES.items()})
    found = layer_search._better_by_perplexity(frontier, 0.4, Run(0.1, 0.5, 0.41), everywhere)
    assert len(found) == 1  # b has more perplexity, and c does not drop enough
    assert found[0].startswith(f"a everywhere meets the budget too, with {everywhere['a']}")

    monkeypatch.setattr(layer_search, "_better_by_perplexity", lambda *_: found)
    result = search(model, sparsity=0.2)
    result.save(tmp_path / "found.yaml")
    assert found[0] in caplog.text
    assert f"warning: {found[0]}" in str(result)
    assert f"# warning: {found[0]}" in (tmp_path / "found.yaml").read_text()


def test_an_interrupted_search_goes_on(model, tmp_path, monkeypatch):
    state = tmp_path / "state.jsonl"
    whole = search(model, sparsity="2:4")
    logits, calls = layer_search._Work.logits, []

    def interrupted(work, window):
        calls.append(window)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return logits(work, window)

    monkeypatch.setattr(layer_search._Work, "logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(model, sparsity="2:4", state=state)
    assert not [m for m in model.modules() if isinstance(m, mtsa.SparseAttentionModule)]
    again = search(model, sparsity="2:4", state=state)
    assert again.config == whole.config
    assert again.run.kl == pytest.approx(whole.run.kl, rel=1e-3)
    before = len(calls)
    assert search(model, sparsity="2:4", state=state) == again
    assert len(calls) == before
    assert search(model, kl=whole.run.kl * 1.01, state=state).run.kl <= whole.run.kl * 1.01


def test_layers_get_their_own_entry(model):
    entry = mtsa.SparsityConfig.load(CANDIDATES["2:4"]).sparse_cfg["*"]
    work = layer_search._Work(model, {"2:4": entry}, DATA, layer_search.Journal(None, {}))
    first, second = work.layers
    assert work.config({first: "dense", second: "dense"}).sparse_cfg == {}
    config = work.config({first: "2:4", second: "dense"})
    assert config.assign(work.layers) == {first: entry}
    mtsa.unsparsify(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "must be exactly one of sparsity, speedup, kl, perplexity; none is given"),
        ({"kl": 0.1, "sparsity": 0.5}, "sparsity, kl are given"),
        ({"kl": 0.0}, "kl: 0.0 is not allowed; a number > 0"),
        ({"sparsity": 1.5}, "sparsity: 1.5 is not allowed; a number > 0 and < 1"),
        ({"sparsity": "4:8"}, "sparsity: '4:8' is not allowed; a number, or one of 2:4, 1:4, window"),
        ({"sparsity": 0.99}, r"sparsity: cannot be met; the candidates reach 0\.\d+ at most"),
        ({"candidates": [], "kl": 0.1}, "candidates: is empty"),
        ({"candidates": {"dense": "2:4"}, "kl": 0.1}, "candidates: 'dense' is not allowed as a name"),
        ({"candidates": {"a": {"sparse_cfg": {"*.0.*": "2:4"}}}, "kl": 0.1}, "sparse_cfg"),
        ({"candidates": {"a": {"method": "sink_window", "enable": False}}, "kl": 0.1}, "candidates.a: is not allowed"),
        ({"data": "sotu", "kl": 0.1}, "tokenizer: None is not allowed"),
    ],
)
def test_what_is_refused(model, change, message):
    with pytest.raises(mtsa.ConfigError, match=message):
        search(model, change.pop("candidates", CANDIDATES), change.pop("data", DATA), **change)
    assert not [m for m in model.modules() if isinstance(m, mtsa.SparseAttentionModule)]


def test_lists_of_methods_are_candidates(model):
    grid = {"block_size": 16, "block_rows": 16}
    both = [{"method": "mean_pool_top_k", "keep": 0.5, **grid}, CANDIDATES["2:4"]]
    candidates = {"both": both, "2:4": "2:4"}
    result = search(model, candidates, sparsity=0.2)
    assert result.run.kl == pytest.approx(fresh(model, result.config, DATA)[0], rel=1e-3)


def test_the_comparison_is_with_the_dense_model(model):
    with torch.no_grad():
        logits = model(DATA[0][None]).logits[0]
    assert compare_predictions(logits, logits, DATA[0]).divergence == 0


def test_command(folder, tmp_path):
    text, output = tmp_path / "text.txt", tmp_path / "found.yaml"
    text.write_text("The lighthouse was finished in the autumn, after three winters of work. " * 10)
    arguments = ["search", folder, output, "--candidate", "2:4", "--candidate", "1:4", "--text", text]
    arguments += ["--lengths", "200", "--windows", "1", "--json"]

    def invoke(*more):
        return CliRunner().invoke(cli.app, [str(argument) for argument in [*arguments, *more]])

    result = invoke("--sparsity", "2:4")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["config"] == json.loads(mtsa.SparsityConfig.load(output).model_dump_json())
    assert found["run"]["sparsity"] >= found["everywhere"]["2:4"]["sparsity"] - 1e-3
    output.unlink()
    assert "--sparsity: 'half' is not allowed" in invoke("--sparsity", "half").stderr
    assert "must be exactly one of" in invoke().stderr
    result = invoke("--kl", "0.5")
    assert json.loads(result.stdout)["run"]["kl"] <= 0.5
