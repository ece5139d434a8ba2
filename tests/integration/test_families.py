"""One contract for every family: whatever the batch, the cache or the wrapper, the same result, or a refusal."""

import copy
import gc
import logging
import re
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate import dispatch_model
from families import ALTERNATING, FAMILIES, SMALL, VOCABULARY, Family, names
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, GenerationConfig, LlamaConfig, QuantizedCache, StaticCache, cache_utils
from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask

import modelopt_lite as mtsa
from modelopt_lite.models import huggingface
from modelopt_lite.models.discovery import ATTENTION_NAME
from modelopt_lite.models.huggingface import attention_forward

LENGTH = 37
# Twice what the FP32 logits of the dense models with PyTorch's own attention err against FP64: up to 2.4e-6 (olmo2).
CLOSE = {"rtol": 0, "atol": 5e-6}
RAGGED = [(37, 20), (5, 30), (1, 12)]

CAUSAL = names(lambda family: family.kind == "causal" and family.refused is None)
ENCODERS = names(lambda family: family.kind == "encoder" and family.refused is None)
SEQ2SEQ = names(lambda family: family.kind == "seq2seq" and family.refused is None)
REFUSED = names(lambda family: family.refused is not None)

contract = pytest.mark.contract


def config_for(backend, n=1):
    """Sparsity that bites on short inputs."""
    entry = {
        "method": "sparse_softmax",
        "sparsity_n": n,
        "dense_window_size": 3,
        "num_sink_tokens": 1,
        "backend": backend,
    }
    return {"sparse_cfg": {"*": entry}}


def dense_model(family, target, **overrides):
    return FAMILIES[family].make(**overrides).to(target[1])


def sparse_model(family, target, n=1, **overrides):
    return mtsa.sparsify(dense_model(family, target, **overrides), config_for(target[0], n))


def tokens(target, rows=2, length=LENGTH, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator).to(target[1])


def sounds(ids):
    """What a speech model hears, another for each row: 20 keys for its cross-attention."""
    return torch.randn(ids.shape[0], 8, 40, generator=torch.Generator().manual_seed(2)).to(ids.device)


def arguments(model, ids, **kwargs):
    """The arguments of a forward of token ids; for a decoder with an encoder, which hears the same in every row."""
    kwargs = {"input_ids": ids, **kwargs}
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return kwargs
    of_tokens = ("input_ids", "attention_mask", "position_ids")
    renamed = {f"decoder_{name}" if name in of_tokens else name: value for name, value in kwargs.items()}
    return {"input_features": sounds(ids)[:1].expand(len(ids), -1, -1), **renamed}


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(**arguments(model, ids, **kwargs)).logits


def padded(ids, lengths, side):
    """Return a batch of the rows' last ``lengths`` tokens with padding on one side (or around), and its mask."""
    width = ids.shape[1]
    batch, mask = torch.full_like(ids, 7), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        start = {"left": width - length, "right": 0, "both": (width - length) // 2}[side]
        batch[row, start : start + length] = ids[row, width - length :]
        mask[row, start : start + length] = 1
    return batch, mask


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def with_positions(family, mask):
    """Position ids for a padded batch, for families that do not count them from the mask themselves."""
    return {} if family in ("opt", "qwen2_5_vl") else {"position_ids": positions(mask)}


def without_cache(family):
    """The argument that keeps a decoder from caching."""
    return {} if FAMILIES[family].kind == "encoder" else {"use_cache": False}


@contract("sparse and back")
@pytest.mark.parametrize("family", CAUSAL + ENCODERS + SEQ2SEQ)
def test_sparse_dense_and_back(family, target):
    """n = m is dense, ``disabled`` is dense, undone is the same bits; and in between every layer is sparse."""
    ids = tokens(target)
    model = dense_model(family, target)
    before = logits(model, ids)
    implementation, classes = model.config._attn_implementation, [type(module) for module in model.modules()]
    for n in (4, 1):
        mtsa.sparsify(model, config_for(target[0], n))
        with mtsa.collect_statistics(model) as statistics:
            result = logits(model, ids)
        if n == 4:
            torch.testing.assert_close(result, before, **CLOSE)
        else:
            assert (result - before).abs().max() > 50 * CLOSE["atol"]
    rows = mtsa.summary(model, statistics)
    assert all(row.enabled for row in rows)
    active = [row for row in rows if row.sparsity is not None]
    assert all(0.1 < row.sparsity < 0.9 for row in active)
    assert len(active) == len([row for row in rows if "visual" not in row.name])
    with mtsa.disabled(model):
        torch.testing.assert_close(logits(model, ids), before, **CLOSE)
    mtsa.unsparsify(model)
    assert model.config._attn_implementation == implementation
    assert [type(module) for module in model.modules()] == classes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=0)


@pytest.mark.parametrize("asked", ["argument", "config"])
@pytest.mark.parametrize("family", CAUSAL + ENCODERS + SEQ2SEQ)
def test_attention_weights_are_refused(family, asked, target):
    """Also where a model's layers do not hear of it, or have a computation of their own for it."""
    model, ids = sparse_model(family, target), tokens(target)
    argument = {"output_attentions": True} if asked == "argument" else {}
    if asked == "config":
        for module in model.modules():
            if isinstance(module, transformers.PreTrainedModel):
                module.config._output_attentions = True  # as a config read from a file may have it
    first = re.escape(mtsa.summary(model)[0].name)
    with pytest.raises(mtsa.UnsupportedError, match=f"^{first} .*: output_attentions is not supported; unsparsify the"):
        logits(model, ids, **argument)


