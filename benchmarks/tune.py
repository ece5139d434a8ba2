"""Measure launch settings of the portable kernels on this GPU and propose rows for the tables in portable/launch.py.

Candidates of one problem take turns, after heating, and count by their median. Kernels are compiled beforehand, in
parallel. A candidate that does not fit the GPU is left out. Candidates of each kernel of the backward are measured with
the other kernel's settings from its table, so that times are those of a whole backward.

    python benchmarks/tune.py --pass forward --head-dims 64 128 --names dense 2:4 4:8 --seq-lens 4096 16384
    python benchmarks/tune.py --pass backward --names dense 2:4 --seq-lens 8192
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from attention import DTYPES, Call, inputs, measure, own_call, request_of
from torch import Tensor
from triton.runtime.errors import OutOfResources

from modelopt_lite.kernels.device import compute_capability
from modelopt_lite.kernels.portable.launch import KEY_SETTINGS, QUERY_SETTINGS, prepare_backward
from modelopt_lite.kernels.request import ForwardResult
from modelopt_lite.kernels.settings import Settings, SettingsRow, block_dim, default_settings

HEADS = (32, 8)
KERNELS = {"forward": ["forward"], "backward": ["queries", "keys"]}
WORK = {"forward": 1.0, "backward": 2.5}
"""A pass's matrix products in units of the forward's."""
WIDE_TILES = [
    (64, 32, 4, 3),
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (64, 128, 4, 2),
    (128, 32, 8, 3),
    (128, 64, 8, 2),
    (128, 64, 8, 3),
]
TILES = {
    # block_m, block_n, num_warps, num_stages
    "forward": [*WIDE_TILES, (128, 128, 8, 2)],
    "queries": WIDE_TILES,
    "keys": [(64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 2), (64, 128, 8, 2)],
}


class Problem(NamedTuple):
    """A kernel and what it is tuned for; ``name`` is ``dense`` or ``N:M``."""

    dtype: str
    head_dim: int
    name: str
    kernel: str

    @property
    def group(self) -> int:
        """Keys a group."""
        return 1 if self.name == "dense" else int(self.name.split(":")[1])

    def candidates(self) -> list[Settings]:
        """Return the settings to try."""
        descriptors = gpu() >= 90 and self.dtype != "fp32"
        frozen = (True, False) if self.kernel == "forward" and self.dtype == "bf16" else (False,)
        # A group's scores lie in one thread only if a tile holds eight groups.
        tiles = [tile for tile in TILES[self.kernel] if tile[1] >= 8 * self.group]
        return [Settings(*tile, descriptors, each) for tile in tiles for each in frozen]

    def call(self, q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> Call:
        """Return a call of the kernel's whole pass; tensors are ``[batch, seq, heads, dim]``."""
        request = request_of(q, k, v, True, self.name)
        if self.kernel == "forward":
            return own_call(request, "portable", settings)
        described = (gpu(), DTYPES[self.dtype], block_dim(self.head_dim), self.group, True)
        if self.kernel == "queries":
            both = settings, default_settings(*described, KEY_SETTINGS, True)
        else:
            both = default_settings(*described, QUERY_SETTINGS, True), settings
        out, lse = own_call(request._replace(with_lse=True), "portable")()
        grad = torch.randn_like(out)
        return functools.partial(prepare_backward(grad, request, both), grad, ForwardResult(out, lse), request)


def gpu() -> int:
    """Return this GPU's compute capability."""
    return compute_capability(torch.device("cuda", torch.cuda.current_device()))


def fits(problem: Problem, settings: Settings) -> bool:
    """Compile a candidate into Triton's cache, and say whether the GPU can run it."""
    try:
        problem.call(*inputs(1, 256, HEADS, problem.head_dim, problem.dtype), settings)()
        torch.cuda.synchronize()
    except OutOfResources:
        return False
    return True


def main() -> None:
    """Measure, print a table and the best settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pass", dest="which", required=True, choices=KERNELS)
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=DTYPES)
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--names", nargs="+", default=["dense", "2:4", "4:8", "8:16"], help="dense or N:M")
    parser.add_argument("--seq-lens", nargs="+", type=int, default=[4096, 16384])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--heat", type=float, default=0.5, help="seconds of heating before each problem")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile")
    parser.add_argument("--output", type=Path, help="JSON file of all times")
    arguments = parser.parse_args()

    problems = itertools.starmap(
        Problem, itertools.product(arguments.dtypes, arguments.head_dims, arguments.names, KERNELS[arguments.which])
    )
    candidates = [(problem, settings) for problem in problems for settings in problem.candidates()]
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        fitting = list(pool.map(fits, *zip(*candidates, strict=True)))
    print(f"{sum(fitting)} of {len(candidates)} candidates fit", flush=True)

    rows = []
    for problem, group in itertools.groupby(itertools.compress(candidates, fitting), key=lambda each: each[0]):
        every = [settings for _, settings in group]
        slowdown = dict.fromkeys(every, 1.0)
        for seq_len in arguments.seq_lens:
            tensors = inputs(1, seq_len, HEADS, problem.head_dim, problem.dtype)
            calls = {settings: problem.call(*tensors, settings) for settings in every}
            times = measure(calls, arguments.heat, arguments.rounds)
            print(f"\n{problem} S={seq_len}", flush=True)
            flop = WORK[arguments.which] * 0.5 * 4 * HEADS[0] * seq_len**2 * problem.head_dim
            for settings, ms in sorted(times.items(), key=lambda item: item[1]):
                slowdown[settings] *= ms / min(times.values())
                print(f"  {flop / ms / 1e9:6.0f} TFLOP/s  {ms:8.3f} ms  {tuple(settings)}", flush=True)
                rows.append({**problem._asdict(), "seq_len": seq_len, "settings": settings, "ms": ms})
        best = min(slowdown, key=lambda settings: slowdown[settings])
        itemsize = DTYPES[problem.dtype].itemsize
        print(f"  best: {SettingsRow(gpu(), itemsize, block_dim(problem.head_dim), problem.group, best)}", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
