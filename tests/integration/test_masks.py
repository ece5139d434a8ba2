"""What models and callers hand to attention: masks, positions, arguments, and parts that no pattern matches."""

import logging
from itertools import pairwise

import pytest
import torch
import transformers
from families import ALTERNATING, FAMILIES, SMALL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PrefixTuningConfig, get_peft_model
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaAttention

import modelopt_lite as mtsa
from modelopt_lite.models.discovery import ATTENTION_NAME
from modelopt_lite.models.huggingface import IRRELEVANT_ARGUMENTS, REFUSED_ARGUMENTS, attention_forward
from modelopt_lite.models.layout import attend, layout_of_mask

SPARSE = {"method": "sparse_softmax", "sparsity_n": 1, "dense_window_size": 3, "num_sink_tokens": 1}
DENSE = {**SPARSE, "sparsity_n": 4}
# Twice what FP32 logits of dense models err against FP64, as for the families.
CLOSE = {"rtol": 0, "atol": 5e-6}
EXACT = {"rtol": 0, "atol": 1e-10}
PATIENT = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    **HYBRID,
}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}


def sharpened(model):
    """Make attention far from uniform."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and ("attn" in name or "attention" in name):
                parameter.mul_(6)
    return model.eval()


def make(name, config=None, **options):
    torch.manual_seed(0)
    known = config or name.replace("ForCausalLM", "").replace("Model", "") + "Config"
    return sharpened(getattr(transformers, name)(getattr(transformers, known)(**options)))


def sparse(model, entry=SPARSE, pattern="*"):
    return mtsa.sparsify(model, {"sparse_cfg": {pattern: entry}})


def ids(rows=2, length=21, seed=1):
    return torch.randint(5, 95, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def result(model, **arguments):
    return model(**arguments)[0]


@pytest.fixture
def warnings(caplog):
    with caplog.at_level(logging.WARNING, "modelopt_lite"):
        yield lambda: [record.getMessage() for record in caplog.records]


# Finished masks


@st.composite
def masks(draw):
    """A finished mask of a batch, ``[batch, length, length]``, and which queries are real."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(2, 24))
    real = torch.zeros(batch, length, dtype=torch.bool)
    for row in range(batch):
        count = draw(st.integers(1, length))
        start = draw(st.sampled_from([0, length - count, (length - count) // 2]))
        real[row, start : start + count] = True
    sequence = torch.zeros(batch, length, dtype=torch.long)
    for cut in draw(st.sets(st.integers(1, length - 1), max_size=3)):
        sequence[:, cut:] += 1
    apart = torch.arange(length)[:, None] - torch.arange(length)
    visible = (sequence[:, :, None] == sequence[:, None]) & real[:, None] & real[:, :, None]
    if draw(st.booleans()):
        visible &= apart >= 0
    visible &= apart.abs() < draw(st.sampled_from([length, 2, 3, 7]))
    return visible, real, draw(st.sampled_from(["bool", "-inf", "least", "-10000"]))


@given(masks())
@settings(max_examples=150, **PATIENT)
def test_a_finished_mask_is_read_as_it_is(drawn):
    """Causal or not, windows, packed sequences, padding: dense attention is that of PyTorch with the mask."""
    visible, real, kind = drawn
    batch, length = real.shape
    query, key, value = torch.randn(3, batch, 2, length, 8, dtype=torch.float64).unbind()
    mask = visible[:, None]
    if kind != "bool":
        hidden = {"-inf": -torch.inf, "least": torch.finfo(torch.float64).min, "-10000": -1e4}[kind]
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, hidden)
    layout = layout_of_mask(mask, batch, length, length)
    assert layout is not None
    found = attend(nn.Module(), query, key, value, layout)
    wanted = scaled_dot_product_attention(query, key, value, visible[:, None]).transpose(1, 2)
    torch.testing.assert_close(found[real], wanted[real], **EXACT)


@given(
    length=st.integers(1, 12),
    spare=st.integers(0, 8),
    cached=st.integers(0, 9),
    lengths=st.lists(st.integers(1, 21), min_size=1, max_size=3),
)
@settings(max_examples=100, **PATIENT)
def test_a_causal_mask_over_a_static_cache_with_padding_at_the_right(length, spare, cached, lengths):
    """Queries stand behind cached keys and before empty slots; rows end where they like."""
    slots = cached + length + spare
    lengths = torch.tensor(lengths).clamp(max=cached + length)
    # A row that ends before the queries says nothing of where they stand.
    lengths[0] = cached + length
    positions, batch = torch.arange(slots), len(lengths)
    slots_q = cached + torch.arange(length)
    visible = (positions <= slots_q[:, None]) & (positions < lengths[:, None, None])
    query = torch.randn(batch, 2, length, 8, dtype=torch.float64)
    key, value = torch.randn(2, batch, 2, slots, 8, dtype=torch.float64).unbind()
    layout = layout_of_mask(visible[:, None], batch, length, slots)
    found = attend(nn.Module(), query, key, value, layout)
    wanted = scaled_dot_product_attention(query, key, value, visible[:, None]).transpose(1, 2)
    real = slots_q < lengths[:, None]
    torch.testing.assert_close(found[real], wanted[real], **EXACT)


@given(seed=st.integers(0, 99))
@settings(max_examples=30, **PATIENT)
def test_a_mask_that_says_anything_is_never_misread(seed):
    """Of masks drawn at random, those that are read give what PyTorch gives."""
    generator = torch.Generator().manual_seed(seed)
    visible = torch.rand(2, 4, 4, generator=generator) < 0.6
    visible |= torch.eye(4, dtype=torch.bool)
    query, key, value = torch.randn(3, 2, 1, 4, 8, dtype=torch.float64, generator=generator).unbind()
    layout = layout_of_mask(visible[:, None], 2, 4, 4)
    if layout is not None:
        wanted = scaled_dot_product_attention(query, key, value, visible[:, None]).transpose(1, 2)
        torch.testing.assert_close(attend(nn.Module(), query, key, value, layout), wanted, **EXACT)


BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 101}
TIMES = {"num_hidden_layers": 2, "head_dim": 8, "patch_length": 4, "context_length": 64, "horizon_length": 4}
MAKE_THEIR_OWN = {
    "layoutlm": (lambda: make("LayoutLMModel", **BERT), {"input_ids": ids()}),
    "markuplm": (lambda: make("MarkupLMModel", **BERT, xpath_unit_hidden_size=8, max_depth=4), {"input_ids": ids()}),
    "timesfm": (
        lambda: make("TimesFmModel", hidden_size=32, intermediate_size=48, num_attention_heads=4, **TIMES),
        {
            "past_values": torch.randn(2, 64, generator=torch.Generator().manual_seed(0)),
            "past_values_padding": torch.zeros(2, 64),
            "freq": torch.zeros(2, 1, dtype=torch.long),
        },
    ),
    "pixtral": (
        lambda: make("PixtralVisionModel", "PixtralVisionConfig", image_size=32, **VISION),
        {
            "pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
            "image_sizes": torch.tensor([[32, 32], [16, 24]]),
        },
    ),
}


@pytest.mark.parametrize("family", MAKE_THEIR_OWN)
def test_models_that_make_their_own_masks(family):
    made, arguments = MAKE_THEIR_OWN[family]
    wanted = result(made(), **arguments)
    torch.testing.assert_close(result(sparse(made(), DENSE), **arguments), wanted, **CLOSE)
    model = sparse(made())
    found = result(model, **arguments)
    assert (found - wanted).abs().max() > 50 * CLOSE["atol"]
    with mtsa.disabled(model):
        torch.testing.assert_close(result(model, **arguments), wanted, **CLOSE)


@pytest.mark.parametrize("family", ["layoutlm", "markuplm"])
def test_their_padding_is_not_seen(family):
    """In FP64, and sparse."""
    model, tokens = sparse(MAKE_THEIR_OWN[family][0]().double()), ids()
    mask = torch.ones_like(tokens)
    mask[1, 13:] = 0
    together = result(model, input_ids=tokens, attention_mask=mask)
    torch.testing.assert_close(together[1:, :13], result(model, input_ids=tokens[1:, :13]), **EXACT)
    torch.testing.assert_close(together[:1], result(model, input_ids=tokens[:1]), **EXACT)


def test_images_of_one_batch_are_kept_apart():
    """Pixtral packs them under a mask of blocks."""
    made, arguments = MAKE_THEIR_OWN["pixtral"]
    model = sparse(made().double())
    pixels, sizes = arguments["pixel_values"].double(), arguments["image_sizes"]
    together = result(model, pixel_values=pixels, image_sizes=sizes)
    alone = [result(model, pixel_values=pixels[i : i + 1], image_sizes=sizes[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), **EXACT)


def test_a_mask_that_a_layer_computes_is_refused_beforehand():
    swin = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
    with pytest.raises(mtsa.UnsupportedError, match=r"SwinAttention\): makes an attention mask of its own"):
        sparse(make("SwinModel", **swin))


def test_a_finished_mask_of_the_callers(warnings):
    """What a layout says of it counts, and what none says is refused by layer."""
    model, tokens = make("LlamaForCausalLM", **SMALL), ids()
    lower = torch.ones(21, 21, dtype=torch.bool).tril().expand(2, 1, 21, 21)
    wanted = [result(model, input_ids=tokens, attention_mask=mask) for mask in (lower, torch.ones_like(lower))]
    sparse(model, DENSE)
    for mask, one in zip((lower, torch.ones_like(lower)), wanted, strict=True):
        torch.testing.assert_close(result(model, input_ids=tokens, attention_mask=mask), one, **CLOSE)
    bias = torch.zeros(2, 1, 21, 21).masked_fill(~lower, -100)
    with pytest.raises(mtsa.UnsupportedError, match=r"layers.0.self_attn .*: its attention mask \[2, 1, 21, 21\] is"):
        sparse(model)(tokens, attention_mask=bias)
    with mtsa.disabled(model):
        biased = result(make("LlamaForCausalLM", **SMALL), input_ids=tokens, attention_mask=bias)
        torch.testing.assert_close(result(model, input_ids=tokens, attention_mask=bias), biased, **CLOSE)
    assert not warnings()


# Mask functions


@pytest.mark.parametrize("kinds", [["full_attention"] * 2, ["sliding_attention", "full_attention"]])
def test_a_causal_family_without_causality(kinds):
    """As EmbeddingGemma, whose masks are causal or anything, and causal or near; its norms are in FP32."""
    settings = {**SMALL, "head_dim": 8, "sliding_window": 8, "layer_types": kinds, "use_bidirectional_attention": True}
    model, tokens = make("Gemma3TextModel", "Gemma3TextConfig", **settings).double(), ids()
    mask = torch.ones_like(tokens)
    mask[1, :8] = 0
    call = {"input_ids": tokens, "attention_mask": mask}
    wanted = result(model, **call)[mask.bool()]
    torch.testing.assert_close(result(sparse(model, DENSE), **call)[mask.bool()], wanted, **CLOSE)
    together = result(sparse(model), **call)
    assert (together[mask.bool()] - wanted).abs().max() > 1e-3
    torch.testing.assert_close(together[1:, 8:], result(model, input_ids=tokens[1:, 8:]), **CLOSE)


def test_blocks_that_are_none():
    """Text alone in models whose images see both ways; with an image the layer is named."""
    model, tokens = make("LlamaForCausalLM", **SMALL), ids()
    embeddings, wanted = model.get_input_embeddings()(tokens), result(model, input_ids=tokens)

    def masked(blocks):
        arguments = {"inputs_embeds": embeddings, "attention_mask": None, "past_key_values": None}
        return transformers.masking_utils.create_causal_mask(model.config, **arguments, block_sequence_ids=blocks)

    sparse(model, DENSE)
    blocks = torch.full_like(tokens, -1)
    torch.testing.assert_close(result(model, input_ids=tokens, attention_mask=masked(blocks)), wanted, **CLOSE)
    blocks[:, 4:9] = 0
    sparse(model)
    with pytest.raises(mtsa.UnsupportedError, match=r"layers.0.self_attn .*: .* neither causal nor bidirect"):
        model(tokens, attention_mask=masked(blocks))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's, of Transformers
def test_a_tuned_prefix_before_an_encoder():
    """Without a mask as with one of ones."""
    base = make("BertForSequenceClassification", "BertConfig", **BERT)
    model = get_peft_model(base, PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)).eval()
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.normal_()
    tokens = ids()
    wanted = result(model, input_ids=tokens)
    sparse(model, DENSE)
    torch.testing.assert_close(result(model, input_ids=tokens), wanted, **CLOSE)
    sparse(model)
    with_mask = result(model, input_ids=tokens, attention_mask=torch.ones_like(tokens))
    torch.testing.assert_close(result(model, input_ids=tokens), with_mask, **CLOSE)


# Parts that no pattern matches


PALI = {"projection_dim": 32, "image_token_index": 99, "text_config": {"model_type": "gemma", **SMALL, "head_dim": 8}}
SIGLIP = {"model_type": "siglip_vision_model", **VISION, "image_size": 16, "projection_dim": 32}
MISTRAL3 = {
    "vision_config": {"model_type": "pixtral", **VISION, "image_size": 32},
    "text_config": {"model_type": "mistral", **SMALL},
    "image_token_id": 99,
}
IMAGE = ids(1, 30)
IMAGE[0, 3:19] = 99
PIXELS = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LLAMA4 = {"intermediate_size_mlp": 32, "num_local_experts": 2, "attention_chunk_size": 8, "head_dim": 8}
PARTS = {
    "own mask": (
        lambda: make("Mistral3ForConditionalGeneration", "Mistral3Config", **MISTRAL3),
        "*language_model*",
        {"input_ids": IMAGE, "pixel_values": PIXELS, "image_sizes": torch.tensor([[32, 32]])},
    ),
    "half of a tower with a mask of its own": (MAKE_THEIR_OWN["pixtral"][0], "*.0.*", MAKE_THEIR_OWN["pixtral"][1]),
    "pooling": (
        lambda: make("SiglipVisionModel", "SiglipVisionConfig", image_size=16, **VISION),
        "*",
        {"pixel_values": PIXELS[..., :16, :16]},
    ),
    "a tower with pooling": (
        lambda: make("PaliGemmaForConditionalGeneration", "PaliGemmaConfig", vision_config=SIGLIP, **PALI),
        "*",
        {"input_ids": ids(), "token_type_ids": torch.zeros(2, 21, dtype=torch.long)},
    ),
    "lightning": (
        lambda: make("MiniMaxForCausalLM", **SMALL, **HYBRID, num_local_experts=4),
        "*",
        {"input_ids": ids()},
    ),
    "delta": (lambda: make("OlmoHybridForCausalLM", **SMALL, **LINEAR), "*", {"input_ids": ids()}),
    "parallel mamba": (lambda: make("FalconH1ForCausalLM", **SMALL, **MAMBA), "*", {"input_ids": ids()}),
    "chunks": (
        lambda: make(
            "Llama4ForCausalLM",
            "Llama4TextConfig",
            **SMALL,
            **LLAMA4,
            layer_types=["chunked_attention", "full_attention"],
        ),
        "*.1.*",
        {"input_ids": ids()},
    ),
    "one of two layers": (lambda: make("LlamaForCausalLM", **SMALL), "*.0.*", {"input_ids": ids()}),
    "one of two eager layers": (
        lambda: make("LlamaForCausalLM", **SMALL, attn_implementation="eager"),
        "*.0.*",
        {"input_ids": ids()},
    ),
    "another window": (
        lambda: make("Gemma3ForCausalLM", "Gemma3TextConfig", **SMALL, head_dim=8, **ALTERNATING),
        "*.0.*",
        {"input_ids": ids()},
    ),
}


@pytest.mark.parametrize("kind", PARTS)
def test_unmatched_parts_neither_change_nor_block(kind):
    made, pattern, arguments = PARTS[kind]
    model = made()
    before, implementation = result(model, **arguments), model.config._attn_implementation
    sparse(model, DENSE, pattern)
    torch.testing.assert_close(result(model, **arguments), before, **CLOSE)
    sparse(model, SPARSE, pattern)
    assert (result(model, **arguments) - before).abs().max() > 50 * CLOSE["atol"]
    with mtsa.disabled(model):
        torch.testing.assert_close(result(model, **arguments), before, **CLOSE)
    mtsa.unsparsify(model)
    assert model.config._attn_implementation == implementation
    torch.testing.assert_close(result(model, **arguments), before, rtol=0, atol=0)
    assert not any("_own_attention" in vars(module) for module in model.modules())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_unmatched_layers_run_on_what_they_ran_on(implementation, monkeypatch):
    """With its masks: padding and generation too."""
    model, tokens, called = make("LlamaForCausalLM", **SMALL, attn_implementation=implementation), ids(), []
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(tokens, **options)
    if implementation == "sdpa":
        function = AttentionInterface()["sdpa"]
        spy = lambda module, *args, **kwargs: called.append(module) or function(module, *args, **kwargs)  # noqa: E731
        monkeypatch.setitem(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", spy)
    sparse(model, DENSE, "*.0.*")
    assert model.generate(tokens, **options).tolist() == wanted.tolist()
    if implementation == "sdpa":
        assert set(called) == {model.model.layers[1].self_attn}


@pytest.mark.parametrize("is_padded", [False, True])
def test_unmatched_layers_in_a_traced_graph(is_padded):
    model, tokens = sparse(make("LlamaForCausalLM", **SMALL), SPARSE, "*.0.*"), ids()
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    arguments = {"input_ids": tokens, "use_cache": False} | ({"attention_mask": mask} if is_padded else {})
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    real = mask.bool() if is_padded else torch.ones_like(mask).bool()
    torch.testing.assert_close(result(compiled, **arguments)[real], result(model, **arguments)[real], **CLOSE)


# What a module does, not what it is called


class Wrapped(LlamaAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Renamed(LlamaAttention):
    def forward(self, *args, **kwargs):
        return self.whatever(*args, **kwargs)

    def whatever(self, *args, **kwargs):
        return LlamaAttention.forward(self, *args, **kwargs)


class AttentionlessAttention(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("cls", [Wrapped, Renamed])
def test_a_forward_that_calls_another_is_found(cls):
    plain, tokens = make("LlamaForCausalLM", **SMALL), ids()
    wanted = result(sparse(plain), input_ids=tokens)
    model = make("LlamaForCausalLM", **SMALL)
    for layer in model.model.layers:
        layer.self_attn.__class__ = cls
    sparse(model)
    torch.testing.assert_close(result(model, input_ids=tokens), wanted, rtol=0, atol=0)
    assert [row.active for row in mtsa.summary(model)] == [True, True]


def test_a_name_does_not_make_attention():
    model = make("LlamaForCausalLM", **SMALL)
    model.model.layers[0].mlp.up_proj = AttentionlessAttention(model.model.layers[0].mlp.up_proj)
    sparse(model)
    assert len(mtsa.summary(model)) == 2


class Handmade(nn.Module):
    """Neither its name nor a library says what it does."""

    def __init__(self):
        super().__init__()
        self.projection = nn.Linear(32, 96)

    def forward(self, hidden_states, **_):
        query, key, value = self.projection(hidden_states).chunk(3, -1)
        return (query @ key.mT).softmax(-1) @ value, None


def test_attention_made_by_hand_is_named(warnings):
    model = make("LlamaForCausalLM", **SMALL)
    model.model.layers[1].self_attn = Handmade()
    for entry in ({"*.1.*": SPARSE}, {"*.0.*": DENSE, "*.1.*": SPARSE}):
        with pytest.raises(mtsa.UnsupportedError, match=r"layers.1.self_attn \(Handmade\): does not go through"):
            mtsa.sparsify(model, {"sparse_cfg": entry})
    sparse(model)
    (message,) = warnings()
    assert message.startswith("model.layers.1.self_attn (Handmade): stays dense, although a pattern matches it")
    sparse(model, SPARSE, "*.0.*")
    assert len(warnings()) == 1


# Arguments


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "bert"])
@pytest.mark.parametrize("name", ["shift_labels", "ignore_index", "seq_idx", "num_logits_to_keep"])
def test_arguments_of_the_loss_do_not_reach_attention(family, name):
    tokens = ids(length=16)
    shifted = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1)
    value = {"shift_labels": shifted, "seq_idx": torch.zeros(2, 16, dtype=torch.int32)}.get(name, 3)
    model = FAMILIES[family].make()
    call = {"input_ids": tokens, "labels": tokens, name: value}
    try:
        wanted = model(**call).loss
    except TypeError:
        pytest.skip("the family does not take it")
    found = sparse(model, DENSE)(**call).loss
    torch.testing.assert_close(found, wanted, **CLOSE)


QUERY, KEY = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 3, 8)


