"""Tiny random models of many families, each with what is peculiar to its attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

VOCABULARY = 101
SLIDING_WINDOW = 8

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
UNTIED = {"tie_word_embeddings": False}  # a head with the weights of the embeddings may repeat one token for ever
ALTERNATING = {"sliding_window": SLIDING_WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2}


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: as Transformers calls it.
        model: name of the model class.
        config: name of the config class.
        settings: the config's fields.
        peculiarity: what is peculiar to its attention.
        kind: ``"causal"`` (language model), ``"encoder"``, or ``"seq2seq"``.
        refused: for a family that is not supported, what the refusal says.
        skips: parts of the contract that do not hold, and why: what packs sequences (``"position_ids"``,
            ``"cu_seq_lens"``) is ignored by the dense model too, and ``"compile"`` is refused.
    """

    name: str
    model: str
    config: str
    settings: dict[str, Any]
    peculiarity: str
    kind: str = "causal"
    refused: str | None = None
    skips: dict[str, str] = field(default_factory=dict)

    def make(self, **overrides: Any) -> Any:
        """Make a model whose attention is far from uniform and decides which tokens come next.

        Logits are of order 1; of a head that has the weights of the embeddings, which stay as they are, of order 0.1.
        """
        torch.manual_seed(2)
        config = getattr(transformers, self.config)(**{**self.settings, **overrides})
        model = getattr(transformers, self.model)(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2 and ("attn" in name or "attention" in name):
                    parameter.mul_(8)
                elif name.endswith(".sinks"):
                    parameter.normal_()
            if self.kind == "causal" and not config.tie_word_embeddings:
                model.get_output_embeddings().weight.mul_(8)
        return model


def _family(
    name: str, prefix: str, peculiarity: str, *, skips: dict[str, str] | None = None, **settings: Any
) -> Family:
    return Family(
        name, f"{prefix}ForCausalLM", f"{prefix}Config", {**SMALL, **settings}, peculiarity, skips=skips or {}
    )


IGNORES_PACKING = {
    "position_ids": "this family's own code ignores packed `position_ids`, dense as well; `cu_seq_lens` does it"
}
_BY_ITS_MASK = "the family calls `scaled_dot_product_attention` with a finished mask, which is intercepted: "
INTERCEPTED = {
    "position_ids": f"{_BY_ITS_MASK}its own code silently ignores packed sequences, dense as well",
    "cu_seq_lens": f"{_BY_ITS_MASK}its own code silently ignores packed sequences, dense as well",
    "compile": f"{_BY_ITS_MASK}while a graph is traced it cannot be read, and is refused",
}
_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
_VL_TEXT = {**SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}

_ALL = [
    _family("llama", "Llama", "grouped queries"),
    _family("mistral", "Mistral", "sliding window", sliding_window=SLIDING_WINDOW),
    _family("qwen2", "Qwen2", "sliding window in some layers", use_sliding_window=True, **ALTERNATING),
    _family("qwen3", "Qwen3", "norms on queries and keys", head_dim=16),
    _family("qwen3_moe", "Qwen3Moe", "experts", head_dim=16, num_experts=4, moe_intermediate_size=16, **EXPERTS),
    _family(
        "gemma2",
        "Gemma2",
        "softcap, alternating sliding window",
        attn_implementation="eager",  # the others cannot cap
        head_dim=16,
        attn_logit_softcapping=3.0,
        **UNTIED,
        **ALTERNATING,
    ),
    Family(
        "gemma3",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**SMALL, "head_dim": 16, **ALTERNATING},
        "alternating sliding window",
    ),
    _family(
        "gpt_oss",
        "GptOss",
        "learnable sinks, alternating sliding window",
        skips=IGNORES_PACKING,
        head_dim=16,
        num_local_experts=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        **EXPERTS,
        **ALTERNATING,
    ),
    _family("phi3", "Phi3", "fused projections, sliding window", sliding_window=SLIDING_WINDOW),
    _family("granite", "Granite", "scale of its own", attention_multiplier=0.3),
    _family("olmo2", "Olmo2", "norms over all heads"),
    _family(
        "cohere2", "Cohere2", "parallel blocks, layers without positions", logit_scale=1.0, **UNTIED, **ALTERNATING
    ),
    _family("glm4", "Glm4", "partial rotary positions", head_dim=16),
    _family("smollm3", "SmolLM3", "layers without positions", no_rope_layers=[1, 0], **UNTIED),
    _family("starcoder2", "Starcoder2", "sliding window from the config", sliding_window=SLIDING_WINDOW, **UNTIED),
    _family(
        "falcon",
        "Falcon",
        "calls scaled_dot_product_attention itself",
        multi_query=True,
        alibi=False,
        skips=INTERCEPTED,
    ),
    _family("gpt_neox", "GPTNeoX", "fused projections, partial rotary positions"),
    Family(
        "opt",
        "OPTForCausalLM",
        "OPTConfig",
        {**SMALL, **UNTIED, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
        "learned positions",
        skips=IGNORES_PACKING,
    ),
    _family(
        "deepseek_v3",
        "DeepseekV3",
        "latent attention: value heads smaller than query heads",
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=12,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=16,
        **EXPERTS,
    ),
    Family(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {"text_config": _VL_TEXT, "vision_config": _VISION},
        "text tower of a vision-language model",
        skips=IGNORES_PACKING,
    ),
    _family(
        "mixtral", "Mixtral", "experts, sliding window", num_local_experts=4, sliding_window=SLIDING_WINDOW, **EXPERTS
    ),
    _family("nemotron", "Nemotron", "partial rotary positions", head_dim=8),
    Family(
        "bert",
        "BertForMaskedLM",
        "BertConfig",
        {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "not causal",
        kind="encoder",
        skips=IGNORES_PACKING,
    ),
    Family(
        "modernbert",
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**SMALL, "local_attention": 2 * SLIDING_WINDOW, "cls_token_id": 1, "sep_token_id": 2},
        "not causal, alternating sliding window",
        kind="encoder",
        skips=IGNORES_PACKING,
    ),
    Family(
        "whisper",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_mel_bins": 8,
            "max_source_positions": 20,
            "max_target_positions": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 3,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        "cross-attention",
        kind="seq2seq",
    ),
    Family(
        "t5",
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
        "relative position bias",
        kind="seq2seq",
        refused=r"encoder.block.0.layer.0.SelfAttention \(T5Attention\): adds a position bias to its scores",
    ),
    Family(
        "llama4",
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **SMALL,
            "head_dim": 8,
            "intermediate_size_mlp": 32,
            "num_local_experts": 2,
            "attention_chunk_size": 16,
            "layer_types": ["chunked_attention", "full_attention"],
        },
        "chunked attention",
        refused=r"model.layers.0.self_attn \(Llama4TextAttention\): chunked_attention is not supported",
    ),
    Family(
        "bloom",
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 1, "n_head": 2},
        "position bias in a computation of its own",
        refused=r"transformer.h.0.self_attention \(BloomAttention\): does not go through Transformers' attention",
    ),
]
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}


def names(condition: Callable[[Family], bool]) -> list[str]:
    """Return the names of the families that meet a condition."""
    return [name for name, family in FAMILIES.items() if condition(family)]
