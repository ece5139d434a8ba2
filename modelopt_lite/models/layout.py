"""Where the sequences of one attention call lie in its tensors, and the call itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import UnsupportedError
from ..kernels import AttentionRequest, Prepared, Run, compute, hold, is_traced, pack, prepared, run, sdpa, sdpa_call
from ..plan import AttentionPlan
from .module import SparseAttentionModule, decide, original_class, present_decision
from .recomputation import Decision, is_in_function

ResultT = TypeVar("ResultT")

HIDDEN = -1e4
"""What a finished mask adds to the scores of keys that are not seen, or less: their weights are 0 in any precision."""
READABLE_MASKS = (
    "must be boolean, or 0 and -10000 or less, the same for all heads, and causal or bidirectional, with padding "
    "anywhere; for self-attention also with a sliding window or for packed sequences"
)


class DenseCall(NamedTuple):
    """A call of :func:`whole_call` that PyTorch's attention computed, as it does others of the same layout like it.

    Attributes:
        like: shapes of queries, keys and values, and type and device of the queries.
        is_decode: whether there is one query in each sequence.
        run: what computes it.
    """

    like: tuple[Any, ...]
    is_decode: bool
    run: Callable[..., Tensor]


class PreparedCall(NamedTuple):
    """What calls of :func:`whole_call` that a kernel computes have in common if their tensors differ in contents alone.

    Attributes:
        views: sizes and strides of queries, keys and values as kernels take them.
        fields: what follows these in a request.
        run: what computes requests like it.
        shape: of the output, ``[batch, len_q, query_heads, value_dim]``.
        reads_only_addresses: whether the tensors need not be viewed as kernels take them, which takes Python a third of
            a short call.
    """

    views: tuple[tuple[Sequence[int], Sequence[int]], ...]
    fields: tuple[Any, ...]
    run: Run
    shape: tuple[int, ...]
    reads_only_addresses: bool

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute a call."""
        if self.reads_only_addresses:
            request = AttentionRequest(query, key, value, *self.fields)
        else:
            request = self.request(query, key, value)
        return self.run(request)[0].view(*self.shape)

    def request(self, query: Tensor, key: Tensor, value: Tensor) -> AttentionRequest:
        """Return the request of a call."""
        q, k, v = self.views
        return AttentionRequest(query.as_strided(*q), key.as_strided(*k), value.as_strided(*v), *self.fields)


class LastCall(NamedTuple):
    """The last call of :func:`whole_call` that a kernel computed, with nothing that observes it and no softcap.

    Attributes:
        decision: what the layer's flags said.
        likeness: as :func:`likeness` finds it.
        call: what computes calls of the same layout that are like it.
    """

    decision: Decision
    likeness: tuple[Any, ...]
    call: PreparedCall


