"""Llama of Hugging Face with random weights, and its loss from hidden states for methods that cut sequences by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 4096},
}  # fmt: skip


def build(shape: str, length: int, device: torch.device, dtype: torch.dtype, checkpointing: bool) -> torch.nn.Module:
    """The model for training; every rank draws the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=length, rope_theta=500000.0, use_cache=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(before)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def summed_loss(model: torch.nn.Module, hidden: torch.Tensor, labels: torch.Tensor, tiles: int) -> torch.Tensor:
    """Σ cross-entropy over labels that are shifted already; in `tiles` parts whose logits are computed anew in
    backward, as ALST does (Bekman et al., 2025)."""

    def part(h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = F.linear(h, model.lm_head.weight).float()
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100, reduction="sum")

    if tiles == 1:
        return part(hidden, labels)
    pieces = zip(hidden.chunk(tiles, 1), labels.chunk(tiles, 1))
    return torch.stack([checkpoint(part, h, y, use_reentrant=False) for h, y in pieces]).sum()


def tile_mlps(model: torch.nn.Module, tiles: int) -> None:
    """Each MLP in `tiles` parts of the sequence, computed anew in backward (ALST's TiledMLP)."""
    for layer in model.model.layers:
        whole = layer.mlp.forward

        def tiled(x: torch.Tensor, whole: Any = whole) -> torch.Tensor:
            return torch.cat([checkpoint(whole, part, use_reentrant=False) for part in x.chunk(tiles, 1)], 1)

        layer.mlp.forward = tiled
