"""Measure launch settings of the forward kernel on this GPU and propose rows for the table in ``kernels/launch.py``.

Candidates of one problem take turns, after heating, and count by their median. Kernels are compiled beforehand, in
parallel. A candidate that does not fit the GPU is left out.

    python benchmarks/tune_forward.py --dtypes bf16 --head-dims 64 128 --names dense 2:4 4:8 --seq-lens 4096 16384
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from attention import DTYPES, inputs, measure, triton_call
from triton.runtime.errors import OutOfResources

from modelopt_lite.kernels.launch import Settings, SettingsRow, block_dim, compute_capability

HEADS = (32, 8)
TILES = [
    # block_m, block_n, num_warps, num_stages
    (64, 32, 4, 3),
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (64, 128, 4, 2),
    (128, 32, 8, 3),
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 128, 8, 2),
]


def group_of(name: str) -> int:
    """Return the group size of ``dense`` or ``N:M``."""
    return 1 if name == "dense" else int(name.split(":")[1])


def fits(candidate: tuple[str, int, str, Settings]) -> bool:
    """Compile a candidate into Triton's cache, and say whether the GPU can run it."""
    dtype, head_dim, name, settings = candidate
    try:
        triton_call(*inputs(1, 256, HEADS, head_dim, dtype), True, name, settings)()
        torch.cuda.synchronize()
    except OutOfResources:
        return False
    return True


def main() -> None:
    """Measure, print a table and the best settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=DTYPES)
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--names", nargs="+", default=["dense", "2:4", "4:8", "8:16"], help="dense or N:M")
    parser.add_argument("--seq-lens", nargs="+", type=int, default=[4096, 16384])
    parser.add_argument("--tiles", nargs="+", default=[",".join(map(str, tile)) for tile in TILES], metavar="M,N,W,S")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--heat", type=float, default=0.5, help="seconds of heating before each problem")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile")
    parser.add_argument("--output", type=Path, help="JSON file of all times")
    arguments = parser.parse_args()

    capability = compute_capability(torch.device("cuda", torch.cuda.current_device()))
    candidates = [
        (dtype, head_dim, name, Settings(*map(int, tile.split(",")), capability >= 90 and dtype != "fp32", frozen))
        for dtype, head_dim, name, tile in itertools.product(
            arguments.dtypes, arguments.head_dims, arguments.names, arguments.tiles
        )
        for frozen in ((True, False) if dtype == "bf16" else (False,))
        # A group's scores lie in one thread only if a tile holds eight groups.
        if int(tile.split(",")[1]) >= 8 * group_of(name)
    ]
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        fitting = list(pool.map(fits, candidates))
    print(f"{sum(fitting)} of {len(candidates)} candidates fit", flush=True)

    rows = []
    usable = itertools.compress(candidates, fitting)
    for (dtype, head_dim, name), group in itertools.groupby(usable, key=lambda candidate: candidate[:3]):
        every = [candidate[3] for candidate in group]
        slowdown = dict.fromkeys(every, 1.0)
        for seq_len in arguments.seq_lens:
            tensors = inputs(1, seq_len, HEADS, head_dim, dtype)
            calls = {settings: triton_call(*tensors, True, name, settings) for settings in every}
            times = measure(calls, arguments.heat, arguments.rounds)
            print(f"\n{name} {dtype} D={head_dim} S={seq_len}", flush=True)
            for settings, ms in sorted(times.items(), key=lambda item: item[1]):
                slowdown[settings] *= ms / min(times.values())
                tflops = 0.5 * 4 * HEADS[0] * seq_len**2 * head_dim / ms / 1e9
                print(f"  {tflops:6.0f} TFLOP/s  {ms:8.3f} ms  {tuple(settings)}", flush=True)
                problem = {"name": name, "dtype": dtype, "head_dim": head_dim, "seq_len": seq_len}
                rows.append({**problem, "settings": settings, "ms": ms})
        best = min(slowdown, key=lambda settings: slowdown[settings])
        itemsize = DTYPES[dtype].itemsize
        print(f"  best: {SettingsRow(capability, itemsize, block_dim(head_dim), group_of(name), best)}", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
