"""Model-Optimizer's metadata: files written by hand are read, ours are written, and what has no place is refused."""

import json
import math
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from test_families import dense_model
from transformers import AutoModelForCausalLM

import modelopt_lite as mtsa
from modelopt_lite.formats import MODELOPT_KEY, from_modelopt

CPU = ("torch", "cpu")
FILES = Path(__file__).parent / "modelopt"
FIRST, SECOND = "model.layers.0.self_attn", "model.layers.1.self_attn"


def skip(a, b, target, decode=None):
    """A method with a fit and a target, and with those of decode, (a, b, target), if it is sparse there."""
    content = {"target_sparsity": target, "calibration": {"prefill": {"form": "exponential", "a": a, "b": b}}}
    if decode is not None:
        content["calibration"]["decode"] = {"form": "exponential", "a": decode[0], "b": decode[1]}
        content["decode_target_sparsity"] = decode[2]
    return mtsa.SkipSoftmax(**content)


def n_of_m(n, m, sinks=0, window=64):
    return mtsa.SparseSoftmax(sparsity_n=n, sparsity_m=m, num_sink_tokens=sinks, dense_window_size=window)


# For each file, the methods of every layer in order, worked out by hand.
TWO_OF_FOUR = n_of_m(2, 4)
EXPECTED = {
    "groups": [TWO_OF_FOUR, mtsa.Combined(methods=(skip(7.93, 8.61, 0.4), TWO_OF_FOUR))],
    "coefficients": [skip(math.exp(2), 5.0, 0.4)] * 2,
    "softmax_skip_groups": [skip(math.exp(2), 5.0, 0.5), None],
    "shared_threshold": [skip(7.93, 8.61, 0.5, (0.12, 9.85, 0.5))] * 2,
    "top_level": [skip(100.0, 5.0, 0.7, (0.05, 10.0, 0.3)), None],
    "sparse_softmax": [n_of_m(4, 8, 2, 16)] * 2,
}


def metadata(name):
    return json.loads((FILES / f"{name}.json").read_text(encoding="utf-8"))[MODELOPT_KEY]


