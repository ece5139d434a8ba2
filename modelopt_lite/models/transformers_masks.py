"""The mask function of this package, in the form Transformers asks for it: a layout takes the place of a mask.

With an attention function alone, Transformers builds no mask for it, and padding would be ignored. Models pass on what
this function returns untouched. What no layout can say is refused only by the layer that needs it, so that layers which
keep their own attention are not concerned.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakIdKeyDictionary
from transformers import masking_utils
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from ..errors import UnsupportedError
from .layout import (
    Layout,
    SharedWork,
    layout_of_mask,
    packed_layout,
    padded_layout,
    restarts,
    segmented_layout,
    whole_layout,
)

logger = logging.getLogger(__name__)


class MaskRequest(SharedWork):
    """What Transformers asked a mask for, which any other attention implementation can answer as well."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments
        self.answers: dict[str, Any] = {}

    def answer(self, implementation: str, device: torch.device) -> Any:
        """Return the mask that another attention implementation makes, made at the first time.

        Args:
            implementation: its name in Transformers.
            device: where the mask is needed.
        """
        if implementation not in self.answers:
            make = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.get(implementation)
            self.answers[implementation] = None if make is None else make(**self.arguments)
        mask = self.answers[implementation]
        return mask.to(device) if isinstance(mask, Tensor) else mask


class RefusedMask(NamedTuple):
    """In the place of a layout where there is none that says the same as the mask.

    Attributes:
        reason: why.
        request: what Transformers asked for.
    """

    reason: str
    request: MaskRequest

    @property
    def ndim(self) -> int:
        """As of a layout."""
        return 4

    def contiguous(self) -> RefusedMask:
        """As of a layout."""
        return self


Mask: TypeAlias = "Layout | RefusedMask"


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | Mask | None = None,
    **hints: Any,
) -> Mask:
    """Mask in the form Transformers asks for it: what a query sees, and which slots hold real tokens.

    Args:
        batch_size: number of sequences.
        q_length: number of queries.
        kv_length: number of key slots that the attention will get, used or not.
        q_offset: slot of the first query, counting slots that the cache has dropped.
        kv_offset: slots the cache has dropped at its front.
        mask_function: the model's mask pattern.
        attention_mask: the padding mask ``[batch, used slots]``, booleans, or None if there is no padding; or what
            this function made before.
        hints: what Transformers offers to other masks.

    Returns:
        The layout, or why there is none: the pattern is anything but causal, bidirectional, either with a sliding
        window, or packed sequences of these.
    """
    if isinstance(attention_mask, Layout | RefusedMask):
        return attention_mask
    request = MaskRequest(
        {
            "batch_size": batch_size,
            "q_length": q_length,
            "kv_length": kv_length,
            # A static cache counts on in the same tensor, before its layer's attention.
            "q_offset": q_offset.clone() if isinstance(q_offset, Tensor) else q_offset,
            "kv_offset": kv_offset,
            "mask_function": mask_function,
            "attention_mask": attention_mask,
            **hints,
        }
    )
    pattern = _recognise(mask_function, q_length, hints)
    try:
        layout = _read(request) if pattern is None else _laid_out(pattern, request.arguments)
    except UnsupportedError as error:
        return RefusedMask(str(error), request)
    if layout is None:
        return RefusedMask(_UNKNOWN_PATTERN, request)
    if torch.compiler.is_compiling() and layout.counts is None:  # else an operator has computed all
        layout = layout.held()
    return layout._replace(request=request)


def _laid_out(pattern: _Pattern, arguments: dict[str, Any]) -> Layout:
    """Lay out what a known pattern says."""
    batch, len_q, slots = arguments["batch_size"], arguments["q_length"], arguments["kv_length"]
    q_offset, dropped, padding = arguments["q_offset"], arguments["kv_offset"], arguments["attention_mask"]
    options: dict[str, Any] = {"is_causal": pattern.is_causal, "sliding_window": pattern.sliding_window}
    if padding is None:
        device = arguments.get("device") or "cpu"
        if len_q == slots and pattern.may_be_packed:
            is_first = pattern.first_tokens(arguments["mask_function"], batch, len_q, device)
            return packed_layout(is_first, **options)
        if pattern.is_causal:
            used = q_offset - dropped + len_q
            return whole_layout(batch, len_q, slots, device, used=used, dropped=dropped, **options)
        first_q = None if len_q == slots else q_offset
        return whole_layout(batch, len_q, slots, device, dropped=dropped, first_q=first_q, **options)

    if isinstance(q_offset, Tensor) and not torch.compiler.is_compiling():
        q_offset = int(q_offset)
    columns = padding.shape[1]
    total = dropped + slots
    if isinstance(q_offset, int) and pattern.is_causal and columns < q_offset + len_q:
        raise UnsupportedError(
            f"attention_mask: {columns} columns are not enough; {q_offset + len_q} tokens, cached ones included"
        )
    if pattern.is_causal and not torch.compiler.is_compiling() and bool(padding.all()):
        # Nothing is padded, as in most calls of generate(): one operation instead of two dozen.
        used = q_offset - dropped + len_q
        return whole_layout(batch, len_q, slots, padding.device, used=used, dropped=dropped, **options)
    real = pad(padding, (0, max(0, total - columns)))[:, :total]
    if pattern.is_causal:
        real = real & (torch.arange(total, device=real.device) < q_offset + len_q)
    return padded_layout(real, len_q, q_offset, dropped=dropped, **options)


