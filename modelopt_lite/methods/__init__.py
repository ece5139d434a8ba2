"""The built-in sparsity methods, one file each."""

from .base import SparseAttentionMethod
from .sparse_softmax import SparseSoftmax

__all__ = ["SparseAttentionMethod", "SparseSoftmax"]
