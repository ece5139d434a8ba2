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
Phase: TypeAlias = Literal["prefill", "decode"]
"""Decode is a call with a single query of a sequence."""
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
        target: name of the field that takes its place in a calibrated method.
    """

    field: str
    scale: Scale
    values: tuple[float, ...]
    high: float = math.inf
    target: str = "target_sparsity"

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
    """How a method's knobs follow from target sparsities; what :func:`~modelopt_lite.calibrate` measured."""

    prefill: AnyFit | None = Field(default=None, description="the fit for prefill")
    decode: AnyFit | None = Field(default=None, description="the fit for decode steps")

    @model_validator(mode="after")
    def _not_empty(self) -> Calibration:
        if self.prefill is None and self.decode is None:
            raise ValueError("Input should have prefill or decode")
        return self


class CalibratedMethod(GridMethod):
    """A method that decides about blocks of keys by one number, its knob; in decode by another one, if at all.

    With a calibration the knob follows from ``target_sparsity`` and from the length of each query block, and the
    knob's own field is not used. The length is that of :class:`~modelopt_lite.plan.LengthCurve`.
    """

    knob: ClassVar[Knob]
    decode_knob: ClassVar[Knob | None] = None

    target_sparsity: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of the key blocks that is to be skipped; needs a calibration, and takes the knob's place",
    )
    calibration: Calibration | None = Field(
        default=None, description="how the knob follows from target_sparsity, as modelopt_lite.calibrate measured it"
    )

    @classmethod
    def knobs(cls) -> dict[Phase, Knob]:
        """Return the knob of each phase in which the method can be sparse."""
        return {"prefill": cls.knob} if cls.decode_knob is None else {"prefill": cls.knob, "decode": cls.decode_knob}

    @model_validator(mode="after")
    def _target_and_calibration(self) -> CalibratedMethod:
        if self.decode_knob is None and self.fit("decode") is not None:
            raise ValueError(f"Input should have no calibration.decode, because {self.method} is dense in decode")
        for phase, knob in self.knobs().items():
            fit = self.fit(phase)
            if (getattr(self, knob.target) is None) != (fit is None):
                raise ValueError(
                    f"Input should have {knob.target} and calibration.{phase} together; modelopt_lite.calibrate sets "
                    "both"
                )
            if isinstance(fit, ExponentialFit) and knob.scale != "log":
                raise ValueError(
                    f"Input should have a calibration of the form 'table', as {knob.field} has no logarithmic scale"
                )
            try:
                self.knob_curve(phase)
            except ValueError:
                raise ValueError(f"Input should have values of {knob.field} as calibration.{phase}.knobs") from None
        return self

    def fit(self, phase: Phase = "prefill") -> ExponentialFit | TableFit | None:
        """Return the calibration of a phase, None without one."""
        found: ExponentialFit | TableFit | None = None if self.calibration is None else getattr(self.calibration, phase)
        return found

    def knob_curve(self, phase: Phase = "prefill") -> LengthCurve | None:
        """Return a phase's knob on its scale by length, None without a calibration."""
        fit = self.fit(phase)
        if fit is None:
            return None
        knob = self.knobs()[phase]
        return fit.curve(getattr(self, knob.target), knob)

    def knob_of(self, seen: Tensor, dtype: torch.dtype) -> float | Tensor:
        """Return the knob of query blocks in prefill.

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

    def with_knob(self, value: float, phase: Phase = "prefill") -> CalibratedMethod:
        """Return the same method with a phase's knob at a value, without a calibration.

        Args:
            value: may lie outside of what the knob's field allows, as a calibration's may.
            phase: whose knob it is.
        """
        targets = {knob.target: None for knob in self.knobs().values()}
        return self.model_copy(update={**targets, "calibration": None, self.knobs()[phase].field: value})

    def with_target(self, target: float, phase: Phase = "prefill", fit: Fit | None = None) -> CalibratedMethod:
        """Return the same method with another target in a phase.

        Args:
            target: share of the blocks that is to be skipped, > 0 and < 1.
            phase: whose target it is.
            fit: the phase's calibration, by default that which it has.
        """
        fits = {} if self.calibration is None else dict(self.calibration)
        calibration = Calibration(**{**fits, phase: fit or self.fit(phase)})
        content = {**self.model_dump(), self.knobs()[phase].target: target, "calibration": calibration}
        return type(self)(**content)

    def settings(self) -> dict[str, Any]:
        """Return the fields that tune the method; with a calibration its target instead of the knob."""
        unused = {"calibration"}
        for phase, knob in self.knobs().items():
            unused.add(knob.target if self.fit(phase) is None else knob.field)
        return {name: x for name, x in super().settings().items() if name not in unused}
