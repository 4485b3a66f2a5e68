"""Bisection in this process: one program, one pipeline, and a check over what comes out."""

from __future__ import annotations

from ..action import Observer
from ..framework import Pass
from ..observe.limit import Limit
from ..pipeline import Pipeline
from ..program import Program
from ..report import PassReport
from .bisect import Outcome
from .check import Check


class InProcess:
    """Runs the first N rewrites of a pipeline and checks the result.

    The first run keeps the program as it stood after each pass; since rewrites below a limit are always the same, a
    later run begins at the pass that holds its last rewrite, and needs none of those behind it.
    """

    def __init__(self, program: Program, pipeline: Pipeline, check: Check):
        self.program, self.pipeline, self.check = program, pipeline, check
        self._stages: list[tuple[int, Program]] = [(0, program)]  # rewrites made so far, and the program then

    def __call__(self, limit: int | None, skip: frozenset[int] = frozenset()) -> Outcome:
        if limit is None or skip:
            limited = Limit(limit, skip)
            keep = [] if skip else [_Stages(self._stages, limited)]
            verdict = self.check(self.program, self.pipeline, [limited, *keep])
        else:
            at = max(i for i, (made, _) in enumerate(self._stages) if made <= limit)
            made, start = self._stages[at]
            limited = Limit(limit - made)
            verdict = self.check(start, Pipeline(self.pipeline.passes[at : at + 1]), [limited], self.program)
        detail = str(verdict) if verdict else ""
        return Outcome(bool(verdict), {"here": limited.entries}, detail, endless=verdict.kind == "hang")


class _Stages(Observer):
    """Keeps a copy of the program after each pass."""

    def __init__(self, stages: list[tuple[int, Program]], limited: Limit):
        self.stages, self.limited = stages, limited
        del stages[1:]

    def pass_ends(self, step: Pass, program: Program, report: PassReport) -> None:
        kept = program.copy()
        kept.module.recompile()
        self.stages.append((self.limited.count, kept))
