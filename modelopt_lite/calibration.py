"""Calibration: choose a method's knob by the share of blocks that it is to skip.

Every value of a knob is tried in the same forward passes. The model runs dense; each layer hands its queries and keys
to a counter, which scores the blocks once and counts for each value how many of them it would visit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .config import ConfigSource, SparsityConfig
from .conversion import sparsify, unsparsify
from .errors import ConfigError
from .experiment.measuring import Data, Journal, check_dense, describe_model, digest, progress_bar, read_windows
from .kernels import AttentionRequest, visited_blocks
from .methods import CalibratedMethod, Calibration, Combined, SparseAttentionMethod
from .methods.calibrated import ExponentialFit, Knob, LogitFit
from .module import count, sparse_modules
from .plan import DENSE, AttentionPlan

Form: TypeAlias = Literal["logit", "exponential"]

FEWEST_BLOCKS = 4
"""Query blocks that see fewer key blocks take no part in a fit: most of what they see can never be skipped."""
REFINED = (0.3, 0.5, 0.7)
"""Targets at which a refined calibration lets the model be sparse."""
NEAR = 0.15
"""Points with a sparsity so near to that of the model count in a refined calibration."""
FITTED = (0.1, 0.9)
"""Points of a fit have a sparsity between these, as in Model-Optimizer's calibration."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeadGroup:
    """What the query heads that share one head of keys would skip.

    Attributes:
        pattern: the configuration's pattern that decides for the layer.
        layer: dotted name of the layer.
        phase: prefill, the only phase in which methods with a knob are sparse.
        group: number of the head of keys.
        sparsity: share of the key blocks that are skipped, for each of the knob's values, in their order.
    """

    pattern: str
    layer: str
    phase: str
    group: int
    sparsity: tuple[float, ...]


@dataclass(frozen=True)
class Reach:
    """Which sparsity the knob's values reached in sequences of one length, over all layers of a pattern."""

    pattern: str
    length: int
    lowest: float
    highest: float


