"""Calibration: choose a method's knob by the share of blocks that it is to skip.

Every value of a knob is tried in the same forward passes. The model runs dense; each layer hands its queries and keys
to a counter, which scores the blocks once and counts for each value how many of them it would visit. Prefill and decode
are passes of their own: in the second one, some tokens of each window are read by themselves, over a cache.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from .errors import ConfigError, UnsupportedError
from .experiment.measuring import Data, Journal, check_dense, describe_model, digest, progress_bar, read_windows
from .kernels import AttentionRequest, visited_blocks
from .methods import CalibratedMethod, Combined, SparseAttentionMethod
from .methods.calibrated import ExponentialFit, Knob, Phase, TableFit
from .models.module import count, sparse_modules
from .plan import DENSE, AttentionPlan

Form: TypeAlias = Literal["table", "exponential"]

FEWEST_BLOCKS = 4
"""Query blocks that see no more key blocks take no part in a fit: most of what they see can never be skipped."""
TARGETS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""The targets of a table."""
REFINED = (0.3, 0.5, 0.7)
"""Those of them at which a refined calibration lets the model be sparse; at the others, the next one counts."""
DECODE_STEPS = 16
"""Tokens of each window that are read by themselves to calibrate decode."""
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
"""Multiples of it, less their whole parts, are spread evenly, and so are the places in blocks that follow from them."""
NEAR = 0.15
"""Points with a sparsity so near to that of the model count in a refined calibration of the exponential form."""
FITTED = (0.1, 0.9)
"""Points of the exponential form have a sparsity between these, as in Model-Optimizer's calibration."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeadGroup:
    """What the query heads that share one head of keys would skip.

    Attributes:
        pattern: the configuration's pattern that decides for the layer.
        layer: dotted name of the layer.
        phase: prefill or decode.
        group: number of the head of keys.
        sparsity: share of the key blocks that are skipped, for each of the knob's values, in their order.
    """

    pattern: str
    layer: str
    phase: Phase
    group: int
    sparsity: tuple[float, ...]


@dataclass(frozen=True)
class Reach:
    """Which sparsity the knob's values reached in windows of one length, over all layers of a pattern, in a phase."""

    pattern: str
    phase: Phase
    length: int
    lowest: float
    highest: float


