"""A sparsity method of one's own: defined, registered, and used on a small random model."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import modelopt_lite as mtsa


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


def main() -> None:
    """Sparsify a model with the method and print what it keeps."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(config).eval()
    strided = Strided(stride=8, dense_window_size=32)
    mtsa.sparsify(model, mtsa.SparsityConfig(sparse_cfg={"*": strided}))
    with torch.no_grad(), mtsa.collect_statistics(model) as statistics:
        model(torch.randint(256, (1, 512)))
    print(mtsa.summary(model))
    print(f"scores dropped: {statistics.total.sparsity:.1%}")
    print(f"attention mass kept: {statistics.total.mass_kept:.1%}")


if __name__ == "__main__":
    main()