def test_arguments_unknown_and_known(warnings):
    """What is new to Transformers does not break a model, but is spoken of once."""
    module = nn.Module()
    wanted = attention_forward(module, QUERY, KEY, KEY, None)[0]
    for name in sorted(IRRELEVANT_ARGUMENTS - {"position_ids", "output_attentions"}):
        torch.testing.assert_close(attention_forward(module, QUERY, KEY, KEY, None, **{name: 3})[0], wanted)
    assert not warnings()
    for _ in range(2):
        attention_forward(module, QUERY, KEY, KEY, None, new_in_version_99=3, another=None)
    (message,) = warnings()
    assert "new_in_version_99" in message
    for name in REFUSED_ARGUMENTS - {"context_parallel"}:  # that one is read here, and refused in continuous batching
        with pytest.raises(mtsa.UnsupportedError, match=f"the argument {name}=Tensor of the model's attention is not"):
            attention_forward(module, QUERY, KEY, KEY, None, **{name: QUERY})


def test_positional_parameters_are_in_the_order_of_transformers():
    for name in (ATTENTION_NAME, "modelopt_lite_paged_flash"):
        code = AttentionInterface()[name].__code__
        assert code.co_varnames[:7] == ("module", "query", "key", "value", "attention_mask", "dropout", "scaling")
    found = attention_forward(nn.Module(), QUERY, KEY, KEY, None, 0.0, 0.3)[0]
    torch.testing.assert_close(found, attention_forward(nn.Module(), QUERY, KEY, KEY, None, scaling=0.3)[0])
    with pytest.raises(mtsa.UnsupportedError, match=r"attention dropout \(0.1\) is not supported"):
        attention_forward(nn.Module(), QUERY, KEY, KEY, None, 0.1)


