"""Numerics: the error of the program after each pass, against the captured graph in the next higher precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Interpreter

from ..action import Observer
from ..errors import UserError
from ..framework import Pass
from ..program import Program
from ..reads import refuse_dropped
from ..report import PassReport, Report

if TYPE_CHECKING:
    from ..pipeline import Pipeline

NARROW = (torch.float16, torch.bfloat16)


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
            actual = floats(program.run([_clone(x) for x in self._inputs]))
        return max((error(a, r) for a, r in zip(actual, self._reference, strict=True)), default=0.0)


def error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """max|actual − reference| / max|reference|; infinite where either is NaN alone."""
    if reference.numel() == 0:
        return 0.0
    a, r = actual.detach().double(), reference.detach().double()
    same = (a == r) | (a.isnan() & r.isnan())
    delta = torch.where(same, torch.zeros_like(r), (a - r).abs())
    largest = r[r.isfinite()].abs().max().item() if r.isfinite().any() else 0.0
    worst = delta.max().item()
    return float("inf") if worst != worst else worst / (largest or 1.0)


def floats(outputs: Any) -> list[torch.Tensor]:
    """The floating-point tensors among a program's outputs."""
    flat = torch.utils._pytree.tree_leaves(outputs)
    return [o for o in flat if isinstance(o, torch.Tensor) and o.is_floating_point()]


def promotion(program: Program) -> dict[torch.dtype, torch.dtype]:
    """Which dtypes become which: 16-bit → float32 in a 16-bit program, everything → float64 in a float32 one."""
    tensors = [n.meta["val"] for n in program.weights()] + [n.meta["val"] for n in program.placeholders]
    narrow = any(isinstance(t, torch.Tensor) and t.dtype in NARROW for t in tensors)
    if narrow:
        return dict.fromkeys(NARROW, torch.float32)
    return dict.fromkeys((*NARROW, torch.float32), torch.float64)


def run_promoted(program: Program, flat: Sequence[Any]) -> Any:
    """Runs the program in the next higher precision: inputs, weights and the dtypes written in the graph."""
    wider = promotion(program)
    module, expressions = program.lift()
    weights = program.binder(expressions)(flat)
    inputs = [*(_clone(flat[i]) for i in program.arguments), *weights]

    class Promoted(Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            args, kwargs = torch.utils._pytree.tree_map(
                lambda a: wider.get(a, a) if isinstance(a, torch.dtype) else a, (args, kwargs)
            )
            return super().call_function(target, args, kwargs)

    with torch.no_grad():
        return Promoted(module).run(*[_widen(x, wider) for x in inputs])


def _clone(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _widen(value: Any, wider: dict[torch.dtype, torch.dtype]) -> Any:
    return value.to(wider.get(value.dtype, value.dtype)) if isinstance(value, torch.Tensor) else value
