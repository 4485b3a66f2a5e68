"""Shares of least loss by the closed form, again and again, with slopes measured at the masks that it gave.

The closed form takes each group's cost near the dense model. Here each group's curve is multiplied by a number, such
that its slope at the present share is the slope of the whole model's loss there (`slopes.py`), and the shares of least
total cost are taken again. Where that no longer changes them, one more byte is worth the same at every group: the
condition for the least loss. Slopes of single groups are noisy, so what they are multiplied by is taken smooth along
the depth of the model for each kind of product, with a part of the curve itself, and goes half of the way in its
logarithm. Source: convex approximations in turns, as the method of moving asymptotes (Svanberg, 1987) has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from .budgets import Choices
from .curves import Curve
from .groups import Group
from .slopes import ends

WIDTH = 3.0
"""Of the bell by which neighbouring groups of a kind count, in groups."""

FURTHEST = 2.5
"""The largest factor between a group's slope and the modelled one that is believed; its inverse is the least."""

PRIOR = 0.25
"""The part that curves as they are have in the slopes."""

WAY = 0.5
"""How far one step goes, in logarithms."""

Weights = dict[Group, float]


def reweighted(
    curves: Mapping[Group, Curve], weights: Weights, slopes: Mapping[Group, float], choices: Choices
) -> Weights:
    """What curves are to be multiplied by, from what they were (`weights`) and the slopes at `choices`."""
    modelled = {group: _slope(curves[group], choices[group].fraction, choices[group].rank) for group in curves}
    total = sum(modelled.values())
    scale = sum(slopes.values()) / total if total > 0 else 1.0
    if scale <= 0:
        return weights
    found: Weights = {}
    kinds: dict[str, list[Group]] = {}
    for group in curves:
        kinds.setdefault(group.kind, []).append(group)
    for groups in kinds.values():
        for i, group in enumerate(groups):
            bell = [math.exp(-(((i - j) / WIDTH) ** 2) / 2) for j in range(len(groups))]
            below = sum(b * scale * modelled[g] for b, g in zip(bell, groups, strict=True))
            above = sum(b * slopes[g] for b, g in zip(bell, groups, strict=True))
            ratio = (above + PRIOR * below) / ((1 + PRIOR) * below) if below > 0 else 1.0
            ratio = min(max(ratio, 1 / FURTHEST), FURTHEST)
            found[group] = weights[group] ** (1 - WAY) * ratio**WAY
    return found


def _slope(curve: Curve, fraction: float, rank: int) -> float:
    low, high = ends(fraction)
    return max(0.0, curve.at(low, rank) - curve.at(high, rank)) / (high - low)
