"""What a variant's attention keeps of a window: of the whole, of each layer, of each head, and a picture of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from ..conversion import summary
from ..kernels import attention
from ..models.discovery import ATTENTION_NAME
from ..models.module import SparseAttentionModule, sparse_modules
from ..stats import collect_statistics
from .records import LayerShare

PATTERN_TOKENS = 160


@dataclass
class _Probe:
    """What is recorded while a model runs.

    Attributes:
        layer: name of the layer whose pattern is wanted; empty for none.
        pattern: rows of the pattern, see :func:`measure_attention`.
        head: number of the head of the pattern.
    """

    layer: str
    pattern: list[str] | None = None
    head: int = 0


@dataclass(frozen=True)
class Kept:
    """What :func:`measure_attention` found.

    Attributes:
        mass_kept: share of the dense attention mass on kept keys, mean over queries, heads and sparse layers.
        sparsity: share of the visible scores that were dropped, over all sparse layers.
        layers: one a layer.
        pattern: of one head, for each of the first :data:`PATTERN_TOKENS` queries the keys it keeps, as the bits of a
            hexadecimal number whose lowest is key 0; None without ``with_heads``.
        pattern_of: name of its layer and number of its head.
    """

    mass_kept: float
    sparsity: float
    layers: list[LayerShare]
    pattern: list[str] | None
    pattern_of: str | None


@torch.no_grad()
def measure_attention(model: PreTrainedModel, tokens: Tensor, with_heads: bool) -> Kept:
    """Run a sparse model over a window and measure what its attention keeps.

    Args:
        model: a causal model after :func:`~modelopt_lite.conversion.sparsify`.
        tokens: ``[length]``.
        with_heads: also say what each head keeps, and record a pattern, if the middle layer goes through Transformers'
            interface.
    """
    names = list(sparse_modules(model))
    probe = _Probe(names[len(names) // 2] if with_heads and names else "")
    with collect_statistics(model, exact=True) as statistics:
        if with_heads:
            with _probing(probe):
                model(tokens[None], use_cache=False, logits_to_keep=1)
        else:
            model(tokens[None], use_cache=False, logits_to_keep=1)
    heads = {
        name: [round(share, 6) for share in layer.mass_kept_by_head] if with_heads else []
        for name, layer in statistics.layers.items()
    }
    layers = [
        LayerShare(
            name=layer.name,
            class_name=layer.class_name,
            method=layer.method,
            enabled=layer.enabled,
            active=layer.active,
            mass_kept=layer.mass_kept,
            sparsity=layer.sparsity,
            heads=heads.get(layer.name) or None,
        )
        for layer in summary(model, statistics)
    ]
    pattern_of = f"{probe.layer}, head {probe.head}" if probe.pattern else None
    return Kept(statistics.total.mass_kept, statistics.total.sparsity, layers, probe.pattern, pattern_of)


@contextmanager
def _probing(probe: _Probe) -> Iterator[None]:
    """Record this package's attention calls inside the ``with`` block; their results stay the same."""
    run = AttentionInterface()[ATTENTION_NAME]

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if (
            isinstance(module, SparseAttentionModule)
            and module.sparse_attention.enabled
            and module.sparse_attention.name == probe.layer
        ):
            _record(probe, module, query[0].transpose(0, 1), key[0].transpose(0, 1), kwargs)
        return cast("tuple[Tensor, None]", run(module, query, key, value, mask, **kwargs))

    AttentionInterface.register(ATTENTION_NAME, forward)
    try:
        yield
    finally:
        AttentionInterface.register(ATTENTION_NAME, run)


def _record(probe: _Probe, module: SparseAttentionModule, q: Tensor, k: Tensor, kwargs: dict[str, Any]) -> None:
    """Record which keys a head keeps; ``q`` and ``k`` are ``[tokens, heads, dim]`` of one sequence."""
    probe.head = q.shape[1] // 2
    group = q.shape[1] // k.shape[1]
    q = q[:PATTERN_TOKENS, probe.head : probe.head + 1].float()
    k = k[:PATTERN_TOKENS, probe.head // group : probe.head // group + 1].float()
    # With the identity as values, the output is the weights; those of keys that are not kept are exactly 0.
    identity = torch.eye(k.shape[0], device=k.device)[:, None]
    start, length = (torch.tensor([x], dtype=torch.int32, device=q.device) for x in (0, q.shape[0]))
    weights = attention(
        q,
        k,
        identity,
        start,
        length,
        q.shape[0],
        plan=module.sparse_attention.sparse_plan,
        softmax_scale=kwargs.get("scaling"),
        sliding_window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        backend="torch",
    )
    rows = (cast(Tensor, weights)[:, 0] > 0).tolist()
    probe.pattern = [f"{sum(bit << j for j, bit in enumerate(row)):x}" for row in rows]
