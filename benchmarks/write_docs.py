"""Write the tables and the picture of the README and the docs from the committed results.

A page marks the place of a table by ``<!-- begin NAME -->`` and ``<!-- end NAME -->``. After anything was measured
again, one command brings the pages up to date; a test fails until it has run:

    python benchmarks/write_docs.py
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from modelopt_lite.experiment import ExperimentResult
from modelopt_lite.experiment.plots import STYLE, line_styles
from modelopt_lite.experiment.quality import QualityRow, summarize_quality
from modelopt_lite.methods import FlashPrefill, MeanPoolTopK, XAttention

Row: TypeAlias = dict[str, Any]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RUNS = ROOT / "examples" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CHOICES = [
    ("our dense kernels", "", "", "dense"),
    ("2:4", "sweep", "2:4, window 64, sinks 0", "2:4"),
    ("2:4, dense window of 256", "sweep", "2:4, window 256, sinks 0", ""),
    ("4:8", "sweep", "4:8, window 64, sinks 0", "4:8"),
    ("1:4", "sweep", "1:4, window 64, sinks 0", ""),
    ("`flash_prefill`, alpha 0.05", "blocks", "flash_prefill 0.05", ""),
    ("`flash_prefill`, alpha 0.2 (default)", "blocks", "flash_prefill 0.2", ""),
    ("`xattention`, threshold 0.95", "blocks", "xattention 0.95", ""),
    ("`xattention`, threshold 0.9 (default)", "blocks", "xattention 0.9", ""),
    ("`mean_pool_top_k`, keep 0.5", "blocks", "mean_pool 0.5", ""),
    ("`mean_pool_top_k`, keep 0.25 (default)", "blocks", "mean_pool 0.25", "25 % of blocks"),
    ("`skip_softmax`, threshold 0.03 (default)", "blocks", "skip_softmax 0.03", ""),
]
"""Settings to choose between: what a table calls them, where their quality was measured, and the variant of
``benchmarks/model.py`` whose speed is theirs, if there is one."""
PICTURE = ROOT / "docs" / "_static" / "speed.svg"

MISSING = "-"
MODEL = "llama-3.1-8b"
SHAPE = {"dtype": "bf16", "query_heads": 32, "kv_heads": 8, "causal": True, "head_dim": 128}
"""The shape of attention in tables that do not say otherwise."""
TRAINED = ("cudnn", "dense", "2:4", "4:8", "25 % of blocks")
"""Variants of ``benchmarks/training.py`` beside Transformers' own attention."""
CONTROLS = ("sdpa", "sdpa again")
"""Variants of a whole model that are none of ours: what they are compared with, twice."""
VARIANTS = {
    "dense": "our dense",
    "2:4": "2:4",
    "4:8": "4:8",
    "25 % of blocks": "25 % of blocks",
    "10 % of blocks": "10 % of blocks",
}
"""How tables call the variants of ``benchmarks/model.py``, in the order of their columns."""
EXCHANGES = ("ring", "gather")
"""Of context parallelism."""
KERNELS = {"triton": "portable", "hopper": "Hopper", "sparse_cores": "sparse tensor cores"}
PEERS = {
    "cudnn": "cuDNN",
    "fa2": "FlashAttention-2",
    "fa3": "FlashAttention-3",
    "fa4": "FlashAttention-4",
    "fa4_deterministic": "FlashAttention-4, deterministic",
    "flex": "FlexAttention",
}
PATTERNS = ["dense", "1:4", "2:4", "3:4", "2:8", "4:8", "8:16"]
DECODE_CASES = {
    "b1-2k": "1 sequence, 2k keys",
    "b1-8k": "1 sequence, 8k keys",
    "b1-32k": "1 sequence, 32k keys",
    "b1-128k": "1 sequence, 128k keys",
    "b16-8k": "16 sequences, 8k keys",
    "b64-2k": "64 sequences, 2k keys",
    "static": "1 sequence, 8k keys in a cache of 32k",
    "ragged": "16 sequences, 256 to 8k keys",
    "padded": "the same, padded on the left",
    "window": "4 sequences, sliding window of 4k in 32k",
    "sinks": "16 sequences, 8k keys, learnable sinks",
    "4-queries": "4 queries at a time, 8k keys",
    "16-queries": "16 queries at a time, 8k keys",
    "4-queries-2:4": "4 queries at a time, 8k keys, 2:4",
    "d64-8k": "head dimension 64, 8k keys",
    "d64-32k": "head dimension 64, 32k keys",
    "d256-8k": "head dimension 256, 8k keys",
    "mqa-32k": "1 head of keys for 16, 32k keys",
    "mha-8k": "32 heads of keys, 8k keys",
}


