"""Speed of the decode kernels on this GPU against PyTorch's attention, in CUDA graphs.

All kernels of one case run in this process and take turns; each counts by the median of its rounds. A graph holds
several calls, on copies of the keys and values that together are larger than the L2 cache unless ``--in-cache`` is
given, as between two layers of a model the weights pass through it. ``bytes`` are those of the keys and values that a
case has to read. PyTorch runs what it can express: whole batches, and with ``padded`` and ``ragged`` a boolean mask.

    python benchmarks/decode.py                           # everything, a few minutes
    python benchmarks/decode.py --cases b1-8k b16-8k
    python benchmarks/decode.py --tune                    # settings that are fastest in each case
    python benchmarks/decode.py --tune --keys 64 --warps 4 --stages 3 4 --programs 2 4 --cases b1-8k
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import multiprocessing
import platform
import random
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.runtime.errors import OutOfResources

from modelopt_lite.kernels.decode.launch import DecodeSettings, default_settings, prepare
from modelopt_lite.kernels.request import AttentionRequest
from modelopt_lite.kernels.top_n import top_n_plan
from modelopt_lite.plan import DENSE

L2_BYTES = 2**28
"""Bytes of keys and values of all copies together: several times any L2 cache."""
MAX_COPIES = 16
BACKENDS = {
    "fa2": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Case:
    """One problem: ``lengths`` are the keys of each sequence, in a cache of ``longest`` slots a sequence."""

    lengths: tuple[int, ...]
    queries: int = 1
    heads: tuple[int, int] = (32, 8)
    head_dim: int = 128
    left_padded: bool = False
    longest: int = 0
    sliding_window: int | None = None
    sinks: bool = False
    n_of_m: tuple[int, int] = (0, 4)

    @property
    def code(self) -> tuple[object, ...]:
        """What the kernels' machine code depends on, beside settings."""
        batch = 1 if len(self.lengths) == 1 else max(16, 2 ** (len(self.lengths) - 1).bit_length())
        return batch, self.queries, self.heads, self.head_dim, self.sliding_window is None, self.sinks, self.n_of_m

    @property
    def slots(self) -> int:
        """Slots of the cache for each sequence."""
        return self.longest or max(self.lengths)

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values that have to be read, in BF16."""
        window = self.sliding_window or self.slots
        return sum(min(n, window + self.queries - 1) for n in self.lengths) * self.heads[1] * self.head_dim * 4

    def request(self, seed: int = 0) -> AttentionRequest:
        """Make the request; the cache is ``[batch, kv_heads, slots, head_dim]``, as Transformers has it."""
        generator = torch.Generator("cuda").manual_seed(seed)
        batch = len(self.lengths)
        random_of = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16, generator=generator)
        cache = (random_of(batch, self.heads[1], self.slots, self.head_dim) for _ in range(2))
        # As rows that each sequence's heads lie ``slots`` rows apart in, without a copy.
        rows = self.heads[1] * self.slots
        shape = ((batch - 1) * rows + self.slots, self.heads[1], self.head_dim)
        k, v = (x.as_strided(shape, (self.head_dim, self.slots * self.head_dim, 1)) for x in cache)
        integers = functools.partial(torch.tensor, device="cuda", dtype=torch.int64)
        first = [self.slots - n if self.left_padded else 0 for n in self.lengths]
        return AttentionRequest(
            q=random_of(batch * self.queries, self.heads[0], self.head_dim),
            k=k,
            v=v,
            s_aux=torch.randn(self.heads[0], device="cuda", generator=generator) if self.sinks else None,
            starts_q=integers([b * self.queries for b in range(batch)]),
            lengths_q=integers([self.queries] * batch),
            max_q=self.queries,
            starts_k=integers([b * rows + first[b] for b in range(batch)]),
            lengths_k=integers(self.lengths),
            max_k=self.slots,
            is_causal=True,
            softmax_scale=self.head_dim**-0.5,
            sliding_window=self.sliding_window,
            softcap=None,
            plan=DENSE if self.n_of_m[0] == 0 else top_n_plan(*self.n_of_m, 0, 64),
        )

    def peer(self, request: AttentionRequest) -> Callable[[], Tensor] | None:
        """Return a call of PyTorch's attention on the same tensors, or None where it cannot express the case."""
        if self.sinks or self.n_of_m[0]:
            return None
        batch = len(self.lengths)
        q = request.q.unflatten(0, (batch, self.queries)).transpose(1, 2)
        shape = (batch, self.heads[1], self.slots, self.head_dim)
        k, v = (x.as_strided(shape, torch.empty(shape, device="meta").stride()) for x in (request.k, request.v))
        masked = self.queries > 1 or self.sliding_window is not None or set(self.lengths) != {self.slots}
        mask = self.mask(batch) if masked else None
        return functools.partial(scaled_dot_product_attention, q, k, v, attn_mask=mask, enable_gqa=True)

    def mask(self, batch: int) -> Tensor:
        """Return which slots each query sees, ``[batch, 1, queries, slots]``."""
        slots = torch.arange(self.slots, device="cuda")
        length = torch.tensor(self.lengths, device="cuda")[:, None, None, None]
        begin = self.slots - length if self.left_padded else length * 0
        query = begin + length - self.queries + torch.arange(self.queries, device="cuda")[:, None]
        mask = (slots >= begin) & (slots <= query)
        if self.sliding_window is not None:
            mask = mask & (slots > query - self.sliding_window)
        return mask.expand(batch, 1, self.queries, self.slots)