@contract("padding")
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("family", CAUSAL + ENCODERS + SEQ2SEQ)
def test_padding(family, side, target):
    model, ids = sparse_model(family, target), tokens(target)
    # Cross-attention does not hear of the queries' padding, so not either that a row has a single token.
    for lengths in RAGGED[:2] if family in SEQ2SEQ else RAGGED:
        batch, mask = padded(ids, lengths, side)
        extra = with_positions(family, mask)
        together = logits(model, batch, attention_mask=mask, **extra)
        assert torch.isfinite(together).all()
        for row, length in enumerate(lengths):
            alone = logits(model, ids[row : row + 1, LENGTH - length :])
            torch.testing.assert_close(together[row, mask[row].bool()], alone[0], **CLOSE)


@contract("packed by {how}")
@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("family", CAUSAL + ENCODERS)
def test_packed(family, how, target):
    reason = FAMILIES[family].skips.get(how)
    model, ids = (sparse_model if reason is None else dense_model)(family, target), tokens(target)
    cuts = [0, 9, 10, 21, LENGTH]
    extra = {"position_ids": torch.cat([torch.arange(b - a) for a, b in pairwise(cuts)])[None].to(ids.device)}
    if how == "cu_seq_lens":
        cumulative = torch.tensor(cuts, dtype=torch.int32, device=ids.device)
        extra |= {"cu_seq_lens_q": cumulative, "cu_seq_lens_k": cumulative, "max_length_q": 16, "max_length_k": 16}
    together = logits(model, ids[:1], **without_cache(family), **extra)
    alone = torch.cat([logits(model, ids[:1, start:stop]) for start, stop in pairwise(cuts)], dim=1)
    if reason is not None:
        assert (together - alone).abs().max() > 50 * CLOSE["atol"]
        pytest.skip(reason)
    torch.testing.assert_close(together, alone, **CLOSE)


def in_chunks(model, family, ids, mask, cuts, cache=None):
    parts = []
    for start, stop in pairwise((0, *cuts, ids.shape[1])):
        extra = {} if mask is None else {"attention_mask": mask[:, :stop]}
        extra |= {} if mask is None else {k: x[:, start:stop] for k, x in with_positions(family, mask).items()}
        with torch.no_grad():
            result = model(**arguments(model, ids[:, start:stop], past_key_values=cache, use_cache=True, **extra))
        cache = result.past_key_values
        parts.append(result.logits)
    return torch.cat(parts, dim=1)


@contract("chunks")
@pytest.mark.parametrize("cuts", [(20,), (2, 4, 35), (11, 19, 22, 30)])
@pytest.mark.parametrize("family", CAUSAL + SEQ2SEQ)
def test_chunks(family, cuts, target):
    """Also when a sliding cache has dropped keys: groups and sinks count from the first real token.

    Also in cross-attention, where a chunk of 20 queries by chance has as many keys.
    """
    model, ids = sparse_model(family, target), tokens(target)
    torch.testing.assert_close(in_chunks(model, family, ids, None, cuts), logits(model, ids), **CLOSE)
    batch, mask = padded(ids, (LENGTH, 30), "left")
    whole = logits(model, batch, attention_mask=mask, **with_positions(family, mask))
    chunked = in_chunks(model, family, batch, mask, cuts)
    real = mask.bool()
    torch.testing.assert_close(chunked[real], whole[real], **CLOSE)


@contract("chunks")
@pytest.mark.parametrize("family", CAUSAL)
def test_chunks_over_a_static_cache(family, target):
    """Of which most slots are still empty, and which a sliding layer fills and then shifts."""
    model, ids = sparse_model(family, target), tokens(target)
    for lengths in ((LENGTH, LENGTH), (LENGTH, 30)):
        batch, mask = padded(ids, lengths, "left")
        whole = logits(model, batch, attention_mask=mask, **with_positions(family, mask))
        cache = StaticCache(config=model.config, max_cache_len=LENGTH + 20)
        seen = None if lengths[1] == LENGTH else mask
        chunked = in_chunks(model, family, batch, seen, (11, 19, 22, 30), cache)
        torch.testing.assert_close(chunked[mask.bool()], whole[mask.bool()], **CLOSE)


FURTHER = {
    "apertus": ("Apertus", {}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 8}),
    "exaone4": ("Exaone4", ALTERNATING),
    "helium": ("Helium", {"head_dim": 8}),
    "olmo3": ("Olmo3", ALTERNATING),
    "seed_oss": ("SeedOss", {"head_dim": 8}),
}


@pytest.mark.parametrize("name", FURTHER)
def test_a_family_that_is_not_in_the_table(name, target):
    """It takes the same path: padding, chunks, and dense where n = m."""
    prefix, settings = FURTHER[name]
    if not hasattr(transformers, f"{prefix}Config"):
        pytest.skip("this version of Transformers does not know it")
    family = Family(name, f"{prefix}ForCausalLM", f"{prefix}Config", {**SMALL, **settings}, "")
    ids, model = tokens(target), family.make().to(target[1])
    dense = logits(model, ids)
    torch.testing.assert_close(logits(mtsa.sparsify(model, config_for(target[0], n=4)), ids), dense, **CLOSE)
    mtsa.sparsify(model, config_for(target[0]))
    whole = logits(model, ids)
    assert (whole - dense).abs().max() > 50 * CLOSE["atol"]
    torch.testing.assert_close(in_chunks(model, name, ids, None, (11, 19, 22, 30)), whole, **CLOSE)
    batch, mask = padded(ids, (LENGTH, 20), "left")
    together = logits(model, batch, attention_mask=mask, position_ids=positions(mask))
    alone = logits(model, ids[1:, LENGTH - 20 :])
    torch.testing.assert_close(together[mask.bool()], torch.cat([whole[0], alone[0]]), **CLOSE)


