"""How long attention, prefill and decode take: every variant in turns, beside dense attention of two kinds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from ..conversion import disabled
from ..errors import ConfigError
from ..kernels import attention
from ..models.module import sparse_modules
from ..plan import AttentionPlan
from .config import DENSE, OURS, ExperimentConfig, Metric
from .records import Record, Speed, ordered

SHORTEST = 0.02  # seconds that one measurement of a kernel takes at least, in as many calls as that needs


@dataclass(frozen=True)
class SpeedRow:
    """One contender's time for one thing.

    Attributes:
        model, variant, measure, length: which.
        median: seconds.
        low: first quartile, seconds.
        high: third quartile, seconds.
        repeats: how many measurements these are of.
        speedup: the dense model's median divided by this one; the dense model is the one with PyTorch's attention.
        peak_bytes: most GPU memory allocated meanwhile; None on a CPU.
    """

    model: str
    variant: str
    measure: str
    length: int
    median: float
    low: float
    high: float
    repeats: int
    speedup: float | None
    peak_bytes: int | None


def summarize_speed(records: Sequence[Record], variants: Sequence[str]) -> list[SpeedRow]:
    """Sum up measurements by model, measure and length, the dense model first."""
    cells: dict[tuple[str, str, int], dict[str, Speed]] = {}
    for r in records:
        if isinstance(r, Speed):
            cells.setdefault((r.model, r.measure, r.length), {})[r.variant] = r
    rows = []
    for (model, measure, length), found in sorted(cells.items(), key=lambda cell: _order(*cell[0])):
        dense = None if DENSE not in found else _quartiles(found[DENSE].seconds)[1]
        for variant in ordered(list(found), [DENSE, OURS, *variants]):
            r = found[variant]
            low, median, high = _quartiles(r.seconds)
            speedup = None if dense is None else dense / median
            rows.append(
                SpeedRow(model, variant, measure, length, median, low, high, len(r.seconds), speedup, r.peak_bytes)
            )
    return rows


def _order(model: str, measure: str, length: int) -> tuple[str, int, int]:
    return model, ("kernel", "prefill", "decode").index(measure), length


def _quartiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, median, high = torch.tensor(seconds, dtype=torch.float64).quantile(points).tolist()
    return low, median, high


@dataclass(frozen=True)
class Shape:
    """The shape of one attention call.

    Attributes:
        query_heads: number of query heads.
        kv_heads: number of key and value heads.
        head_dim: their size.
    """

    query_heads: int
    kv_heads: int
    head_dim: int


def shape_of(model: PreTrainedModel) -> Shape:
    """Return the shape of a model's attention calls, as its config says it."""
    config: Any = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(heads, getattr(config, "num_key_value_heads", None) or heads, head_dim)


Call = Callable[[], object]


