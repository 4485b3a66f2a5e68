"""torch.autocast around a model: its casts are not in the graph, so `raise` leaves all as it is and says so."""

from __future__ import annotations

import pytest
import torch

import fuseline
from tests.generation.pairs import Pair, decoder, prompt
from tests.helpers.models import error

REASON = "it runs under torch.autocast, whose casts are not in the graph"


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.slow
def test_right_results_and_a_readable_reason() -> None:
    pair = Pair(decoder("LlamaConfig", num_hidden_layers=1))
    inputs = prompt(1, 12)
    with torch.autocast("cpu", torch.bfloat16):
        logits, expected = pair.model(**inputs).logits, pair.reference(**inputs).logits
        assert logits.dtype == expected.dtype == torch.bfloat16
        assert error(logits.float(), expected.float()) < 1e-6
        pair.check(inputs)
    for compilation in fuseline.reports(pair.model):
        step = compilation.report["raise"]
        assert step.matched == 0 and all(reason.startswith(REASON) for reason in step.refused.values())
    pair.check(inputs)  # the same model outside of autocast
    assert fuseline.reports(pair.model)[-1].report["raise"].matched > 0


@torch.no_grad()
def test_a_pass_that_finds_nothing_is_an_error_with_the_reason() -> None:
    model = fuseline.optimize(decoder("LlamaConfig", num_hidden_layers=1), "raise,fuse")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(Exception, match="matched no site") as caught:
        model(**prompt(1, 12))
    assert f"x {REASON}" in str(caught.value)


@torch.no_grad()
@pytest.mark.slow
def test_quantize_works_under_it() -> None:
    pair = Pair(decoder("LlamaConfig", num_hidden_layers=1), "quantize{weights=int8}")
    inputs = prompt(1, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert 0 < error(pair.model(**inputs).logits.float(), pair.reference(**inputs).logits.float()) < 0.1
