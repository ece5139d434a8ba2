"""Benchmarks on the CPU: what is compared, and what is written."""

import importlib
import json
from pathlib import Path

import counting
import model as benchmark
import pytest
import skip
import torch
import training
import write_docs

from modelopt_lite.kernels import KeyBlocks
from modelopt_lite.plan import BLOCK_SIZE

TINY = ["--model", "tiny", "--device", "cpu"]
LONG = 96
"""Longer than the dense window, so that something is sparse."""


@pytest.mark.parametrize("script", sorted(Path(write_docs.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_scripts_import_what_there_is(script):
    pytest.importorskip("triton")
    importlib.import_module(script.stem)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(benchmark, "TURN_MS", 1)
    return benchmark.Bench(benchmark.parser().parse_args(TINY))


def problems(rows):
    return {(row["what"], row["mode"], row["seq_len"], row["batch"]) for row in rows}


def test_variants_share_weights_and_differ_in_attention(bench):
    tokens = bench.tokens(1, LONG)
    with torch.no_grad():
        logits = {variant: model(tokens).logits.double() for variant, model in bench.models.items()}
    own, *others = ([x.data_ptr() for x in model.parameters()] for model in bench.models.values())
    assert all(pointers == own for pointers in others)
    torch.testing.assert_close(logits["dense"], logits["sdpa"], rtol=1e-4, atol=1e-5)
    for one, other in [("2:4", "dense"), ("4:8", "dense"), ("2:4", "4:8")]:
        assert (logits[one] - logits[other]).abs().max() > 1e-3 * logits[other].abs().max()


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_every_decode_step_sees_the_same_context(bench, mode, batch):
    cache = bench.filled_cache(mode, batch, 20)
    keys = cache.layers[1].keys[:, :, :20].clone()
    padding = bench.left_padding(batch, 21)
    steps = []
    for _ in range(3):
        tokens = bench.tokens(batch, 1)
        output = bench.models["sdpa"](tokens, past_key_values=cache, attention_mask=padding["attention_mask"])
        steps.append(output.logits)
        benchmark.shorten(cache, 20)
        assert cache.get_seq_length() == 20
    assert torch.equal(steps[1], steps[0])
    assert torch.equal(steps[2], steps[0])
    assert torch.equal(cache.layers[1].keys[:, :, :20], keys)


def test_left_padding_is_on_the_left(bench):
    padding = bench.left_padding(4, 16)
    assert padding["attention_mask"].sum(1).tolist() == [16, 14, 12, 10]
    assert padding["attention_mask"][3].tolist() == [0] * 6 + [1] * 10
    assert padding["position_ids"][3].tolist() == [0] * 6 + list(range(10))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # in PyTorch itself
def test_results_are_written_and_merged(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "TURN_MS", 1)
    output = tmp_path / "results.json"
    options = [*TINY, "--seq-lens", "24", "--rounds", "1", "--new-tokens", "3", "--batch", "2", "--output", str(output)]
    benchmark.main(options)
    first = json.loads(output.read_text())["rows"]
    expected = {(what, "eager", 24, 2 if what == "batch" else 1) for what in benchmark.SEQ_LENS}
    assert problems(first) == expected
    assert len(first) == len(expected) * len(benchmark.VARIANTS)
    for row in first:
        (sdpa,) = (x for x in first if x["variant"] == "sdpa" and problems([x]) == problems([row]))
        assert row["ratio_to_sdpa"] == pytest.approx(row["ms"] / sdpa["ms"], rel=1e-2, abs=1e-3)

    again = ["--parts", "decode", "--modes", "eager", "compiled", "--variants", "sdpa", "2:4"]
    benchmark.main([*options, *again])
    second = json.loads(output.read_text())["rows"]
    assert problems(second) == expected | {("decode", "compiled", 24, 1)}
    assert [row for row in second if row["what"] != "decode"] == [row for row in first if row["what"] != "decode"]
    assert [row["variant"] for row in second if row["what"] == "decode"] == ["sdpa", "2:4"] * 2

    capsys.readouterr()
    benchmark.main(["--show", str(output)])
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert header.count("|") == lines[0].count("|")
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == [
        *("ttft", "decode", "decode", "batch", "generate", "attention", "host")
    ]


def test_what_statistics_cost(tmp_path, capsys):
    output = tmp_path / "results.json"
    options = ["--model", "tiny", "--device", "cpu", "--layers", "1", "--seq-lens", "100", "--rounds", "1"]
    options += ["--seconds", "0"]
    for _ in range(2):
        counting.main([*options, "--methods", "2:4", "skip_softmax", "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert [row["method"] for row in rows] == ["2:4", "skip_softmax"]
    assert [row["share_dropped"] > 0 for row in rows] == [True, False]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ms_with_statistics"] / row["ms"], rel=1e-2)


def test_training_speed(tmp_path, capsys):
    output = tmp_path / "results.json"
    options = ["--models", "tiny", "--device", "cpu", "--rounds", "1", "--output", str(output)]
    training.main([*options, "--variants", "sdpa", "2:4"])
    rows = json.loads(output.read_text())["rows"]
    assert [(row["variant"], row["seq_len"], row["batch"]) for row in rows] == [("sdpa", 64, 2), ("2:4", 64, 2)]
    sdpa, sparse = (row["tokens_per_second"] for row in rows)
    assert rows[1]["speed_to_sdpa"] == pytest.approx(sparse / sdpa, rel=2e-2)
    assert f"2:4 {sparse} (" in capsys.readouterr().out


def test_variants_in_training_share_what_is_trained():
    models = training.variants_of("tiny", ["sdpa", "2:4"], "cpu")
    sdpa, sparse = (dict(model.named_parameters()) for model in models.values())
    assert all(sparse[name] is weight for name, weight in sdpa.items())
    assert all(model.training for model in models.values())


def test_a_variant_that_fails_is_reported_and_left_out(bench, capsys):
    def fail():
        raise RuntimeError("out of memory")

    times, peaks = bench.measure(benchmark.Problem({"sdpa": lambda: None, "2:4": fail}), 1)
    assert times.keys() == peaks.keys() == {"sdpa"}
    assert "2:4: RuntimeError: out of memory" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["random", "recorded"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_lists_skip_what_they_say(share, kind):
    q, k = (torch.randn(1, 32 * BLOCK_SIZE, heads, 8) for heads in (16, 2))
    problem = skip.Problem(q, k, k, "forward", [share], kind)
    mask = problem.mask(share)
    assert mask.shape == (16, 32, 32)
    assert mask.diagonal(dim1=1, dim2=2).all()
    assert not mask.triu(1).any()
    assert skip.skipped(mask) == pytest.approx(share, abs=0.01 if kind == "random" else 2 / 32)  # rounded up
    (entry,) = skip.METHODS["lists"](problem)
    assert (entry.method, entry.share_skipped, entry.selection_included) == ("lists", skip.skipped(mask), False)
    assert torch.equal(entry.call.args[0].blocks.mask(), mask)


def test_peers_get_the_same_lists():
    mask = torch.rand(3, 5, 5) < 0.5
    mask = mask.tril(-1) | torch.eye(5, dtype=torch.bool)
    found = torch.zeros_like(mask)
    for part in skip._split(mask):
        counts, indices = skip._lists(part)
        blocks = KeyBlocks(counts[0], indices[0], torch.zeros(1, dtype=torch.int32), BLOCK_SIZE, BLOCK_SIZE)
        assert not (found & blocks.mask()).any()
        found |= blocks.mask()
    assert torch.equal(found, mask)


@pytest.mark.parametrize("path", write_docs.PAGES, ids=lambda path: path.name)
def test_tables_of_pages_are_current(path):
    page = path.read_text(encoding="utf-8")
    assert write_docs.filled(page) == page, "run python benchmarks/write_docs.py"


def test_the_picture_is_current():
    assert write_docs.data_of_picture() in write_docs.PICTURE.read_text(encoding="utf-8"), (
        "run python benchmarks/write_docs.py"
    )


def test_tables_are_on_a_page():
    pages = "".join(path.read_text(encoding="utf-8") for path in write_docs.PAGES)
    assert [name for name in write_docs.TABLES if f"<!-- begin {name} -->" not in pages] == []


@pytest.mark.parametrize(
    ("ms", "text"), [(12279.0, "12.3 s"), (276.09, "276 ms"), (1.5, "1.50 ms"), (0.0146, "14.6 µs")]
)
def test_times_have_three_digits(ms, text):
    assert write_docs.milliseconds(ms) == text