# Packed sequences


@pytest.fixture(scope="module")
def packers():
    """In FP64, with a window and without."""
    gemma = make("Gemma3ForCausalLM", "Gemma3TextConfig", **SMALL, head_dim=8, **ALTERNATING)
    return [sparse(model.double()) for model in (make("LlamaForCausalLM", **SMALL), gemma)]


@given(
    which=st.integers(0, 1),
    cuts=st.lists(st.integers(2, 9), min_size=1, max_size=4),
    padding=st.integers(0, 4),
    side=st.sampled_from(["left", "right"]),
    mask=st.sampled_from([None, "ones", "segments"]),
    cached=st.sampled_from([None, "dynamic", "static"]),
)
@settings(max_examples=60, **PATIENT)
def test_positions_that_begin_again_keep_sequences_apart(packers, which, cuts, padding, side, mask, cached):
    """Beside a cache, a mask of ones or of numbers of segments, with padding at either side."""
    model, total = packers[which], sum(cuts)
    padding = padding if mask else 0
    tokens = ids(1, total + padding)
    start = padding if side == "left" else 0
    positions, numbers = torch.ones_like(tokens), torch.zeros_like(tokens)
    edges = [start, *(start + sum(cuts[: i + 1]) for i in range(len(cuts)))]
    for number, (begin, end) in enumerate(pairwise(edges), 1):
        positions[0, begin:end] = torch.arange(end - begin)
        numbers[0, begin:end] = number if mask == "segments" else 1
    arguments = {"position_ids": positions, "use_cache": cached is not None}
    if mask:
        arguments["attention_mask"] = numbers
    if cached == "static":
        arguments["past_key_values"] = transformers.StaticCache(config=model.config, max_cache_len=50)
    together = result(model, input_ids=tokens, **arguments)
    for begin, end in pairwise(edges):
        alone = result(model, input_ids=tokens[:, begin:end])
        # Gemma's norms are in FP32.
        torch.testing.assert_close(together[:, begin:end], alone, **(CLOSE if which else EXACT))


