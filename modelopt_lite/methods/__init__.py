"""The built-in sparsity methods, one file each."""

from .base import SparseAttentionMethod
from .blocks import BlockMethod
from .calibrated import CalibratedMethod, Calibration
from .combined import Combined
from .flash_prefill import FlashPrefill
from .mean_pool_top_k import MeanPoolTopK
from .sink_window import SinkWindow
from .skip_softmax import SkipSoftmax
from .sparse_softmax import SparseSoftmax
from .xattention import XAttention

__all__ = [
    "BlockMethod",
    "CalibratedMethod",
    "Calibration",
    "Combined",
    "FlashPrefill",
    "MeanPoolTopK",
    "SinkWindow",
    "SkipSoftmax",
    "SparseAttentionMethod",
    "SparseSoftmax",
    "XAttention",
]
