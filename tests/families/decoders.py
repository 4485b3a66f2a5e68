"""Decoder families of transformers, two layers each, and what sets each apart."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from .rows import VOCABULARY, Row, tokens

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
HEAD = {"head_dim": 16}
WINDOW = {"sliding_window": 5}
PAIR = ["sliding_attention", "full_attention"]
LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip


def build(config: str, experts: str | None = None, **options: Any) -> torch.nn.Module:
    """A model with a language-modelling head from a configuration's class and its options, over `SIZES`."""
    made = getattr(transformers, config)(**{**SIZES, **options})
    more = {"experts_implementation": experts} if experts else {}
    return transformers.AutoModelForCausalLM.from_config(made, **more)


def inputs(batch: int, seed: int) -> dict[str, Any]:
    return {"input_ids": tokens(batch, seed=seed), "use_cache": False}


def decoder(name: str, traits: str, config: str, **options: Any) -> Row:
    return Row(name, "decoder", traits, lambda: build(config, **options), inputs)


def mixture(name: str, traits: str, config: str, **options: Any) -> list[Row]:
    """One row for each way of running the experts; without discrete choices, every expert takes every token."""

    def row(experts: str) -> Row:
        build_with = lambda top: lambda: build(config, experts, **{**EXPERTS, **options, "num_experts_per_tok": top})
        return Row(f"{name}, {experts}", "mixture of experts", traits, build_with(2), inputs, smooth=build_with(4))

    return [row("grouped_mm"), row("batched_mm")]


