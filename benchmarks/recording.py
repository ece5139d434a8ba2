"""The JSON files in ``benchmarks/results`` that are measured piece by piece: device, versions, date and rows."""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path
from typing import Any

import torch
import triton


def device_name(device: str = "cuda") -> str:
    """Return the name of the GPU, or of the processor's kind."""
    return torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"


def default_output(script: str, device: str) -> Path:
    """Return the path of the results of a script, for example ``attention``, on a device of some name."""
    return Path(__file__).parent / "results" / f"{script}-{device.lower().replace(' ', '-')}.json"


def header(device: str, **packages: str | None) -> dict[str, Any]:
    """Return what results have in common: the device's name, versions, with those of further packages, and the date."""
    return {
        "device": device,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **packages,
        },
        "date": datetime.date.today().isoformat(),
    }


def rows_before(output: Path, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of an earlier run, if there are any from the same device and versions as in ``results``.

    A package that only one of the runs had, such as an optional peer, does not count; its version goes into
    ``results``.
    """
    before = json.loads(output.read_text()) if output.exists() else results
    then, now = before["versions"], results["versions"]
    same = before["device"] == results["device"] and then.keys() == now.keys()
    if not same or any(then[name] != now[name] and None not in (then[name], now[name]) for name in now):
        return []
    results["versions"] = {name: now[name] if then[name] is None else then[name] for name in now}
    rows: list[dict[str, Any]] = before.get("rows", [])
    return rows


def write(output: Path, results: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write header and rows."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results | {"rows": rows}, indent=1) + "\n")
