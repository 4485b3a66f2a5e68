"""Models of transformers: a decoder, an encoder-decoder, and one whose weights are transposed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fuseline

transformers = pytest.importorskip("transformers")


def llama() -> tuple[Any, dict[str, Any]]:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), {"input_ids": ids(2, 9), "use_cache": False}


def gpt2() -> tuple[Any, dict[str, Any]]:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids(2, 9), "use_cache": False}


def bart() -> tuple[Any, dict[str, Any]]:
    config = transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32,
    )  # fmt: skip
    inputs = {"input_ids": ids(2, 9), "decoder_input_ids": ids(2, 6), "use_cache": False}
    return transformers.BartForConditionalGeneration(config), inputs


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(4, 64, shape, generator=torch.Generator().manual_seed(sum(shape)))


PIPELINES = {
    llama: "raise,quantize{weights=ternary,activations=int8,keys=int8:asym,values=int8:asym,method=paretoq}",
    gpt2: "raise,quantize{weights=midrise2,method=paretoq}",
    bart: "raise{allow_empty},quantize{weights=midrise2,activations=int8,keys=int8,values=int8,method=paretoq}",
}


@pytest.mark.slow
@pytest.mark.parametrize("family", (llama, gpt2, bart), ids=lambda make: make.__name__)
def test_a_family(family: Any) -> None:
    torch.manual_seed(0)
    model, example = family()
    qat = fuseline.prepare_qat(model.train(), PIPELINES[family], example, dropout=False)
    optimizer = torch.optim.AdamW(qat.parameters(), 1e-3, weight_decay=0.0)
    shorter = {k: v[:1, :5] if isinstance(v, torch.Tensor) else v for k, v in example.items()}
    for inputs in (example, shorter):  # sizes may vary
        logits = qat(**inputs).logits
        F.cross_entropy(logits.flatten(0, 1), torch.zeros(logits.shape[:2], dtype=torch.int64).flatten()).backward()
        optimizer.step()
    assert all(range.grad is not None for range in qat.ranges.values()) and len(qat.ranges) >= 4
    qat.eval()
    with torch.no_grad():
        expected, smaller = (qat(**inputs).logits for inputs in (example, shorter))
        converted = fuseline.convert(qat, target="eager").eval()
        for inputs, wanted in ((example, expected), (shorter, smaller)):
            assert (converted(**inputs).logits - wanted).abs().max() <= 2e-6 * wanted.abs().max()
        made = converted.generate(example["input_ids"], max_new_tokens=3, do_sample=False)
    assert made.shape[0] == 2
