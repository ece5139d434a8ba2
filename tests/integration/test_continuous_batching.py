"""What the documentation says that continuous batching does not do, or does otherwise than ``generate``."""

import logging

import pytest
import torch
import transformers
from test_families import by_hand, dense_model, in_continuous_batches, logits, needs_paging, sparse_model, tokens

import modelopt_lite as mtsa
from modelopt_lite.models import layout

pytestmark = needs_paging

PROMPT = [5, 6, 7, 8, 9, 10, 11]
RULE = {"method": "sparse_softmax", "sparsity_n": 1, "dense_window_size": 2, "backend": "triton"}


@pytest.mark.parametrize("make", [dense_model, sparse_model])
@pytest.mark.parametrize("family", ["nemotron", "deepseek_v3"])
def test_what_runs_neither_dense_nor_sparse(family, make, target):
    model = make(family, target)
    paging = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64, use_cuda_graph=False)
    options = {"continuous_batching_config": paging, "progress_bar": False}
    if make is dense_model:
        results = model.generate_batch([PROMPT], **options)
    else:
        with mtsa.continuous_batching(model):
            results = model.generate_batch([PROMPT], **options)
    assert [bool(result.error) for result in results.values()] == [True]


@torch.no_grad()
def cache_of(model, *steps):
    """The cache after forwards of these token ids, one after the other."""
    cache = None
    for ids in steps:
        cache = model(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values
    return cache


def test_a_piece_of_a_single_token_is_dense(target):
    model, whole, cut = sparse_model("llama", target), [], []
    for seed in range(3):
        ids = tokens(target, rows=1, length=21, seed=seed)
        whole.append(by_hand(model, ids, 6))
        cut.append(by_hand(model, ids[:, 20:], 6, cache_of(model, ids[:, :20])))
        with mtsa.continuous_batching(model):
            for size, wanted in ((64, whole[-1]), (20, cut[-1])):
                assert in_continuous_batches(model, ids.tolist(), size, 6, use_cuda_graph=False) == [wanted]
    assert cut != whole


@pytest.mark.parametrize("is_shared", [True, False])
def test_blocks_that_another_sequence_has_generated_are_dense(is_shared, target):
    """They are shared in whole, here two of 16 tokens, unless sharing is switched off."""
    model, new, prompts, found = sparse_model("llama", target), 26, [], []
    paging = transformers.ContinuousBatchingConfig(
        page_size=16,
        num_blocks=16,
        max_batch_tokens=64,
        allow_block_sharing=is_shared,
        use_async_batching=False,
        use_cuda_graph=False,
    )
    generation = transformers.GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def generate(manager, ids):
        result, request = None, manager.add_request(ids[0].tolist(), max_new_tokens=new)
        while result is None or not result.is_finished():
            result = manager.get_result(request, timeout=60)
            assert result is not None
            assert result.error is None
        return result.generated_tokens

    with (
        mtsa.continuous_batching(model),
        model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=paging
        ) as manager,
    ):
        for seed in range(3):
            start, more = (tokens(target, rows=1, length=length, seed=seed) for length in (9, 6))
            generated = torch.tensor([generate(manager, start)], device=start.device)
            prompts.append(torch.cat([start, generated, more], dim=1))
            found.append(generate(manager, prompts[-1]))
    whole = [by_hand(model, prompt, new) for prompt in prompts]
    shared = [
        by_hand(model, prompt[:, 32:], new, cache_of(model, prompt[:, :9], *prompt[:, 9:32].split(1, dim=1)))
        for prompt in prompts
    ]
    assert shared != whole
    assert found == (shared if is_shared else whole)


def test_outside_of_the_block_flash_attention_takes_over_and_is_reported(target, monkeypatch, caplog):
    """Where it is installed, which is put on here, with PyTorch's attention in its place."""
    api = "transformers.generation.continuous_batching.continuous_api"
    monkeypatch.setattr(f"{api}.is_flash_attn_3_available", lambda **_: False)
    monkeypatch.setattr(f"{api}.is_flash_attn_2_available", lambda **_: True)
    model = sparse_model("llama", target)
    with pytest.raises(ValueError, match="modelopt_lite.* is not supported"):
        in_continuous_batches(model, [PROMPT], 64, 2, auto_switch_to_flash=False)
    names, switch = [], model.set_attn_implementation

    def stand_in(name):
        names.append(name)
        switch("sdpa" if name == "flash_attention_2" else name)

    monkeypatch.setattr(model, "set_attn_implementation", stand_in)
    with caplog.at_level(logging.WARNING, "modelopt_lite"):
        (found,) = in_continuous_batches(model, [PROMPT], 64, 2, use_cuda_graph=False)
    assert names[0] == "flash_attention_2"
    ids = torch.tensor([PROMPT], device=target[1])
    assert found == by_hand(dense_model("llama", target), ids, 2)
    reported = [record.getMessage().split(" ")[0] for record in caplog.records if record.name.startswith("modelopt")]
    assert reported == [row.name for row in mtsa.summary(model)]
    # Afterwards Transformers puts back what was there.
    torch.testing.assert_close(logits(model, ids), logits(sparse_model("llama", target), ids), rtol=0, atol=0)


def test_decode_reads_pages_where_they_lie(monkeypatch):
    """A GPU kernel, or Triton's interpreter, gets the page table; the tokens are those of the model by itself."""
    pages, device = [], "cuda" if torch.cuda.is_available() else "cpu"

    def spy(request, backend):
        if request.page_table is not None:
            pages.append((request.page_size, request.k.data_ptr(), tuple(request.lengths_k.tolist())))
        return compute(request, backend)

    compute = layout.compute
    monkeypatch.setattr(layout, "compute", spy)
    model = mtsa.sparsify(dense_model("llama", ("triton", device)), {"sparse_cfg": {"*": RULE}})
    prompts, new = [PROMPT, [9, 4, 3], list(range(3, 43))], 3
    with mtsa.continuous_batching(model):
        found = in_continuous_batches(model, prompts, 64, new, page_size=16, use_cuda_graph=False)
    assert found == [by_hand(model, torch.tensor([prompt], device=device), new) for prompt in prompts]
    layers = model.config.num_hidden_layers
    # The first token comes out of the prompts, one step for each of the others.
    lengths = [tuple(len(prompt) + step for prompt in prompts) for step in range(1, new)]
    assert {x[0] for x in pages} == {16}
    assert [sorted(x[2]) for x in pages] == [sorted(x) for x in lengths for _ in range(layers)]
    # Views of one memory, each layer's at its place.
    assert len({x[1] for x in pages}) == layers
