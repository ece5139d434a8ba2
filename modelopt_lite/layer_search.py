"""Search: choose a method for each layer, so that a budget is met at the least loss or the most gain.

The loss of a choice is the KL divergence from the dense model's predictions with this layer alone sparse. Losses and
gains of layers are taken to add up, which makes the choice a knapsack problem, solved by dynamic programming. They do
not add up exactly. So each proposal is run, and what counts for the budget is what the run measures.
"""

from __future__ import annotations

import glob
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .config import DEFAULT_PATTERN, ConfigSource, Disabled, SparsityConfig
from .conversion import disable_sparse_attention, enable_sparse_attention, sparsify, unsparsify
from .errors import ConfigError
from .experiment.measuring import Data, Journal, check_dense, describe_model, digest, progress_bar, read_windows
from .experiment.quality import compare_predictions
from .experiment.speed import wait_for
from .kernels import AttentionRequest, compute
from .methods import SparseAttentionMethod
from .models.module import count, sparse_modules
from .plan import DENSE
from .stats import collect_statistics

logger = logging.getLogger(__name__)

Budget: TypeAlias = Literal["sparsity", "speedup", "kl", "perplexity"]

DENSE_LAYER = "dense"
"""The name of the choice to leave a layer as it is; it is always there."""
STEPS = 20_000
"""Into so many parts dynamic programming divides the whole gain."""
TRIALS = 8
"""Most proposals that are run until one meets the budget."""
ROUNDING = 1e-9
"""Sums of gains that should be equal differ by less."""
TIMED = 5
"""Runs of a layer's attention, of which the fastest counts."""


@dataclass(frozen=True)
class Run:
    """What a real run of a model measured over all windows.

    Attributes:
        kl: KL(dense || sparse) of the next-token distributions, nats a token.
        perplexity_percent: change of the perplexity against the dense model.
        sparsity: share of the visible scores that were dropped, over all layers.
    """

    kl: float
    perplexity_percent: float
    sparsity: float

    def __str__(self) -> str:
        """Return the figures in words."""
        return (
            f"KL {self.kl:.5f} nats a token, perplexity {self.perplexity_percent:+.2f} %, "
            f"{self.sparsity:.1%} of scores dropped"
        )


@dataclass(frozen=True)
class LayerChoice:
    """What was chosen for a layer.

    Attributes:
        layer: dotted name.
        candidate: name of the candidate, or ``"dense"``.
        kl: by candidate, the KL divergence with this layer alone sparse.
        gain: by candidate, what the layer would add to the gain of the whole model: to its sparsity, or with a speed
            budget to the share of the attention's time that is saved.
    """

    layer: str
    candidate: str
    kl: dict[str, float]
    gain: dict[str, float]


