"""Other ways to generate: a model that drafts, prompts that are looked up, chunks, inference mode."""

from __future__ import annotations

import pytest
import torch

from tests.generation.pairs import Pair, decoder, prompt


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


@pytest.mark.slow
def test_prompt_lookup() -> None:
    """Several drafted tokens are checked at once: one more graph over a cache, and one where their number changes."""
    pair = Pair(decoder("LlamaConfig"))
    taken = [pair.check(prompt(1, length), prompt_lookup_num_tokens=3) for length in (9, 14, 20)]
    assert sum(taken) <= 4 and taken[-1] == 0


@pytest.mark.slow
def test_assisted_decoding() -> None:
    """The draft runs as its owner left it: here optimized too, with captures of its own."""
    pair = Pair(decoder("LlamaConfig"))
    draft = Pair(decoder("LlamaConfig", num_hidden_layers=1))
    for length in (9, 20, 14):
        taken = pair.captures
        torch.manual_seed(7)
        ids = prompt(1, length)
        tokens = pair.generate(pair.model, ids, {"assistant_model": draft.model})
        assert torch.equal(tokens, pair.generate(pair.reference, ids, {"assistant_model": draft.reference}))
    assert pair.captures <= 4 and draft.captures <= 4 and pair.captures == taken


@pytest.mark.slow
def test_one_token_prompts_are_graphs_of_their_own() -> None:
    """Dynamo takes a size of one for fixed: a prompt of one token, and with a growing cache the step after it."""
    pair = Pair(decoder("LlamaConfig"))
    for cache, more in ((None, 2), ("static", 1)):
        settings = {"cache_implementation": cache} if cache else {}
        assert pair.check(prompt(1, 12), **settings) == 2
        assert pair.check(prompt(1, 1), min_new_tokens=4, **settings) == more
        assert pair.check(prompt(1, 1), min_new_tokens=4, **settings) == 0


@pytest.mark.slow
@pytest.mark.parametrize("cache", [None, "static"])
def test_inference_mode(cache: str | None) -> None:
    pair = Pair(decoder("LlamaConfig"))
    settings = {"cache_implementation": cache} if cache else {}
    with torch.inference_mode():
        assert pair.check(prompt(1, 12), **settings) == 2
        assert pair.check(prompt(1, 7), **settings) == 0


@pytest.mark.slow
def test_without_a_cache() -> None:
    pair = Pair(decoder("LlamaConfig"))
    assert pair.check(prompt(1, 12), use_cache=False) <= 2
    assert pair.check(prompt(1, 20), use_cache=False) == 0


@pytest.mark.slow
def test_a_prompt_in_chunks() -> None:
    pair = Pair(decoder("LlamaConfig"))
    taken = [pair.check(prompt(1, length), prefill_chunk_size=8) for length in (20, 23, 30)]
    assert sum(taken) <= 4 and taken[-1] == 0


def test_a_cache_that_its_library_cannot_make_is_its_library_s_error() -> None:
    """An unknown cache fails as it does without Fuseline, before anything is compiled."""
    pair = Pair(decoder("LlamaConfig", num_hidden_layers=1))
    for model in (pair.model, pair.reference):
        with pytest.raises((ImportError, ValueError)):
            pair.generate(model, prompt(1, 4), {"cache_implementation": "no such cache"})
    assert pair.captures == 0
