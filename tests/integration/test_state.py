"""What a call does is decided once: by its caller's state, in its forward, and it reaches nothing else."""

import asyncio
import contextvars
import copy
import functools
import io
import logging
import pickle  # noqa: TID251  # as others do it with a model: torch.save, processes that are spawned, Ray
import threading
import time
from contextlib import ExitStack, nullcontext

import pytest
import torch
import transformers
from families import FAMILIES, SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from test_families import config_for, dense_model, logits, sparse_model, tokens
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

import modelopt_lite as mtsa
from modelopt_lite import stats
from modelopt_lite.models import huggingface, recomputation

CPU = ("torch", "cpu")
CONFIG = config_for("torch")


# --- gradient checkpointing ------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48, bias=False), nn.Linear(16, 16, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        return self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and another branch beside it, which saves tensors after it."""

    def __init__(self):
        super().__init__()
        self.attn, self.up = Attention(), nn.Linear(16, 16)

    def forward(self, x):
        return x + self.attn(x) + self.up(x).sin().square()


class Stack(nn.Module):
    """Blocks whose calls of PyTorch's attention are intercepted; they are checkpointed as a test likes."""

    def __init__(self, run=lambda block, x: block(x)):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.run = nn.ModuleList([Block(), Block()]), run
        with torch.no_grad():
            for block in self.blocks:
                block.attn.qkv.weight.mul_(8)

    def forward(self, x):
        for block in self.blocks:
            x = self.run(block, x)
        return x


