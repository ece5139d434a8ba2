"""Methods with one number that says how much is skipped, which a calibration can choose from a target sparsity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..plan import LengthCurve
from ..schema import ConfigModel
from .blocks import GridMethod

Scale: TypeAlias = Literal["log", "loglog", "linear"]

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

    lowest: float | None = Field(default=None, ge=0, le=1, description="least sparsity among the points of the fit")
    highest: float | None = Field(default=None, ge=0, le=1, description="largest sparsity among the points of the fit")
    error: float | None = Field(
        default=None, ge=0, description="root mean square of the points' sparsity from what the fit says"
    )

    def curve(self, target: float) -> LengthCurve:
        """Return the knob, on its scale, by length.

        Args:
            target: share of the blocks that are to be skipped, > 0 and < 1.
        """
        raise NotImplementedError


class ExponentialFit(Fit):
    """``knob = a * exp(b * target) / length``: the form of NVIDIA Model-Optimizer's calibration of skip-softmax."""

    form: Literal["exponential"] = Field(description="always exponential")
    a: float = Field(gt=0, description="the knob times the length at target 0")
    b: float = Field(gt=0, description="growth of its logarithm with the target")

    def curve(self, target: float) -> LengthCurve:
        """Return the logarithm of the knob by length."""
        return LengthCurve(math.log(self.a) + self.b * target, -1.0)


class LogitFit(Fit):
    """``g(knob) = c0 + c1 * u + c2 * x + c3 * u * x`` with ``u = ln(target / (1 - target))`` and ``x = ln(length)``.

    ``g`` is the logarithm for the ``threshold`` of skip_softmax and the ``alpha`` of flash_prefill, ``ln(-ln(x))`` for
    the ``threshold`` of xattention, and the number itself for the ``keep`` of mean_pool_top_k. Lengths outside of
    ``shortest`` to ``longest`` count as these, so that nothing is extrapolated.
    """

    form: Literal["logit"] = Field(description="always logit")
    coefficients: tuple[float, float, float, float] = Field(strict=False, description="c0, c1, c2, c3")
    shortest: float = Field(ge=1, description="shortest length of the fit, in tokens")
    longest: float = Field(ge=1, description="longest length of the fit, in tokens")

    def curve(self, target: float) -> LengthCurve:
        """Return the knob on its scale by length."""
        c0, c1, c2, c3 = self.coefficients
        u = math.log(target / (1 - target))
        return LengthCurve(c0 + c1 * u, c2 + c3 * u, self.shortest, self.longest)


AnyFit: TypeAlias = Annotated[ExponentialFit | LogitFit, Field(discriminator="form")]


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
                f"Input should have a calibration of the form 'logit', as {self.knob.field} has no logarithmic scale"
            )
        return self

    def knob_curve(self) -> LengthCurve | None:
        """Return the knob on its scale by length, None without a calibration."""
        if self.calibration is None or self.target_sparsity is None:
            return None
        return self.calibration.prefill.curve(self.target_sparsity)

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
