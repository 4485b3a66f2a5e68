"""What several budgets cost, from the searches at each: the Pareto front of bytes that are read and loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...compiler.framework import Study
from .budgets import Budgets
from .decide import Decision

if TYPE_CHECKING:
    from . import RSparse


@dataclass(frozen=True)
class Searched:
    """One budget. read: the share of the products' bytes that is read, those that stay dense among them; measured: name
    → loss on the search's calls; losses: of all its candidates there; held_out: what was kept, see `Decision`."""

    budget: float
    read: float
    measured: dict[str, float]
    losses: list[float]
    held_out: dict[str, Any]


def searched(step: RSparse, study: Study, budgets: Sequence[float]) -> list[Searched]:
    """Searches at each budget, with activations and curves read once; in the order of `budgets`.

    Raises:
        UserError: a budget cannot be kept, or the data are too few for its thresholds.
    """
    steps = [replace(step, budget=budget, budgets=Budgets.SEARCHED) for budget in budgets]
    decision, found = Decision(steps[0], study), []
    sparse = sum(group.bytes for group in decision.groups)
    for one in steps:
        decision.step = one
        choices, record = decision.choose()
        spent = sum(group.spent(choice.fraction, choice.rank) for group, choice in choices.items())
        read = (spent + decision.dense) / (sparse + decision.dense)
        found.append(Searched(one.budget, read, record["measured"], record["losses"], record["held_out"]))
    return found