@dataclass(frozen=True)
class SearchResult:
    """What :func:`search` found.

    Attributes:
        config: the configuration, with a method for each layer.
        budget: what was asked for, in words.
        run: what a run with the configuration measured.
        predicted_kl: the sum of the KL divergences of its layers alone.
        predicted_speedup: dense attention time over that of the layers' choices; None without a speed budget.
        everywhere: what runs with one candidate in all layers measured.
        layers: the layers, in order.
        windows: number of windows and of tokens they were measured on.
        warnings: that no run meets the budget, or which candidates in all layers meet it with less perplexity, at a
            larger KL divergence.
    """

    config: SparsityConfig
    budget: str
    run: Run
    predicted_kl: float
    predicted_speedup: float | None
    everywhere: dict[str, Run]
    layers: list[LayerChoice]
    windows: tuple[int, int]
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Return the runs as a table, and which layer got what."""
        table = Table("", "KL", "perplexity", "scores dropped")
        for name, run in {
            **{f"{name} everywhere": run for name, run in self.everywhere.items()},
            "searched": self.run,
        }.items():
            table.add_row(name, f"{run.kl:.5f}", f"{run.perplexity_percent:+.2f} %", f"{run.sparsity:.1%}")
        console = Console(width=100, color_system=None)
        with console.capture() as captured:
            console.print(table)
        return f"{captured.get()}{self._choices()}\n{self._warned()}"

    def _warned(self) -> str:
        return "".join(f"warning: {warning}\n" for warning in self.warnings)

    def _choices(self) -> str:
        chosen = Counter(layer.candidate for layer in self.layers)
        return "layers: " + ", ".join(f"{number} {name}" for name, number in chosen.most_common())

    def save(self, path: str | Path) -> None:
        """Write the configuration as YAML, with what was measured as comments at its head."""
        number, tokens = self.windows
        speed = (
            "" if self.predicted_speedup is None else f"attention {self.predicted_speedup:.2f} times as fast as dense\n"
        )
        lines = "".join(f"{name} everywhere: {run}\n" for name, run in self.everywhere.items())
        layers = "".join(
            f"{layer.layer}: {layer.candidate}"
            + (f", KL alone {layer.kl[layer.candidate]:.6f}\n" if layer.kl.get(layer.candidate) else "\n")
            for layer in self.layers
        )
        head = (
            f"A method for each layer, found by modelopt-lite search; the budget was: {self.budget}.\n"
            f"Measured on {number} window{'s' if number > 1 else ''}, {tokens} tokens: {self.run}\n"
            f"{speed}{lines}Sum of the layers' KL alone: {self.predicted_kl:.5f}\n{self._warned()}"
            f"{self._choices()}\n{layers}"
        )
        self.config.save(path, head)


def search(
    model: nn.Module,
    candidates: Mapping[str, ConfigSource] | Sequence[str],
    data: Data,
    *,
    sparsity: float | str | None = None,
    speedup: float | None = None,
    kl: float | None = None,
    perplexity: float | None = None,
    tokenizer: Any = None,
    lengths: Sequence[int] = (2048,),
    windows: int = 4,
    seed: int = 0,
    state: str | Path | None = None,
    show_progress: bool = True,
) -> SearchResult:
    """Choose one of several methods for each layer, or none.

    Exactly one budget is given. For ``sparsity`` and ``speedup`` the loss is made as small as possible, for ``kl`` and
    ``perplexity`` the sparsity as large as possible. Each layer runs alone with each candidate, so the time grows with
    the layers times the candidates times the windows.

    Args:
        model: a causal language model that is not sparse; it stays dense.
        candidates: by name, a method as a mapping, its name, N:M, a list of methods, or a configuration with ``"*"``
            alone; or a list of names such as ``["2:4", "4:8"]``. To leave a layer dense is always possible.
        data: what to read, as for :func:`~modelopt_lite.calibrate`; text that is not used for anything else.
        sparsity: the share of visible scores to drop at least, 0 to 1; or the name of a candidate, for as much as it
            drops in all layers.
        speedup: how many times as fast as dense attention the attention of all layers together is to be at least. It is
            measured on the longest window, on the model's device, by the time that each layer's attention takes alone.
        kl: the largest KL divergence from the dense model, nats a token.
        perplexity: the largest increase of the perplexity, percent.
        tokenizer: the model's tokenizer; not needed for token ids.
        lengths: tokens of a window.
        windows: windows of each text at each length.
        seed: of the choice of documents, and of the generated samples.
        state: a file that keeps what was measured; the same call continues after an interruption.
        show_progress: whether to draw a bar on the terminal.

    Raises:
        ConfigError: if an argument is wrong, or no choice of candidates can meet the budget. If one can by its layers'
            gains, and no run does, the nearest run is returned with a warning.
        UnsupportedError: if the model has a layer that is not supported.
    """
    kind, wanted = check_budget(sparsity=sparsity, speedup=speedup, kl=kl, perplexity=perplexity)
    check_dense(model)
    entries = _entries(candidates)
    if isinstance(wanted, str) and wanted not in entries:
        raise ConfigError(f"sparsity: {wanted!r} is not allowed; a number, or one of {', '.join(entries)}")
    tokens = read_windows(data, model, tokenizer, lengths, windows, seed)
    header = {
        "kind": "search",
        "candidates": {name: entry.model_dump(mode="json") for name, entry in entries.items()},
        "model": describe_model(model),
    }
    work = _Work(model, entries, tokens, Journal(state, header))
    try:
        with progress_bar(show_progress, work.steps(kind)) as step:
            everywhere = work.run_everywhere(step)
            losses = work.losses(step)
            gains = work.gains() if kind != "speedup" else work.savings(step)
            step("trying proposals")
            frontier = _Frontier(gains, losses)
            amount = everywhere[wanted].sparsity if isinstance(wanted, str) else wanted
            goal = 1 - 1 / amount if kind == "speedup" else amount
            chosen, run = _choose(work, frontier, kind, goal, everywhere)
    finally:
        unsparsify(model)
    words = f"{kind} = {wanted:g}" if not isinstance(wanted, str) else f"sparsity of {wanted} everywhere = {goal:.4f}"
    saved = sum(gains[layer][name] for layer, name in chosen.items())
    warnings = []
    if kind in ("sparsity", "speedup"):
        warnings = _missed(frontier, kind, goal, chosen, run) + _better_by_perplexity(frontier, goal, run, everywhere)
    for warning in warnings:
        logger.warning(warning)
    return SearchResult(
        config=work.config(chosen),
        budget=words,
        run=run,
        predicted_kl=sum(losses[layer][name] for layer, name in chosen.items()),
        predicted_speedup=1 / (1 - saved) if kind == "speedup" else None,
        everywhere=everywhere,
        layers=[
            LayerChoice(layer, name, _without_dense(losses[layer]), _without_dense(gains[layer]))
            for layer, name in chosen.items()
        ],
        windows=(len(tokens), sum(window.numel() for window in tokens)),
        warnings=warnings,
    )


def _missed(frontier: _Frontier, kind: Budget, goal: float, chosen: dict[str, str], run: Run) -> list[str]:
    """Say so if no run reached a gain."""
    reached = run.sparsity if kind == "sparsity" else frontier.gain_of(chosen)
    if reached >= goal - ROUNDING:
        return []
    return [f"{kind}: what was run reaches {reached:.5g} at most, and not {goal:.5g}"]


def _better_by_perplexity(frontier: _Frontier, goal: float, run: Run, everywhere: Mapping[str, Run]) -> list[str]:
    """Say which candidates reach a gain in all layers with less perplexity: KL and perplexity may disagree."""
    return [
        f"{name} everywhere meets the budget too, with {other}; what was chosen has less KL and more perplexity, so "
        "measure both on more text"
        for name, other in everywhere.items()
        if frontier.gain_everywhere(name) >= goal - ROUNDING and other.perplexity_percent < run.perplexity_percent
    ]


def _without_dense(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name != DENSE_LAYER}


def check_budget(**given: float | str | None) -> tuple[Budget, float | str]:
    """Return the only budget that is given, by the name of its argument.

    Raises:
        ConfigError: if it is not the only one, or out of its range.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) != 1:
        raise ConfigError(f"budget: must be exactly one of {', '.join(given)}; {_are_given(chosen)} given")
    ((name, value),) = chosen.items()
    if not isinstance(value, str):
        allowed = {"sparsity": (0, 1), "speedup": (1, math.inf), "kl": (0, math.inf), "perplexity": (0, math.inf)}[name]
        if not allowed[0] < value < allowed[1]:
            raise ConfigError(f"{name}: {value!r} is not allowed; a number > {allowed[0]} and < {allowed[1]}")
    return name, value  # type: ignore[return-value] # the names are those of the arguments


