"""Calibration: what is counted in one pass is what each value keeps by itself; the result travels with the config."""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_model import save_tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import modelopt_lite as mtsa
from modelopt_lite import calibration, cli
from modelopt_lite.calibration import TARGETS, _exponential_fit, _table_fit, _Tables
from modelopt_lite.kernels import visited_blocks
from modelopt_lite.kernels.blocks import BlockGrid
from modelopt_lite.kernels.request import AttentionRequest
from modelopt_lite.kernels.selection import chosen_blocks
from modelopt_lite.methods.calibrated import Calibration, ExponentialFit, TableFit
from modelopt_lite.models.module import count, sparse_modules
from modelopt_lite.plan import DENSE

GRID = {"block_size": 16, "block_rows": 16}
# Random weights see far and near alike, so that it takes many sinks as references before anything can be skipped.
SKIP = {"method": "skip_softmax", "num_sink_tokens": 96, "dense_window_size": 32, **GRID}
METHODS = {
    "skip_softmax": SKIP,
    "flash_prefill": {"method": "flash_prefill", "first_blocks": 1, "recent_blocks": 1, **GRID},
    "xattention": {"method": "xattention", **GRID},
    "mean_pool_top_k": {"method": "mean_pool_top_k", "per_kv_head": True, **GRID},
}
KNOBS = {
    "flash_prefill": [[0.3, 0.8], [0.4, 0.9]],
    "xattention": [[0.9, 0.3], [0.95, 0.4]],
    "skip_softmax": [[0.5, 2.0], [0.1, 0.8]],
    "mean_pool_top_k": [[0.8, 0.3], [0.7, 0.2]],
}
TABLE = {"form": "table", "lengths": [64.0, 1024.0], "targets": [0.2, 0.6], "knobs": KNOBS["skip_softmax"]}
EXPONENTIAL = {"form": "exponential", "a": 9.0, "b": 6.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), 1024)


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def windows(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (length,), generator=generator) for length in lengths]


def calibrate(model, config, data, target=0.5, refine=False, **options):
    return mtsa.calibrate(model, config, data, target=target, refine=refine, show_progress=False, **options)


def knobs(config):
    return torch.tensor(config.sparse_cfg["*"].calibration.prefill.knobs)


