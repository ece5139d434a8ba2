"""Search a method for each layer, and compare with one method everywhere at the same sparsity, on other speeches.

    python benchmarks/search.py [--model smollm2-135m] [--dtype float32] [--what 4 16 windows blocks]

Four searches: N of 4 keys, N of 16 keys, and N of 16 keys with several dense windows, all at the density of 2:4; and
xattention at that of a target of one half. All choose on the first 2048 tokens of some speeches. What they cost is then
measured on speeches of other presidents.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from pathlib import Path
from typing import Any

import recording
import torch
from calibration import CALIBRATED_ON, Clock, arguments, calibrate, prepare
from torch import Tensor

import modelopt_lite as mtsa
from modelopt_lite.experiment.quality import bootstrap, compare_predictions, mapped

LENGTH = 2048
RESULTS = Path(__file__).parents[1] / "examples" / "results" / "search"
N_OF_M = {
    "4": ("2:4", "1:4", "3:4"),
    "16": ("2:4", "4:16", "6:16", "8:16", "10:16", "12:16"),
    "windows": (
        "2:4", "4:16", "8:16", "12:16", "4:16, window 256", "8:16, window 256", "2:16, window 256",
        "4:16, window 512", "2:16, window 512", "1:16, window 512",
    ),
}  # fmt: skip
BLOCKS = {"method": "xattention", "per_kv_head": True}
TARGETS = (0.3, 0.5, 0.7)


@torch.no_grad()
def evaluate(model: Any, configs: dict[str, mtsa.SparsityConfig], windows: list[Tensor]) -> dict[str, dict[str, Any]]:
    """Return what configurations cost, with 95 % intervals over windows; the sparsity is that of the first window."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in configs}
    shares: dict[str, float] = {}
    for window in windows:
        tokens = window.to(model.device)
        dense = model(tokens[None], use_cache=False).logits[0]
        loss = compare_predictions(dense, dense, tokens).cross_entropy
        for name, config in configs.items():
            mtsa.sparsify(model, config)
            is_counted = name not in shares  # on the first window, as it takes long
            with mtsa.collect_statistics(model) if is_counted else contextlib.nullcontext() as statistics:
                sparse = compare_predictions(model(tokens[None], use_cache=False).logits[0], dense, tokens)
            found[name].append((sparse.cross_entropy - loss, sparse.divergence))
            if is_counted:
                layers = statistics.layers.values()
                visible = max(layer.visible for layer in layers) * model.config.num_hidden_layers
                shares[name] = sum(layer.visible - layer.kept for layer in layers) / visible
            mtsa.unsparsify(model)
    rows = {}
    for name, values in found.items():
        changes, divergences = zip(*values, strict=True)
        change, divergence = (
            mapped(bootstrap(changes, 0), lambda x: 100 * math.expm1(x)),
            bootstrap(divergences, 0),
        )
        rows[name] = {
            "perplexity_percent": [round(x, 4) for x in (change.value, change.low, change.high) if x is not None],
            "kl": [round(x, 7) for x in (divergence.value, divergence.low, divergence.high) if x is not None],
            "sparsity": round(shares[name], 4),
        }
    return rows


def main() -> None:
    """Search, evaluate, write."""
    parser = arguments("search")
    parser.add_argument("--what", nargs="+", default=[*N_OF_M, "blocks"])
    parser.add_argument("--windows", type=int, default=4, help="of 2048 tokens, for each search")
    parser.add_argument("--evaluate", type=int, default=16, help="windows of other speeches, 16 at most")
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--configs", type=Path, default=RESULTS, help="folder for the configurations that are found")
    parser.add_argument("--states", type=Path, help="folder for what was measured, to go on from")
    options = parser.parse_args()
    model, texts = prepare(options)
    clock, length = Clock(), options.length
    reading = [text[:length] for text in texts["calibration"].values()][: options.windows]
    others = [text[i * length : (i + 1) * length] for i in range(4) for text in texts["speeches"].values()]
    others = others[: options.evaluate]
    results = recording.header(recording.device_name(model.device.type)) | {
        "model": options.model,
        "dtype": options.dtype,
        "length": length,
        "evaluated_on": list(texts["speeches"]),
        "evaluation_windows": len(others),
    }
    rows: list[dict[str, Any]] = []
    for what in options.what:
        if what in N_OF_M:
            candidates: dict[str, Any] = {name: _n_of_m(name) for name in N_OF_M[what]}
            wanted = "2:4"
        else:
            with tempfile.TemporaryDirectory() as folder:
                fitted, _ = calibrate(model, BLOCKS, reading, Path(folder) / "state.jsonl")
            candidates = {f"xattention {target}": fitted.with_target(target) for target in TARGETS}
            wanted = "xattention 0.5"
            clock.say("calibrated")
        state = None if options.states is None else options.states / f"search-{what}.jsonl"
        found = mtsa.search(model, candidates, reading, sparsity=wanted, state=state, show_progress=False)
        clock.say(f"searched\n{found}")
        saved = options.configs / f"searched-{what}.yaml"
        found.save(saved)
        configs = {wanted: mtsa.SparsityConfig.load(candidates[wanted]), "searched": found.config}
        figures = evaluate(model, configs, others)
        again = evaluate(model, {"searched": mtsa.SparsityConfig.load(saved)}, reading)["searched"]
        for name, values in (figures | {"searched, again on what was read": again}).items():
            clock.say(f"{name}: {values}")
        rows.append(
            {
                "what": what,
                "searched_on": CALIBRATED_ON[: options.windows],
                "candidates": list(candidates),
                "budget": found.budget,
                "in_search": {"kl": found.run.kl, "perplexity_percent": found.run.perplexity_percent},
                "in_search_again": {key: again[key][0] for key in ("kl", "perplexity_percent")},
                "predicted_kl": found.predicted_kl,
                "everywhere_in_search": {name: vars(run) for name, run in found.everywhere.items()},
                "layers": {layer.layer: layer.candidate for layer in found.layers},
                "evaluated": figures,
            }
        )
        recording.write(options.output, results, rows)


def _n_of_m(name: str) -> dict[str, Any]:
    ratio, _, window = name.partition(", window ")
    n, m = map(int, ratio.split(":"))
    return {"method": "sparse_softmax", "sparsity_n": n, "sparsity_m": m, "dense_window_size": int(window or 64)}


if __name__ == "__main__":
    main()
