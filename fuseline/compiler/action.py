"""Action and Observer: every rewrite is one interceptable action, and every debugging feature watches actions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch.fx import Node

if TYPE_CHECKING:
    from .framework import Pass
    from .pipeline import Pipeline
    from .program import Program
    from .report import PassReport, Report
    from .rule import Rule


@dataclass
class Action:
    """One rewrite: its number in the pipeline (from 1, the same at every run), who does it, where, and what changed.

    root: the node that is replaced; removed: the nodes of the match, the root among them; created: the new nodes;
    replaced: what stands for each replaced node now; source: the rule, or the function that builds the replacement.
    """

    number: int
    pass_name: str
    rule: str
    site: str
    removed: tuple[Node, ...]
    root: Node
    source: Rule | Callable[..., Any]
    created: list[Node] = field(default_factory=list)
    replaced: dict[Node, Node] = field(default_factory=dict)
    skipped: bool = False

    def __str__(self) -> str:
        return f"#{self.number} {self.pass_name}/{self.rule} at {self.site}"

    @property
    def location(self) -> str | None:
        """`file:line` of the rule's class, or of the function that builds the replacement."""
        source = getattr(self.source, "inner", self.source)  # a rule around a rule names the one inside
        code: Any = source.__code__ if inspect.isfunction(source) else type(source)
        return _location(code)


@lru_cache(maxsize=1024)
def _location(code: Any) -> str | None:
    """Where a class or a function's code is written; looked up once, since finding it reads the file."""
    try:
        return f"{inspect.getsourcefile(code)}:{inspect.getsourcelines(code)[1]}"
    except (OSError, TypeError):
        return None


class PassEnds(Exception):
    """Raised by an observer in `allows`: the pass makes no further rewrite, and the pipeline goes on behind it.

    It ends a pass that would rewrite for ever, which skipping its rewrites one by one would not. A pass whose graph is
    out of order between two rewrites puts it right in a `finally`.
    """


class Observer:
    """Watches a pipeline. Every method may be left out; none may change the program."""

    def pipeline_starts(self, pipeline: Pipeline, program: Program) -> None: ...

    def pass_starts(self, step: Pass, program: Program) -> None: ...

    def applying(self, rule: Rule, program: Program) -> AbstractContextManager[Any]:
        """Held open while a pass searches for one of its rules and applies it."""
        return nullcontext()

    def refused(self, site: str, reason: str) -> None:
        """A site that a rule fits, or a pass looked at, is left alone."""

    def allows(self, action: Action) -> bool:
        """Asked before each rewrite, while the nodes it removes are whole; False skips it, `PassEnds` ends the pass."""
        return True

    def rewritten(self, action: Action, program: Program) -> None: ...

    def pass_ends(self, step: Pass, program: Program, report: PassReport) -> None: ...

    def pipeline_ends(self, program: Program, report: Report) -> None: ...

    def failed(self, step: Pass, program: Program, error: BaseException) -> Any: ...

    def stopped(self, error: Exception) -> None:
        """The pipeline ends with an error, which it raises next: a pass's, the verifier's or an observer's."""
