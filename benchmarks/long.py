"""Long prompts over several GPUs: prefill, and generation over a cache that is divided among them.

    torchrun --nproc-per-node 2 benchmarks/long.py

The model has the shape of Llama 3.1 8B and random weights. What is measured, ``what`` in the rows:

- ``exchange``: the time in which keys and values of one layer go to all other GPUs or to the next one, without anything
  else, and the bytes that each GPU receives in a second.
- ``prefill``: a forward pass without a cache, on one GPU alone, and over all of them with each exchange of keys and
  values, in turns. The efficiency is the time alone divided by the time together and by the number of GPUs.
- ``generate``: the time to the first token of a prompt that is computed in chunks, and the time of each further token.
  Each GPU holds the keys and values of its own tokens, and logits are computed for the last token only.

Rows that were measured before, on the same device with the same versions, stay unless they are measured again.

At a million tokens, keys and values of all layers are 128 GiB in BF16, and 64 GiB on each of two GPUs, beside 15 GiB of
weights. Chunks of 65536 tokens keep activations below 4 GiB. Each layer's keys and values, 4 GiB, are gathered for the
time that it is computed; with the copy in the order of positions that is 8 GiB.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from model import MODELS, VARIANTS, rope_parameters
from recording import default_output, device_name, header, rows_before, write
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import Cache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

import modelopt_lite as mtsa

PROBLEM = ("what", "exchange", "variant", "length", "layers", "gpus")


class ReservedLayer(DynamicLayer):
    """Keys and values of one layer in memory that is reserved at once, so that no token copies those before it.

    Attributes:
        capacity: slots of each row.
    """

    capacity = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values ``[batch, heads, tokens, dim]``; return all, as Transformers asks for it."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.reserved = [x.new_empty(*x.shape[:2], self.capacity, x.shape[3]) for x in (key_states, value_states)]
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        for reserved, new in zip(self.reserved, (key_states, value_states), strict=True):
            reserved[:, :, begin:end] = new
        self.keys, self.values = (reserved[:, :, :end] for reserved in self.reserved)
        return self.keys, self.values


def seconds(call: Callable[[], object], device: str) -> float:
    """Time a call that all processes make, from when the last begins to when the last ends."""
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    distributed.barrier()
    begin = time.perf_counter()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    distributed.barrier()
    return time.perf_counter() - begin


def exchanges(config: LlamaConfig, length: int, mesh: DeviceMesh, dtype: torch.dtype) -> dict[str, float]:
    """Return the seconds in which keys and values of one layer are exchanged, by the kind of exchange."""
    width = 2 * config.num_key_value_heads * config.head_dim
    own = torch.zeros(length // mesh.size(), width, dtype=dtype, device=mesh.device_type)
    everything = own.new_empty(length, width)
    rank, size = mesh.get_local_rank(), mesh.size()

    def gather() -> None:
        distributed.all_gather(list(everything.chunk(size)), own)

    def ring() -> None:
        send = distributed.P2POp(distributed.isend, own, (rank + 1) % size)
        receive = distributed.P2POp(distributed.irecv, everything[: len(own)], (rank - 1) % size)
        for work in distributed.batch_isend_irecv([send, receive]):
            work.wait()

    def often(call: Callable[[], None]) -> None:
        for _ in range(10):
            call()

    found = {}
    for name, call in {"gather": gather, "ring": ring}.items():
        often(call)
        found[name] = seconds(functools.partial(often, call), mesh.device_type) / 10
    return found


def prefill(model: LlamaForCausalLM, ids: Tensor, mesh: DeviceMesh, rounds: int) -> dict[str, float]:
    """Return the seconds of a forward pass without a cache, alone and with each exchange, medians of some rounds."""
    times: dict[str, list[float]] = {"alone": [], "gather": [], "ring": []}

    def forward(**inputs: Any) -> None:
        model.model(**inputs, use_cache=False)

    def alone() -> None:
        if distributed.get_rank() == 0:
            forward(input_ids=ids)

    for _ in range(rounds + 1):
        for exchange, found in times.items():
            if exchange == "alone":
                found.append(seconds(alone, mesh.device_type))
                continue
            with mtsa.context_parallel(model, mesh, exchange=exchange) as parallel:  # type: ignore[arg-type]
                found.append(seconds(lambda: forward(**parallel.shard(ids)), mesh.device_type))
    return {exchange: statistics.median(found[1:]) for exchange, found in times.items()}  # the first one warms up


def generate(
    model: LlamaForCausalLM, ids: Tensor, mesh: DeviceMesh, chunk: int, new_tokens: int
) -> tuple[float, list[float], Tensor]:
    """Generate greedily over a divided cache.

    Returns:
        Seconds to the first token, seconds of each further one, and the tokens, ``[1, new_tokens]``.
    """

    class Layer(ReservedLayer):
        # A process holds its part of each chunk, rounded up to whole blocks, and all new tokens.
        capacity = (ids.shape[1] // chunk + 1) * (chunk // mesh.size() + 512) + new_tokens

    found: list[Tensor] = []
    times: list[float] = []
    cache, past = Cache(layer_class_to_replicate=Layer), None
    with mtsa.context_parallel(model, mesh) as parallel:

        def step(tokens: Tensor) -> Tensor:
            nonlocal past
            past = parallel.shard(tokens, past=past)
            hidden: Tensor = model.model(**past, past_key_values=cache, use_cache=True).last_hidden_state
            return hidden

        def first() -> None:
            for part in ids.split(chunk, 1):
                hidden = step(part)
            found.append(model.lm_head(parallel.last(hidden, past or {})).argmax(-1, keepdim=True))

        def further() -> None:
            found.append(model.lm_head(step(found[-1])[:, -1]).argmax(-1, keepdim=True))

        time_to_first = seconds(first, ids.device.type)
        times.extend(seconds(further, ids.device.type) for _ in range(new_tokens - 1))
    return time_to_first, times, torch.cat(found, 1)


def warm_up(model: LlamaForCausalLM, ids: Tensor, mesh: DeviceMesh, chunk: int) -> None:
    """Load kernels and set up communication, with one layer and two chunks of a prompt."""
    layers = model.model.layers
    model.model.layers = layers[:1]
    try:
        generate(model, ids[:, : 2 * chunk], mesh, chunk, 3)
    finally:
        model.model.layers = layers


def measure(arguments: argparse.Namespace, mesh: DeviceMesh, record: Callable[[dict[str, Any]], None]) -> None:
    """Measure all variants; every process records the same rows."""
    device = mesh.device_type
    torch.manual_seed(0)
    shape = MODELS[arguments.model] | ({"num_hidden_layers": arguments.layers} if arguments.layers else {})
    config = LlamaConfig(**shape, rope_parameters=rope_parameters(arguments.model))
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    common = {"layers": config.num_hidden_layers, "gpus": mesh.size()}
    for length in arguments.prefill:
        for exchange, spent in exchanges(config, length, mesh, model.dtype).items():
            received = length * 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize / mesh.size()
            received *= mesh.size() - 1 if exchange == "gather" else 1
            values = {"ms": round(1e3 * spent, 3), "gb_per_s": round(1e-9 * received / spent, 1)}
            record({"what": "exchange", "exchange": exchange, "length": length, **common, "layers": 1, **values})
    for variant in arguments.variants:
        mtsa.sparsify(model.eval(), {"sparse_cfg": {"*": VARIANTS[variant]}})
        for length in arguments.prefill:
            ids = torch.randint(config.vocab_size, (1, length), device=device)
            times = prefill(model, ids, mesh, arguments.rounds)
            for exchange, spent in times.items():
                values = {"s": round(spent, 4), "efficiency": round(times["alone"] / spent / mesh.size(), 3)}
                if exchange == "alone":
                    del values["efficiency"]
                record(
                    {"what": "prefill", "exchange": exchange, "variant": variant, "length": length} | common | values
                )
        for length in arguments.generate:
            ids = torch.randint(config.vocab_size, (1, length), device=device)
            warm_up(model, ids, mesh, arguments.chunk)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            first, steps, _ = generate(model, ids, mesh, arguments.chunk, arguments.new_tokens)
            values = {"time_to_first_token_s": round(first, 3), "decode_ms": round(1e3 * statistics.median(steps), 2)}
            if device == "cuda":
                values["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
            record({"what": "generate", "exchange": "gather", "variant": variant, "length": length} | common | values)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b", choices=MODELS, help="shape; weights are random")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--variants", nargs="+", default=["dense", "2:4", "10 % of blocks"], choices=list(VARIANTS)[1:])
    parser.add_argument("--prefill", nargs="*", type=int, default=[131072], help="lengths without a cache")
    parser.add_argument("--generate", nargs="*", type=int, default=[262144, 1048576], help="lengths of prompts")
    parser.add_argument("--chunk", type=int, default=65536, help="tokens of a prompt that are computed together")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="how often prefill is timed")
    parser.add_argument("--output", type=Path, help="JSON file; by default by the device's name in results/")
    return parser


@torch.no_grad()
def main(options: list[str] | None = None) -> None:
    """Measure, and write the results."""
    arguments = parser().parse_args(options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options_of_group: dict[str, Any] = {"backend": "gloo"}
    if device == "cuda":
        gpu = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(gpu)
        options_of_group = {"backend": "nccl", "device_id": gpu}
    began_group = not distributed.is_initialized()
    if began_group:
        distributed.init_process_group(**options_of_group)
    results = header(device_name(device), transformers=transformers.__version__) | {"model": arguments.model}
    output = arguments.output or default_output("long", device_name(device))
    rows = rows_before(output, results)

    def record(row: dict[str, Any]) -> None:
        if distributed.get_rank() == 0:
            print(row, flush=True)
            rows[:] = [x for x in rows if any(x.get(name) != row.get(name) for name in PROBLEM)] + [row]
            write(output, results, rows)

    measure(arguments, init_device_mesh(device, (distributed.get_world_size(),)), record)
    if began_group:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