@pytest.mark.parametrize("length", [20, LENGTH])
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_cross_attention_has_no_dense_window(family, length, target):
    """But sinks."""
    ids, found = tokens(target, length=length), []
    for changes in ({}, {"dense_window_size": 0}, {"dense_window_size": 99}, {"num_sink_tokens": 5}):
        entry = config_for(target[0])["sparse_cfg"]["*"] | changes
        found.append(logits(mtsa.sparsify(dense_model(family, target), {"sparse_cfg": {"*.encoder_attn": entry}}), ids))
    first, *same, other = found
    assert (first - logits(dense_model(family, target), ids)).abs().max() > 50 * CLOSE["atol"]
    assert (first - other).abs().max() > 50 * CLOSE["atol"]
    for one in same:
        torch.testing.assert_close(one, first, rtol=0, atol=0)


@torch.no_grad()
def steps_by_hand(model, ids, new, cache=None):
    """The logits (new, vocabulary) of the tokens that greedy generation of one sequence chooses."""
    found = []
    for _ in range(new):
        result = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        found.append(result.logits[0, -1])
        ids = found[-1].argmax().reshape(1, 1)
    return torch.stack(found)


def by_hand(model, ids, new, cache=None):
    """Greedy generation of one sequence, step by step."""
    return steps_by_hand(model, ids, new, cache).argmax(-1).tolist()


SHORT = 9  # so short that also two layers with sliding windows see the padding before it, if it is not masked
PREFIX = 30  # so long that they see it from the last token


@pytest.mark.parametrize("family", CAUSAL)
def test_what_is_generated_depends_on_attention(family, target):
    """The tests of generation would notice if it were dense, saw padding or forgot: other tokens would come.

    And none of the tokens is so close a choice that rounding decides.
    """
    model, ids, new = sparse_model(family, target), tokens(target), 4
    prompts = [ids[:1], ids[1:], ids[1:, -SHORT:]]
    steps = [steps_by_hand(model, prompt, new + 1) for prompt in prompts]
    best, second = torch.cat(steps).topk(2).values.unbind(-1)
    assert (best - second).min() > 50 * CLOSE["atol"]
    wanted = [step.argmax(-1).tolist()[:new] for step in steps]
    with mtsa.disabled(model):
        # Each test compares two of the three, of which one must tell.
        assert sum(by_hand(model, prompt, new) != one for prompt, one in zip(prompts, wanted, strict=True)) >= 2
    assert by_hand(model, padded(ids, (LENGTH, SHORT), "left")[0][1:], new) != wanted[2]
    for prompt, one in zip(prompts, wanted, strict=True):
        assert by_hand(model, prompt[:, -1:], new) != one
    for row in range(2):
        assert by_hand(model, ids[row : row + 1, PREFIX:], new) != wanted[row]


GENERATION = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@contract("generate, {cache} cache")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", CAUSAL)
def test_generate(family, cache, target):
    model, ids, new = sparse_model(family, target), tokens(target), 5
    batch, mask = padded(ids, (LENGTH, SHORT), "left")
    found = model.generate(
        batch,
        attention_mask=mask,
        max_new_tokens=new,
        min_new_tokens=new,
        cache_implementation=None if cache == "dynamic" else cache,
        disable_compile=True,
        **GENERATION,
    )
    for row, length in enumerate((LENGTH, SHORT)):
        one = ids[row : row + 1, LENGTH - length :]
        if family == "qwen2_5_vl":  # remembers positions of the batch before
            alone = model.generate(one, attention_mask=torch.ones_like(one), max_new_tokens=new, **GENERATION)
            assert found[row, LENGTH:].tolist() == alone[0, length:].tolist()
        else:
            assert found[row, LENGTH:].tolist() == by_hand(model, one, new)


@contract("beams")
@pytest.mark.parametrize("family", CAUSAL)
def test_beam_search(family, target):
    """A padded batch's best beams are those of each sequence alone."""
    model, ids = sparse_model(family, target), tokens(target)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, **GENERATION}
    batch, mask = padded(ids, (LENGTH, SHORT), "left")
    found = model.generate(batch, attention_mask=mask, **options)
    for row, length in enumerate((LENGTH, SHORT)):
        one = ids[row : row + 1, LENGTH - length :]
        alone = model.generate(one, attention_mask=torch.ones_like(one), **options)
        assert found[row, LENGTH:].tolist() == alone[0, length:].tolist()


@contract("prefix reuse")
@pytest.mark.parametrize("family", CAUSAL)
def test_prefix_reuse(family, target):
    """The cache of the prompts' beginnings, computed once and copied, gives what the whole prompts give."""
    model, ids = sparse_model(family, target), tokens(target)
    wanted = [by_hand(model, ids[row : row + 1], 4) for row in range(2)]
    with torch.no_grad():
        prefix = model(input_ids=ids[:, :PREFIX], past_key_values=DynamicCache(config=model.config), use_cache=True)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, **GENERATION}
    for _ in range(2):
        cache = copy.deepcopy(prefix.past_key_values)
        found = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
        assert found[:, LENGTH:].tolist() == wanted


def prompt_that_repeats(model, ids):
    """Return a prompt whose last token stands in it once before, followed by what the model says comes next."""
    for last in range(3, VOCABULARY):
        prompts = ids.where(ids != last, 0).repeat(VOCABULARY, 1)
        prompts[:, 6], prompts[:, -1] = last, last
        prompts[:, 7] = torch.arange(VOCABULARY)
        (best, second), (chosen, _) = (x.unbind(-1) for x in logits(model, prompts)[:, -1].topk(2))
        hits = (chosen == prompts[:, 7]) & (chosen != last) & (best - second > 50 * CLOSE["atol"])
        if hits.any():
            return prompts[hits][:1]
    raise AssertionError("the model says nothing of what stands in its prompts")