def load(name: str) -> dict[str, Any]:
    """Return the results in a JSON file of ``benchmarks/results``."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def rows_of(file: str, /, **wanted: Any) -> list[Row]:
    """Return the rows of a result file in which all these fields have these values."""
    return [row for row in load(file)["rows"] if all(row.get(key) == value for key, value in wanted.items())]


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 0) -> str:
    """Return a Markdown table; the first ``left`` columns are aligned left, the others right."""
    lines = [columns, ["---"] * left + ["---:"] * (len(columns) - left), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def milliseconds(ms: float) -> str:
    """Return a time with three digits and its unit."""
    for unit, factor in (("s", 1e3), ("ms", 1.0), ("µs", 1e-3)):
        value = ms / factor
        if value >= 1:
            return f"{value:.{max(0, 2 - int(math.log10(value)))}f} {unit}"
    return f"{ms:.3f} ms"


def ratio(value: float | None) -> str:
    """Return a ratio with two decimals."""
    return MISSING if value is None else f"{value:.2f}"


def by_problem(rows: Iterable[Row], *keys: str) -> Iterator[tuple[tuple[Any, ...], list[Row]]]:
    """Group rows by the values of some fields, in their order."""

    def problem(row: Row) -> tuple[Any, ...]:
        return tuple(row[key] for key in keys)

    for values, group in itertools.groupby(sorted(rows, key=problem), problem):
        yield values, list(group)


def model_table(what: str, mode: str = "eager", model: str = MODEL, **wanted: Any) -> str:
    """Return how many times as fast as with PyTorch's attention a whole model is, and that time."""
    rows = rows_of("model-nvidia-h200", what=what, mode=mode, model=model, **wanted)
    variants = [name for name in VARIANTS if any(row["variant"] == name for row in rows)]
    lines = []
    for (length,), group in by_problem(rows, "seq_len"):
        found = {row["variant"]: row for row in group}
        dense = found["sdpa"]["ms"]
        cells = (ratio(dense / found[name]["ms"]) if name in found else MISSING for name in variants)
        lines.append([str(length), *cells, milliseconds(dense)])
    return markdown(["tokens", *(VARIANTS[name] for name in variants), "time of `sdpa`"], lines)


def time_to_first_token() -> str:
    """Return the time to first token of a whole model, from 128 tokens on."""
    return model_table("ttft", layers=32)


def lists_table(which: str = "forward") -> str:
    """Return how much faster a pass of attention with lists of key blocks is than that of dense attention."""
    rows = rows_of("skip-nvidia-h200", head_dim=128, **{"pass": which})
    names = {"lists": "our kernels", "lists_2:4": "our kernels with 2:4", "flex_attention": "FlexAttention"}
    names |= {"flash_attention_4": "FlashAttention-4"}
    names = {key: name for key, name in names.items() if any(row["method"] == key for row in rows)}
    lines = []
    for (length, inputs), group in by_problem(rows, "seq_len", "inputs"):
        dense = next(row["ms"] for row in group if row["method"] == "dense")
        lists = {"random": "random", "recorded": "chosen"}[inputs]
        for share in sorted({round(row["share_skipped"], 2) for row in group if row["method"] in names}):
            same = [row for row in group if round(row["share_skipped"], 2) == share]
            # Of several forms of a kernel the fastest.
            found = {row["method"]: row["speedup_over_dense"] for row in sorted(same, key=lambda row: -row["ms"])}
            cells = [str(length), lists, f"{share:.0%}".replace("%", " %"), *(ratio(found.get(key)) for key in names)]
            lines.append([*cells, milliseconds(dense)])
            if which == "forward_backward":
                own = next((str(row["peak_mib"]) for row in same if row["method"] == "lists"), MISSING)
                lines[-1] += [own, next(str(row["peak_mib"]) for row in group if row["method"] == "dense")]
    columns = ["tokens", "lists", "skipped", *names.values(), "time of our dense kernel"]
    if which == "forward_backward":
        columns += ["peak memory, MiB", "that of our dense kernel"]
    return markdown(columns, lines)


