"""Dividing a whole model's bytes among its groups, and each group's among channels and the low-rank branch."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...compiler.errors import UserError
from .curves import Curve
from .groups import Group

STEPS = 200
"""Halvings and grid of the searches for one number."""


class Budgets(enum.Enum):
    """How the bytes are divided among groups."""

    SEARCHED = "searched"  # evolution, by the loss of the whole model
    SENSITIVITY = "sensitivity"  # in closed form, by what each group costs to second order
    GREEDY = "greedy"  # block by block, the cheapest step next (TEAL)
    UNIFORM = "uniform"  # the same share at each


@dataclass(frozen=True)
class Choice:
    """fraction of the channels that is kept; rank of the branch."""

    fraction: float
    rank: int = 0


Choices = dict[Group, Choice]
Shares = dict[Group, float]
"""The share of each group's bytes that is read."""


def within(groups: Sequence[Group], budget: float, dense: int) -> float:
    """The share of the groups' bytes that may be read, so that all products together read `budget` of theirs.

    dense: bytes of the products that stay dense.

    Raises:
        UserError: the dense ones alone take more than the budget.
    """
    sparse = sum(group.bytes for group in groups)
    share = (budget * (sparse + dense) - dense) / sparse
    if share < 0.02:
        least = (dense + 0.02 * sparse) / (sparse + dense)
        raise UserError(
            f"a budget of {budget:g} of the bytes cannot be kept: products that stay dense hold "
            f"{dense / (sparse + dense):.1%} of them",
            remedy=f"budget={math.ceil(least * 100) / 100:g} or more, or leave them out of the count with skip",
        )
    return min(share, 1.0)


def fitted(shares: Mapping[Group, float], share: float) -> Shares:
    """Shares moved together, by one number in their logits, until the bytes are `share` of all."""
    total = sum(group.bytes for group in shares)
    logits = {
        group: math.log(min(max(s, 1e-4), 1 - 1e-4) / (1 - min(max(s, 1e-4), 1 - 1e-4))) for group, s in shares.items()
    }
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        read = sum(group.bytes / (1 + math.exp(-(value + middle))) for group, value in logits.items())
        low, high = (middle, high) if read < share * total else (low, middle)
    return {group: 1 / (1 + math.exp(-(value + low))) for group, value in logits.items()}


def split(shares: Mapping[Group, float], curves: Mapping[Group, Curve], lean: Mapping[Group, float]) -> Choices:
    """Each group's share divided as costs least; lean: what costs with a branch are multiplied by, 1 where absent."""
    found = {}
    for group, share in shares.items():
        fraction, rank, _ = curves[group].best(share, lean.get(group, 1.0))
        found[group] = Choice(fraction, rank)
    return found


def sensitivity(curves: Mapping[Group, Curve], share: float, weights: Mapping[Group, float] | None = None) -> Shares:
    """The shares of least total cost: at each group the slope of cost against bytes is the same.

    weights: what a group's cost is multiplied by. The cost of a share is taken on a grid, and made convex: each step of
    bytes goes where it takes away most, largest slopes first.
    """
    grid = [0.02 + 0.98 * i / STEPS for i in range(STEPS + 1)]
    pieces: list[tuple[float, float, Group]] = []
    for group, curve in curves.items():
        weight = 1.0 if weights is None else weights[group]
        points = [(s, weight * curve.best(s)[2]) for s in grid]
        hull: list[tuple[float, float]] = []
        for point in points:  # the lower convex hull, from the left
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
                hull.pop()
            hull.append(point)
        for left, right in zip(hull, hull[1:], strict=False):
            pieces.append((_slope(left, right) / group.bytes, right[0] - left[0], group))
    shares = dict.fromkeys(curves, grid[0])
    left_over = (share - grid[0]) * sum(group.bytes for group in curves)
    for _, width, group in sorted(pieces, key=lambda piece: piece[0]):
        take = min(width, left_over / group.bytes)
        shares[group] += take
        left_over -= take * group.bytes
        if left_over <= 0:
            break
    return shares


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])