@dataclass(frozen=True)
class CalibrationResult:
    """What :func:`calibrate` found.

    Attributes:
        config: the configuration with calibrations and targets in it; hand it to :func:`~modelopt_lite.sparsify`.
        values: by pattern, the values of the knob that were tried, the same in both phases.
        groups: what each layer and head group would skip at each value, in each phase.
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
        table = Table("pattern", "method", "phase", "target", "knob", "at", "error", "seen there")
        methods = _calibrated(self.config)
        for pattern, phase in dict.fromkeys((reach.pattern, reach.phase) for reach in self.reach):
            reached = [reach for reach in self.reach if (reach.pattern, reach.phase) == (pattern, phase)]
            longest = max(reached, key=lambda reach: reach.length)
            method = methods[pattern]
            curve, fit, knob = method.knob_curve(phase), method.fit(phase), method.knobs()[phase]
            assert curve is not None
            assert fit is not None
            value = knob.inverse(curve.at(torch.tensor(longest.length))).item()
            table.add_row(
                pattern,
                method.method,
                phase,
                f"{getattr(method, knob.target):.0%}",
                f"{knob.field} = {value:.3g}",
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
    target: float | None = None,
    decode_target: float | None = None,
    tokenizer: Any = None,
    lengths: Sequence[int] = (1024, 2048, 4096),
    windows: int = 4,
    form: Form = "table",
    refine: bool = True,
    seed: int = 0,
    state: str | Path | None = None,
    show_progress: bool = True,
) -> CalibrationResult:
    """Measure how sparsity follows from the knob of each method, and choose the knob by a target.

    Methods with a knob are ``skip_softmax`` (``threshold``), ``flash_prefill`` (``alpha``), ``xattention``
    (``threshold``) and ``mean_pool_top_k`` (``keep``). The target is the share of key blocks that is to be skipped, of
    all those that a query block sees. Blocks that a method always keeps count too, so that short sequences may not
    reach a high target. ``skip_softmax`` may have a target for decode too, which sets its ``decode_threshold``.

    For each target that is given, the model reads each window once dense, and three times sparse unless ``refine`` is
    false. What was found is a field of the methods in the configuration, so that saving keeps it, and
    :meth:`SparsityConfig.with_target` changes the targets without measuring again.

    Args:
        model: a causal language model that is not sparse; it stays dense.
        config: what :func:`~modelopt_lite.sparsify` takes, with at least one method that has a knob. Each pattern gets
            a fit of its own.
        data: what to read: token ids ``[length]``, names of texts as in an experiment's ``quality.text``, ``"ruler"``
            for generated samples, or a list of these.
        target: share of the key blocks that is to be skipped in prefill, > 0 and < 1; None leaves prefill as the
            configuration has it.
        decode_target: the same in decode steps, for skip_softmax. Some tokens of each window are then read one by one
            over a cache.
        tokenizer: the model's tokenizer; not needed for token ids.
        lengths: tokens of a window; include the longest that the model will be used with.
        windows: windows of each text at each length.
        form: how the knob follows from the target. ``"table"`` holds the knob at some lengths and targets
            (:class:`TableFit`); ``"exponential"`` is Model-Optimizer's ``threshold = a * exp(b * target) / length``,
            for skip_softmax and flash_prefill alone, and less exact where lengths differ.
        refine: whether to read each window three times more, with the model sparse as a first fit says for targets of
            0.3, 0.5 and 0.7, and to correct the fit by what is skipped then. Sparse layers change the scores of the
            layers above, which matters most for skip_softmax at high targets.
        seed: of the choice of documents, and of the generated samples.
        state: a file that keeps what was measured, a line for each window; the same call continues after an
            interruption.
        show_progress: whether to draw a bar on the terminal.

    Raises:
        ConfigError: if an argument is wrong, no method has a knob, a list of methods has two, or a fit is not possible.
        UnsupportedError: if the model has a layer that is not supported.
    """
    targets = check_targets(target, decode_target)
    check_dense(model)
    config = SparsityConfig.load(config)
    methods = _calibrated(config)
    if not methods:
        raise ConfigError(
            "config: has no method with a knob; must have skip_softmax, flash_prefill, xattention or mean_pool_top_k"
        )
    if "decode" in targets and not any("decode" in method.knobs() for method in methods.values()):
        raise ConfigError("decode_target: is not allowed without skip_softmax; other methods are dense in decode")
    for pattern, method in methods.items():
        if form == "exponential" and method.knob.scale != "log":
            raise ConfigError(f"form: 'exponential' is not allowed for {method.method} (sparse_cfg.{pattern})")
    for phase in targets:
        try:
            _plans(config, _methods_of(methods, phase), phase)
        except ConfigError as error:
            name = {"prefill": "target", "decode": "decode_target"}[phase]
            raise ConfigError(f"{name}: cannot be calibrated with this config: {error}") from None
    tokens = read_windows(data, model, tokenizer, lengths, windows, seed)
    header = {
        "kind": "calibration",
        "config": config.model_dump(mode="json"),
        "values": {pattern: method.knob.values for pattern, method in methods.items()},
        "model": describe_model(model),
    }
    journal = Journal(state, header)
    found = []
    try:
        with progress_bar(show_progress, len(tokens) * (1 + len(REFINED) * refine) * len(targets)) as step:
            for phase, wanted in targets.items():
                read = partial(_read, model, config, phase, tokens, journal, step)
                tables = read(None)
                fits = _fits(tables, {}, form)
                if refine:
                    sparse = {near: read(_with_fits(config, phase, fits, near)) for near in REFINED}
                    fits = _fits(tables, sparse, form)
                found.append(_Found(phase, wanted, tables, fits))
    finally:
        unsparsify(model)
    result = _conclude(config, found)
    for warning in result.warnings:
        logger.warning(warning)
    return result


def check_targets(
    target: float | None, decode_target: float | None, names: tuple[str, str] = ("target", "decode_target")
) -> dict[Phase, float]:
    """Return the target of each phase, from the arguments of :func:`calibrate`.

    Args:
        target: of prefill.
        decode_target: of decode steps.
        names: what errors call them.

    Raises:
        ConfigError: if none is given, or one is out of its range.
    """
    found: dict[Phase, float] = {}
    phases: tuple[tuple[Phase, float | None], ...] = (("prefill", target), ("decode", decode_target))
    for name, (phase, value) in zip(names, phases, strict=True):
        if value is None:
            continue
        if not 0 < value < 1:
            raise ConfigError(f"{name}: {value!r} is not allowed; a number > 0 and < 1")
        found[phase] = value
    if not found:
        raise ConfigError(f"{names[0]}: is missing; must have {names[0]} or {names[1]}")
    return found


def _read(
    model: nn.Module,
    config: SparsityConfig,
    phase: Phase,
    tokens: Sequence[Tensor],
    journal: Journal,
    step: Callable[[str], None],
    sparse: SparsityConfig | None,
) -> dict[str, _Tables]:
    """Let the model read all windows, dense or as another configuration says; return what each pattern counted."""
    methods = _methods_of(_calibrated(config), phase)
    plans = _plans(config, methods, phase)
    # Layers that are dense in decode do not hand over what they compute there.
    sparsify(model, sparse or _with_knobs(config, methods, phase))
    counters = _counters(model, config, plans, phase, is_dense=sparse is None)
    prefix = "" if sparse is None else digest(torch.tensor(list(sparse.model_dump_json().encode()))) + "/"
    tables = {pattern: _Tables(pattern, method, phase) for pattern, method in methods.items()}
    measure = {"prefill": _measure, "decode": _measure_decode}[phase]
    for window in tokens:
        step(f"{phase}, {window.numel()} tokens")
        measured = journal.get(f"{phase}/{prefix}{digest(window)}", partial(measure, model, counters, window))
        for table in tables.values():
            table.begin(window.numel())
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


def _methods_of(methods: Mapping[str, CalibratedMethod], phase: Phase) -> dict[str, CalibratedMethod]:
    """Return the methods that can be sparse in a phase."""
    return {pattern: method for pattern, method in methods.items() if phase in method.knobs()}


def _replaced(entry: Any, old: CalibratedMethod, new: CalibratedMethod) -> SparseAttentionMethod:
    """Return an entry with its method that has a knob replaced."""
    if isinstance(entry, Combined):
        return Combined(methods=tuple(new if part is old else part for part in entry.methods))
    return new


def _with_knobs(config: SparsityConfig, methods: Mapping[str, CalibratedMethod], phase: Phase) -> SparsityConfig:
    """Return a configuration that is sparse in a phase, no matter how sparse."""
    entries: dict[str, Any] = dict(config.sparse_cfg)
    for pattern, method in methods.items():
        entries[pattern] = _replaced(entries[pattern], method, method.with_knob(method.knob.values[0], phase))
    return SparsityConfig(sparse_cfg=entries)


def _plans(
    config: SparsityConfig, methods: Mapping[str, CalibratedMethod], phase: Phase
) -> dict[str, list[AttentionPlan]]:
    """Return for each pattern a plan for each value of its knob."""
    return {
        pattern: [
            _replaced(config.sparse_cfg[pattern], method, method.with_knob(x, phase)).plan() for x in method.knob.values
        ]
        for pattern, method in methods.items()
    }


def _counters(
    model: nn.Module,
    config: SparsityConfig,
    plans: Mapping[str, Sequence[AttentionPlan]],
    phase: Phase,
    is_dense: bool,
) -> dict[Any, _Counter]:
    modules = sparse_modules(model)
    return {
        modules[name]: _Counter(name, pattern, plans[pattern], phase, is_dense)
        for name, pattern in config.deciding_patterns(modules).items()
        if pattern in plans
    }


class _Counter:
    """Counts in one layer which blocks each value of a knob would visit in a phase; the other phase is dense.

    The phase itself may be dense, too.
    """

    def __init__(self, layer: str, pattern: str, plans: Sequence[AttentionPlan], phase: Phase, is_dense: bool) -> None:
        self.phase, self.is_dense = phase, is_dense
        self.layer, self.pattern, self.plans = layer, pattern, plans
        self.counts: tuple[Tensor, Tensor, Tensor] | None = None

    def observe(self, request: AttentionRequest) -> AttentionRequest:
        """Count a call's blocks, and return the call to compute."""
        if self.phase == "decode" and request.max_q > 1:
            return request._replace(plan=DENSE)
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


