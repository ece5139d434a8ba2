"""A tiny random Llama, sparsified: padding, chunks, caches, switches, and the way back."""

import copy
import json
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from test_families import CALLS as MASKS
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    dynamic_module_utils,
)

import modelopt_lite as mtsa
from modelopt_lite.models import layout
from modelopt_lite.models.huggingface import ATTENTION_NAME, attention_forward, attention_mask, paged_attention_forward

# Sparsity that bites on short inputs.
CONFIG = {
    "sparse_cfg": {"*": {"method": "sparse_softmax", "sparsity_n": 1, "dense_window_size": 3, "num_sink_tokens": 1}}
}
LAYERS = [f"model.layers.{i}.self_attn" for i in range(3)]
LENGTH = 37
# Twice what the dense model's FP32 logits with PyTorch's own attention err against FP64: up to 7.1e-7.
CLOSE = {"rtol": 0, "atol": 1.5e-6}

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 256,
}


def tiny(cls=LlamaForCausalLM, config_cls=LlamaConfig, **settings):
    """Make a model whose attention is far from uniform, so that dropping keys changes the logits."""
    torch.manual_seed(0)
    model = cls(config_cls(**SIZES, **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name and parameter.dim() == 2:
                parameter.mul_(6)
    return model


@pytest.fixture
def model():
    return tiny()


@pytest.fixture
def sparse():
    return mtsa.sparsify(tiny(), CONFIG)


@pytest.fixture
def ids():
    return torch.randint(0, SIZES["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


def test_in_place_and_the_model_runs_on_it(model, ids, monkeypatch):
    dense = logits(model, ids)
    calls = []
    original = layout.compute
    monkeypatch.setattr(layout, "compute", lambda request, *rest: calls.append(request) or original(request, *rest))
    assert mtsa.sparsify(model, mtsa.SPARSE_SOFTMAX_DEFAULT) is model
    assert model.config._attn_implementation == ATTENTION_NAME
    # The default's dense window covers this prompt, so the result is dense attention by this package's kernels.
    torch.testing.assert_close(logits(model, ids), dense, **CLOSE)
    assert len(calls) == 3
    mtsa.sparsify(model, CONFIG)
    assert (logits(model, ids) - dense).abs().max() > 0.1
    assert [request.plan.num_sink_tokens for request in calls[3:]] == [1, 1, 1]


def test_parameters_names_and_classes_stay(model):
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    classes = [type(module) for module in model.modules()]
    mtsa.sparsify(model, CONFIG)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    assert all(isinstance(module, cls) for module, cls in zip(model.modules(), classes, strict=True))
    module = model.model.layers[0].self_attn
    assert isinstance(module, mtsa.SparseAttentionModule)
    assert "sparse_softmax" in repr(module)
    assert "sparsity_n=1" in repr(module)


def padded(ids, lengths, side):
    """Return a batch of the rows' last ``lengths`` tokens with padding on one side (or around), mask and positions."""
    batch = torch.full_like(ids, 7)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        start = {"left": LENGTH - length, "right": 0, "both": (LENGTH - length) // 2}[side]
        batch[row, start : start + length] = ids[row, LENGTH - length :]
        mask[row, start : start + length] = 1
    return {"input_ids": batch, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@pytest.mark.parametrize("lengths", [(37, 37), (37, 20), (5, 30), (1, 2)])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_side_and_batch_mates_do_not_matter(sparse, ids, side, lengths):
    inputs = padded(ids, lengths, side)
    with torch.no_grad():
        together = sparse(**inputs).logits
    assert torch.isfinite(together).all()
    for row, length in enumerate(lengths):
        alone = logits(sparse, ids[row : row + 1, LENGTH - length :])
        torch.testing.assert_close(together[row, inputs["attention_mask"][row].bool()], alone[0], **CLOSE)


@pytest.mark.parametrize("cuts", [(13,), (2, 4, 35), (16, 32), (33,)])
@pytest.mark.parametrize("side", ["none", "left"])
def test_chunked_prefill_equals_one_prefill(sparse, ids, cuts, side):
    inputs = {"input_ids": ids} if side == "none" else padded(ids, (LENGTH, 21), "left")
    mask = inputs.get("attention_mask")
    with torch.no_grad():
        whole = sparse(**inputs).logits
        chunks, cache = [], None
        edges = (0, *cuts, LENGTH)
        for start, stop in pairwise(edges):
            part = {name: x[:, start:stop] for name, x in inputs.items() if name != "attention_mask"}
            if mask is not None:
                part["attention_mask"] = mask[:, :stop]
            result = sparse(**part, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            chunks.append(result.logits)
    chunked = torch.cat(chunks, dim=1)
    real = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(chunked[real], whole[real], **CLOSE)


def test_decode_is_dense(sparse, model, ids):
    """Over the same cache, a sparse and a dense model take the same decode step."""
    prompt, token = ids[:, :-1], ids[:, -1:]
    with torch.no_grad():
        caches = [model(prompt, use_cache=True).past_key_values for _ in range(2)]
        dense = model(token, past_key_values=caches[0]).logits
        torch.testing.assert_close(sparse(token, past_key_values=caches[1]).logits, dense, **CLOSE)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation(sparse, ids, cache):
    """Greedy generation by hand, one sequence at a time without padding, equals generate on a padded batch."""
    lengths, new = (LENGTH, 21), 6
    inputs = padded(ids, lengths, "left")
    generated = sparse.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        cache_implementation=None if cache == "dynamic" else cache,
    )
    for row, length in enumerate(lengths):
        with torch.no_grad():
            result = sparse(ids[row : row + 1, LENGTH - length :], use_cache=True)
            tokens = [result.logits[:, -1:].argmax(-1)]
            for _ in range(new - 1):
                result = sparse(tokens[-1], past_key_values=result.past_key_values)
                tokens.append(result.logits[:, -1:].argmax(-1))
        assert generated[row, LENGTH:].tolist() == torch.cat(tokens, dim=1)[0].tolist()


def test_gradients_reach_the_parameters(sparse, ids):
    sparse(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in sparse.parameters())
    assert all(torch.isfinite(parameter.grad).all() for parameter in sparse.parameters())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the method is about to be renamed
@pytest.mark.parametrize(
    "checkpointed",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
                reason="before PyTorch 2.13, no attribute may change in a checkpointed graph, not even back",
            ),
        ),
    ],
)
def test_compiles_without_graph_breaks(sparse, ids, checkpointed):
    """To PyTorch's compiler each layer's attention is one operator, forward and backward."""
    if checkpointed:
        sparse.train().gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    inputs = {name: x for name, x in padded(ids, (LENGTH, 21), "left").items() if name != "position_ids"}
    result = compiled(**inputs, labels=ids, use_cache=False)
    eager = sparse(**inputs, labels=ids)
    torch.testing.assert_close(result.logits, eager.logits, **CLOSE)
    result.loss.backward()
    found = [parameter.grad.clone() for parameter in sparse.parameters()]
    sparse.zero_grad()
    eager.loss.backward()
    for gradient, parameter in zip(found, sparse.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, **CLOSE)


@pytest.mark.parametrize(
    ("cls", "config_cls", "settings"),
    [(LlamaForCausalLM, LlamaConfig, {}), (MistralForCausalLM, MistralConfig, {"sliding_window": 8})],
)
def test_packed_positions_in_a_traced_graph(cls, config_cls, settings, ids, target):
    """One graph for packed and whole sequences, as nothing says which there are."""
    model, ids = mtsa.sparsify(tiny(cls, config_cls, **settings), CONFIG).to(target[1]), ids[:1].to(target[1])
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for cuts in ([0, 9, 10, 21, LENGTH], [0, 30, LENGTH], [0, LENGTH]):
        positions = torch.cat([torch.arange(stop - start) for start, stop in pairwise(cuts)])[None].to(ids.device)
        found = logits(compiled, ids, position_ids=positions, use_cache=False)
        alone = torch.cat([logits(model, ids[:, start:stop]) for start, stop in pairwise(cuts)], dim=1)
        torch.testing.assert_close(found, alone, **CLOSE)


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_other_masks_are_refused_in_a_traced_graph(kind, is_padded):
    config = LlamaConfig(attn_implementation=ATTENTION_NAME, attention_chunk_size=4 if kind == "chunks" else None)
    arguments = {"config": config, "past_key_values": None}
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def attend(embeddings, mask):
        mask = MASKS[kind]({**arguments, "inputs_embeds": embeddings, "attention_mask": mask})
        query = embeddings[:, None]
        return attention_forward(nn.Module(), query, query, query, mask)

    with pytest.raises(torch._dynamo.exc.Unsupported) as refusal:
        attend(torch.zeros(2, 6, 8), torch.ones(2, 6) if is_padded else None)
    assert "neither causal nor bidirectional" in f"{refusal.value} {refusal.value.__cause__!r}"


def test_sparsify_again_replaces(sparse, ids):
    mtsa.sparsify(sparse, {"sparse_cfg": {"*.1.*": {"method": "sparse_softmax", "sparsity_m": 8}}})
    rows = mtsa.summary(sparse)
    assert [row.method for row in rows] == [None, "sparse_softmax", None]
    assert rows[1].settings["sparsity_m"] == 8
    assert [type(layer.self_attn).__name__ for layer in sparse.model.layers][::2] == ["LlamaAttention"] * 2
    fresh = mtsa.sparsify(tiny(), {"sparse_cfg": {"*.1.*": {"method": "sparse_softmax", "sparsity_m": 8}}})
    torch.testing.assert_close(logits(sparse, ids), logits(fresh, ids), rtol=0, atol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_unsparsify_restores_everything(ids, implementation):
    model = tiny(attn_implementation=implementation)
    dense, config = logits(model, ids), copy.deepcopy(model.config)
    classes, attributes = [type(module) for module in model.modules()], set(vars(model))
    mtsa.sparsify(mtsa.sparsify(model, CONFIG), mtsa.SPARSE_SOFTMAX_DEFAULT)
    assert mtsa.unsparsify(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert model.config.to_dict() == config.to_dict()
    assert vars(model.config).keys() == vars(config).keys()
    assert model.config._attn_implementation == implementation
    assert set(vars(model)) == attributes
    assert not any(hasattr(module, "sparse_attention") for module in model.modules())
    torch.testing.assert_close(logits(model, ids), dense, rtol=0, atol=0)
    assert mtsa.unsparsify(model) is model


def test_disabled_is_dense_and_comes_back(sparse, model, ids):
    mtsa.disable_sparse_attention(sparse, "*.0.*")
    before = logits(sparse, ids)
    with mtsa.disabled(sparse) as inside:
        assert inside is sparse
        torch.testing.assert_close(logits(sparse, ids), logits(model, ids), **CLOSE)
        assert not any(row.enabled for row in mtsa.summary(sparse))
    assert [row.enabled for row in mtsa.summary(sparse)] == [False, True, True]
    torch.testing.assert_close(logits(sparse, ids), before, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="boom"), mtsa.disabled(sparse):
        raise RuntimeError("boom")
    assert [row.enabled for row in mtsa.summary(sparse)] == [False, True, True]


def test_switching_layers(sparse, ids):
    all_on = logits(sparse, ids)
    mtsa.disable_sparse_attention(sparse, "*.[01].*")
    only_last = mtsa.sparsify(tiny(), {"sparse_cfg": {"*.2.*": CONFIG["sparse_cfg"]["*"]}})
    torch.testing.assert_close(logits(sparse, ids), logits(only_last, ids), **CLOSE)
    mtsa.enable_sparse_attention(sparse)
    torch.testing.assert_close(logits(sparse, ids), all_on, rtol=0, atol=0)
    with pytest.raises(mtsa.ConfigError, match=r"pattern: 'x\*' matches no sparse attention module"):
        mtsa.disable_sparse_attention(sparse, "x*")


def test_prepared_but_off(model, ids):
    entry = {**CONFIG["sparse_cfg"]["*"], "enable": False}
    dense = logits(model, ids)
    mtsa.sparsify(model, {"sparse_cfg": {"*": entry}})
    assert [row.enabled for row in mtsa.summary(model)] == [False] * 3
    torch.testing.assert_close(logits(model, ids), dense, **CLOSE)
    mtsa.enable_sparse_attention(model)
    torch.testing.assert_close(logits(model, ids), logits(mtsa.sparsify(tiny(), CONFIG), ids), rtol=0, atol=0)


def test_summary_is_a_table(sparse, ids):
    text = str(mtsa.summary(sparse))
    for word in (*LAYERS, "LlamaAttention", "sparse_softmax", "sparsity_n=1", "dense_window_size=3", "on", "active"):
        assert word in text
    assert [row.active for row in mtsa.summary(sparse)] == [None] * 3
    assert "yes" not in text
    mtsa.sparsify(sparse, {"sparse_cfg": {"*.1.*": CONFIG["sparse_cfg"]["*"]}})
    logits(sparse, ids)
    assert [(row.method, row.active) for row in mtsa.summary(sparse)] == [
        (None, None),
        ("sparse_softmax", True),
        (None, None),
    ]
    assert str(mtsa.summary(sparse)).count("yes") == 1


@torch.no_grad()
def test_no_operator_of_this_package_stands_between(sparse, ids):
    """One costs more Python than the rest of a call."""
    positions = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)]).expand(2, -1)
    mask = padded(ids, (LENGTH, 21), "left")["attention_mask"]
    for options in ({}, {"attention_mask": mask}, {"position_ids": positions, "use_cache": False}):
        with torch.profiler.profile(acc_events=True) as profile:
            sparse(ids, **options)
        names = {event.key for event in profile.key_averages()}
        assert "aten::embedding" in names
        assert not [name for name in names if "modelopt" in name]


def test_copies_are_sparse_and_independent(sparse, ids):
    twin = copy.deepcopy(sparse)
    for copied in (twin, copy.copy(sparse)):
        torch.testing.assert_close(logits(copied, ids), logits(sparse, ids), rtol=0, atol=0)
    mtsa.disable_sparse_attention(twin)
    assert all(row.enabled for row in mtsa.summary(sparse))
    mtsa.unsparsify(twin)
    assert sparse.config._attn_implementation == ATTENTION_NAME


def test_statistics(sparse, ids):
    with mtsa.collect_statistics(sparse) as statistics:
        logits(sparse, ids)
    assert list(statistics.layers) == LAYERS
    # Rows, visible and kept scores do not depend on the model: N:M keeps min(n, visible), plus sinks and window.
    kept = 0
    for p in range(LENGTH):
        groups = [[j for j in range(g, g + 4) if j <= p] for g in range(0, p + 1, 4)]
        exempt = {j for j in range(p + 1) if j < 1 or p - j < 3}
        least = len(exempt) + sum(not exempt & set(group) for group in groups)  # at best, the best key is exempt
        kept += least
    for layer in statistics.layers.values():
        assert layer.rows == 2 * 4 * LENGTH
        assert layer.visible == 2 * 4 * LENGTH * (LENGTH + 1) // 2
        assert 2 * 4 * kept <= layer.kept < layer.visible
        assert 0 < layer.mass_kept < 1
    assert statistics.total.visible == 3 * layer.visible
    with mtsa.collect_statistics(sparse) as nothing, mtsa.disabled(sparse):
        logits(sparse, ids)
    assert (nothing.total.visible, nothing.total.sparsity, nothing.total.mass_kept) == (0, 0.0, 1.0)
    seen = statistics.total.visible
    logits(sparse, ids)
    assert (statistics.total.visible, nothing.total.visible) == (seen, 0)


BLOCKS = {"block_size": 16, "block_rows": 16}


@pytest.mark.parametrize(
    "entry",
    [
        {"method": "sparse_softmax", "dense_window_size": 8},
        {"method": "flash_prefill", **BLOCKS},
        {"method": "skip_softmax", "threshold": 0.1, **BLOCKS},
        [{"method": "mean_pool_top_k", "keep": 0.4, **BLOCKS}, {"method": "sparse_softmax", "dense_window_size": 8}],
    ],
    ids=str,
)
@pytest.mark.parametrize("pieces", [1, 3])
def test_statistics_of_a_sample(model, entry, pieces, monkeypatch):
    """They are near those of all queries, in chunks as in one piece, and change no logits."""
    length, sampled = (240, 5) if "block_size" in str(entry) else (700, 3)
    monkeypatch.setattr("modelopt_lite.kernels.statistics.SAMPLED_BLOCKS", sampled)
    monkeypatch.setattr("modelopt_lite.kernels.statistics.WHOLE_BLOCKS", 2 * sampled)
    ids = torch.randint(101, (2, length), generator=torch.Generator().manual_seed(1))
    mtsa.sparsify(model, {"sparse_cfg": {"*": entry}})

    def prefill():
        cache = None
        for part in ids.tensor_split(pieces, 1):
            found = model(part, past_key_values=cache, use_cache=True)
            cache = found.past_key_values
        return found.logits

    with torch.no_grad():
        expected = prefill()
        with mtsa.collect_statistics(model) as sample:
            torch.testing.assert_close(prefill(), expected, **CLOSE)
        with mtsa.collect_statistics(model, exact=True) as exact:
            torch.testing.assert_close(prefill(), expected, **CLOSE)
    assert (sample.total.is_estimate, exact.total.is_estimate) == (True, False)
    assert "estimated by a sample" in str(sample)
    assert "estimated" not in str(exact)
    assert sample.total.visible == pytest.approx(exact.total.visible, rel=0.15)
    assert sample.total.sparsity == pytest.approx(exact.total.sparsity, abs=0.05)
    assert sample.total.mass_kept == pytest.approx(exact.total.mass_kept, abs=0.05)
    assert sample.total.block_sparsity == pytest.approx(exact.total.block_sparsity, abs=0.05)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("inputs", ["whole", "padded", "packed"])
def test_a_prefill_waits_for_no_device(sparse, ids, inputs, measured, device, monkeypatch):
    """On the meta device tensors have no values, so that reading one is an error."""
    arguments, device = {}, torch.device(device)
    if device.type == "meta":  # where PyTorch has no autocast
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)
        monkeypatch.setattr(torch, "autocast", lambda device_type, enabled: nullcontext())
    if inputs == "padded":
        real = padded(ids, (LENGTH, 20), "left")["attention_mask"].bool()
        # Made beforehand, as that does wait, once a forward.
        arguments = {"attention_mask": attention_mask(2, LENGTH, LENGTH, attention_mask=real).on(device)}
    elif inputs == "packed":
        ids, lengths = ids.view(1, -1), torch.tensor([0, 12, LENGTH, 2 * LENGTH], dtype=torch.int32, device=device)
        arguments = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": LENGTH, "max_length_k": LENGTH}
    sparse, ids = sparse.to(device), ids.to(device)
    with mtsa.collect_statistics(sparse) if measured else nullcontext() as statistics:
        if device.type == "cuda":
            logits(sparse, ids, **arguments)  # compiles the kernels
            torch.cuda.set_sync_debug_mode("error")
        try:
            logits(sparse, ids, **arguments)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    if measured and device.type == "meta":
        with pytest.raises(RuntimeError, match="meta"):
            assert statistics.total.rows


def test_save_and_restore(sparse, model, ids, tmp_path):
    rows = mtsa.summary(sparse)
    sparse.save_pretrained(tmp_path)
    assert [path.suffix for path in tmp_path.iterdir() if path.name.startswith("model")] == [".safetensors"]
    restored = mtsa.from_pretrained(tmp_path).eval()
    assert mtsa.summary(restored) == rows
    torch.testing.assert_close(logits(restored, ids), logits(sparse, ids), rtol=0, atol=0)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert dense.config._attn_implementation == "sdpa"
    torch.testing.assert_close(logits(dense, ids), logits(model, ids), rtol=0, atol=0)
    # Saved once more by way of the restored model, nothing is lost.
    restored.save_pretrained(tmp_path / "again")
    assert mtsa.summary(mtsa.from_pretrained(tmp_path / "again")) == rows


def test_order_of_patterns_survives_saving(model, tmp_path):
    method = CONFIG["sparse_cfg"]["*"]
    mtsa.sparsify(
        model, {"sparse_cfg": {"model*": method, "*.1.*": {"enable": False}, "default": {**method, "sparsity_n": 2}}}
    )
    assert [row.method for row in mtsa.summary(model)] == ["sparse_softmax", None, "sparse_softmax"]
    model.save_pretrained(tmp_path)  # alphabetically "*.1.*" would come first
    assert mtsa.summary(mtsa.from_pretrained(tmp_path)) == mtsa.summary(model)


def test_restoring_what_is_not_sparse_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(mtsa.ConfigError, match=r"config.json holds no modelopt_lite_sparsity"):
        mtsa.from_pretrained(tmp_path)
    model.config.modelopt_lite_sparsity = {"version": 99, "sparse_cfg": []}
    model.save_pretrained(tmp_path)
    with pytest.raises(mtsa.ConfigError, match=r"modelopt_lite_sparsity.version: 99 is not allowed; 1"):
        mtsa.from_pretrained(tmp_path)


def test_a_model_with_code_of_its_own_is_restored_only_if_that_is_trusted(model, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "saved"
    folder.mkdir()
    base = "LlamaForSequenceClassification"
    code = (
        f"from transformers import LlamaForCausalLM, {base}\nclass A(LlamaForCausalLM): pass\nclass B({base}): pass\n"
    )
    (folder / "own.py").write_text(code)
    own = dynamic_module_utils.get_class_from_dynamic_module("own.B", folder)(copy.deepcopy(model.config)).eval()
    mtsa.sparsify(own, CONFIG).save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "own.A", "AutoModelForSequenceClassification": "own.B"}
    file.write_text(json.dumps(config))
    with pytest.raises(mtsa.ConfigError, match="architectures: 'B' is not allowed; .* with trust_remote_code=True"):
        mtsa.from_pretrained(folder)
    restored = mtsa.from_pretrained(folder, trust_remote_code=True)
    assert type(restored).__name__ == "B"
    assert [row.enabled for row in mtsa.summary(restored)] == [row.enabled for row in mtsa.summary(own)]
    assert all(
        torch.equal(x, y) for x, y in zip(restored.state_dict().values(), own.state_dict().values(), strict=True)
    )
    other_maps = {"AutoModelForCausalLM": "own.A"}, {"AutoConfig": "own.B"}, {"AutoModelForNothing": "own.B"}
    for auto_map in (None, *other_maps):
        file.write_text(json.dumps(config | {"auto_map": auto_map}))
        with pytest.raises(mtsa.ConfigError, match="architectures: 'B' is not allowed"):
            mtsa.from_pretrained(folder, trust_remote_code=True)


def test_trust_is_not_asked_for(sparse, tmp_path, monkeypatch):
    """Not even at a terminal, for a model that names no class but has code."""
    sparse.save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text("raise AssertionError('this ran')")
    file = tmp_path / "config.json"
    config = json.loads(file.read_text()) | {"model_type": "own", "architectures": None}
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    file.write_text(json.dumps(config))
    asked = []
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(prompt) or "y")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        mtsa.from_pretrained(tmp_path)
    assert not asked