def chosen_table() -> str:
    """Return how much faster attention is whose blocks a method chooses, the choice included, from 8k tokens on."""
    rows = rows_of("skip-nvidia-h200", head_dim=128, inputs="recorded", **{"pass": "forward"})
    lines = []
    for method in (FlashPrefill(), XAttention(), MeanPoolTopK()):
        default = {method.knob.field: getattr(method, method.knob.field)}
        for (length,), group in by_problem((row for row in rows if row["seq_len"] >= 8192), "seq_len"):
            found = [row for row in group if row["method"] == method.method]
            row = next(row for row in found if row["settings"] == default)
            cells = [f"{ratio(row['speedup_over_dense'])} ({row['share_skipped']:.0%})".replace("%", " %")]
            for share in (0.5, 0.75, 0.9):
                near = (row["speedup_over_dense"] for row in found if abs(row["share_skipped"] - share) < 0.015)
                cells.append(ratio(next(near, None)))
            dense = next(row["ms"] for row in group if row["method"] == "dense")
            lines.append([f"`{method.method}`", str(length), *cells, milliseconds(dense)])
    columns = ["method", "tokens", "default (skipped)", "50 %", "75 %", "90 %", "time of our dense kernel"]
    return markdown(columns, lines, left=1)


def skip_softmax_table() -> str:
    """Return how much faster attention with skip-softmax is than dense attention, the decisions included."""
    lines = []
    for (length,), group in by_problem(rows_of("skip-softmax-nvidia-h200"), "seq_len"):
        dense = next(row["ms"] for row in group if row["method"] == "dense")
        for share in sorted({row["share_skipped"] for row in group if row["method"] == "lists"}):
            found = {r["method"]: ratio(r["speedup_over_dense"]) for r in group if r["share_skipped"] == share}
            skipped = f"{share:.0%}".replace("%", " %")
            lines.append([str(length), skipped, found["skip_softmax"], found["lists"], milliseconds(dense)])
    return markdown(["tokens", "skipped", "decided first", "lists given", "time of our dense kernel"], lines)


def _speeds(rows: Iterable[Row]) -> dict[tuple[str, str], float | None]:
    return {(row["kernel"], row["name"]): row["ratio_to_cudnn"] for row in rows}


def _kernels_table(rows: list[Row], columns: dict[tuple[str, str], str]) -> str:
    """Return speeds relative to cuDNN's dense attention in the same run, by length."""
    columns = {key: name for key, name in columns.items() if any((r["kernel"], r["name"]) == key for r in rows)}
    lines = []
    for (length, batch), group in by_problem(rows, "seq_len", "batch"):
        cudnn = next(row for row in group if row["kernel"] == "cudnn")
        speeds = _speeds(group)
        tokens = str(length) if batch == 1 else f"{batch} x {length}"
        lines.append([tokens, *(ratio(speeds.get(key)) for key in columns), f"{cudnn['tflops']:.0f}"])
    return markdown(["tokens", *columns.values(), "cuDNN, TFLOP/s"], lines)


def two_of_four_table() -> str:
    """Return the speed of 2:4 on sparse tensor cores beside dense attention."""
    rows = rows_of("sparse-cores-nvidia-h200", **SHAPE, **{"pass": "forward"})
    columns = {("sparse_cores", "2:4"): "2:4", ("hopper", "dense"): "our dense", ("fa3", "dense"): PEERS["fa3"]}
    return _kernels_table(rows, columns)


def two_of_four_types_table() -> str:
    """Return the speed of 2:4 on sparse tensor cores, relative to cuDNN's, for other types and head dimensions."""
    columns = {(64, "bf16"): "64, BF16", (64, "fp16"): "64, FP16", (128, "fp16"): "128, FP16"}
    rows = rows_of("sparse-cores-nvidia-h200", kernel="sparse_cores", query_heads=32, kv_heads=8, causal=True)
    lines = []
    for (length, batch), group in by_problem(rows, "seq_len", "batch"):
        found = {(row["head_dim"], row["dtype"]): row["ratio_to_cudnn"] for row in group}
        if found.keys() & columns:
            tokens = str(length) if batch == 1 else f"{batch} x {length}"
            lines.append([tokens, *(ratio(found.get(key)) for key in columns)])
    return markdown(["tokens", *columns.values()], lines)


def dense_table() -> str:
    """Return the speed of all dense kernels."""
    rows = rows_of("attention-nvidia-h200", **SHAPE, **{"pass": "forward"})
    columns = {(kernel, "dense"): KERNELS[kernel] for kernel in ("hopper", "triton")}
    return _kernels_table(rows, columns | {(peer, "dense"): PEERS[peer] for peer in ("fa3", "fa2", "flex")})