def methods(model):
    """The method of each layer, None where it is dense."""
    layers = dict(model.named_modules())
    found = [layers[row.name] for row in mtsa.summary(model)]
    return [x.sparse_attention.method if isinstance(x, mtsa.SparseAttentionModule) else None for x in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense model on the disk."""
    path = tmp_path_factory.mktemp("dense")
    dense_model("llama", CPU).save_pretrained(path)
    return path


def with_metadata(folder, path, content):
    """Copy a model, with metadata as Model-Optimizer writes it."""
    shutil.copytree(folder, path)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps(config | {MODELOPT_KEY: content}), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", EXPECTED)
def test_every_form_is_read(name, folder, tmp_path, caplog):
    """From a checkpoint, and from the file alone; and what was read is saved in our own form.

    N:M is dense in decode, so that a layer of both is too, which is said.
    """
    model = mtsa.from_pretrained(with_metadata(folder, tmp_path / "theirs", metadata(name)))
    assert methods(model) == EXPECTED[name]
    assert ("is left out in decode, which is dense in layers that are N:M" in caplog.text) == (name == "groups")
    by_file = mtsa.sparsify(dense_model("llama", CPU), FILES / f"{name}.json")
    assert methods(by_file) == EXPECTED[name]
    assert mtsa.SparsityConfig.load(metadata(name)) == mtsa.SparsityConfig.load(FILES / f"{name}.json")
    mtsa.save_pretrained(model, tmp_path / "ours")
    assert methods(mtsa.from_pretrained(tmp_path / "ours")) == EXPECTED[name]


@pytest.mark.parametrize("name", ["coefficients", "softmax_skip_groups", "shared_threshold", "top_level"])
def test_round_trips_of_skip_softmax(name, folder, tmp_path):
    check_round_trip(mtsa.from_pretrained(with_metadata(folder, tmp_path / "theirs", metadata(name))), tmp_path)


def check_round_trip(model, tmp_path):
    """Export a model, and read what was exported without our own key."""
    mtsa.export_modelopt(model, tmp_path / "exported")
    file = tmp_path / "exported" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    del config["modelopt_lite_sparsity"]
    file.write_text(json.dumps(config), encoding="utf-8")
    restored = mtsa.from_pretrained(tmp_path / "exported")
    assert methods(restored) == methods(model)
    return config[MODELOPT_KEY]


def test_round_trip_of_both_phases(tmp_path):
    """The form that its documentation shows, with coefficients and targets for prefill and decode."""
    written = check_round_trip(
        mtsa.sparsify(dense_model("llama", CPU), skip(7.93, 8.61, 0.4, (0.12, 9.85, 0.3))), tmp_path
    )
    assert written["config_groups"]["group_0"] == {
        "algorithm": "skip_softmax",
        "targets": ["LlamaAttention"],
        "threshold_scale_factor": {
            "formula": "a * exp(b * target_sparsity)",
            "prefill": {"a": 7.93, "b": 8.61},
            "decode": {"a": 0.12, "b": 9.85},
        },
        "target_sparsity": {"prefill": 0.4, "decode": 0.3},
    }


def test_decode_without_a_target_is_dense():
    content = metadata("top_level") | {"target_sparse_ratio": {"prefill": 0.7, "decode": 0.0}}
    assert mtsa.SparsityConfig.load(content).sparse_cfg["*"] == skip(100.0, 5.0, 0.7)


def test_round_trip_of_n_of_m(tmp_path):
    written = check_round_trip(mtsa.sparsify(dense_model("llama", CPU), n_of_m(4, 8, 2, 16)), tmp_path)
    assert written == {
        "config_groups": {
            "group_0": {
                "algorithm": "sparse_softmax",
                "targets": ["LlamaAttention"],
                "sparsity_n": 4,
                "sparsity_m": 8,
                "dense_sink_tokens": 2,
                "dense_recent_tokens": 16,
            }
        },
        "producer": {"name": "modelopt_lite", "version": mtsa.__version__},
    }


def test_round_trip_of_both_together(tmp_path):
    """Skip-softmax in one of the layers, N:M in all."""
    entries = {"*": TWO_OF_FOUR, "*.1.*": [skip(7.93, 8.61, 0.4), TWO_OF_FOUR]}
    written = check_round_trip(mtsa.sparsify(dense_model("llama", CPU), {"sparse_cfg": entries}), tmp_path)
    expected = metadata("groups")["config_groups"]
    del expected["group_0"]["threshold_scale_factor"]["decode"], expected["group_0"]["target_sparsity"]["decode"]
    assert written["config_groups"] == expected


def test_groups_of_different_classes(folder, tmp_path):
    """A checkpoint's classes say what a group is for; a file alone does not."""
    content = {
        "config_groups": {
            "group_0": {"algorithm": "sparse_softmax", "targets": ["LlamaAttention"], "sparsity_n": 1, "sparsity_m": 4},
            "group_1": {"algorithm": "sparse_softmax", "targets": ["Other"], "sparsity_n": 2, "sparsity_m": 4},
        }
    }
    with pytest.raises(mtsa.ConfigError, match=r"group_1.targets: \['Other'\] is not allowed; must be those of .*_0"):
        mtsa.SparsityConfig.load(content)
    with pytest.raises(mtsa.ConfigError, match=r"group_1.targets: 'Other' is not the class of an attention module"):
        mtsa.from_pretrained(with_metadata(folder, tmp_path / "model", content))


NM = {"algorithm": "sparse_softmax", "sparsity_n": 2, "sparsity_m": 4}
SCALE = {"formula": "a * exp(b * target_sparsity)", "prefill": {"a": 1.0, "b": 2.0}}
SKIP = {"algorithm": "skip_softmax", "threshold_scale_factor": SCALE}
BAD = [
    ({"algorithm": "future"}, r"group_0\.algorithm: 'future' is not allowed; must be one of skip_softmax, "),
    (NM | {"sparsity_n": 9}, r"group_0\.sparsity_n: 9 is not allowed; must be at most sparsity_m = 4"),
    (NM | {"magic": 1}, r"group_0\.magic: 1 is not allowed; unknown field"),
    (SKIP | {"initial_disabled_steps": 4}, r"group_0\.initial_disabled_steps: 4 is not allowed; the steps of a diff"),
    (SKIP | {"disabled_until_timestep": 0.8}, r"group_0\.disabled_until_timestep: 0\.8 is not allowed"),
    (SKIP | {"target_sparsity": 1.5}, r"group_0\.target_sparsity: 1\.5 is not allowed"),
    (
        SKIP | {"threshold_scale_factor": {"formula": "__import__('os').getcwd()", "prefill": {"a": 1.0, "b": 2.0}}},
        r"threshold_scale_factor\.formula: .*getcwd.* is not allowed; must be 'a \* exp.*: it is never evaluated",
    ),
    (
        SKIP | {"threshold_scale_factor": {"formula": "a * exp(b * target_sparsity)", "decode": {"a": 1.0, "b": 2.0}}},
        r"threshold_scale_factor\.prefill: missing; prefill is never dense here",
    ),
    (
        SKIP | {"threshold_scale_factor": {"formula": SCALE["formula"], "prefill": {"log_a": 1.0, "b": 2.0}}},
        r"threshold_scale_factor.(prefill|coefficients): a is missing",
    ),
    (
        SKIP | {"threshold_scale_factor": {"formula": SCALE["formula"], "prefill": {"a": 1.0, "b": 0.0}}},
        r"threshold_scale_factor\.prefill\.b: 0\.0 is not allowed; must be greater than 0",
    ),
    ({"algorithm": "skip_softmax"}, r"group_0\.threshold_scale_factor: missing; the field is required"),
]


@pytest.mark.parametrize(("group", "message"), BAD)
def test_what_is_not_known_is_refused(group, message, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({MODELOPT_KEY: {"config_groups": {"group_0": group}}}), encoding="utf-8")
    with pytest.raises(mtsa.ConfigError, match=rf"config\.json: {MODELOPT_KEY}\..*{message}"):
        mtsa.SparsityConfig.load(file)


def test_misplaced_content_is_refused(folder, tmp_path):
    with pytest.raises(mtsa.ConfigError, match=f"{MODELOPT_KEY}.config_groups: 3 is not allowed; must be a mapping"):
        mtsa.SparsityConfig.load({"config_groups": 3})
    with pytest.raises(mtsa.ConfigError, match=f"{MODELOPT_KEY}.magic: 1 is not allowed; unknown field"):
        mtsa.SparsityConfig.load({"config_groups": {"group_0": NM}, "magic": 1})
    with pytest.raises(mtsa.ConfigError, match="holds no group with an algorithm"):
        from_modelopt({"config_groups": {}})
    content = {"config_groups": {"group_0": SKIP | {"ignore": ["model.layers.7.self_attn"]}}}
    with pytest.raises(mtsa.ConfigError, match=r"group_0.ignore: 'model.layers.7.self_attn' is not an attention mod"):
        mtsa.from_pretrained(with_metadata(folder, tmp_path / "model", content))


TABLE = {"form": "table", "lengths": (64.0, 4096.0), "targets": (0.1, 0.9), "knobs": ((0.1, 1.0), (0.01, 0.1))}
CANNOT_BE_SAID = [
    ({"*": {"method": "mean_pool_top_k"}}, f"{FIRST}: mean_pool_top_k cannot be exported"),
    ({"*": "2:4", "*.1.*": "1:4"}, rf"{SECOND}: sparse_softmax\.sparsity_n: 1 cannot .* not that of {FIRST}"),
    ({"*.1.*": "2:4"}, f"{FIRST}: is not sparse_softmax as {SECOND} is, .* LlamaAttention N:M sparse"),
    ({"*": "2:4", "*.0.*": {**NM, "enable": False}}, f"{FIRST}: is not sparse_softmax as {SECOND} is"),
    ({"*": {"method": "skip_softmax"}}, f'{FIRST}: skip_softmax cannot .* without a calibration .*form="exponential"'),
    (
        {"*": mtsa.SkipSoftmax(target_sparsity=0.5, calibration={"prefill": TABLE})},
        f"{FIRST}: skip_softmax cannot be exported without a calibration of the form",
    ),
    (
        {"*": skip(1.0, 2.0, 0.5).model_copy(update={"decode_threshold": 0.1})},
        rf"{FIRST}: skip_softmax\.decode_threshold: 0\.1 cannot be exported; it has another value than the default",
    ),
    (
        {
            "*": mtsa.SkipSoftmax(
                target_sparsity=0.5,
                decode_target_sparsity=0.5,
                calibration={"prefill": {"form": "exponential", "a": 1.0, "b": 2.0}, "decode": TABLE},
            )
        },
        f"{FIRST}: skip_softmax cannot be exported without a calibration of the form",
    ),
    (
        {"*": skip(1.0, 2.0, 0.5, (1.0, 2.0, 0.3)), "*.1.*": skip(1.0, 2.0, 0.5, (1.0, 2.0, 0.4))},
        rf"{SECOND}: skip_softmax\.decode_target_sparsity: 0\.4 cannot be exported; it is not that of {FIRST}",
    ),
    (
        {"*": skip(1.0, 2.0, 0.5).model_copy(update={"num_sink_tokens": 9})},
        rf"{FIRST}: skip_softmax\.num_sink_tokens: 9 cannot be exported; it has another value than the default",
    ),
    (
        {"*": skip(1.0, 2.0, 0.5), "*.1.*": skip(1.0, 2.0, 0.6)},
        rf"{SECOND}: skip_softmax\.target_sparsity: 0\.6 cannot be exported; it is not that of {FIRST}",
    ),
    ({"*": {"method": "skip_softmax", "enable": False}}, "no layer that is sparse and switched on"),
]


def entry(value):
    """A method by its name, N:M or fields."""
    if isinstance(value, str):
        return mtsa.SparsityConfig.load(value).sparse_cfg["*"]
    if isinstance(value, dict) and "algorithm" in value:
        return {"method": value["algorithm"], **{name: x for name, x in value.items() if name != "algorithm"}}
    return value


@pytest.mark.parametrize(("entries", "message"), CANNOT_BE_SAID)
def test_what_the_format_cannot_say_is_refused(entries, message, tmp_path):
    """Before anything is written."""
    config = {"sparse_cfg": {pattern: entry(value) for pattern, value in entries.items()}}
    model = mtsa.sparsify(dense_model("llama", CPU), config)
    with pytest.raises(mtsa.UnsupportedError, match=message):
        mtsa.export_modelopt(model, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own
def test_adapters_are_not_exported(tmp_path):
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(mtsa.sparsify(dense_model("llama", CPU), "2:4"), lora)
    with pytest.raises(mtsa.UnsupportedError, match="is not a Transformers model; merge adapters before exporting"):
        mtsa.export_modelopt(model, tmp_path)


def test_our_own_metadata_under_its_old_key_is_still_read(folder, tmp_path):
    """It is saved under the new key alone."""
    old = {"version": 1, "sparse_cfg": [["*", {"method": "sparse_softmax", "sparsity_n": 1, "sparsity_m": 4}]]}
    model = mtsa.from_pretrained(with_metadata(folder, tmp_path / "old", old))
    assert methods(model) == [n_of_m(1, 4)] * 2
    mtsa.save_pretrained(model, tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text(encoding="utf-8"))
    assert MODELOPT_KEY not in config
    assert methods(mtsa.from_pretrained(tmp_path / "new")) == methods(model)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own
def test_the_old_file_beside_an_adapter_is_still_read(folder, tmp_path):
    base = mtsa.sparsify(AutoModelForCausalLM.from_pretrained(folder), "1:4")
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    mtsa.save_pretrained(model, tmp_path)
    (tmp_path / "modelopt_lite_sparsity.json").rename(tmp_path / "sparse_attention_config.json")
    assert methods(mtsa.from_pretrained(tmp_path)) == methods(base)
