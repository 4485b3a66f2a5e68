"""Logged: what a pipeline does, line by line, on the logger `fuseline`.

`TORCH_LOGS="fuseline"` turns on INFO: a line a pass, a line a graph. `TORCH_LOGS="+fuseline"` turns on DEBUG: every
rewrite with the place of its rule, every refusal with its reason. PyTorch takes any importable module's name there, so
nothing has to be registered, and a script that imports only torch can be watched. `logging` and
`torch._logging.set_logs(modules={"fuseline": logging.DEBUG})` do as well.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .. import compat
from ..action import Action, Observer
from ..framework import Pass
from ..program import Program
from ..report import PassReport, Report
from .ambient import register_ambient

if TYPE_CHECKING:
    from ..pipeline import Pipeline

log = logging.getLogger("fuseline")
_runs = itertools.count(1)


class Logged(Observer):
    """Logs one pipeline over one program."""

    def pipeline_starts(self, pipeline: Pipeline, program: Program) -> None:
        capture = compat.capture_id()
        self._graph = f"graph {capture}" if capture is not None else f"run {next(_runs)}"
        self._started, self._nodes, self._rewrites = time.perf_counter(), len(program), 0

    def rewritten(self, action: Action, program: Program) -> None:
        self._rewrites = action.number
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s: %s, by %s", self._graph, action, action.location)

    def pass_ends(self, step: Pass, program: Program, report: PassReport) -> None:
        counts = f"{_count(report.matched, 'site')}, {len(report.refused)} refused"
        nodes = f"{report.nodes_before} → {report.nodes_after} nodes"
        log.info("%s: %s: %s, %s, %.1f ms", self._graph, step.name, counts, nodes, report.ms)
        for site, reason in report.refused.items():
            log.debug("%s: %s refused %s: %s", self._graph, step.name, site, reason)

    def pipeline_ends(self, program: Program, report: Report) -> None:
        ms = (time.perf_counter() - self._started) * 1e3
        nodes = f"{self._nodes} → {len(program)} nodes"
        log.info("%s: %s by %s, %.1f ms", self._graph, nodes, report.pipeline or "no pass", ms)

    def failed(self, step: Pass, program: Program, error: BaseException) -> None:
        headline = str(error).splitlines()[0] if str(error) else type(error).__name__
        log.info("%s: %s failed behind rewrite %d: %s", self._graph, step.name, self._rewrites, headline)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@register_ambient
def logged() -> Iterable[Observer]:
    """A `Logged` where the logger is on."""
    return [Logged()] if log.isEnabledFor(logging.INFO) else []
