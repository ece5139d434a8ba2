"""Measure launch settings of the backward kernels on this GPU and propose rows for the tables in ``kernels/launch.py``.

As ``tune_forward.py``; each kernel's candidates are measured with the other kernel's settings from the table, so that
times are those of a whole backward.

    python benchmarks/tune_backward.py --dtypes bf16 --head-dims 64 128 --names dense 2:4 4:8 --seq-lens 8192
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeAlias

import torch
from attention import DTYPES, Call, inputs, measure, packing_of, plan_of, triton_call
from torch import Tensor
from triton.runtime.errors import OutOfResources
from tune_forward import HEADS, group_of

from modelopt_lite.kernels.launch import (
    KEY_SETTINGS,
    QUERY_SETTINGS,
    Settings,
    SettingsRow,
    backward,
    block_dim,
    compute_capability,
    default_settings,
)

Candidate: TypeAlias = tuple[str, int, str, str, Settings]
"""Type, head_dim, ``dense`` or ``N:M``, kernel, and its settings."""

TILES = {
    # block_m, block_n, num_warps, num_stages
    "queries": [
        (64, 32, 4, 3),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 128, 4, 2),
        (128, 32, 8, 3),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
    ],
    "keys": [(64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 2), (64, 128, 8, 2)],
}


def backward_call(q: Tensor, k: Tensor, v: Tensor, name: str, settings: tuple[Settings, Settings]) -> Call:
    """Return a call of the causal backward; tensors are ``[batch, seq, heads, dim]``."""
    out, lse = triton_call(q, k, v, True, name)()
    packing = packing_of(q)
    return functools.partial(
        backward,
        torch.randn_like(out),
        *(x.flatten(0, 1) for x in (q, k, v)),
        None,
        out,
        lse,
        *packing,
        *packing,
        is_causal=True,
        softmax_scale=q.shape[3] ** -0.5,
        sliding_window=None,
        softcap=None,
        plan=plan_of(name),
        settings=settings,
    )


def both_settings(candidate: Candidate) -> tuple[Settings, Settings]:
    """Return the settings of both kernels, the other one's from its table."""
    dtype, head_dim, name, kernel, settings = candidate
    capability = compute_capability(torch.device("cuda", torch.cuda.current_device()))
    problem = (capability, DTYPES[dtype], block_dim(head_dim), group_of(name), True)
    if kernel == "queries":
        return settings, default_settings(*problem, KEY_SETTINGS)
    return default_settings(*problem, QUERY_SETTINGS), settings


def fits(candidate: Candidate) -> bool:
    """Compile a candidate into Triton's cache, and say whether the GPU can run it."""
    dtype, head_dim, name, _, _ = candidate
    try:
        backward_call(*inputs(1, 256, HEADS, head_dim, dtype), name, both_settings(candidate))()
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
    parser.add_argument("--kernels", nargs="+", default=list(TILES), choices=TILES)
    parser.add_argument("--seq-lens", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--heat", type=float, default=0.5, help="seconds of heating before each problem")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile")
    parser.add_argument("--output", type=Path, help="JSON file of all times")
    arguments = parser.parse_args()

    capability = compute_capability(torch.device("cuda", torch.cuda.current_device()))
    candidates = [
        (dtype, head_dim, name, kernel, Settings(*tile, capability >= 90 and dtype != "fp32", frozen=False))
        for dtype, head_dim, name, kernel in itertools.product(
            arguments.dtypes, arguments.head_dims, arguments.names, arguments.kernels
        )
        for tile in TILES[kernel]
    ]
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        fitting = list(pool.map(fits, candidates))
    print(f"{sum(fitting)} of {len(candidates)} candidates fit", flush=True)

    rows = []
    usable = itertools.compress(candidates, fitting)
    for (dtype, head_dim, name, kernel), group in itertools.groupby(usable, key=lambda candidate: candidate[:4]):
        every = list(group)
        slowdown = dict.fromkeys(every, 1.0)
        for seq_len in arguments.seq_lens:
            tensors = inputs(1, seq_len, HEADS, head_dim, dtype)
            calls = {each: backward_call(*tensors, name, both_settings(each)) for each in every}
            times = measure(calls, arguments.heat, arguments.rounds)
            print(f"\n{kernel} {name} {dtype} D={head_dim} S={seq_len}", flush=True)
            for each, ms in sorted(times.items(), key=lambda item: item[1]):
                slowdown[each] *= ms / min(times.values())
                tflops = 2.5 * 0.5 * 4 * HEADS[0] * seq_len**2 * head_dim / ms / 1e9
                print(f"  {tflops:6.0f} TFLOP/s  {ms:8.3f} ms  {tuple(each[4])}", flush=True)
                problem = {"kernel": kernel, "name": name, "dtype": dtype, "head_dim": head_dim, "seq_len": seq_len}
                rows.append({**problem, "settings": each[4], "ms": ms})
        best = min(slowdown, key=lambda each: slowdown[each])[4]
        itemsize = DTYPES[dtype].itemsize
        print(f"  best: {SettingsRow(capability, itemsize, block_dim(head_dim), group_of(name), best)}", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
