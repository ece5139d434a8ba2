"""Training speed of a whole model with this project's attention on this GPU, against Transformers with PyTorch's SDPA.

A step is forward, backward and AdamW on random tokens, eager, in BF16, all weights trained. All variants share one set
of random weights, run in this process and take turns, in another order each round; each counts by its median. ``cudnn``
is SDPA restricted to cuDNN's kernel, ``sdpa`` what PyTorch chooses by itself.

Prints tokens a second and writes JSON. Problems that were measured before, on the same device with the same versions,
stay unless they are measured again; rows of one problem always come from one run.

    python benchmarks/training.py
    python benchmarks/training.py --models smollm2-135m --seq-lens 8192 --variants sdpa cudnn 2:4
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import functools
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import recording
import torch
import transformers
from model import MODELS, VARIANTS, rope_parameters
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import modelopt_lite as mtsa

TRAINED = ["sdpa", "cudnn", "dense", "2:4", "4:8", "25 % of blocks"]
"""``cudnn``, and variants of ``benchmarks/model.py``."""
PROBLEMS = {
    "llama-3.1-8b": ([8192, 16384, 32768], 8192),
    "smollm2-135m": ([2048, 4096, 8192], 16384),
    "tiny": ([64], 128),
}
"""Of each model the lengths of sequences, and at least how many tokens a step has."""
CHANGES = {"llama-3.1-8b": {"num_hidden_layers": 4, "vocab_size": 16384}}
"""Four layers, and so many words that the output layer has about its share of the work in the whole model."""
WARM_UPS = 2
PROBLEM = ("model", "layers", "seq_len", "batch")


def variants_of(name: str, variants: list[str], device: str, layers: int | None = None) -> dict[str, PreTrainedModel]:
    """Return a model in each variant: objects of their own with the same parameters."""
    config = LlamaConfig(**MODELS[name] | CHANGES.get(name, {}), rope_parameters=rope_parameters(name))
    if layers is not None:
        config.num_hidden_layers = layers
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    weights = {id(x): x for x in itertools.chain(model.parameters(), model.buffers())}
    models = {}
    for variant in variants:
        models[variant] = copy.deepcopy(model, dict(weights)).train()
        if VARIANTS.get(variant):
            mtsa.sparsify(models[variant], VARIANTS[variant])
    return models


def train(model: PreTrainedModel, optimizer: torch.optim.Optimizer, tokens: Tensor, cudnn: bool) -> None:
    """Take one step."""
    optimizer.zero_grad()
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if cudnn else contextlib.nullcontext():
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    optimizer.step()


def timed(step: Callable[[], None], device: str) -> float:
    """Return how many seconds a step takes."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def measure(steps: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, tuple[float, float | None]]:
    """Return of each variant the median seconds of a step, and the peak memory in GiB, weights included."""
    peaks: dict[str, float | None] = {}
    for variant, step in steps.items():
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            for _ in range(WARM_UPS):
                step()
        except Exception as error:
            print(f"{variant}: {type(error).__name__}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
            continue
        peaks[variant] = round(torch.cuda.max_memory_allocated() / 2**30, 2) if device == "cuda" else None
    order, random_order = list(peaks), random.Random(0)
    times: dict[str, list[float]] = {variant: [] for variant in order}
    for _ in range(rounds):
        random_order.shuffle(order)
        for variant in order:
            times[variant].append(timed(steps[variant], device))
    return {variant: (statistics.median(taken), peaks[variant]) for variant, taken in times.items()}


def rows_of_problem(
    name: str,
    models: dict[str, PreTrainedModel],
    optimizer: torch.optim.Optimizer,
    seq_len: int,
    tokens_of_step: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """Measure all variants of a model at one length."""
    model = next(iter(models.values()))
    batch = -(-tokens_of_step // seq_len)
    tokens = torch.randint(model.config.vocab_size, (batch, seq_len), device=model.device)
    steps: dict[str, Callable[[], None]] = {
        variant: functools.partial(train, each, optimizer, tokens, variant == "cudnn")
        for variant, each in models.items()
    }
    found = measure(steps, rounds, model.device.type)
    sdpa = found.get("sdpa")
    return [
        {
            "model": name,
            "layers": model.config.num_hidden_layers,
            "seq_len": seq_len,
            "batch": batch,
            "variant": variant,
            "date": datetime.date.today().isoformat(),
            "rounds": rounds,
            "tokens_per_second": round(batch * seq_len / seconds),
            "speed_to_sdpa": None if sdpa is None else round(sdpa[0] / seconds, 3),
            "peak_gib": peak,
        }
        for variant, (seconds, peak) in found.items()
    ]


def problem_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a row and those of other variants have in common."""
    return tuple(row[name] for name in PROBLEM)


def main(options: list[str] | None = None) -> None:
    """Measure what the command line asks for, print it and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-3.1-8b", "smollm2-135m"], choices=PROBLEMS)
    parser.add_argument("--seq-lens", nargs="+", type=int, help="by default those of PROBLEMS")
    parser.add_argument("--tokens", type=int, help="of a step at least, if a sequence has fewer; by default as there")
    parser.add_argument("--layers", type=int, help="instead of the model's number")
    parser.add_argument("--variants", nargs="+", default=TRAINED, choices=TRAINED)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/training-<device>.json")
    arguments = parser.parse_args(options)
    device = recording.device_name(arguments.device)
    output = arguments.output or recording.default_output("training", device)
    results = recording.header(device, transformers=transformers.__version__)
    rows = recording.rows_before(output, results)
    for name in arguments.models:
        models = variants_of(name, arguments.variants, arguments.device, arguments.layers)
        parameters = next(iter(models.values())).parameters()
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=arguments.device == "cuda")
        for seq_len in arguments.seq_lens or PROBLEMS[name][0]:
            tokens_of_step = arguments.tokens or PROBLEMS[name][1]
            new = rows_of_problem(name, models, optimizer, seq_len, tokens_of_step, arguments.rounds)
            speeds = (f"{row['variant']} {row['tokens_per_second']} ({row['speed_to_sdpa']})" for row in new)
            print(f"{name}, {seq_len}: {', '.join(speeds)}", flush=True)
            kept = [row for row in rows if problem_of(row) not in {problem_of(each) for each in new}]
            rows = sorted(kept + new, key=lambda row: (row["model"], row["seq_len"], TRAINED.index(row["variant"])))
            recording.write(output, results, rows)
        del models, optimizer, parameters


if __name__ == "__main__":
    main()
