"""Methods with one number that says how much is skipped, which a calibration can choose from a target sparsity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..plan import LengthCurve
from ..schema import ConfigModel
from .blocks import GridMethod

Scale: TypeAlias = Literal["log", "loglog", "linear"]
Row: TypeAlias = Annotated[tuple[float, ...], Field(strict=False)]

LONGEST = 2.0**40
"""Up to this length the exponential form is followed."""

_TRANSFORMS: dict[Scale, Callable[[float], float]] = {
    "log": math.log,
    "loglog": lambda x: math.log(-math.log(x)),
    "linear": float,
}
_INVERSES: dict[Scale, Callable[[Tensor], Tensor]] = {
    "log": torch.exp,
    "loglog": lambda y: (-y.exp()).exp(),
    "linear": torch.clone,
}


@dataclass(frozen=True)
class Knob:
    """The field of a method that says how much is skipped.

    Attributes:
        field: its name.
        scale: on which a fit is linear.
        values: what a calibration tries, ascending.
        high: the largest value that means anything.
    """

    field: str
    scale: Scale
    values: tuple[float, ...]
    high: float = math.inf

    def transform(self, value: float) -> float:
        """Return a value on the scale of the fit."""
        return _TRANSFORMS[self.scale](value)

    def inverse(self, values: Tensor) -> Tensor:
        """Undo :meth:`transform`; what lies beyond the largest value becomes the largest."""
        return _INVERSES[self.scale](values).clamp(max=self.high)


class Fit(ConfigModel):
    """What a calibration found: how the knob follows from a target sparsity and the length."""

    lowest: float | None = Field(default=None, ge=0, le=1, description="least sparsity that values of the knob gave")
    highest: float | None = Field(default=None, ge=0, le=1, description="largest sparsity that values of the knob gave")
    error: float | None = Field(
        default=None,
        ge=0,
        description="root mean square of the difference between the target and what single windows skip with the fit",
    )

    def curve(self, target: float, knob: Knob) -> LengthCurve:
        """Return the knob, on its scale, by length.

        Args:
            target: share of the blocks that is to be skipped, > 0 and < 1.
            knob: which one it is.
        """
        raise NotImplementedError


class ExponentialFit(Fit):
    """``knob = a * exp(b * target) / length``: the form of NVIDIA Model-Optimizer's calibration of skip-softmax."""

    form: Literal["exponential"] = Field(description="always exponential")
    a: float = Field(gt=0, description="the knob times the length at target 0")
    b: float = Field(gt=0, description="growth of its logarithm with the target")

    def curve(self, target: float, knob: Knob) -> LengthCurve:
        """Return the logarithm of the knob by length."""
        start = math.log(self.a) + self.b * target
        return LengthCurve((1.0, LONGEST), (start, start - math.log(LONGEST)))


class TableFit(Fit):
    """The knob at some lengths and targets. Between them it is interpolated on its scale, and along ``ln(length)``.

    Lengths and targets outside of the table count as those at its edge, so that nothing is extrapolated.
    """

    form: Literal["table"] = Field(description="always table")
    lengths: Row = Field(description="lengths in tokens, ascending")
    targets: Row = Field(description="shares of blocks that are skipped, ascending")
    knobs: Annotated[tuple[Row, ...], Field(strict=False)] = Field(
        description="for each length the knob at each target"
    )

    @model_validator(mode="after")
    def _shape(self) -> TableFit:
        for name, row in (("lengths", self.lengths), ("targets", self.targets)):
            if not row or any(low >= high for low, high in pairwise(row)):
                raise ValueError(f"Input should have {name} that ascend")
        if self.lengths[0] < 1 or [len(row) for row in self.knobs] != [len(self.targets)] * len(self.lengths):
            raise ValueError("Input should have lengths >= 1, and in knobs a number for each length and target")
        return self

    def curve(self, target: float, knob: Knob) -> LengthCurve:
        """Return the knob on its scale by length."""
        targets = self.targets
        target = min(max(target, targets[0]), targets[-1])
        after = next(i for i, x in enumerate(targets) if target <= x)
        before = max(0, after - 1)
        share = (target - targets[before]) / (targets[after] - targets[before]) if after else 0.0
        rows = [[knob.transform(row[i]) for i in (before, after)] for row in self.knobs]
        return LengthCurve(self.lengths, tuple(low + (high - low) * share for low, high in rows))


AnyFit: TypeAlias = Annotated[ExponentialFit | TableFit, Field(discriminator="form")]


class Calibration(ConfigModel):
    """How a method's knob follows from a target sparsity; what :func:`~modelopt_lite.calibrate` measured."""

    prefill: AnyFit = Field(description="the fit for prefill")


class CalibratedMethod(GridMethod):
    """A method that decides about blocks of keys by one number, its knob.

    With a calibration the knob follows from ``target_sparsity`` and from the length of each query block, and the
    knob's own field is not used. The length is that of :class:`~modelopt_lite.plan.LengthCurve`.
    """

    knob: ClassVar[Knob]

    target_sparsity: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of the key blocks that is to be skipped; needs a calibration, and takes the knob's place",
    )
    calibration: Calibration | None = Field(
        default=None, description="how the knob follows from target_sparsity, as modelopt_lite.calibrate measured it"
    )

    @model_validator(mode="after")
    def _target_and_calibration(self) -> CalibratedMethod:
        if (self.target_sparsity is None) != (self.calibration is None):
            raise ValueError(
                "Input should have target_sparsity and calibration together; modelopt_lite.calibrate sets both"
            )
        if self.calibration is not None and self.calibration.prefill.form == "exponential" and self.knob.scale != "log":
            raise ValueError(
                f"Input should have a calibration of the form 'table', as {self.knob.field} has no logarithmic scale"
            )
        try:
            self.knob_curve()
        except ValueError:
            raise ValueError(f"Input should have values of {self.knob.field} as calibration.prefill.knobs") from None
        return self

    def knob_curve(self) -> LengthCurve | None:
        """Return the knob on its scale by length, None without a calibration."""
        if self.calibration is None or self.target_sparsity is None:
            return None
        return self.calibration.prefill.curve(self.target_sparsity, self.knob)

    def knob_of(self, seen: Tensor, dtype: torch.dtype) -> float | Tensor:
        """Return the knob of query blocks.

        Args:
            seen: where any query sees any key, ``[query_blocks, key_blocks]``.
            dtype: type in which it is needed.

        Returns:
            The number in the knob's own field, or with a calibration ``[query_blocks, 1]``.
        """
        curve = self.knob_curve()
        if curve is None:
            value: float = getattr(self, self.knob.field)
            return value
        return self.knob.inverse(curve.at(seen.sum(-1, keepdim=True) * self.block_size)).to(dtype)

    def with_knob(self, value: float) -> CalibratedMethod:
        """Return the same method with the knob at a value, without a calibration.

        Args:
            value: may lie outside of what the knob's field allows, as a calibration's may.
        """
        return self.model_copy(update={self.knob.field: value, "target_sparsity": None, "calibration": None})

    def settings(self) -> dict[str, Any]:
        """Return the fields that tune the method; with a calibration its target instead of the knob."""
        unused = {"target_sparsity"} if self.calibration is None else {self.knob.field}
        return {name: x for name, x in super().settings().items() if name not in unused | {"calibration"}}