def packed_request(plan, lengths_q=(200, 33, 0, 1), lengths_k=(200, 90, 5, 40)):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(sum(lengths_q), 4, 16, generator=generator) * 2
    k, v = (torch.randn(sum(lengths_k), 2, 16, generator=generator) for _ in range(2))
    starts_q, starts_k = (
        torch.tensor([0, *lengths[:-1]], dtype=torch.int32).cumsum(0).int() for lengths in (lengths_q, lengths_k)
    )
    return AttentionRequest(
        q=q, k=k, v=v, s_aux=None, starts_q=starts_q, lengths_q=torch.tensor(lengths_q, dtype=torch.int32),
        max_q=max(lengths_q), starts_k=starts_k, lengths_k=torch.tensor(lengths_k, dtype=torch.int32),
        max_k=max(lengths_k), is_causal=True, softmax_scale=0.25, sliding_window=None, softcap=None, plan=plan,
    )  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_one_pass_counts_what_each_value_keeps_by_itself(name):
    method = mtsa.get_sparse_method(name).model_validate(METHODS[name])
    plans = [method.with_knob(value).plan() for value in method.knob.values]
    request = packed_request(plans[0])
    seen, visited = visited_blocks(request, plans)
    assert torch.equal(seen, BlockGrid(request, 16, 16).seen().sum(-1))
    assert len({counts.sum().item() for counts in visited}) > 5  # the values differ
    for plan, counts in zip(plans, visited, strict=True):
        selected, skipped = chosen_blocks(request._replace(plan=plan))
        kept = selected if skipped is None else selected & ~skipped
        expected = kept.sum(-1).repeat_interleave(4 // kept.shape[0], 0)
        assert torch.equal(counts, expected)


def test_a_combined_rule_takes_part_in_the_count():
    method = mtsa.Combined(methods=(mtsa.SkipSoftmax(**SKIP), mtsa.SparseSoftmax(sparsity_n=1)))
    skip = method.methods[0]
    plans = [mtsa.Combined(methods=(skip.with_knob(x), method.methods[1])).plan() for x in (0.01, 0.3, 2.0, 9.0)]
    request = packed_request(plans[0], (200,), (200,))
    _, visited = visited_blocks(request, plans)
    for plan, counts in zip(plans, visited, strict=True):
        selected, skipped = chosen_blocks(request._replace(plan=plan))
        assert torch.equal(counts, (selected & ~skipped).sum(-1))


def test_two_selectors_cannot_be_counted_at_once():
    method = mtsa.Combined(methods=(mtsa.SkipSoftmax(**GRID), mtsa.MeanPoolTopK(**GRID)))
    with pytest.raises(ValueError, match="either a block selector or a skip rule"):
        visited_blocks(packed_request(method.plan()), [method.plan()])


@pytest.mark.parametrize("name", METHODS)
def test_the_target_is_achieved(model, name):
    result = calibrate(model, METHODS[name], windows(512, 1024, 1024), target=0.5)
    mtsa.sparsify(model, result.config)
    with torch.no_grad(), mtsa.collect_statistics(model) as statistics:
        model(windows(900)[0][None])
    # The fit is over two layers of a random model, and the mean of a hundred tokens says little.
    assert statistics.total.block_sparsity == pytest.approx(0.5, abs=0.08)
    assert not result.warnings
    assert name in str(result)


@pytest.mark.parametrize("name", ["skip_softmax", "xattention"])
def test_a_refined_calibration_reads_sparse_activations(model, name, tmp_path):
    data, state = windows(512, 1024), tmp_path / "state.jsonl"
    first = calibrate(model, METHODS[name], data)
    refined = calibrate(model, METHODS[name], data, refine=True, state=state)
    assert len(state.read_text().splitlines()) == 1 + 4 * len(data)
    assert not torch.equal(knobs(refined.config), knobs(first.config))
    mtsa.sparsify(model, refined.config)
    with torch.no_grad(), mtsa.collect_statistics(model) as statistics:
        model(data[1][None])
    assert statistics.total.block_sparsity == pytest.approx(0.5, abs=0.08)


# A step has fewer references: the 48 first and the 16 latest keys, and those of its own block.
DECODE = {**SKIP, "num_sink_tokens": 48, "dense_window_size": 16}


def decode_knobs(config):
    return torch.tensor(config.sparse_cfg["*"].calibration.decode.knobs)


def read_in_steps(model, window):
    """Read a window as a calibration of decode does."""
    cache, begin = None, 0
    with torch.no_grad():
        for position in calibration.decode_positions(len(window)):
            for part in (window[None, begin:position], window[None, position : position + 1]):
                if part.numel():
                    cache = model(part, past_key_values=cache, use_cache=True).past_key_values
            begin = position + 1


def test_steps_of_decode_are_spread():
    positions = calibration.decode_positions(4096)
    assert len(set(positions)) == calibration.DECODE_STEPS
    assert all(len([x for x in positions if x // 1024 == part]) == 4 for part in range(4))
    assert {x % 128 // 32 for x in positions} == {0, 1, 2, 3}


def test_one_pass_counts_what_each_threshold_keeps_of_decode_steps_by_itself(model):
    """The steps of the dense model, looked at with one threshold after the other."""
    (window,) = windows(400)
    result = calibrate(model, DECODE, [window], target=None, decode_target=0.5)
    steps: dict[str, list[AttentionRequest]] = {}

    class Recorder:
        def __init__(self, name):
            self.calls = steps.setdefault(name, [])

        def observe(self, request):
            if request.max_q == 1:
                self.calls.append(request)
            return request._replace(plan=DENSE)

    method = mtsa.SkipSoftmax(**DECODE)
    mtsa.sparsify(model, method.with_knob(0.5, "decode"))
    with count({module: Recorder(name) for name, module in sparse_modules(model).items()}):
        read_in_steps(model, window)
    assert {len(calls) for calls in steps.values()} == {calibration.DECODE_STEPS}
    assert {(group.phase, group.layer) for group in result.groups} == {("decode", name) for name in steps}
    for i, value in enumerate(result.values["*"]):
        plan = method.with_knob(value, "decode").plan()
        for name, calls in steps.items():
            skipped = sum(chosen_blocks(request._replace(plan=plan))[1].sum((1, 2)) for request in calls)
            seen = sum(-(-request.max_k // 16) for request in calls)
            shares = [group.sparsity[i] for group in result.groups if group.layer == name]
            assert shares == [1 - (2 * seen - x) / (2 * seen) for x in skipped.view(2, 2).sum(1).tolist()]
    assert len({group.sparsity for group in result.groups}) > 1


@pytest.mark.parametrize("form", ["table", "exponential"])
def test_the_target_of_decode_is_achieved(model, form):
    """Prefill has a target of its own."""
    data = windows(512, 1024, 1024)
    result = calibrate(model, DECODE, data, target=0.3, decode_target=0.5, form=form)
    method = result.config.sparse_cfg["*"]
    assert (method.target_sparsity, method.decode_target_sparsity) == (0.3, 0.5)
    alone = calibrate(model, DECODE, data, target=0.3, form=form).config.sparse_cfg["*"]
    assert method.calibration.prefill == alone.calibration.prefill
    assert alone.calibration.decode is None
    mtsa.sparsify(model, result.config)
    with mtsa.collect_statistics(model, exact=True) as statistics:
        read_in_steps(model, windows(900)[0])
    assert statistics.total.decode.block_sparsity == pytest.approx(0.5, abs=0.08)
    assert [line.split("│")[3].strip() for line in str(result).splitlines() if "skip_softmax" in line] == [
        "prefill",
        "decode",
    ]
    assert {reach.phase for reach in result.reach} == {group.phase for group in result.groups} == {"prefill", "decode"}


def test_decode_alone_leaves_prefill_as_it_is(model, tmp_path, caplog):
    data = windows(512, 1024)
    config = calibrate(model, DECODE, data, target=None, decode_target=0.4).config
    method = config.sparse_cfg["*"]
    assert (method.threshold, method.target_sparsity, method.calibration.prefill) == (0.03, None, None)
    assert {"threshold", "decode_target_sparsity"} <= set(method.settings())
    assert not {"target_sparsity", "decode_threshold", "calibration"} & set(method.settings())
    both = calibrate(model, config, data, target=0.5).config.sparse_cfg["*"]
    assert both.calibration.decode == method.calibration.decode
    assert (both.target_sparsity, both.decode_target_sparsity) == (0.5, 0.4)

    again = config.with_target(decode_target_sparsity=0.6)
    measured = calibrate(model, DECODE, data, target=None, decode_target=0.6).config
    assert torch.equal(decode_knobs(again), decode_knobs(measured))
    again.save(tmp_path / "config.yaml")
    assert mtsa.SparsityConfig.load(tmp_path / "config.yaml") == again == measured
    mtsa.sparsify(model, again)
    model.save_pretrained(tmp_path / "model")
    loaded = mtsa.from_pretrained(tmp_path / "model")
    tokens = windows(300)[0][None]
    with torch.no_grad():
        steps = [
            each(tokens[:, -1:], past_key_values=each(tokens[:, :-1], use_cache=True).past_key_values).logits
            for each in (loaded, model)
        ]
    assert torch.equal(*steps)
    assert not caplog.records
    again.with_target(decode_target_sparsity=0.99)
    assert "the target 0.99 lies outside of" in caplog.text
    assert "its calibration of decode has points" in caplog.text
    with pytest.raises(mtsa.ConfigError, match="has no method calibrated for prefill"):
        again.with_target(0.5)


def test_a_refined_calibration_of_decode_goes_on(model, tmp_path, monkeypatch):
    data, state = windows(256, 512), tmp_path / "state.jsonl"
    options = {"target": 0.5, "decode_target": 0.5, "refine": True}
    whole = calibrate(model, DECODE, data, **options)
    measure, calls = calibration._measure_decode, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(calibration, "_measure_decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, DECODE, data, state=state, **options)
    assert not sparse_modules(model)
    assert len(state.read_text().splitlines()) == 1 + 4 * len(data) + 4
    resumed = calibrate(model, DECODE, data, state=state, **options)
    assert resumed.config == whole.config
    assert len(calls) == 1 + 4 * len(data)
    # Another target of prefill says nothing about decode, where the cache is dense.
    other = calibrate(model, DECODE, data, state=state, **{**options, "target": 0.3})
    assert torch.equal(decode_knobs(other.config), decode_knobs(whole.config))
    assert len(calls) == 1 + 4 * len(data)
    dense = calibrate(model, DECODE, data, target=None, decode_target=0.5)
    assert not torch.equal(decode_knobs(dense.config), decode_knobs(whole.config))


def test_a_target_of_decode_outside_of_what_was_seen_is_reported(model, caplog):
    result = calibrate(model, {**DECODE, "dense_window_size": 400}, windows(512, 1024), target=None, decode_target=0.8)
    assert any("the target 0.8 lies outside of" in x and "512 tokens in decode" in x for x in result.warnings)
    assert result.warnings[0] in caplog.text


def test_groups_say_what_each_head_group_skips(model):
    result = calibrate(model, METHODS["mean_pool_top_k"], windows(512), target=0.5)
    assert [(group.layer, group.group) for group in result.groups] == [
        (f"model.layers.{layer}.self_attn", group) for layer in (0, 1) for group in (0, 1)
    ]
    blocks = range(1, 33)
    for group in result.groups:
        for keep, sparsity in zip(result.values["*"], group.sparsity, strict=True):
            kept = sum(max(math.ceil(keep * n - 1e-9), min(n, 2)) for n in blocks)
            assert sparsity == pytest.approx(1 - kept / sum(blocks))


def test_the_model_stays_dense_and_must_be_dense(model):
    before = model(windows(64)[0][None]).logits
    calibrate(model, METHODS["mean_pool_top_k"], windows(256, 512))
    assert torch.equal(model(windows(64)[0][None]).logits, before)
    mtsa.sparsify(model, "2:4")
    with pytest.raises(mtsa.ConfigError, match="model: is sparse already"):
        calibrate(model, METHODS["mean_pool_top_k"], windows(256))


def test_the_target_changes_without_measuring(model, tmp_path, caplog):
    config = calibrate(model, METHODS["flash_prefill"], windows(512, 1024), target=0.3).config
    again = config.with_target(0.6)
    measured = calibrate(model, METHODS["flash_prefill"], windows(512, 1024), target=0.6).config
    assert torch.equal(knobs(again), knobs(measured))
    assert again.sparse_cfg["*"].settings()["target_sparsity"] == 0.6
    assert "alpha" not in again.sparse_cfg["*"].settings()
    again.save(tmp_path / "config.yaml", "made by a test\nfor a test")
    assert mtsa.SparsityConfig.load(tmp_path / "config.yaml") == again
    assert (tmp_path / "config.yaml").read_text().startswith("# made by a test\n# for a test\nsparse_cfg:")
    mtsa.sparsify(model, again)
    model.save_pretrained(tmp_path / "model")
    loaded = mtsa.from_pretrained(tmp_path / "model")
    tokens = windows(300)[0][None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert not caplog.records
    config.with_target(0.99)
    assert "flash_prefill: the target 0.99 lies outside of" in caplog.text
    with pytest.raises(mtsa.ConfigError, match="target_sparsity: 1.2 is not allowed"):
        config.with_target(1.2)
    with pytest.raises(mtsa.ConfigError, match="has no method calibrated for prefill"):
        mtsa.SparsityConfig.load("2:4").with_target(0.5)


def test_a_list_and_several_patterns(model):
    config = {
        "sparse_cfg": {
            "default": [METHODS["xattention"], {"method": "sparse_softmax"}],
            "*.1.*": METHODS["mean_pool_top_k"],
        }
    }
    result = calibrate(model, config, windows(512, 1024))
    combined, other = result.config.sparse_cfg["default"], result.config.sparse_cfg["*.1.*"]
    assert combined.methods[0].target_sparsity == other.target_sparsity == 0.5
    assert combined.methods[0].calibration != other.calibration
    assert combined.methods[1] == mtsa.SparseSoftmax()
    assert result.config.with_target(0.7).sparse_cfg["default"].methods[0].target_sparsity == 0.7


def test_an_interrupted_calibration_goes_on(model, tmp_path, monkeypatch):
    data, state = windows(256, 300, 512), tmp_path / "state.jsonl"
    whole = calibrate(model, METHODS["xattention"], data)
    measure, calls = calibration._measure, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(calibration, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, METHODS["xattention"], data, state=state)
    assert not [m for m in model.modules() if isinstance(m, mtsa.SparseAttentionModule)]
    with state.open("a") as file:
        file.write('{"name": "half a li')
    resumed = calibrate(model, METHODS["xattention"], data, state=state)
    assert torch.equal(knobs(resumed.config), knobs(whole.config))
    assert len(calls) == 4
    again = calibrate(model, METHODS["xattention"], data, state=state, target=0.3)
    assert len(calls) == 4
    assert again.config.sparse_cfg["*"].target_sparsity == 0.3
    with pytest.raises(mtsa.ConfigError, match=r"is the state of another measurement \(config, values\)"):
        calibrate(model, SKIP, data, state=state)
    state.write_text("something else\n")
    with pytest.raises(mtsa.ConfigError, match="is not the state of an earlier measurement"):
        calibrate(model, SKIP, data, state=state)


def test_a_target_outside_of_what_was_seen_is_reported(model, caplog):
    config = {**METHODS["flash_prefill"], "first_blocks": 4, "recent_blocks": 12}
    result = calibrate(model, config, windows(512, 1024), target=0.8)
    assert len(result.warnings) == 2
    assert "the target 0.8 lies outside of" in caplog.text
    assert "which was seen at 512 tokens" in result.warnings[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": 1.0}, "target: 1.0 is not allowed"),
        ({"target": None}, "target: is missing; must have target or decode_target"),
        ({"decode_target": 0.0}, "decode_target: 0.0 is not allowed"),
        ({"decode_target": 0.5}, "decode_target: is not allowed without skip_softmax"),
        (
            {  # nothing is read before that
                "config": [{"method": "skip_softmax", **GRID}, {"method": "sparse_softmax"}],
                "target": 0.5,
                "decode_target": 0.5,
                "data": [],
            },
            "decode_target: cannot be calibrated with this config: .* skip_softmax and sparse_softmax, one is sparse",
        ),
        ({"config": "2:4"}, "has no method with a knob"),
        (
            {"config": [METHODS["xattention"], {"method": "skip_softmax", **GRID}]},
            "xattention and skip_softmax both have",
        ),
        ({"config": METHODS["xattention"], "form": "exponential"}, "form: 'exponential' is not allowed for xattention"),
        ({"data": []}, "data: is empty"),
        ({"data": torch.zeros(3)}, r"data.0: \[3\] of torch.float32 is not allowed"),
        ({"data": windows(2000)}, "data.0: 2000 is not allowed; must be at most 1024"),
        ({"data": "sotu"}, "tokenizer: None is not allowed"),
        ({"data": windows(40)}, "cannot be fitted; fewer than three values of keep"),
    ],
)
def test_what_is_refused(model, change, message):
    options = {"config": METHODS["mean_pool_top_k"], "data": windows(256), **change}
    if isinstance(options["config"], list):
        options["config"] = {"sparse_cfg": {"*": options["config"]}}
    with pytest.raises(mtsa.ConfigError, match=message):
        calibrate(model, options.pop("config"), options.pop("data"), **options)


def synthetic_tables(method, sparsity):
    """Counts whose sparsity is a given function of the knob and the length."""
    tables = _Tables("*", method)
    numbers = torch.arange(0, 257).double()
    seen = numbers * 1000
    visited = torch.stack(
        [seen * (1 - torch.tensor([sparsity(x, max(1, n) * 16) for n in numbers.tolist()])) for x in method.knob.values]
    )
    tables.begin(4096)
    tables.add("layer", {"seen": seen.tolist(), "visited": visited.tolist(), "groups": [[0]], "seen_by_group": 1})
    return tables


def exponential(threshold, length, shift=0.0):
    """The sparsity that EXPONENTIAL says, less a shift."""
    share = (math.log(threshold * length) - math.log(EXPONENTIAL["a"])) / EXPONENTIAL["b"] - shift
    return min(1.0, max(0.0, share))


@pytest.mark.parametrize("fit", [_table_fit, _exponential_fit])
@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_a_fit_finds_what_the_counts_were_made_from(fit, shift):
    """With a shift the counts of the sparse model differ from those of the dense one, and they are what counts."""
    method = mtsa.SkipSoftmax(**GRID)
    sparse = synthetic_tables(method, lambda *at: exponential(*at, shift))
    refined = {} if shift == 0 else dict.fromkeys((0.3, 0.5, 0.7), sparse)
    found = fit(synthetic_tables(method, exponential), refined)
    for target in (0.3, 0.4, 0.5, 0.6, 0.7):
        curve = found.curve(target, method.knob)
        for length in (128, 1000, 3000):
            threshold = curve.at(torch.tensor(length)).exp().item()
            assert exponential(threshold, length, shift) == pytest.approx(target, abs=0.02)
        calibrated = method.model_copy(update={"target_sparsity": target, "calibration": Calibration(prefill=found)})
        assert sparse.skipped(sparse.windows[0], calibrated) == pytest.approx(target, abs=0.02)


def test_a_target_that_no_value_reaches_takes_the_nearest_one():
    method = mtsa.SkipSoftmax(**GRID)
    tables = synthetic_tables(method, lambda threshold, _: 0.2 + 0.4 * (threshold >= 0.1) + 0.1 * (threshold >= 1.0))
    row = _table_fit(tables, {}).knobs[-1]
    assert [row[TARGETS.index(x)] for x in (0.1, 0.9)] == pytest.approx([10**-1.25, 1.0])


def test_a_curve_stops_at_its_ends():
    curve = TableFit(**TABLE).curve(0.4, mtsa.SkipSoftmax.knob)
    at = curve.at(torch.tensor([0, 1, 64, 256, 1024, 9999]))
    ends = [(math.log(a) + math.log(b)) / 2 for a, b in KNOBS["skip_softmax"]]
    assert at.tolist() == pytest.approx([ends[0]] * 3 + [sum(ends) / 2] + [ends[1]] * 2)
    for outside, edge in ((0.01, 0.2), (0.99, 0.6)):
        assert TableFit(**TABLE).curve(outside, mtsa.SkipSoftmax.knob) == TableFit(**TABLE).curve(
            edge, mtsa.SkipSoftmax.knob
        )
    thresholds = ExponentialFit(**EXPONENTIAL).curve(0.5, mtsa.SkipSoftmax.knob).at(torch.tensor([1000, 2000])).exp()
    assert thresholds.tolist() == pytest.approx([9 * math.exp(3) / 1000, 9 * math.exp(3) / 2000])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [64.0, 64.0]}, "lengths that ascend"),
        ({"targets": []}, "targets that ascend"),
        ({"knobs": [[0.5, 2.0]]}, "a number for each length and target"),
        ({"lengths": [0.5, 64.0]}, "lengths >= 1"),
        ({"knobs": [[0.5, 2.0], [0.1, -0.8]]}, "values of threshold as calibration.prefill.knobs"),
    ],
)
def test_a_table_that_is_none_is_refused(change, message):
    with pytest.raises(mtsa.ConfigError, match=message):
        mtsa.SkipSoftmax(target_sparsity=0.5, calibration={"prefill": TABLE | change})


def test_calibration_and_target_belong_together():
    with pytest.raises(mtsa.ConfigError, match=r"decode_target_sparsity and calibration\.decode together"):
        mtsa.SkipSoftmax(decode_target_sparsity=0.5)
    with pytest.raises(mtsa.ConfigError, match=r"no calibration\.decode, because flash_prefill is dense in decode"):
        mtsa.FlashPrefill(calibration=Calibration(decode=EXPONENTIAL))
    with pytest.raises(mtsa.ConfigError, match="must have prefill or decode"):
        Calibration()
    with pytest.raises(mtsa.ConfigError, match=r"target_sparsity and calibration\.prefill together"):
        mtsa.SkipSoftmax(target_sparsity=0.5)
    with pytest.raises(mtsa.ConfigError, match="keep has no logarithmic scale"):
        mtsa.MeanPoolTopK(target_sparsity=0.5, calibration=Calibration(prefill=EXPONENTIAL))
    method = mtsa.SkipSoftmax(target_sparsity=0.5, calibration=Calibration(prefill=EXPONENTIAL))
    assert mtsa.SkipSoftmax.model_validate(json.loads(method.model_dump_json())) == method


def calibrated(name, **more):
    fit = TABLE | {"knobs": KNOBS[name], "lengths": [16.0, 1024.0]}
    content = {**METHODS[name], "target_sparsity": 0.4, "calibration": {"prefill": fit, **more}}
    if more:
        content["decode_target_sparsity"] = 0.3
    return mtsa.get_sparse_method(name).model_validate(content)


@pytest.mark.parametrize("name", METHODS)
def test_a_calibrated_method_is_what_its_reference_says(name):
    # The oracle runs the FP64 reference; float64 inputs leave no near ties.
    from modelopt_lite.kernels import compute
    from modelopt_lite.kernels.reference import attention_reference

    plan = calibrated(name).plan()
    request = packed_request(plan, (150, 40, 1), (150, 90, 40))
    request = request._replace(q=request.q.double(), k=request.k.double(), v=request.v.double())
    _, visited = visited_blocks(request, [plan])
    assert visited.sum() < visited_blocks(request, [mtsa.MeanPoolTopK(keep=1.0, **GRID).plan()])[1].sum()
    torch.testing.assert_close(compute(request, "torch")[0], attention_reference(request)[0])


def test_calibrated_decode_is_what_its_reference_says():
    """Sequences with a single query follow the curve of decode, others in the same call that of prefill."""
    from modelopt_lite.kernels import compute
    from modelopt_lite.kernels.reference import attention_reference

    decode = TABLE | {"lengths": [16.0, 256.0], "knobs": [[0.9, 3.0], [0.2, 1.5]]}
    plan = calibrated("skip_softmax", decode=decode).plan()
    request = packed_request(plan, (150, 1, 1, 1), (150, 250, 140, 40))
    request = request._replace(q=request.q.double(), k=request.k.double(), v=request.v.double())
    _, visited = visited_blocks(request, [plan])
    _, as_prefill = visited_blocks(request, [calibrated("skip_softmax").with_knob(0.5, "decode").plan()])
    assert not torch.equal(visited[:, :, 10:], as_prefill[:, :, 10:])
    torch.testing.assert_close(compute(request, "torch")[0], attention_reference(request)[0])
    thresholds = plan.skip.of_decode().log_threshold(torch.tensor([16, 64, 256])).exp()
    expected = [low**0.75 * high**0.25 for low, high in decode["knobs"]]  # 0.3 lies a quarter of the way to 0.6
    assert thresholds[[0, 2]].tolist() == pytest.approx(expected)
    assert thresholds[1] == pytest.approx(math.sqrt(expected[0] * expected[1]))


@pytest.mark.parametrize("name", METHODS)
def test_chunks_of_whole_query_blocks_change_nothing(model, name):
    mtsa.sparsify(model, calibrated(name))
    tokens = windows(160)[0][None]
    with torch.no_grad():
        whole = model(tokens).logits
        first = model(tokens[:, :96], use_cache=True)
        second = model(tokens[:, 96:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, second], 1), whole, atol=1e-4, rtol=1e-4)


def test_texts_and_generated_samples(model, folder, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = Path(tmp_path / "text.txt")
    text.write_text("The lighthouse was finished in the autumn, after three winters of work. " * 40)
    options = {"tokenizer": tokenizer, "lengths": [512, 1024], "windows": 2}
    calibrate(model, METHODS["xattention"], [str(text), "ruler"], **options)
    with pytest.raises(mtsa.ConfigError, match="must have windows = 9 windows of 1024 tokens, has 2"):
        calibrate(model, METHODS["xattention"], str(text), tokenizer=tokenizer, lengths=[1024], windows=9)


def test_command(folder, tmp_path, monkeypatch):
    text, output = tmp_path / "text.txt", tmp_path / "half.yaml"
    text.write_text("The lighthouse was finished in the autumn, after three winters of work. " * 40)
    (tmp_path / "method.yaml").write_text(json.dumps(METHODS["xattention"]))
    arguments = [
        "calibrate",
        folder,
        output,
        "--sparse",
        tmp_path / "method.yaml",
        "--text",
        text,
        "--lengths",
        "512,1024",
    ]
    arguments += ["--windows", "1", "--target", "0.4", "--state", tmp_path / "state.jsonl"]

    def invoke(*more):
        return CliRunner().invoke(cli.app, [str(argument) for argument in [*arguments, *more]])

    with monkeypatch.context() as patch:
        patch.setattr(calibration, "_measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        result = invoke()
        assert (result.exit_code, result.stderr.splitlines()[-1]) == (130, "interrupted; the same command goes on")
    result = invoke()
    assert result.exit_code == 0, result.output
    assert f"written to {output}" in result.stdout.replace("\n", "")
    config = mtsa.SparsityConfig.load(output)
    assert config.sparse_cfg["*"].target_sparsity == 0.4
    assert output.read_text().startswith("# Written by modelopt-lite calibrate")
    result = invoke()
    assert (result.exit_code, result.stderr) == (2, f"error: {output}: is not allowed; must not exist yet\n")
    output.unlink()
    result = invoke("--json")
    assert json.loads(result.stdout)["config"] == json.loads(config.model_dump_json())
    output.unlink()
    assert "--form: 'cubic' is not allowed" in invoke("--form", "cubic").stderr
    assert "--decode-target: 2.0 is not allowed" in invoke("--decode-target", "2").stderr


def test_command_with_a_target_of_decode_alone(folder, tmp_path):
    """It leaves prefill as the configuration has it."""
    text, output, method = tmp_path / "text.txt", tmp_path / "decode.yaml", tmp_path / "method.yaml"
    text.write_text("The lighthouse was finished in the autumn, after three winters of work. " * 40)
    method.write_text(json.dumps(DECODE))
    arguments = ["calibrate", folder, output, "--sparse", method, "--text", text, "--lengths", "512,1024"]
    arguments += ["--windows", "1", "--decode-target", "0.4", "--no-refine"]
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    found = mtsa.SparsityConfig.load(output).sparse_cfg["*"]
    assert (found.target_sparsity, found.decode_target_sparsity) == (None, 0.4)
    assert "target of decode 0.4" in output.read_text()
    assert "decode_threshold = " in result.stdout