def decode_positions(length: int) -> list[int]:
    """Return the tokens of a window that are read by themselves, spread over the window and over places in blocks."""
    return sorted({int(length * (i * GOLDEN_RATIO % 1)) for i in range(1, DECODE_STEPS + 1)})


@torch.no_grad()
def _measure_decode(model: nn.Module, counters: Mapping[Any, _Counter], window: Tensor) -> dict[str, Any]:
    """Let the model read a window with some tokens by themselves, over a cache; return what each layer counted."""
    tokens, cache, begin = window[None].to(next(model.parameters()).device), None, 0
    with count(counters):
        for position in decode_positions(window.numel()):
            for part in (tokens[:, begin:position], tokens[:, position : position + 1]):
                if part.numel():
                    output = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    cache = output.past_key_values
                    if cache is None:
                        raise UnsupportedError("decode_target: the model returns no cache, which decode steps need")
            begin = position + 1
    return {counter.layer: counter.take() for counter in counters.values()}


@dataclass
class _Counts:
    """The counts of one window, or of several.

    Attributes:
        seen: blocks that are seen by query blocks that see ``n`` of them, by ``n``.
        visited: those of them that each value of the knob visits, ``[values, n]``.
    """

    seen: Tensor
    visited: Tensor

    def add(self, seen: Tensor, visited: Tensor) -> None:
        self.seen, self.visited = _sum_padded(self.seen, seen), _sum_padded(self.visited, visited)


