"""The mask function of this package, in the form Transformers asks for it: a layout takes the place of a mask.

With an attention function alone, Transformers builds no mask for it, and padding would be ignored. Models pass on what
this function returns untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import masking_utils
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from .errors import UnsupportedError
from .layout import Layout, packed_layout, padded_layout, whole_layout


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | Layout | None = None,
    **hints: Any,
) -> Layout:
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
        The layout.

    Raises:
        UnsupportedError: if the pattern is anything but causal, bidirectional, either with a sliding window, or packed
            sequences of these.
    """
    if isinstance(attention_mask, Layout):
        return attention_mask
    device = hints.get("device")
    if device is None:
        device = "cpu" if attention_mask is None else attention_mask.device
    pattern = _recognise(mask_function, hints)
    options: dict[str, Any] = {"is_causal": pattern.is_causal, "sliding_window": pattern.sliding_window}
    if attention_mask is None and q_length == kv_length and pattern.may_be_packed:
        is_first = pattern.first_tokens(mask_function, batch_size, q_length, device)
        return packed_layout(is_first, **options)
    if attention_mask is None:
        if pattern.is_causal:
            return whole_layout(
                batch_size,
                q_length,
                kv_length,
                device,
                used=q_offset - kv_offset + q_length,
                dropped=kv_offset,
                **options,
            )
        first_q = None if q_length == kv_length else q_offset
        return whole_layout(batch_size, q_length, kv_length, device, dropped=kv_offset, first_q=first_q, **options)

    if isinstance(q_offset, Tensor) and not torch.compiler.is_compiling():
        q_offset = int(q_offset)
    columns = attention_mask.shape[1]
    total = kv_offset + kv_length
    if isinstance(q_offset, int) and pattern.is_causal and columns < q_offset + q_length:
        raise UnsupportedError(
            f"attention_mask: {columns} columns are not enough; {q_offset + q_length} tokens, cached ones included"
        )
    real = pad(attention_mask, (0, max(0, total - columns)))[:, :total]
    if pattern.is_causal:
        real = real & (torch.arange(total, device=real.device) < q_offset + q_length)
    return padded_layout(real, q_length, q_offset, dropped=kv_offset, **options)


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
_SLIDING = _code_of("sliding_window_overlay", 1)
_SLIDING_BOTH_WAYS = _code_of("sliding_window_bidirectional_overlay", 1)
_PACKED = _code_of("packed_sequence_mask_function", torch.zeros(1, 1))
_REMAPPED = _code_of("remap_positions_for_packed_sequence", causal_mask_function, torch.zeros(1, 1))

_UNKNOWN_PATTERN = (
    "this model's or this call's attention mask is not supported: it is neither causal nor bidirectional, with or "
    "without a sliding window, but has chunks, blocks or a pattern of its own"
)


def _recognise(mask_function: Callable[..., Any], hints: dict[str, Any]) -> _Pattern:
    """Return what a mask function says, or refuse it.

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
    for part in _parts(mask_function):
        if part is causal_mask_function:
            is_causal = True
        elif part is bidirectional_mask_function:
            is_bidirectional = True
        elif part.__code__ is _SLIDING and window is None:
            window = _closed_over(part, "sliding_window")
        elif part.__code__ is _SLIDING_BOTH_WAYS and window_both_ways is None:
            window_both_ways = _closed_over(part, "sliding_window")
        elif part.__code__ is _PACKED and ids is None:
            ids = _closed_over(part, "packed_sequence_mask")
        else:
            raise UnsupportedError(_UNKNOWN_PATTERN)
    if is_causal and not is_bidirectional and window_both_ways is None:
        return _Pattern(True, window, ids, ids is not None)
    if is_bidirectional and not is_causal and window is None:
        return _Pattern(False, None if window_both_ways is None else window_both_ways + 1, ids, ids is not None)
    raise UnsupportedError(_UNKNOWN_PATTERN)


def _parts(mask_function: Any) -> Iterator[Any]:
    """Yield the functions whose conjunction a mask function is."""
    code = getattr(mask_function, "__code__", None)
    if code is None:
        raise UnsupportedError(_UNKNOWN_PATTERN)
    if code is _AND:
        for part in _closed_over(mask_function, "mask_functions"):
            yield from _parts(part)
    elif code is _REMAPPED:
        # The same rule by positions instead of slots; beside the packed sequences it stands with, that is the same.
        yield from _parts(_closed_over(mask_function, "mask_function"))
    else:
        yield mask_function


def _closed_over(function: Any, name: str) -> Any:
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _recognise_while_tracing(mask_function: Callable[..., Any], hints: dict[str, Any]) -> _Pattern:
    chunk_size = getattr(hints.get("config"), "attention_chunk_size", None)
    # With use_vmap the caller has mixed in functions of its own.
    if getattr(mask_function, "__code__", None) is not _AND or hints.get("use_vmap") or chunk_size is not None:
        raise UnsupportedError(_UNKNOWN_PATTERN)
    window = hints.get("local_size")
    if "allow_is_bidirectional_skip" in hints:
        return _Pattern(False, None if window is None else window + 1)
    return _Pattern(True, window, may_be_packed=True)
