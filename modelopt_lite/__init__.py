"""Pluggable attention sparsity for PyTorch models.

Names are loaded when they are first used, so that importing the package needs neither Transformers nor Triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calibration import CalibrationResult, calibrate
    from .checkpoint import export_modelopt, from_pretrained, save_pretrained
    from .config import SPARSE_SOFTMAX_DEFAULT, SparsityConfig
    from .conversion import (
        continuous_batching,
        disable_sparse_attention,
        disabled,
        enable_sparse_attention,
        sparsify,
        summary,
        unsparsify,
    )
    from .errors import ConfigError, UnsupportedError
    from .kernels import attention
    from .layer_search import SearchResult, search
    from .methods import (
        BlockMethod,
        Combined,
        FlashPrefill,
        MeanPoolTopK,
        SinkWindow,
        SkipSoftmax,
        SparseAttentionMethod,
        SparseSoftmax,
        XAttention,
    )
    from .models.module import SparseAttentionModule
    from .models.parallel import context_parallel
    from .plan import AttentionPlan
    from .registry import get_sparse_method, list_sparse_methods, register_sparse_method
    from .stats import collect_statistics

_MODULE_OF = {
    "SPARSE_SOFTMAX_DEFAULT": "config",
    "AttentionPlan": "plan",
    "BlockMethod": "methods",
    "CalibrationResult": "calibration",
    "Combined": "methods",
    "ConfigError": "errors",
    "FlashPrefill": "methods",
    "MeanPoolTopK": "methods",
    "SinkWindow": "methods",
    "SearchResult": "layer_search",
    "SkipSoftmax": "methods",
    "SparseAttentionMethod": "methods",
    "SparseAttentionModule": "models.module",
    "SparseSoftmax": "methods",
    "SparsityConfig": "config",
    "UnsupportedError": "errors",
    "XAttention": "methods",
    "attention": "kernels",
    "calibrate": "calibration",
    "collect_statistics": "stats",
    "context_parallel": "models.parallel",
    "continuous_batching": "conversion",
    "disable_sparse_attention": "conversion",
    "disabled": "conversion",
    "enable_sparse_attention": "conversion",
    "export_modelopt": "checkpoint",
    "from_pretrained": "checkpoint",
    "get_sparse_method": "registry",
    "list_sparse_methods": "registry",
    "register_sparse_method": "registry",
    "save_pretrained": "checkpoint",
    "search": "layer_search",
    "sparsify": "conversion",
    "summary": "conversion",
    "unsparsify": "conversion",
}

__version__ = "0.1.0"
__all__ = [
    "SPARSE_SOFTMAX_DEFAULT",
    "AttentionPlan",
    "BlockMethod",
    "CalibrationResult",
    "Combined",
    "ConfigError",
    "FlashPrefill",
    "MeanPoolTopK",
    "SearchResult",
    "SinkWindow",
    "SkipSoftmax",
    "SparseAttentionMethod",
    "SparseAttentionModule",
    "SparseSoftmax",
    "SparsityConfig",
    "UnsupportedError",
    "XAttention",
    "__version__",
    "attention",
    "calibrate",
    "collect_statistics",
    "context_parallel",
    "continuous_batching",
    "disable_sparse_attention",
    "disabled",
    "enable_sparse_attention",
    "export_modelopt",
    "from_pretrained",
    "get_sparse_method",
    "list_sparse_methods",
    "register_sparse_method",
    "save_pretrained",
    "search",
    "sparsify",
    "summary",
    "unsparsify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
