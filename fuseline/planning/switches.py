"""The best plan as a function of the sequence's length, and the lengths where one plan takes another's place.

The fastest plan within the memory at one length stays within it up to a length that its formula gives in closed form;
there the next takes its place, until nothing fits. As memory only grows with the length, no plan that did not fit comes
back. One that fits may become faster than another within its stretch, where costs grow at different rates: neighbours
are compared at their border, which is moved to where their times cross.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..compiler.errors import UserError
from ..passes.checkpointing.policies import Choice, Policy, Problem, choose
from .formulas import Formula, longest, step_formula

CLOSER = 2e-3
"""By what part a neighbour's time has to be less to count: twice the solver's gap."""


@dataclass(frozen=True)
class Stretch:
    """A plan, and the lengths `first` to `last` at which it is the fastest that fits. closed: the longest at which it
    fits, by the memory M; seconds: what it computes again at `first`, share: of the step where all is kept."""

    first: int
    last: int
    choice: Choice
    formula: Formula
    closed: Any
    seconds: float
    share: float


def by_length(
    at: Callable[[int], Problem], symbol: Any, room: float, layers: int | None = None, first: int = 1024, most: int = 12
) -> list[Stretch]:
    """The plans from a length on, at most so many; empty where nothing fits there.

    Args:
        at: the problem at a length; room: bytes for activations and gradients; layers: as in `step_formula`.
    """
    found: list[Stretch] = []
    while len(found) < most:
        problem = at(first)
        try:
            choice = choose(problem, Policy.BUDGET, room)
        except UserError:
            break
        formula = step_formula(problem, choice, symbol, layers)
        last, closed = longest(formula, room)
        found = _joined(at, found, Stretch(first, max(first, last), choice, formula, closed, 0.0, 0.0))
        first = found[-1].last + 1
        if found[-1].last >= 2**60:
            break
    return [_timed(at(one.first), one) for one in found]


def _timed(problem: Problem, one: Stretch) -> Stretch:
    again = problem.time(one.choice.execution)
    return replace(one, seconds=again, share=again / max(problem.step_seconds, 1e-12))


def _joined(at: Callable[[int], Problem], found: list[Stretch], behind: Stretch) -> list[Stretch]:
    """Neighbours and the next one, which begins where it becomes the faster one. A plan that it beats throughout goes:
    one that the solver had no time to make better."""
    if not found:
        return [behind]
    before = found[-1]

    def faster(length: int) -> bool:
        problem = at(length)
        return problem.time(behind.choice.execution) < (1 - CLOSER) * problem.time(before.choice.execution)

    if not faster(before.last):
        return [*found, behind]
    if faster(before.first):
        return _joined(at, found[:-1], replace(behind, first=before.first))
    low, high = before.first, before.last
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if faster(middle) else (middle, high)
    return [*found[:-1], replace(before, last=high - 1), replace(behind, first=high)]