DECODERS = [
    decoder("Llama", "grouped queries, rotary, SwiGLU", "LlamaConfig"),
    decoder("Mistral", "sliding window", "MistralConfig", **WINDOW),
    decoder("Ministral", "alternating sliding windows", "MinistralConfig", **HEAD, **WINDOW, layer_types=PAIR),
    decoder("Gemma", "norm weights 1 + w, one key head", "GemmaConfig", **HEAD, num_key_value_heads=1),
    decoder("Gemma 2", "soft-capped logits and attention, sandwich norms, alternating windows", "Gemma2Config",
            **HEAD, **WINDOW, query_pre_attn_scalar=16),
    decoder("Gemma 3", "q/k norms, sandwich norms, two rotary bases", "Gemma3TextConfig",
            **HEAD, **WINDOW, query_pre_attn_scalar=16, layer_types=PAIR),
    decoder("Qwen 2", "biases on q, k and v", "Qwen2Config"),
    decoder("Qwen 3", "q/k norms by head", "Qwen3Config", **HEAD),
    decoder("SmolLM 3", "layers without rotary", "SmolLM3Config", no_rope_layers=[1, 0]),
    decoder("OLMo", "LayerNorm without weights, clipped q, k, v", "OlmoConfig", clip_qkv=2.0),
    decoder("OLMo 2", "norms after the blocks, q/k norms", "Olmo2Config"),
    decoder("OLMo 3", "OLMo 2 with sliding windows", "Olmo3Config", **WINDOW, layer_types=PAIR),
    decoder("Phi", "parallel block, partial rotary", "PhiConfig", partial_rotary_factor=0.5),
    decoder("Phi 3", "joint q/k/v and gate/up", "Phi3Config"),
    decoder("GPT-NeoX", "parallel block, joint q/k/v, partial rotary", "GPTNeoXConfig", rotary_pct=0.25),
    decoder("GPT-J", "parallel block, interleaved rotary", "GPTJConfig", rotary_dim=8),
    decoder("CodeGen", "GPT-J with q/k/v split by shard", "CodeGenConfig", rotary_dim=8),
    decoder("Cohere", "parallel block, LayerNorm, interleaved rotary", "CohereConfig", use_qk_norm=True,
            logit_scale=1.0),
    decoder("Cohere 2", "sliding windows; full layers without rotary", "Cohere2Config", **WINDOW, layer_types=PAIR,
            logit_scale=1.0),
    decoder("Falcon", "parallel block, one key head", "FalconConfig", num_kv_heads=1),
    decoder("Falcon, ALiBi", "linear biases on the attention", "FalconConfig", alibi=True, parallel_attn=False),
    decoder("Bloom", "ALiBi, joint q/k/v", "BloomConfig"),
    decoder("MPT", "ALiBi, LayerNorm without biases", "MptConfig", d_model=64, n_heads=4, n_layers=2, max_seq_len=64),
    decoder("GPT-2", "learned positions, transposed weights", "GPT2Config"),
    decoder("GPT-Neo", "local attention by a banded mask", "GPTNeoConfig", attention_types=[[["global", "local"], 1]],
            num_layers=2, num_heads=4, window_size=5),
    decoder("GPT-BigCode", "one key head for all", "GPTBigCodeConfig"),
    decoder("OPT", "learned positions from the mask, ReLU", "OPTConfig", ffn_dim=96, word_embed_proj_dim=64),
    decoder("XGLM", "sinusoidal positions", "XGLMConfig", d_model=64, ffn_dim=96, num_layers=2, attention_heads=4),
    decoder("BioGPT", "learned positions, scaled embeddings", "BioGptConfig"),
    decoder("StableLM", "partial rotary, q/k norms, parallel block", "StableLmConfig",
            qk_layernorm=True, use_parallel_residual=True),
    decoder("Starcoder 2", "LayerNorm, biases, sliding window", "Starcoder2Config", **WINDOW),
    decoder("Granite", "multipliers on embeddings, residuals and logits", "GraniteConfig",
            embedding_multiplier=2.0, residual_multiplier=0.5, attention_multiplier=0.3, logits_scaling=2.0),
    decoder("Nemotron", "LayerNorm 1 + w, squared ReLU", "NemotronConfig"),
    decoder("Persimmon", "q/k LayerNorm, squared ReLU, partial rotary", "PersimmonConfig"),
    decoder("GLM", "interleaved partial rotary", "GlmConfig", **HEAD),
    decoder("GLM 4", "sandwich norms, interleaved partial rotary", "Glm4Config", **HEAD),
    decoder("EXAONE 4", "norms after the blocks, windows, full layers without rotary", "Exaone4Config",
            **WINDOW, layer_types=PAIR),
    decoder("Helium", "interleaved rotary", "HeliumConfig", **HEAD),
    decoder("ERNIE 4.5", "interleaved rotary", "Ernie4_5Config", **HEAD),
    decoder("Arcee", "squared ReLU without a gate", "ArceeConfig"),
    decoder("Apertus", "xIELU with learned slopes, q/k norms", "ApertusConfig"),
    decoder("NanoChat", "norms without weights, soft-capped logits", "NanoChatConfig"),
    decoder("DiffLlama", "difference of two attentions", "DiffLlamaConfig"),
    decoder("BitNet", "norms inside the blocks, squared ReLU", "BitNetConfig"),
    decoder("ModernBERT decoder", "alternating windows, LayerNorm without biases", "ModernBertDecoderConfig",
            **WINDOW, sliding_window_pattern=2),
    decoder("LFM 2", "gated short convolutions beside attention", "Lfm2Config", layer_types=["conv", "full_attention"]),
    decoder("Mamba", "state space, no attention", "MambaConfig", state_size=8),
]  # fmt: skip

MIXTURES = [
    *mixture("Mixtral", "top-2 of softmax", "MixtralConfig"),
    *mixture("Qwen 3 MoE", "q/k norms, renormalised top-2", "Qwen3MoeConfig", **HEAD),
    *mixture("OLMoE", "q/k norms over the width", "OlmoeConfig"),
    *mixture("GPT-OSS", "attention sinks, clamped gates, windows", "GptOssConfig", **HEAD, **WINDOW, layer_types=PAIR),
    *mixture("DeepSeek V2", "latent attention, shared expert", "DeepseekV2Config", **LATENT, first_k_dense_replace=1,
             topk_method="greedy"),
    *mixture("DeepSeek V3", "latent attention, sigmoid router with a bias", "DeepseekV3Config", **LATENT,
             first_k_dense_replace=1),
    *mixture("Qwen 2 MoE", "gated shared expert", "Qwen2MoeConfig"),
    *mixture("Granite MoE", "multipliers, joint experts", "GraniteMoeConfig"),
    *mixture("Qwen 3 Next", "gated delta rule and gated attention", "Qwen3NextConfig", **HEAD,
             linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
             layer_types=["linear_attention", "full_attention"]),
]  # fmt: skip
