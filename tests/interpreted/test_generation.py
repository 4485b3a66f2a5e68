"""generate() on kernels in Triton's interpreter: eager's tokens, with both caches, from symbolic lengths."""

from __future__ import annotations

import pytest
import torch

import fuseline
from tests.generation.pairs import Pair, decoder, prompt


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "static"], ids=["default cache", "static cache"])
def test_tokens_from_kernels(cache: str | None) -> None:
    torch.compiler.reset()
    pair = Pair(decoder("LlamaConfig", num_hidden_layers=1), target="triton")
    settings = {"cache_implementation": cache} if cache else {}
    for length in (5, 7):
        pair.check(prompt(1, length), max_new_tokens=4, **settings)
    assert pair.captures == 2 and all(c.kernels for c in fuseline.reports(pair.model))