def patterns_table(kernel: str) -> str:
    """Return the speed of all patterns in one kernel."""
    rows = rows_of("attention-nvidia-h200", **SHAPE, **{"pass": "forward"})
    return _kernels_table(rows, {(kernel, name): name for name in PATTERNS})


def shapes_table() -> str:
    """Return what other shapes of attention change, at 8192 tokens."""
    rows = rows_of("attention-nvidia-h200", dtype="bf16", seq_len=8192, batch=1, **{"pass": "forward"})
    rows += rows_of("sparse-cores-nvidia-h200", dtype="bf16", seq_len=8192, kernel="sparse_cores")
    columns = [("hopper", "dense"), ("hopper", "2:4"), ("sparse_cores", "2:4"), ("hopper", "4:8"), ("triton", "2:4")]
    lines = []
    for (dim, heads, causal), group in by_problem(rows, "head_dim", "kv_heads", "causal"):
        cells = [str(dim), f"32/{heads}", "yes" if causal else "no"]
        lines.append(cells + [ratio(_speeds(group).get(key)) for key in columns])
    names = ["dense", "2:4", "2:4, sparse tensor cores", "4:8", "2:4, portable"]
    return markdown(["head dimension", "heads", "causal", *names], sorted(lines, key=lambda x: -int(x[0])))


def decode_table() -> str:
    """Return times of decode steps and how they compare with the fastest kernel of PyTorch."""
    lines = []
    rows = rows_of("decode-nvidia-h200", in_cache=False)
    for case, name in DECODE_CASES.items():
        mine = {row["kernel"]: row for row in rows if row["case"] == case}
        if "decode" in mine:
            row = mine["decode"]
            best = min((r["us"], kernel) for kernel, r in mine.items() if kernel != "decode") if len(mine) > 1 else None
            peer = MISSING if best is None else f"{best[0]:.1f} µs, {PEERS.get(best[1], best[1])}"
            lines.append(
                [name, ratio(row["speed_to_best_sdpa"]), peer, f"{row['us']:.1f} µs", f"{row['tb_per_s']:.1f}"]
            )
    return markdown(["one decode step", "speed", "best of PyTorch", "ours", "TB/s"], lines, left=1)


def training_table(head_dim: int) -> str:
    """Return the speed of forward and backward together, relative to cuDNN's dense attention."""
    rows = rows_of("attention-nvidia-h200", **SHAPE | {"head_dim": head_dim, "pass": "forward_backward"})
    columns = {("triton", name): f"our {name}" if name == "dense" else name for name in PATTERNS}
    peers = ("fa4", "fa4_deterministic", "fa2", "flex")
    return _kernels_table(rows, columns | {(peer, "dense"): PEERS[peer] for peer in peers})


def trained_models_table() -> str:
    """Return how fast whole models train, relative to Transformers' own attention, and the peak memory of all."""
    names = {name: PEERS.get(name, VARIANTS.get(name, name)) for name in TRAINED}
    lines = []
    for (model, layers, length, batch), group in by_problem(
        rows_of("training-nvidia-h200"), "model", "layers", "seq_len", "batch"
    ):
        found = {row["variant"]: row for row in group}
        shape = {"llama-3.1-8b": f"Llama-8B's, {layers} layers", "smollm2-135m": "SmolLM2-135M's"}[model]
        cells = [ratio(found[name]["speed_to_sdpa"]) if name in found else MISSING for name in names]
        peaks = sorted({f"{row['peak_gib']:.2f}" for row in group}, key=float)
        peak = " to ".join(dict.fromkeys([peaks[0], peaks[-1]]))
        lines.append([shape, f"{batch} x {length}", str(found["sdpa"]["tokens_per_second"]), *cells, peak])
    return markdown(["shape", "tokens", "sdpa, tokens/s", *names.values(), "peak memory, GiB"], lines, left=1)


def training_memory_table() -> str:
    """Return the memory that forward and backward take, in MiB."""
    rows = rows_of("attention-nvidia-h200", **SHAPE, **{"pass": "forward_backward"})
    columns = {("triton", "2:4"): "2:4", ("triton", "dense"): "our dense"}
    columns |= {(peer, "dense"): PEERS[peer] for peer in ("flex", "cudnn", "fa4", "fa2")}
    lines = []
    for (length,), group in by_problem(rows, "seq_len"):
        found = {(row["kernel"], row["name"]): str(row["peak_mib"]) for row in group}
        lines.append([str(length), *(found.get(key, MISSING) for key in columns)])
    return markdown(["tokens", *columns.values()], lines)


