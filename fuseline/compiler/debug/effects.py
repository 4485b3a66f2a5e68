"""Effects: does what a rewrite changed reach the results, or is it made good further on?

`(a + b) + c` written as `a + (b + c)` has another value in its first node and the same in its second. So a node that
computes something else is not at fault yet: its effect is followed through the rewritten program, in higher precision
and with everything else as in the reference. It is made good where every path comes to a node that has the reference's
value again, to the last digits; it stays where it reaches a result, a write, or too many nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .cells import Cell, Wider, compute
from .comparison import RewriteError
from .deviation import deviation

LIMIT = 64
# What may be left of an effect where it is made good, of what it was: rotated and folded weights are rounded to the
# program's precision. A fault in front of large values (a residual stream) shrinks, too, but by less than this.
LEFT = 8 * torch.finfo(torch.float32).eps
EXACT = 1e3 * torch.finfo(torch.float64).eps


@dataclass(eq=False)
class Wave:
    """The effect of one fault, or of several that meet: its values by cell, as far as it has come."""

    change: float = 0.0
    found: list[RewriteError] = field(default_factory=list)
    values: dict[Cell, Any] = field(default_factory=dict)
    seen: set[Cell] = field(default_factory=set)
    stays: bool = False


class Effects:
    """Follows effects while the rewritten program's cells are computed in order.

    Args:
        claimed: rewritten cell → the captured cell whose value it must have.
        reference, weight: values in higher precision, of captured cells and of the rewritten program's weights.
        ends: cells whose values the caller sees.
    """

    def __init__(
        self,
        claimed: Mapping[Cell, Cell],
        reference: Callable[[Cell], Any],
        weight: Callable[[Any], Any],
        wider: Wider,
        ends: set[Cell],
    ):
        self.claimed, self.reference, self.weight, self.wider, self.ends = claimed, reference, weight, wider, ends
        self.suspects: dict[Cell, list[RewriteError]] = {}
        self.waves: list[Wave] = []

    def suspect(self, captured: Cell, found: RewriteError) -> None:
        """What stands for this captured cell computes something else."""
        self.suspects.setdefault(captured, []).append(found)

    def follow(self, cell: Cell) -> None:
        """To be called when a rewritten cell is computed, while the reference's values for its inputs are there."""
        claimed = self.claimed.get(cell)
        found = self.suspects.get(claimed, []) if claimed is not None else []
        waves = [w for w in self.waves if not w.stays and any(i in w.values for i in cell.inputs)]
        if not found and not waves:
            return
        wave = self._joined(waves)
        wave.found += found
        wave.change = max([wave.change, *(f.change or 0.0 for f in found)])
        value = self._value(cell, wave)
        if claimed is not None:
            left = deviation(value, self.reference(claimed))
            if left <= max(EXACT, wave.change * LEFT):
                return
        wave.values[cell] = value
        wave.seen.add(cell)
        if cell in self.ends or cell.writes or len(wave.seen) > LIMIT or not math.isfinite(wave.change):
            wave.stays = True
            wave.values.clear()

    def forget(self, cell: Cell) -> None:
        """The cell has no further users."""
        for wave in self.waves:
            wave.values.pop(cell, None)

    def made_good(self) -> set[Cell]:
        """Marks the rewrites whose effects are gone as "regrouped"; returns the cells in between."""
        cells: set[Cell] = set()
        for wave in self.waves:
            if not wave.stays:
                cells |= wave.seen
                for found in wave.found:
                    found.verdict = "regrouped"
        return cells

    def _joined(self, waves: list[Wave]) -> Wave:
        if not waves:
            self.waves.append(Wave())
            return self.waves[-1]
        first, *others = waves
        for other in others:
            first.change = max(first.change, other.change)
            first.found += other.found
            first.values |= other.values
            first.seen |= other.seen
            self.waves.remove(other)
        return first

    def _value(self, cell: Cell, wave: Wave) -> Any:
        known: dict[Cell, Any] = {}

        def value(source: Cell) -> Any:
            if source in wave.values:
                return wave.values[source]
            if source.kind == "weight":
                return self.weight(source.target)
            if source in self.claimed:
                return self.reference(self.claimed[source])
            if source not in known:
                known[source] = compute(source, value, self.wider, apart=True)
            return known[source]

        if cell.kind == "weight":
            return self.weight(cell.target)
        return compute(cell, value, self.wider, apart=True)
