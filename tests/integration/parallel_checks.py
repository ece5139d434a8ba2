"""What several processes must agree on with a single one; run by test_parallel.py, as one script.

Each check is a function that every process of a group runs. On CPUs, processes are forked, so that packages are
imported once, and talk by way of gloo. If the script sees GPUs, each process has one, and they talk by way of NCCL.
Each group runs all its checks, because starting is what takes time. Arguments of the script name some of them:

    python tests/integration/parallel_checks.py            # all, with two and with four processes
    python tests/integration/parallel_checks.py 2 generation "context_parallel 2:4"
"""

import dataclasses
import functools
import importlib.util
import io
import itertools
import json
import os
import re
import sys
import tempfile
import traceback
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import distributed
from transformers import (
    AttentionInterface,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.distributed import DistributedConfig

import modelopt_lite as mtsa
from modelopt_lite.models.huggingface import attention_forward

CHECKS = {}
"""Functions by ``(number of processes, name)``."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATIENCE = timedelta(minutes=1 if DEVICE == "cpu" else 5)  # on GPUs, kernels are compiled
"""How long a process waits for the others, which may have failed."""
EXACT = {"rtol": 1e-9, "atol": 1e-11}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}
EXCHANGES = ("gather", "ring")
BLOCKS = {"block_size": 16, "block_rows": 16}
METHODS = {
    "dense": {"method": "sparse_softmax", "enable": False},
    "2:4": {"method": "sparse_softmax", "num_sink_tokens": 3, "dense_window_size": 5},
    "blocks": {"method": "mean_pool_top_k", "keep": 0.4, "num_sink_tokens": 2, **BLOCKS},
    "blocks and 2:4": [
        {"method": "mean_pool_top_k", "keep": 0.5, **BLOCKS},
        {"method": "sparse_softmax", "dense_window_size": 4},
    ],
}


@mtsa.register_sparse_method
class SparseDecode(mtsa.SparseSoftmax):
    method: Literal["sparse_decode"] = "sparse_decode"

    def plan(self):
        return dataclasses.replace(super().plan(), sparse_decode=True)


def check(*worlds, **choices):
    """Register a check for groups of so many processes, once with each combination of arguments."""

    def register(function):
        for world, *values in itertools.product(worlds, *choices.values()):
            arguments = dict(zip(choices, values, strict=True))
            CHECKS[world, " ".join([function.__name__, *values])] = functools.partial(function, **arguments)
        return function

    return register


def llama(heads=2, sharpness=60, **options):
    """Return a tiny model whose attention is far from uniform, so that dropping keys matters."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": heads, **options}))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(sharpness)
            layer.self_attn.k_proj.weight.mul_(sharpness)
    model.loss_function = exact_loss
    return model.double().to(DEVICE)


