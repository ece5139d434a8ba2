"""Triton's decorator and language for hooks, importable where Triton is not installed.

Hooks are defined beside their PyTorch twins, and those must work on every machine. Without Triton, ``jit`` leaves a
function as it is; nothing can launch it there.
"""

from __future__ import annotations

try:
    import triton.language as tl
    from triton import jit
except ImportError:  # Triton publishes no package for this platform
    tl = None

    def jit(fn):  # type: ignore[no-untyped-def]
        """Return ``fn`` unchanged."""
        return fn


__all__ = ["jit", "tl"]
