"""Timing: how long passes and their checks took."""

from __future__ import annotations

from ..action import Observer
from ..framework import Pass
from ..program import Program
from ..report import PassReport, Report


class Timing(Observer):
    """Milliseconds by pass, summed over every program that it watched."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self.verify_ms: dict[str, float] = {}
        self.programs = 0

    def pass_ends(self, step: Pass, program: Program, report: PassReport) -> None:
        self.ms[step.name] = self.ms.get(step.name, 0.0) + report.ms

    def pipeline_ends(self, program: Program, report: Report) -> None:
        self.programs += 1
        for record in report.passes:
            self.verify_ms[record.name] = self.verify_ms.get(record.name, 0.0) + record.verify_ms
