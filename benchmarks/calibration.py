"""Calibrate block methods on some speeches, and see what they skip of other texts: targets, lengths, methods.

    python benchmarks/calibration.py [--model smollm2-135m] [--dtype float32] [--seconds 600]

Calibration reads dense activations. What is achieved is counted in real sparse runs, on speeches of other presidents
and on source code. Lengths are done in turn, and no more is begun after ``--seconds``.

For a machine without the texts, ``--write-tokens FILE`` writes their tokens, and ``--tokens FILE`` reads them.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import recording
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import modelopt_lite as mtsa
from modelopt_lite.experiment.assets import load_model, read_documents
from modelopt_lite.kernels import AttentionRequest, select_blocks
from modelopt_lite.kernels.blocks import BlockGrid
from modelopt_lite.module import count, sparse_modules
from modelopt_lite.plan import AttentionPlan

METHODS = {
    "skip_softmax, 128 x 128": {"method": "skip_softmax"},
    "skip_softmax, 64 x 64": {"method": "skip_softmax", "block_size": 64, "block_rows": 64},
    "flash_prefill, 64 x 64": {
        "method": "flash_prefill", "block_size": 64, "block_rows": 64, "first_blocks": 1, "recent_blocks": 1,
    },
    "xattention, 64 x 64": {"method": "xattention", "block_size": 64, "block_rows": 64},
    "mean_pool_top_k, 64 x 64": {"method": "mean_pool_top_k", "block_size": 64, "block_rows": 64},
}  # fmt: skip
TARGETS = (0.3, 0.5, 0.7)
LENGTHS = (1024, 2048, 4096, 8192)
CALIBRATED_ON = ("1848-Polk-1", "1890-Harrison-1", "1912-Taft-1", "1946-Truman-1", "1981-Carter-1", "1995-Clinton-1")
ACHIEVED_ON = ("1858-Buchanan-1", "1906-Roosevelt-1", "1974-Nixon-2", "2000-Clinton-1")
CODE = ("argparse", "tarfile")


class Achieved:
    """Counts the blocks that layers visit, and lets them attend to their keys alone.

    What is kept is what their method keeps. It is computed by a rule that masks the other blocks, as PyTorch
    operations on a GPU take masks faster than lists.
    """

    def __init__(self, sinks: int, window: int) -> None:
        self._plan = AttentionPlan(keep=self._keep, num_sink_tokens=sinks, dense_window_size=window)
        self.counts: list[Tensor] = []

    def observe(self, request: AttentionRequest) -> AttentionRequest:
        """Count a call of one sequence."""
        self._size, self._rows = request.grid
        heads, kv_heads = request.q.shape[1], request.k.shape[1]
        mask = select_blocks(request).mask()
        self._mask = mask.repeat_interleave(heads // mask.shape[0], 0).unflatten(0, (kv_heads, -1))
        seen = BlockGrid(request, self._size, self._rows).seen()
        self.counts.append(torch.stack([seen.sum() * heads, self._mask.sum()]))
        return request._replace(plan=self._plan)

    def _keep(self, scores: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        if scores.dim() < 5:  # a rule is tried out on other scores first
            return torch.ones_like(scores, dtype=torch.bool)
        columns = (k_pos // self._size).clamp(max=self._mask.shape[-1] - 1)
        return self._mask[:, :, q_pos.flatten() // self._rows][..., columns]


@functools.cache
def observer_of(exemptions: tuple[int, int]) -> Achieved:
    """Return the observer of all layers; a new one costs time, as its rule is tried out."""
    return Achieved(*exemptions)


@torch.no_grad()
def achieved(model: torch.nn.Module, window: torch.Tensor) -> float:
    """Return the share of blocks that all layers skip in a real run."""
    modules = list(sparse_modules(model).values())
    plan = modules[0].sparse_attention.sparse_plan
    observer = observer_of((plan.num_sink_tokens, plan.dense_window_size))
    observer.counts.clear()
    with count(dict.fromkeys(modules, observer)):
        model(window[None].to(model.device), use_cache=False, logits_to_keep=1)
    seen, visited = torch.stack(observer.counts).sum(0).tolist()
    return 1 - visited / seen


def read_texts(tokenizer: Any) -> dict[str, Tensor]:
    """Return the beginnings of the texts as tokens, by kind and name."""
    code, found = read_documents("python", "python"), {}
    for kind, names in (("calibration", CALIBRATED_ON), ("speeches", ACHIEVED_ON), ("code", CODE)):
        for name in names:
            text = code[name] if kind == "code" else read_documents(f"sotu:{name}", "sotu")[f"sotu:{name}"]
            found[f"{kind}/{name}"] = torch.tensor(tokenizer(text, verbose=False).input_ids[: max(LENGTHS)])
    return found


def prepare(options: argparse.Namespace) -> tuple[Any, dict[str, dict[str, Tensor]]]:
    """Return the model, and the texts by kind and name."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(options.model, getattr(torch, options.dtype), device, lambda *_: None)
    texts = load_file(options.tokens) if options.tokens else read_texts(tokenizer)
    if options.write_tokens:
        save_file(texts, options.write_tokens)
        raise SystemExit(f"wrote {options.write_tokens}")
    found: dict[str, dict[str, Tensor]] = {}
    for name, tokens in texts.items():
        kind, _, name = name.partition("/")
        found.setdefault(kind, {})[name] = tokens % model.config.vocab_size
    return model, found


