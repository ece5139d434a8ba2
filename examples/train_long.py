"""Train a sparse model on sequences that are too long for one GPU.

FSDP2 divides weights, gradients and optimizer among all processes, context parallelism the tokens of each sequence, and
activation checkpointing keeps one activation per layer and token. The loss is computed a few thousand tokens at a time,
because the logits of a long sequence would be larger than all else.

    torchrun --nproc-per-node 8 examples/train_long.py MODEL FILE --length 131072 --sparsity 2:4

MODEL is a folder or a name on the Hugging Face hub, FILE a text. With ``--context 4``, eight processes train on two
sequences at a time, each of them divided among four. On CPUs, processes talk by way of gloo.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import modelopt_lite as mtsa

LOSS_TOKENS = 4096
"""Tokens whose logits are held at a time."""


class LongLanguageModel(nn.Module):
    """A language model that returns its loss and never holds the logits of all tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, shift_labels: Tensor, num_items_in_batch: Tensor, **inputs: Any) -> Tensor:
        """Return this process' share of the mean loss; arguments as from ``ContextParallel.shard``."""
        inputs.pop("labels")
        hidden = self.model.get_decoder()(**inputs, use_cache=False).last_hidden_state
        total = hidden.new_zeros((), dtype=torch.float32)
        for part, labels in zip(hidden.split(LOSS_TOKENS, 1), shift_labels.split(LOSS_TOKENS, 1), strict=True):
            total = total + checkpoint(self._loss, part, labels, use_reentrant=False)
        return total / num_items_in_batch

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self.model.get_output_embeddings()(hidden).float()
        return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def shard_weights(model: PreTrainedModel, mesh: Any, dtype: torch.dtype) -> LongLanguageModel:
    """Divide a model's weights among the processes of a mesh, layer by layer; it computes in ``dtype``."""
    reduce_dtype = torch.promote_types(dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    whole = LongLanguageModel(model)
    fully_shard(whole, mesh=mesh, mp_policy=policy)
    return whole


def sequences(tokens: Tensor, length: int, number: int, groups: int, group: int) -> Iterator[Tensor]:
    """Yield sequences ``[1, length]`` of a text for one of several groups; at its end it begins again."""
    count = len(tokens) // length
    if count == 0:
        raise SystemExit(f"the text has {len(tokens)} tokens, fewer than one sequence of {length}")
    for step in range(number):
        place = (step * groups + group) % count
        yield tokens[None, place * length : (place + 1) * length]


def train(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    length: int,
    steps: int,
    context: int,
    learning_rate: float,
    dtype: torch.dtype,
) -> list[float]:
    """Train a sparse model, the same in all processes; return the loss of each step.

    Args:
        model: after ``sparsify``.
        tokens: the text, ``[tokens]``.
        length: tokens in a sequence.
        steps: how many of the optimizer.
        context: processes among which each sequence is divided; the others train on other sequences.
        learning_rate: of AdamW.
        dtype: in which the model computes; weights stay as they are.
    """
    device = next(model.parameters()).device
    processes = distributed.get_world_size()
    if processes % context:
        raise SystemExit(f"--context {context} does not divide the {processes} processes")
    mesh = init_device_mesh(device.type, (processes // context, context), mesh_dim_names=("data", "context"))
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    model.train()
    whole = shard_weights(model, init_device_mesh(device.type, (processes,)), dtype)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=learning_rate)
    losses = []
    with mtsa.context_parallel(model, mesh["context"]) as parallel:
        for ids in sequences(tokens, length, steps, processes // context, mesh["data"].get_local_rank()):
            ids = ids.to(device)
            loss = whole(**parallel.shard(ids, labels=ids))
            # FSDP takes the mean of the gradients of all processes, but those of one sequence have to be added up.
            (loss * context).backward()
            nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total = loss.detach() * context / processes
            distributed.all_reduce(total)
            losses.append(total.item())
            if distributed.get_rank() == 0:
                print(f"step {len(losses)}: loss {losses[-1]:.4f}", flush=True)
    return losses


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write a model whose weights are divided, with its sparsity; all processes have to call it."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if distributed.get_rank() == 0:
        model.save_pretrained(folder, state_dict=weights)


def main(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a causal language model.")],
    file: Annotated[Path, typer.Argument(help="Text to train on, UTF-8.")],
    length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 131072,
    steps: Annotated[int, typer.Option(help="Steps of the optimizer.")] = 100,
    sparsity: Annotated[str, typer.Option(help="A method, N:M, or a configuration file.")] = "2:4",
    context: Annotated[int, typer.Option(help="Processes that share a sequence; 0: all.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-5,
    output: Annotated[Path | None, typer.Option(help="Folder for the trained model.")] = None,
) -> None:
    """Train a sparse model on long sequences, over all processes of torchrun."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if on_gpu else "gloo")
    tokens = AutoTokenizer.from_pretrained(model)(file.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to("cuda" if on_gpu else "cpu")
    train(
        mtsa.sparsify(loaded, sparsity),
        tokens,
        length=length,
        steps=steps,
        context=context or distributed.get_world_size(),
        learning_rate=learning_rate,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
    )
    if output is not None:
        save(loaded, output)
    distributed.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