def _are_given(names: Iterable[str]) -> str:
    names = list(names)
    return f"{', '.join(names) or 'none'} {'are' if len(names) > 1 else 'is'}"


def _entries(candidates: Mapping[str, ConfigSource] | Sequence[str]) -> dict[str, SparseAttentionMethod]:
    if not isinstance(candidates, Mapping):
        candidates = {name: name for name in candidates}
    found: dict[str, SparseAttentionMethod] = {}
    for name, source in candidates.items():
        if name == DENSE_LAYER:
            raise ConfigError(f"candidates: {DENSE_LAYER!r} is not allowed as a name; it is always a choice")
        content = {"sparse_cfg": {"*": source}} if isinstance(source, list) else source
        config = SparsityConfig.load(content)
        entry = config.sparse_cfg.get("*")
        if len(config.sparse_cfg) != 1 or not isinstance(entry, SparseAttentionMethod) or not entry.enable:
            raise ConfigError(f"candidates.{name}: is not allowed; must be one method or a list of methods")
        found[name] = entry
    if not found:
        raise ConfigError("candidates: is empty; must name at least one method")
    return found


class _Found(NamedTuple):
    """One run on one window: means over its predicted tokens, and scores by sparse layer, visible ones and dropped."""

    kl: float
    cross_entropy: float
    visible: dict[str, int]
    dropped: dict[str, int]


