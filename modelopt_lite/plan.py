"""What a sparsity method asks of the attention kernels."""

from __future__ import annotations

import functools
import itertools
import json
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakValueDictionary

from .errors import ConfigError, UnsupportedError
from .registry import get_sparse_method

if TYPE_CHECKING:
    from torch import Tensor

KeepRule: TypeAlias = "Callable[[Tensor, Tensor, Tensor], Tensor]"
"""``keep(scores, q_pos, k_pos) -> bool tensor``, see :class:`AttentionPlan`."""

GROUP_SIZES = (1, 2, 4, 8, 16)
BLOCK_SIZE = 128
"""Default of keys in a key block and of queries in a query block."""

_BY_HAND = "by hand "
_ALL_BLOCKS = "all blocks of "
_this_process = uuid.uuid4().hex
_numbers = itertools.count()
_plans: dict[str, AttentionPlan] = {}
"""Plans of methods by name. They are kept, because a compiled program knows a plan by its name alone."""
_plans_by_hand: WeakValueDictionary[str, AttentionPlan] = WeakValueDictionary()


@dataclass(frozen=True)
class BlockSelector:
    """Which key blocks the queries of a query block look at.

    It scores every pair of a query block and a key block, and chooses by these scores. Blocks are anchored to
    positions: key ``j`` belongs to key block ``j // block_size``, the query at position ``p`` to query block
    ``p // block_rows``.

    Attributes:
        reference: the scores in FP64, which define the selector. Called with the
            :class:`~modelopt_lite.kernels.reference.SequenceBlocks` of one sequence; returns ``[query_heads,
            query_blocks, key_blocks]``.
        choose: the choice, called as ``choose(scores, seen, forced) -> booleans``. ``scores`` is ``[heads,
            query_blocks, key_blocks]`` in FP32 or FP64, ``seen`` (``[query_blocks, key_blocks]``) says where any query
            sees any key, ``forced`` which of these are kept in any case. What it returns where nothing is seen or all
            is forced does not matter. Scores where nothing is seen may hold anything.
        scores: the scores in FP32, for all sequences at once and without waiting for the device. Called with a
            :class:`~modelopt_lite.kernels.blocks.BlockGrid`; returns ``[query_heads, query_blocks, key_blocks]``, the
            query blocks of all sequences one after the other. None: ``reference`` is called for one sequence after the
            other, which waits for the device.
        block_size: keys in a key block, a multiple of 16.
        block_rows: positions in a query block, a multiple of ``block_size``.
        first_blocks: leading key blocks of each sequence that are always kept, >= 0.
        recent_blocks: last key blocks up to the diagonal that are always kept, >= 0; 1 is the diagonal alone.
        per_kv_head: whether all query heads that share keys share one choice, made by the sum of their scores.
        choice: the same as ``choose`` in words that kernels know: ``choice(seen, dtype)``, with the type of the scores,
            returns a :class:`~modelopt_lite.kernels.block_scores.BlockChoice`. It is called once for all calls that
            share their packing. None: ``choose`` alone says it.

    Raises:
        ValueError: if a number is out of its range.
    """

    reference: Callable[[Any], Tensor]
    choose: Callable[[Tensor, Tensor, Tensor], Tensor]
    scores: Callable[[Any], Tensor] | None = None
    block_size: int = BLOCK_SIZE
    block_rows: int = BLOCK_SIZE
    first_blocks: int = 1
    recent_blocks: int = 1
    per_kv_head: bool = False
    choice: Callable[[Tensor, Any], Any] | None = None

    def __post_init__(self) -> None:
        _check_block_sizes("selector", self.block_size, self.block_rows)
        for name in ("first_blocks", "recent_blocks"):
            if getattr(self, name) < 0:
                raise ValueError(f"selector.{name}: {getattr(self, name)!r} is not allowed; an integer >= 0")

    def forces_all(self, keys: int, is_causal: bool) -> bool:
        """Whether every block that is seen is forced in sequences of up to so many keys, whose last are the queries."""
        blocks = -(-keys // self.block_size)
        forced = self.first_blocks
        if is_causal and self.recent_blocks:  # else queries may stand before all keys
            # From the first diagonal block of the last query block on, and the recent ones before it.
            last_diagonal = max(0, keys - 1) // self.block_rows * (self.block_rows // self.block_size)
            forced += blocks - last_diagonal + self.recent_blocks - 1
        return forced >= blocks


@dataclass(frozen=True)
class LengthCurve:
    """A number that follows the length: linear in ``ln(length)`` between some lengths, constant outside of them.

    The length of a query block is the number of key blocks of which any of its queries sees a key, times the size of a
    key block. In causal attention it is about the position of the query block, so that it depends on neither the end of
    the sequence nor on how a prefill is cut into chunks.

    Attributes:
        lengths: ascending, >= 1.
        values: the number at each of them.
    """

    lengths: tuple[float, ...]
    values: tuple[float, ...]

    def at(self, length: Tensor) -> Tensor:
        """Return the numbers at lengths in tokens, FP64, of the shape of ``length``."""
        x = length.double().clamp(min=self.lengths[0]).log()
        value = 0.0 * x + self.values[0]
        for (low, high), (start, end) in zip(pairwise(map(math.log, self.lengths)), pairwise(self.values), strict=True):
            value += (x.clamp(low, high) - low) * ((end - start) / (high - low))
        return value


@dataclass(frozen=True)
class SkipRule:
    """Skip-softmax: a key block is dropped if all its scores lie far below what each query has seen elsewhere.

    A query's reference is its largest score among the kept keys that are exempt or in a diagonal block. A key block is
    skipped for a query block if all other scores that are kept are below their query's ``reference + ln(threshold)``.

    Attributes:
        threshold: what a skipped key may weigh at most, relative to its query's heaviest key, > 0. From 1 on, a skipped
            block may hold a query's heaviest key. Or a curve that gives ``ln(threshold)`` by length.
        block_size: keys in a key block, a multiple of 16.
        block_rows: positions in a query block, a multiple of ``block_size``.
        decode_threshold: the threshold of a sequence with a single query, where decode is sparse, or a curve likewise;
            None: ``threshold``.

    Raises:
        ValueError: if a number is out of its range.
    """

    threshold: float | LengthCurve
    block_size: int = BLOCK_SIZE
    block_rows: int = BLOCK_SIZE
    decode_threshold: float | LengthCurve | None = None

    def __post_init__(self) -> None:
        _check_block_sizes("skip", self.block_size, self.block_rows)
        if not (self.decode_threshold is None or _is_threshold(self.decode_threshold)):
            raise ValueError(f"skip.decode_threshold: {self.decode_threshold!r} is not allowed; a number > 0 or None")
        if not _is_threshold(self.threshold):
            raise ValueError(f"skip.threshold: {self.threshold!r} is not allowed; a number > 0")

    def log_threshold(self, length: Tensor) -> Tensor:
        """Return ``ln(threshold)`` of query blocks with these lengths in tokens, FP64, of the shape of ``length``."""
        if isinstance(self.threshold, LengthCurve):
            return self.threshold.at(length)
        return length.double().new_full(length.shape, math.log(self.threshold))

    def of_decode(self) -> SkipRule:
        """Return the rule of a sequence with a single query."""
        return self if self.decode_threshold is None else replace(self, threshold=self.decode_threshold)


def _is_threshold(value: float | LengthCurve) -> bool:
    return isinstance(value, LengthCurve) or 0 < value < math.inf


def _check_block_sizes(name: str, block_size: int, block_rows: int) -> None:
    if block_size < 1 or block_size % max(GROUP_SIZES):
        raise ValueError(f"{name}.block_size: {block_size!r} is not allowed; a multiple of {max(GROUP_SIZES)}")
    if block_rows < 1 or block_rows % block_size:
        raise ValueError(f"{name}.block_rows: {block_rows!r} is not allowed; a multiple of block_size = {block_size}")


@dataclass(frozen=True)
class AttentionPlan:
    """One attention computation's sparsity: which visible keys take part in the softmax.

    A plan holds no tensors, is hashable, and means the same to every backend. A key that is visible to a query (inside
    the sequence, causal, inside the layer's sliding window) is kept if its block and the method's rule keep it, if it
    is one of the first ``num_sink_tokens`` keys of the sequence, or if it lies fewer than ``dense_window_size``
    positions behind the query.

    The plan of a method has a :attr:`name` that means the same in every process, so it can be pickled and exported. A
    plan that was made by hand works in its own process alone.

    Attributes:
        keep: the rule in PyTorch, for the reference and the CPU; ``None`` keeps every visible key (dense).
            Called as ``keep(scores, q_pos, k_pos)``: ``scores`` is ``[..., queries, groups, group]`` in FP32 or
            FP64, scaled, ``-inf`` where the key is not visible; ``q_pos`` (``[queries, 1, 1]``) and ``k_pos``
            (``[groups, group]``) are positions counted from the sequence's first token. It returns booleans of
            the shape of ``scores``. It sees one tile at a time, so a decision may depend only on the scores of
            the same query and group.
        group: how many consecutive keys one decision looks at, one of 1, 2, 4, 8, 16. Groups are aligned: key
            ``j`` belongs to group ``j // group``.
        num_sink_tokens: leading keys of each sequence that are always kept, >= 0.
        dense_window_size: most recent keys of each query, its own included, that are always kept, >= 0.
        sparse_decode: whether a sequence with a single query is sparse too; by default decode is dense.
        score_hook: the same rule as a ``@triton.jit`` function, for the fused kernels; ``None`` if the method
            has only a PyTorch rule. Called as ``score_hook(scores, q_pos, k_pos, args)`` with a tuple of
            ``group`` score tiles (tile ``r`` holds key ``group * i + r`` of group ``i``), returns a tuple of
            ``group`` tiles that say what is kept: booleans, or faster, flags of
            :mod:`modelopt_lite.kernels.language`, 1.0 where a key is kept, or ``dropped(flag)`` where it is not.
            A hook that makes tiles of its own (``tl.zeros``, ``tl.arange``) is left to the portable kernel, with a
            warning, on GPUs that have a faster one.
        hook_constants: integers that hooks need at compile time; they come first in their ``args``.
        hook_args: numbers that hooks need at run time; they follow in their ``args``.
        keeps_group_max: a promise that the largest visible score of every group is kept, which saves the fused
            kernels the row maximum over what is left.
        scale_free: a promise that the rule decides alike if all scores are multiplied by one positive number, which
            saves the fused kernels a multiplication.
        keeps_nothing: a promise that the rule itself keeps no key at all, which saves computing those that are neither
            sinks nor recent.
        keeps_top: a promise that the rule keeps exactly this many keys of every group: those with the largest scores,
            and among equal scores the lower keys. GPUs that have hardware for two of four use it; 0 promises nothing.
        quick_hook: a faster way to the same keys, for the Hopper kernel, or None; only with ``keeps_group_max`` and
            ``keeps_top``. It is called with weights instead of scores. They are not negative, may be infinite or NaN,
            and have the order of the scores, except that different scores may have the same weight. It returns one
            tile, in FP32: the least weight of each group that is kept. The hook is used where all keys are visible. A
            tile with any group of which more than ``keeps_top`` weights are at least as large is computed again with
            ``score_hook``.

        chooses_blocks: whether there is a selector or a skip rule. Not an argument.
        is_dense: whether every visible key is kept. Not an argument.
        name: what PyTorch's operators take instead of the plan, which :func:`plan_by_name` finds again. The canonical
            configuration of the method that made it, in JSON; of a plan made by hand, a name that only this process
            knows. Not an argument.
        made_by: the class of that method, if the plan was made by a registered one. Not an argument.

    Raises:
        ValueError: if a field is out of its range, a hook comes without what it stands in for, or ``blocks`` and
            ``skip`` have different grids.
    """

    keep: KeepRule | None = None
    group: int = 1
    num_sink_tokens: int = 0
    dense_window_size: int = 0
    sparse_decode: bool = False
    score_hook: Any | None = None
    hook_constants: tuple[int, ...] = ()
    hook_args: tuple[float, ...] = ()
    keeps_group_max: bool = False
    scale_free: bool = False
    keeps_nothing: bool = False
    keeps_top: int = 0
    quick_hook: Any | None = None
    blocks: BlockSelector | None = None
    skip: SkipRule | None = None
    chooses_blocks: bool = field(init=False, compare=False, repr=False)
    is_dense: bool = field(init=False, compare=False, repr=False)
    name: str = field(init=False, compare=False, repr=False)
    made_by: type[Any] | None = field(default=None, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.group not in GROUP_SIZES:
            raise ValueError(f"plan.group: {self.group!r} is not allowed; one of {GROUP_SIZES}")
        for name in ("num_sink_tokens", "dense_window_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"plan.{name}: {getattr(self, name)!r} is not allowed; an integer >= 0")
        if not 0 <= self.keeps_top <= self.group:
            raise ValueError(f"plan.keeps_top: {self.keeps_top!r} is not allowed; 0 to plan.group = {self.group}")
        if self.score_hook is not None and self.keep is None:
            raise ValueError("plan.score_hook: a fused rule needs its PyTorch twin in plan.keep")
        if self.quick_hook is not None and self.score_hook is None:
            raise ValueError("plan.quick_hook: a rule that may be wrong needs the right one in plan.score_hook")
        if self.quick_hook is not None and not self.keeps_group_max:
            raise ValueError("plan.quick_hook: weights are relative to the largest score; needs plan.keeps_group_max")
        if self.quick_hook is not None and not self.keeps_top:
            raise ValueError("plan.quick_hook: what it keeps is counted; needs plan.keeps_top")
        if self.blocks is not None and self.skip is not None:
            selector, skip = ((x.block_size, x.block_rows) for x in (self.blocks, self.skip))
            if selector != skip:
                raise ValueError(
                    f"plan.skip: (block_size, block_rows) = {skip} is not allowed; plan.blocks has {selector}"
                )

        object.__setattr__(self, "chooses_blocks", self.blocks is not None or self.skip is not None)
        object.__setattr__(self, "is_dense", self.keep is None and not self.chooses_blocks)
        object.__setattr__(self, "name", f"{_BY_HAND}{_this_process} {next(_numbers)}")
        _plans_by_hand[self.name] = self

    @property
    def keeps_diagonal(self) -> bool:
        """Whether lists made for the plan have all key blocks that hold positions of their query block."""
        return self.chooses_blocks and (self.blocks is None or self.blocks.recent_blocks > 0)

    @property
    def only_skips(self) -> bool:
        """Whether a skip rule alone chooses key blocks, so that what lists leave out was skipped."""
        return self.skip is not None and self.blocks is None

    @property
    def is_by_hand(self) -> bool:
        """Whether no method made the plan, so that it means something in this process alone."""
        return self.name.startswith(_BY_HAND)

    def __copy__(self) -> AttentionPlan:
        """Return the plan itself, which never changes."""
        return self

    def __deepcopy__(self, memo: object) -> AttentionPlan:
        """Return the plan itself, which never changes; hooks cannot be copied."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the plan as the name of its method's configuration.

        Raises:
            UnsupportedError: if it was made by hand, because its functions would have to travel.
        """
        if self.is_by_hand:
            raise UnsupportedError(
                "an AttentionPlan that was made by hand cannot be pickled, because its functions belong to this "
                "process; make it in the plan() of a registered method, and pickle the method or the sparse model"
            )
        # The class travels by reference, so that its module is imported, and the method registered, first.
        return _unpickled, (self.name, self.made_by)

    def for_keys(self, keys: int, is_causal: bool) -> AttentionPlan:
        """Return a plan that keeps the same, and chooses no blocks where there is nothing to choose.

        In short sequences all blocks that are seen are forced, and skip-softmax has none that is not diagonal.

        Args:
            keys: an upper bound of a sequence's keys. They begin at position 0, and the queries are the last of them.
            is_causal: whether a query sees only keys at its own position and before.
        """
        if (self.blocks is None or self.blocks.forces_all(keys, is_causal)) and (
            self.skip is None or (is_causal and keys <= self.skip.block_rows)
        ):
            return self.with_all_blocks if self.chooses_blocks else self
        return self

    @functools.cached_property
    def with_all_blocks(self) -> AttentionPlan:
        """The plan without selector and skip rule."""
        if self.keep is None:
            return DENSE
        plan = replace(self, blocks=None, skip=None)
        return plan if self.is_by_hand else keep_plan(plan, _ALL_BLOCKS + self.name, self.made_by)


def keep_plan(plan: AttentionPlan, name: str, made_by: type[Any] | None = None) -> AttentionPlan:
    """Name a plan by the configuration that it was made from, and keep it."""
    object.__setattr__(plan, "name", name)
    object.__setattr__(plan, "made_by", made_by)
    _plans[name] = plan
    return plan


def canonical_name(configuration: dict[str, Any]) -> str:
    """Return the name of the plan of a method's configuration."""
    return json.dumps(configuration, sort_keys=True, separators=(",", ":"))


def find_plan(name: str, made_by: type[Any]) -> tuple[str, AttentionPlan | None]:
    """Look for the plan of a method's configuration.

    A class that was defined again, as in a notebook, has plans of its own beside those of its predecessor.

    Args:
        name: from :func:`canonical_name`.
        made_by: the method's class.

    Returns:
        The name to keep the plan under, and the plan itself if there is one.
    """
    for definition in itertools.count(2):
        found = _plans.get(name)
        if found is None or found.made_by in (None, made_by):
            return name, found
        name = f"{name.rstrip(' 0123456789')} {definition}"
    raise AssertionError("unreachable")


def plan_by_name(name: str) -> AttentionPlan:
    """Return the plan with a name: the one that this process has, or else that of the method's configuration.

    Raises:
        UnsupportedError: if the plan was made by hand in another process, or its method is not registered in this one.
    """
    found = _plans.get(name) or _plans_by_hand.get(name)
    if found is not None:
        return found
    if name.startswith(_BY_HAND):
        raise UnsupportedError(
            "this program uses an AttentionPlan that was made by hand, in another process or no longer there, and its "
            "functions did not travel with it; make the program with the plan of a registered method"
        )
    if name.startswith(_ALL_BLOCKS):
        return plan_by_name(name.removeprefix(_ALL_BLOCKS)).with_all_blocks
    if name.startswith("{") and not name.endswith("}"):  # see find_plan
        raise UnsupportedError(
            f"this program uses the attention plan {name}, whose method's class had been defined again in the process "
            "that made the program, so no other process can know which class is meant; make the program in a process "
            "that defines the class once"
        )
    try:
        configuration = json.loads(name)
        plan: AttentionPlan = get_sparse_method(configuration["method"]).model_validate(configuration).shared_plan()
    except (ConfigError, ValueError, KeyError, TypeError) as error:  # ValueError: not JSON, or not valid
        raise UnsupportedError(
            f"this program uses the attention plan {name}, which this process cannot make ({error}); import the module "
            "that registers the method before the program runs"
        ) from None
    return plan


def _unpickled(name: str, _: type[Any] | None) -> AttentionPlan:
    return plan_by_name(name)


DENSE = keep_plan(AttentionPlan(), "dense")
