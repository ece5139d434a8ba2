"""Queries, keys and values with the structure of real ones, of any length: recorded from SmolLM2-135M, and extended.

The model reads a long text in windows of its context (8192 tokens), each by itself. Recorded are eight heads of keys
and values, from layers spread over the model, and of each the three query heads that share it and the first of these
once more: 32 and 8 heads. They are extended in two ways:

- **Length.** Windows follow each other. Queries and keys of a window are rotated by its first position, as rotary
  embeddings do. So inside of a window all scores are the recorded ones, and between windows those of the same vectors
  that far apart.
- **Head dimension.** Each vector stands twice in one of 128 numbers, with queries scaled so that all scores stay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

KV_HEADS = 8
REPEAT = 4
HEAD_DIM = 128


class Recorder:
    """An attention function of Transformers that is dense, and keeps what the recorded heads see.

    Attributes:
        heads: ``[queries, keys, values]`` of each recorded head of keys, ``[heads, tokens, dim]``.
    """

    def __init__(self, layers: int) -> None:
        self.layers = [(2 * i + 1) * layers // (2 * KV_HEADS) for i in range(KV_HEADS)]
        self.heads: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **__: Any
    ) -> tuple[Tensor, None]:
        """Return the output, ``[batch, queries, heads, dim]``."""
        repeat = query.shape[1] // key.shape[1]
        for number in (i for i, layer in enumerate(self.layers) if layer == module.layer_idx):
            head = number % key.shape[1]
            own = query[0, head * repeat : (head + 1) * repeat]
            self.heads.append((own[torch.arange(REPEAT) % repeat], key[0, head, None], value[0, head, None]))
        output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2), None


@torch.no_grad()
def recorded(seq_len: int, folder: Path, text: str, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value, ``[1, seq, heads, 128]`` in BF16.

    Args:
        seq_len: how many tokens.
        folder: of the model.
        text: what it reads, long enough.
        device: where to.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :seq_len].to(device)
    if ids.shape[1] < seq_len:
        raise ValueError(f"the text has {ids.shape[1]} tokens, not {seq_len}")
    recorder = Recorder(model.config.num_hidden_layers)
    AttentionInterface.register("recorder", recorder)
    model.set_attn_implementation("recorder")
    frequencies = model.model.rotary_emb.inv_freq.double()
    context, windows = model.config.max_position_embeddings, []
    for begin in range(0, seq_len, context):
        recorder.heads = []
        model(ids[:, begin : begin + context], logits_to_keep=1)
        query, key, value = (torch.cat(x) for x in zip(*recorder.heads, strict=True))
        angle = (begin * frequencies).repeat(2)
        windows.append((_rotated(query, angle), _rotated(key, angle), value))
    query, key, value = (torch.cat(x, 1).transpose(0, 1)[None] for x in zip(*windows, strict=True))
    copies = HEAD_DIM // query.shape[3]
    scale = (query.shape[3] / HEAD_DIM) ** 0.5  # as many products more, and a smaller factor on the scores
    query, key, value = (torch.cat([x] * copies, -1) for x in (query.float() * scale, key, value))
    return tuple(x.to(torch.bfloat16).contiguous().clone() for x in (query, key, value))


def _rotated(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate ``[heads, tokens, dim]`` as rotary embeddings do."""
    first, second = x.double().chunk(2, -1)
    return (x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()).to(x.dtype)