class _Tables:
    """The counts of one pattern in all windows, in one phase.

    Attributes:
        windows: the counts of each window over all layers.
        lengths: how many tokens each of them has.
    """

    def __init__(self, pattern: str, method: CalibratedMethod, phase: Phase = "prefill") -> None:
        self.pattern, self.method, self.phase = pattern, method, phase
        self.knob: Knob = method.knobs()[phase]
        self.windows: list[_Counts] = []
        self.lengths: list[int] = []
        self._groups: dict[str, tuple[int, Tensor]] = {}
        self._scale = torch.tensor([self.knob.transform(x) for x in self.knob.values], dtype=torch.float64)

    def begin(self, length: int) -> None:
        """Begin a window."""
        self.windows.append(_Counts(torch.zeros(1).double(), torch.zeros(len(self._scale), 1).double()))
        self.lengths.append(length)

    def add(self, layer: str, counts: Mapping[str, Any]) -> None:
        """Add the counts of one layer in the window that was begun last."""
        self.windows[-1].add(torch.tensor(counts["seen"]).double(), torch.tensor(counts["visited"]).double())
        before, groups = self._groups.get(layer, (0, torch.zeros(())))
        self._groups[layer] = (before + counts["seen_by_group"], groups + torch.tensor(counts["groups"]).double())

    def groups(self) -> list[HeadGroup]:
        """Return the sparsity of every layer and head group."""
        return [
            HeadGroup(self.pattern, layer, self.phase, group, tuple((1 - row / seen).tolist()))
            for layer, (seen, rows) in self._groups.items()
            for group, row in enumerate(rows)
        ]

    def reach(self) -> list[Reach]:
        """Return for each length the least and the largest sparsity that windows of this length had."""
        found = []
        for length in sorted(set(self.lengths)):
            windows = [x for x, tokens in zip(self.windows, self.lengths, strict=True) if tokens == length]
            seen, visited = sum(x.seen.sum() for x in windows), sum(x.visited.sum(1) for x in windows)
            shares = 1 - torch.as_tensor(visited / seen)
            found.append(Reach(self.pattern, self.phase, length, shares.min().item(), shares.max().item()))
        return found

    def shares(self) -> list[tuple[float, Tensor]]:
        """Return for some ranges of lengths their mean, and the sparsity at each value of the knob."""
        whole = _Counts(torch.zeros(1).double(), torch.zeros(len(self._scale), 1).double())
        for window in self.windows:
            whole.add(window.seen, window.visited)
        size, numbers, found = self.method.block_size, torch.arange(len(whole.seen)), []
        for low, high in pairwise(FEWEST_BLOCKS * 2**i for i in range(32)):
            number = numbers[low + 1 : high + 1]
            seen = whole.seen[number]
            if seen.sum() > 0:
                length = size * math.exp(float((seen * number.log()).sum() / seen.sum()))
                found.append((length, 1 - whole.visited[:, number].sum(-1) / seen.sum()))
        return found

    def points(self) -> list[_Point]:
        """Return what the exponential form is fitted to."""
        values = self.knob.values
        found = [_Point(n, s, x) for n, shares in self.shares() for s, x in zip(shares.tolist(), values, strict=True)]
        return [point for point in found if FITTED[0] < point.sparsity < FITTED[1]]

    def knob_at(self, shares: Tensor, target: float) -> float:
        """Return the knob, on its scale, at which a target is skipped; the nearest value if none skips so much."""
        falls = bool(shares[0] > shares[-1])
        shares, scale = (shares.flip(0), self._scale.flip(0)) if falls else (shares, self._scale)
        return _interpolated(target, shares, scale)

    def clipped(self, knob: float) -> float:
        """Return a number on the knob's scale that lies between those of the values that were tried."""
        return min(max(knob, self._scale.min().item()), self._scale.max().item())

    def skipped(self, window: _Counts, method: CalibratedMethod) -> float:
        """Return what a calibrated method skips of a window."""
        curve = method.knob_curve(self.phase)
        assert curve is not None
        number = window.seen.nonzero().flatten()
        order = self._scale.argsort()
        shares = (window.visited[:, number] / window.seen[number])[order]
        knobs = curve.at(number * self.method.block_size).tolist()
        kept = [_interpolated(x, self._scale[order], shares[:, i]) for i, x in enumerate(knobs)]
        seen = window.seen[number]
        return 1 - float((torch.tensor(kept).double() * seen).sum() / seen.sum())


