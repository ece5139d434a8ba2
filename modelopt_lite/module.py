"""The class swap that turns a model's attention module into a sparse one, and the flags the attention reads."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from .methods import SparseAttentionMethod
from .plan import DENSE, AttentionPlan

if TYPE_CHECKING:
    from .stats import LayerStatistics


@dataclass
class SparseAttentionFlags:
    """What one attention module has been told; read at every call, changed only by this package.

    Attributes:
        name: the module's dotted name in its model.
        method: its sparsity method.
        sparse_plan: the method's plan.
        enabled: whether the method applies; if not, the module is dense.
        statistics: counters to fill during prefill, or None.
    """

    name: str
    method: SparseAttentionMethod
    sparse_plan: AttentionPlan
    enabled: bool
    statistics: LayerStatistics | None = None

    @property
    def plan(self) -> AttentionPlan:
        """What the kernels run for this module now."""
        return self.sparse_plan if self.enabled else DENSE


class SparseAttentionModule(nn.Module):
    """Mixed in before a model's own attention class, which keeps its forward, its parameters and their names.

    Made by :func:`convert` and undone by :func:`revert`, never instantiated.

    Attributes:
        sparse_attention: the module's flags.
    """

    sparse_attention: SparseAttentionFlags

    def extra_repr(self) -> str:
        """Add the method to what ``print(model)`` shows."""
        flags = self.sparse_attention
        settings = ", ".join(f"{key}={value!r}" for key, value in flags.method.settings().items())
        sparse = f"sparse_attention={flags.method.method}({settings}){'' if flags.enabled else ' (off)'}"
        return ", ".join(part for part in (super().extra_repr(), sparse) if part)


@functools.cache
def _sparse_class(cls: Any) -> type[SparseAttentionModule]:
    return type(f"Sparse{cls.__name__}", (SparseAttentionModule, cls), {"__module__": cls.__module__})


def original_class(module: SparseAttentionModule) -> type[nn.Module]:
    """Return the model's own class of a sparse attention module."""
    return type(module).__mro__[2]  # behind the generated class and the mixin


def convert(module: nn.Module, flags: SparseAttentionFlags) -> None:
    """Make an attention module sparse, or give one that already is new flags."""
    if not isinstance(module, SparseAttentionModule):
        own_class: Any = type(module)
        module.__class__ = _sparse_class(own_class)
    cast(SparseAttentionModule, module).sparse_attention = flags


def revert(module: SparseAttentionModule) -> None:
    """Give an attention module back its own class."""
    own_class = original_class(module)
    del module.sparse_attention
    cast(nn.Module, module).__class__ = own_class


def sparse_modules(model: nn.Module) -> dict[str, SparseAttentionModule]:
    """Return a model's sparse attention modules by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseAttentionModule)}