def _read(request: MaskRequest) -> Layout | None:
    """Lay out a mask function that is not known by what it says of every query and key, None if no layout does.

    Waits for the mask.
    """
    arguments = request.arguments
    # A cache that has dropped keys hides where sequences begin.
    if torch.compiler.is_compiling() or arguments["kv_offset"]:
        return None
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Any = masking_utils.sdpa_mask(**{**arguments, **skips})
    return layout_of_mask(mask, arguments["batch_size"], arguments["q_length"], arguments["kv_length"])


_given_positions: WeakIdKeyDictionary = WeakIdKeyDictionary()


def note_positions(positions: Tensor | None, mask: Tensor | None) -> None:
    """Note that a caller gave a model positions of its own, which are worth looking at.

    Args:
        positions: ``position_ids`` of a model's forward.
        mask: its ``attention_mask``. Numbers of packed sequences in it, as some data collators make them, are lost in
            Transformers, so without positions a warning is logged, once.
    """
    if isinstance(positions, Tensor):
        _given_positions[positions] = True
    elif isinstance(mask, Tensor) and mask.dim() == 2 and mask.device.type == "cpu" and mask.dtype != torch.bool:
        _warn_of_sequence_numbers(bool((mask > 1).any()))


@functools.cache
def _warn_of_sequence_numbers(found: bool) -> None:
    if not found:
        return
    logger.warning(
        "attention_mask holds other numbers than 0 and 1. Transformers takes all but 0 as real tokens of one sequence, "
        "dense as well; pass position_ids that begin again with 0 at every packed sequence"
    )


def packed_by_positions(layout: Layout, positions: Tensor) -> Layout:
    """Lay out sequences that are packed side by side, where position 0 begins one.

    Transformers looks for them only in a call without a mask and a cache. Waits for the positions once in a forward,
    and only if the caller gave them or no mask was asked for, and no graph is traced or captured.

    Args:
        layout: the layout without regard to positions.
        positions: positions of the queries, ``[1 or batch, len_q]``.

    Raises:
        UnsupportedError: if sequences begin beside keys that a cache held before, or are no runs of tokens.
    """
    if torch.compiler.is_compiling():
        return layout
    request: MaskRequest | None = layout.request
    if request is not None and request.packed is not None:
        return request.packed
    may_be_packed = (
        positions.dim() == 2
        and positions.shape[1] == layout.len_q
        and layout.starts_q.shape[0] == layout.batch  # else it is already
        and (request is None or positions in _given_positions)
        and not (positions.is_cuda and torch.cuda.is_current_stream_capturing())
    )
    if not may_be_packed:
        if request is not None:
            request.packed = layout
        return layout
    q_offset, padding = 0, None
    if request is not None:
        q_offset, padding = request.arguments["q_offset"], request.arguments["attention_mask"]
    real = None if padding is None else padding[:, int(q_offset) :][:, : layout.len_q]
    if restarts(positions, real):
        if int(q_offset) or (request is None and layout.len_q != layout.slots):
            raise UnsupportedError("position_ids start again beside keys of a cache, which is not supported")
        is_first = (positions == 0).expand(layout.batch, -1)
        packed = segmented_layout(
            is_first, real, layout.slots, is_causal=layout.is_causal, sliding_window=layout.sliding_window
        )
        layout = packed._replace(request=request)
    if request is not None:
        request.packed = layout
    return layout


class _Pattern(NamedTuple):
    """What a mask function of Transformers says.

    Attributes:
        is_causal: whether a query sees only keys up to its own position.
        sliding_window: a query sees only keys fewer positions away; None: all.
        sequence_ids: for packed sequences, a number for each token's sequence, ``[batch, length]``.
        may_be_packed: whether there may be packed sequences.
    """

    is_causal: bool
    sliding_window: int | None = None
    sequence_ids: Tensor | None = None
    may_be_packed: bool = False

    def first_tokens(self, mask_function: Callable[..., Any], batch: int, length: int, device: Any) -> Tensor:
        """Return where sequences begin, ``[batch, length]``."""
        slots = torch.arange(length, device=device)
        if self.sequence_ids is None:
            # In a traced graph: a token begins a sequence if it does not see the one before it.
            rows = torch.arange(batch, device=device)[:, None]
            sees: Tensor = mask_function(rows, torch.zeros_like(rows), slots[None], (slots[None] - 1).clamp(min=0))
            return ~sees.expand(batch, length)
        ids = self.sequence_ids.expand(batch, length)
        return ids.ne(ids.roll(1, dims=1))