def exact_loss(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, **_):
    """Compute what Transformers does, but not in FP32."""
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), shift_labels.flatten(), reduction="sum")
    return loss / ((shift_labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def script(path):
    """Import a script of the repository."""
    file = Path(__file__).parents[2] / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tokens(batch, length):
    ids = torch.randint(SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))
    return ids.to(DEVICE)


def all_processes():
    return distributed.init_device_mesh(DEVICE, (distributed.get_world_size(),))


@contextmanager
def refused(pattern):
    found = "not refused"
    try:
        yield
    except mtsa.UnsupportedError as error:
        found = str(error)
    assert re.search(pattern, found), found


def counts(statistics):
    total = statistics.total
    return [total.rows, total.visible, total.kept, total.mass, total.blocks, total.blocks_visited]


@check(2)
def tensor_parallel(folder):
    folder = folder / "llama"
    if distributed.get_rank() == 0:
        llama().save_pretrained(folder)
    distributed.barrier()
    parallel = LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
    assert parallel.device.type == DEVICE
    parallel.loss_function = exact_loss
    single, ids = llama(), tokens(2, 70)
    for name, method in METHODS.items():
        results = []
        for model in (single, parallel):
            mtsa.sparsify(model, {"sparse_cfg": {"*": method}})
            with mtsa.collect_statistics(model) as statistics:
                output = model(ids, labels=ids)
            model.zero_grad()
            output.loss.backward()
            if model is parallel:
                statistics.sum_over_ranks()
            grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
            results.append((output.logits, grads, counts(statistics)))
        torch.testing.assert_close(*results, msg=lambda error, name=name: f"{name}: {error}", **EXACT)


@check(2)
def heads_that_do_not_divide(folder):
    folder = folder / "one_head"
    if distributed.get_rank() == 0:
        llama(heads=1).save_pretrained(folder)
    distributed.barrier()
    model = LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
    with refused(r"layers.0.self_attn .*: its 1 heads of keys .* 2 processes"):
        mtsa.sparsify(model, "2:4")


def ragged(lengths=(101, 38, 70)):
    """Return a batch with padding at the left, at the right, and between tokens, and labels for its real tokens."""
    ids = tokens(3, max(lengths))
    mask = torch.ones_like(ids)
    mask[1, : -lengths[1]] = 0
    mask[2, lengths[2] - 5 : -5] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, -lengths[1]] = -100
    labels[2, -5] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def result_of_one(model, batch):
    """Return logits and gradients as one process computes them."""
    batch = dict(batch)
    if batch.get("attention_mask") is not None:
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    model.zero_grad()
    output = model(**batch, use_cache=False)
    output.loss.backward()
    mask = batch.get("attention_mask")
    logits = output.logits if mask is None else output.logits * mask[..., None]
    return logits.detach(), output.loss.detach(), [p.grad for p in model.parameters()]


def result_of_all(model, batch, parallel):
    """Return the same of all processes together."""
    inputs = parallel.shard(**batch)
    model.zero_grad()
    output = model(**inputs, use_cache=False)
    output.loss.backward()
    loss, grads = output.loss.detach(), [p.grad for p in model.parameters()]
    for x in (loss, *grads):
        distributed.all_reduce(x)
    return parallel.gather(output.logits.detach(), inputs), loss, grads


def close(found, expected, what, **tolerance):
    torch.testing.assert_close(found, expected, msg=lambda error: f"{what}: {error}", **(tolerance or EXACT))


@check(2, 4, method=METHODS)
def context_parallel(folder, method):
    mesh, batch = all_processes(), ragged()
    model = mtsa.sparsify(llama(), {"sparse_cfg": {"*": METHODS[method]}})
    with mtsa.collect_statistics(model) as statistics:
        expected = result_of_one(model, batch)
    for exchange in EXCHANGES:
        with mtsa.context_parallel(model, mesh, exchange=exchange) as parallel:
            close(result_of_all(model, batch, parallel), expected, exchange)
            with torch.no_grad(), mtsa.collect_statistics(model) as shared:
                model(**parallel.shard(**batch), use_cache=False)
        for layer in shared.layers.values():
            layer.is_estimate = distributed.get_rank() == 0
        shared.sum_over_ranks()
        close(counts(shared), counts(statistics), (exchange, "statistics"))
        assert all(layer.is_estimate for layer in shared.layers.values())


def both_exchanges(model, batch, what, **tolerance):
    """Compare all processes with one, for both exchanges."""
    mesh = all_processes()
    expected = result_of_one(model, batch)
    for exchange in EXCHANGES:
        with mtsa.context_parallel(model, mesh, exchange=exchange) as parallel:
            close(result_of_all(model, batch, parallel), expected, (what, exchange), **tolerance)


@check(2)
def packed_sequences(folder):
    """Several in a row, one of them a single token; Transformers takes them for packed by their positions."""
    lengths = [[20, 1, 47], [68]]
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths]).to(DEVICE)
    ids = tokens(2, 68)
    for name in ("2:4", "blocks and 2:4"):
        model = mtsa.sparsify(llama(), {"sparse_cfg": {"*": METHODS[name]}})
        both_exchanges(model, {"input_ids": ids, "position_ids": positions, "labels": ids}, name)


@check(2)
def a_few_tokens(folder):
    """So few that a process has none, or a single one of a longer sequence."""
    for name in ("2:4", "blocks"):
        for length in (2, 5, 17):
            model = mtsa.sparsify(llama(), {"sparse_cfg": {"*": {**METHODS[name], "dense_window_size": 0}}})
            ids = tokens(2, length)
            both_exchanges(model, {"input_ids": ids, "labels": ids}, (name, length))


