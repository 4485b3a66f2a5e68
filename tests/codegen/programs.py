"""Whole programs for the code generator's tests: the demo model's geometry with two layers and random weights.

Kernels are written for shapes, and the layers of a model repeat them: two layers give every kernel that thirty do.
"""

from __future__ import annotations

from typing import Any

import torch

import fuseline
from fuseline.codegen.lower import Lowered, lower

PIPELINES = (
    "raise,fuse",
    "raise,quantize{weights=int8},fuse",
    "raise,quantize{weights=int4:g64},fuse",
    "raise,quantize{weights=int4:g64:sym,activations=int8},fuse",
)


def demo_geometry(vocabulary: int = 49152, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """hidden 576, intermediate 1536, 9 heads of 64 over 3, tied embeddings."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_theta=100000.0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def lowered(model: torch.nn.Module, pipeline: str, length: int = 5) -> Lowered:
    """The model's program with a symbolic sequence, through `pipeline` and lowered."""
    ids = torch.randint(0, 100, (1, length))
    dynamic: dict[str, Any] = {"input_ids": {1: torch.export.Dim.AUTO}, "use_cache": None}
    program = fuseline.capture(model, (ids,), {"use_cache": False}, dynamic)
    after, _ = fuseline.Pipeline(pipeline).run(program)
    return lower(after)