@contract("assisted")
@pytest.mark.parametrize("family", CAUSAL)
def test_assisted_decoding(family, target):
    """By prompt lookup, which finds a token that is accepted: what verifies several tokens is sparse like a prefill."""
    model, ids, steps = sparse_model(family, target), tokens(target, rows=1, length=16), []
    model.register_forward_pre_hook(lambda *call: steps.append(call[2]["input_ids"].shape[1]), with_kwargs=True)
    prompt = prompt_that_repeats(model, ids)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "attention_mask": torch.ones_like(ids), **GENERATION}
    wanted = prompt
    for _ in range(2):
        wanted = torch.cat([wanted, logits(model, wanted)[:, -1:].argmax(-1)], dim=1)
    steps.clear()
    found = model.generate(prompt, prompt_lookup_num_tokens=3, **options)
    assert steps[0] == 16 + 3
    assert len(steps) < 8
    assert found[:, : 16 + 2].tolist() == wanted.tolist()
    with mtsa.disabled(model):
        prompt = prompt_that_repeats(model, ids)
        wanted = model.generate(prompt, **options)
        steps.clear()
        assert model.generate(prompt, prompt_lookup_num_tokens=3, **options).tolist() == wanted.tolist()
        assert len(steps) < 8


@contract("assisted")
@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 18),
    reason="before Transformers 5.18, a draft with sliding windows fails by itself",
)
@pytest.mark.parametrize("family", CAUSAL)
def test_assisted_by_a_draft_model(family, target):
    """A draft gives every step several tokens to verify, so every step is a prefill; but the last if none is left.

    The draft is the model itself, whose steps of one token are dense: of what it proposes, the first is accepted.
    """
    model, ids, draft = sparse_model(family, target), tokens(target, rows=1), sparse_model(family, target)
    draft.generation_config.update(num_assistant_tokens=3, assistant_confidence_threshold=0.0)
    steps = []
    model.register_forward_pre_hook(lambda *call: steps.append(call[2]["input_ids"].shape[1]), with_kwargs=True)
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "attention_mask": torch.ones_like(ids), **GENERATION}
    found = model.generate(ids, assistant_model=draft, **options)
    assert all(length > 1 for length in steps[:-1])
    assert len(steps) < 9
    wanted = ids
    while wanted.shape[1] < found.shape[1] - 1:
        wanted = torch.cat([wanted, logits(model, wanted)[:, -1:].argmax(-1)], dim=1)
    assert found[:, :-1].tolist() == wanted.tolist()


@contract("training")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the method is about to be renamed
@pytest.mark.parametrize("family", CAUSAL + ENCODERS + SEQ2SEQ)
def test_gradient_checkpointing(family, target):
    model, ids = sparse_model(family, target), tokens(target, length=20)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model.zero_grad()
        model(**arguments(model, ids, labels=ids, **without_cache(family))).loss.backward()
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert any(gradient.abs().max() > 0 for gradient in found[0])
    # The same computation twice, but on a GPU some of PyTorch's sums come in any order.
    tolerance = {"rtol": 0, "atol": 0} if target[1] == "cpu" else {"rtol": 1e-4, "atol": 1e-6}
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@contract("copy and save")
@pytest.mark.parametrize("family", CAUSAL + ENCODERS + SEQ2SEQ)
def test_copy_and_save(family, target, tmp_path):
    model, ids = sparse_model(family, target), tokens(target)
    found = logits(model, ids)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(logits(twin, ids), found, rtol=0, atol=0)
    mtsa.unsparsify(twin)
    torch.testing.assert_close(logits(model, ids), found, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    restored = mtsa.from_pretrained(tmp_path).to(ids.device).eval()
    assert type(restored) is type(model)
    torch.testing.assert_close(logits(restored, ids), found, rtol=0, atol=0)
    assert mtsa.summary(restored) == mtsa.summary(model)


def test_a_class_of_ones_own_does_not_come_back_as_another(tmp_path):
    class Mine(transformers.BertForMaskedLM):
        pass

    model = Mine(transformers.BertConfig(**FAMILIES["bert"].settings))
    mtsa.sparsify(model, config_for("torch")).save_pretrained(tmp_path)
    with pytest.raises(mtsa.ConfigError, match="architectures: 'Mine' is not allowed; must be a model of"):
        mtsa.from_pretrained(tmp_path)


@contract("PEFT")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:The following (rank|alpha)_pattern keys")  # its own
@pytest.mark.parametrize("family", CAUSAL + ENCODERS + SEQ2SEQ)
def test_peft(family, target):
    """Wrapped before or after, and unwrapped; an adapter that does nothing yet changes nothing."""
    ids = tokens(target)
    model = sparse_model(family, target)
    found = logits(model, ids)
    lora = LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM" if family in CAUSAL else None)
    wrapped = get_peft_model(model, lora).eval()
    torch.testing.assert_close(logits(wrapped, ids), found, **CLOSE)
    with pytest.raises(mtsa.UnsupportedError, match="output_attentions is not supported"):
        logits(wrapped, ids, output_attentions=True)
    mtsa.unsparsify(wrapped)
    dense = logits(wrapped, ids)
    assert (dense - found).abs().max() > 50 * CLOSE["atol"]
    mtsa.sparsify(wrapped, config_for(target[0]))
    torch.testing.assert_close(logits(wrapped, ids), found, **CLOSE)
    assert all(row.name.startswith("base_model.model.") for row in mtsa.summary(wrapped))
    torch.testing.assert_close(logits(wrapped.unload(), ids), found, **CLOSE)


@contract("compile")
@pytest.mark.parametrize("family", CAUSAL + ENCODERS + SEQ2SEQ)
def test_compile(family, target):
    model, ids = sparse_model(family, target), tokens(target)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    if "compile" in FAMILIES[family].skips:
        with pytest.raises(torch._dynamo.exc.Unsupported) as refusal:
            logits(compiled, ids, **without_cache(family))
        assert "UnsupportedError" in f"{refusal.value} {refusal.value.__cause__!r}"
        pytest.skip(FAMILIES[family].skips["compile"])
    torch.testing.assert_close(logits(compiled, ids, **without_cache(family)), logits(model, ids), **CLOSE)
    batch, mask = padded(ids, (LENGTH, 21), "left")
    extra = {"attention_mask": mask, **without_cache(family), **with_positions(family, mask)}
    found, wanted = logits(compiled, batch, **extra), logits(model, batch, **extra)
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], **CLOSE)


