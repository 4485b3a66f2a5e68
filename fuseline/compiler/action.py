"""Action and Observer: every rewrite is one interceptable action, and every debugging feature watches actions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.fx import Node

if TYPE_CHECKING:
    from .framework import Pass
    from .pipeline import Pipeline
    from .program import Program
    from .report import PassReport, Report


@dataclass
class Action:
    """One rewrite: its number in the pipeline (from 1, the same at every run), who does it, where, and what changed."""

    number: int
    pass_name: str
    rule: str
    site: str
    removed: tuple[Node, ...]
    created: list[Node] = field(default_factory=list)
    skipped: bool = False

    def __str__(self) -> str:
        return f"#{self.number} {self.pass_name}/{self.rule} at {self.site}"


class Observer:
    """Watches a pipeline. Every method may be left out; none may change the program."""

    def pipeline_starts(self, pipeline: Pipeline, program: Program) -> None: ...

    def pass_starts(self, step: Pass, program: Program) -> None: ...

    def allows(self, action: Action) -> bool:
        """Asked before each rewrite; False skips it."""
        return True

    def rewritten(self, action: Action, program: Program) -> None: ...

    def pass_ends(self, step: Pass, program: Program, report: PassReport) -> None: ...

    def pipeline_ends(self, program: Program, report: Report) -> None: ...

    def failed(self, step: Pass, program: Program, error: BaseException) -> Any: ...
