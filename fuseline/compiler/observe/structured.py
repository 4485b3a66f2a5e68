"""Structured: the stages of a pipeline, its report and the emitted kernels in PyTorch's structured trace.

With TORCH_TRACE=DIR set, `tlparse DIR/*.log` shows them beside Dynamo's own artifacts of the same capture:

    fuseline_000_captured     the graph as it was captured, with types and the user's lines
    fuseline_001_raise        after each pass
    fuseline_report           sites, refusals and times, as JSON
    fuseline_module           the emitted Python module, where kernels are emitted
    fuseline_manifest         its manifest, and where the module is
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import compat
from ..action import Observer
from ..framework import Pass
from ..program import Program
from ..report import PassReport, Report
from .ambient import register_ambient

if TYPE_CHECKING:
    from ..pipeline import Pipeline


class Structured(Observer):
    """Writes one pipeline over one program into the trace."""

    def pipeline_starts(self, pipeline: Pipeline, program: Program) -> None:
        self._stage = 0
        self._write("captured", f"as captured, before {pipeline}", program)

    def pass_ends(self, step: Pass, program: Program, report: PassReport) -> None:
        self._write(step.name, f"after {step}: {report.matched} rewrites, {len(report.refused)} refused", program)

    def pipeline_ends(self, program: Program, report: Report) -> None:
        compat.trace_artifact("fuseline_report", "json", report.to_json)

    def failed(self, step: Pass, program: Program, error: BaseException) -> None:
        self._write(f"{step.name}_failed", f"where {step} failed: {type(error).__name__}: {error}", program)

    def _write(self, name: str, title: str, program: Program) -> None:
        compat.trace_artifact(f"fuseline_{self._stage:03d}_{name}", "string", lambda: readable(program, title))
        self._stage += 1


def readable(program: Program, title: str) -> str:
    """A program as code with types and source lines, regions as classes of their own."""
    text = program.module.print_readable(print_output=False, include_stride=False, include_device=False)
    return "".join(f"# {line}\n" for line in title.splitlines()) + text


def trace_module(path: Path, manifest: Callable[[], dict[str, Any]]) -> None:
    """Writes an emitted module and its manifest into the trace, where one is written."""
    if compat.structured_tracing():
        compat.trace_artifact("fuseline_module", "string", lambda: path.read_text(encoding="utf-8"))
        compat.trace_artifact("fuseline_manifest", "json", lambda: {"path": str(path), **manifest()})


@register_ambient
def structured() -> Iterable[Observer]:
    """A `Structured` where TORCH_TRACE is on."""
    return [Structured()] if compat.structured_tracing() else []
