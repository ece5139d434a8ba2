"""The built-in sparsity methods, one file each."""

from .base import SparseAttentionMethod
from .sink_window import SinkWindow
from .sparse_softmax import SparseSoftmax

__all__ = ["SinkWindow", "SparseAttentionMethod", "SparseSoftmax"]
