"""Lists of methods: what fits together, and that it means the same wherever it goes."""

import copy
import json

import pytest
import torch
from tiny_model import save_tiny_model
from transformers import AutoModelForCausalLM

import modelopt_lite as mtsa
from modelopt_lite import plan as plans
from modelopt_lite.config import SparsityConfig

FLASH = {"method": "flash_prefill", "block_size": 16, "block_rows": 16, "recent_blocks": 1, "alpha": 0.9}
SKIP = {"method": "skip_softmax", "block_size": 16, "block_rows": 16, "threshold": 0.5, "dense_window_size": 3}
N_OF_M = {"method": "sparse_softmax", "sparsity_n": 1, "num_sink_tokens": 5, "dense_window_size": 2}


def load(*methods):
    return SparsityConfig.load({"sparse_cfg": {"*": list(methods)}}).sparse_cfg["*"]


def test_plan_has_every_part():
    plan = load(FLASH, N_OF_M, SKIP).shared_plan()
    assert (plan.blocks.block_size, plan.skip.threshold, plan.group, plan.hook_constants) == (16, 0.5, 4, (1,))
    assert (plan.num_sink_tokens, plan.dense_window_size) == (5, 3), "a key is exempt if one of the methods says so"


def test_a_list_of_one_is_its_method():
    assert load(FLASH) == mtsa.FlashPrefill.model_validate(FLASH)


def test_plan_is_found_again_by_its_name():
    plan = load(FLASH, N_OF_M, SKIP).shared_plan()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "_plans", {})
        again = plans.plan_by_name(plan.name)
    assert again is not plan
    assert again.name == plan.name
    assert (again.skip, again.group, again.num_sink_tokens) == (plan.skip, plan.group, plan.num_sink_tokens)
    assert again.blocks.choose.__self__ == plan.blocks.choose.__self__
    assert load(FLASH, N_OF_M, SKIP).shared_plan() is plan


def test_how_it_runs_is_no_part_of_the_plan():
    others = [{**part, "backend": "torch", "enable": False} for part in (FLASH, N_OF_M)]
    combined = load(*others)
    assert (combined.backend, combined.enable) == ("torch", False)
    assert combined.shared_plan() is load(FLASH, N_OF_M).shared_plan()


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([], r"sparse_cfg.\*: \[\] is not allowed; must be a list of at least one method"),
        ([FLASH, "sparse_softmax"], r"methods.1: 'sparse_softmax' is not allowed; must be a mapping with 'method'"),
        ([FLASH, {"enable": False}], r"methods.1: {'enable': False} is not allowed; must be a mapping with 'method'"),
        ([FLASH, {"method": "no"}], r"methods.1.method: 'no' is not allowed; must be one of those installed: combined"),
        ([{**FLASH, "alpha": 2}, N_OF_M], r"methods.0.alpha: 2 is not allowed; must be less than or equal to 1"),
        ([FLASH, {"method": "xattention"}], "flash_prefill and xattention both choose blocks of keys, which one alone"),
        ([N_OF_M, N_OF_M], "sparse_softmax and sparse_softmax both choose keys within a group, which one alone can do"),
        ([SKIP, SKIP], "skip_softmax and skip_softmax both skip blocks by their scores, which one alone can do"),
        ([FLASH, {"method": "sink_window"}], "sink_window keeps sinks and dense window alone; set num_sink_tokens"),
        ([FLASH, {**SKIP, "block_rows": 32}], r"are 16 and 16 \(flash_prefill\), 16 and 32 \(skip_softmax\)"),
        ([FLASH, {**N_OF_M, "backend": "torch"}], "flash_prefill and sparse_softmax have a different backend"),
        ([FLASH, {**N_OF_M, "enable": False}], "flash_prefill and sparse_softmax have a different enable"),
        ([FLASH, {"method": "combined", "methods": [N_OF_M, SKIP]}], "a combination is not a part of another one"),
    ],
)
def test_what_does_not_fit_is_refused(methods, message):
    with pytest.raises(mtsa.ConfigError, match=message):
        load(*methods)


def test_fields_beside_the_list_are_refused():
    entry = {"method": "combined", "methods": [FLASH, N_OF_M], "num_sink_tokens": 4}
    with pytest.raises(mtsa.ConfigError, match=r"num_sink_tokens: 4 is not allowed; must be set in the methods"):
        SparsityConfig.load({"sparse_cfg": {"*": entry}})


@pytest.mark.parametrize("name", ["triton_skip_softmax", "flash_skip_softmax"])
def test_names_of_model_optimizer(name):
    method = load({"method": name, "skip_softmax_threshold": 0.2})
    assert method == mtsa.SkipSoftmax(threshold=0.2)


