"""Speed of skip-softmax on this GPU against this project's dense kernel, on queries and keys with real structure.

The queries and keys are those of SmolLM2-135M that reads a speech, recorded by another script. They are extended to 32
and 8 heads of 128 dimensions, and to any length. A head is two recorded ones beside each other, so that its scores are
the sums of theirs; after the first 128 tokens the next 1024 come again and again. Thresholds are chosen so that about a
given share of all key blocks is skipped. The choice is included in the time. Beside it are the same lists, given.

    python benchmarks/skip_softmax.py --record recorded.safetensors
    python benchmarks/skip_softmax_speed.py recorded.safetensors
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from pathlib import Path
from typing import Any

import recording
import torch
from attention import Call, measure
from safetensors.torch import load_file
from skip import HEADS, Problem
from torch import Tensor

from modelopt_lite.kernels import block_launch, compute, select_blocks
from modelopt_lite.kernels.blocks import BlockGrid
from modelopt_lite.plan import BLOCK_SIZE, AttentionPlan, SkipRule

FIRST, REPEATED = 128, 1024  # tokens
SINKS = 4


def extended(recorded: dict[str, Tensor], seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and random values of one sequence, ``[1, seq_len, heads, 128]``.

    Args:
        recorded: queries ``[layers, repeat, tokens, 64]`` and keys ``[layers, tokens, 64]``, BF16.
        seq_len: how many tokens.
    """
    query_heads, kv_heads = HEADS
    pairs = list(itertools.islice(itertools.permutations(range(len(recorded["k"])), 2), kv_heads))
    place = torch.arange(seq_len)
    token = place.where(place < FIRST, FIRST + (place - FIRST) % REPEATED)
    q, k = (recorded[name][..., token, :].cuda() for name in "qk")
    head = torch.arange(query_heads // kv_heads) % q.shape[1]
    # The scale is 128 ** -0.5 and was 64 ** -0.5.
    queries = torch.cat([torch.cat([q[a], q[b]], -1)[head] * 2**0.5 for a, b in pairs])
    keys = torch.stack([torch.cat([k[a], k[b]], -1) for a, b in pairs])
    values = torch.randn(1, seq_len, kv_heads, 2 * k.shape[2], device="cuda", dtype=torch.bfloat16)
    return queries.transpose(0, 1)[None].contiguous(), keys.transpose(0, 1)[None].contiguous(), values


def plan_of(threshold: float) -> AttentionPlan:
    """Return the plan of the method ``skip_softmax`` with its defaults and a threshold."""
    return AttentionPlan(skip=SkipRule(threshold), num_sink_tokens=SINKS)


def thresholds(problem: Problem, shares: list[float]) -> list[float]:
    """Return thresholds that skip about these shares of all key blocks that are seen."""
    grid = BlockGrid(problem.request(plan_of(0.5)), BLOCK_SIZE, BLOCK_SIZE)
    seen = grid.seen()
    excess = block_launch.excess(grid)[:, seen].flatten()
    # Blocks without other keys than references are never skipped.
    excess = excess.masked_fill(excess == -torch.inf, torch.inf)
    excess = excess[:: max(1, excess.numel() // 200_000)].sort().values
    return [math.exp(excess[int(share * len(excess))].item()) for share in shares]


def measure_length(problem: Problem, shares: list[float], heat: float, rounds: int) -> list[dict[str, Any]]:
    """Measure one length; the first row is the dense kernel's."""
    calls: dict[Any, Call] = {("dense", 0.0, None): problem.call()}
    blocks = problem.q.shape[1] // BLOCK_SIZE
    for threshold in thresholds(problem, shares):
        request = problem.request(plan_of(threshold))
        listed = select_blocks(request)
        share = 1 - listed.counts.sum().item() / (HEADS[0] * blocks * (blocks + 1) / 2)
        calls["skip_softmax", round(share, 4), threshold] = functools.partial(compute, request, "triton")
        given = functools.partial(compute, request._replace(blocks=listed), "triton")
        calls["lists", round(share, 4), threshold] = given
    times = measure(calls, heat, rounds, graphs=False)
    dense = times["dense", 0.0, None]
    return [
        {
            "method": method,
            "pass": "forward",
            "seq_len": problem.q.shape[1],
            "head_dim": problem.q.shape[3],
            "share_skipped": share,
            "threshold": threshold,
            "selection_included": method == "skip_softmax",
            "ms": round(ms, 4),
            "speedup_over_dense": round(dense / ms, 3),
        }
        for (method, share, threshold), ms in times.items()
    ]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recorded", type=Path, help="the recorded queries and keys")
    parser.add_argument("--seq-lens", nargs="+", type=int, default=[32768, 131072])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.75, 0.85])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--heat", type=float, default=2.0, help="seconds of heating before each length")
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/skip-softmax-<device>.json")
    arguments = parser.parse_args()
    device = recording.device_name()
    output = arguments.output or recording.default_output("skip-softmax", device)
    recorded, rows = load_file(arguments.recorded), []
    for seq_len in arguments.seq_lens:
        problem = Problem(*extended(recorded, seq_len), "forward", arguments.shares)
        rows += measure_length(problem, arguments.shares, arguments.heat, arguments.rounds)
        for row in rows[-2 * len(arguments.shares) - 1 :]:
            print(*row.values(), flush=True)
        recording.write(output, recording.header(device), rows)


if __name__ == "__main__":
    main()
