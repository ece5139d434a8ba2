"""Speed of the attention kernels on this GPU against cuDNN, FlashAttention-2, -3 and -4, and FlexAttention.

All kernels of one problem run in this process and take turns, after heating; each counts by the median of its CUDA
events, short forward passes in CUDA graphs. TFLOP/s count the work of dense attention, also for sparse kernels; forward
and backward together count as 3.5 times the forward. Prints a table and writes JSON, where rows that were measured
before, on the same device with the same versions, stay unless they are measured again; so their ratios are those of
their own run.

    python benchmarks/attention.py                                              # everything forward, about an hour
    python benchmarks/attention.py --seq-lens 16384 --head-dims 128 --heads 32/8 --causal yes --names dense 2:4
    python benchmarks/attention.py --passes forward_backward --seq-lens 8192 --head-dims 128 --names dense 2:4
    python benchmarks/attention.py --show benchmarks/results/attention-nvidia-h200.json    # all rows as a table
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import itertools
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import recording
import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from modelopt_lite.kernels import AttentionRequest, attention
from modelopt_lite.kernels.hopper import forward_launch as hopper_launch
from modelopt_lite.kernels.hopper import sparse_cores
from modelopt_lite.kernels.portable import launch as portable_launch
from modelopt_lite.kernels.settings import Settings
from modelopt_lite.kernels.top_n import top_n_plan
from modelopt_lite.plan import AttentionPlan

try:
    from fa3_fwd_interface import flash_attn_func as flash_attention_3
except ImportError:  # an optional peer
    flash_attention_3 = None
try:
    from flash_attn.cute.interface import flash_attn_func as flash_attention_4
except ImportError:  # another one
    flash_attention_4 = None

Call: TypeAlias = Callable[[], object]

SEQ_LENS = [2**power for power in range(10, 18)]
NAMES = ["dense", "1:4", "2:4", "3:4", "2:8", "4:8", "8:16"]
PEERS = ["cudnn", "fa2", "fa3", "fa4", "fa4_deterministic", "flex"]
PASSES = {"forward": 1.0, "forward_backward": 3.5}
"""What is measured, and its work in units of the forward's: two matrix products against seven."""
PROBLEM = ("pass", "head_dim", "query_heads", "kv_heads", "causal", "dtype", "batch", "seq_len")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BURST_MS = 60
"""How long a kernel runs at a time."""
GRAPH_MS = 1.0
"""If all calls of a problem's forward are shorter, they run in CUDA graphs."""
LONG_MS = 10.0
"""If all calls of a problem are longer, they are timed by :func:`burst`."""
WARM_MS = 200
"""How long a long call runs first: shorter, and clocks are still those of the kernel before, which may draw less power.
do_bench would run each seven times, which takes minutes at 128k tokens."""


def inputs(batch: int, seq_len: int, heads: tuple[int, int], head_dim: int, dtype: str) -> tuple[Tensor, ...]:
    """Return random query, key and value, ``[batch, seq, heads, dim]``."""
    generator = torch.Generator("cuda").manual_seed(0)
    return tuple(
        torch.randn(batch, seq_len, count, head_dim, device="cuda", generator=generator).to(DTYPES[dtype])
        for count in (heads[0], heads[1], heads[1])
    )


def request_of(q: Tensor, k: Tensor, v: Tensor, causal: bool, name: str) -> AttentionRequest:
    """Return the request of a batch of equal sequences; tensors are ``[batch, seq, heads, dim]``."""
    return packed_request(*(x.flatten(0, 1) for x in (q, k, v)), packing_of(q), causal, name)


def packed_request(
    q: Tensor, k: Tensor, v: Tensor, packing: tuple[Tensor, Tensor, int], causal: bool, name: str
) -> AttentionRequest:
    """Return the request of self-attention; tensors are ``[tokens, heads, dim]``."""
    starts, lengths, longest = packing
    return AttentionRequest(
        q=q,
        k=k,
        v=v,
        s_aux=None,
        starts_q=starts,
        lengths_q=lengths,
        max_q=longest,
        starts_k=starts,
        lengths_k=lengths,
        max_k=longest,
        is_causal=causal,
        softmax_scale=q.shape[2] ** -0.5,
        sliding_window=None,
        softcap=None,
        plan=plan_of(name),
    )


