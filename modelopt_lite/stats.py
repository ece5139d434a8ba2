"""What sparsity keeps, measured on real forward passes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, distributed, nn

from .kernels import COUNTS, AttentionRequest, count_kept, count_prefill, with_lists
from .models.module import count, sparse_modules

_lock = threading.Lock()
"""Held while counts grow, as several threads may call a layer."""


class LayerStatistics:
    """Counts of one layer, or of several together, over all prefills seen.

    They are added up on the layer's device, or devices; reading one of the properties waits for them.

    Attributes:
        is_exact: whether all query blocks are counted, however long the sequences are.
        is_estimate: whether a sample of query blocks was counted in any call so far. Counts are then those of the
            sample times the query blocks for which each of them stands.
        decode: the same over decode steps, if the method is sparse in them; None before any was counted.
    """

    def __init__(self, *, is_exact: bool = False) -> None:
        self.is_exact, self.is_estimate = is_exact, False
        self._by_device: dict[torch.device, Tensor] = {}  # of calls, FP64 [query_heads, len(COUNTS)]
        self._merged = [0.0] * len(COUNTS)  # of other layers
        self.decode: LayerStatistics | None = None

    def observe(self, request: AttentionRequest) -> AttentionRequest:
        """Add what a call keeps, and return it, with the blocks that its plan chooses if they were needed here.

        A sequence with a single query is a decode step.
        """
        request = with_lists(request)
        without_values = request._replace(v=request.k, s_aux=None)
        if request.max_q > 1:
            device = request.q.device
            with _lock:
                counts = self._by_device.get(device)
                self._by_device[device], times = count_prefill(without_values, counts, is_exact=self.is_exact)
                self.is_estimate = self.is_estimate or times > 1
        if request.plan.sparse_decode:
            is_single = request.lengths_q == 1
            decode = without_values._replace(lengths_q=request.lengths_q.masked_fill(~is_single, 0), max_q=1)
            kept = count_kept(decode)
            with _lock:
                self.decode = self.decode or LayerStatistics(is_exact=True)
                by_device = self.decode._by_device
                before = by_device.get(kept.device)
                by_device[kept.device] = kept if before is None else before + kept
        return request

    def merge(self, other: LayerStatistics) -> None:
        """Add the counts of another layer, which may be on another device."""
        self._merged = [a + b for a, b in zip(self._merged, other.counts(), strict=True)]
        self.is_estimate = self.is_estimate or other.is_estimate
        if other.decode is not None:
            self.decode = self.decode or LayerStatistics()
            self.decode.merge(other.decode)

    def counts(self) -> list[float]:
        """Return what :data:`~modelopt_lite.kernels.COUNTS` names, over all heads; waits for the device."""
        of_devices = [x.sum(0).tolist() for x in self._by_device.values()]
        return [sum(column) for column in zip(self._merged, *of_devices, strict=True)]

    def replace_counts(self, counts: list[float]) -> None:
        """Take other counts for all so far; those by head are lost."""
        self._by_device, self._merged = {}, counts

    def _count(self, name: str) -> float:
        return self.counts()[COUNTS.index(name)]

    @property
    def rows(self) -> int:
        """Query rows over all heads that see any key."""
        return int(self._count("rows"))

    @property
    def visible(self) -> int:
        """Scores at visible keys."""
        return int(self._count("visible"))

    @property
    def kept(self) -> int:
        """Scores that took part in the softmax."""
        return int(self._count("kept"))

    @property
    def mass(self) -> float:
        """Sum over the rows of the share of the dense attention that lies on kept keys."""
        return self._count("mass")

    @property
    def blocks(self) -> int:
        """Pairs of a query block and a key block, over all heads, of which any query sees any key.

        0 if the method knows no blocks.
        """
        return int(self._count("blocks"))

    @property
    def blocks_visited(self) -> int:
        """Those of the blocks whose keys take part, and not only sinks and dense window."""
        return int(self._count("blocks_visited"))

    @property
    def blocks_skipped(self) -> int:
        """Those of the blocks that a selector kept, if there is one, and skip-softmax skipped."""
        return int(self._count("blocks_skipped"))

    @property
    def block_sparsity(self) -> float:
        """Share of the blocks that were not visited; 0 if the method knows no blocks."""
        return 1 - self.blocks_visited / self.blocks if self.blocks else 0.0

    @property
    def sparsity(self) -> float:
        """Share of visible scores that were dropped; 0 before anything was counted."""
        return 1 - self.kept / self.visible if self.visible else 0.0

    @property
    def mass_kept(self) -> float:
        """Mean share of the dense attention on kept keys, from 0 to 1; 1 before anything was counted."""
        return self.mass / self.rows if self.rows else 1.0

    @property
    def mass_kept_by_head(self) -> list[float]:
        """Mean share of the dense attention on kept keys, for each query head of one layer.

        Empty for sums over layers, and before anything was counted.
        """
        return self._shares_by_head("mass", "rows")

    @property
    def sparsity_by_head(self) -> list[float]:
        """Share of the visible scores that each query head dropped; empty as :attr:`mass_kept_by_head` is."""
        return [1 - share for share in self._shares_by_head("kept", "visible")]

    @property
    def block_sparsity_by_head(self) -> list[float]:
        """Share of the blocks that each query head did not visit; also empty if the method knows no blocks."""
        return [1 - share for share in self._shares_by_head("blocks_visited", "blocks")] if self.blocks else []

    @property
    def blocks_skipped_by_head(self) -> list[float]:
        """Share of the blocks that skip-softmax skipped for each query head, or an empty list as above."""
        return self._shares_by_head("blocks_skipped", "blocks") if self.blocks else []

    def _shares_by_head(self, name: str, of: str) -> list[float]:
        if not self._by_device:
            return []
        by_head = torch.stack([x.cpu() for x in self._by_device.values()]).sum(0)
        part, whole = (by_head[:, COUNTS.index(x)] for x in (name, of))
        shares: list[float] = (part / whole.clamp(min=1)).tolist()
        return shares


@dataclass
class ModelStatistics:
    """Statistics of a model by layer name.

    Attributes:
        layers: the counters of every sparse layer, in the model's order.
    """

    layers: dict[str, LayerStatistics] = field(default_factory=dict)

    def __str__(self) -> str:
        """Say what was dropped and kept over all layers, or that nothing was counted."""
        total = self.total
        phases = {"": total if total.rows else None, " in decode": total.decode}
        found = [
            f"{phase.sparsity:.1%} of scores dropped, {phase.mass_kept:.1%} of mass kept{where}"
            for where, phase in phases.items()
            if phase is not None
        ]
        if not found:
            return "no sparse prefill was counted: the model is dense, is switched off, or has only decoded"
        sample = " (estimated by a sample of the queries)" if total.is_estimate else ""
        return f"{len(self.layers)} layers: {'; '.join(found)}{sample}"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{name}</td><td>{layer.sparsity:.1%}</td><td>{layer.mass_kept:.1%}</td></tr>"
            for name, layer in self.layers.items()
            if layer.rows
        )
        head = "<tr><th>layer</th><th>dropped</th><th>mass kept</th></tr>"
        return f"<p>{self}</p>" + (f"<table>{head}{rows}</table>" if rows else "")

    def merge(self, other: ModelStatistics) -> None:
        """Add what was counted elsewhere, layer by layer."""
        for name, layer in other.layers.items():
            self.layers.setdefault(name, LayerStatistics()).merge(layer)

    def sum_over_ranks(self, group: distributed.ProcessGroup | None = None) -> None:
        """Add what the other processes counted of the same model; every process then has the sum.

        Right where processes share the heads (tensor parallelism), the tokens (context parallelism) or the batch. Call
        it once, after the last forward pass, in all processes of the group. Numbers by head are lost, as processes may
        have different heads.

        Args:
            group: the processes; by default all.
        """
        on_gpu = distributed.get_backend(group) == "nccl"
        # A process may have counted decode steps where others have not.
        phases = [phase for x in self.layers.values() for phase in (x, x.decode or LayerStatistics())]
        counts = torch.tensor(
            [[*phase.counts(), phase.is_estimate] for phase in phases],
            dtype=torch.float64,  # exact for integers up to 2^53
            device="cuda" if on_gpu else "cpu",
        )
        distributed.all_reduce(counts, group=group)
        for phase, (*summed, estimates) in zip(phases, counts.tolist(), strict=True):
            phase.replace_counts(summed)
            phase.is_estimate = estimates > 0
        for layer, decode in zip(self.layers.values(), phases[1::2], strict=True):
            layer.decode = decode if decode.rows else None

    @property
    def total(self) -> LayerStatistics:
        """All layers together."""
        total = LayerStatistics()
        for layer in self.layers.values():
            total.merge(layer)
        return total


@contextmanager
def collect_statistics(model: nn.Module, *, exact: bool = False) -> Iterator[ModelStatistics]:
    """Count what the sparse layers of a model keep, over every call inside the ``with`` block.

    In sequences of 16 or more query blocks (2048 tokens, unless the method has blocks of another size) 4 to 8 query
    blocks at equal distances are counted, and each stands for those around it. All counts are then estimates. A GPU
    computes the scores of the counted queries once more in a kernel, or by PyTorch operations if the method's rule has
    no hook. On a CPU PyTorch computes them. With ``exact=True`` all queries are counted, which takes about as long as
    dense attention, or longer. Every run counts the same queries.

    Prefills and decode steps are counted apart. Decode steps are counted only if the method is sparse in them, and then
    all of them. Not counted are layers that are switched off, what gradient checkpointing computes again, and calls in
    threads that the code in the block starts. Threads of continuous batching and of ``DataParallel`` are counted.
    Counting does not wait for the device. A CUDA graph is refused, because its replays would not be counted.

    Args:
        model: a model after :func:`~modelopt_lite.conversion.sparsify`. Without sparse layers nothing is counted.
        exact: whether to count all queries of long sequences, too.

    Yields:
        The statistics, which grow with every prefill.
    """
    modules = sparse_modules(model)
    statistics = ModelStatistics({name: LayerStatistics(is_exact=exact) for name in modules})
    with count({module: statistics.layers[name] for name, module in modules.items()}):
        yield statistics
