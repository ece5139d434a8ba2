"""Experiments from configuration files: real models, real text, tables and pictures."""

from .assets import AssetError, Progress
from .config import ExperimentConfig
from .quality import Measurement, VariantResult
from .runner import ExperimentResult, run_experiment

__all__ = [
    "AssetError",
    "ExperimentConfig",
    "ExperimentResult",
    "Measurement",
    "Progress",
    "VariantResult",
    "run_experiment",
]
