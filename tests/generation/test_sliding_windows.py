"""Sliding windows: transformers writes such caches in other ways before, while and after they are full, and each of
these stages is a graph. Their number does not grow with lengths, steps or calls."""

from __future__ import annotations

import pytest
import torch

from tests.generation.pairs import Pair, decoder, prompt

WINDOW = 8
LONG, SHORT = (12, 17, 30), (5, 6, 4, 5)


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


def run(config: str, cache: str | None, batch: int, lengths: tuple[int, ...], pair: Pair | None = None) -> list[int]:
    pair = pair or Pair(decoder(config, sliding_window=WINDOW, **({"head_dim": 8} if "Gemma" in config else {})))
    settings = {"cache_implementation": cache} if cache else {}
    return [pair.check(prompt(batch, length), **settings) for length in lengths]


@pytest.mark.slow
def test_beyond_the_window() -> None:
    """Sliding and full layers in turn."""
    assert run("Gemma2Config", "static", 1, LONG) == [2, 0, 0]


@pytest.mark.slow
def test_into_the_window() -> None:
    """A default cache grows, gets full, is full, and then keeps a part of itself: four steps beside the prompt."""
    taken = run("MistralConfig", None, 1, SHORT)
    assert taken[0] <= 5 and taken[1:] == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("cache", [None, "static"], ids=["default cache", "static cache"])
@pytest.mark.parametrize("config", ["MistralConfig", "Gemma2Config", "Gemma3TextConfig"])
def test_all_stages(config: str, cache: str | None) -> None:
    changes = {"head_dim": 8} if "Gemma" in config else {}
    pair = Pair(decoder(config, sliding_window=WINDOW, **changes))
    for batch in (1, 2):
        taken = run(config, cache, batch, (*LONG, *SHORT, *LONG), pair)
        assert sum(taken) <= (6 if cache is None else 4), taken
        assert taken[-3:] == [0, 0, 0]
    assert run(config, cache, 3, (*LONG, *SHORT), pair) == [0] * 7, "other batch sizes are covered"
