"""Triton's decorator and language for hooks, importable where Triton is not installed.

Hooks are defined beside their PyTorch twins, and those must work on every machine. Without Triton, ``jit`` leaves a
function as it is; nothing can launch it there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton publishes no package for this platform
    triton = None
    tl = None


def jit(function: Function) -> Function:
    """Make a hook out of a function: ``triton.jit``, or nothing without Triton."""
    return function if triton is None else triton.jit(function)


__all__ = ["jit", "tl"]
