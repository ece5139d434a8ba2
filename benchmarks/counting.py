"""What ``collect_statistics`` costs: time to first token of a whole model with it, and without it.

Both take turns, in one process and with one set of weights, and each counts by its median. Weights are random, with the
shape of Llama 3.1 8B. Prints a table and writes JSON; ``ratio`` is the time with statistics over that without.

    python benchmarks/counting.py
    python benchmarks/counting.py --layers 8 --seq-lens 8192 --methods 2:4
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import statistics
import time
from pathlib import Path
from typing import Any

import recording
import torch
import transformers
from model import MODELS, first_token, rope_parameters
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import modelopt_lite as mtsa
from modelopt_lite.stats import ModelStatistics

METHODS: dict[str, dict[str, Any]] = {
    "2:4": {"method": "sparse_softmax", "sparsity_n": 2, "sparsity_m": 4},
    "10 % of blocks": {"method": "mean_pool_top_k", "keep": 0.1},
    "flash_prefill": {"method": "flash_prefill"},
    "xattention": {"method": "xattention"},
    "skip_softmax": {"method": "skip_softmax"},
}
PROBLEM = ("method", "seq_len", "layers", "exact")


def make_model(shape: str, layers: int | None, device: str) -> PreTrainedModel:
    """Return a model with random weights."""
    config = LlamaConfig(**MODELS[shape], rope_parameters=rope_parameters(shape))
    config.num_hidden_layers = layers or config.num_hidden_layers
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def timed(model: PreTrainedModel, tokens: Tensor, counted: ModelStatistics | None, exact: bool) -> float:
    """Return the time to first token in ms; what is counted is added to the statistics, if there are any."""
    on_gpu = tokens.is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    with mtsa.collect_statistics(model, exact=exact) if counted is not None else contextlib.nullcontext() as found:
        first_token(model, tokens, {})
        if on_gpu:
            torch.cuda.synchronize()
    taken = time.perf_counter() - start
    if counted is not None:
        counted.merge(found)
    return taken * 1e3


def measure(
    model: PreTrainedModel, method: str, seq_len: int, rounds: int, seconds: float, *, exact: bool
) -> dict[str, Any]:
    """Return a row: median times of prefills with and without statistics, and what was counted."""
    generator = torch.Generator(model.device).manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, seq_len), device=model.device, generator=generator)
    counted = ModelStatistics()
    times: dict[bool, list[float]] = {False: [], True: []}
    mtsa.sparsify(model, METHODS[method])
    try:
        for is_counted in times:  # the first compiles
            timed(model, tokens, ModelStatistics() if is_counted else None, exact)
        until = time.monotonic() + seconds
        while len(times[True]) < rounds or time.monotonic() < until:
            for is_counted in (False, True) if len(times[True]) % 2 else (True, False):
                times[is_counted].append(timed(model, tokens, counted if is_counted else None, exact))
    finally:
        mtsa.unsparsify(model)
    without, with_statistics = (statistics.median(times[is_counted]) for is_counted in (False, True))
    return {
        "method": method,
        "seq_len": seq_len,
        "layers": model.config.num_hidden_layers,
        "exact": exact,
        "date": datetime.date.today().isoformat(),
        "ms": round(without, 3),
        "ms_with_statistics": round(with_statistics, 3),
        "ratio": round(with_statistics / without, 4),
        "share_dropped": round(counted.total.sparsity, 4),
        "mass_kept": round(counted.total.mass_kept, 4),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a Markdown table."""
    names = ("method", "seq_len", "layers", "exact", "ms", "ms_with_statistics", "ratio", "share_dropped", "mass_kept")
    lines = [f"| {' | '.join(names)} |", "|---|" + "---:|" * (len(names) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(str(row[name]) for name in names)} |" for row in rows)])


@torch.no_grad()
def main(command_line: list[str] | None = None) -> None:
    """Measure what the command line asks for, print it and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS)
    parser.add_argument("--seq-lens", nargs="+", type=int, default=[2048, 8192, 32768])
    parser.add_argument("--model", default="llama-3.1-8b", choices=MODELS, help="shape; weights are random")
    parser.add_argument("--layers", type=int, help="only so many of the model's layers")
    parser.add_argument("--exact", action="store_true", help="count all queries, not a sample")
    parser.add_argument("--rounds", type=int, default=5, help="turns with and without statistics, at least")
    parser.add_argument("--seconds", type=float, default=4.0, help="and how long they go on, at least")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/counting-<device>.json")
    arguments = parser.parse_args(command_line)
    device = recording.device_name(arguments.device)
    output = arguments.output or recording.default_output("counting", device)
    results = recording.header(device, transformers=transformers.__version__)
    rows = recording.rows_before(output, results)
    model = make_model(arguments.model, arguments.layers, arguments.device)
    print(table([]), flush=True)
    for seq_len in arguments.seq_lens:
        for method in arguments.methods:
            row = measure(model, method, seq_len, arguments.rounds, arguments.seconds, exact=arguments.exact)
            print(table([row]).splitlines()[-1], flush=True)
            problem = [row[name] for name in PROBLEM]
            rows = [old for old in rows if [old[name] for name in PROBLEM] != problem] + [row]
            recording.write(output, results, rows)  # at once, so that an interrupted run keeps what it measured


if __name__ == "__main__":
    main()