def inputs_table() -> str:
    """Return what ragged batches and equal scores do to the rate of a kernel."""
    rows = rows_of("attention-cases-nvidia-h200")
    lines = [
        [KERNELS[row["kernel"]], row["name"], *(ratio(row[f"{case}_rate"]) for case in ("ragged", "threes", "alike"))]
        for row in rows
    ]
    return markdown(["kernel", "pattern", "lengths differ", "equal keys in threes", "all keys equal"], lines, left=2)


def cpu_table() -> str:
    """Return time and memory of a prefill on a CPU."""
    names = {"dense SDPA": "PyTorch's SDPA"} | {name: f"{name}, this project" for name in PATTERNS}
    lines = [
        [names[row["name"]], ratio(1 / row["time_ratio"]), ratio(row["memory_ratio"]), f"{row['seconds']:.1f} s"]
        for row in rows_of("prefill-cpu")
    ]
    return markdown(["attention", "speed", "peak memory", "time"], lines, left=1)


def change(row: QualityRow) -> str:
    """Return a variant's change of perplexity with its interval; of the dense model the perplexity."""
    estimate = row.change_percent
    if row.variant == "dense":
        return f"{row.perplexity.value:.2f}"
    return f"{estimate.value:+.2f} % [{estimate.low:+.2f}, {estimate.high:+.2f}]"


def perplexity_table() -> str:
    """Return what N:M costs in perplexity, by the committed sweep."""
    names = {"dense": "dense", "2:4, window 64, sinks 0": "2:4", "2:4, window 256, sinks 0": "2:4, dense window of 256"}
    names |= {f"{name}, window 64, sinks 0": name for name in ("4:8", "8:16", "1:4")}
    lines = []
    for variant, name in names.items():
        found = {row.length: row for row in quality_rows("sweep") if row.variant == variant}
        shares = (found[2048].mass_kept, found[2048].sparsity)
        cells = (MISSING if share is None else f"{100 * share:.1f} %" for share in shares)
        lines.append([name, change(found[2048]), change(found[8192]), *cells])
    return markdown(["variant", "at 2048 tokens", "at 8192 tokens", "mass kept", "scores dropped"], lines, left=1)


BLOCK_METHODS = {"mean_pool": "mean_pool_top_k"}
"""What variants of the run of block methods call a method by another name."""


def _method_and_knob(variant: str) -> list[str]:
    method, _, knob = variant.rpartition(" ")
    return [f"`{BLOCK_METHODS.get(method, method)}`", knob] if method else [variant, ""]


def _change_or_perplexity(row: QualityRow | None) -> str:
    if row is None:
        return MISSING
    return f"{row.perplexity.value:.2f}" if row.variant == "dense" else f"{row.change_percent.value:+.2f} %"


def blocks_table() -> str:
    """Return what methods that skip blocks cost by length, by the committed run, and what they keep."""
    rows = ExperimentResult.load(RUNS / "blocks").quality
    lengths = sorted({row.length for row in rows})
    lines = []
    for variant in dict.fromkeys(row.variant for row in rows):
        found = {row.length: row for row in rows if row.variant == variant}
        cells = [_change_or_perplexity(found.get(length)) for length in lengths]
        ends = [found.get(length) for length in (lengths[0], lengths[-1])]
        for form, values in (
            ("{:.4f}", [row and row.divergence.value for row in ends]),
            ("{:.1f} %", [row and row.mass_kept and 100 * row.mass_kept for row in ends]),
            ("{:.1f} %", [row and row.sparsity and 100 * row.sparsity for row in ends]),
        ):
            cells.append(", ".join(MISSING if x is None else form.format(x) for x in values))
        lines.append([*_method_and_knob(variant), *cells])
    names = [f"at {length}" for length in lengths]
    return markdown(["method", "knob", *names, "KL", "mass kept", "scores dropped"], lines, left=1)


