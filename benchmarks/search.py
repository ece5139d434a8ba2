"""Search a method for each layer, and compare with one method everywhere at the same sparsity, on other speeches.

    python benchmarks/search.py [--model smollm2-135m] [--dtype float32] [--what 4 16 windows flash_prefill ...]

Three searches over N:M at the density of 2:4: N of 4 keys, N of 16, and N of 16 with several dense windows. And one for
each method that skips blocks, over values of its knob, at the densities that some of these values have in all layers.
All choose on the beginnings of some speeches. What they cost is then measured on speeches of other presidents.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import recording
import torch
from calibration import CALIBRATED_ON, Clock, arguments, prepare
from torch import Tensor

import modelopt_lite as mtsa
from modelopt_lite.experiment.quality import bootstrap, compare_predictions, mapped

RESULTS = Path(__file__).parents[1] / "examples" / "results" / "search"


class Search(NamedTuple):
    """What is searched.

    Attributes:
        candidates: methods by name.
        wanted: candidates whose sparsity in all layers is the budget, each of a search.
        length: tokens of a window.
        windows: how many are searched on; each is the beginning of another speech.
    """

    candidates: dict[str, dict[str, Any]]
    wanted: tuple[str, ...]
    length: int
    windows: int


def n_of_m(*names: str) -> Search:
    """Return a search over N:M at the density of 2:4; a name may hold a window, for example ``8:16, window 256``."""
    candidates = {}
    for name in ("2:4", *names):
        ratio, _, window = name.partition(", window ")
        n, m = map(int, ratio.split(":"))
        candidates[name] = {"sparsity_n": n, "sparsity_m": m, "dense_window_size": int(window or 64)}
    return Search({k: {"method": "sparse_softmax"} | v for k, v in candidates.items()}, ("2:4",), 2048, 4)


def knob(method: str, field: str, values: tuple[float, ...], *wanted: float) -> Search:
    """Return a search over values of a method's field."""
    candidates = {f"{method} {value}": {"method": method, field: value} for value in values}
    return Search(candidates, tuple(f"{method} {value}" for value in wanted), 4096, 2)


SEARCHES = {
    "4": n_of_m("1:4", "3:4"),
    "16": n_of_m("4:16", "8:16", "12:16"),
    "windows": n_of_m("8:16, window 256", "4:16, window 256", "2:16, window 256", "4:16, window 512"),
    "flash_prefill": knob("flash_prefill", "alpha", (0.02, 0.05, 0.1, 0.2), 0.05, 0.1),
    "xattention": knob("xattention", "threshold", (0.99, 0.95, 0.9, 0.8, 0.6), 0.95, 0.9),
    "mean_pool_top_k": knob("mean_pool_top_k", "keep", (0.75, 0.5, 0.35, 0.25), 0.75, 0.5),
    "skip_softmax": knob("skip_softmax", "threshold", (0.03, 0.1, 0.3, 0.9), 0.1, 0.3),
}


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
            with mtsa.collect_statistics(model, exact=True) if is_counted else contextlib.nullcontext() as statistics:
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
    parser.add_argument("--what", nargs="+", default=list(SEARCHES), choices=list(SEARCHES))
    parser.add_argument("--windows", type=int, help="for each search, if not as many as usual")
    parser.add_argument("--evaluate", type=int, default=16, help="most windows of other speeches")
    parser.add_argument("--length", type=int, help="tokens of a window, if not as many as usual")
    parser.add_argument("--configs", type=Path, default=RESULTS, help="folder for the configurations that are found")
    parser.add_argument("--states", type=Path, help="folder for what was measured, to go on from")
    options = parser.parse_args()
    model, texts = prepare(options)
    clock = Clock()
    results = recording.header(recording.device_name(model.device.type)) | {
        "model": options.model,
        "dtype": options.dtype,
        "evaluated_on": list(texts["speeches"]),
    }
    rows: list[dict[str, Any]] = []
    options.configs.mkdir(parents=True, exist_ok=True)
    for what in options.what:
        task = SEARCHES[what]
        length, number = options.length or task.length, options.windows or task.windows
        reading = [text[:length] for text in texts["calibration"].values()][:number]
        parts = [text[start:][:length] for start in range(0, 4 * length, length) for text in texts["speeches"].values()]
        others = [part for part in parts if len(part) == length][: options.evaluate]
        state = None if options.states is None else options.states / f"search-{what}.jsonl"
        for wanted in task.wanted:
            found = mtsa.search(model, task.candidates, reading, sparsity=wanted, state=state, show_progress=False)
            clock.say(f"searched\n{found}")
            saved = options.configs / f"searched-{what if len(task.wanted) == 1 else wanted.replace(' ', '-')}.yaml"
            found.save(saved)
            configs = {wanted: mtsa.SparsityConfig.load(task.candidates[wanted]), "searched": found.config}
            figures = evaluate(model, configs, others)
            again = evaluate(model, {"searched": mtsa.SparsityConfig.load(saved)}, reading)["searched"]
            for name, values in (figures | {"searched, again on what was read": again}).items():
                clock.say(f"{name}: {values}")
            rows.append(
                {
                    "what": what,
                    "wanted": wanted,
                    "length": length,
                    "searched_on": CALIBRATED_ON[:number],
                    "candidates": list(task.candidates),
                    "budget": found.budget,
                    "in_search": {"kl": found.run.kl, "perplexity_percent": found.run.perplexity_percent},
                    "in_search_again": {key: again[key][0] for key in ("kl", "perplexity_percent")},
                    "predicted_kl": found.predicted_kl,
                    "everywhere_in_search": {name: vars(run) for name, run in found.everywhere.items()},
                    "layers": {layer.layer: layer.candidate for layer in found.layers},
                    "evaluation_windows": len(others),
                    "evaluated": figures,
                }
            )
            recording.write(options.output, results, rows)


if __name__ == "__main__":
    main()