@contract("refused")
@pytest.mark.parametrize("family", REFUSED)
def test_refused_before_anything_changes(family, target):
    model = dense_model(family, target)
    before = model.config.to_dict(), model.config._attn_implementation, [type(module) for module in model.modules()]
    with pytest.raises(mtsa.UnsupportedError, match=FAMILIES[family].refused):
        mtsa.sparsify(model, config_for(target[0]))
    assert before == (model.config.to_dict(), model.config._attn_implementation, [type(m) for m in model.modules()])


FROM_AN_ENCODER = {
    "generate, dynamic cache": {},
    "generate, static cache": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3},
}


@contract("{how}")
@pytest.mark.parametrize("how", FROM_AN_ENCODER)
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_generate_from_an_encoder(family, how, target):
    """Cross-attention keeps its keys; with n = m the tokens are those of the dense model."""
    ids = tokens(target, length=6)
    inputs = {"input_features": sounds(ids), "decoder_input_ids": ids}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, **GENERATION, **FROM_AN_ENCODER[how]}
    wanted = dense_model(family, target).generate(**inputs, **options)
    assert sparse_model(family, target, n=4).generate(**inputs, **options).tolist() == wanted.tolist()
    model = sparse_model(family, target)
    together = model.generate(**inputs, **options)
    for row in range(2):
        one = {name: x[row : row + 1] for name, x in inputs.items()}
        assert model.generate(**one, **options).tolist() == together[row : row + 1].tolist()


FUZZED = ["llama", "gemma2", "gpt_oss", "deepseek_v3", "starcoder2"]