class _Work:
    """Measures a model in all the ways that a search needs, each once."""

    def __init__(
        self,
        model: nn.Module,
        entries: Mapping[str, SparseAttentionMethod],
        windows: Sequence[Tensor],
        journal: Journal,
    ) -> None:
        self.model, self.entries, self.windows, self.journal = model, entries, windows, journal
        sparsify(model, next(iter(entries.values())))
        self.layers = list(sparse_modules(model))
        self._device = next(model.parameters()).device
        self._dense: tuple[str, Tensor] | None = None

    def steps(self, kind: Budget) -> int:
        """Return how often a progress bar is moved."""
        whole = 2 if kind == "speedup" else 1  # runs with a candidate everywhere
        return len(self.entries) * (whole + len(self.windows) * len(self.layers)) + 1

    def config(self, chosen: Mapping[str, str]) -> SparsityConfig:
        """Return the configuration of a choice for each layer; the most frequent one is its default."""
        common = Counter(chosen.values()).most_common(1)[0][0]
        content: dict[str, Any] = {} if common == DENSE_LAYER else {DEFAULT_PATTERN: self.entries[common]}
        for layer, name in chosen.items():
            if name != common:
                content[glob.escape(layer)] = Disabled(enable=False) if name == DENSE_LAYER else self.entries[name]
        return SparsityConfig(sparse_cfg=content)

    @torch.no_grad()
    def logits(self, window: Tensor) -> Tensor:
        """Return the model's logits ``[length, vocabulary]`` as it is now."""
        logits: Tensor = self.model(window[None].to(self._device), use_cache=False).logits[0]
        return logits

    def dense_logits(self, window: Tensor) -> Tensor:
        """Return the dense model's logits, kept for the last window that was asked for."""
        name = digest(window)
        if self._dense is None or self._dense[0] != name:
            self._dense = None  # frees memory first
            unsparsify(self.model)
            self._dense = (name, self.logits(window))
        return self._dense[1]

    def dense_loss(self, window: Tensor) -> float:
        """Return the dense model's cross-entropy on a window, nats a token."""

        def measure() -> float:
            dense = self.dense_logits(window)
            return compare_predictions(dense, dense, window.to(self._device)).cross_entropy

        loss: float = self.journal.get(f"dense/{digest(window)}", measure)
        return loss

    def run(self, config: SparsityConfig) -> Run:
        """Run a configuration over all windows."""
        found = [self._found(config, window) for window in self.windows]
        weights = [window.numel() - 1 for window in self.windows]
        losses = [x.cross_entropy - self.dense_loss(window) for x, window in zip(found, self.windows, strict=True)]
        change = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
        dropped = sum(sum(x.dropped.values()) for x in found)
        return Run(
            kl=sum(w * x.kl for w, x in zip(weights, found, strict=True)) / sum(weights),
            perplexity_percent=100 * math.expm1(change),
            sparsity=dropped / self.visible(),
        )

    def visible(self) -> int:
        """Return the visible scores of all layers in all windows."""
        first = _everywhere(next(iter(self.entries.values())))
        return sum(sum(self._found(first, window).visible.values()) for window in self.windows)

    def _found(self, config: SparsityConfig, window: Tensor) -> _Found:
        name = digest(torch.tensor(list(config.model_dump_json().encode())))
        return _Found(*self.journal.get(f"run/{name}/{digest(window)}", partial(self._run, config, window)))

    def _run(self, config: SparsityConfig, window: Tensor) -> _Found:
        dense = self.dense_logits(window)
        sparsify(self.model, config)
        with collect_statistics(self.model, exact=True) as statistics:
            sparse = self.logits(window)
        found = compare_predictions(sparse, dense, window.to(self._device))
        visible = {name: layer.visible for name, layer in statistics.layers.items()}
        dropped = {name: layer.visible - layer.kept for name, layer in statistics.layers.items()}
        return _Found(found.divergence, found.cross_entropy, visible, dropped)

    def run_everywhere(self, step: Callable[[str], None]) -> dict[str, Run]:
        """Run each candidate in all layers."""
        runs = {}
        for name, entry in self.entries.items():
            step(f"{name} everywhere")
            runs[name] = self.run(_everywhere(entry))
        return runs

    def losses(self, step: Callable[[str], None]) -> dict[str, dict[str, float]]:
        """Return by layer and candidate the KL divergence with this layer alone sparse."""
        total = sum(window.numel() - 1 for window in self.windows)
        losses = {layer: dict.fromkeys([DENSE_LAYER, *self.entries], 0.0) for layer in self.layers}
        for window in self.windows:
            for name, entry in self.entries.items():
                is_ready = False

                def measure(layer: str, window: Tensor = window, entry: SparseAttentionMethod = entry) -> float:
                    nonlocal is_ready
                    dense = self.dense_logits(window)
                    if not is_ready:
                        sparsify(self.model, entry)
                        disable_sparse_attention(self.model)
                        is_ready = True
                    enable_sparse_attention(self.model, glob.escape(layer))
                    sparse = self.logits(window)
                    disable_sparse_attention(self.model, glob.escape(layer))
                    return compare_predictions(sparse, dense, window.to(self._device)).divergence

                for layer in self.layers:
                    step(f"{name} in {layer}")
                    loss = self.journal.get(f"loss/{name}/{layer}/{digest(window)}", partial(measure, layer))
                    losses[layer][name] += loss * (window.numel() - 1) / total
        return losses

    def gains(self) -> dict[str, dict[str, float]]:
        """Return by layer and candidate what the layer adds to the model's sparsity where it is in all layers."""
        visible = self.visible()
        gains = {layer: dict.fromkeys([DENSE_LAYER, *self.entries], 0.0) for layer in self.layers}
        for name, entry in self.entries.items():
            for window in self.windows:
                for layer, dropped in self._found(_everywhere(entry), window).dropped.items():
                    gains[layer][name] += dropped / visible
        return gains

    def savings(self, step: Callable[[str], None]) -> dict[str, dict[str, float]]:
        """Return by layer and candidate the share of all layers' attention time that the layer would save."""
        window = max(self.windows, key=Tensor.numel)
        times = {}
        for name, entry in self.entries.items():
            step(f"how long {name} takes")
            times[name] = self.journal.get(f"time/{name}/{digest(window)}", partial(self._times, entry, window))
        dense = {layer: min(times[name][layer][0] for name in times) for layer in self.layers}
        whole = sum(dense.values())
        return {
            layer: {
                DENSE_LAYER: 0.0,
                **{name: (dense[layer] - found[layer][1]) / whole for name, found in times.items()},
            }
            for layer in self.layers
        }

    def _times(self, entry: SparseAttentionMethod, window: Tensor) -> dict[str, tuple[float, float]]:
        sparsify(self.model, entry)
        timers = {module: _Timer(entry) for module in sparse_modules(self.model).values()}
        with count(timers):
            self.logits(window)
        return {module.sparse_attention.name: timer.seconds for module, timer in timers.items()}