def test_a_dense_reload_made_sparse_and_back_keeps_its_saved_config(sparse, tmp_path):
    sparse.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    saved = copy.deepcopy(model.config.modelopt_lite_sparsity)
    mtsa.unsparsify(mtsa.sparsify(model, mtsa.SPARSE_SOFTMAX_DEFAULT))
    assert model.config.modelopt_lite_sparsity == saved


def untouched(model):
    return (
        model.config._attn_implementation,
        model.config.to_dict(),
        [type(module) for module in model.modules()],
        sorted(vars(model)),
    )


@pytest.mark.parametrize(
    "config",
    [
        {"sparse_cfg": {"*": {"method": "nope"}}},
        {"sparse_cfg": {"*": {"method": "sparse_softmax"}, "*.7.*": {"enable": False}}},
        "missing.yaml",
        {},
    ],
)
def test_a_bad_config_leaves_the_model_untouched(model, config):
    before = untouched(model)
    with pytest.raises(mtsa.ConfigError):
        mtsa.sparsify(model, config)
    assert untouched(model) == before


class Custom(nn.Module):
    pass


def without_a_config():
    model = tiny()
    del model.model.layers[1].self_attn.config
    return model


UNSUPPORTED = {
    "no attention": (Custom, "Custom has no attention module: none of its modules is a Transformers attention layer"),
    "attention of its own": (
        lambda: BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=101)),
        r"transformer.h.0.self_attention \(BloomAttention\): does not go through Transformers' attention interface",
    ),
    "keys of its own": (
        lambda: GlmMoeDsaForCausalLM(
            GlmMoeDsaConfig(
                **{**SIZES, "num_hidden_layers": 1, "num_key_value_heads": 4},
                n_routed_experts=4,
                moe_intermediate_size=16,
            )
        ),
        r"model.layers.0.self_attn \(GlmMoeDsaAttention\): chooses its own keys \(indices\), which is not supported",
    ),
    "a mask of its own": (
        lambda: DogeForCausalLM(DogeConfig(**{**SIZES, "num_hidden_layers": 1})),
        r"model.layers.0.self_attn \(DogeAttention\): makes an attention mask of its own, which is not supported",
    ),
    "half of its attention": (
        lambda: FalconForCausalLM(
            FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, attn_implementation="eager")
        ),
        r"self_attention \(FalconAttention\): calls scaled_dot_product_attention itself, which is supported if the",
    ),
    "a layer without its model": (
        lambda: nn.ModuleDict({"attention": tiny().model.layers[0].self_attn}),
        r"attention \(LlamaAttention\): is a Transformers attention layer outside of a PreTrainedModel",
    ),
    "a layer without a config": (
        without_a_config,
        r"model.layers.1.self_attn \(LlamaAttention\): its attention implementation cannot be set, as it has no config",
    ),
}