def own_call(request: AttentionRequest, kernel: str, settings: Settings | None = None) -> Call:
    """Return a call of one of this project's kernels, prepared as for requests that come again."""
    if kernel == "portable":
        prepared = portable_launch.prepare(request, settings)
    else:
        prepared = {"hopper": hopper_launch.prepare, "sparse_cores": sparse_cores.prepare}[kernel](request)
    return functools.partial(prepared, request)


def packing_of(q: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return starts, lengths and longest length of a batch of equal sequences."""
    batch, seq_len = q.shape[:2]
    starts = torch.arange(0, batch * seq_len, seq_len, dtype=torch.int32, device=q.device)
    return starts, torch.full_like(starts, seq_len), seq_len


def plan_of(name: str) -> AttentionPlan:
    """Return the plan of ``dense`` or ``N:M``, with a dense window of 64."""
    n, m = (0, 4) if name == "dense" else map(int, name.split(":"))
    return top_n_plan(n, m, 0, 64)


class Loss(torch.autograd.Function):
    """A number whose gradient by a tensor is given; it does not hold the tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grad: Tensor) -> Tensor:
        """Return 0."""
        ctx.grad = grad
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        """Return the gradient."""
        return ctx.grad, None


def differentiated(forward_call: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Call:
    """Return a call of a forward and its gradients, by autograd as in training.

    With ``holds_output=False``, nobody but autograd holds the output, as in a model.
    """
    tensors = [x.detach().requires_grad_() for x in (q, k, v)]
    grad = torch.randn_like(forward_call(*tensors))

    def call(holds_output: bool = True) -> object:
        if holds_output:
            return torch.autograd.grad(forward_call(*tensors), tensors, grad)
        return torch.autograd.grad(Loss.apply(forward_call(*tensors), grad), tensors)

    return call


def own_training_call(q: Tensor, k: Tensor, v: Tensor, causal: bool, name: str) -> Call:
    """Return a call of this project's attention and its gradients."""
    packing, plan = packing_of(q), plan_of(name)

    def forward_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, *packing, is_causal=causal, plan=plan, backend="triton")

    return differentiated(forward_call, *(x.flatten(0, 1) for x in (q, k, v)))


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, backend: SDPBackend) -> Tensor:
    """Run one of PyTorch's own kernels on ``[batch, heads, seq, dim]``."""
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def compiled_flex(q: Tensor, k: Tensor, causal: bool) -> Callable[..., Tensor]:
    """Return FlexAttention, compiled, with a causal block mask, for ``[batch, heads, seq, dim]``."""
    mask = None
    if causal:
        # Compiled, it never holds the whole mask, which would be 16 GiB of booleans at 128k.
        make_mask = torch.compile(create_block_mask)
        mask = make_mask(lambda b, h, i, j: i >= j, None, None, q.shape[2], k.shape[2], device=q.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return functools.partial(compiled, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def fa4(q: Tensor, k: Tensor, v: Tensor, causal: bool, deterministic: bool) -> Tensor:
    """Run FlashAttention-4 on ``[batch, seq, heads, dim]``; ``deterministic``: the same gradients every time."""
    output: Tensor = flash_attention_4(q, k, v, causal=causal, deterministic=deterministic)[0]
    return output


def peer_call(peer: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, which: str) -> Call:
    """Return a call of one of the kernels to compare with; ``which`` is one of ``PASSES``."""
    if peer == "fa3":
        return functools.partial(flash_attention_3, q, k, v, causal=causal)
    if not peer.startswith("fa4"):
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    forward_call: Callable[..., Tensor]
    if peer == "flex":
        forward_call = compiled_flex(q, k, causal)
    elif peer.startswith("fa4"):
        forward_call = functools.partial(fa4, causal=causal, deterministic=peer == "fa4_deterministic")
    else:
        backend = SDPBackend.CUDNN_ATTENTION if peer == "cudnn" else SDPBackend.FLASH_ATTENTION
        forward_call = functools.partial(sdpa, causal=causal, backend=backend)
    return functools.partial(forward_call, q, k, v) if which == "forward" else differentiated(forward_call, q, k, v)


def burst(call: Call, ms: float = math.inf) -> float:
    """Return the median time in ms of a call that takes about ``ms``, run for ``BURST_MS`` after ``WARM_MS``."""
    for _ in range(int(WARM_MS / ms)):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 + int(BURST_MS / ms))]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in itertools.pairwise(events))


@contextlib.contextmanager
def reporting(key: tuple[str, str]) -> Iterator[None]:
    """Report an error of one of several kernels, so that the others are measured nevertheless."""
    try:
        yield
    except Exception as error:
        print(f"{key}: {type(error).__name__}: {str(error).partition(chr(10))[0]}", file=sys.stderr)


