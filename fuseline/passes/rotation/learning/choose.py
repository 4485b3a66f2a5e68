"""Keeping the rotations that pay: the best first, as long as another one lowers the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch.fx import Node

from ....compiler.framework import Study
from ....compiler.plan import SitePlan
from ....compiler.progress import steps
from ..rotations import Kind, Rotation
from .losses import Criterion
from .trial import Trial, Variants, mean_loss

if TYPE_CHECKING:
    from .. import Rotate

GAIN = 0.005
"""The share of the loss that a rotation must take away to be kept: an operation at run time is not free."""


def choose(
    step: Rotate, variants: Variants, measure: Criterion, study: Study, decisions: Mapping[str, SitePlan]
) -> tuple[list[str], dict[str, str], dict[str, float]]:
    """Which of r1 … r4 to keep, for each other the reason, and the loss of every set that was tried ("r2+r4")."""

    def rotation(label: str, node: Node, size: int) -> Rotation:
        known = decisions.get(variants.site(node))
        if known is not None and label in known.tensors:
            return Rotation(label, size, Kind.LEARNED, step.seed, known.tensors[label])
        return Rotation(label, size, Kind.HADAMARD if step.kind is Kind.LEARNED else step.kind, step.seed)

    original = Trial(variants.program)

    def cost(labels: tuple[str, ...]) -> float:
        return mean_loss(measure, original, Trial(variants.make(labels, rotation)), study.data)

    measured, kept = {"none": cost(())}, list[str]()
    lowest = measured["none"]
    why: dict[str, str] = {}
    while left := [label for label in step.asked if label not in kept]:
        beside = f" beside {'+'.join(kept)}" if kept else ""
        costs = {label: cost(tuple(sorted((*kept, label)))) for label in steps(left, f"trying rotations{beside}")}
        measured |= {"+".join(sorted((*kept, label))): value for label, value in costs.items()}
        best = min(costs, key=lambda label: costs[label])
        if not costs[best] <= lowest * (1 - GAIN):
            why = {
                label: f"it does not pay{beside}: {measure.name} {lowest:.4g} without, {value:.4g} with it"
                for label, value in costs.items()
            }
            break
        kept.append(best)
        lowest = costs[best]
    return [label for label in step.asked if label in kept], why, measured
