"""How far predictions are from the text and from the dense model's, with intervals from a paired bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .config import DENSE
from .records import Answer, Attention, Failure, Record, Window, ordered

CHUNK = 64  # positions whose distributions are held in FP32 at a time; more are slower on a CPU
RESAMPLES = 10_000
CONFIDENCE = 0.95


class Prediction(NamedTuple):
    """How a model predicts a window of text.

    Attributes:
        cross_entropy: of the true next token, nats a token.
        divergence: KL(dense || model) of the next-token distributions, nats a token.
        agreement: share of positions where both models' most likely tokens are the same.
    """

    cross_entropy: float
    divergence: float
    agreement: float


@torch.no_grad()
def compare_predictions(logits: Tensor, dense_logits: Tensor, tokens: Tensor) -> Prediction:
    """Score a model's next-token logits on one window against the text and against the dense model.

    Log-probabilities are formed in FP32, :data:`CHUNK` positions at a time, and summed in FP64.

    Args:
        logits: ``[length, vocabulary]``, any floating dtype, of the model that is evaluated.
        dense_logits: ``[length, vocabulary]``, of the dense model.
        tokens: ``[length]``, the window; ``length >= 2``. Row ``i`` of the logits predicts token ``i + 1``.

    Returns:
        Means over the ``length - 1`` predicted tokens.
    """
    count = tokens.numel() - 1
    sums = torch.zeros(3, dtype=torch.float64, device=logits.device)
    for start in range(0, count, CHUNK):
        stop = min(start + CHUNK, count)
        targets = tokens[start + 1 : stop + 1, None]
        log_p = torch.log_softmax(logits[start:stop], dim=-1, dtype=torch.float32)
        dense_log_p = torch.log_softmax(dense_logits[start:stop], dim=-1, dtype=torch.float32)
        divergence = torch.nn.functional.kl_div(log_p, dense_log_p, reduction="none", log_target=True)
        sums[0] -= log_p.gather(1, targets).sum(dtype=torch.float64)
        sums[1] += divergence.sum(dtype=torch.float64)
        sums[2] += (log_p.argmax(-1) == dense_log_p.argmax(-1)).sum()
    return Prediction(*(sums / count).tolist())


@dataclass(frozen=True)
class Estimate:
    """A mean over windows or samples, with the bounds of its confidence interval.

    Attributes:
        value: the mean.
        low: lower bound; None where there are fewer than two windows.
        high: upper bound; None likewise.
    """

    value: float
    low: float | None = None
    high: float | None = None


def bootstrap(values: Sequence[float], seed: int) -> Estimate:
    """Return a mean with its percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13).

    For a difference, hand in the differences of pairs: the interval is a paired one then, and much narrower than what
    two intervals of their own would show.

    Args:
        values: one a window or sample.
        seed: of the :data:`RESAMPLES` resamples; equal seeds resample the same windows.
    """
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Estimate(mean)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    means = torch.tensor(values, dtype=torch.float64)[chosen].mean(1)
    tail = (1 - CONFIDENCE) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(mean, low, high)


def mapped(estimate: Estimate, function: Callable[[float], float]) -> Estimate:
    """Return an increasing function of an estimate."""
    low, high = (None if x is None else function(x) for x in (estimate.low, estimate.high))
    return Estimate(function(estimate.value), low, high)


@dataclass(frozen=True)
class QualityRow:
    """One variant of a model over all windows of one length that every variant has.

    Attributes:
        model: the model.
        length: tokens of a window.
        variant: name of the variant.
        windows: how many windows these are.
        perplexity: exponential of the mean cross-entropy.
        change_percent: of the perplexity, against the dense model on the same windows; paired.
        divergence: KL(dense || variant), nats a token.
        agreement: share of positions with the dense model's most likely token.
        mass_kept: share of the dense attention mass on kept keys; None if not measured.
        sparsity: share of the visible scores that were dropped; None if not measured.
        seconds: median duration of a forward pass over a window.
    """

    model: str
    length: int
    variant: str
    windows: int
    perplexity: Estimate
    change_percent: Estimate
    divergence: Estimate
    agreement: Estimate
    mass_kept: float | None
    sparsity: float | None
    seconds: float


def summarize_quality(
    records: Sequence[Record], variants: Sequence[str], seed: int, text: str | None = None
) -> list[QualityRow]:
    """Sum up windows by model, length and variant; the dense model first.

    Rows of one model and length are over the same windows: those that all variants have which have any. A variant that
    failed on a window is left out.

    Args:
        records: any records.
        variants: names in the order of the rows.
        seed: of the bootstrap.
        text: only windows of this source.
    """
    windows = [r for r in records if isinstance(r, Window) and text in (None, r.text)]
    attention = [r for r in records if isinstance(r, Attention) and text in (None, r.text)]
    failed = {(r.model, r.variant, r.failed[4]) for r in records if isinstance(r, Failure) and r.failed[0] == "window"}
    rows = []
    for model, length in dict.fromkeys((r.model, r.length) for r in windows):
        found: dict[str, dict[tuple[str, int], Window]] = {}
        for r in windows:
            if (r.model, r.length) == (model, length) and (model, r.variant, length) not in failed:
                found.setdefault(r.variant, {})[r.text, r.window] = r
        shared = [key for key in found.get(DENSE, {}) if all(key in parts for parts in found.values())]
        if not shared:
            continue
        dense = [found[DENSE][key].cross_entropy for key in shared]
        for variant in ordered(list(found), variants):
            parts = [found[variant][key] for key in shared]
            losses = [part.cross_entropy for part in parts]
            kept = [a for a in attention if (a.model, a.length, a.variant) == (model, length, variant)]
            change = bootstrap([loss - other for loss, other in zip(losses, dense, strict=True)], seed)
            rows.append(
                QualityRow(
                    model=model,
                    length=length,
                    variant=variant,
                    windows=len(shared),
                    perplexity=mapped(bootstrap(losses, seed), math.exp),
                    change_percent=mapped(change, lambda x: 100 * math.expm1(x)),
                    divergence=bootstrap([part.divergence for part in parts], seed),
                    agreement=bootstrap([part.agreement for part in parts], seed),
                    mass_kept=_mean([a.mass_kept for a in kept]) if kept else 1.0 if variant == DENSE else None,
                    sparsity=_mean([a.sparsity for a in kept]) if kept else 0.0 if variant == DENSE else None,
                    seconds=torch.tensor([part.seconds for part in parts], dtype=torch.float64).median().item(),
                )
            )
    return rows


@dataclass(frozen=True)
class TaskRow:
    """One variant of a model on one task at one length.

    Attributes:
        model, variant, task, length: which.
        samples: how many samples all variants answered.
        score: mean score, 0 to 1.
        change: of the score, against the dense model on the same samples; paired.
    """

    model: str
    variant: str
    task: str
    length: int
    samples: int
    score: Estimate
    change: Estimate


def summarize_tasks(records: Sequence[Record], variants: Sequence[str], seed: int) -> list[TaskRow]:
    """Sum up answers by model, task, length and variant, over the samples that all variants answered."""
    cells: dict[tuple[str, str, int], dict[str, dict[tuple[float | None, int], float]]] = {}
    for r in records:
        if isinstance(r, Answer):
            by_variant = cells.setdefault((r.model, r.task, r.length), {})
            by_variant.setdefault(r.variant, {})[r.depth, r.index] = r.score
    rows = []
    for (model, task, length), found in cells.items():
        shared = [key for key in found.get(DENSE, {}) if all(key in parts for parts in found.values())]
        if not shared:
            continue
        dense = [found[DENSE][key] for key in shared]
        for variant in ordered(list(found), variants):
            scores = [found[variant][key] for key in shared]
            change = bootstrap([score - other for score, other in zip(scores, dense, strict=True)], seed)
            rows.append(TaskRow(model, variant, task, length, len(shared), bootstrap(scores, seed), change))
    return rows


def effective_length(means: dict[int, float], threshold: float) -> int | None:
    """Return the largest length up to which every mean score reaches a threshold, None if the first does not (RULER).

    Args:
        means: mean score over the tasks, by length.
        threshold: 0 to 1.
    """
    longest = None
    for length in sorted(means):
        if means[length] < threshold:
            break
        longest = length
    return longest


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