def stack_input():
    return torch.randn(2, 21, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def reentrant(block, x):
    return checkpoint(block, x, use_reentrant=True)


def not_reentrant(block, x):
    return checkpoint(block, x, use_reentrant=False)


def offloaded(block, x):
    with torch.autograd.graph.save_on_cpu():
        return not_reentrant(block, x)


def without_early_stop(block, x):
    return checkpoint(block, x, use_reentrant=False, early_stop=False)


def debugged(block, x):
    return checkpoint(block, x, use_reentrant=False, determinism_check="none")


class OfAnotherLibrary(torch.autograd.Function):
    """As other libraries write it."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.run(x)
        torch.autograd.backward(output, grad)
        return None, x.grad


def nested(outer, inner):
    return lambda block, x: outer(lambda y: inner(block, y), x)


RUNS = {
    "reentrant": reentrant,
    "not reentrant": not_reentrant,
    "offloaded": offloaded,
    "without early stop": without_early_stop,
    "unchecked": debugged,
    "of another library": OfAnotherLibrary.apply,
    "reentrant in reentrant": nested(reentrant, reentrant),
    "not in not": nested(not_reentrant, not_reentrant),
    "not in reentrant": nested(reentrant, not_reentrant),
    "reentrant in not": nested(not_reentrant, reentrant),
    "three deep": nested(reentrant, nested(not_reentrant, reentrant)),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_recomputation_follows_its_forward(run, data):
    """Several forwards, each in a state of its own, and backward passes in any order after the state has changed."""
    changes = ["nothing", "disabled", "first off", "all on", "other config"]
    steps = data.draw(st.lists(st.sampled_from(changes), min_size=1, max_size=4))
    order = data.draw(st.permutations(range(len(steps))))
    ends = data.draw(st.sampled_from([*changes, "collected"]))
    together = data.draw(st.booleans())
    results = []
    for each in (None, run):
        model = mtsa.sparsify(Stack(each) if each else Stack(), CONFIG)
        losses, counted = [], []
        for i, step in enumerate(steps):
            with ExitStack() as state, mtsa.collect_statistics(model) as statistics:
                change(model, step, state)
                losses.append((i + 1) * model(stack_input()).square().mean())
            counted.append(statistics.total.visible)
        with ExitStack() as state:
            change(model, ends, state)
            for loss in [sum(losses)] if together else [losses[i] for i in order]:
                loss.backward()
        results.append((gradients(model), counted))
    (wanted, counted), (found, counted_with) = results
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert counted_with == counted


def change(model, what, state):
    """Change what a model's attention does, for good or until ``state`` is closed."""
    if what == "disabled":
        state.enter_context(mtsa.disabled(model))
    elif what == "collected":
        state.enter_context(mtsa.collect_statistics(model))
    elif what == "first off":
        mtsa.disable_sparse_attention(model, "*.0.*")
    elif what == "all on":
        mtsa.enable_sparse_attention(model)
    elif what == "other config":
        mtsa.sparsify(model, {"sparse_cfg": {"*": {"method": "sink_window", "dense_window_size": 4}}})


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_state_that_changes_inside_a_checkpoint(run):
    """As where one function computes what a sparse and a dense model predict; and two backward passes over it."""

    def both(model, x):
        with mtsa.disabled(model):
            dense = model(x)
        return (model(x) - dense) * dense

    results = []
    for each in (lambda function, x: function(x), run):
        model = mtsa.sparsify(Stack(), CONFIG)
        loss = each(functools.partial(both, model), stack_input()).square().mean()
        mtsa.disable_sparse_attention(model)
        # What a reentrant checkpoint computes can be used once.
        loss.backward(retain_graph="reentrant" not in str(run) and each is not OfAnotherLibrary.apply)
        results.append(gradients(model))
    torch.testing.assert_close(*results[::-1], rtol=1e-4, atol=1e-5)


def test_two_backward_passes_over_one_forward():
    results = []
    for run in (None, not_reentrant):
        model = mtsa.sparsify(Stack(run) if run else Stack(), CONFIG)
        loss = model(stack_input()).square().mean()
        mtsa.disable_sparse_attention(model)
        loss.backward(retain_graph=True)
        loss.backward()
        results.append(gradients(model))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("run", [reentrant, not_reentrant])
def test_a_layer_that_is_no_longer_sparse_is_not_computed_again_dense(run):
    model = mtsa.sparsify(Stack(run), CONFIG)
    done, abandoned = model(stack_input()).mean(), model(stack_input()).mean()
    done.backward()
    mtsa.unsparsify(model)
    model(stack_input()).mean().backward()
    with pytest.raises(mtsa.UnsupportedError, match=r"blocks.1.attn \(Attention\): .* call backward\(\) before"):
        abandoned.backward()


@pytest.mark.parametrize("run", [reentrant, not_reentrant])
def test_a_layer_that_was_not_sparse_yet_is_computed_again_dense(run):
    results = []
    for each in (None, run):
        model = Stack(each) if each else Stack()
        loss = model(stack_input()).square().mean()
        if each:
            mtsa.sparsify(model, CONFIG)
        loss.backward()
        results.append(gradients(model))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


FAMILIES_CHECKPOINTED = ["llama", "gemma2", "falcon", "bert", "gpt_neox", "whisper"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the method is about to be renamed
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES_CHECKPOINTED)
def test_gradients_of_families_when_the_state_changes_before_backward(family, use_reentrant):
    """A sparse and a dense loss in one step."""
    results = []
    for checkpointed in (False, True):
        model = sparse_model(family, CPU).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        with torch.enable_grad():
            sparse = logits.__wrapped__(model, tokens(CPU), **no_cache(model)).square().mean()
            with mtsa.disabled(model):
                dense = logits.__wrapped__(model, tokens(CPU), **no_cache(model)).square().mean()
            mtsa.disable_sparse_attention(model)
            (sparse - 2 * dense).backward()
        results.append(gradients(model))
    assert (results[1] - results[0]).norm() < 1e-4 * results[0].norm()


def no_cache(model):
    return {} if model.config.model_type == "bert" else {"use_cache": False}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_model_that_asks_for_no_mask(use_reentrant):
    results = []
    for run in (lambda layer, x: layer(x), functools.partial(checkpoint, use_reentrant=use_reentrant)):
        torch.manual_seed(0)
        config = ViTConfig(**{k: v for k, v in SMALL.items() if "vocab" not in k}, image_size=32, patch_size=8)
        model = mtsa.sparsify(ViTModel(config).train(), CONFIG)
        x = torch.randn(1, 17, config.hidden_size, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss = run(model.layers[0], 8 * x).square().mean()
        with mtsa.disabled(model):
            loss.backward()
        results.append(gradients(model))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_nothing_is_kept_of_what_was_recomputed():
    model = mtsa.sparsify(Stack(reentrant), CONFIG)
    flags = model.blocks[0].attn.sparse_attention
    loss = model(stack_input()).mean()
    assert len(flags.checkpoints) == 1
    loss.backward()
    del loss
    assert not flags.checkpoints


def test_pytorch_saves_tensors_as_this_package_expects():
    assert None not in (recomputation._FIRST_RUN, recomputation._SECOND_RUN)


# --- threads and tasks -----------------------------------------------------------------------------------------------


def in_threads(*functions):
    """Run functions at the same time; return what they return."""
    found = [None] * len(functions)

    def run(i, function):
        found[i] = function()

    threads = [threading.Thread(target=run, args=(i, function)) for i, function in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def serve(model, ids, is_dense, is_counted, barrier):
    """Run a model a few times, as one request of many."""
    with (
        mtsa.disabled(model) if is_dense else nullcontext(),
        mtsa.collect_statistics(model) if is_counted else nullcontext() as statistics,
    ):
        barrier.wait()
        results = [logits(model, ids) for _ in range(3)]
        barrier.wait()
    return results, statistics.total.visible if is_counted else None


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_threads_do_not_reach_into_each_other(family, monkeypatch, caplog):
    monkeypatch.setattr("sys.setswitchinterval", lambda _: None)
    model = sparse_model(family, CPU)
    inputs = [tokens(CPU, seed=i) for i in range(8)]
    wanted = [[dense_model(family, CPU)(x).logits, logits(model, x)] for x in inputs]
    with mtsa.collect_statistics(model) as statistics:
        logits(model, inputs[0])
    barrier = threading.Barrier(len(inputs))
    requests = [
        functools.partial(serve, model, x, is_dense=bool(i % 2), is_counted=bool(i // 2 % 2), barrier=barrier)
        for i, x in enumerate(inputs)
    ]
    with caplog.at_level(logging.WARNING, "modelopt_lite"):
        found = in_threads(*requests)
    for i, (results, visible) in enumerate(found):
        for result in results:
            torch.testing.assert_close(result, wanted[i][0 if i % 2 else 1], rtol=0, atol=5e-6)
        assert visible == (None if not i // 2 % 2 else 0 if i % 2 else 3 * statistics.total.visible)
    assert not caplog.records
    assert [row.active for row in mtsa.summary(model)] == [True, True]


def test_threads_that_share_a_counter_lose_nothing(monkeypatch):
    """All find that nothing was counted before, unless one of them waits for the other."""
    count = stats.count_prefill

    def slow(*args, **kwargs):
        time.sleep(0.05)
        return count(*args, **kwargs)

    monkeypatch.setattr(stats, "count_prefill", slow)
    model, ids = sparse_model("llama", CPU), tokens(CPU)
    with mtsa.collect_statistics(model) as once:
        logits(model, ids)
    with mtsa.collect_statistics(model) as twice:
        contexts = [contextvars.copy_context() for _ in range(2)]
        in_threads(*(functools.partial(context.run, logits, model, ids) for context in contexts))
    assert twice.total.visible == 2 * once.total.visible > 0


def test_tasks_do_not_reach_into_each_other():
    model, ids = sparse_model("llama", CPU), tokens(CPU)
    sparse = logits(model, ids)

    async def request(is_dense):
        with mtsa.disabled(model) if is_dense else nullcontext(), mtsa.collect_statistics(model) as statistics:
            results = []
            for _ in range(3):
                await asyncio.sleep(0)
                results.append(logits(model, ids))
        return results, statistics.total.visible > 0

    async def all_of_them():
        return await asyncio.gather(*(request(is_dense) for is_dense in (False, True, False, True)))

    for i, (results, is_counted) in enumerate(asyncio.run(all_of_them())):
        assert is_counted == (i % 2 == 0)
        assert all(torch.equal(result, sparse) == (i % 2 == 0) for result in results)


def test_a_layer_that_goes_around_is_reported_once_by_many_threads(caplog):
    model, ids = sparse_model("llama", CPU), tokens(CPU)
    model.set_attn_implementation("sdpa")
    with caplog.at_level(logging.WARNING, "modelopt_lite"):
        in_threads(*[lambda: logits(model, ids)] * 8)
    assert len(caplog.records) == 2


def test_replicas_of_data_parallel_follow_their_caller():
    """Each runs in a thread of its own."""
    model, x = mtsa.sparsify(Stack(), CONFIG), stack_input()

    def run():
        replica = model.blocks[0].attn._replicate_for_data_parallel()
        replica.qkv, replica.out = model.blocks[0].attn.qkv, model.blocks[0].attn.out
        (found,) = in_threads(lambda: replica(x).detach())
        return found

    sparse, dense = model.blocks[0].attn(x).detach(), Stack().blocks[0].attn(x).detach()
    torch.testing.assert_close(run(), sparse, rtol=0, atol=0)
    with mtsa.disabled(model):
        torch.testing.assert_close(run(), dense, rtol=0, atol=0)


def test_blocks_may_be_nested(monkeypatch):
    model, ids = sparse_model("llama", CPU), tokens(CPU)
    with mtsa.disabled(model):
        dense = logits(model, ids)
        with mtsa.disabled(model):
            pass
        torch.testing.assert_close(logits(model, ids), dense, rtol=0, atol=0)
    with mtsa.collect_statistics(model) as outer:
        logits(model, ids)
        with mtsa.collect_statistics(model) as inner:
            logits(model, ids)
    assert outer.total.visible == inner.total.visible > 0


def test_disabled_is_seen_by_what_is_compiled():
    model, ids = sparse_model("llama", CPU), tokens(CPU)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    sparse = logits(compiled, ids)
    with mtsa.disabled(model):
        dense = logits(compiled, ids)
        torch.testing.assert_close(dense, logits(model, ids), rtol=0, atol=5e-6)
    assert (sparse - dense).abs().max() > 1e-3
    torch.testing.assert_close(logits(compiled, ids), sparse, rtol=0, atol=0)


# --- pickling --------------------------------------------------------------------------------------------------------


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))  # noqa: S301


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # noqa: TID251


def seen(module, args, output):
    """A hook of a user's."""
    module.seen = True


@pytest.mark.parametrize("by", [by_pickle, by_torch, copy.deepcopy])
@pytest.mark.parametrize("family", ["llama", "falcon", "whisper"])
def test_copies(family, by):
    model, ids = sparse_model(family, CPU), tokens(CPU)
    layer = next(module for module in model.modules() if isinstance(module, mtsa.SparseAttentionModule))
    layer.register_forward_hook(seen)
    with mtsa.disabled(model):
        twin = by(model)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    torch.testing.assert_close(logits(twin, ids), logits(model, ids), rtol=0, atol=0)
    assert sum(hasattr(module, "seen") for module in twin.modules()) == 1
    mtsa.unsparsify(twin)
    torch.testing.assert_close(logits(twin, ids), logits(dense_model(family, CPU), ids), rtol=0, atol=0)
    assert model.config._attn_implementation == sparse_model(family, CPU).config._attn_implementation


def run_elsewhere(model, ids, results):
    results.put(logits(model, ids).numpy())


def test_another_process():
    model, ids = sparse_model("llama", CPU), tokens(CPU)
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=run_elsewhere, args=(model, ids, results))
    process.start()
    found = torch.from_numpy(results.get(timeout=120))
    process.join()
    torch.testing.assert_close(found, logits(model, ids), rtol=0, atol=5e-6)


# --- implementations and configs -------------------------------------------------------------------------------------


def llama(config):
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def state_of(model):
    """All that says which attention a model runs."""
    configs = {name: getattr(module, "config", None) for name, module in model.named_modules()}
    parts = {name: config for name, config in configs.items() if isinstance(config, transformers.PreTrainedConfig)}
    return (
        {name: config._attn_implementation for name, config in parts.items()},
        {name: config.to_dict() for name, config in parts.items()},
        [type(module) for module in model.modules()],
        [sorted(vars(module)) for module in model.modules()],
        [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in model.modules()],
    )


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["sparsify", "other", "unsparsify", "eager", "sdpa", "sibling", "sibling back"])))
def test_any_order_of_switches(steps):
    """A model and its sibling made of one config: each does what was asked of it last, and nothing of the other's."""
    config = LlamaConfig(**SMALL)
    model, sibling = llama(config), llama(config)
    wanted, is_sparse = "sdpa", False
    config_of_sibling = "sdpa"
    for step in steps:
        if step in ("sparsify", "other"):
            mtsa.sparsify(model, CONFIG if step == "sparsify" else mtsa.SPARSE_SOFTMAX_DEFAULT)
            is_sparse = True
        elif step == "unsparsify":
            mtsa.unsparsify(model)
            is_sparse = False
        elif step in ("eager", "sdpa"):
            model.set_attn_implementation(step)
            if sibling.config is model.config:
                config_of_sibling = step
            wanted, is_sparse = step, False
        elif step == "sibling":
            mtsa.sparsify(sibling, CONFIG)
        else:
            mtsa.unsparsify(sibling)
        assert model.config._attn_implementation == ("modelopt_lite" if is_sparse else wanted)
        sibling_is_sparse = any(row.enabled for row in mtsa.summary(sibling))
        assert sibling.config._attn_implementation == ("modelopt_lite" if sibling_is_sparse else config_of_sibling)
        assert hasattr(sibling.config, "modelopt_lite_sparsity") == sibling_is_sparse
    mtsa.unsparsify(model)
    assert model.config._attn_implementation == wanted