def block_tasks_table() -> str:
    """Return the scores of methods that skip blocks on the tasks of the committed run, by length."""
    rows = ExperimentResult.load(RUNS / "blocks").tasks
    columns = sorted({(row.task, row.length) for row in rows})
    lines = []
    for variant in dict.fromkeys(row.variant for row in rows):
        found = {(row.task, row.length): row.score.value for row in rows if row.variant == variant}
        cells = [f"{100 * found[key]:.0f} %" if key in found else MISSING for key in columns]
        lines.append([*_method_and_knob(variant), *cells])
    names = [f"{task} {length}" for task, length in columns]
    return markdown(["method", "knob", *names], lines, left=1)


def ruler_table() -> str:
    """Return the mean score over all RULER-like tasks, by length."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in ExperimentResult.load(RUNS / "ruler").tasks:
        found.setdefault(row.variant, {}).setdefault(row.length, []).append(100 * row.score.value)
    lines = []
    for variant, scores in found.items():
        means = [sum(values) / len(values) for values in scores.values()]
        lines.append([variant, *(f"{mean:.1f} %" for mean in [*means, sum(means) / len(means)])])
    return markdown(["variant", *map(str, next(iter(found.values()))), "mean"], lines, left=1)


def calibration_table() -> str:
    """Return what calibrated methods skip of texts that the calibration did not read; of source code in brackets."""
    lines, rows = [], rows_of("calibration-nvidia-h200", phase="prefill")
    for (method, length), group in by_problem(rows, "method", "length"):
        cells = [f"{row['speeches']:.3f} ({row['code']:.3f})" for row in group]
        lines.append([f"`{method.partition(',')[0]}`", str(length), *cells])
    targets = sorted({row["target"] for row in rows})
    return markdown(["method", "tokens", *(f"target {target}" for target in targets)], lines, left=1)


def decode_calibration_table() -> str:
    """Return what decode steps skip, calibrated on the kind of text that they read, or on two kinds together."""
    rows, lines = rows_of("calibration-nvidia-h200", phase="decode"), []
    targets = sorted({row["target"] for row in rows})
    for label, sources in {"the same kind": ("speeches", "code"), "both kinds": ("both", "both")}.items():
        for (length,), group in by_problem(rows, "length"):
            found = {(row["calibrated_on"], row["target"]): row for row in group}
            on_speeches, on_code = sources
            cells = [
                f"{found[on_speeches, target]['speeches']:.3f} ({found[on_code, target]['code']:.3f})"
                for target in targets
            ]
            lines.append([label, str(length), *cells])
    return markdown(["calibrated on", "tokens", *(f"target {target}" for target in targets)], lines, left=1)


SEARCHES = {
    "4": "1:4, 2:4, 3:4",
    "16": "2:4, and 4, 8 or 12 of 16",
    "windows": "2:4, and N of 16 with a dense window of 256 or 512",
}
"""The candidates of the searches of ``benchmarks/search.py`` over N:M, in words."""


def _evaluated(found: dict[str, Any]) -> list[str]:
    value, low, high = found["perplexity_percent"]
    return [f"{value:+.2f} % [{low:+.2f}, {high:+.2f}]", f"{found['kl'][0]:.4f}", f"{100 * found['sparsity']:.1f} %"]


def search_table() -> str:
    """Return what searched N:M costs beside 2:4 everywhere, on texts that the search did not read."""
    lines = []
    for row in rows_of("search-nvidia-h200", wanted="2:4"):
        for name, found in row["evaluated"].items():
            label = f"{name} everywhere" if name != "searched" else f"searched: {SEARCHES[row['what']]}"
            if [label, *_evaluated(found)] not in lines:  # what is everywhere is the same for several searches
                lines.append([label, *_evaluated(found)])
    return markdown(["configuration", "perplexity", "KL", "scores dropped"], lines, left=1)


def block_searches_table() -> str:
    """Return what block methods with a knob for each layer cost beside one knob everywhere."""
    lines = []
    for row in rows_of("search-nvidia-h200"):
        wanted = row["wanted"]
        if wanted == "2:4":
            continue
        method, knob = _method_and_knob(wanted)
        in_search = {wanted: row["everywhere_in_search"][wanted], "searched": row["in_search"]}
        for name, run in in_search.items():
            found = row["evaluated"].get(name)
            cells = [MISSING] * 3 if found is None else _evaluated(found)
            lines.append([method, knob if name == wanted else f"searched for {knob}", f"{run['kl']:.4f}", *cells])
    return markdown(["method", "knob", "KL, searched windows", "perplexity", "KL", "scores dropped"], lines, left=2)


def efficiency_table() -> str:
    """Return how well context parallelism uses several GPUs in a prefill, by length and attention."""
    lines = []
    rows = rows_of("long-nvidia-h200", what="prefill")
    for (length, layers, gpus), group in by_problem(rows, "length", "layers", "gpus"):
        for variant in dict.fromkeys(row["variant"] for row in group):
            found = {row["exchange"]: row for row in group if row["variant"] == variant}
            cells = (ratio(found[exchange]["efficiency"]) if exchange in found else MISSING for exchange in EXCHANGES)
            alone = found["alone"]["s"] / layers
            name = VARIANTS.get(variant, variant)
            lines.append([name, str(length), str(gpus), *cells, f"{1e3 * alone:.0f} ms"])
    names = ["attention", "tokens", "GPUs", *(f"`{exchange}`" for exchange in EXCHANGES), "one GPU, a layer"]
    return markdown(names, lines, left=1)


def long_prompts_table() -> str:
    """Return how long the first token and further ones take after long prompts, over a divided cache."""
    lines = []
    for (length,), group in by_problem(rows_of("long-nvidia-h200", what="generate"), "length"):
        for row in group:
            lines.append(
                [
                    str(length),
                    VARIANTS.get(row["variant"], row["variant"]),
                    str(row["layers"]),
                    f"{row['time_to_first_token_s']:.1f} s",
                    milliseconds(row["decode_ms"]),
                    f"{row['peak_gib']:.0f} GiB",
                ]
            )
    names = ["tokens", "attention", "layers", "first token", "each further token", "memory of a GPU"]
    return markdown(names, lines)


def windows_table() -> str:
    """Return what single candidates cost in all layers, on the texts of the searches over N:M."""
    found = {}
    for row in rows_of("search-nvidia-h200", wanted="2:4"):
        found |= row["everywhere_in_search"]
    lines = [
        [name, f"{run['perplexity_percent']:+.2f} %", f"{run['kl']:.4f}", f"{100 * run['sparsity']:.1f} %"]
        for name, run in sorted(found.items(), key=lambda item: item[1]["sparsity"])
    ]
    return markdown(["everywhere", "perplexity", "KL", "scores dropped"], lines, left=1)


@functools.cache
def quality_rows(run: str) -> list[QualityRow]:
    """Return how well all variants of a committed run predict its windows."""
    result = ExperimentResult.load(RUNS / run)
    return summarize_quality(result.records, [], result.config.seed)


def quality_of(run: str, variant: str) -> QualityRow:
    """Return how well one variant of a committed run predicts windows of 2048 tokens."""
    return next(row for row in quality_rows(run) if row.variant == variant and row.length == 2048)


def choice_table() -> str:
    """Return quality and speed of settings that a user may choose between, as far as both were measured."""
    lines = []
    for name, run, variant, fast in CHOICES:
        times = {
            row["seq_len"]: row
            for row in rows_of("model-nvidia-h200", what="ttft", variant=fast, model=MODEL, layers=32)
        }
        cells = [ratio(1 / times[n]["ratio_to_sdpa"]) if n in times else MISSING for n in (8192, 32768, 131072)]
        lines.append([name, change(quality_of(run, variant)) if variant else "none", *cells])
    return markdown(["setting", "perplexity", "speed at 8k", "at 32k", "at 128k"], lines, left=1)


def statistics_table() -> str:
    """Return what share of the time to first token statistics cost."""
    rows = rows_of("counting-nvidia-h200", exact=False)
    lengths = sorted({row["seq_len"] for row in rows})
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {row["seq_len"]: row["ratio"] - 1 for row in rows if row["method"] == method}
        cells = (f"{100 * found[length]:.1f} %" if length in found else MISSING for length in lengths)
        lines.append([method if " " in method or ":" in method else f"`{method}`", *cells])
    return markdown(["method", *(f"{length} tokens" for length in lengths)], lines, left=1)


TABLES: dict[str, Callable[[], str]] = {
    "choice": choice_table,
    "time to first token": time_to_first_token,
    "padded batch": functools.partial(model_table, "batch", layers=32),
    "decode of a model": functools.partial(model_table, "decode", layers=32, batch=1),
    "time to first token, compiled": functools.partial(model_table, "ttft", "compiled", layers=8),
    "time to first token of a small model": functools.partial(model_table, "ttft", model="smollm2-135m"),
    "lists": lists_table,
    "lists backward": functools.partial(lists_table, "forward_backward"),
    "chosen blocks": chosen_table,
    "skip-softmax": skip_softmax_table,
    "statistics": statistics_table,
    "2:4": two_of_four_table,
    "2:4 in other types": two_of_four_types_table,
    "dense kernels": dense_table,
    "patterns in the Hopper kernel": functools.partial(patterns_table, "hopper"),
    "patterns in the portable kernel": functools.partial(patterns_table, "triton"),
    "shapes": shapes_table,
    "decode": decode_table,
    "training": functools.partial(training_table, 128),
    "training with a head dimension of 64": functools.partial(training_table, 64),
    "training memory": training_memory_table,
    "training of models": trained_models_table,
    "inputs": inputs_table,
    "cpu": cpu_table,
    "perplexity": perplexity_table,
    "blocks": blocks_table,
    "ruler": ruler_table,
    "block tasks": block_tasks_table,
    "calibration": calibration_table,
    "calibration of decode": decode_calibration_table,
    "search": search_table,
    "block searches": block_searches_table,
    "windows": windows_table,
    "efficiency": efficiency_table,
    "long prompts": long_prompts_table,
}
"""The tables by the names that pages mark their places with."""
MARKED = re.compile(r"<!-- begin ([^\n]+) -->\n.*?<!-- end \1 -->", re.DOTALL)


def filled(page: str) -> str:
    """Return a page with its tables as the results are now; sections that others keep stay."""

    def section(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            return match[0]
        return f"<!-- begin {name} -->\n{TABLES[name]()}\n<!-- end {name} -->"

    return MARKED.sub(section, page)


def lines_of_model() -> dict[str, dict[int, float]]:
    """Return how many times as fast as PyTorch's attention a whole model is, by variant and length."""
    found: dict[str, dict[int, float]] = {}
    for row in rows_of("model-nvidia-h200", what="ttft", mode="eager", model=MODEL, layers=32):
        if row["variant"] not in CONTROLS:
            name = VARIANTS.get(row["variant"], row["variant"])
            found.setdefault(name, {})[row["seq_len"]] = 1 / row["ratio_to_sdpa"]
    return found