def test_positions_without_a_mask_as_under_sequence_parallelism():
    """Where each process has all tokens of some heads, and no mask comes along."""
    query, key, value = torch.randn(3, 1, 4, 12, 8, dtype=torch.float64).unbind()
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    together = attention_forward(nn.Module(), query, key, value, None, position_ids=positions)[0]
    parts = [slice(0, 5), slice(5, 12)]
    alone = [attention_forward(nn.Module(), query[:, :, p], key[:, :, p], value[:, :, p], None)[0] for p in parts]
    torch.testing.assert_close(together, torch.cat(alone, 1), **EXACT)


def test_positions_that_begin_again_behind_a_cache_are_refused():
    model, tokens = sparse(make("LlamaForCausalLM", **SMALL)), ids(1)
    with torch.no_grad():
        cache = model(tokens[:, :9], use_cache=True).past_key_values
    positions = torch.tensor([[9, 10, 11, 12, 13, 0, 1, 2, 3, 4, 5, 6]])
    with pytest.raises(mtsa.UnsupportedError, match=r"layers.0.self_attn .*: position_ids start again beside keys"):
        model(tokens[:, 9:], past_key_values=cache, position_ids=positions)


def test_numbers_of_segments_without_positions_are_spoken_of_once(warnings):
    """Transformers makes one sequence of them, dense as well."""
    model, tokens = sparse(make("LlamaForCausalLM", **SMALL)), ids(1)
    for _ in range(2):
        result(model, input_ids=tokens, attention_mask=torch.tensor([[1] * 9 + [2] * 12]))
    assert [message for message in warnings() if "numbers than 0 and 1" in message] != []
    assert len(warnings()) == 1


# Distribution


def test_context_parallel_is_refused():
    """PyTorch's own attention is replaced there by one over all shards; the rest of a model sees one shard."""
    distributed = pytest.importorskip("torch.distributed.tensor.experimental")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        # PyTorch 2.11 takes only even numbers of tokens.
        model, tokens = sparse(make("LlamaForCausalLM", **SMALL)), ids()[:, :20]
        intercepted = mtsa.sparsify(FAMILIES["falcon"].make(), {"sparse_cfg": {"*": SPARSE}})
        with distributed.context_parallel(mesh, buffers=[tokens], buffer_seq_dims=[1]):
            for one in (model, intercepted):
                with pytest.raises(mtsa.UnsupportedError, match=r"\.0\.self_att.*: context_parallel shards the tokens"):
                    one(tokens, use_cache=False)
        assert torch.isfinite(result(model, input_ids=tokens)).all()
    finally:
        torch.distributed.destroy_process_group()
