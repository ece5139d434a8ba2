"""What Transformers tests of every model, around a sparse one that keeps all: it must be as the dense model is.

With n = m each computation is the dense one, so any other result comes from how this package is called.
"""

import copy

import pytest
import torch
from test_families import CLOSE, GENERATION, LENGTH, dense_model, logits, padded, sparse_model, tokens
from transformers import DynamicCache, StaticCache

CPU = ("torch", "cpu")
CAUSAL = ["llama", "mistral", "gemma2", "gpt_oss", "qwen3_moe", "opt", "falcon", "deepseek_v3"]
NEW = 6


@pytest.fixture(params=CAUSAL)
def pair(request):
    """A dense model and one that keeps all."""
    return dense_model(request.param, CPU), sparse_model(request.param, CPU, n=4)


def both(pair, run):
    """Check that both models give the same."""
    wanted, found = (run(model) for model in pair)
    torch.testing.assert_close(found, wanted, **CLOSE)
    return found


@torch.no_grad()
def test_a_loss_honours_labels_that_are_shifted_already(pair):
    """As sequence parallelism hands them over, with what else belongs to a loss."""
    ids = tokens(CPU)
    labels = ids.clone()
    labels[:, :9] = -100
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    loss = both(pair, lambda model: model(ids, labels=labels, use_cache=False).loss)
    same = both(pair, lambda model: model(ids, labels=labels, shift_labels=shifted, use_cache=False).loss)
    torch.testing.assert_close(same, loss, **CLOSE)
    rolled = both(pair, lambda model: model(ids, labels=labels, shift_labels=shifted.roll(1, 1), use_cache=False).loss)
    assert (rolled - loss).abs() > 1e-3
    several = both(pair, lambda model: model(ids, labels=labels, num_items_in_batch=7, use_cache=False).loss)
    torch.testing.assert_close(several, loss * (shifted != -100).sum() / 7)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(pair, side):
    batch, mask = padded(tokens(CPU), (LENGTH, 20), side)
    both(pair, lambda model: logits(model, batch, attention_mask=mask)[mask.bool()])


@pytest.mark.parametrize("make_cache", [DynamicCache, StaticCache])
def test_going_on_from_a_cache(pair, make_cache):
    """By a token, by several, and again from a copy of the cache."""
    ids = tokens(CPU)
    size = {"max_cache_len": LENGTH} if make_cache is StaticCache else {}

    def run(model):
        cache, found = make_cache(config=model.config, **size), []
        for start, stop in [(0, 20), (20, 21), (21, 22), (22, 30)]:
            found.append(logits(model, ids[:, start:stop], past_key_values=cache, use_cache=True))
        for each in (copy.deepcopy(cache), cache):
            found.append(logits(model, ids[:, 30:], past_key_values=each, use_cache=True))
        torch.testing.assert_close(found[-1], found[-2], rtol=0, atol=0)
        return torch.cat(found[:-1], dim=1)

    together = both(pair, run)
    torch.testing.assert_close(together, logits(pair[1], ids), **CLOSE)


def test_embeddings_in_the_place_of_tokens(pair):
    ids = tokens(CPU)
    with torch.no_grad():
        found = both(pair, lambda model: model(inputs_embeds=model.get_input_embeddings()(ids)).logits)
    torch.testing.assert_close(found, logits(pair[1], ids), **CLOSE)


@torch.no_grad()
def test_hidden_states_and_the_last_logits(pair):
    ids = tokens(CPU)
    both(pair, lambda model: torch.stack(model(ids, output_hidden_states=True).hidden_states))
    last = both(pair, lambda model: logits(model, ids, logits_to_keep=3))
    torch.testing.assert_close(last, logits(pair[1], ids)[:, -3:], **CLOSE)


HOW = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_generation(pair, how):
    rows = 1 if "prompt_lookup_num_tokens" in how else 2
    batch, mask = padded(tokens(CPU), (LENGTH, 20), "left")
    options = {**GENERATION, "max_new_tokens": NEW, "min_new_tokens": NEW, **how}
    results = []
    for model in pair:
        torch.manual_seed(0)
        results.append(model.generate(batch[:rows], attention_mask=mask[:rows], **options).tolist())
    assert results[1] == results[0]


def test_assisted_by_itself(pair):
    """What several tokens at once say is what each alone says."""
    ids = tokens(CPU, rows=1)
    options = {**GENERATION, "max_new_tokens": NEW, "min_new_tokens": NEW, "attention_mask": torch.ones_like(ids)}
    wanted, model = pair[0].generate(ids, **options).tolist(), pair[1]
    draft = copy.deepcopy(model)
    assert model.generate(ids, **options).tolist() == wanted
    assert model.generate(ids, assistant_model=draft, **options).tolist() == wanted


def test_generation_goes_on_from_a_cache(pair):
    ids = tokens(CPU, rows=1)
    options = {**GENERATION, "min_new_tokens": 3, "max_new_tokens": 3, "return_dict_in_generate": True}
    results = []
    for model in pair:
        first = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        extended = torch.cat([first.sequences, ids[:, :2]], dim=1)
        mask = torch.ones_like(extended)
        second = model.generate(extended, attention_mask=mask, past_key_values=first.past_key_values, **options)
        results.append(second.sequences.tolist())
    assert results[1] == results[0]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the method is about to be renamed
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_gradients(pair, use_reentrant):
    ids, results = tokens(CPU), []
    for model in pair:
        model.train()
        if use_reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(ids, labels=ids, use_cache=False).loss.backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    wanted, found = results
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("family", ["bert", "modernbert", "whisper"])
def test_models_with_other_attention(family):
    """Encoders and cross-attention, with and without padding."""
    pair = dense_model(family, CPU), sparse_model(family, CPU, n=4)
    batch, mask = padded(tokens(CPU), (LENGTH, 20), "right")
    both(pair, lambda model: logits(model, batch))
    both(pair, lambda model: logits(model, batch, attention_mask=mask)[mask.bool()])
