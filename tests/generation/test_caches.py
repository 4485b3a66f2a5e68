"""generate() with the default and the static cache: eager's tokens, from a bounded number of captures.

Per kind of cache: one graph for the prompt and one for a step, for a batch of one; the same again for all other batch
sizes. Lengths, strategies and padding add nothing, but for what each test says.
"""

from __future__ import annotations

import pytest
import torch

import fuseline
from tests.generation.pairs import SAMPLING, STRATEGIES, Pair, decoder, prompt


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


CACHES = pytest.mark.parametrize("cache", [None, "static"], ids=["default cache", "static cache"])


def kind(cache: str | None) -> dict[str, str]:
    return {"cache_implementation": cache} if cache else {}


@CACHES
@pytest.mark.one_in(2)
def test_one_sequence_takes_two_captures(cache: str | None) -> None:
    pair = Pair(decoder("LlamaConfig", num_hidden_layers=1))
    assert pair.check(prompt(1, 12), **kind(cache)) == 2
    for length, tokens in ((17, 8), (5, 12), (30, 1)):
        assert pair.check(prompt(1, length), max_new_tokens=tokens, **kind(cache)) == 0
    assert pair.check(prompt(1, 9), **SAMPLING, **kind(cache)) == 0
    fuseline.refresh(pair.model)
    assert pair.check(prompt(1, 11), **kind(cache)) == 0


@CACHES
@pytest.mark.slow
def test_batches_and_strategies_take_two_more(cache: str | None) -> None:
    pair = Pair(decoder("LlamaConfig"))
    assert pair.check(prompt(1, 12), **kind(cache)) == 2
    assert pair.check(prompt(2, 9), **kind(cache)) == 2
    for batch, length in ((3, 9), (5, 14), (1, 6)):
        assert pair.check(prompt(batch, length), **kind(cache)) == 0
    for name, settings in STRATEGIES:
        assert pair.check(prompt(2, 10), **settings, **kind(cache)) == 0, name
    # A static cache gets no mask where nothing is padded, and a graph with one where something is.
    assert pair.check(prompt(2, 9, padding=3), **kind(cache)) == (1 if cache else 0)
    assert pair.check(prompt(4, 13, padding=5), num_beams=2, **kind(cache)) == 0


@torch.no_grad()
@pytest.mark.slow
def test_quantized_weights_serve_both_caches() -> None:
    """The caches differ, the model does not: same tokens, and after an edit of the weights again."""
    pair = Pair(decoder("LlamaConfig", num_hidden_layers=1), "quantize{weights=int8}")
    ids = prompt(1, 9)
    generate = lambda cache: pair.generate(pair.model, ids, kind(cache))
    before = generate(None)
    assert torch.equal(before, generate("static"))
    assert pair.captures == 4
    pair.model.model.layers[0].mlp.up_proj.weight.data.mul_(-1)  # raises no version
    assert torch.equal(before, generate(None))
    fuseline.refresh(pair.model)
    after = generate(None)
    assert not torch.equal(before, after) and torch.equal(after, generate("static"))
    assert pair.captures == 4, "an edit is no reason to capture again"