_random = random.Random(0)
RAGGED = (*(_random.randint(256, 8192) for _ in range(15)), 8192)
CASES = {
    "b1-2k": Case((2048,)),
    "b1-8k": Case((8192,)),
    "b1-32k": Case((32768,)),
    "b1-128k": Case((131072,)),
    "b16-8k": Case((8192,) * 16),
    "b64-2k": Case((2048,) * 64),
    "static": Case((8191,), longest=32768),
    "ragged": Case(RAGGED),
    "padded": Case(RAGGED, left_padded=True),
    "window": Case((32768,) * 4, sliding_window=4096),
    "sinks": Case((8192,) * 16, sinks=True),
    "4-queries": Case((8192,), queries=4),
    "16-queries": Case((8192,), queries=16),
    "4-queries-2:4": Case((8192,), queries=4, n_of_m=(2, 4)),
    "d64-8k": Case((8192,), head_dim=64),
    "d64-32k": Case((32768,), head_dim=64),
    "d256-8k": Case((8192,), head_dim=256, heads=(16, 8)),
    "mqa-32k": Case((32768,), heads=(16, 1)),
    "mha-8k": Case((8192,), heads=(32, 32)),
}


def graph_of(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """Capture calls one after the other."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def time_graph(graph: torch.cuda.CUDAGraph, calls: int, replays: int = 20) -> float:
    """Return the median time of a call, in microseconds."""
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in times) / calls * 1000


def copies_of(case: Case, in_cache: bool) -> list[AttentionRequest]:
    """Return requests that fill the L2 cache several times, or one many times; at least four calls of it."""
    if in_cache:
        return [case.request()] * MAX_COPIES
    number = min(MAX_COPIES, max(4, -(-L2_BYTES // case.bytes)))
    different = [case.request(seed) for seed in range(min(number, max(1, 2**33 // max(case.bytes, 1))))]
    return list(itertools.islice(itertools.cycle(different), number))


def own_calls(requests: list[AttentionRequest], settings: DecodeSettings | None) -> list[Callable[[], object]]:
    """Return calls of the decode kernels."""
    run = prepare(requests[0], settings)
    return [functools.partial(run, request) for request in requests]


def measure(graphs: dict[Any, torch.cuda.CUDAGraph], calls: int, rounds: int) -> dict[Any, float]:
    """Return the median time of each graph's calls; in another order each round."""
    times: dict[Any, list[float]] = {key: [] for key in graphs}
    order, random_order = list(graphs), random.Random(0)
    for _ in range(rounds + 1):
        random_order.shuffle(order)
        for key in order:
            times[key].append(time_graph(graphs[key], calls))
    return {key: statistics.median(taken[1:]) for key, taken in times.items()}


def measure_case(name: str, case: Case, rounds: int, in_cache: bool) -> list[dict[str, Any]]:
    """Measure the decode kernels and PyTorch's on one case."""
    requests = copies_of(case, in_cache)
    graphs = {"decode": graph_of(own_calls(requests, None))}
    for peer, backend in BACKENDS.items():
        try:
            with sdpa_kernel(backend):
                peers = [case.peer(request) for request in requests]
                if None not in peers:
                    graphs[peer] = graph_of(peers)
        except RuntimeError as error:
            print(f"{name} {peer}: {str(error).splitlines()[0]}", file=sys.stderr)
            torch.cuda.synchronize()
    times = measure(graphs, len(requests), rounds)
    best = min((us for kernel, us in times.items() if kernel != "decode"), default=None)
    return [
        {
            "case": name,
            "kernel": kernel,
            "in_cache": in_cache,
            "us": round(us, 2),
            "tb_per_s": round(case.bytes / us / 1e6, 3),
            "speed_to_best_sdpa": None if best is None else round(best / us, 3),
            "date": datetime.date.today().isoformat(),
        }
        for kernel, us in times.items()
    ]


def candidates(arguments: argparse.Namespace) -> list[DecodeSettings]:
    """Return the settings to try."""
    return list(
        itertools.starmap(
            DecodeSettings,
            itertools.product(
                arguments.keys, arguments.warps, arguments.stages, arguments.programs, arguments.least, arguments.peel
            ),
        )
    )


def code_of(settings: DecodeSettings) -> DecodeSettings:
    """Return settings with the same machine code, the same for all that share it."""
    return settings._replace(least_tiles=1)


def fits(name: str, settings: DecodeSettings) -> bool:
    """Compile a candidate into Triton's cache, and say whether the GPU can run it."""
    request = CASES[name].request()
    try:
        prepare(request, settings)(request)
        torch.cuda.synchronize()
    except OutOfResources:
        return False
    return True


def tune(names: list[str], arguments: argparse.Namespace) -> None:
    """Print the fastest candidates of each case, and the table's settings."""
    every = candidates(arguments)
    # All machine code is made first, in parallel; least_tiles does not change it.
    codes = dict.fromkeys(code_of(x) for x in every)
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        pairs = list(itertools.product({CASES[name].code: name for name in names}.items(), codes))
        found = pool.map(fits, [name for (_, name), _ in pairs], [x for _, x in pairs])
        fitting = {(case, x): fit for ((case, _), x), fit in zip(pairs, found, strict=True)}
    for name in names:
        requests = copies_of(CASES[name], arguments.in_cache)
        table = default_settings(requests[0])
        usable = [x for x in every if fitting[CASES[name].code, code_of(x)]]
        graphs = {x: graph_of(own_calls(requests, x)) for x in dict.fromkeys([table, *usable])}
        times = measure(graphs, len(requests), arguments.rounds)
        print(
            f"\n{name}: {len(usable)} of {len(every)} fit; keys, warps, stages, programs, least tiles, peel", flush=True
        )
        for settings, us in sorted(times.items(), key=lambda item: item[1]):
            if us < 1.1 * min(times.values()) or settings == table:
                mark = "  <- table" if settings == table else ""
                print(f"  {us:8.2f} us  {CASES[name].bytes / us / 1e6:5.2f} TB/s  {tuple(settings)}{mark}", flush=True)


def main() -> None:
    """Measure what the arguments ask for, print it and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--in-cache", action="store_true", help="read the same keys again and again")
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/decode-<device>.json")
    parser.add_argument("--tune", action="store_true", help="try settings instead of comparing with PyTorch")
    parser.add_argument("--keys", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--warps", nargs="+", type=int, default=[4])
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--programs", nargs="+", type=int, default=[2, 3, 4, 8])
    parser.add_argument("--least", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--peel", nargs="+", type=int, default=[1, 0], choices=[0, 1])
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile")
    arguments = parser.parse_args()
    arguments.peel = [bool(x) for x in arguments.peel]
    if arguments.tune:
        tune(arguments.cases, arguments)
        return
    device = torch.cuda.get_device_name()
    output = arguments.output or Path(__file__).parent / "results" / f"decode-{device.lower().replace(' ', '-')}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "device": device,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
        "date": datetime.date.today().isoformat(),
    }
    rows: list[dict[str, Any]] = []
    for name in arguments.cases:
        new = measure_case(name, CASES[name], arguments.rounds, arguments.in_cache)
        for row in new:
            print(
                f"{name:14} {row['kernel']:10} {row['us']:9.2f} us {row['tb_per_s']:6.2f} TB/s  "
                f"{row['speed_to_best_sdpa'] or ''}",
                flush=True,
            )
        rows += new
        # after every case, so that an interrupted run keeps what it measured
        output.write_text(json.dumps(results | {"rows": rows}, indent=1) + "\n")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
