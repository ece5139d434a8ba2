"""Measures what it costs to choose key blocks, without the attention that follows, and checks the scores.

python benchmarks/selection.py --lengths 8192 32768 131072
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from modelopt_lite.kernels import AttentionRequest, block_launch, block_scores
from modelopt_lite.kernels.blocks import BlockGrid, KeyBlocks
from modelopt_lite.kernels.selection import select_blocks
from modelopt_lite.methods import BlockMethod, FlashPrefill, MeanPoolTopK, XAttention


def request_of(length: int, method: BlockMethod) -> AttentionRequest:
    """Make one causal sequence of random BF16 queries and keys with 32 and 8 heads of 128."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k = (
        torch.randn(length, heads, 128, device="cuda", dtype=torch.bfloat16, generator=generator) for heads in (32, 8)
    )
    start, lengths = (torch.tensor([x], device="cuda") for x in (0, length))
    return AttentionRequest(
        q, k, k, None, start, lengths, length, start, lengths, length, True, 128**-0.5, None, None, method.shared_plan()
    )


def milliseconds(function: Callable[[], object], repeats: int = 10) -> float:
    """Return the median time of a call, after one to warm up, in milliseconds."""
    function()
    times = []
    for _ in range(repeats):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        function()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]))
    return sorted(times)[len(times) // 2]


def check(length: int) -> None:
    """Print the largest relative error of the kernels' scores against PyTorch operations in FP64."""
    request = request_of(length, FlashPrefill())
    grid = BlockGrid(request, 128, 128)
    exact = BlockGrid(request._replace(q=request.q.double(), k=request.k.double()), 128, 128)
    seen = grid.seen()
    pairs = {
        "mean_keys": (block_launch.mean_keys(grid), exact.mean_keys()),
        "softmax_mass": (
            block_scores.softmax_mass(grid, block_launch.mean_keys(grid))[:, seen],
            block_scores.softmax_mass(exact, exact.mean_keys())[:, seen],
        ),
    }
    for stride in (8, 16):
        pairs[f"antidiagonal_mass {stride}"] = (
            block_launch.antidiagonal_mass(grid, stride)[:, seen],
            block_scores.antidiagonal_mass(exact, stride)[:, seen],
        )
    for name, (found, expected) in pairs.items():
        error = ((found.double() - expected).abs() / expected.abs().clamp(min=1e-3)).max()
        print(f"{name}: largest relative error {float(error):.1e}", flush=True)
    for share in (0.5, 0.9):
        scores = block_launch.antidiagonal_mass(grid, 16)
        forced = grid.forced(1, 1) & seen
        for choose in (block_scores.heaviest_blocks, block_scores.largest_blocks):
            differs = (choose(scores, seen, forced, share) ^ choose(scores.double(), seen, forced, share)) & seen
            print(f"{choose.__name__} {share}: {int((differs & ~forced).sum())} choices differ", flush=True)
    mask = torch.rand(32, length // 128, length // 128, device="cuda") < 0.3
    found, expected = (KeyBlocks.from_mask(x, grid.starts, 128, 128) for x in (mask, mask.cpu()))
    same = torch.equal(found.counts.cpu(), expected.counts) and torch.equal(found.indices.cpu(), expected.indices)
    print(f"lists are {'right' if same else 'WRONG'}", flush=True)


def parts_of(request: AttentionRequest, method: BlockMethod) -> dict[str, float]:
    """Return the milliseconds of a selection, as a whole and by its parts."""
    grid = BlockGrid(request, 128, 128)
    seen, forced = grid.seen(), grid.forced(1, 1)
    scores = method.scores(grid)
    chosen = method.choose(scores, seen, forced)
    return {
        "all": milliseconds(lambda: select_blocks(request)),
        "grid": milliseconds(lambda: BlockGrid(request, 128, 128)),
        "scores": milliseconds(lambda: method.scores(grid)),
        "choice": milliseconds(lambda: method.choose(scores, seen, forced)),
        "lists": milliseconds(lambda: KeyBlocks.from_mask(chosen, grid.starts, 128, 128)),
    }


def main() -> None:
    """Check the scores, and print a line for each length and method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    arguments = parser.parse_args()
    begin = time.time()
    check(4096 + 100)
    print(f"checked after {time.time() - begin:.1f} s", flush=True)
    for length in arguments.lengths:
        for method in (FlashPrefill(), XAttention(stride=16), XAttention(stride=8), MeanPoolTopK()):
            parts = parts_of(request_of(length, method), method)
            stride = getattr(method, "stride", "")
            rows = ", ".join(f"{name} {ms:.3f}" for name, ms in parts.items())
            print(f"{length} {method.method} {stride}: {rows} ms [{time.time() - begin:.1f} s]", flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
