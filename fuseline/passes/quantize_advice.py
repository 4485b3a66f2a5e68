"""What the errors of `quantize` say when no site matched: what came closest, and what to write instead."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from ..compiler.program import Program
from .quantize_sites import sites

if TYPE_CHECKING:
    from .quantize import Quantize


def nothing_matched(step: Quantize, program: Program) -> tuple[str, ...]:
    """Details of the error: what was asked for, and what came closest."""
    found = list(sites(program))
    asked = ", ".join(f"{k}={v}" for k, v in step.asked().items() if v)
    if not (step.weights or step.activations):
        return (f"asked for: {asked}; no attention was found that makes its own", "does `raise` run before?")
    if not found:
        return (f"asked for: {asked}; the program has no product with a parameter",)
    closest = found[0]
    return (f"asked for: {asked} on {len(found)} linears, such as {closest.path} ({closest.shape[1]} inputs)",)


def other_groups(step: Quantize, program: Program) -> str | None:
    """The pass with groups that divide the inputs of every linear; None where groups are not what is wrong."""
    weights = step.schemes()["weights"]
    widths = [site.shape[1] for site in sites(program)]
    if weights is None or not weights.group or not widths or any(w % weights.group == 0 for w in widths):
        return None
    common = weights.fitting(math.gcd(*widths))
    if not common or weights.rows != 1:
        return None
    if weights.of.group:  # its own numbers, in other groups
        return str(replace(step, weights=f"{weights.of.element.name}:g{common[0]}"))
    return str(replace(step, weights=f"{step.weights}".replace(f"g{weights.group}", f"g{common[0]}")))
