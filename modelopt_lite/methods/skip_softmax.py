"""Skip-softmax: key blocks that weigh next to nothing for all queries of a block."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import AliasChoices, Field

from ..plan import AttentionPlan, SkipRule
from ..registry import register_sparse_method
from .base import SinkTokens, WindowSize
from .calibrated import CalibratedMethod, Knob

Threshold = Annotated[
    float,
    Field(
        gt=0,
        lt=1,
        validation_alias=AliasChoices("threshold", "skip_softmax_threshold"),
        description="what a skipped key may weigh at most, relative to its query's heaviest key",
    ),
]


@register_sparse_method
class SkipSoftmax(CalibratedMethod):
    """Skip-softmax: a block of keys is skipped if all its scores lie far enough below what each query has elsewhere.

    A query's reference is its largest score among the sinks, its dense window and the diagonal blocks. A key block is
    skipped for a query block if, for each of these queries, all other scores lie below ``reference + ln(threshold)``.
    So no skipped key weighs more than ``threshold`` times its query's heaviest key.

    The published form (BLASST, https://arxiv.org/abs/2512.12087, and NVIDIA Model-Optimizer's
    ``triton_skip_softmax``) compares with the maximum of the tiles computed so far, so that its result depends on the
    order and the size of tiles. Here it depends on neither, and sinks and dense window stay exact. Sinks matter as
    references: without any, many queries see their heaviest key too late, and fewer blocks are skipped.

    With ``decode_threshold`` or ``decode_target_sparsity`` decode steps skip as well, against the sinks, the dense
    window and the keys of their own query block.
    """

    knob: ClassVar[Knob] = Knob("threshold", "log", tuple(10 ** (0.25 * i - 8) for i in range(37)))
    decode_knob: ClassVar[Knob | None] = replace(knob, field="decode_threshold", target="decode_target_sparsity")

    method: Literal["skip_softmax", "triton_skip_softmax", "flash_skip_softmax"] = Field(
        default="skip_softmax", description="the method's name; the others are Model-Optimizer's"
    )
    num_sink_tokens: SinkTokens = 4
    dense_window_size: WindowSize = 0
    threshold: Threshold = 0.03
    decode_threshold: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="the threshold of decode steps, which are dense without one or a target of their own",
    )
    decode_target_sparsity: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of the key blocks that decode steps are to skip; needs a calibration of decode, and takes "
        "the place of decode_threshold",
    )

    def plan(self) -> AttentionPlan:
        """Return the plan of the skip rule."""
        curve, decode = self.knob_curve(), self.knob_curve("decode")
        rule = SkipRule(
            self.threshold if curve is None else curve,
            self.block_size,
            self.block_rows,
            self.decode_threshold if decode is None else decode,
        )
        return AttentionPlan(
            skip=rule,
            num_sink_tokens=self.num_sink_tokens,
            dense_window_size=self.dense_window_size,
            sparse_decode=rule.decode_threshold is not None,
        )