@st.composite
def batches(draw):
    """A ragged, padded batch, where it is cut into chunks, and a sparsity."""
    width = draw(st.integers(2, 40))
    lengths = draw(st.lists(st.integers(1, width), min_size=1, max_size=3))
    starts = [draw(st.sampled_from([0, width - length, (width - length) // 2])) for length in lengths]
    cuts = sorted(draw(st.sets(st.integers(1, width - 1), max_size=3)))
    # A chunk that leaves a sequence a single token is a decode step for it, and dense.
    while any(
        length > 1 and min(stop, start + length) - max(begin, start) == 1
        for begin, stop in pairwise((0, *cuts, width))
        for start, length in zip(starts, lengths, strict=True)
    ):
        cuts.pop()
    m = draw(st.sampled_from([2, 4, 8, 16]))
    method = {
        "method": "sparse_softmax",
        "sparsity_n": draw(st.integers(1, m)),
        "sparsity_m": m,
        "num_sink_tokens": draw(st.integers(0, 9)),
        "dense_window_size": draw(st.sampled_from([0, 1, 3, 16])),
    }
    return width, lengths, starts, cuts, {"sparse_cfg": {"*": method}}, draw(st.integers(0, 99))


def check_any_batch(model, family, target, batch, tolerance):
    width, lengths, starts, cuts, config, seed = batch
    model = mtsa.sparsify(model, config)
    ids = tokens(target, len(lengths), width, seed)
    mask = torch.zeros_like(ids)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        mask[row, start : start + length] = 1
    together = in_chunks(model, family, ids, mask, cuts)
    for row in range(len(lengths)):
        alone = logits(model, ids[row : row + 1, mask[row].bool()])
        torch.testing.assert_close(together[row, mask[row].bool()], alone[0], **tolerance)


@pytest.fixture(scope="module")
def exact_models():
    """In FP64 no two scores are so close that rounding decides between them."""
    models = {family: FAMILIES[family].make().double() for family in FUZZED}
    for family in ("gpt_oss", "deepseek_v3"):
        models[family].set_experts_implementation("eager")  # the others know no FP64
    return models


@given(family=st.sampled_from(FUZZED), batch=batches())
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_batch_and_any_chunks(exact_models, family, batch):
    check_any_batch(exact_models[family], family, ("torch", "cpu"), batch, {"rtol": 1e-5, "atol": 1e-5})


@pytest.mark.gpu
@given(family=st.sampled_from(FUZZED), batch=batches())
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_batch_and_any_chunks_in_the_kernel(family, batch):
    """Few, as almost every example needs kernels of its own, which take seconds to compile."""
    target = ("triton", "cuda")
    check_any_batch(dense_model(family, target), family, target, batch, CLOSE)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("is_padded", [False, True])
def test_compiled_decode_over_a_static_cache(family, is_padded, target):
    """One graph serves all decode steps until a sliding cache is full, and no step waits to learn lengths."""
    model, ids = sparse_model(family, target), tokens(target, length=20)
    mask = padded(ids, (20, 11), "left")[1]
    torch.compiler.reset()
    step = torch.compile(model, fullgraph=True, backend="eager")
    found = []
    for decode in (model, step):
        cache, steps = StaticCache(config=model.config, max_cache_len=32), []
        with torch.no_grad():
            seen = {"attention_mask": mask} if is_padded else {}
            token = model(input_ids=ids, past_key_values=cache, **seen).logits[:, -1:].argmax(-1)
            for i in range(4):
                if is_padded:
                    seen = {"attention_mask": torch.cat([mask, torch.ones_like(mask[:, : i + 1])], dim=1)}
                inputs = model.prepare_inputs_for_generation(token, past_key_values=cache, use_cache=True, **seen)
                inputs["position_ids"] = torch.full_like(token, 20 + i)
                result = decode(**inputs)
                steps.append(result.logits)
                token = result.logits.argmax(-1)
        found.append(torch.cat(steps))
    torch.testing.assert_close(*found, **CLOSE)


def unpack(packed, bits):
    """Take bytes apart into numbers of a few bits each, one part of all bytes after the other."""
    return torch.cat([(packed >> shift) % 2**bits for shift in range(0, 8, bits)])


@pytest.mark.parametrize("backend", ["fp8", "quanto"])
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_quantized_cache(family, backend, target, monkeypatch):
    """The prefill sees exact keys, later steps what the cache gives back."""
    if backend == "quanto":
        library = pytest.importorskip("optimum.quanto.library")
        # On a CPU it would first compile a function in C++, for most of a minute.
        monkeypatch.setattr(library.extensions.cpp.ext, "_lib", SimpleNamespace(unpack=unpack))
        settings = {"backend": "quanto", "nbits": 4, "residual_length": 4, "q_group_size": 4}
    elif hasattr(cache_utils, "Fp8QuantizedLayer"):
        settings = {"backend": "fp8"}
    else:
        pytest.skip("this version of Transformers knows no FP8 cache")
    ids = tokens(target, rows=1)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "attention_mask": torch.ones_like(ids), **GENERATION}
    options |= {"cache_implementation": "quantized", "cache_config": settings}
    wanted = dense_model(family, target).generate(ids, **options)
    assert sparse_model(family, target, n=4).generate(ids, **options).tolist() == wanted.tolist()
    model = sparse_model(family, target)
    first = logits(model, ids)[:, -1].argmax(-1)
    found = model.generate(ids, **options)
    assert found[:, LENGTH].tolist() == first.tolist()
    cache = QuantizedCache(config=model.config, **settings)
    assert found[0, LENGTH:].tolist() == by_hand(model, ids, 8, cache)


def check_device_map(family, target, places, folder):
    """A model sparsified and spread, and one loaded onto several devices and then sparsified, are as on one."""
    model, ids = sparse_model(family, target), tokens(target)
    names = DEVICE_MAPS.get(family, DEVICE_MAPS["llama"])
    device_map = {name: places[i] for name, i in names.items()}
    batch, mask = padded(ids, (LENGTH, 20), "left")
    extra = {"attention_mask": mask, "position_ids": positions(mask)}
    wanted, wanted_padded = logits(model, ids), logits(model, batch, **extra)
    model.save_pretrained(folder / "saved")
    loaded = mtsa.from_pretrained(folder / "saved", device_map=device_map, offload_folder=folder / "loaded").eval()
    spread = dispatch_model(model, device_map=device_map, offload_dir=folder / "spread", main_device=str(ids.device))
    for made in (loaded, spread):
        assert set(made.hf_device_map.values()) == set(places)
        torch.testing.assert_close(logits(made, ids).to(wanted.device), wanted, **CLOSE)
        found = logits(made, batch, **extra).to(wanted.device)
        torch.testing.assert_close(found[mask.bool()], wanted_padded[mask.bool()], **CLOSE)
        assert all(row.active for row in mtsa.summary(made))
        mtsa.unsparsify(made)
        assert (logits(made, ids).to(wanted.device) - wanted).abs().max() > 50 * CLOSE["atol"]


DEVICE_MAPS = {
    "llama": {
        "model.embed_tokens": 0,
        "model.layers.0": 0,
        "model.layers.1": 1,
        "model.norm": 1,
        "model.rotary_emb": 0,
        "lm_head": 1,
    },
    # The head has the weights of the embeddings.
    "gemma3": {
        "model.embed_tokens": 0,
        "model.layers.0": 0,
        "model.layers.1": 1,
        "model.norm": 1,
        "model.rotary_emb": 0,
        "lm_head": 0,
    },
    "falcon": {
        "transformer.word_embeddings": 0,
        "transformer.h.0": 0,
        "transformer.h.1": 1,
        "transformer.ln_f": 1,
        "transformer.rotary_emb": 0,
        "lm_head": 0,
    },
}


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_device_map_with_offloading(family, target, tmp_path):
    check_device_map(family, target, [target[1] if target[1] == "cpu" else 0, "disk"], tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("family", ["llama", "gemma3", "falcon"])
def test_device_map_over_two_gpus(family, tmp_path):
    check_device_map(family, ("triton", "cuda"), [0, 1], tmp_path)


def in_continuous_batches(model, prompts, batch_tokens, new, **options):
    """Greedy generation over Transformers' paged cache, with at most so many tokens in a step."""
    # Asynchronous steps may begin with buffers that Transformers has cleared too late.
    options = {"use_async_batching": False} | options
    paging = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=batch_tokens, **options)
    gc.freeze()  # it collects garbage twice, which would take longer than all else
    try:
        results = model.generate_batch(
            prompts,
            generation_config=GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=paging,
            progress_bar=False,
        )
    finally:
        gc.unfreeze()
    assert [result.error for result in results.values()] == [None] * len(prompts)
    return [result.generated_tokens for result in results.values()]


needs_paging = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 19), reason="needs Transformers 5.19"
)


# Falcon's calls are intercepted. Transformers' paged cache takes latent attention's values to be as large as its keys,
# and nemotron does not pass it on to its layers; both fail dense as well.
PAGED = [family for family in CAUSAL if family not in ("falcon", "deepseek_v3", "nemotron")]


@needs_paging
@pytest.mark.parametrize("family", PAGED)
def test_continuous_batching(family, target):
    """Prompts whole, and in pieces beside steps of others, generate what each does alone; sliding caches drop keys."""
    # Transformers' paged cache reads the number of heads in the config, which these two families make no use of; and it
    # begins with a step of as many tokens as it ever takes behind a full page, for which learned positions must do.
    overrides = {"num_key_value_heads": 4} if family in ("gpt_neox", "opt") else {}
    if family == "opt":
        overrides |= {"max_position_embeddings": 1024}
    model, new = sparse_model(family, target, **overrides), 6
    prompts = [tokens(target, 1, length, seed=length)[0].tolist() for length in (37, 5, 22, 1, 50)]
    wanted, dense = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=target[1])
        options = {"max_new_tokens": new, "min_new_tokens": new, "attention_mask": torch.ones_like(ids), **GENERATION}
        wanted.append(model.generate(ids, **options)[0, ids.shape[1] :].tolist())
        with mtsa.disabled(model):
            dense.append(model.generate(ids, **options)[0, ids.shape[1] :].tolist())
    assert sum(one != other for one, other in zip(wanted, dense, strict=True)) > 1
    # PyTorch's grouped products of experts read on the host in FP32, which no CUDA graph can.
    whole = {"use_cuda_graph": False} if family in ("gpt_oss", "qwen3_moe", "mixtral") else {}
    with mtsa.continuous_batching(model) as inside:
        assert inside is model
        assert in_continuous_batches(model, prompts, 256, new, **whole) == wanted
        with mtsa.collect_statistics(model) as statistics:
            # With 19 tokens a step no prompt is cut such that a single token is left, which would be dense.
            assert in_continuous_batches(model, prompts, 19, new, use_cuda_graph=False) == wanted
    assert all(layer.sparsity > 0.1 for name, layer in statistics.layers.items() if "visual" not in name)
    ids = torch.tensor([prompts[0]], device=target[1])
    assert model.generate(ids, **options | {"attention_mask": None})[0, ids.shape[1] :].tolist() == wanted[0]