@check(2)
def windows_caps_and_sinks(folder):
    """Sliding windows and softcaps (Gemma 2), and learnable sinks (GPT-OSS)."""
    sizes = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 21}
    gemma = Gemma2ForCausalLM(Gemma2Config(**sizes, attn_logit_softcapping=4.0, query_pre_attn_scalar=1))
    gpt = GptOssForCausalLM(
        GptOssConfig(**sizes, num_local_experts=2, num_experts_per_tok=1, experts_implementation="eager")
    )
    for model in (gemma, gpt):
        torch.manual_seed(2)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        model.loss_function = exact_loss
        # Both compute in part in FP32.
        mtsa.sparsify(model.double().to(DEVICE), {"sparse_cfg": {"*": METHODS["2:4"]}})
        tolerance = {"rtol": 1e-3, "atol": 1e-5}
        both_exchanges(model, ragged(), type(model).__name__, **tolerance)
        same_generation(model.eval(), type(model).__name__, **tolerance)


@check(2)
def skipping_and_sharing(folder):
    """Skip-softmax, and lists of blocks that query heads share."""
    methods = [
        {"method": "skip_softmax", "threshold": 0.2, "num_sink_tokens": 2, **BLOCKS},
        [{"method": "xattention", "per_kv_head": True, "threshold": 0.8, **BLOCKS}, METHODS["2:4"]],
    ]
    for method in methods:
        model = mtsa.sparsify(llama(), {"sparse_cfg": {"*": method}})
        both_exchanges(model, ragged(), method)


@check(2)
def generation(folder):
    for method in [*METHODS.values(), {"method": "sparse_decode", "dense_window_size": 5}]:
        same_generation(mtsa.sparsify(llama(), {"sparse_cfg": {"*": method}}).eval(), method)


@torch.no_grad()
def same_generation(model, what, **tolerance):
    """Prefill in two chunks, then single tokens, over a cache that is divided; rows are of different lengths."""
    ids = tokens(2, 104)
    mask = torch.ones_like(ids)
    mask[1, 80:] = 0
    with mtsa.context_parallel(model, all_processes()) as parallel:
        cache, past, found = DynamicCache(), None, []
        for begin, end in [(0, 64), (64, 101), (101, 102), (102, 103)]:
            part = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, begin:end]}
            past = parallel.shard(**part, past=past)
            logits = model(**past, past_key_values=cache, use_cache=True).logits
            found.append(parallel.gather(logits, past))
            close(parallel.last(logits, past)[0], found[-1][0, -1], (what, "last"))
    for row, length in enumerate([103, 80]):
        cache, expected = DynamicCache(), []
        for begin, end in [(0, 64), (64, min(101, length)), (101, 102), (102, 103)]:
            if begin < length:
                expected.append(model(ids[row : row + 1, begin:end], past_key_values=cache).logits[0])
        close(torch.cat(found, 1)[row, :length], torch.cat(expected), (what, row), **tolerance)


@check(2, method=METHODS, exchange=EXCHANGES)
def half_precision(folder, method, exchange):
    """No worse than twice what one process errs against FP64; on a GPU with the fastest kernels."""
    options, batch, config = {}, ragged(), {"sparse_cfg": {"*": METHODS[method]}}
    if DEVICE == "cuda":
        options = {"hidden_size": 512, "head_dim": 128, "num_hidden_layers": 1, "sharpness": 4}
        batch = ragged((9900, 3001, 64))
    logits, _, grads = result_of_one(mtsa.sparsify(llama(**options), config), batch)
    model = mtsa.sparsify(llama(**options).bfloat16(), config)
    alone = result_of_one(model, batch)
    with mtsa.context_parallel(model, all_processes(), exchange=exchange) as parallel:
        together = result_of_all(model, batch, parallel)

    def error(found, exact):
        return torch.cat([(x - y).double().flatten() for x, y in zip(found, exact, strict=True)]).norm()

    assert error(together[:1], [logits]) <= 2 * error(alone[:1], [logits])
    assert error(together[2], grads) <= 2 * error(alone[2], grads), "gradients"