@pytest.mark.parametrize(("make", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_unsupported_models_are_refused_by_layer(make, message):
    model = make()
    before = untouched(model) if hasattr(model, "config") else None
    with pytest.raises(mtsa.UnsupportedError, match=message):
        mtsa.sparsify(model, mtsa.SPARSE_SOFTMAX_DEFAULT)
    assert before is None or untouched(model) == before


@pytest.mark.parametrize(("cls", "config_cls"), [(MistralForCausalLM, MistralConfig), (Qwen2ForCausalLM, Qwen2Config)])
def test_relatives_without_a_window_work(cls, config_cls, ids):
    model = tiny(cls, config_cls, sliding_window=None)
    dense = logits(model, ids)
    mtsa.sparsify(model, CONFIG)
    inputs = padded(ids, (LENGTH, 21), "left")
    with torch.no_grad():
        together = model(**inputs).logits
    torch.testing.assert_close(together[1, LENGTH - 21 :], logits(model, ids[1:, LENGTH - 21 :])[0], **CLOSE)
    with mtsa.disabled(model):
        torch.testing.assert_close(logits(model, ids), dense, **CLOSE)


def test_calls_outside_the_envelope_are_refused_by_layer(sparse, ids):
    first = rf"{LAYERS[0]} \(SparseLlamaAttention\): "
    with pytest.raises(mtsa.UnsupportedError, match=first + "output_attentions is not supported"):
        sparse(ids, output_attentions=True)
    with pytest.raises(mtsa.UnsupportedError, match=first + r"its attention mask \[2, 1, 37, 37\] is not supported"):
        sparse(ids, attention_mask=torch.randn(2, 1, LENGTH, LENGTH))
    with pytest.raises(mtsa.UnsupportedError, match=first + "cu_seq_lens_k is missing or does not match"):
        sparse(ids[:1], cu_seq_lens_q=torch.tensor([0, 20, 37]), use_cache=False)
    packing, others = torch.tensor([0, 20, 37, 74]), [torch.tensor([0, 18, 37, 74]), torch.tensor([0, 37, 74])]
    for other in others:
        with pytest.raises(mtsa.UnsupportedError, match=first + "cu_seq_lens_k is missing or does not match"):
            sparse(ids.view(1, -1), cu_seq_lens_q=packing, cu_seq_lens_k=other, use_cache=False)
    mask = padded(ids, (LENGTH, 20), "left")["attention_mask"].view(1, -1)
    with pytest.raises(mtsa.UnsupportedError, match=first + "cu_seq_lens_q together with padding or a cache is not"):
        sparse(ids.view(1, -1), attention_mask=mask, cu_seq_lens_q=packing, cu_seq_lens_k=packing, use_cache=False)
    with pytest.raises(mtsa.UnsupportedError, match="attention_mask: 10 columns are not enough; 37 tokens"):
        sparse(ids, attention_mask=torch.ones(2, 10, dtype=torch.int64), past_key_values=None, use_cache=True)


QUERY, KEY = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 7, 8)
CHUNK = layout.whole_layout(1, 3, 7, "cpu", is_causal=True)
LENGTHS = torch.tensor([0, 2, 3])
CALLS = {
    "a chunk without a mask": (None, {}, "3 queries, 7 keys and no mask is not supported"),
    "a window without a mask": (
        None,
        {"sliding_window": 4, "is_causal": False},
        r"a sliding window \(4\) without a mask is not supported",
    ),
    "packing and a cache": (
        CHUNK,
        {"cu_seq_lens_q": LENGTHS, "cu_seq_lens_k": LENGTHS},
        "cu_seq_lens_q together with padding or a cache is not supported",
    ),
    "another mask": (
        layout.whole_layout(1, 7, 7, "cpu", is_causal=True),
        {},
        r"queries \(1, 3\) and keys \(1, 7\) \[batch, tokens\] do not have the layout of the mask, \(1, 7\) and",
    ),
    "a bias": (CHUNK, {"position_bias": QUERY}, "the argument position_bias=Tensor of the model's attention is not"),
    "dropout": (CHUNK, {"dropout": 0.1}, r"attention dropout \(0.1\) is not supported"),
}


@pytest.mark.parametrize(("mask", "options", "message"), CALLS.values(), ids=CALLS.keys())
def test_calls_of_other_models_are_refused(mask, options, message):
    with pytest.raises(mtsa.UnsupportedError, match=rf"layer \? \(Module\): {message}"):
        attention_forward(nn.Module(), QUERY, KEY, KEY, mask, **options)


def test_a_paged_window_without_positions_is_refused():
    with pytest.raises(mtsa.UnsupportedError, match=r"layer \? \(Module\): its model does not pass position_ids on"):
        paged_attention_forward(nn.Module(), QUERY, KEY, KEY, None, cache=(), cu_seq_lens_q=LENGTHS, sliding_window=4)


def test_attention_dropout_in_training_is_refused(ids):
    model = mtsa.sparsify(tiny(attention_dropout=0.1), CONFIG)
    logits(model, ids)
    model.train()
    with pytest.raises(
        mtsa.UnsupportedError,
        match=rf"{LAYERS[0]} \(SparseLlamaAttention\): attention dropout \(0.1\) is not supported",
    ):
        model(ids)
