"""What a variant's attention keeps of a window: of the whole, of each layer, of each head, and a picture of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from ..conversion import summary
from ..discovery import ATTENTION_NAME
from ..kernels import attention
from ..module import SparseAttentionModule, sparse_modules
from ..plan import AttentionPlan
from ..stats import collect_statistics
from .records import LayerShare

PATTERN_TOKENS = 160


@dataclass
class _Probe:
    """What is recorded while a model runs.

    Attributes:
        pattern_layer: name of the layer whose pattern is wanted.
        heads: by layer, the mass that each query head keeps.
        pattern: rows of the pattern, see :func:`measure_attention`.
        head: number of the head of the pattern.
    """

    pattern_layer: str
    heads: dict[str, list[float]] = field(default_factory=dict)
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
        with_heads: also measure heads and record a pattern, of the layers that go through Transformers' interface.
    """
    names = list(sparse_modules(model))
    probe = _Probe(names[len(names) // 2] if with_heads and names else "")
    with collect_statistics(model) as statistics:
        if with_heads:
            with _probing(probe):
                model(tokens[None], use_cache=False, logits_to_keep=1)
        else:
            model(tokens[None], use_cache=False, logits_to_keep=1)
    layers = [
        LayerShare(
            name=layer.name,
            class_name=layer.class_name,
            method=layer.method,
            enabled=layer.enabled,
            active=layer.active,
            mass_kept=layer.mass_kept,
            sparsity=layer.sparsity,
            heads=probe.heads.get(layer.name),
        )
        for layer in summary(model, statistics)
    ]
    pattern_of = f"{probe.pattern_layer}, head {probe.head}" if probe.pattern else None
    return Kept(statistics.total.mass_kept, statistics.total.sparsity, layers, probe.pattern, pattern_of)


@contextmanager
def _probing(probe: _Probe) -> Iterator[None]:
    """Record this package's attention calls inside the ``with`` block; their results stay the same."""
    run = AttentionInterface()[ATTENTION_NAME]

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if isinstance(module, SparseAttentionModule) and module.sparse_attention.enabled:
            _record(probe, module, query[0].transpose(0, 1), key[0].transpose(0, 1), kwargs)
        return cast("tuple[Tensor, None]", run(module, query, key, value, mask, **kwargs))

    AttentionInterface.register(ATTENTION_NAME, forward)
    try:
        yield
    finally:
        AttentionInterface.register(ATTENTION_NAME, run)


def _record(probe: _Probe, module: SparseAttentionModule, q: Tensor, k: Tensor, kwargs: dict[str, Any]) -> None:
    """Record a layer's heads; ``q`` and ``k`` are ``[tokens, heads, dim]`` of one sequence."""
    flags = module.sparse_attention
    options = {
        "softmax_scale": kwargs.get("scaling"),
        "sliding_window": kwargs.get("sliding_window"),
        "softcap": kwargs.get("softcap"),
    }
    # A softmax's denominator over the kept keys, divided by that over all of them, is the mass that they have.
    kept, whole = (_attend(q, k, k, plan, options)[1] for plan in (flags.sparse_plan, AttentionPlan()))
    probe.heads[flags.name] = [round(share, 6) for share in (kept - whole).exp().mean(0).tolist()]
    if flags.name == probe.pattern_layer:
        probe.head = q.shape[1] // 2
        group = q.shape[1] // k.shape[1]
        q = q[:PATTERN_TOKENS, probe.head : probe.head + 1].float()
        k = k[:PATTERN_TOKENS, probe.head // group : probe.head // group + 1].float()
        # With the identity as values, the output is the weights; those of keys that are not kept are exactly 0.
        identity = torch.eye(k.shape[0], device=k.device)[:, None]
        weights = _attend(q, k, identity, flags.sparse_plan, options, backend="torch")[0][:, 0]
        rows = (weights > 0).tolist()
        probe.pattern = [f"{sum(bit << j for j, bit in enumerate(row)):x}" for row in rows]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, options: dict[str, Any], backend: Any = "auto"
) -> tuple[Tensor, Tensor]:
    start, length = (torch.tensor([x], dtype=torch.int32, device=q.device) for x in (0, q.shape[0]))
    found = attention(q, k, v, start, length, q.shape[0], plan=plan, return_lse=True, backend=backend, **options)
    return cast("tuple[Tensor, Tensor]", found)