@needs_paging
def test_continuous_batching_of_a_dense_layer_and_of_a_disabled_model(target):
    """What is not sparse runs on the same kernels."""
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13]]
    model = dense_model("llama", target)
    wanted = in_continuous_batches(model, prompts, 64, 4)
    mtsa.sparsify(model, {"sparse_cfg": {"*.0.*": config_for(target[0])["sparse_cfg"]["*"]}})
    with mtsa.continuous_batching(model), mtsa.disabled(model):
        assert in_continuous_batches(model, prompts, 64, 4) == wanted


@needs_paging
def test_a_refusal_in_continuous_batching_is_in_the_result(target):
    """Of a model that keeps the paged cache from its layers."""
    paging = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64, use_cuda_graph=False)
    with mtsa.continuous_batching(sparse_model("nemotron", target)) as model:
        results = model.generate_batch([[5, 6, 7]], continuous_batching_config=paging, progress_bar=False)
    assert "its layers must pass on" in next(iter(results.values())).error


@needs_paging
def test_continuous_batching_and_all_else_keep_apart(target):
    model, ids = sparse_model("llama", target), tokens(target)
    with mtsa.continuous_batching(model), pytest.raises(mtsa.UnsupportedError, match=r"layers.0.* there is no paged"):
        logits(model, ids)
    torch.testing.assert_close(logits(model, ids), logits(sparse_model("llama", target), ids), rtol=0, atol=0)
    with pytest.raises(ValueError, match="modelopt_lite.* is not supported"):
        in_continuous_batches(model, [[5, 6, 7, 8]], 64, 2)


@pytest.mark.parametrize(
    ("make", "version", "message"),
    [
        (dense_model, "5.19.0", "has no sparse layer that goes through Transformers' attention interface"),
        (lambda _, target: sparse_model("falcon", target), "5.19.0", "has no sparse layer that goes through"),
        (sparse_model, "5.18.1", "needs Transformers 5.19 or later, not 5.18.1"),
    ],
)
def test_continuous_batching_is_refused(make, version, message, target, monkeypatch):
    model = make("llama", target)
    before = model.config._attn_implementation
    monkeypatch.setattr(huggingface.transformers, "__version__", version)
    with pytest.raises(mtsa.UnsupportedError, match=message), mtsa.continuous_batching(model):
        pass
    assert model.config._attn_implementation == before


def test_a_model_switched_elsewhere_is_reported_once(target, caplog):
    model, ids = sparse_model("llama", target), tokens(target)
    with caplog.at_level(logging.WARNING, "modelopt_lite"):
        logits(model, ids)
        assert not caplog.records
        model.set_attn_implementation("sdpa")
        logits(model, ids)
        logits(model, ids)
    assert [record.getMessage().split(" ")[0] for record in caplog.records] == [row.name for row in mtsa.summary(model)]
    assert "its forward did not call this package's attention" in caplog.text
    assert [row.active for row in mtsa.summary(model)] == [False, False]


@pytest.mark.parametrize("lengths", [(LENGTH, 20), (1, 12)])
def test_statistics_count_every_layer(lengths, target):
    """What is measured does not depend on padding, and does not count a row of one token, which is a decode step."""
    model, ids = sparse_model("gemma2", target), tokens(target)
    batch, mask = padded(ids, lengths, "left")
    with mtsa.collect_statistics(model) as together:
        logits(model, batch, attention_mask=mask, position_ids=positions(mask))
    with mtsa.collect_statistics(model) as alone:
        for row, length in enumerate(lengths):
            logits(model, ids[row : row + 1, LENGTH - length :])
    for name, layer in alone.layers.items():
        assert (together.layers[name].visible, together.layers[name].kept) == (layer.visible, layer.kept)
    assert alone.total.visible == sum(layer.visible for layer in alone.layers.values())
    sliding, full = alone.layers.values()
    assert sliding.visible < full.visible


@pytest.mark.gpu
def test_statistics_in_a_cuda_graph_are_refused(monkeypatch):
    target = ("triton", "cuda")
    model = sparse_model("llama", target)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    logits(model, tokens(target))
    with (
        mtsa.collect_statistics(model),
        pytest.raises(mtsa.UnsupportedError, match=r"layers.0.self_attn .*: statistics cannot be collected in a CUDA"),
    ):
        logits(model, tokens(target))


def whatever(batch, head, query, key):
    return key <= query + 1


CALLS = {
    "a function mixed in": lambda arguments: create_causal_mask(or_mask_function=whatever, **arguments),
    "another mixed in": lambda arguments: create_causal_mask(and_mask_function=whatever, **arguments),
    "chunks": lambda arguments: create_chunked_causal_mask(**arguments),
    "blocks": lambda arguments: create_causal_mask(
        block_sequence_ids=torch.tensor([[-1, 0, 0, -1, 1, 1]] * 2), **arguments
    ),
}


