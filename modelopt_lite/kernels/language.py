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


def constexpr(value: Any) -> Any:
    """Make a constant that hooks may read: ``triton.language.constexpr``, or the value itself without Triton."""
    return value if triton is None else tl.constexpr(value)


INTERPRETED = constexpr(triton is not None and triton.knobs.runtime.interpret)


@jit
def at_least(x, y):
    """Compare two FP32 tiles: 1.0 where ``x >= y``, else 0.0, in one instruction instead of three."""
    if INTERPRETED:
        flag = (x >= y).to(tl.float32)
    else:
        flag = tl.inline_asm_elementwise(
            "set.ge.f32.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )
    return flag


@jit
def more_than(x, y):
    """Compare two FP32 tiles: 1.0 where ``x > y``, else 0.0, in one instruction instead of three."""
    if INTERPRETED:
        flag = (x > y).to(tl.float32)
    else:
        flag = tl.inline_asm_elementwise(
            "set.gt.f32.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )
    return flag


LOP3 = constexpr(tuple(f"lop3.b32 $0, $1, $2, $3, {table};" for table in range(256)))


@jit
def combine(x, y, z, TABLE):
    """Combine three tiles of flags made by comparisons, in one instruction: bit ``4 * x + 2 * y + z`` of ``TABLE``.

    ``TABLE`` is even, as flags are numbers and all but the bits of 1.0 have to stay 0.
    """
    if INTERPRETED:
        index = (4.0 * x + 2.0 * y + z).to(tl.int32)
        flag = (((index * 0 + TABLE) >> index) & 1).to(tl.float32)
    else:
        flag = tl.inline_asm_elementwise(LOP3[TABLE], "=f,f,f,f", [x, y, z], dtype=tl.float32, is_pure=True, pack=1)
    return flag


@jit
def dropped(flag):
    """Say of a place that it is dropped where ``flag`` is 1.0, and kept where it is 0.0."""
    return flag.to(tl.int32, bitcast=True)


@jit
def less_share(x, share):
    """Return ``x - x * share`` in one instruction; the compiler would spend another one on the sign."""
    if INTERPRETED:
        rest = x - x * share
    else:
        rest = tl.inline_asm_elementwise(
            "{ .reg .f32 n; neg.f32 n, $2; fma.rn.f32 $0, $1, n, $1; }", "=f,f,f", [x, share],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return rest


__all__ = [
    "INTERPRETED", "at_least", "combine", "constexpr", "dropped", "jit", "less_share", "more_than", "tl",
]  # fmt: skip
