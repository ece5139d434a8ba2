"""Two sparsity methods of a user, one with a fused hook: defined, registered, and used on a small random model."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import modelopt_lite as mtsa
from modelopt_lite.kernels.language import at_least, jit, tl


@mtsa.register_sparse_method
class Strided(mtsa.SparseAttentionMethod):
    """Every ``stride``-th key behind the query, and the recent ones.

    The strided pattern of Sparse Transformers (https://arxiv.org/abs/1904.10509).
    """

    method: Literal["strided"] = "strided"
    stride: int = Field(default=4, ge=1, description="distance between kept keys, in tokens")

    def reference(self, scores: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """Keep the keys at a multiple of ``stride`` behind the query."""
        return ((q_pos - k_pos) % self.stride == 0).expand(scores.shape)


@jit
def threshold_hook(scores, q_pos, k_pos, args):  # noqa: ANN001, ANN201 - Triton
    """Keep the scores of a group of four that are at most ``args[0]`` below the largest of them."""
    a, b, c, d = scores
    least = tl.maximum(tl.maximum(a, b), tl.maximum(c, d)) - args[0]
    return at_least(a, least), at_least(b, least), at_least(c, least), at_least(d, least)


@mtsa.register_sparse_method
class Threshold(mtsa.SparseAttentionMethod):
    """Of every four consecutive keys those whose score is close to the largest of the four.

    Every key that is kept has at least ``exp(-margin)`` of the weight of the heaviest key in its group.
    """

    group_size: ClassVar[int] = 4

    method: Literal["threshold"] = "threshold"
    margin: float = Field(default=2.0, ge=0, description="how far below its group's largest score a kept one may be")

    def reference(self, scores: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """Keep the scores that are at most ``margin`` below the largest of their group."""
        return scores >= scores.amax(-1, keepdim=True) - self.margin

    def plan(self) -> mtsa.AttentionPlan:
        """Return the plan of the rule, with its fused form."""
        return dataclasses.replace(
            super().plan(), score_hook=threshold_hook, hook_args=(self.margin,), keeps_group_max=True
        )


def main() -> None:
    """Sparsify a model with one method after the other and print what each keeps."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(config).eval()
    for method in (Strided(stride=8, dense_window_size=32), Threshold(margin=0.01, dense_window_size=32)):
        mtsa.sparsify(model, mtsa.SparsityConfig(sparse_cfg={"*": method}))
        with torch.no_grad(), mtsa.collect_statistics(model) as statistics:
            model(torch.randint(256, (1, 512)))
        print(mtsa.summary(model))
        print(f"scores dropped: {statistics.total.sparsity:.1%}")
        print(f"attention mass kept: {statistics.total.mass_kept:.1%}")


if __name__ == "__main__":
    main()