def likeness(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> tuple[Any, ...]:
    """Return what calls of one layout have in common if their tensors differ in contents alone."""
    return (
        query.shape, key.shape, value.shape, query.stride(), key.stride(), value.stride(), query.dtype, key.dtype,
        value.dtype, query.device, (query.data_ptr() | key.data_ptr() | value.data_ptr()) & 15, scaling,
    )  # fmt: skip


class SharedWork:
    """What the layers of one forward pass need besides their layout, found by the first one that needs it.

    Attributes:
        dense: the last call that PyTorch's attention computed.
        last: the last one that a kernel computed.
        packed: the layout with regard to positions that begin again, once these have been looked at.
        prepared: calls of :func:`whole_call` that a kernel computed, by what tells them apart.
        starts_apart: starts of the keys in a cache whose rows lie apart, by their distance and device.
        grids: what is known of blocks, as in :class:`~modelopt_lite.kernels.AttentionRequest`.
    """

    def __init__(self) -> None:
        self.dense: DenseCall | None = None
        self.last: LastCall | None = None
        self.packed: Layout | None = None
        self.prepared: dict[tuple[Any, ...], PreparedCall] = {}
        self.starts_apart: dict[tuple[int, torch.device], Tensor] = {}
        self.grids: dict[Any, Any] = {}


class Layout(NamedTuple):
    """What a query sees, and where the tokens of each sequence are.

    Query ``i`` of row ``b`` is row ``b * len_q + i`` of the flattened batch, key slot ``j`` is row ``b * slots + j``.
    A tuple, so that hooks which move a layer's arguments to its device find the tensors, and so that PyTorch's compiler
    sees into it. All tensors of integers but the two orders and ``output_rows`` are ``[sequences]``.

    Attributes:
        batch: rows of the batch.
        len_q: query slots of each row.
        slots: key slots of each row.
        is_causal: whether a query sees only keys up to its own position.
        sliding_window: a query sees only keys fewer positions away than this; None: all.
        unpadded: whether every slot that is used holds a real token.
        starts_q: row of each sequence's first query.
        lengths_q: number of its queries.
        max_q: an upper bound of ``lengths_q``.
        starts_k: row of its first key.
        lengths_k: number of its keys.
        max_k: an upper bound of ``lengths_k``.
        first_q: position of its first query; None if the queries are the last tokens.
        first_k: position of its first key; None if 0.
        order_q: slots of each row such that its real queries come first, ``[batch, len_q]``; None if they need not be
            moved.
        output_rows: the same as rows of the flattened batch, ``[batch * len_q]``: where the result of each moved query
            goes; None likewise.
        order_k: the same for the keys, ``[batch, slots]``.
        counts: how many of the sequences are there, where only a traced graph will know; see
            :class:`~modelopt_lite.kernels.AttentionRequest`.
        whole: whether each row is known to be one sequence that fills all slots, the queries being its last tokens.
        page_table: where keys and values lie in the pages of a cache, see
            :class:`~modelopt_lite.kernels.AttentionRequest`; the one row of the batch is then the whole cache.
        page_size: keys a page.
        request: what Transformers asked for, from which another attention implementation's mask can be made, and what
            layers share; or None.
    """

    batch: int
    len_q: int
    slots: int
    is_causal: bool
    sliding_window: int | None
    unpadded: bool
    starts_q: Tensor
    lengths_q: Tensor
    max_q: int
    starts_k: Tensor
    lengths_k: Tensor
    max_k: int
    first_q: Tensor | None = None
    first_k: Tensor | None = None
    order_q: Tensor | None = None
    output_rows: Tensor | None = None
    order_k: Tensor | None = None
    counts: Tensor | None = None
    whole: bool = False
    page_table: Tensor | None = None
    page_size: int = 0
    request: Any = None

    @property
    def ndim(self) -> int:
        """Four, like a mask that is ready to use: Transformers builds one only from what has two dimensions."""
        return 4

    def contiguous(self) -> Layout:
        """Return the layout, as Transformers asks of every mask."""
        return self

    def held(self) -> Layout:
        """Return the layout of a traced graph with small tensors that it computes once for all layers."""
        names = ("starts_q", "lengths_q", "starts_k", "lengths_k", "first_q", "first_k", "output_rows")
        given = {name: x for name in names if (x := getattr(self, name)) is not None}
        distinct: list[Tensor] = []
        places: dict[str, int] = {}
        for name, x in given.items():
            same = [place for place, y in enumerate(distinct) if y is x]
            places[name] = same[0] if same else len(distinct)
            if not same:
                distinct.append(x)
        copies = hold(distinct)
        held: dict[str, Any] = {name: copies[place] for name, place in places.items()}
        return self._replace(**held)

    def on(self, device: torch.device) -> Layout:
        """Return the layout with its tensors on a device."""
        if self.starts_q.device == device:
            return self
        moved: Any = (x.to(device) if isinstance(x, Tensor) else x for x in self)
        return Layout(*moved)._replace(counts=self.counts)


def whole_layout(
    batch: int,
    len_q: int,
    slots: int,
    device: torch.device | str,
    *,
    is_causal: bool,
    sliding_window: int | None = None,
    used: int | Tensor | None = None,
    dropped: int = 0,
    first_q: int | Tensor | None = None,
) -> Layout:
    """Lay out a batch without padding: each row is one sequence.

    Args:
        batch: rows of the batch.
        len_q: queries of each row.
        slots: key slots of each row.
        device: where the tensors go.
        is_causal: as in :class:`Layout`.
        sliding_window: as in :class:`Layout`.
        used: how many of the first slots hold keys; by default all.
        dropped: keys before the first slot that a cache no longer holds.
        first_q: position of the first query; by default the queries are the last tokens.
    """
    whole = first_q is None and (used is None or (isinstance(used, int) and used == slots))
    rows = torch.arange(batch, device=device)
    starts_q = rows if batch == 1 else rows * len_q  # of one row, 0
    starts_k = starts_q if batch == 1 or slots == len_q else rows * slots
    lengths_q = torch.full_like(rows, len_q)
    if isinstance(used, Tensor):
        lengths_k = torch.zeros_like(rows) + used
    else:
        len_k = slots if used is None else used
        lengths_k = lengths_q if len_k == len_q else torch.full_like(rows, len_k)
    first_k = torch.full_like(rows, dropped) if dropped else None
    if first_q is not None:
        first_q = torch.zeros_like(rows) + first_q
    return Layout(
        batch, len_q, slots, is_causal, sliding_window, True, starts_q, lengths_q, len_q, starts_k, lengths_k, slots,
        first_q, first_k, whole=whole,
    )  # fmt: skip


_DROPPED = (
    "attention_mask: padding between real tokens is not supported where a sliding-window cache has dropped tokens that "
    "are still in the window, as the window counts real tokens only"
)


def padded_layout(
    real: Tensor,
    len_q: int,
    q_offset: int | Tensor,
    *,
    is_causal: bool,
    sliding_window: int | None = None,
    dropped: int = 0,
) -> Layout:
    """Lay out a batch with padding: each row's real tokens are one sequence.

    Waits for ``real`` unless a graph is traced: real tokens in one run stay where they are, others are gathered.

    Args:
        real: which slots hold real tokens, ``[batch, dropped + slots]``, false behind the last query.
        len_q: query slots of each row.
        q_offset: slot of the first query.
        is_causal: as in :class:`Layout`. If false, all queries are computed, as keys alone are masked.
        sliding_window: as in :class:`Layout`.
        dropped: how many of the first slots a cache no longer holds.

    Raises:
        UnsupportedError: if a cache has dropped real tokens that, for padding between them, are still in the sliding
            window. A traced graph fails when it runs, with a RuntimeError.
    """
    batch = real.shape[0]
    rows = torch.arange(batch, device=real.device)
    real_k = real[:, dropped:]
    slots = real_k.shape[1]
    # Keys and queries of self-attention have the same slots.
    is_self = is_causal or (isinstance(q_offset, int) and q_offset + len_q == real.shape[1])
    # And if no cache held any before, the same tensors say where they are.
    is_whole = is_causal and isinstance(q_offset, int) and q_offset == dropped == 0 and len_q == slots
    if is_whole:
        real_q = real_k
    elif is_self:
        real_q = real.index_select(1, torch.arange(len_q, device=real.device) + q_offset)
    else:
        real_q = real.new_ones(batch, len_q)
    lengths_q = real_q.sum(-1) if is_causal else torch.full_like(rows, len_q)
    lengths_k = lengths_q if is_whole else real_k.sum(-1)
    first_k = real[:, :dropped].sum(-1)
    has_window = torch.ones_like(rows, dtype=torch.bool)
    if is_causal and sliding_window is not None:
        # A cache drops slots, a window counts real tokens.
        has_window = (first_k == 0) | (lengths_q == 0) | (lengths_k - lengths_q >= sliding_window - 1)
    unpadded = one_run = False
    if not torch.compiler.is_compiling():
        used = torch.arange(real.shape[1], device=real.device) < q_offset + len_q if is_causal else True
        starts = (real[:, 1:] & ~real[:, :-1]).sum(-1) + real[:, 0]
        found = torch.stack([(real == used).all(), (starts <= 1).all(), has_window.all()])
        unpadded, one_run, is_complete = found.tolist()
        if not is_complete:
            raise UnsupportedError(_DROPPED)
    elif dropped:
        torch._assert_async(has_window.all(), _DROPPED)
    order_q = output_rows = order_k = first_q = None
    starts_q = rows * len_q
    starts_k = starts_q if is_whole else rows * slots
    if one_run:
        starts_k = starts_k + real_k.int().argmax(-1)
        if is_causal:
            starts_q = starts_k if is_whole else starts_q + real_q.int().argmax(-1)
    else:
        order_k = _real_first(real_k)
        if is_self and len_q > 1:
            order_q = order_k if is_whole else _real_first(real_q)
            output_rows = (order_q if batch == 1 else order_q + rows[:, None] * len_q).flatten()
    if not is_causal and not (unpadded and is_self):
        first_q = torch.zeros_like(rows) + q_offset
        if is_self:
            # Queries at padding are before and behind the real ones, or only behind, where those are moved together.
            first_q = first_q - real.int().argmax(-1) if one_run else real[:, :q_offset].sum(-1)
    return Layout(
        batch,
        len_q,
        slots,
        is_causal,
        sliding_window,
        unpadded,
        starts_q,
        lengths_q,
        len_q,
        starts_k,
        lengths_k,
        slots,
        first_q,
        first_k if dropped else None,
        order_q,
        output_rows,
        order_k,
        whole=unpadded and isinstance(q_offset, int) and q_offset + len_q == real.shape[1],
    )


def _real_first(real: Tensor) -> Tensor:
    return real.int().argsort(dim=-1, descending=True, stable=True)


def packed_layout(is_first: Tensor, *, is_causal: bool, sliding_window: int | None = None) -> Layout:
    """Lay out rows that hold several sequences one after the other, without a cache.

    Waits for ``is_first``, in a traced graph when it runs.

    Args:
        is_first: where a sequence begins, booleans ``[batch, length]``; each row begins one in any case.
        is_causal: as in :class:`Layout`.
        sliding_window: as in :class:`Layout`.
    """
    batch, length = is_first.shape
    starts, lengths, counts = pack(is_first)
    if torch.compiler.is_compiling():
        packing = (starts, lengths, length)
        return Layout(batch, length, length, is_causal, sliding_window, True, *packing, *packing, counts=counts)
    number, longest = counts.tolist()
    packing = (starts[:number], lengths[:number], longest)
    whole = number == batch
    return Layout(batch, length, length, is_causal, sliding_window, True, *packing, *packing, whole=whole)


def segmented_layout(
    is_first: Tensor, real: Tensor | None, slots: int, *, is_causal: bool, sliding_window: int | None = None
) -> Layout:
    """Lay out rows that hold several sequences and padding, in front of a cache that is empty yet.

    Waits for the tensors.

    Args:
        is_first: where a sequence begins, booleans ``[batch, length]``; each row's first real token begins one in any
            case.
        real: which tokens are real, booleans ``[batch, length]``; None: all.
        slots: key slots of each row, of which the first ``length`` are used.
        is_causal: as in :class:`Layout`.
        sliding_window: as in :class:`Layout`.

    Raises:
        UnsupportedError: if there is padding between the tokens of one sequence.
    """
    batch, length = is_first.shape
    unpadded = real is None
    real = torch.ones_like(is_first) if real is None else real
    begins = real & (is_first | (real.cumsum(1) == 1))
    starts = begins.flatten().nonzero()[:, 0]
    tokens = real.flatten().nonzero()[:, 0]
    sequence = begins.flatten().cumsum(0)[tokens] - 1
    lengths = torch.zeros_like(starts).scatter_add(0, sequence, torch.ones_like(sequence))
    last = torch.zeros_like(starts).scatter_reduce(0, sequence, tokens, "amax")
    if not bool((last - starts + 1 == lengths).all()):
        raise UnsupportedError("attention_mask: padding between the tokens of a packed sequence is not supported")
    longest = int(lengths.max()) if len(lengths) else 1
    starts_k = starts // length * slots + starts % length
    queries, keys = (starts, lengths, longest), (starts_k, lengths, longest)
    return Layout(batch, length, slots, is_causal, sliding_window, unpadded, *queries, *keys)


_memory: WeakIdKeyDictionary = WeakIdKeyDictionary()


def remembered(tensor: Tensor, key: Hashable, compute: Callable[[], ResultT]) -> ResultT:
    """Return what was computed of a tensor before, so that all layers of a forward wait for it once.

    A tensor in PyTorch's inference mode does not tell whether it has changed since, so nothing is kept of it.
    """
    if tensor.is_inference():
        return compute()
    key = (tensor._version, key)
    kept_key, result = _memory.get(tensor, (None, None))
    if kept_key != key:
        result = compute()
        _memory[tensor] = (key, result)
    return cast(ResultT, result)


def restarts(positions: Tensor, real: Tensor | None) -> bool:
    """Whether a real token has position 0 and another one before it in its row; waits for the tensors.

    Args:
        positions: ``[1 or batch, length]``.
        real: which tokens are real, booleans ``[batch, length]``; None: all.
    """
    if real is None:
        return remembered(positions, None, lambda: bool((positions[:, 1:] == 0).any()))
    return bool(((positions == 0) & real & (real.cumsum(1) > 1)).any())


def layout_of_mask(mask: Tensor, batch: int, len_q: int, slots: int) -> Layout | None:
    """Lay out a call by a finished mask, None if no layout says the same; waits for the mask, once in a forward.

    Args:
        mask: booleans, or 0 and -10000 or less, that can be expanded to ``[batch, heads, len_q, slots]``.
        batch: rows of the batch.
        len_q: queries of each row.
        slots: key slots of each row.
    """
    return remembered(mask, (batch, len_q, slots), lambda: _layout_of_mask(mask, batch, len_q, slots))


def _layout_of_mask(mask: Tensor, batch: int, len_q: int, slots: int) -> Layout | None:
    visible, is_plain = _visible(mask, batch, len_q, slots)
    real = visible.any(1)
    positions = torch.arange(slots, device=real.device)
    count, left = real.sum(-1), real.int().argmax(-1)
    runs = (real[:, 1:] & ~real[:, :-1]).sum(-1) + real[:, 0]
    # Slot of each row's first query: of the first that sees a key, the last such is in its own slot. Where padding at
    # the end hides that, the other rows say it.
    sees = visible.any(-1)
    first = sees.int().argmax(-1)
    last = slots - 1 - visible.flip(-1).int().argmax(-1)
    own = last.gather(1, first[:, None])[:, 0] - first
    common = own.masked_fill(~sees.any(-1), -len_q).max().expand_as(own)
    offsets = torch.stack([common, own])
    slots_q = offsets[:, :, None] + torch.arange(len_q, device=real.device)
    causal = real[:, None] & (positions <= slots_q[..., None])  # [2, batch, len_q, slots]
    agrees = (causal == visible).flatten(1).all(-1)
    both_ways = (visible == real[:, None]).all()
    found = torch.stack([is_plain, both_ways, *agrees, (runs <= 1).all()]).tolist()
    is_plain_now, is_both_ways, by_slots, by_tokens, is_one_run = found
    if not is_plain_now:
        return None
    if is_both_ways:
        return padded_layout(real, len_q, 0, is_causal=False)
    if by_slots and not is_one_run:
        return padded_layout(real, len_q, int(common[0]), is_causal=True)
    if not (by_slots or by_tokens) or not is_one_run:
        return _layout_of_parts(visible, real) if len_q == slots else None
    # A single query is that of the last real key.
    offset = common if by_slots and not (by_tokens and len_q == 1) else own
    # Queries before the first key see nothing.
    before = (left - offset).clamp(min=0, max=len_q)
    rows = torch.arange(batch, device=real.device)
    at_end = bool((offset + len_q == left + count).all())
    return Layout(
        batch,
        len_q,
        slots,
        True,
        None,
        False,
        rows * len_q + before,
        len_q - before,
        len_q,
        rows * slots + left,
        count,
        slots,
        None if at_end else (offset - left).clamp(min=0),
    )


def _layout_of_parts(visible: Tensor, real: Tensor) -> Layout | None:
    """Lay out a mask of self-attention with a sliding window, or of packed sequences, or both.

    Args:
        visible: which keys each query sees, booleans ``[batch, length, length]``.
        real: which keys any query sees, ``[batch, length]``.
    """
    length = real.shape[1]
    slots = torch.arange(length, device=real.device)
    apart = slots[:, None] - slots
    # A sequence begins where a token does not see the one before it.
    is_first = torch.ones_like(real)
    is_first[:, 1:] = ~visible.diagonal(-1, 1, 2)
    sequence = (is_first & real).cumsum(1)
    same = real[:, None] & real[:, :, None] & (sequence[:, :, None] == sequence[:, None])
    window = (apart.abs() * visible).amax() + 1
    real_rows = visible & real[:, :, None]
    candidates = [same & (apart >= 0), same]
    candidates += [candidate & (apart.abs() < window) for candidate in candidates]
    agrees = torch.stack([(candidate == real_rows).all() for candidate in candidates])
    *matches, width = [*agrees.tolist(), int(window)]
    if not any(matches):
        return None
    best = matches.index(True)
    return segmented_layout(is_first, real, length, is_causal=best % 2 == 0, sliding_window=width if best > 1 else None)


def _visible(mask: Tensor, batch: int, len_q: int, slots: int) -> tuple[Tensor, Tensor]:
    """Return which keys a mask shows, booleans ``[batch, len_q, slots]``, and whether it says no more than that."""
    if mask.dtype == torch.bool:
        visible, is_plain = mask, torch.ones((), dtype=torch.bool, device=mask.device)
    else:
        visible = mask == 0
        is_plain = (visible | (mask <= HIDDEN)).all()
    visible = visible.expand(torch.broadcast_shapes(visible.shape, (batch, 1, len_q, slots)))
    return visible[:, 0], is_plain & (visible == visible[:, :1]).all()


def whole_call(
    module: SparseAttentionModule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None,
    softcap: float | None,
) -> Tensor | None:
    """Compute what :func:`attend` would for a batch without padding that nothing records or traces.

    This is the way of short prefills and decode steps, where Python's time is the user's: in every layer each function
    and each operation counts. It holds no case that :func:`attend` does not.

    Returns:
        The output, or None if :func:`attend` has to be called.
    """
    len_q = layout.len_q
    if (
        torch.is_grad_enabled()
        or is_dynamo_compiling()
        or type(query) is not Tensor
        or (len_q > 1 and is_in_function())
        or torch._C._is_any_autocast_enabled()
        or functional.scaled_dot_product_attention is not scaled_dot_product_attention
    ):
        return None
    module.sparse_attention.last_call = object()
    decision = present_decision(module)
    plan, is_decode = decision.plan, len_q == 1 and not decision.plan.sparse_decode
    if (
        (plan.is_dense or is_decode)
        and (decision.statistics is None or is_decode)
        and decision.backend == "auto"
        and softcap is None
    ):
        if not _has_shape_of(layout, query, key):
            return None
        call = sdpa_call(query, key, value, is_causal=layout.is_causal, sliding_window=layout.sliding_window)
        if call is not None:
            if layout.request is not None:
                like = query.shape, key.shape, value.shape, query.dtype, query.device
                layout.request.dense = DenseCall(like, len_q == 1, call)
            return call(query, key, value, scale=scaling).transpose(1, 2)
    return _whole_call(module, query, key, value, layout, scaling, softcap, decision)


def _whole_call(
    module: SparseAttentionModule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None,
    softcap: float | None,
    decision: Decision,
) -> Tensor | None:
    """Compute what :func:`whole_call` does not leave to PyTorch's attention, or return None as it does."""
    statistics = decision.statistics if layout.len_q > 1 or decision.plan.sparse_decode else None
    if is_traced(query) or (statistics is not None and query.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    # With the layout, all that a request depends on, and the choice of a kernel and its preparation.
    like = likeness(query, key, value, scaling)
    signature = (like, softcap, decision.plan.name, decision.backend, statistics is None)
    shared: SharedWork | None = layout.request
    if shared is not None and (known := shared.prepared.get(signature)) is not None:
        if statistics is None:
            if softcap is None:
                shared.last = LastCall(decision, like, known)
            return known(query, key, value)
        request = known.request(query, key, value)
        observed = statistics.observe(request)
        found = known.run(request) if observed is request else run(observed, decision.backend)
        return found[0].view(known.shape)
    if (
        not layout.is_causal
        or layout.first_q is not None
        or layout.first_k is not None
        or layout.starts_q.device != query.device
        or not _has_shape_of(layout, query, key)
    ):
        return None
    (batch, heads, len_q, dim), slots = query.shape, key.shape[2]
    plan, value_dim = decision.plan, value.shape[3]
    if plan.chooses_blocks and layout.whole and statistics is None:
        plan = plan.for_keys(slots, True)
        if plan.is_dense and decision.backend == "auto":
            options: dict[str, Any] = {"sliding_window": layout.sliding_window, "softcap": softcap}
            output = sdpa(query, key, value, is_causal=True, scale=scaling, **options)
            if output is not None:
                return output.transpose(1, 2)
    if (
        (batch > 1 and not all(map(_is_one_block, (query, key, value))))
        or value.shape[:3] != key.shape[:3]
        or (query.data_ptr() | key.data_ptr() | value.data_ptr()) & 15
    ):
        return None
    request = AttentionRequest(
        q=_as_rows(query),
        k=_as_rows(key),
        v=_as_rows(value),
        s_aux=None,
        starts_q=layout.starts_q,
        lengths_q=layout.lengths_q,
        max_q=len_q,
        starts_k=layout.starts_k,
        lengths_k=layout.lengths_k,
        max_k=slots,
        is_causal=True,
        softmax_scale=dim**-0.5 if scaling is None else float(scaling),
        sliding_window=layout.sliding_window,
        softcap=softcap,
        plan=plan,
        grids=None if shared is None else shared.grids,
    )
    observed = request if statistics is None else statistics.observe(request)
    try:
        output, _ = run(observed, decision.backend)
    except UnsupportedError as error:
        raise UnsupportedError(f"{layer_name(module)}: {error}") from None
    shape = batch, len_q, heads, value_dim
    # Statistics may have listed the blocks, so that the request itself was not run.
    others = Prepared(functools.partial(run, backend=decision.backend))
    kernel = prepared(request, decision.backend) if observed is request else others
    if shared is not None and kernel is not None:
        q, k, v, *fields = request
        views = tuple((x.shape, x.stride()) for x in (q, k, v))
        shared.prepared[signature] = PreparedCall(views, tuple(fields), kernel.run, shape, kernel.reads_only_addresses)
    return output.view(shape)


def _has_shape_of(layout: Layout, query: Tensor, key: Tensor) -> bool:
    found = query.shape[0], query.shape[2], key.shape[0], key.shape[2]
    return found == (layout.batch, layout.len_q, layout.batch, layout.slots)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    decision: Decision | None = None,
) -> Tensor:
    """Compute an attention module's attention as its flags say.

    Args:
        module: the attention module; without flags it is dense.
        query: ``[batch, query_heads, len_q, head_dim]``.
        key: ``[batch, kv_heads, slots, head_dim]``.
        value: ``[batch, kv_heads, slots, value_dim]``.
        layout: where the sequences are.
        scaling: factor on the scores.
        softcap: bound of the scores, if the model has one.
        s_aux: learnable sink logits ``[query_heads]``, if the model has them.
        decision: what the call does, if that has been decided already.

    Returns:
        ``[batch, len_q, query_heads, value_dim]``, 0 where no sequence is.

    Raises:
        UnsupportedError: if the layout is not that of the tensors, or the backend cannot do it; names the layer.
    """
    decision = decision or decide(module, is_decode=layout.max_q == 1)
    found = (query.shape[0], query.shape[2], key.shape[0], key.shape[2])
    if found != (layout.batch, layout.len_q, layout.batch, layout.slots):
        raise UnsupportedError(
            f"{layer_name(module)}: queries {found[:2]} and keys {found[2:]} [batch, tokens] do not have the layout of "
            f"the mask, {(layout.batch, layout.len_q)} and {(layout.batch, layout.slots)}"
        )
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        # As for PyTorch's own attention: out of rotary embeddings queries and keys come in FP32, values do not.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    plan = decision.plan
    statistics = decision.statistics if layout.max_q > 1 or plan.sparse_decode else None
    if plan.chooses_blocks and statistics is None and layout.whole and layout.is_causal and not is_traced(query):
        plan = plan.for_keys(layout.max_k, True)
    # Without groups and sinks only distances count, which need not know what a cache has dropped.
    is_dense = plan.is_dense or (layout.max_q == 1 and not plan.sparse_decode)
    if is_dense and layout.whole and statistics is None and decision.backend == "auto":
        output = sdpa(
            query, key, value, is_causal=layout.is_causal, scale=scaling, sliding_window=layout.sliding_window,
            softcap=softcap, s_aux=s_aux,
        )  # fmt: skip
        if output is not None:
            return output.transpose(1, 2)
    layout = layout.on(query.device)
    if not is_dense and _is_cross_attention(module, layout):
        # Before all keys no key is recent, so there is no dense window, wherever a chunk of queries begins.
        layout = layout._replace(first_q=torch.full_like(layout.starts_q, -layout.len_q))
    request = _request(query, key, value, layout, plan, is_dense, scaling, softcap, s_aux)
    if layout.request is not None and not is_traced(query):
        request = request._replace(grids=layout.request.grids)
    if statistics is not None:
        if query.is_cuda and torch.cuda.is_current_stream_capturing():
            raise UnsupportedError(f"{layer_name(module)}: statistics cannot be collected in a CUDA graph")
        request = statistics.observe(request)
    try:
        output, _ = compute(request, decision.backend)
    except UnsupportedError as error:
        raise UnsupportedError(f"{layer_name(module)}: {error}") from None
    return output.view(layout.batch, layout.len_q, *output.shape[1:])


def _is_one_block(x: Tensor) -> bool:
    """Whether the rows of ``[batch, heads, tokens, dim]`` follow each other as the tokens of a row do."""
    return x.stride(0) == x.shape[2] * x.stride(2)


def _as_rows(x: Tensor) -> Tensor:
    """View ``[batch, heads, tokens, dim]`` as ``[batch * tokens, heads, dim]``, by one operation instead of two."""
    (batch, heads, tokens, dim), (_, head, token, one) = x.shape, x.stride()
    return x.as_strided((batch * tokens, heads, dim), (token, head, one))


def _request(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    plan: AttentionPlan,
    is_dense: bool,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> AttentionRequest:
    """Pack the tensors of :func:`attend` as their layout says."""
    q = packed(query, layout.order_q)
    if layout.order_k is not None:
        k, v, starts_k = packed(key, layout.order_k), packed(value, layout.order_k), layout.starts_k
    else:
        k, v, starts_k = _packed_keys(key, value, layout)
    return AttentionRequest(
        q=q,
        k=k,
        v=v,
        s_aux=s_aux,
        starts_q=layout.starts_q,
        lengths_q=layout.lengths_q,
        max_q=layout.max_q,
        starts_k=starts_k,
        lengths_k=layout.lengths_k,
        max_k=layout.max_k,
        is_causal=layout.is_causal,
        softmax_scale=query.shape[3] ** -0.5 if scaling is None else float(scaling),
        sliding_window=layout.sliding_window,
        softcap=softcap,
        plan=plan,
        first_q=layout.first_q,
        first_k=None if is_dense and layout.first_q is None else layout.first_k,
        counts=layout.counts,
        output_rows=layout.output_rows,
        page_table=layout.page_table,
        page_size=layout.page_size,
    )


def packed(x: Tensor, order: Tensor | None = None) -> Tensor:
    """Flatten ``[batch, heads, tokens, dim]`` to ``[batch * tokens, heads, dim]``, each row's tokens in an order."""
    if order is not None:
        return x.transpose(1, 2)[torch.arange(x.shape[0], device=x.device)[:, None], order].flatten(0, 1)
    if _is_recorded(x):
        return x.transpose(1, 2).flatten(0, 1)
    if x.shape[0] > 1 and not _is_one_block(x):
        return x.transpose(1, 2).flatten(0, 1)
    return _as_rows(x)


def _packed_keys(key: Tensor, value: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Flatten keys and values ``[batch, heads, slots, dim]``, without a copy of a cache.

    In a cache, all slots of one head lie side by side. Rows that begin a whole number of slots apart are one range of
    slots all the same, in which other heads' slots lie between those of two rows.

    Returns:
        The keys, the values, and the row of each sequence's first key.
    """
    (batch, _, slots, _), step = key.shape, key.stride(2)
    # Gradients would be as large as that range.
    if batch == 1 or _is_recorded(key) or _is_recorded(value) or step == 0 or key.stride(0) % step:
        return packed(key), packed(value), layout.starts_k
    pitch = key.stride(0) // step
    if pitch < slots or value.stride(2) == 0 or value.stride(0) != pitch * value.stride(2):
        return packed(key), packed(value), layout.starts_k
    size = (batch - 1) * pitch + slots
    key, value = (
        x.as_strided((size, x.shape[1], x.shape[3]), (x.stride(2), x.stride(1), x.stride(3))) for x in (key, value)
    )
    return key, value, layout.starts_k if pitch == slots else _starts_apart(layout, pitch)


def _is_recorded(x: Tensor) -> bool:
    """Whether operations on a tensor are recorded, so that they should be simple ones."""
    return (x.requires_grad and torch.is_grad_enabled()) or is_traced(x)


def _starts_apart(layout: Layout, pitch: int) -> Tensor:
    """Return the starts of keys if the rows of a batch are ``pitch`` slots apart."""
    shared: SharedWork | None = layout.request
    key = (pitch, layout.starts_k.device)
    moved = None if shared is None else shared.starts_apart.get(key)
    if moved is None:
        # An empty sequence may begin behind the last row.
        row = (layout.starts_k // layout.slots).clamp(max=layout.batch - 1)
        moved = layout.starts_k + row * (pitch - layout.slots)
        if shared is not None:
            shared.starts_apart[key] = moved
    return moved


def refuse_context_parallel() -> str | None:
    """Return why a call is refused under PyTorch's context parallelism, where a layer sees one shard of the tokens."""
    function = torch.nn.functional.scaled_dot_product_attention
    if function is scaled_dot_product_attention or not function.__module__.startswith("torch.distributed"):
        return None
    return (
        "context_parallel shards the tokens and gathers keys for PyTorch's own attention only, which is not supported; "
        "use modelopt_lite.context_parallel, or unsparsify the model"
    )


def _is_cross_attention(module: nn.Module, layout: Layout) -> bool:
    """Whether the keys are not those of the queries' own tokens, so that distances between them mean nothing."""
    if layout.is_causal or layout.sliding_window is not None:
        return False
    # As many queries as keys may be a chance; then what the module says of itself decides.
    return (
        layout.len_q != layout.slots
        or getattr(module, "is_cross_attention", False)
        or getattr(module, "is_decoder", False)
        or "Cross" in original_class(module).__name__
    )


def layer_name(module: nn.Module) -> str:
    """Name an attention module for an error message, as well as it can be known."""
    if isinstance(module, SparseAttentionModule):
        return f"{module.sparse_attention.name} ({type(module).__name__})"
    return f"layer {getattr(module, 'layer_idx', '?')} ({type(module).__name__})"