def test_teacher_and_student_of_one_config(tmp_path):
    config = LlamaConfig(**SMALL)
    teacher, student = llama(config), llama(config)
    ids = tokens(CPU)
    teacher.save_pretrained(tmp_path)  # which writes the type of its weights into the config
    before, dense = state_of(teacher), logits(teacher, ids)
    mtsa.sparsify(student, CONFIG)
    assert state_of(teacher) == before
    torch.testing.assert_close(logits(teacher, ids), dense, rtol=0, atol=0)
    teacher.save_pretrained(tmp_path)
    with pytest.raises(mtsa.ConfigError, match="holds no modelopt_lite_sparsity"):
        mtsa.from_pretrained(tmp_path)
    mtsa.sparsify(teacher, CONFIG)
    mtsa.unsparsify(student)
    torch.testing.assert_close(logits(student, ids), dense, rtol=0, atol=0)
    fresh = mtsa.sparsify(llama(LlamaConfig(**SMALL)), CONFIG)
    torch.testing.assert_close(logits(teacher, ids), logits(fresh, ids), rtol=0, atol=0)
    mtsa.unsparsify(teacher)
    assert state_of(teacher) == state_of(student) == before


def test_an_implementation_that_was_set_in_between(caplog):
    ids = tokens(CPU)
    model, fresh = sparse_model("llama", CPU), sparse_model("llama", CPU)
    model.set_attn_implementation("eager")
    mtsa.sparsify(model, CONFIG)
    torch.testing.assert_close(logits(model, ids), logits(fresh, ids), rtol=0, atol=0)
    mtsa.unsparsify(model)
    assert model.config._attn_implementation == "eager"
    mtsa.sparsify(model, CONFIG).set_attn_implementation("sdpa")
    assert mtsa.unsparsify(model).config._attn_implementation == "sdpa"


VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
TEXT = {**SMALL, "num_hidden_layers": 1}


def dbrx():
    attention = {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}
    experts = {"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1}
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 64, "vocab_size": 101, "pad_token_id": 0}
    config = transformers.DbrxConfig(**sizes, attn_config=attention, ffn_config=experts)
    return transformers.DbrxForCausalLM(config)


def moshi():
    config = transformers.MoshiConfig(
        **{**TEXT, "num_key_value_heads": 4}, ffn_dim=64, head_dim=8, audio_vocab_size=16, num_codebooks=2
    )
    return transformers.MoshiForCausalLM(config)


def llava():
    vision = transformers.CLIPVisionConfig(**VISION, image_size=16, patch_size=8)
    text = LlamaConfig(**TEXT)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=5)
    )


def idefics():
    sizes = {**TEXT, "num_key_value_heads": 4, "additional_vocab_size": 0, "cross_layer_interval": 1}
    vision = {"embed_dim": 32, "image_size": 16, "patch_size": 8, **VISION}
    perceiver = {"resampler_n_latents": 2, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 8}
    config = transformers.IdeficsConfig(**sizes, vision_config=vision, perceiver_config=perceiver)
    return transformers.IdeficsForVisionText2Text(config)


def encoder_decoder():
    encoder, decoder = (transformers.BertConfig(**{**SMALL, "num_hidden_layers": 1}) for _ in range(2))
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return transformers.EncoderDecoderModel(config)