def test_schema_knows_lists():
    schema = json.dumps(SparsityConfig.model_json_schema())
    assert '"FlashPrefill"' in schema
    assert '"type": "array"' in schema


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def test_a_model_goes_through_save_and_load(folder, tmp_path):
    ids = torch.arange(100)[None] % 97
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        dense = model(ids).logits
        mtsa.sparsify(model, {"sparse_cfg": {"*": [FLASH, N_OF_M, SKIP]}})
        with mtsa.collect_statistics(model) as statistics:
            sparse = model(ids).logits
        assert not torch.allclose(sparse, dense, atol=1e-3)
        model.save_pretrained(tmp_path)
        again = mtsa.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(ids).logits, sparse)
        torch.testing.assert_close(copy.deepcopy(model)(ids).logits, sparse)
    layer = mtsa.summary(again)[0]
    assert layer.method == "combined"
    assert layer.settings["flash_prefill.alpha"] == 0.9
    assert layer.settings["sparse_softmax.sparsity_n"] == 1
    total = statistics.total
    assert 0 < total.blocks_visited < total.blocks
    assert total.block_sparsity == 1 - total.blocks_visited / total.blocks


def test_decode_skips_with_a_threshold_of_its_own(folder):
    """A step skips by its own threshold, and is counted apart from the prefill."""
    ids = torch.arange(150)[None] % 97
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    method = {"method": "skip_softmax", "threshold": 1e-9, "block_size": 16, "block_rows": 16}
    logits = []
    for decode_threshold in (None, 1e-9, 0.9):
        mtsa.sparsify(model, {"sparse_cfg": {"*": {**method, "decode_threshold": decode_threshold}}})
        with torch.no_grad(), mtsa.collect_statistics(model) as statistics:
            cache = model(ids[:, :-1], use_cache=True).past_key_values
            logits.append(model(ids[:, -1:], past_key_values=cache).logits)
        mtsa.unsparsify(model)
        total, decode = statistics.total, statistics.total.decode
        assert total.sparsity == 0
        if decode_threshold is None:
            assert decode is None
            continue
        assert decode.rows == total.rows // 149
        assert decode.blocks == decode.rows * 10  # 150 keys in blocks of 16
        assert (decode.blocks_skipped > 0) == (decode_threshold == 0.9)
        assert decode.blocks_skipped == decode.blocks - decode.blocks_visited
        layer = next(iter(statistics.layers.values())).decode
        shares = layer.blocks_skipped_by_head
        assert sum(shares) / len(shares) * layer.blocks == pytest.approx(layer.blocks_skipped)
        assert shares == pytest.approx(layer.block_sparsity_by_head)
        assert "in decode" in str(statistics)
    torch.testing.assert_close(logits[1], logits[0])
    assert not torch.allclose(logits[2], logits[0], atol=1e-4)


def test_padding_and_generation(folder):
    """A left-padded batch gives each row what it gives alone, and decode is dense."""
    model = mtsa.sparsify(AutoModelForCausalLM.from_pretrained(folder).eval(), {"sparse_cfg": {"*": [FLASH, SKIP]}})
    rows = [torch.arange(n) % 97 for n in (90, 37)]
    ids = torch.stack([torch.nn.functional.pad(row, (90 - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (90 - len(row), 0)) for row in rows])
    with torch.no_grad():
        together = model(ids, attention_mask=mask).logits
        for row, logits in zip(rows, together, strict=True):
            torch.testing.assert_close(logits[-len(row) :], model(row[None]).logits[0], rtol=1e-4, atol=1e-4)
        cache = model(rows[0][None, :80], use_cache=True).past_key_values
        again = copy.deepcopy(cache)
        step = model(rows[0][None, 80:81], past_key_values=cache).logits
        with mtsa.disabled(model):
            torch.testing.assert_close(step, model(rows[0][None, 80:81], past_key_values=again).logits)


def test_a_compiled_model(folder):
    """Selection and attention are operators of one graph, whose gradients are those of the eager model."""
    ids = torch.arange(70)[None] % 97
    model = mtsa.sparsify(AutoModelForCausalLM.from_pretrained(folder).eval(), {"sparse_cfg": {"*": [FLASH, SKIP]}})
    weight = model.model.layers[0].self_attn.q_proj.weight
    eager = model(ids).logits
    (expected,) = torch.autograd.grad(eager.square().mean(), weight)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(ids).logits
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
    (found,) = torch.autograd.grad(compiled.square().mean(), weight)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
