"""Training as people do it: checkpointing, autocast, compile, LoRA, Trainer, FSDP2, and the fine-tuning example."""

import contextlib
import copy
import functools
import importlib.util
import json
import math
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, VOCABULARY
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_model import CONTEXT, save_tiny_model
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import AttentionInterface, AutoModelForCausalLM, Trainer, TrainingArguments

import modelopt_lite as mtsa
from modelopt_lite.experiment.assets import check_held_out, read_corpus
from modelopt_lite.models import layout

EXAMPLES = Path(__file__).parents[2] / "examples"
LENGTH, SINKS, WINDOW = 40, 1, 3
# Relative error of gradients whose FP32 sums are taken in another order; two layers of steep softmaxes amplify it.
ROUNDING = 1e-4


def config_for(backend):
    """1:4 on short inputs."""
    entry = {"method": "sparse_softmax", "sparsity_n": 1, "dense_window_size": WINDOW, "num_sink_tokens": SINKS}
    return {"sparse_cfg": {"*": {**entry, "backend": backend}}}


def sparse_model(target=("torch", "cpu")):
    return mtsa.sparsify(FAMILIES["llama"].make().to(target[1]), config_for(target[0])).train()


def tokens(device="cpu", rows=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (rows, LENGTH), generator=generator).to(device)


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def gradients(model):
    """Take the gradients off a model."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def gradients_of(model, ids):
    loss_of(model, ids).backward()
    return gradients(model)


def error(found, exact):
    """Return the norm of the error of gradients (or updates), of all parameters together, relative to exact ones."""
    assert found.keys() == exact.keys()
    wrong = sum((found[name].double() - x).square().sum().item() for name, x in exact.items())
    return math.sqrt(wrong / sum(x.double().square().sum().item() for x in exact.values()))


def updates(weights, before):
    """Return how far weights moved."""
    return {name: weights[name] - x for name, x in before.items()}


def plain_attention(module, query, key, value, mask, scaling, **_):
    """1:4 in PyTorch's own differentiable operations, quadratic; which keys are kept comes from comparisons."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    scores = query @ key.mT * scaling
    positions = torch.arange(scores.shape[-1], device=scores.device)
    distance = positions[:, None] - positions
    scores = scores.masked_fill(distance < 0, -math.inf)
    groups = scores.detach().unflatten(-1, (-1, 4))
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, groups.argmax(-1, keepdim=True), True).flatten(-2)
    kept |= (positions < SINKS) | (distance < WINDOW)
    return (scores.masked_fill(~kept, -math.inf).softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register("plain_1_4", plain_attention)


def plain_model(device="cpu"):
    model = FAMILIES["llama"].make().to(device).train()
    model.set_attn_implementation("plain_1_4")
    return model


def test_gradients_are_those_with_the_selection_held_fixed(target):
    ids = tokens(target[1])
    found, wanted = gradients_of(sparse_model(target), ids), gradients_of(plain_model(target[1]), ids)
    assert error(found, wanted) < ROUNDING
    dense = gradients_of(FAMILIES["llama"].make().to(target[1]), ids)
    assert error(found, dense) > 0.1


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the method is about to be renamed
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(target, use_reentrant, monkeypatch):
    model, ids = sparse_model(target), tokens(target[1])
    wanted = gradients_of(model, ids)
    calls = []
    compute = layout.compute
    monkeypatch.setattr(layout, "compute", lambda *arguments: calls.append(1) or compute(*arguments))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert error(gradients_of(model, ids), wanted) < ROUNDING
    assert len(calls) == 2 * len(model.model.layers)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", ["mean_pool_top_k", "skip_softmax"])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("length", [64, 300])  # fewer keys than a block has, and more
def test_gradient_checkpointing_with_statistics(method, padding, length):
    """What runs again takes the way of what was counted."""
    model = FAMILIES["llama"].make()
    mtsa.sparsify(model, {"sparse_cfg": {"*": {"method": method}}})
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids = torch.randint(model.config.vocab_size, (2, length))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    with torch.no_grad(), mtsa.collect_statistics(model) as once:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    found = []
    for context in (contextlib.nullcontext(), mtsa.collect_statistics(model)):
        model.zero_grad()
        with context as statistics:
            model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        found.append(gradients(model))
    assert error(*found) < ROUNDING
    assert statistics.total.visible == once.total.visible > 0


def softened(model):
    """Undo the sharpening of values and outputs, so that near ties weigh less."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.div_(64)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(target, dtype):
    """Gradients are as close to FP64 as those of PyTorch's own operations; near ties fall differently in both."""
    device, scale, ids = target[1], 256, tokens(target[1])  # scaled, or FP16 rounds small gradients to 0
    exact = gradients_of(softened(plain_model(device)).double(), ids)
    found = []
    for model in (softened(sparse_model(target)), softened(plain_model(device))):
        with torch.autocast(device, dtype):
            loss = loss_of(model, ids)
        (scale * loss).backward()
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        found.append({name: gradient / scale for name, gradient in gradients(model).items()})
    sparse, plain = (error(x, exact) for x in found)
    assert sparse < 2 * plain < 0.1


def test_backward_inside_autocast(target):
    """Not what PyTorch recommends, but what people do."""
    model, ids = sparse_model(target), tokens(target[1])
    found = []
    for inside in (False, True):
        with torch.autocast(target[1], torch.bfloat16):
            loss = loss_of(model, ids)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append(gradients(model))
    assert error(*found) < 2**-7  # other operations are rounded to BF16 than outside


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # PyTorch's advice, where it compiles for a GPU
def test_compiled_training_step(target):
    """Loss and gradients of a compiled step, with the weights that an optimizer changes between two steps."""
    eager, ids = sparse_model(target), tokens(target[1])
    model = copy.deepcopy(eager)
    torch.compiler.reset()
    step = torch.compile(loss_of, fullgraph=True, backend="aot_eager" if target[1] == "cpu" else "inductor")
    for _ in range(2):
        found = []
        for each, loss in ((model, step), (eager, loss_of)):
            loss(each, ids).backward()
            found.append({name: x.grad for name, x in each.named_parameters()})
            optimizer = torch.optim.SGD(each.parameters(), lr=0.01)
            optimizer.step()
            optimizer.zero_grad()
        assert error(*found) < ROUNDING


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own
def test_lora_gradients(target):
    """Those of the adapters alone, and by the chain rule those of the merged weights."""
    lora = LoraConfig(r=2, lora_alpha=6, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model, ids = get_peft_model(sparse_model(target), lora).train(), tokens(target[1])
    merged = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
    found, whole, wanted = gradients_of(model, ids), gradients_of(merged, ids), {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A.default.weight, module.lora_B.default.weight
            of_weight = 6 / 2 * whole[f"{name.removeprefix('base_model.model.')}.weight"]
            wanted[f"{name}.lora_A.default.weight"] = (b.mT @ of_weight).detach()
            wanted[f"{name}.lora_B.default.weight"] = (of_weight @ a.mT).detach()
    assert wanted
    assert error(found, wanted) < ROUNDING


@pytest.mark.filterwarnings("ignore::FutureWarning")  # a method of Transformers is about to be renamed
@pytest.mark.parametrize("bf16", [False, True])
def test_trainer_is_a_training_loop(bf16, tmp_path):
    batches, rate = [], 0.1

    class Recording(Trainer):
        def compute_loss(self, model, inputs, *_, **__):
            batches.append(inputs["input_ids"])
            return loss_of(model, inputs["input_ids"])

    model = sparse_model()
    mine = copy.deepcopy(model)
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=rate,
        lr_scheduler_type="constant",
        optim="sgd",
        bf16=bf16,
        gradient_checkpointing=bf16,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    rows = [{"input_ids": row} for row in tokens()]
    Recording(model=model, args=arguments, train_dataset=rows).train()
    optimizer = torch.optim.SGD(mine.parameters(), lr=rate)
    before = {name: x.clone() for name, x in mine.state_dict().items()}
    for ids in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(mine, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(mine.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert len(batches) == 3
    assert error(updates(model.state_dict(), before), updates(mine.state_dict(), before)) < ROUNDING


# --- FSDP2 -----------------------------------------------------------------------------------------------------------


def train(model, batches):
    """Take a step of gradient descent for each batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for ids in batches:
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_sharded(rank, folder, backend, device):
    """What one of two processes does: it reads its half of each batch, and holds half of each parameter."""
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    mesh = distributed.device_mesh.init_device_mesh(device, (2,))
    ids = tokens(place)
    for sparsify_first in (True, False):
        model = FAMILIES["llama"].make().to(place).train()
        if sparsify_first:
            mtsa.sparsify(model, config_for(backend))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if not sparsify_first:
            mtsa.sparsify(model, config_for(backend))
        train(model, [ids[rank::2], ids.flip(1)[rank::2]])
        assert all(x.to_local().numel() < x.numel() for x in model.parameters())
        weights = {name: x.full_tensor().cpu() for name, x in model.state_dict().items()}
        if rank == 0:
            save_file(weights, f"{folder}/{sparsify_first}.safetensors")
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("backend", "device"),
    [
        pytest.param("torch", "cpu", id="gloo"),
        pytest.param(
            "triton",
            "cuda",
            id="nccl",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
            ],
        ),
    ],
)
def test_fsdp2(backend, device, tmp_path):
    """Two processes with half of each batch and each weight come to the weights of one."""
    torch.multiprocessing.spawn(train_sharded, (tmp_path, backend, device), nprocs=2)
    model, ids = sparse_model((backend, device)), tokens(device)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    train(model, [ids, ids.flip(1)])
    wanted = updates(model.state_dict(), before)
    for sparsify_first in (True, False):
        found = load_file(tmp_path / f"{sparsify_first}.safetensors", device=device)
        assert error(updates(found, before), wanted) < ROUNDING


def test_an_attention_module_that_is_sharded_by_itself(tmp_path):
    """Class swaps are undone in reverse order, or not at all."""
    method = f"file://{tmp_path}/rendezvous"
    distributed.init_process_group("gloo", init_method=method, rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        model, ids = FAMILIES["llama"].make(), tokens()
        with torch.no_grad():
            dense, sparse = model(ids).logits, mtsa.sparsify(copy.deepcopy(model), config_for("torch"))(ids).logits
        for sparsify_first in (True, False):
            made = copy.deepcopy(model)
            attention = made.model.layers[1].self_attn
            if sparsify_first:
                mtsa.sparsify(made, config_for("torch"))
            fully_shard(attention, mesh=mesh)
            if not sparsify_first:
                mtsa.sparsify(made, config_for("torch"))
            classes = [type(module) for module in made.modules()]
            with torch.no_grad():
                torch.testing.assert_close(made(ids).logits, sparse, rtol=0, atol=0)
            if not sparsify_first:
                mtsa.unsparsify(made)
                assert type(attention).__name__ == "FSDPLlamaAttention"
                with torch.no_grad():
                    torch.testing.assert_close(made(ids).logits, dense, rtol=0, atol=0)
                continue
            assert [row.class_name for row in mtsa.summary(made)] == ["LlamaAttention"] * 2
            message = r"layers.1.self_attn \(LlamaAttention\): its sparsity .* it a FSDPSparseLlamaAttention; undo"
            for call in (mtsa.unsparsify, lambda x: mtsa.sparsify(x, config_for("torch"))):
                with pytest.raises(mtsa.UnsupportedError, match=message):
                    call(made)
                assert [type(module) for module in made.modules()] == classes
                assert made.config._attn_implementation == "modelopt_lite"
    finally:
        distributed.destroy_process_group()


# --- examples/finetune.py --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finetune():
    """The example as a module; it trains on a CPU."""
    spec = importlib.util.spec_from_file_location("finetune", EXAMPLES / "finetune.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # where pydantic looks up types
        spec.loader.exec_module(module)
        patch.setattr(module, "TrainingArguments", functools.partial(TrainingArguments, use_cpu=True))
        yield module


WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
TEXT_LENGTH = 300
SEQUENCE = 48


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(5):
        order = torch.randint(len(WORDS), (TEXT_LENGTH,), generator=torch.Generator().manual_seed(i))
        (tmp_path / "texts" / f"text-{i}.txt").write_text(" ".join(WORDS[j] for j in order)[:TEXT_LENGTH])
    return {
        "model": str(save_tiny_model(tmp_path / "model")),
        "texts": str(tmp_path / "texts"),
        "held_out": ["text-1", "text-3"],
        "variants": {"1:4": config_for("torch")},
        "steps": 20,
        "batch_size": 3,
        "sequence_length": SEQUENCE,
        "learning_rate": 1e-3,
        "checkpoint_steps": 5,
        "bf16": False,
        "output_dir": str(tmp_path / "whole"),
    }


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:mtime may not be reliable")  # PEFT's, the Trainer's
@pytest.mark.parametrize(
    ("change", "metric"),
    [
        pytest.param({}, "sparse_kl", id="distill"),
        pytest.param(
            {"objective": "language_model", "lora_rank": 2, "learning_rate": 1e-2}, "sparse_perplexity", id="lora"
        ),
    ],
)
def test_finetune(finetune, settings, change, metric, tmp_path, monkeypatch):
    settings = settings | change
    finetune.run(finetune.FinetuneConfig.model_validate(settings))

    # Interrupted in its eighth step, the same run goes on after the fifth.
    compute_loss, calls = finetune.SparseTrainer.compute_loss, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return compute_loss(*args, **kwargs)

    monkeypatch.setattr(finetune.SparseTrainer, "compute_loss", interrupted)
    monkeypatch.setattr(finetune, "measure_dense_speed", lambda *_: 1.0)
    config = finetune.FinetuneConfig.model_validate(settings | {"output_dir": str(tmp_path / "resumed")})
    with pytest.raises(KeyboardInterrupt):
        finetune.run(config)
    finetune.run(config)
    assert len(calls) == 8 + 15
    whole, resumed = (load_file(tmp_path / run / "1-4" / "model" / "model.safetensors") for run in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], x) for name, x in whole.items())
    results = [json.loads((tmp_path / run / "results.json").read_text()) for run in ("whole", "resumed")]
    curve, resumed_curve = (result["results"]["1:4"]["measurements"] for result in results)
    assert [row["step"] for row in curve] == [0, 5, 10, 15, 20]
    assert resumed_curve == curve
    assert all(result["results"]["1:4"]["tokens_per_second"] > 0 for result in results)
    finetune.run(config)
    assert len(calls) == 8 + 15

    # What it says about the held-out windows is what the saved models do on them.
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings["model"])
    windows = [(Path(settings["texts"]) / f"{name}.txt").read_text() for name in settings["held_out"]]
    windows = [torch.tensor([tokenizer(text).input_ids[:SEQUENCE]]) for text in windows]
    dense = AutoModelForCausalLM.from_pretrained(settings["model"])
    before = mtsa.sparsify(copy.deepcopy(dense), settings["variants"]["1:4"])
    after = mtsa.from_pretrained(tmp_path / "whole" / "1-4" / "model")
    off = mtsa.unsparsify(copy.deepcopy(after))
    expected = {"dense": dense, "1:4, before": before, "1:4, after": after, "1:4, after, sparsity off": off}
    cells = finetune.table_rows({"1:4": curve}, {"1:4": 1.0}, 2.0)
    rows = {name: (perplexity, kl) for name, perplexity, _, kl, _ in cells}
    assert [speed for *_, speed in cells] == ["2", "", "1", ""]
    assert rows.keys() == expected.keys()
    report = (tmp_path / "whole" / "report.md").read_text()
    for name, model in expected.items():
        perplexity, kl = figures(model, dense, windows)
        assert float(rows[name][0]) == pytest.approx(perplexity, rel=1e-4, abs=0.006)
        assert float(rows[name][1]) == pytest.approx(kl, abs=6e-5)
        assert f"| {name} | {rows[name][0]} |" in report
    assert curve[-1][metric] < 0.95 * curve[0][metric]
    assert (tmp_path / "whole" / "finetune.png").read_bytes().startswith(b"\x89PNG")


@torch.no_grad()
def figures(model, dense, windows):
    """Return perplexity, and divergence from the dense model."""
    loss = divergence = 0
    for ids in windows:
        log_p, dense_log_p = (x(ids).logits[0, :-1].log_softmax(-1) for x in (model, dense))
        loss -= log_p.gather(1, ids[0, 1:, None]).mean().item() / len(windows)
        divergence += (dense_log_p.exp() * (dense_log_p - log_p)).sum(-1).mean().item() / len(windows)
    return math.exp(loss), divergence


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out": ["text-1", "text-9"]}, "held_out.1: 'text-9' is not allowed; must be one of 5 documents, among"),
        ({"held_out": ["text-1", "copy"]}, "held_out.0: 'text-1' is not allowed; it shares paragraphs with text-0"),
        ({"texts": "/no/such/folder"}, "texts: '/no/such/folder' is not allowed; must be a folder with text files"),
        ({"sequence_length": CONTEXT + 1}, "sequence_length: 129 is not allowed; must be at most 128"),
        ({"sequence_length": 128, "held_out": ["short"]}, "held_out: ['short'] is not allowed; must have sequence_le"),
        ({"batch_size": 19}, "batch_size: 19 is not allowed; texts has 18 windows to train on"),
        (
            {"variants": {"x": {"sparse_cfg": {"y": {"enable": False}}}}},
            "variants.x.sparse_cfg.y: matches no attention ",
        ),
        ({"checkpoint_steps": 6}, "c.yaml: checkpoint_steps: 6 is not allowed; must divide steps = 20"),
        ({"variants": {"1:4": config_for("torch"), "1-4": config_for("torch")}}, "c.yaml: variants: "),
        ({"variants": {"": config_for("torch")}}, "c.yaml: variants.: '' is not allowed; "),
        ({"learning_rate": "1e-3"}, "c.yaml: learning_rate: '1e-3' is not allowed; must be a valid number"),
    ],
)
def test_finetune_refuses_before_anything_is_written(finetune, settings, change, message, tmp_path):
    texts = Path(settings["texts"])
    if "short" in change.get("held_out", ()):
        (texts / "short.txt").write_text("too short")
    if "copy" in change.get("held_out", ()):
        text = (texts / "text-1.txt").read_text()
        (texts / "copy.txt").write_text("Different.")
        (texts / "text-0.txt").write_text(f"Chapter one.\n{text}\nThe end.")
    (tmp_path / "c.yaml").write_text(json.dumps(settings | change))
    with pytest.raises(SystemExit) as exit_:
        finetune.main(tmp_path / "c.yaml")
    assert str(exit_.value).replace(f"{tmp_path}/", "").startswith(f"error: {message}")
    assert not Path(settings["output_dir"]).exists()


def test_finetune_does_not_mix_runs(finetune, settings, tmp_path):
    run = finetune.FinetuneConfig.model_validate(settings)
    run.output_dir.mkdir()
    run.save(run.output_dir / "config.yaml")
    other = run.model_copy(update={"steps": 8, "seed": 1})
    with pytest.raises(mtsa.ConfigError, match=r"output_dir: .*whole' .*; holds a run with another steps, seed"):
        finetune.run(other)


def test_finetune_does_not_go_on_with_other_texts(finetune, settings, monkeypatch):
    config = finetune.FinetuneConfig.model_validate(settings)
    monkeypatch.setattr(finetune, "finetune", interrupt)
    for _ in range(2):  # the same texts are taken again
        with pytest.raises(KeyboardInterrupt):
            finetune.run(config)
    text = Path(settings["texts"]) / "text-0.txt"
    text.write_text(text.read_text().replace("fox", "cat"))
    with pytest.raises(
        mtsa.ConfigError, match=r"texts: .* must hold the documents that the run in .*whole' began with"
    ):
        finetune.run(config)


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:mtime may not be reliable")
@pytest.mark.parametrize("lora_rank", [None, 2])
def test_finetune_interrupted_after_its_last_step(finetune, settings, lora_rank, monkeypatch):
    """Neither the steps nor the measurements are repeated, and a file half written counts as none."""
    settings |= {"steps": 2, "checkpoint_steps": 2, "lora_rank": lora_rank}
    config = finetune.FinetuneConfig.model_validate(settings)
    write_text = Path.write_text

    def interrupted(path, text, **kwargs):
        if path.name.startswith("result.json"):
            write_text(path, text[:40], **kwargs)
            raise KeyboardInterrupt
        return write_text(path, text, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune.run(config)
    with monkeypatch.context() as patch:
        patch.setattr(finetune.SparseTrainer, "train", interrupt)
        finetune.run(config)
    curve = json.loads((config.output_dir / "results.json").read_text())["results"]["1:4"]["measurements"]
    assert [row["step"] for row in curve] == [0, 2]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_finetune_ignores_a_checkpoint_half_written(finetune, tmp_path):
    for step, text in ((5, '{"global_step": 5}'), (10, '{"global_step": 10, "log_hist'), (15, "")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-20").mkdir()
    assert finetune.last_step(tmp_path) == 5
    assert finetune.last_step(tmp_path / "checkpoint-5") == 0


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_finetune_names_the_variant_that_a_layer_refuses(finetune, settings):
    file = Path(settings["model"]) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_dropout": 0.1}))
    config = finetune.FinetuneConfig.model_validate(settings)
    with pytest.raises(mtsa.UnsupportedError, match=r"^variants\.1:4: model\.layers\.0\.self_attn .*dropout"):
        finetune.run(config)


@pytest.mark.parametrize("what", ["GPUs", "processes"])
def test_finetune_runs_on_one_gpu_in_one_process(finetune, settings, what, tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text(json.dumps(settings))
    if what == "GPUs":
        monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    else:
        monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match=f"^error: 2 {what} are not supported; "):
        finetune.main(tmp_path / "c.yaml")
    assert not Path(settings["output_dir"]).exists()


def test_finetune_holds_out_what_no_other_document_repeats(finetune):
    config = finetune.FinetuneConfig.load(EXAMPLES / "finetune.yaml")
    documents = read_corpus(config.texts, "texts")
    check_held_out(config.held_out, documents)
    with pytest.raises(mtsa.ConfigError, match="it shares paragraphs with 1980-Carter-1, which would be trained on"):
        check_held_out(["1981-Carter-1"], documents)