COMPOSITE = [dbrx, moshi, llava, idefics, encoder_decoder]


@pytest.mark.parametrize("make", [*COMPOSITE, *(FAMILIES[name].make for name in ("whisper", "qwen2_5_vl", "falcon"))])
def test_everything_is_restored(make):
    model = make().eval()
    before = state_of(model)
    mtsa.sparsify(model, {"sparse_cfg": {"*": {"method": "sparse_softmax"}}})
    mtsa.sparsify(model, CONFIG)
    assert state_of(model) != before
    mtsa.unsparsify(model)
    assert state_of(model) == before


def test_a_part_that_no_pattern_matches_keeps_its_implementation():
    model = mtsa.sparsify(llava(), {"sparse_cfg": {"*language_model*": {"method": "sparse_softmax"}}})
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert model.config.text_config._attn_implementation == "modelopt_lite"
    mtsa.sparsify(model, {"sparse_cfg": {"*vision_tower*": {"method": "sparse_softmax"}}})
    assert model.config.vision_config._attn_implementation == "modelopt_lite"
    assert model.config.text_config._attn_implementation == "sdpa"


# --- adapters --------------------------------------------------------------------------------------------------------


def with_adapters(model):
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, lora).eval()


@pytest.fixture
def base(tmp_path):
    """A model on the disk."""
    dense_model("llama", CPU).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own
