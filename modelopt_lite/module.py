"""The class swap that turns a model's attention module into a sparse one, and the flags the attention reads."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .methods import SparseAttentionMethod
from .plan import DENSE, AttentionPlan

if TYPE_CHECKING:
    from .stats import LayerStatistics

logger = logging.getLogger(__name__)


@dataclass
class SparseAttentionFlags:
    """What one attention module has been told; read at every call, changed only by this package.

    Attributes:
        name: the module's dotted name in its model.
        method: its sparsity method.
        sparse_plan: the method's plan.
        enabled: whether the method applies; if not, the module is dense.
        statistics: counters to fill during prefill, or None.
        reached: whether this package's attention has been called since the module's last forward ended.
        active: whether its last forward called it; None before the first.
        reported: whether a forward without such a call has been reported.
        hook: what takes the report away again.
    """

    name: str
    method: SparseAttentionMethod
    sparse_plan: AttentionPlan
    enabled: bool
    statistics: LayerStatistics | None = None
    reached: bool = False
    active: bool | None = None
    reported: bool = False
    hook: RemovableHandle | None = None

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
def _sparse_class(mixin: Any, cls: Any) -> type[SparseAttentionModule]:
    return type(f"Sparse{cls.__name__}", (mixin, cls), {"__module__": cls.__module__})


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the model's own class of a module, sparse or not."""
    # The generated class has two bases, the mixin and the model's own.
    return type(module).__bases__[1] if isinstance(module, SparseAttentionModule) else type(module)


def convert(
    module: nn.Module, flags: SparseAttentionFlags, mixin: type[SparseAttentionModule] = SparseAttentionModule
) -> None:
    """Make an attention module sparse, or give one that already is new flags."""
    if isinstance(module, SparseAttentionModule):
        revert(module)
    bases: tuple[Any, Any] = (mixin, type(module))
    module.__class__ = _sparse_class(*bases)
    flags.hook = module.register_forward_hook(_report_bypass)
    cast(SparseAttentionModule, module).sparse_attention = flags


def _report_bypass(module: nn.Module, _args: Any, _output: Any) -> None:
    """Note after a forward whether the layer called this package's attention, and report once if not."""
    if torch.compiler.is_compiling():
        return
    flags = cast(SparseAttentionModule, module).sparse_attention
    if flags.enabled and not flags.reached and not flags.reported:
        flags.reported = True
        logger.warning(
            "%s (%s) is matched and switched on, but its forward did not call this package's attention: it was dense",
            flags.name,
            original_class(module).__name__,
        )
    flags.active, flags.reached = flags.reached, False


def revert(module: SparseAttentionModule) -> None:
    """Give an attention module back its own class."""
    own_class = original_class(module)
    if module.sparse_attention.hook is not None:
        module.sparse_attention.hook.remove()
    del module.sparse_attention
    cast(nn.Module, module).__class__ = own_class


def sparse_modules(model: nn.Module) -> dict[str, SparseAttentionModule]:
    """Return a model's sparse attention modules by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseAttentionModule)}