@dataclass(frozen=True)
class _Point:
    length: float
    sparsity: float
    knob: float


def _interpolated(x: float, xs: Tensor, ys: Tensor) -> float:
    """Return what lies at ``x`` on the line through points whose ``xs`` do not fall; outside, at the nearest point."""
    x = min(max(x, xs[0].item()), xs[-1].item())
    after = min(max(1, int(torch.searchsorted(xs, x, right=bool(x <= xs[0])))), len(xs) - 1)
    (low, high), (start, end) = xs[after - 1 : after + 1].tolist(), ys[after - 1 : after + 1].tolist()
    share = (x - low) / (high - low) if high > low else 0.0
    return float(start + (end - start) * share)


def _sum_padded(a: Tensor, b: Tensor) -> Tensor:
    """Add tensors whose last dimensions differ."""
    longest = max(a.shape[-1], b.shape[-1])
    a, b = (torch.nn.functional.pad(x, (0, longest - x.shape[-1])) for x in (a, b))
    return a + b


Fits: TypeAlias = "dict[str, ExponentialFit | TableFit]"
"""Fits by pattern."""


@dataclass(frozen=True)
class _Found:
    """What was found in one phase: the counts of the dense model by pattern, and the fits to a target."""

    phase: Phase
    target: float
    tables: Mapping[str, _Tables]
    fits: Fits


def _fits(tables: Mapping[str, _Tables], sparse: Mapping[float, Mapping[str, _Tables]], form: Form) -> Fits:
    """Fit each pattern.

    Args:
        tables: what the dense model counted, by pattern.
        sparse: what the model counted that was sparse with a target, if there is any.
        form: of the fit.
    """
    fits: Fits = {}
    for pattern, table in tables.items():
        refined = {near: found[pattern] for near, found in sparse.items()}
        fit = _exponential_fit(table, refined) if form == "exponential" else _table_fit(table, refined)
        errors = [
            table.skipped(window, table.method.with_target(near, table.phase, fit)) - near
            for near in REFINED
            for window in refined.get(near, table).windows
        ]
        error = round(math.sqrt(sum(x * x for x in errors) / len(errors)), 6)
        fits[pattern] = fit.model_copy(update={"error": error})
    return fits


