"""What every sparsity method has in common."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, TypeAlias

from pydantic import AliasChoices, Field, field_validator
from torch import Tensor

from ..kernels import Backend
from ..plan import AttentionPlan, canonical_name, find_plan, keep_plan
from ..registry import method_names
from ..schema import ConfigModel

SinkTokens: TypeAlias = Annotated[
    int,
    Field(
        ge=0,
        validation_alias=AliasChoices("num_sink_tokens", "dense_sink_tokens"),
        description="first tokens of each sequence that stay visible to every query",
    ),
]
WindowSize: TypeAlias = Annotated[
    int,
    Field(
        ge=0,
        validation_alias=AliasChoices("dense_window_size", "dense_recent_tokens"),
        description="most recent tokens of each query, itself included, that stay visible to it",
    ),
]


class SparseAttentionMethod(ConfigModel):
    """A way to make attention sparse: its configuration, its rule, and what it asks of the kernels.

    A subclass annotates ``method`` with its name (``Literal["my_method"]``), adds its fields, writes its rule as
    :meth:`reference`, and is registered with :func:`~modelopt_lite.registry.register_sparse_method`. If its rule
    decides about several keys together, it sets ``group_size``. If its rule also has a fused form, it overrides
    :meth:`plan`. Instances are immutable. Unknown fields and values of another type are refused.
    """

    group_size: ClassVar[int] = 1

    method: str = Field(description="the method's registered name")
    num_sink_tokens: SinkTokens = 0
    dense_window_size: WindowSize = 64
    backend: Backend = Field(default="auto", description="kernel to run; auto is triton on a GPU, torch elsewhere")
    enable: bool = Field(default=True, description="false: the layers are prepared, and dense until switched on")

    @field_validator("method", mode="after", check_fields=False)
    @classmethod
    def _canonical_name(cls, _: str) -> str:
        return method_names(cls)[0]

    def reference(self, scores: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """Say which scores are kept: the method's rule, without sinks and dense window, in plain PyTorch.

        Args:
            scores: ``[..., queries, groups, group_size]``, FP32 or FP64, scaled; ``-inf`` where the key is not visible.
            q_pos: ``[queries, 1, 1]``, the queries' positions in their sequence, from 0.
            k_pos: ``[groups, group_size]``, the keys' positions.

        Returns:
            Booleans of the shape of ``scores``; those at keys that are not visible are ignored.
        """
        raise NotImplementedError(f"{type(self).__name__} defines neither reference() nor plan()")

    def plan(self) -> AttentionPlan:
        """Return what the kernels run for a prefill."""
        return AttentionPlan(
            keep=self.reference,
            group=self.group_size,
            num_sink_tokens=self.num_sink_tokens,
            dense_window_size=self.dense_window_size,
        )

    def shared_plan(self) -> AttentionPlan:
        """Return :meth:`plan` with the name of this configuration; equal configurations share one object.

        ``backend`` and ``enable`` are left out of the name: they say how and whether a plan runs, not what it is.
        """
        name, found = find_plan(canonical_name(self.identity()), type(self))
        if found is not None:
            return found
        plan = self.plan()
        return keep_plan(plan, name, type(self)) if plan.is_by_hand else plan

    def identity(self) -> dict[str, Any]:
        """Return the configuration that names the plan: all but how and whether it runs."""
        return self.model_dump(mode="json", exclude={"backend", "enable"})

    def settings(self) -> dict[str, Any]:
        """Return the fields that tune the method, for tables: all but its name and the on/off switch."""
        return self.model_dump(exclude={"method", "enable"})
