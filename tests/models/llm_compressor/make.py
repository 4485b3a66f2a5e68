"""Writes the checkpoint beside it, with llm-compressor and its own compressed-tensors; the tests need neither.

    pip install llmcompressor==0.14.0.1
    python tests/models/llm_compressor/make.py

A Llama of one layer with random weights, so that the file is small: 4-bit codes with zero points in groups of 16.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import transformers
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier

HERE = Path(__file__).parent


def main() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        initializer_range=0.2,
        dtype=torch.bfloat16,
    )
    with tempfile.TemporaryDirectory() as plain:
        transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(plain)
        compress(transformers.AutoModelForCausalLM.from_pretrained(plain))


def compress(model: torch.nn.Module) -> None:
    scheme = preset_name_to_scheme("W4A16_ASYM", ["Linear"])
    scheme.weights.group_size = 16
    recipe = QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    oneshot(model=model, recipe=recipe, pipeline="datafree")
    model.save_pretrained(HERE, save_compressed=True)


if __name__ == "__main__":
    main()