def _everywhere(entry: SparseAttentionMethod) -> SparsityConfig:
    return SparsityConfig(sparse_cfg={"*": entry})


class _Timer:
    """Measures how long one layer's attention takes, dense and sparse; the layer then is dense."""

    def __init__(self, method: SparseAttentionMethod) -> None:
        self.method = method
        self.seconds = (0.0, 0.0)

    def observe(self, request: AttentionRequest) -> AttentionRequest:
        """Run a call several times, and return it as a dense one."""
        dense = request._replace(plan=DENSE)
        self.seconds = (self._time(dense), self._time(request))
        return dense

    def _time(self, request: AttentionRequest) -> float:
        found = []
        for _ in range(1 + TIMED):  # the first warms up
            wait_for(request.q.device)
            start = perf_counter()
            compute(request, self.method.backend)
            wait_for(request.q.device)
            found.append(perf_counter() - start)
        return min(found[1:])


class _Frontier:
    """The least loss for every total gain, and what to choose for it: a knapsack with one choice for each layer.

    Gains are rounded to :data:`STEPS` parts of the whole. Choices that gain nothing but dense are left out.
    """

    def __init__(self, gains: Mapping[str, Mapping[str, float]], losses: Mapping[str, Mapping[str, float]]) -> None:
        self._layers, self._gains = list(gains), gains
        self._choices: list[list[tuple[str, int]]] = []
        best = torch.full((STEPS + 1,), torch.inf, dtype=torch.float64)
        best[0] = 0.0
        self._taken: list[Tensor] = []
        for layer in self._layers:
            choices = [(name, round(gain * STEPS)) for name, gain in gains[layer].items()]
            choices = [(name, gain) for name, gain in choices if gain > 0 or name == DENSE_LAYER]
            options = torch.full((len(choices), STEPS + 1), torch.inf, dtype=torch.float64)
            for row, (name, gain) in enumerate(choices):
                options[row, gain:] = best[: STEPS + 1 - gain] + losses[layer][name]
            best, taken = options.min(0)
            self._choices.append(choices)
            self._taken.append(taken)
        self._losses = best

    @property
    def most(self) -> float:
        """The largest gain that there is, not rounded."""
        return sum(max(gains.values()) for gains in self._gains.values())

    def gain_everywhere(self, name: str) -> float:
        """Return the gain of one candidate in all layers, not rounded."""
        return sum(gains[name] for gains in self._gains.values())

    def gain_of(self, chosen: Mapping[str, str]) -> float:
        """Return the gain of a choice by layer, not rounded."""
        return sum(self._gains[layer][name] for layer, name in chosen.items())

    def least_loss(self, gain: float) -> dict[str, str]:
        """Return the choice by layer with the least loss that gains at least so much, or else the largest gain."""
        start = min(round(gain * STEPS), self._last)
        return self._choice(start + int(self._losses[start:].argmin()))

    def most_gain(self, loss: float) -> dict[str, str]:
        """Return the choice by layer with the largest gain at no more than a loss."""
        return self._choice(int((self._losses <= loss).nonzero().max()))

    def loss_of_most(self) -> float:
        """Return the loss of the largest gain."""
        return float(self._losses[self._last])

    @property
    def _last(self) -> int:
        """The largest gain that there is, rounded, in steps."""
        return int(self._losses.isfinite().nonzero().max())

    def _choice(self, gain: int) -> dict[str, str]:
        chosen = {}
        for layer, choices, taken in zip(
            reversed(self._layers), reversed(self._choices), reversed(self._taken), strict=True
        ):
            name, part = choices[int(taken[gain])]
            chosen[layer] = name
            gain -= part
        return {layer: chosen[layer] for layer in self._layers}


