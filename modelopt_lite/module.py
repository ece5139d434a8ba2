"""The class swap that turns a model's attention module into a sparse one, and the flags the attention reads."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .errors import UnsupportedError
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
        reached: whether this package's attention has been called since the module's forward began.
        active: whether its last eager forward called it; None before the first.
        reported: whether an eager forward without such a call has been reported.
        hooks: what takes the check away again.
    """

    name: str
    method: SparseAttentionMethod
    sparse_plan: AttentionPlan
    enabled: bool
    statistics: LayerStatistics | None = None
    reached: bool = False
    active: bool | None = None
    reported: bool = False
    hooks: tuple[RemovableHandle, ...] = ()

    @property
    def plan(self) -> AttentionPlan:
        """What the kernels run for this module now."""
        return self.sparse_plan if self.enabled else DENSE


class SparseAttentionModule(nn.Module):
    """Mixed in before a model's own attention class, which keeps its forward, its parameters and their names.

    Made by :func:`convert` and undone by :func:`revert`, never instantiated.

    Attributes:
        model_class: the model's own class.
        sparse_attention: the module's flags.
    """

    model_class: ClassVar[type[nn.Module]]
    sparse_attention: SparseAttentionFlags

    def extra_repr(self) -> str:
        """Add the method to what ``print(model)`` shows."""
        flags = self.sparse_attention
        settings = ", ".join(f"{key}={value!r}" for key, value in flags.method.settings().items())
        sparse = f"sparse_attention={flags.method.method}({settings}){'' if flags.enabled else ' (off)'}"
        return ", ".join(part for part in (super().extra_repr(), sparse) if part)


@functools.cache
def _sparse_class(mixin: Any, cls: Any) -> type[SparseAttentionModule]:
    return type(f"Sparse{cls.__name__}", (mixin, cls), {"__module__": cls.__module__, "model_class": cls})


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the model's own class of a module, sparse or not."""
    return type(module).model_class if isinstance(module, SparseAttentionModule) else type(module)


def convert(
    module: nn.Module, flags: SparseAttentionFlags, mixin: type[SparseAttentionModule] = SparseAttentionModule
) -> None:
    """Make a dense attention module sparse."""
    bases: tuple[Any, Any] = (mixin, type(module))
    module.__class__ = _sparse_class(*bases)
    flags.hooks = (module.register_forward_pre_hook(_begin), module.register_forward_hook(_report_bypass))
    cast(SparseAttentionModule, module).sparse_attention = flags


def _begin(module: nn.Module, _args: Any) -> None:
    # A forward that raised, or a compiled one that was called without hooks, may have left it set.
    cast(SparseAttentionModule, module).sparse_attention.reached = False


def _report_bypass(module: nn.Module, _args: Any, _output: Any) -> None:
    """Note after a forward whether the layer called this package's attention, and report once if not."""
    flags = cast(SparseAttentionModule, module).sparse_attention
    bypassed = flags.enabled and not flags.reached
    if torch.compiler.is_compiling():
        # Of the flags only ``reached`` may change, and must be as before in the end: in a traced graph whose
        # activations are checkpointed the compiler allows no more.
        if bypassed:
            _warn_of_bypass(flags.name, original_class(module).__name__)
    else:
        if bypassed and not flags.reported:
            flags.reported = True
            _warn_of_bypass(flags.name, original_class(module).__name__)
        flags.active = flags.reached
    flags.reached = False


def _warn_of_bypass(name: str, class_name: str) -> None:
    logger.warning(
        "%s (%s) is matched and switched on, but its forward did not call this package's attention: it was dense",
        name,
        class_name,
    )


# The compiler calls it while it traces, once for each graph.
torch.compiler.assume_constant_result(_warn_of_bypass)


def check_revertible(model: nn.Module) -> None:
    """Check that each of a model's sparse attention modules can be given back its own class.

    Raises:
        UnsupportedError: if something else has swapped a module's class since, as ``fully_shard`` does; names it.
    """
    for name, module in sparse_modules(model).items():
        if "model_class" not in vars(type(module)):
            raise UnsupportedError(
                f"{name} ({original_class(module).__name__}): its sparsity cannot be undone, because something else, "
                f"such as fully_shard, has made it a {type(module).__name__}; undo that first, or do it before sparsify"
            )


def revert(module: SparseAttentionModule) -> None:
    """Give an attention module back its own class."""
    for hook in module.sparse_attention.hooks:
        hook.remove()
    del module.sparse_attention
    cast(nn.Module, module).__class__ = original_class(module)


def sparse_modules(model: nn.Module) -> dict[str, SparseAttentionModule]:
    """Return a model's sparse attention modules by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseAttentionModule)}
