"""Which passes change a model's weights, and the nearest pipeline whose result a checkpoint holds."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..compiler.errors import FuselineError, UserError
from ..compiler.framework import Pass, Tier
from ..compiler.pipeline import Pipeline
from ..compiler.plan import Plan
from ..compiler.program import Program
from ..compiler.report import PassReport
from ..passes import Fuse, Quantize, Raise, Rotate
from . import quantization
from .parameters import Assignment, assign, refuse_quantized, refuse_rounding
from .quantization import Quantization
from .transforms import Transforms, transforms
from .unify import Mismatch, Unified, unify


@dataclass
class Planned:
    """What an export writes.

    rewritten: the program that the checkpoint stands for, without the rounding of activations, keys and values, which
    each reader does in an arithmetic of its own.
    """

    rewritten: Program
    unified: Unified
    assignment: Assignment
    transforms: Transforms
    quantization: Quantization
    reports: list[PassReport]


def plan(
    model: torch.nn.Module, captured: Program, pipeline: Pipeline, decided: Plan | None = None, format: str = "hf"
) -> Planned:
    """Runs the pipeline and solves for the model's parameters; decided: what its passes that need data decided.

    Raises:
        UserError: what stands in the way, and the nearest pipeline without it.
    """
    try:
        return _plan(model, captured, pipeline, decided, format)
    except Mismatch as error:
        remedy = nearest_pipeline(pipeline, lambda other: _works(model, captured, other, decided, format))
        raise UserError(error.headline, error.details, remedy) from error


def _works(model: torch.nn.Module, captured: Program, pipeline: Pipeline, decided: Plan | None, format: str) -> bool:
    try:
        _plan(model, captured, pipeline, decided, format)
    except FuselineError:
        return False
    return True


def _plan(model: torch.nn.Module, captured: Program, pipeline: Pipeline, decided: Plan | None, format: str) -> Planned:
    ours, theirs, reports = _both(captured, pipeline, decided)
    if format == "hf":
        refuse_quantized(theirs)
    else:
        quantization.refuse_others(model, captured, theirs)
    unified = unify(ours, theirs)
    if format == "hf":
        refuse_rounding(unified)
    assignment = assign(model, captured, unified.uses)
    left_to_run = unified.online or unified.inputs or unified.caches
    if not assignment.values and not left_to_run:
        reasons = dict.fromkeys(reason for report in reports for reason in report.refused.values())
        raise UserError(
            f"the pipeline '{pipeline}' changes no weight, so the checkpoint would be a copy of the model's own",
            [*reasons][:4],
            None if reasons else '-p "raise,rotate{r1,r2,untie}"',
        )
    codes = quantization.describe(model, captured, unified, assignment)
    if format != "hf" and codes.config is None:
        raise UserError(f"the pipeline '{pipeline}' quantizes nothing", remedy="--format hf (format='hf')")
    if unified.inputs or unified.caches:
        theirs = _both(captured, Pipeline(_weights_only(pipeline.passes)), decided)[1]
    online = transforms(model, captured, unified.online)
    return Planned(theirs, unified, assignment, online, codes, reports)


def _both(captured: Program, pipeline: Pipeline, decided: Plan | None) -> tuple[Program, Program, list[PassReport]]:
    """The model's own graph, and the rewritten one.

    `raise` is how the model's own graph is read, and is run on both sides; `fuse` says only what runs together.
    """
    ours = theirs = captured
    reports: list[PassReport] = []
    for step in pipeline.passes:
        if isinstance(step, Fuse):
            continue
        before = theirs
        own = dataclasses.replace(decided, pipeline=str(step)) if decided is not None and step.needs_data else None
        theirs, report = Pipeline((step,)).run(theirs, plan=own)
        reports += report.passes
        if isinstance(step, Raise):
            ours = theirs if ours is before else Pipeline((step,)).run(ours)[0]
    return ours, theirs, reports


def nearest_pipeline(pipeline: Pipeline, works: Callable[[Pipeline], bool]) -> str | None:
    """The pipeline with the fewest of these changes that works.

    The changes are: tables untied, weights alone quantized, nothing quantized, rotations left out.
    """
    changes = [
        _rotations(untie=True),
        _weights_only,
        _exact,
        *(_rotations(**{name: False}) for name in ("r3", "r4", "r1", "r2")),
    ]
    tried = {pipeline}
    for count in range(1, len(changes)):
        for chosen in itertools.combinations(changes, count):
            passes = pipeline.passes
            for change in chosen:
                passes = change(passes)
            candidate = Pipeline(passes)
            if candidate not in tried:
                tried.add(candidate)
                if works(candidate):
                    return f'-p "{candidate}"'
    return None


def _weights_only(passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
    """Without the rounding of activations, keys and values."""
    bare: dict[str, Any] = {"activations": None, "keys": None, "values": None}
    kept = (p for p in passes if not isinstance(p, Quantize) or p.weights)
    return tuple(dataclasses.replace(p, **bare) if isinstance(p, Quantize) else p for p in kept)


def _exact(passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
    return tuple(p for p in passes if p.tier is Tier.EXACT)


def _rotations(**options: bool) -> Callable[[tuple[Pass, ...]], tuple[Pass, ...]]:
    def change(passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
        return tuple(c for p in passes if (c := _with(p, options)) is not None)

    return change


def _with(step: Pass, options: dict[str, bool]) -> Pass | None:
    """The step with other options; None where it would then rotate nothing. Only r1 has tables to untie."""
    if not isinstance(step, Rotate):
        return step
    left = {name: getattr(step, name) for name in ("r1", "r2", "r3", "r4", "untie")} | options
    if not any(left[n] for n in ("r1", "r2", "r3", "r4")):
        return None
    try:
        return dataclasses.replace(step, **left | {"untie": left["untie"] and left["r1"]})
    except UserError:  # nothing would be left to learn
        return None
