"""How far a model's predictions are from the text and from the dense model's predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 256  # positions whose distributions are held in FP32 at a time


@dataclass(frozen=True)
class Measurement:
    """One variant on one window of text.

    Attributes:
        variant: name of the variant.
        document: name of the text.
        window: the window's number in its document, from 0.
        tokens: how many tokens were predicted: all of the window but its first.
        cross_entropy: of the true next token, nats a token; perplexity is its exponential.
        divergence: KL(dense || variant) of the next-token distributions, nats a token.
        mass_kept: share of the dense attention mass that lies on kept keys, 0 to 1.
        sparsity: share of the visible attention scores that were dropped, 0 to 1.
    """

    variant: str
    document: str
    window: int
    tokens: int
    cross_entropy: float
    divergence: float
    mass_kept: float
    sparsity: float


@dataclass(frozen=True)
class VariantResult:
    """One variant over all windows it was measured on.

    Attributes:
        variant: name of the variant.
        windows: how many windows these are.
        tokens: how many tokens were predicted.
        perplexity: exponential of the mean cross-entropy a token.
        change_percent: of the perplexity, against the dense model on the same windows.
        divergence: KL(dense || variant), nats a token.
        mass_kept: share of the dense attention mass that lies on kept keys, 0 to 1.
        sparsity: share of the visible attention scores that were dropped, 0 to 1.
        seconds: duration of a forward pass over one window.
    """

    variant: str
    windows: int
    tokens: int
    perplexity: float
    change_percent: float
    divergence: float
    mass_kept: float
    sparsity: float
    seconds: float


@torch.no_grad()
def compare_predictions(logits: Tensor, dense_logits: Tensor, tokens: Tensor) -> tuple[float, float]:
    """Score a model's next-token logits on one window against the text and against the dense model.

    Log-probabilities are formed in FP32, :data:`CHUNK` positions at a time, and summed in FP64.

    Args:
        logits: ``[length, vocabulary]``, any floating dtype, of the model that is evaluated.
        dense_logits: ``[length, vocabulary]``, of the dense model.
        tokens: ``[length]``, the window; ``length >= 2``. Row ``i`` of the logits predicts token ``i + 1``.

    Returns:
        The cross-entropy and the divergence of a :class:`Measurement`: means over the ``length - 1`` predicted tokens.
    """
    count = tokens.numel() - 1
    cross_entropy = divergence = 0.0
    for start in range(0, count, CHUNK):
        stop = min(start + CHUNK, count)
        targets = tokens[start + 1 : stop + 1, None]
        log_p = torch.log_softmax(logits[start:stop], dim=-1, dtype=torch.float32)
        dense_log_p = torch.log_softmax(dense_logits[start:stop], dim=-1, dtype=torch.float32)
        cross_entropy -= log_p.gather(1, targets).sum(dtype=torch.float64).item()
        terms = torch.nn.functional.kl_div(log_p, dense_log_p, reduction="none", log_target=True)
        divergence += terms.sum(dtype=torch.float64).item()
    return cross_entropy / count, divergence / count


def summarize(measurements: Sequence[Measurement], seconds: Mapping[str, float], baseline: str) -> list[VariantResult]:
    """Sum up measurements by variant, in the order in which the variants first appear.

    Args:
        measurements: windows of one length; a variant may lack windows that the baseline has.
        seconds: duration of a forward pass over a window, by variant.
        baseline: the variant that changes are relative to; it has every window that another variant has.
    """
    results = []
    baseline_loss = {(m.document, m.window): m.cross_entropy for m in measurements if m.variant == baseline}
    for variant in dict.fromkeys(m.variant for m in measurements):
        rows = [m for m in measurements if m.variant == variant]
        loss = _mean([m.cross_entropy for m in rows])
        reference_loss = _mean([baseline_loss[m.document, m.window] for m in rows])
        results.append(
            VariantResult(
                variant=variant,
                windows=len(rows),
                tokens=sum(m.tokens for m in rows),
                perplexity=math.exp(loss),
                change_percent=100 * math.expm1(loss - reference_loss),
                divergence=_mean([m.divergence for m in rows]),
                mass_kept=_mean([m.mass_kept for m in rows]),
                sparsity=_mean([m.sparsity for m in rows]),
                seconds=seconds[variant],
            )
        )
    return results


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
