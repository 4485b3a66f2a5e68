"""Encoder-decoders: their prompt is one token, so the step after it is a graph too; the source's length is symbolic."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.generation.pairs import Pair

pytestmark = pytest.mark.slow
SIZES: dict[str, Any] = {
    "vocab_size": 60, "d_model": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 59,
    "decoder_start_token_id": 1,
}  # fmt: skip
LAYERS: dict[str, Any] = {
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
}  # fmt: skip


def model(name: str) -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    if name == "t5":
        config = transformers.T5Config(**SIZES, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    elif name == "bart":
        config = transformers.BartConfig(**SIZES, **LAYERS, max_position_embeddings=64, forced_eos_token_id=59)
    else:
        config = transformers.WhisperConfig(
            **SIZES, **LAYERS, max_source_positions=50, max_target_positions=64, num_mel_bins=8,
            suppress_tokens=None, begin_suppress_tokens=None,
        )  # fmt: skip
        return transformers.WhisperForConditionalGeneration(config).eval()
    return transformers.AutoModelForSeq2SeqLM.from_config(config).eval()


def source(name: str, batch: int, length: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(100 * batch + length)
    if name == "whisper":
        return {"input_features": torch.randn(batch, 8, 100)}
    ids = torch.randint(2, 59, (batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("cache", [None, "static"], ids=["default cache", "static cache"])
@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_tokens_and_captures(name: str, cache: str | None) -> None:
    torch.compiler.reset()
    pair, settings = Pair(model(name)), {"cache_implementation": cache} if cache else {}
    expected = 2 if cache else 3
    assert pair.check(source(name, 1, 12), **settings) == expected
    assert [pair.check(source(name, 1, n), **settings) for n in (17, 5)] == [0, 0]
    assert pair.check(source(name, 2, 9), **settings) == expected
    assert pair.check(source(name, 3, 11), num_beams=2, **settings) == 0