@dataclass(frozen=True)
class CalibrationResult:
    """What :func:`calibrate` found.

    Attributes:
        config: the configuration with calibrations and the target in it; hand it to
            :func:`~modelopt_lite.sparsify`.
        values: by pattern, the values of the knob that were tried.
        groups: what each layer and head group would skip at each value.
        reach: what could be reached at each length.
        warnings: targets that lie outside of what was seen.
    """

    config: SparsityConfig
    values: dict[str, tuple[float, ...]]
    groups: list[HeadGroup]
    reach: list[Reach]
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Return the fits as a table, and the warnings."""
        table = Table("pattern", "method", "target", "knob", "at", "error of the fit", "seen at the longest")
        for pattern, method in _calibrated(self.config).items():
            longest = max((reach for reach in self.reach if reach.pattern == pattern), key=lambda reach: reach.length)
            curve, fit = method.knob_curve(), _fit_of(method)
            assert curve is not None
            knob = method.knob.inverse(curve.at(torch.tensor(longest.length))).item()
            table.add_row(
                pattern,
                method.method,
                f"{method.target_sparsity:.0%}",
                f"{method.knob.field} = {knob:.3g}",
                f"{longest.length} tokens",
                f"{fit.error:.1%}",
                f"{longest.lowest:.0%} to {longest.highest:.0%}",
            )
        console = Console(width=120, color_system=None)
        with console.capture() as captured:
            console.print(table)
        return captured.get() + "".join(f"warning: {warning}\n" for warning in self.warnings)


def calibrate(
    model: nn.Module,
    config: ConfigSource,
    data: Data,
    *,
    target: float,
    tokenizer: Any = None,
    lengths: Sequence[int] = (1024, 2048, 4096),
    windows: int = 4,
    form: Form = "logit",
    refine: bool = False,
    seed: int = 0,
    state: str | Path | None = None,
    show_progress: bool = True,
) -> CalibrationResult:
    """Measure how sparsity follows from the knob of each method, and choose the knob by a target.

    Methods with a knob are ``skip_softmax`` (``threshold``), ``flash_prefill`` (``alpha``), ``xattention``
    (``threshold``) and ``mean_pool_top_k`` (``keep``). The target is the share of key blocks that is to be skipped, of
    all those that a query block sees. Blocks that a method always keeps count too, so that short sequences may not
    reach a high target.

    The model reads each window once, dense. What was found is a field of the methods in the configuration, so that
    saving keeps it, and :meth:`SparsityConfig.with_target` changes the target without measuring again.

    Args:
        model: a causal language model that is not sparse; it stays dense.
        config: what :func:`~modelopt_lite.sparsify` takes, with at least one method that has a knob. Each pattern gets
            a fit of its own.
        data: what to read: token ids ``[length]``, names of texts as in an experiment's ``quality.text``, ``"ruler"``
            for generated samples, or a list of these.
        target: share of the key blocks that is to be skipped, > 0 and < 1.
        tokenizer: the model's tokenizer; not needed for token ids.
        lengths: tokens of a window; include the longest that the model will be used with.
        windows: windows of each text at each length.
        form: how the knob follows from the target. ``"logit"`` has four coefficients (:class:`LogitFit`);
            ``"exponential"`` is Model-Optimizer's ``threshold = a * exp(b * target) / length``, for skip_softmax and
            flash_prefill alone, and less exact where lengths differ.
        refine: whether to read each window three times more, with the model sparse as a first fit says for targets of
            0.3, 0.5 and 0.7, and to fit again near these. Sparse layers change the scores of the layers above, which
            matters for skip_softmax at high targets.
        seed: of the choice of documents, and of the generated samples.
        state: a file that keeps what was measured, a line for each window; the same call continues after an
            interruption.
        show_progress: whether to draw a bar on the terminal.

    Raises:
        ConfigError: if an argument is wrong, no method has a knob, a list of methods has two, or a fit is not possible.
        UnsupportedError: if the model has a layer that is not supported.
    """
    if not 0 < target < 1:
        raise ConfigError(f"target: {target!r} is not allowed; a number > 0 and < 1")
    check_dense(model)
    config = SparsityConfig.load(config)
    methods = _calibrated(config)
    if not methods:
        raise ConfigError(
            "config: has no method with a knob; must have skip_softmax, flash_prefill, xattention or mean_pool_top_k"
        )
    for pattern, method in methods.items():
        if form == "exponential" and method.knob.scale != "log":
            raise ConfigError(f"form: 'exponential' is not allowed for {method.method} (sparse_cfg.{pattern})")
    tokens = read_windows(data, model, tokenizer, lengths, windows, seed)
    header = {"kind": "calibration", "config": config.model_dump(mode="json"), "model": describe_model(model)}
    journal = Journal(state, header)
    lengths_read = sorted({window.numel() for window in tokens})
    read = partial(_read, model, config, methods, tokens, journal)
    try:
        with progress_bar(show_progress, len(tokens) * (1 + len(REFINED) * refine)) as step:
            tables = read(None, step)
            points = {pattern: table.points() for pattern, table in tables.items()}
            result = _conclude(config, tables, points, target, lengths_read, form)
            if refine:
                points = {pattern: [] for pattern in tables}
                for near in REFINED:
                    for pattern, table in read(_retargeted(result.config, near), step).items():
                        points[pattern] += [x for x in table.points() if abs(x.sparsity - near) <= NEAR]
                result = _conclude(config, tables, points, target, lengths_read, form)
    finally:
        unsparsify(model)
    for warning in result.warnings:
        logger.warning(warning)
    return result


def _retargeted(config: SparsityConfig, target: float) -> SparsityConfig:
    """Return a configuration with another target, which may lie outside of what was seen."""
    entries: dict[str, Any] = dict(config.sparse_cfg)
    for pattern, method in _calibrated(config).items():
        changed = type(method)(**{**method.model_dump(), "target_sparsity": target})
        entries[pattern] = _replaced(entries[pattern], method, changed)
    return SparsityConfig(sparse_cfg=entries)


def _read(
    model: nn.Module,
    config: SparsityConfig,
    methods: Mapping[str, CalibratedMethod],
    tokens: Sequence[Tensor],
    journal: Journal,
    sparse: SparsityConfig | None,
    step: Callable[[str], None],
) -> dict[str, _Tables]:
    """Let the model read all windows, dense or as another configuration says; return what each pattern counted."""
    sparsify(model, sparse or config)
    counters = _counters(model, config, methods, is_dense=sparse is None)
    prefix = "" if sparse is None else digest(torch.tensor(list(sparse.model_dump_json().encode()))) + "/"
    tables = {pattern: _Tables(pattern, method, config.sparse_cfg[pattern]) for pattern, method in methods.items()}
    for window in tokens:
        step(f"{window.numel()} tokens")
        measured = journal.get(prefix + digest(window), partial(_measure, model, counters, window))
        for layer, counts in measured.items():
            tables[counts["pattern"]].add(layer, counts)
    return tables


def _calibrated(config: SparsityConfig) -> dict[str, CalibratedMethod]:
    """Return the method with a knob of each pattern that has one."""
    found = {}
    for pattern, entry in config.sparse_cfg.items():
        parts = entry.methods if isinstance(entry, Combined) else (entry,)
        knobs = [part for part in parts if isinstance(part, CalibratedMethod)]
        if len(knobs) > 1:
            names = " and ".join(part.method for part in knobs)
            raise ConfigError(f"sparse_cfg.{pattern}: {names} both have a knob; must be calibrated without each other")
        if knobs and knobs[0].enable:
            found[pattern] = knobs[0]
    return found


def _replaced(entry: SparseAttentionMethod, old: CalibratedMethod, new: CalibratedMethod) -> SparseAttentionMethod:
    """Return an entry with its method that has a knob replaced."""
    if isinstance(entry, Combined):
        return entry.model_copy(update={"methods": tuple(new if part is old else part for part in entry.methods)})
    return new


def _counters(
    model: nn.Module, config: SparsityConfig, methods: Mapping[str, CalibratedMethod], is_dense: bool
) -> dict[Any, _Counter]:
    modules = sparse_modules(model)
    plans: dict[str, list[AttentionPlan]] = {}
    for pattern, method in methods.items():
        entry = config.sparse_cfg[pattern]
        assert isinstance(entry, SparseAttentionMethod)
        plans[pattern] = [_replaced(entry, method, method.with_knob(x)).plan() for x in method.knob.values]
    counters = {}
    for name, pattern in config.deciding_patterns(modules).items():
        if pattern in methods:
            counters[modules[name]] = _Counter(name, pattern, plans[pattern], is_dense)
    return counters


class _Counter:
    """Counts in one layer which blocks each value of a knob would visit, and may let the layer be dense."""

    def __init__(self, layer: str, pattern: str, plans: Sequence[AttentionPlan], is_dense: bool) -> None:
        self.is_dense = is_dense
        self.layer, self.pattern, self.plans = layer, pattern, plans
        self.counts: tuple[Tensor, Tensor, Tensor] | None = None

    def observe(self, request: AttentionRequest) -> AttentionRequest:
        """Count a call's blocks, and return the call to compute."""
        seen, visited = visited_blocks(request, self.plans)
        heads, kv_heads = visited.shape[1], request.k.shape[1]
        blocks = request._replace(plan=self.plans[0])
        columns = -(-request.max_k // blocks.grid[0]) + 2
        by_length = visited.new_zeros(len(self.plans) + 1, columns)
        by_length.index_add_(1, seen, torch.cat([(seen * heads)[None], visited.sum(1)]))
        by_group = visited.unflatten(1, (kv_heads, -1)).sum((2, 3)).T
        found = (by_length, by_group, (seen.sum() * heads // kv_heads)[None])
        before = (torch.zeros_like(x) for x in found) if self.counts is None else self.counts
        self.counts = tuple(map(_sum_padded, before, found))  # type: ignore[assignment] # three tensors again
        return request._replace(plan=DENSE) if self.is_dense else request

    def take(self) -> dict[str, Any]:
        """Return what was counted, as JSON can hold it, and begin anew; waits for the device."""
        if self.counts is None:
            raise ConfigError(f"{self.layer}: its attention was not called; it cannot be calibrated")
        by_length, by_group, seen = (x.tolist() for x in self.counts)
        self.counts = None
        return {
            "pattern": self.pattern,
            "seen": by_length[0],
            "visited": by_length[1:],
            "groups": by_group,
            "seen_by_group": seen[0],
        }


@torch.no_grad()
def _measure(model: nn.Module, counters: Mapping[Any, _Counter], window: Tensor) -> dict[str, Any]:
    """Let the model read a window; return what each layer counted."""
    with count(counters):
        model(window[None].to(next(model.parameters()).device), use_cache=False, logits_to_keep=1)
    return {counter.layer: counter.take() for counter in counters.values()}


class _Tables:
    """The counts of one pattern, over all windows.

    Attributes:
        seen: blocks that are seen by query blocks that see ``n`` of them, by ``n``.
        visited: those of them that each value visits, ``[values, n]``.
    """

    def __init__(self, pattern: str, method: CalibratedMethod, entry: Any) -> None:
        self.pattern, self.method, self.entry = pattern, method, entry
        self.seen = torch.zeros(1, dtype=torch.float64)
        self.visited = torch.zeros(len(method.knob.values), 1, dtype=torch.float64)
        self._groups: dict[str, tuple[int, Tensor]] = {}

    def add(self, layer: str, counts: Mapping[str, Any]) -> None:
        """Add the counts of one layer in one window."""
        seen, visited = torch.tensor(counts["seen"]).double(), torch.tensor(counts["visited"]).double()
        self.seen, self.visited = _sum_padded(self.seen, seen), _sum_padded(self.visited, visited)
        before, groups = self._groups.get(layer, (0, torch.zeros(())))
        self._groups[layer] = (before + counts["seen_by_group"], groups + torch.tensor(counts["groups"]).double())

    def groups(self) -> list[HeadGroup]:
        """Return the sparsity of every layer and head group."""
        return [
            HeadGroup(self.pattern, layer, "prefill", group, tuple((1 - row / seen).tolist()))
            for layer, (seen, rows) in self._groups.items()
            for group, row in enumerate(rows)
        ]

    def reach(self, length: int) -> Reach:
        """Return the least and the largest sparsity that sequences of a length had."""
        blocks = -(-length // self.method.block_size)
        weight = torch.arange(min(blocks + 1, len(self.seen))).double() * (self.seen > 0)[: blocks + 1]
        share = 1 - self.visited[:, : blocks + 1] / self.seen[: blocks + 1].clamp(min=1)
        found = (share * weight).sum(-1) / weight.sum()
        return Reach(self.pattern, length, found.min().item(), found.max().item())

    def points(self) -> list[_Point]:
        """Return the points of a fit: for each value of the knob and some ranges of lengths the sparsity there was."""
        size, last, found = self.method.block_size, int(self.seen.nonzero().max()), []
        edges = [FEWEST_BLOCKS]
        while edges[-1] <= last:
            edges.append(max(edges[-1] + 1, round(edges[-1] * math.sqrt(2))))
        for low, high in pairwise(edges):
            number = torch.arange(low, min(high, last + 1))
            seen = self.seen[number]
            if not seen.sum():
                continue
            length = size * math.exp(float((seen * number.log()).sum() / seen.sum()))
            shares = 1 - self.visited[:, number].sum(-1) / seen.sum()
            found += [
                _Point(length, share, x) for share, x in zip(shares.tolist(), self.method.knob.values, strict=True)
            ]
        return [point for point in found if FITTED[0] < point.sparsity < FITTED[1]]


@dataclass(frozen=True)
class _Point:
    length: float
    sparsity: float
    knob: float


def _sum_padded(a: Tensor, b: Tensor) -> Tensor:
    """Add tensors whose last dimensions differ."""
    longest = max(a.shape[-1], b.shape[-1])
    a, b = (torch.nn.functional.pad(x, (0, longest - x.shape[-1])) for x in (a, b))
    return a + b


def _conclude(
    config: SparsityConfig,
    tables: Mapping[str, _Tables],
    points: Mapping[str, Sequence[_Point]],
    target: float,
    lengths: Sequence[int],
    form: Form,
) -> CalibrationResult:
    entries: dict[str, Any] = dict(config.sparse_cfg)
    warnings, reach = [], []
    for pattern, table in tables.items():
        method = table.method
        fit = _fit(table, points[pattern], form)
        content = {**method.model_dump(), "calibration": Calibration(prefill=fit), "target_sparsity": target}
        entries[pattern] = _replaced(table.entry, method, type(method)(**content))
        for length in lengths:
            here = table.reach(length)
            reach.append(here)
            if not here.lowest <= target <= here.highest:
                warnings.append(
                    f"sparse_cfg.{pattern} ({method.method}): the target {target:g} lies outside of "
                    f"{here.lowest:.2f} to {here.highest:.2f}, which was seen at {length} tokens"
                )
    groups = [group for table in tables.values() for group in table.groups()]
    values = {pattern: table.method.knob.values for pattern, table in tables.items()}
    return CalibrationResult(SparsityConfig(sparse_cfg=entries), values, groups, reach, warnings)


def _fit_of(method: CalibratedMethod) -> ExponentialFit | LogitFit:
    assert method.calibration is not None
    return method.calibration.prefill


def _fit(table: _Tables, points: Sequence[_Point], form: Form) -> ExponentialFit | LogitFit:
    """Fit the knob of one pattern by least squares on its scale.

    Raises:
        ConfigError: if there are too few points, or sparsity does not grow with the knob.
    """
    knob = table.method.knob
    where = f"sparse_cfg.{table.pattern} ({table.method.method})"
    if len({point.knob for point in points}) < 3:
        raise ConfigError(
            f"{where}: cannot be fitted; fewer than three values of {knob.field} gave a sparsity between "
            f"{FITTED[0]:.0%} and {FITTED[1]:.0%}. Give longer windows, or let the method keep fewer blocks in any case"
        )
    shares = [point.sparsity for point in points]
    seen: dict[str, Any] = {"lowest": round(min(shares), 6), "highest": round(max(shares), 6)}
    if form == "exponential":
        rows = [[1.0, share] for share in shares]
        log_a, b = _least_squares(rows, [math.log(point.knob * point.length) for point in points])
        if b <= 0:
            raise ConfigError(f"{where}: cannot be fitted; the sparsity does not grow with {knob.field}")
        predicted = [(math.log(point.knob * point.length) - log_a) / b for point in points]
        return ExponentialFit(
            form="exponential", a=float(f"{math.exp(log_a):.7g}"), b=b, error=_error(predicted, shares), **seen
        )
    shortest, longest = (round(end(point.length for point in points), 1) for end in (min, max))
    return _logit_fit(points, knob, where, {**seen, "shortest": shortest, "longest": longest})


def _logit_fit(points: Sequence[_Point], knob: Knob, where: str, seen: Mapping[str, Any]) -> LogitFit:
    logits = [math.log(point.sparsity / (1 - point.sparsity)) for point in points]
    logs = [math.log(point.length) for point in points]
    goals = [knob.transform(point.knob) for point in points]
    # With fewer terms where there are too few lengths for more, or the knob would turn back at one end.
    for terms in (4, 3, 2):
        if terms > 2 and len(set(logs)) < terms - 1:
            continue
        rows = [[1.0, u, x, u * x][:terms] for u, x in zip(logits, logs, strict=True)]
        c0, c1, c2, c3 = (*_least_squares(rows, goals), 0.0, 0.0)[:4]
        slopes = [c1 + c3 * x for x in (min(logs), max(logs))]
        if slopes[0] * slopes[1] > 0:
            break
    else:
        raise ConfigError(f"{where}: cannot be fitted; the sparsity does not follow {knob.field}")
    predicted = [1 / (1 + math.exp((c0 + c2 * x - goal) / (c1 + c3 * x))) for x, goal in zip(logs, goals, strict=True)]
    error = _error(predicted, [point.sparsity for point in points])
    return LogitFit(form="logit", coefficients=(c0, c1, c2, c3), error=error, **seen)


def _least_squares(rows: Sequence[Sequence[float]], goals: Sequence[float]) -> list[float]:
    matrix, goal = torch.tensor(rows, dtype=torch.float64), torch.tensor(goals, dtype=torch.float64)
    solution = torch.linalg.lstsq(matrix, goal[:, None]).solution[:, 0].tolist()
    return [float(f"{x:.7g}") for x in solution]  # more digits are noise, and long to read


def _error(predicted: Sequence[float], found: Sequence[float]) -> float:
    error = math.sqrt(sum((a - b) ** 2 for a, b in zip(predicted, found, strict=True)) / len(found))
    return round(error, 6)