@pytest.mark.parametrize("kind", CALLS)
def test_other_masks_are_read_or_refused(kind):
    """What comes down to a layout is as in PyTorch: one more token, one sequence after another; else the layer says."""
    config = LlamaConfig(attention_chunk_size=4)
    arguments = {"config": config, "inputs_embeds": torch.zeros(2, 6, 8), "past_key_values": None}
    query, key, value = torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0)).unbind()
    for padding in (None, torch.ones(2, 6)):
        config._attn_implementation = "eager"
        bias = CALLS[kind]({**arguments, "attention_mask": padding})
        config._attn_implementation = ATTENTION_NAME
        mask = CALLS[kind]({**arguments, "attention_mask": padding})
        if kind == "blocks":
            with pytest.raises(
                mtsa.UnsupportedError, match=r"layer \? \(Module\): .* neither causal nor bidirectional"
            ):
                attention_forward(torch.nn.Module(), query, key, value, mask)
            continue
        wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, bias).transpose(1, 2)
        torch.testing.assert_close(attention_forward(torch.nn.Module(), query, key, value, mask)[0], wanted, **CLOSE)


def test_masks_of_ones_own_are_refused(target):
    model, ids = sparse_model("mistral", target), tokens(target)
    with pytest.raises(
        mtsa.UnsupportedError,
        match=r"model.layers.0.self_attn .*: its attention mask \[2, 1, 37, 37\] is not supported",
    ):
        logits(model, ids, attention_mask=torch.randn(2, 1, LENGTH, LENGTH, device=ids.device))
    with pytest.raises(mtsa.UnsupportedError, match="attention_mask: 10 columns are not enough; 37 tokens"):
        logits(model, ids, attention_mask=torch.ones_like(ids[:, :10]))


def with_holes(ids):
    """Return a mask with padding between real tokens, as after several turns of a conversation in one batch."""
    mask = torch.ones_like(ids)
    mask[0, 7:12] = 0
    mask[1, [0, 1, 20, 33, 36]] = 0
    return mask


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("family", ["gpt_oss", "mistral", *ENCODERS, *SEQ2SEQ])
def test_padding_between_real_tokens(family, is_compiled, target):
    model, ids = sparse_model(family, target), tokens(target)
    torch.compiler.reset()
    run = torch.compile(model, fullgraph=True, backend="eager") if is_compiled else model
    mask = with_holes(ids)
    together = logits(run, ids, attention_mask=mask, position_ids=positions(mask), **without_cache(family))
    for row in range(2):
        alone = logits(model, ids[row : row + 1, mask[row].bool()])
        torch.testing.assert_close(together[row, mask[row].bool()], alone[0], **CLOSE)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_padding_between_the_keys_of_cross_attention(is_compiled, target):
    """Also where there happen to be as many keys as queries."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, is_decoder=True, add_cross_attention=True)
    model = mtsa.sparsify(transformers.BertLMHeadModel(config).eval().to(target[1]), config_for(target[0]))
    ids = tokens(target)
    hidden = 8 * torch.randn(*ids.shape, 32, generator=torch.Generator().manual_seed(3)).to(ids.device)
    torch.compiler.reset()
    run = torch.compile(model, fullgraph=True, backend="eager") if is_compiled else model
    mask = with_holes(ids)
    for queries in (ids, ids[:, :20]):
        together = logits(run, queries, encoder_hidden_states=hidden, encoder_attention_mask=mask, use_cache=False)
        for row in range(2):
            keys = hidden[row : row + 1, mask[row].bool()]
            alone = logits(model, queries[row : row + 1], encoder_hidden_states=keys)
            torch.testing.assert_close(together[row], alone[0], **CLOSE)


@pytest.mark.parametrize("cut", [29, 10])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_padding_between_real_tokens_over_a_sliding_cache(is_compiled, cut, target):
    """The cache keeps slots; where these hold fewer tokens than the window, the call is refused."""
    model, ids = sparse_model("qwen2", target), tokens(target)
    mask = with_holes(ids)
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    torch.compiler.reset()
    run = torch.compile(model, fullgraph=True, backend="eager") if is_compiled else model

    def chunk(start, stop):
        extra = {"attention_mask": mask[:, :stop], "position_ids": positions(mask)[:, start:stop]}
        return logits(run, ids[:, start:stop], past_key_values=cache, **extra)

    first = chunk(0, cut)
    if cut == 29:
        together = torch.cat([first, chunk(cut, LENGTH)], dim=1)
        for row in range(2):
            alone = logits(model, ids[row : row + 1, mask[row].bool()])
            torch.testing.assert_close(together[row, mask[row].bool()], alone[0], **CLOSE)
        return
    # The first row's next token sees all 7 before it; there are 4.
    if is_compiled and target[1] != "cpu":
        pytest.skip("a failed assertion on a GPU ends the process's use of it")
    with pytest.raises(RuntimeError if is_compiled else mtsa.UnsupportedError, match="that are still in the window"):
        chunk(cut, LENGTH)


def test_a_model_inside_another_module(target):
    """A Transformers model may be a part of a user's model, beside the user's own attention."""

    class Mine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.language = dense_model("llama", target)

        def forward(self, input_ids):
            return self.language(input_ids)

    ids, mine = tokens(target), mtsa.sparsify(Mine(), config_for(target[0]))
    torch.testing.assert_close(logits(mine, ids), logits(sparse_model("llama", target), ids), rtol=0, atol=0)
    assert mtsa.summary(mine)[0].name == "language.model.layers.0.self_attn"
    mtsa.unsparsify(mine)
    torch.testing.assert_close(logits(mine, ids), logits(dense_model("llama", target), ids), rtol=0, atol=0)
    assert not hasattr(mine.language.config, "modelopt_lite_sparsity")