def arguments(script: str) -> argparse.ArgumentParser:
    """Return what both scripts that use these texts take."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--write-tokens", type=Path)
    parser.add_argument("--seconds", type=float, default=600.0)
    device = recording.device_name("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=recording.default_output(script, device))
    return parser


class Clock:
    """Prints lines with the time since it began."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return time.perf_counter() - self._start

    def say(self, line: str) -> None:
        """Print a line."""
        print(f"{self.seconds:6.1f} s  {line}", flush=True)


def calibrate(model: Any, method: dict[str, Any], windows: list[Tensor]) -> tuple[mtsa.SparsityConfig, dict[str, Any]]:
    """Return the calibrated configuration of a method, and what describes its fit."""
    options: dict[str, Any] = {"target": 0.5, "show_progress": False}
    with tempfile.TemporaryDirectory() as folder:
        options["state"] = Path(folder) / "state.jsonl"  # so that the second form needs no measurement
        result = mtsa.calibrate(model, method, windows, **options)
        other = None
        if result.config.sparse_cfg["*"].knob.scale == "log":
            other = mtsa.calibrate(model, method, windows, form="exponential", **options)
    description = {
        "method": method,
        "fit": _fit_of(result),
        "exponential": None if other is None else _fit_of(other),
        "reach": {reach.length: [round(reach.lowest, 4), round(reach.highest, 4)] for reach in result.reach},
    }
    return result.config, description


def _fit_of(result: mtsa.CalibrationResult) -> dict[str, Any]:
    fit: dict[str, Any] = result.config.sparse_cfg["*"].calibration.prefill.model_dump()
    return fit


def main() -> None:
    """Calibrate, run, write."""
    parser = arguments("calibration")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--calibrate-on", type=int, default=len(CALIBRATED_ON), help="number of speeches")
    parser.add_argument("--achieve-on", type=int, default=len(ACHIEVED_ON), help="number of speeches")
    parser.add_argument("--fits", type=Path, help="earlier results, whose fits are taken")
    options = parser.parse_args()
    model, texts = prepare(options)
    clock = Clock()
    calibrated_on, achieved_on = CALIBRATED_ON[: options.calibrate_on], ACHIEVED_ON[: options.achieve_on]
    windows = [texts["calibration"][name][:length] for name in calibrated_on for length in options.lengths]
    others = {"speeches": achieved_on, "code": CODE[: options.achieve_on // 2]}
    results = recording.header(recording.device_name(model.device.type)) | {
        "model": options.model,
        "dtype": options.dtype,
        "calibrated_on": calibrated_on,
        "achieved_on": others,
        "fits": {},
    }
    configs, rows = {}, []
    before = json.loads(options.fits.read_text())["fits"] if options.fits else {}
    for name in options.methods:
        if name in before:
            results["fits"][name] = before[name]
            content = METHODS[name] | {"target_sparsity": 0.5, "calibration": {"prefill": before[name]["fit"]}}
            configs[name] = mtsa.SparsityConfig.load(content)
            continue
        configs[name], results["fits"][name] = calibrate(model, METHODS[name], windows)
        clock.say(f"{name}: {results['fits'][name]['fit']}")
        recording.write(options.output, results, rows)
    for length in options.lengths:
        for name in options.methods:
            if clock.seconds > options.seconds:
                clock.say(f"no time for {name} at {length}")
                continue
            for target in TARGETS:
                mtsa.sparsify(model, configs[name].with_target(target))
                row: dict[str, Any] = {"method": name, "target": target, "length": length}
                for kind, names in others.items():
                    found = {text: round(achieved(model, texts[kind][text][:length]), 4) for text in names}
                    row[kind] = round(sum(found.values()) / len(found), 4)
                    row[f"{kind}_each"] = found
                mtsa.unsparsify(model)
                rows.append(row)
                recording.write(options.output, results, rows)
            clock.say(f"{name} at {length}: {[(row['target'], row['speeches'], row['code']) for row in rows[-3:]]}")
            recording.write(options.output, results, rows)


if __name__ == "__main__":
    main()