@check(2)
def checkpointing(folder):
    """The recomputation does what the forward pass did, outside of the block as well."""
    mesh = all_processes()
    model = mtsa.sparsify(llama(), {"sparse_cfg": {"*": METHODS["blocks and 2:4"]}}).train()
    expected = result_of_one(model, ragged())
    for reentrant in (False, True):
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": reentrant})
        with mtsa.context_parallel(model, mesh) as parallel:
            inputs = parallel.shard(**ragged())
            model.zero_grad()
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        grads = [p.grad for p in model.parameters()]
        for grad in grads:
            distributed.all_reduce(grad)
        close(grads, expected[2], reentrant)


@check(2)
def refusals(folder):
    mesh, ids = all_processes(), tokens(1, 40)
    partly = mtsa.sparsify(llama(), {"sparse_cfg": {"*.0.*": METHODS["2:4"]}})
    with refused(r"model.layers.1.self_attn .*: context parallelism needs every attention layer"):
        mtsa.context_parallel(partly, mesh).__enter__()
    model = mtsa.sparsify(llama(), {"sparse_cfg": {"*": METHODS["2:4"]}})
    with mtsa.context_parallel(model, mesh) as parallel, torch.no_grad():
        with refused(r"layers.0.self_attn .*: was not told how the tokens are divided"):
            model(ids)
        inputs = parallel.shard(ids)
        with refused(r"layers.0.self_attn .*: keys \[1, 44\] .* are not those of shard\(\), \[1, 24\]"):
            cache = DynamicCache()
            cache.update(*torch.zeros(2, 1, 2, 20, 8, dtype=torch.float64, device=DEVICE), 0)
            model(**inputs, past_key_values=cache)
        with refused(r"already"):
            mtsa.context_parallel(model, mesh).__enter__()
    with (
        refused(r"layers.0.self_attn .*: a batch with a single column"),
        mtsa.context_parallel(model, mesh) as parallel,
    ):
        model(**parallel.shard(ids[:, :1]), use_cache=False)
    with torch.no_grad():
        model(ids)  # outside it is as it was


@check(2)
def ulysses(folder):
    """As DeepSpeed wraps the attention function: tokens are exchanged for heads, the mask is lost, positions come."""
    rank, inner = distributed.get_rank(), attention_forward

    def everywhere(x, dim):
        parts = [torch.empty_like(x) for _ in range(2)]
        distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim)

    def wrapped(module, query, key, value, mask, position_ids=None, **kwargs):
        q, k, v = (everywhere(x, 2).chunk(2, 1)[rank] for x in (query, key, value))
        output, _ = inner(module, q, k, v, None, position_ids=everywhere(position_ids, 1), **kwargs)
        return everywhere(output, 2).chunk(2, 1)[rank], None

    ids = tokens(1, 96)
    for name, method in METHODS.items():
        for lengths in ([96], [40, 1, 55]):
            positions = torch.cat([torch.arange(length) for length in lengths])[None].to(DEVICE)
            model = mtsa.sparsify(llama(), {"sparse_cfg": {"*": method}})
            with torch.no_grad():
                expected = model(ids, position_ids=positions, use_cache=False).logits
                AttentionInterface.register("modelopt_lite", wrapped)
                try:
                    own = [x.chunk(2, 1)[rank] for x in (ids, positions)]
                    found = model(own[0], position_ids=own[1], use_cache=False).logits
                finally:
                    AttentionInterface.register("modelopt_lite", inner)
            close(found, expected.chunk(2, 1)[rank], (name, lengths))


