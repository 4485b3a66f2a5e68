"""The search of bits under a budget."""

from __future__ import annotations

import itertools

import pytest

from fuseline import UserError
from fuseline.cache_bits import search_bits

ERRORS = [{2: w * 1.0, 4: w * 0.06, 8: w * 0.0002} for w in (1.0, 30.0, 0.2, 5.0, 0.01)]


def size(bits: int) -> float:
    return bits / 16 + 0.05


def cost(bits: tuple[int, ...]) -> float:
    return sum(errors[b] for errors, b in zip(ERRORS, bits, strict=True))


def test_what_matters_most_keeps_most_bits() -> None:
    bits = search_bits(ERRORS, size, 5 * size(4))
    assert sum(map(size, bits)) <= 5 * size(4)
    assert bits[1] == max(bits) and bits[4] == 2
    assert search_bits(ERRORS, size, 100.0) == (8,) * 5
    assert search_bits(ERRORS, size, 5 * size(2)) == (2,) * 5


def test_exchanges_find_what_errors_alone_do_not() -> None:
    """Where the loss is another than the errors say, trials come nearer to the best of all choices."""
    loss = lambda bits: cost(bits[::-1])
    budget = 5 * size(4)
    start = search_bits(ERRORS, size, budget)
    found = search_bits(ERRORS, size, budget, loss, trials=200)
    best = min((b for b in itertools.product((2, 4, 8), repeat=5) if sum(map(size, b)) <= budget), key=loss)
    assert loss(found) < loss(start) and sum(map(size, found)) <= budget
    assert loss(found) <= 1.5 * loss(best)


def test_a_budget_that_nothing_fits() -> None:
    with pytest.raises(UserError, match="the least bits everywhere"):
        search_bits(ERRORS, size, 0.1)