@pytest.mark.parametrize("order", ["sparse, then adapters", "adapters, then sparse"])
def test_an_adapter_and_its_sparsity_travel_together(order, base, tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(base)
    config = {"sparse_cfg": {"*.1.*": CONFIG["sparse_cfg"]["*"]}}
    if order == "sparse, then adapters":
        model = with_adapters(mtsa.sparsify(model, config))
    else:
        model = mtsa.sparsify(with_adapters(model), config)
    with caplog.at_level(logging.WARNING, "modelopt_lite"):
        mtsa.save_pretrained(model, tmp_path / "adapter")
    assert not caplog.records
    assert {path.suffix for path in (tmp_path / "adapter").iterdir()} == {".json", ".md", ".safetensors"}
    restored, ids = mtsa.from_pretrained(tmp_path / "adapter").eval(), tokens(CPU)
    assert [row.method for row in mtsa.summary(restored)] == [None, "sparse_softmax"]
    torch.testing.assert_close(logits(restored, ids), logits(model, ids), rtol=0, atol=0)
    dense = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(dense, ids), logits(mtsa.unsparsify(model), ids), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_saving_an_adapter_without_its_sparsity_is_told(base, tmp_path, caplog):
    huggingface._warn_once.cache_clear()
    model = with_adapters(mtsa.sparsify(AutoModelForCausalLM.from_pretrained(base), CONFIG))
    with caplog.at_level(logging.WARNING, "modelopt_lite"):
        model.save_pretrained(tmp_path / "adapter")
        model.save_pretrained(tmp_path / "adapter")
    (record,) = caplog.records
    assert "use modelopt_lite.save_pretrained(model, folder)" in record.getMessage()
    with pytest.raises(mtsa.ConfigError, match=r"this adapter of PEFT was saved without a sparsity: .* load it with"):
        mtsa.from_pretrained(tmp_path / "adapter")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "modelopt_lite"):
        mtsa.unsparsify(model).save_pretrained(tmp_path / "dense")
    assert not caplog.records


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_of_a_sparse_base_has_the_base_s_sparsity(tmp_path):
    sparse_model("llama", CPU).save_pretrained(tmp_path / "base")
    model, ids = with_adapters(mtsa.from_pretrained(tmp_path / "base")), tokens(CPU)
    model.save_pretrained(tmp_path / "adapter")
    restored = mtsa.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(restored, ids), logits(model, ids), rtol=0, atol=0)


def test_saving_what_is_not_sparse_is_refused(tmp_path):
    with pytest.raises(mtsa.UnsupportedError, match="LlamaForCausalLM is not a sparse Transformers model"):
        mtsa.save_pretrained(dense_model("llama", CPU), tmp_path)
    model = sparse_model("llama", CPU)
    mtsa.save_pretrained(model, tmp_path)
    assert not (tmp_path / "modelopt_lite_sparsity.json").exists()
    assert mtsa.summary(mtsa.from_pretrained(tmp_path)) == mtsa.summary(model)
