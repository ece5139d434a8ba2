"""Experiments from configuration files: real models, real text, tasks, speed, tables and pictures.

Names are loaded when they are first used, so that the command line answers ``--help`` at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .assets import AssetError, Progress
    from .compare import compare_runs
    from .config import ExperimentConfig
    from .report import write_report
    from .result import ExperimentResult
    from .runner import run_experiment

_MODULE_OF = {
    "AssetError": "assets",
    "ExperimentConfig": "config",
    "ExperimentResult": "result",
    "Progress": "assets",
    "compare_runs": "compare",
    "run_experiment": "runner",
    "write_report": "report",
}

__all__ = [
    "AssetError",
    "ExperimentConfig",
    "ExperimentResult",
    "Progress",
    "compare_runs",
    "run_experiment",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value
