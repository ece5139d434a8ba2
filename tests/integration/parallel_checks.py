"""What several processes must agree on with a single one; run by test_parallel.py, as one script.

Each check is a function that every process of a group runs. Processes are forked, so that packages are imported once,
and each group runs all its checks, because starting is what takes time.
"""

import json
import os
import re
import sys
import tempfile
import traceback
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import distributed
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

import modelopt_lite as mtsa

CHECKS = {}
"""Functions by ``(number of processes, name)``."""
PATIENCE = timedelta(seconds=60)
"""How long a process waits for the others, which may have failed."""
EXACT = {"rtol": 1e-9, "atol": 1e-11}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}
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


def check(*worlds):
    """Register a check for groups of so many processes."""

    def register(function):
        for world in worlds:
            CHECKS[world, function.__name__] = function
        return function

    return register


def llama(heads=2, **options):
    """Return a tiny model whose attention is far from uniform, so that dropping keys matters."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": heads, **options}))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(60)
            layer.self_attn.k_proj.weight.mul_(60)
    model.loss_function = exact_loss
    return model.double()


def exact_loss(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, **_):
    """Compute what Transformers does, but not in FP32."""
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), shift_labels.flatten(), reduction="sum")
    return loss / ((shift_labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def tokens(batch, length):
    return torch.randint(SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))


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
    ids, mask = tokens(3, max(lengths)), torch.ones(3, max(lengths), dtype=torch.int64)
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


@check(2, 4)
def context_parallel(folder):
    mesh = distributed.init_device_mesh("cpu", (distributed.get_world_size(),))
    batch = ragged()
    for name, method in METHODS.items():
        model = mtsa.sparsify(llama(), {"sparse_cfg": {"*": method}})
        with mtsa.collect_statistics(model) as statistics:
            expected = result_of_one(model, batch)
        for exchange in ("gather", "ring"):
            with (
                mtsa.context_parallel(model, mesh, exchange=exchange) as parallel,
                mtsa.collect_statistics(model) as shared,
            ):
                found = result_of_all(model, batch, parallel)
            close(found, expected, (name, exchange))
            shared.sum_over_ranks()
            close(counts(shared), counts(statistics), (name, exchange, "statistics"))


def run(rank, world, folder, results):
    """Run all checks of a group in one process, and report what failed."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world, timeout=PATIENCE
    )
    for (size, name), function in CHECKS.items():
        if size == world:
            error = None
            try:
                function(Path(folder))
            except Exception:
                error = traceback.format_exc()
            results.put((world, name, rank, error))
            distributed.barrier()
    distributed.destroy_process_group()


def main(worlds):
    """Print the result of each check in each process as a line of JSON."""
    context = get_context("fork")
    for world in worlds:
        with tempfile.TemporaryDirectory() as folder:
            results = context.SimpleQueue()
            processes = [context.Process(target=run, args=(rank, world, folder, results)) for rank in range(world)]
            for process in processes:
                process.start()
            for _ in range(world * sum(size == world for size, _ in CHECKS)):
                sys.stdout.write(json.dumps(results.get()) + "\n")
            for process in processes:
                process.join()


if __name__ == "__main__":
    main([int(world) for world in sys.argv[1:]] or sorted({world for world, _ in CHECKS}))