def _code_of(factory_name: str, *arguments: Any) -> CodeType | None:
    """Return the code of the functions that a factory of Transformers makes, None if this version has none such."""
    factory = getattr(masking_utils, factory_name, None)
    code: CodeType | None = None if factory is None else factory(*arguments).__code__
    return code


_AND = _code_of("and_masks", causal_mask_function)
_OR = _code_of("or_masks", causal_mask_function)
_BLOCKS = _code_of("blockwise_overlay", torch.zeros(1, 1))
_SLIDING = _code_of("sliding_window_overlay", 1)
_SLIDING_BOTH_WAYS = _code_of("sliding_window_bidirectional_overlay", 1)
_PACKED = _code_of("packed_sequence_mask_function", torch.zeros(1, 1))
_REMAPPED = _code_of("remap_positions_for_packed_sequence", causal_mask_function, torch.zeros(1, 1))

_UNKNOWN_PATTERN = (
    "this model's or this call's attention mask is not supported: it is neither causal nor bidirectional, with or "
    "without a sliding window, but has chunks, blocks or a pattern of its own"
)


def _recognise(mask_function: Callable[..., Any], len_q: int, hints: dict[str, Any]) -> _Pattern | None:
    """Return what a mask function says, None if it is not known.

    Transformers composes mask functions of a few of its own, so they are told by the code they run and read by the
    variables they close over. PyTorch's compiler cannot look at the latter; there the hints decide.
    """
    if mask_function is causal_mask_function:
        return _Pattern(True)
    if mask_function is bidirectional_mask_function:
        return _Pattern(False)
    if torch.compiler.is_compiling():
        return _recognise_while_tracing(mask_function, hints)
    is_causal = is_bidirectional = False
    window = window_both_ways = ids = None
    for part in _parts(mask_function, len_q):
        code = getattr(part, "__code__", None)
        if part is causal_mask_function:
            is_causal = True
        elif part is bidirectional_mask_function:
            is_bidirectional = True
        elif code is None:
            return None
        elif code is _SLIDING and window is None:
            window = _closed_over(part, "sliding_window")
        elif code is _SLIDING_BOTH_WAYS and window_both_ways is None:
            window_both_ways = _closed_over(part, "sliding_window")
        elif code is _PACKED and ids is None:
            ids = _closed_over(part, "packed_sequence_mask")
        else:
            return None
    if is_causal and not is_bidirectional and window_both_ways is None:
        return _Pattern(True, window, ids, ids is not None)
    if is_bidirectional and not is_causal and window is None:
        return _Pattern(False, None if window_both_ways is None else window_both_ways + 1, ids, ids is not None)
    return None


def _parts(mask_function: Any, len_q: int) -> Iterator[Any]:
    """Yield the functions whose conjunction a mask function is."""
    code = getattr(mask_function, "__code__", None)
    if code is None:
        yield mask_function
    elif code is _AND:
        for part in _closed_over(mask_function, "mask_functions"):
            yield from _parts(part, len_q)
    elif code is _REMAPPED:
        # The same rule by positions instead of slots; beside the packed sequences it stands with, that is the same.
        yield from _parts(_closed_over(mask_function, "mask_function"), len_q)
    elif code is _OR:
        base, *others = _closed_over(mask_function, "mask_functions")
        # A block's tokens see one another: only later ones are new to a causal query, and behind a single query
        # there are none.
        if all(_is_without_blocks(other, len_q) for other in others):
            yield from _parts(base, len_q)
        else:
            yield mask_function
    else:
        yield mask_function


def _is_without_blocks(overlay: Any, len_q: int) -> bool:
    if _BLOCKS is None or getattr(overlay, "__code__", None) is not _BLOCKS:
        return False
    return len_q == 1 or not bool((_closed_over(overlay, "block_sequence_ids") >= 0).any())


def _closed_over(function: Any, name: str) -> Any:
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _recognise_while_tracing(mask_function: Callable[..., Any], hints: dict[str, Any]) -> _Pattern | None:
    chunk_size = getattr(hints.get("config"), "attention_chunk_size", None)
    # With use_vmap the caller has mixed in functions of its own.
    if getattr(mask_function, "__code__", None) is not _AND or hints.get("use_vmap") or chunk_size is not None:
        return None
    window = hints.get("local_size")
    if "allow_is_bidirectional_skip" in hints:
        return _Pattern(False, None if window is None else window + 1)
    return _Pattern(True, window, may_be_packed=True)