@check(2, 4)
def training_of_long_sequences(folder):
    """examples/train_long.py against plain training; four processes divide two sequences at a time in two."""
    example = script("examples/train_long.py")
    example.LOSS_TOKENS = 7
    groups = distributed.get_world_size() // 2
    text = tokens(1, 2 * groups * 50)[0]
    settings = {"length": 50, "steps": 2, "learning_rate": 0.05, "dtype": torch.float64}
    model, plain = (mtsa.sparsify(llama(), {"sparse_cfg": {"*": METHODS["blocks and 2:4"]}}) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
        # Adam and clipping would hide gradients of the wrong size.
        patch.setattr(torch.optim, "AdamW", torch.optim.SGD)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
        losses = example.train(model, text, context=2, **settings)
    example.save(model, folder / "trained")
    distributed.barrier()
    trained = mtsa.from_pretrained(folder / "trained").to(DEVICE)

    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    expected = []
    for batch in text.view(2, groups, 50):
        optimizer.zero_grad()
        loss = plain(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    close(losses, expected, "losses", rtol=1e-6, atol=0)  # that of the example is in FP32
    with torch.no_grad():
        ids = text[None, :50]
        close(trained(ids).logits, plain(ids).logits, "trained", rtol=1e-4, atol=1e-4)


@check(2)
@torch.no_grad()
def long_benchmark(folder):
    """benchmarks/long.py: what it writes, and that it generates what one process does with the same chunks."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    bench = script("benchmarks/long.py")
    output = folder / "long.json"
    options = ["--model", "tiny", "--prefill", "80", "--generate", "300", "--chunk", "128", "--new-tokens", "3"]
    with redirect_stdout(io.StringIO()):
        bench.main([*options, "--variants", "dense", "2:4", "--rounds", "1", "--output", str(output)])
    distributed.barrier()
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == 2 + 2 * 4
    assert all(row["efficiency"] > 0 for row in rows if row["what"] == "prefill" and row["exchange"] != "alone")
    assert all(row["time_to_first_token_s"] > 0 for row in rows if row["what"] == "generate")

    mesh, ids = all_processes(), tokens(1, 300)
    for variant in ("2:4", "25 % of blocks"):
        model = mtsa.sparsify(llama().eval(), {"sparse_cfg": {"*": bench.VARIANTS[variant]}})
        cache, expected = DynamicCache(), []
        for part in ids.split(128, 1):
            logits = model(part, past_key_values=cache).logits
        for _ in range(6):
            expected.append(logits[:, -1].argmax(-1, keepdim=True))
            logits = model(expected[-1], past_key_values=cache).logits
        found = bench.generate(model, ids, mesh, 128, 6)[2]
        assert torch.equal(found, torch.cat(expected, 1)), variant


def run(rank, world, names, folder, results):
    """Run checks of a group in one process until one fails, and report on each."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    store = distributed.FileStore(f"{folder}/store", world)
    options = {"backend": "gloo"} if DEVICE == "cpu" else {"backend": "nccl", "device_id": torch.device("cuda", rank)}
    distributed.init_process_group(**options, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    for (size, name), function in CHECKS.items():
        if size == world and (name in names or name.split()[0] in names):
            try:
                function(Path(folder))
                distributed.barrier()
            except Exception:
                results.put((world, name, rank, traceback.format_exc()))
                break
            results.put((world, name, rank, None))
    results.put(None)
    distributed.destroy_process_group()


def main(worlds, names):
    """Print the result of each check in each process as a line of JSON."""
    context = get_context("fork" if DEVICE == "cpu" else "spawn")  # CUDA does not survive a fork
    for world in worlds:
        with tempfile.TemporaryDirectory() as folder:
            results = context.Queue()
            processes = [
                context.Process(target=run, args=(rank, world, names, folder, results), daemon=True)
                for rank in range(world)
            ]
            for process in processes:
                process.start()
            running = world
            while running:
                found = results.get(timeout=2 * PATIENCE.total_seconds())
                running -= found is None
                if found is None:
                    continue
                sys.stdout.write(json.dumps(found) + "\n")
                sys.stdout.flush()
                if found[-1] is not None:  # the others wait for this one
                    break
            for process in processes:
                if running:
                    process.terminate()
                process.join()


if __name__ == "__main__":
    numbers = {int(argument) for argument in sys.argv[1:] if argument.isdigit()}
    chosen = {argument for argument in sys.argv[1:] if not argument.isdigit()}
    main(sorted(numbers or {world for world, _ in CHECKS}), chosen or {name for _, name in CHECKS})