def _choose(
    work: _Work, frontier: _Frontier, kind: Budget, goal: float, everywhere: Mapping[str, Run]
) -> tuple[dict[str, str], Run]:
    """Run proposals until one meets the budget, as measured; one candidate everywhere may be the best of them."""
    if kind in ("sparsity", "speedup"):
        return _choose_by_gain(work, frontier, kind, goal, everywhere)
    best = _meet_loss(work, frontier, goal, lambda run: run.kl if kind == "kl" else run.perplexity_percent)
    for name, run in everywhere.items():
        if (run.kl if kind == "kl" else run.perplexity_percent) <= goal and run.sparsity > best[1].sparsity:
            best = dict.fromkeys(work.layers, name), run
    return best


def _choose_by_gain(
    work: _Work, frontier: _Frontier, kind: Budget, goal: float, everywhere: Mapping[str, Run]
) -> tuple[dict[str, str], Run]:
    """Return the least loss of what reaches a gain: a measured sparsity, or the share of time that the layers save.

    Proposals ask for a little more where a run shows that less was dropped.
    """
    if goal > frontier.most + ROUNDING:
        most = frontier.most if kind == "sparsity" else 1 / (1 - frontier.most)
        raise ConfigError(f"{kind}: cannot be met; the candidates reach {most:.4g} at most")

    def reached(proposal: tuple[dict[str, str], Run]) -> float:
        chosen, run = proposal
        return run.sparsity if kind == "sparsity" else frontier.gain_of(chosen)

    proposals = [(dict.fromkeys(work.layers, name), run) for name, run in everywhere.items()]
    asked = goal
    for _ in range(TRIALS):
        chosen = frontier.least_loss(asked)
        proposals.append((chosen, work.run(work.config(chosen))))
        short, gain = goal - reached(proposals[-1]), frontier.gain_of(chosen)
        if short <= ROUNDING or max(asked, gain) >= frontier.most - ROUNDING:
            break
        asked = min(frontier.most, max(asked + short, gain + 1 / STEPS))
    fitting = [proposal for proposal in proposals if reached(proposal) >= goal - ROUNDING]
    if not fitting:
        return max(proposals, key=reached)
    return min(fitting, key=lambda proposal: proposal[1].kl)


def _meet_loss(
    work: _Work, frontier: _Frontier, goal: float, loss_of: Callable[[Run], float]
) -> tuple[dict[str, str], Run]:
    """Find the largest gain whose measured loss is within a budget, by bisection over the predicted loss."""
    best = dict.fromkeys(work.layers, DENSE_LAYER)
    run, low, high = Run(0.0, 0.0, 0.0), 0.0, math.inf
    limit = min(goal, frontier.loss_of_most())
    for _ in range(TRIALS):
        chosen = frontier.most_gain(limit)
        found = work.run(work.config(chosen))  # at once, if this choice was run before
        if loss_of(found) <= goal:
            low = limit
            if found.sparsity >= run.sparsity:
                best, run = chosen, found
        else:
            high = limit
        limit = min(2 * low, frontier.loss_of_most()) if high == math.inf else (low + high) / 2
    return best, run
