"""Numerics: the error of the program after each pass, against the captured graph in the next higher precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..action import Observer
from ..errors import UserError
from ..framework import Pass
from ..precision import clone, error, floats, promotion, run_promoted
from ..program import Program
from ..reads import refuse_dropped
from ..report import PassReport, Report

if TYPE_CHECKING:
    from ..pipeline import Pipeline

__all__ = ["Numerics", "error", "floats", "promotion", "run_promoted"]


class Numerics(Observer):
    """Sets `error` of every pass's report, and `captured_error`, the rounding noise of the captured graph itself.

    Args:
        flat: the caller's flat arguments (`program.examples` when None), real tensors.

    The reference runs in float64 where the program is float32, in float32 where it is 16-bit; casts that a model
    writes into its graph are promoted with it. Errors are max|Δ| / max|reference| over all floating-point outputs.
    """

    def __init__(self, flat: Sequence[Any] | None = None):
        self._flat = flat
        self._reference: list[torch.Tensor] = []

    def pipeline_starts(self, pipeline: Pipeline, program: Program) -> None:
        flat = self._flat if self._flat is not None else program.examples
        if flat is None:
            raise UserError("numerics need example inputs, and this program has none", remedy="Numerics(flat=[…])")
        refuse_dropped(program)
        self._inputs = list(flat)
        self._reference = floats(run_promoted(program, self._inputs))
        self._noise = self._error(program)

    def pass_ends(self, step: Pass, program: Program, report: PassReport) -> None:
        report.error = self._error(program)

    def pipeline_ends(self, program: Program, report: Report) -> None:
        report.captured_error = self._noise

    def _error(self, program: Program) -> float:
        with torch.no_grad():
            actual = floats(program.run([clone(x) for x in self._inputs]))
        return max((error(a, r) for a, r in zip(actual, self._reference, strict=True)), default=0.0)