def measure(calls: dict[Any, Call], heat: float, rounds: int, graphs: bool = True) -> dict[Any, float]:
    """Return the median time of each call in ms. A call that fails is reported and left out.

    With ``graphs``, calls that are all short are timed in CUDA graphs, or the host's work would count as well.
    """
    usable = {}
    for key, call in calls.items():
        with reporting(key):
            call()
            torch.cuda.synchronize()
            usable[key] = call
    until = time.monotonic() + heat
    while time.monotonic() < until:
        for call in usable.values():
            call()
        torch.cuda.synchronize()
    once = {key: burst(call) for key, call in usable.items()}
    if graphs and max(once.values()) < GRAPH_MS:
        bench = functools.partial(triton.testing.do_bench_cudagraph, rep=BURST_MS / 10, return_mode="median")
    else:
        bench = functools.partial(triton.testing.do_bench, warmup=BURST_MS / 4, rep=BURST_MS, return_mode="median")
    is_long = min(once.values()) > LONG_MS
    # Each runs for a while at a time, as the GPU's clocks follow the power that a kernel draws; and in another order
    # each round, as they follow it slowly.
    times: dict[Any, list[float]] = {key: [] for key in usable}
    order, random_order = list(usable.items()), random.Random(0)
    for _ in range(rounds):
        random_order.shuffle(order)
        for key, call in order:
            times[key].append(burst(call, once[key]) if is_long else bench(call))
    return {key: statistics.median(taken) for key, taken in times.items()}


def peak_memory(call: Call) -> int:
    """Return the MiB that a call takes at most, besides what is there before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20)


def measure_problem(
    arguments: argparse.Namespace,
    which: str,
    seq_len: int,
    head_dim: int,
    heads: tuple[int, int],
    causal: bool,
    dtype: str,
) -> list[dict[str, Any]]:
    """Measure all kernels on one problem."""
    batch = arguments.batch or max(1, 8192 // seq_len if seq_len <= 1024 else 1)
    q, k, v = inputs(batch, seq_len, heads, head_dim, dtype)
    calls: dict[Any, Call] = {}
    if which == "forward":
        requests = {name: request_of(q, k, v, causal, name) for name in arguments.names}
        for label, kernel, refusal in (
            ("triton", "portable", portable_launch.refusal),
            ("hopper", "hopper", hopper_launch.refusal),
            ("sparse_cores", "sparse_cores", sparse_cores.refusal),
        ):
            able = {name: request for name, request in requests.items() if refusal(request) is None}
            calls |= {(label, name): own_call(request, kernel) for name, request in able.items()}
    else:
        calls |= {("triton", name): own_training_call(q, k, v, causal, name) for name in arguments.names}
    missing = {
        "fa3": flash_attention_3 is None or which != "forward",  # the package has no backward
        "fa4": flash_attention_4 is None,
        "fa4_deterministic": flash_attention_4 is None or which == "forward",
    }
    for peer in arguments.peers:
        if not missing.get(peer, False):
            with reporting((peer, "dense")):
                calls[(peer, "dense")] = peer_call(peer, q, k, v, causal, which)
    times = measure(calls, arguments.heat, arguments.rounds, which == "forward")
    as_in_a_model = {} if which == "forward" else {"holds_output": False}
    peaks = {key: peak_memory(functools.partial(calls[key], **as_in_a_model)) for key in times}
    flop = PASSES[which] * 4 * batch * heads[0] * seq_len**2 * head_dim * (0.5 if causal else 1.0)
    ratios = {peer: times.get((peer, "dense")) for peer in ("cudnn", "fa3")}
    return [
        {
            "pass": which,
            "kernel": kernel,
            "name": name,
            "seq_len": seq_len,
            "batch": batch,
            "query_heads": heads[0],
            "kv_heads": heads[1],
            "head_dim": head_dim,
            "dtype": dtype,
            "causal": causal,
            "date": datetime.date.today().isoformat(),
            "ms": round(ms, 4),
            "peak_mib": peaks[kernel, name],
            "tflops": round(flop / ms / 1e9, 1),
            **{f"ratio_to_{peer}": round(other / ms, 3) if other else None for peer, other in ratios.items()},
        }
        for (kernel, name), ms in times.items()
    ]


def problem_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a row and those of other kernels have in common."""
    return tuple(row[name] for name in PROBLEM)