def _with_fits(config: SparsityConfig, phase: Phase, fits: Fits, target: float) -> SparsityConfig:
    """Return a configuration with calibrations and a target in a phase."""
    entries: dict[str, Any] = dict(config.sparse_cfg)
    for pattern, method in _calibrated(config).items():
        if pattern in fits:
            calibrated = method.with_target(target, phase, fits[pattern])
            entries[pattern] = _replaced(entries[pattern], method, calibrated)
    return SparsityConfig(sparse_cfg=entries)


def _conclude(config: SparsityConfig, found: Sequence[_Found]) -> CalibrationResult:
    """Put what was found in each phase together."""
    result = CalibrationResult(config, {}, [], [])
    for phase, target, tables, fits in ((x.phase, x.target, x.tables, x.fits) for x in found):
        result = replace(result, config=_with_fits(result.config, phase, fits, target))
        for pattern, table in tables.items():
            result.values[pattern] = table.knob.values
            result.groups.extend(table.groups())
            for here in table.reach():
                result.reach.append(here)
                if not here.lowest <= target <= here.highest:
                    result.warnings.append(
                        f"sparse_cfg.{pattern} ({table.method.method}): the target {target:g} lies outside of "
                        f"{here.lowest:.2f} to {here.highest:.2f}, which was seen at {here.length} tokens in {phase}"
                    )
    return result


def _table_fit(table: _Tables, refined: Mapping[float, _Tables]) -> TableFit:
    """Find the knob for each length and target; what is skipped by a sparse model corrects it."""
    shares, knob = table.shares(), table.knob
    seen = _seen(table, [share for _, row in shares for share in row.tolist()])
    knobs = [[table.knob_at(row, target) for target in TARGETS] for _, row in shares]
    if refined:
        nearest = [min(refined, key=lambda near: abs(near - target)) for target in TARGETS]
        found = {near: counts.shares() for near, counts in refined.items()}
        for i, row in enumerate(knobs):
            change = {
                near: table.knob_at(found[near][i][1], near) - table.knob_at(shares[i][1], near) for near in refined
            }
            knobs[i] = [table.clipped(x + change[near]) for x, near in zip(row, nearest, strict=True)]
    values = [knob.inverse(torch.tensor(row, dtype=torch.float64)).tolist() for row in knobs]
    return TableFit(
        form="table",
        lengths=tuple(round(length, 1) for length, _ in shares),
        targets=TARGETS,
        knobs=tuple(tuple(float(f"{x:.9g}") for x in row) for row in values),
        **seen,
    )


def _exponential_fit(table: _Tables, refined: Mapping[float, _Tables]) -> ExponentialFit:
    """Fit by least squares on the logarithm of the knob."""
    points = table.points()
    if refined:
        points = [x for near, found in refined.items() for x in found.points() if abs(x.sparsity - near) <= NEAR]
    seen = _seen(table, [point.sparsity for point in points])
    rows = torch.tensor([[1.0, point.sparsity] for point in points], dtype=torch.float64)
    goals = torch.tensor([[math.log(point.knob * point.length)] for point in points], dtype=torch.float64)
    log_a, b = torch.linalg.lstsq(rows, goals).solution[:, 0].tolist()
    if b <= 0:
        raise ConfigError(f"{_where(table)}: cannot be fitted; the sparsity does not grow with {table.knob.field}")
    # More digits are noise, and long to read.
    return ExponentialFit(form="exponential", a=float(f"{math.exp(log_a):.7g}"), b=float(f"{b:.7g}"), **seen)


def _where(table: _Tables) -> str:
    return f"sparse_cfg.{table.pattern} ({table.method.method})"


def _seen(table: _Tables, shares: Sequence[float]) -> dict[str, Any]:
    """Return the range of some sparsities, as a fit holds it.

    Raises:
        ConfigError: if they say too little.
    """
    if len({round(share, 6) for share in shares if FITTED[0] < share < FITTED[1]}) < 3:
        raise ConfigError(
            f"{_where(table)}: cannot be fitted; fewer than three values of {table.knob.field} gave a sparsity "
            f"between {FITTED[0]:.0%} and {FITTED[1]:.0%}. Give longer windows, or let the method keep fewer blocks in "
            "any case"
        )
    return {"lowest": round(min(shares), 6), "highest": round(max(shares), 6)}