def kernel_calls(
    shape: Shape,
    plans: dict[str, AttentionPlan],
    length: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Call]:
    """Return, by contender, a causal attention call over random queries, keys and values.

    Args:
        shape: heads and their size.
        plans: the variants' plans.
        length: tokens of a sequence.
        batch: number of sequences.
        dtype: of the tensors.
        device: of the tensors.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(heads: int) -> Tensor:
        size = (batch * length, heads, shape.head_dim)
        return torch.randn(size, generator=generator, dtype=dtype, device=device)

    q, k, v = draw(shape.query_heads), draw(shape.kv_heads), draw(shape.kv_heads)
    starts = torch.arange(batch, dtype=torch.int32, device=device) * length
    lengths = torch.full_like(starts, length)
    heads_first: Any = [x.view(batch, length, -1, shape.head_dim).transpose(1, 2) for x in (q, k, v)]

    def dense() -> object:
        query, key, value = heads_first
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def ours(plan: AttentionPlan) -> Call:
        return lambda: attention(q, k, v, starts, lengths, length, plan=plan)

    return {DENSE: dense, **{name: ours(plan) for name, plan in {OURS: AttentionPlan(), **plans}.items()}}


def bench_kernels(config: ExperimentConfig, heads: Sequence[int], repeats: int, batch: int) -> list[SpeedRow]:
    """Measure attention calls of a shape, without a model.

    Args:
        config: resolved; its variants are the contenders, its ``speed.lengths`` the lengths.
        heads: query heads, key/value heads and head dimension.
        repeats: turns.
        batch: number of sequences.

    Raises:
        ConfigError: if ``heads`` is no shape, or a variant has more than one method.
    """
    if len(heads) != 3 or min(heads) < 1 or heads[0] % heads[1]:
        raise ConfigError(
            f"--heads: {list(heads)} is not allowed; must be query heads, key/value heads, head dimension"
        )
    plans = {}
    for name, sparsity in config.variants.items():
        if sparsity is not None:
            methods = sparsity.assign([""]) if "*" in sparsity.sparse_cfg else {}
            if len(sparsity.sparse_cfg) != 1 or not methods:
                raise ConfigError(f"--sparse: {name!r} is not allowed; must be one method for all layers")
            plans[name] = methods[""].plan()
    dtype, device = getattr(torch, config.dtype), torch.device(config.device)
    label = f"attention of {heads[0]}/{heads[1]} heads x {heads[2]}, {config.dtype}, batch {batch}"
    records: list[Record] = []
    for length in config.speed.lengths if config.speed else ():
        calls = kernel_calls(Shape(*heads), plans, length, batch, dtype, device)
        for name, found, peak in in_turns(list(calls), calls.__getitem__, repeats, device, SHORTEST):
            if isinstance(found, Exception):
                raise found
            records.append(Speed(label, name, "kernel", length, found, peak))
    return summarize_speed(records, list(plans))


def model_plans(model: PreTrainedModel) -> AttentionPlan | None:
    """Return the plan of a sparse model's first layer, None if it has no sparse layer that is switched on."""
    flags = [module.sparse_attention for module in sparse_modules(model).values()]
    return next((flag.method.plan() for flag in flags if flag.enabled), None)


@torch.no_grad()
def seconds_of(call: Call, device: torch.device, least: float = 0.0) -> float:
    """Return how long a call takes, as a mean over as many as take ``least`` seconds together."""
    calls, took = 1, _timed(call, 1, device)
    if took < least:
        calls = math.ceil(least / max(took, 1e-7))
        took = _timed(call, calls, device)
    return took / calls


def _timed(call: Call, calls: int, device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def model_call(model: PreTrainedModel, measure: Metric, length: int, batch: int, decode_tokens: int) -> Call:
    """Return a call that runs a prefill, or ``decode_tokens`` steps behind a prompt; over random tokens.

    Args:
        model: as it is when the call runs, not now.
        measure: ``prefill`` or ``decode``.
        length: tokens of the prompt.
        batch: number of sequences.
        decode_tokens: steps of one call.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (batch, length), generator=generator).to(model.device)
    if measure == "prefill":
        return lambda: model(tokens, use_cache=True, logits_to_keep=1)
    cache = model(tokens, use_cache=True, logits_to_keep=1).past_key_values

    def decode() -> None:
        token = tokens[:, :1]
        for _ in range(decode_tokens):
            logits = model(token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
        cache.crop(-decode_tokens)

    return decode


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Return the most GPU memory that is allocated while a call runs, None on a CPU."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def in_turns(
    contenders: Sequence[str],
    call: Callable[[str], Call],
    repeats: int,
    device: torch.device,
    least: float,
) -> Iterator[tuple[str, list[float] | Exception, int | None]]:
    """Measure contenders in turns, so that a machine that warms up or slows down does so for all.

    Args:
        contenders: their names.
        call: prepares a contender to run and returns what it runs; it is asked before each turn.
        repeats: turns, after one that is not counted.
        device: where it runs.
        least: seconds that a measurement takes at least.

    Yields:
        Name, seconds of each turn, and peak GPU memory; or the exception in the place of the seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: dict[str, int | None] = {}
    failures: dict[str, Exception] = {}
    for turn in range(repeats + 1):
        for name in contenders:
            if name in failures:
                continue
            try:
                run = call(name)
                with torch.no_grad():
                    if turn == 0:
                        peaks[name] = peak_bytes(run, device)
                    else:
                        seconds[name].append(seconds_of(run, device, least))
            except Exception as error:  # such as too little memory; the others are still wanted
                failures[name] = error
    for name in contenders:
        yield name, failures.get(name, seconds[name]), peaks.get(name)


def as_ours(model: PreTrainedModel) -> Any:
    """Return a context in which a sparse model is dense on this package's kernels."""
    return disabled(model)