def place_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what rows are sorted by: larger dimensions, grouped queries and causal attention first."""
    return row["pass"], -row["head_dim"], row["kv_heads"], not row["causal"], row["dtype"], row["seq_len"], row["batch"]


def speed(row: dict[str, Any], _: dict[Any, dict[str, Any]]) -> str:
    """Return TFLOP/s and in brackets the ratio to cuDNN."""
    return f"{row['tflops']:.0f}" + ("" if row["ratio_to_cudnn"] is None else f" ({row['ratio_to_cudnn']:.2f})")


def memory(row: dict[str, Any], found: dict[Any, dict[str, Any]]) -> str:
    """Return peak memory in MiB and in brackets the ratio to FlexAttention."""
    flex = found.get(("flex", "dense"))
    return f"{row['peak_mib']}" + ("" if flex is None else f" ({row['peak_mib'] / flex['peak_mib']:.2f})")


def table(rows: list[dict[str, Any]], cell: Callable[..., str] = speed) -> str:
    """Return rows as a Markdown table: a problem a line, what ``cell`` says of each kernel."""
    kernels = ["triton", "hopper", "sparse_cores", *PEERS]
    # N:M by M and then by N
    columns = sorted(
        {(row["kernel"], row["name"]) for row in rows},
        key=lambda column: (kernels.index(column[0]), [int(n) for n in column[1].split(":")[::-1] if n != "dense"]),
    )
    lines = ["| pass | D | heads | causal | type | batch | S | " + " | ".join(map(" ".join, columns)) + " |"]
    lines.append("|" + "---|" * (7 + len(columns)))
    for key, group in itertools.groupby(rows, key=problem_of):
        found = {(row["kernel"], row["name"]): row for row in group}
        which, head_dim, query_heads, kv_heads, causal, dtype, batch, seq_len = key
        cells = [
            which.replace("_", " + "),
            head_dim,
            f"{query_heads}/{kv_heads}",
            "yes" if causal else "no",
            dtype,
            batch,
            seq_len,
        ]
        for column in columns:
            cells.append(cell(found[column], found) if column in found else "")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure what the arguments ask for, print it and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", nargs="+", default=["forward"], choices=PASSES)
    parser.add_argument("--seq-lens", nargs="+", type=int, default=SEQ_LENS)
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--heads", nargs="+", default=["32/8", "32/32"], metavar="QUERY/KV")
    parser.add_argument("--causal", nargs="+", default=["yes", "no"], choices=["yes", "no"])
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=DTYPES)
    parser.add_argument("--names", nargs="+", default=NAMES, help="dense or N:M, with a dense window of 64")
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS)
    parser.add_argument("--batch", type=int, help="by default 8192 tokens up to S = 1024, else one sequence")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--heat", type=float, default=2.0, help="seconds of heating before each problem")
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/attention-<device>.json")
    parser.add_argument("--show", type=Path, help="only print the table of a JSON file")
    parser.add_argument("--show-memory", type=Path, help="only print the peak memory of forward and backward in one")
    arguments = parser.parse_args()
    if arguments.show:
        print(table(json.loads(arguments.show.read_text())["rows"]))
        return
    if arguments.show_memory:
        shown = json.loads(arguments.show_memory.read_text())["rows"]
        print(table([row for row in shown if row["pass"] == "forward_backward"], memory))
        return

    torch._dynamo.config.recompile_limit = 1000
    device = recording.device_name()
    output = arguments.output or recording.default_output("attention", device)
    fa3 = None if flash_attention_3 is None else importlib.metadata.version("fa3-fwd")
    fa4_version = None if flash_attention_4 is None else importlib.metadata.version("flash-attn-4")
    results = recording.header(device, **{"fa3-fwd": fa3, "flash-attn-4": fa4_version})
    rows = recording.rows_before(output, results)
    for which, dtype, head_dim, heads, causal, seq_len in itertools.product(
        arguments.passes, arguments.dtypes, arguments.head_dims, arguments.heads, arguments.causal, arguments.seq_lens
    ):
        query_heads, kv_heads = map(int, heads.split("/"))
        new = measure_problem(arguments, which, seq_len, head_dim, (query_heads, kv_heads), causal == "yes", dtype)
        print(table(new).splitlines()[-1], flush=True)
        measured = {(problem_of(row), row["kernel"], row["name"]) for row in new}
        kept = [row for row in rows if (problem_of(row), row["kernel"], row["name"]) not in measured]
        rows = sorted(kept + new, key=place_of)
        # after every problem, so that an interrupted run keeps what it measured
        recording.write(output, results, rows)
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
