"""Several methods at once: one that chooses blocks, one rule inside them, one that skips."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, PlainValidator, SerializeAsAny, model_validator
from pydantic.json_schema import SkipJsonSchema

from ..errors import ConfigError
from ..kernels import Backend
from ..plan import DENSE, AttentionPlan
from ..registry import get_sparse_method, list_sparse_methods, register_sparse_method
from ..schema import field_errors
from .base import SinkTokens, SparseAttentionMethod, WindowSize

KINDS = {
    "blocks": "choose blocks of keys",
    "keep": "choose keys within a group",
    "skip": "skip blocks by their scores",
}
"""What a plan can say, by the field of the plan that says it."""


def _method(value: object) -> SparseAttentionMethod:
    if isinstance(value, SparseAttentionMethod):
        return value
    if not isinstance(value, dict) or "method" not in value:
        raise ValueError("Input should be a mapping with 'method'")
    try:
        cls: type[SparseAttentionMethod] = get_sparse_method(value["method"])
    except ConfigError:
        allowed = f"Input should be one of those installed: {', '.join(list_sparse_methods())}"
        raise field_errors("method", {"method": (value["method"], allowed)}) from None
    return cls.model_validate(value)


Part: TypeAlias = Annotated[SerializeAsAny[SparseAttentionMethod], PlainValidator(_method)]


@register_sparse_method
class Combined(SparseAttentionMethod):
    """Methods that work together; in a configuration, a list of them stands for this.

    At most one may choose blocks, one may be a rule for the keys within a group, and one may skip blocks by their
    scores. A key is kept if all of them keep it, or if one of them says that it is a sink or in the dense window.
    """

    method: Literal["combined"] = Field(default="combined", description="the method's name")
    methods: tuple[Part, ...] = Field(
        strict=False,
        json_schema_extra={"minItems": 2},  # min_length would also complain of lists with a part that is wrong
        description="the methods, one of each kind at most",
    )
    num_sink_tokens: SkipJsonSchema[SinkTokens] = Field(
        default=0, exclude=True, description="the most that any of the methods has"
    )
    dense_window_size: SkipJsonSchema[WindowSize] = Field(
        default=0, exclude=True, description="the most that any of the methods has"
    )
    backend: SkipJsonSchema[Backend] = Field(default="auto", exclude=True, description="that of the methods")
    enable: SkipJsonSchema[bool] = Field(default=True, exclude=True, description="that of the methods")

    @model_validator(mode="before")
    @classmethod
    def _refuse_fields_of_methods(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        derived = {"num_sink_tokens", "dense_window_size", "backend", "enable"} & set(value)
        if derived:
            allowed = "Input should be set in the methods of the list, not beside them"
            raise field_errors(cls.__name__, {name: (value[name], allowed) for name in sorted(derived)})
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> Combined:
        if len(self.methods) < 2:
            raise ValueError("Input should be a list of at least two methods")
        reason = _misfit(self.methods)
        if reason is not None:
            raise ValueError(f"Input should be methods that fit together: {reason}")
        values = {
            "num_sink_tokens": max(part.num_sink_tokens for part in self.methods),
            "dense_window_size": max(part.dense_window_size for part in self.methods),
            "backend": self.methods[0].backend,
            "enable": self.methods[0].enable,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        return self

    def plan(self) -> AttentionPlan:
        """Return the plan of all methods together."""
        plans = [part.shared_plan() for part in self.methods]
        rule = next((plan for plan in plans if plan.keep is not None), DENSE)
        return dataclasses.replace(
            rule,
            blocks=next((plan.blocks for plan in plans if plan.blocks is not None), None),
            skip=next((plan.skip for plan in plans if plan.skip is not None), None),
            num_sink_tokens=self.num_sink_tokens,
            dense_window_size=self.dense_window_size,
            sparse_decode=any(plan.sparse_decode for plan in plans),
        )

    def identity(self) -> dict[str, Any]:
        """Return the configuration without what says how and whether the methods run."""
        return {"method": self.method, "methods": [part.identity() for part in self.methods]}

    def settings(self) -> dict[str, Any]:
        """Return the fields that tune the methods, each with its method's name before it."""
        return {f"{part.method}.{name}": value for part in self.methods for name, value in part.settings().items()}


def _misfit(parts: tuple[SparseAttentionMethod, ...]) -> str | None:
    """Say why methods do not fit together, or None if they do."""
    plans = [(part, part.shared_plan()) for part in parts]
    if any(isinstance(part, Combined) for part in parts):
        return "a combination is not a part of another one"
    for (one, plan), (other, other_plan) in combinations(plans, 2):
        for kind, what in KINDS.items():
            if getattr(plan, kind) is not None and getattr(other_plan, kind) is not None:
                return f"{one.method} and {other.method} both {what}, which one alone can do"
        for name in ("backend", "enable"):
            if getattr(one, name) != getattr(other, name):
                return f"{one.method} and {other.method} have a different {name}, but run together"
        if plan.sparse_decode != other_plan.sparse_decode and not (plan.is_dense or other_plan.is_dense):
            return f"of {one.method} and {other.method}, one is sparse in decode and the other dense"
    for part, plan in plans:
        if plan.keeps_nothing:
            return (
                f"{part.method} keeps sinks and dense window alone; set num_sink_tokens and dense_window_size instead"
            )
    grids = {
        part.method: (grid.block_size, grid.block_rows)
        for part, plan in plans
        if (grid := plan.blocks or plan.skip) is not None
    }
    if len(set(grids.values())) > 1:
        found = ", ".join(f"{size} and {rows} ({method})" for method, (size, rows) in grids.items())
        return f"block_size and block_rows are {found}, and must be the same"
    return None