def lines_of_attention() -> dict[str, dict[int, float]]:
    """Return how many times as fast as cuDNN's dense attention a kernel is, by name and length."""
    sources = {
        "our dense": ("sparse-cores-nvidia-h200", "hopper", "dense"),
        "2:4": ("sparse-cores-nvidia-h200", "sparse_cores", "2:4"),
        "4:8": ("attention-nvidia-h200", "hopper", "4:8"),
        "2:4, portable kernel": ("attention-nvidia-h200", "triton", "2:4"),
        "FlashAttention-3": ("sparse-cores-nvidia-h200", "fa3", "dense"),
        "FlexAttention": ("attention-nvidia-h200", "flex", "dense"),
    }
    found = {}
    for label, (file, kernel, name) in sources.items():
        rows = rows_of(file, **SHAPE, kernel=kernel, name=name, batch=1, **{"pass": "forward"})
        found[label] = {row["seq_len"]: row["ratio_to_cudnn"] for row in rows}
    return found


def data_of_picture() -> str:
    """Return a digest of what the picture shows."""
    return hashlib.sha256(json.dumps([lines_of_model(), lines_of_attention()]).encode()).hexdigest()


def draw(axes: Axes, title: str, lines: dict[str, dict[int, float]]) -> None:
    """Draw speed against length; 1 is the speed of PyTorch's attention."""
    axes.axhline(1, color="black", linewidth=0.8)
    for (label, points), style in zip(lines.items(), line_styles(), strict=False):
        axes.plot(list(points), list(points.values()), label=label, **style)
    lengths = sorted({length for points in lines.values() for length in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{x // 1024}k" if x >= 1024 else str(x) for x in lengths])
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.set_xlabel("tokens")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))


def write_picture() -> None:
    """Write the picture of speed against length; its description holds the digest of the data."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        draw(left, "time to first token, against sdpa", lines_of_model())
        draw(right, "attention alone, against cuDNN", lines_of_attention())
        left.set_ylabel("times as fast")
        figure.savefig(PICTURE, metadata={"Date": None, "Description": data_of_picture()})


def main() -> None:
    """Write the pages that differ, and the picture."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        if filled(page) != page:
            path.write_text(filled(page), encoding="utf-8")
            print(path.relative_to(ROOT))
    write_picture()


if __name__ == "__main__":
    main()
