"""The rewrite that a reduction starts from: whose it is, and which nodes it took away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from ..action import Action, Observer, PassEnds
from ..errors import UserError
from ..framework import Pass
from ..observe.limit import Limit
from ..pipeline import Pipeline
from ..program import Program
from ..provenance import source_line
from .bisect import Bisection, Outcome
from .check import Check, Verdict
from .reproducer import alike

DOES_NOT_RUN = "the rewritten program does not run"  # how a check begins to say that
Judge = Callable[[Program, Pipeline, Sequence[Observer]], Verdict]
Names = frozenset[str]


@dataclass(frozen=True)
class Culprit:
    """What is known of a fault's origin.

    step: position of the pass in the pipeline; stage: the program just before it. rule, site, location, line: of the
    rewrite, where it could be told. taken: the nodes that the rewrite took away, by their names in `stage`; captured:
    by their names in the captured program. Both are empty where the pass fails outside of a rewrite.
    """

    step: int
    pass_name: str
    stage: Program
    rule: str = ""
    site: str = ""
    location: str | None = None
    line: str | None = None
    taken: Names = frozenset()
    captured: Names = frozenset()

    def to_json(self) -> dict[str, Any]:
        return {
            "pass": self.pass_name,
            "rule": self.rule or None,
            "site": self.site or None,
            "location": self.location,
            "line": self.line,
        }

    def __str__(self) -> str:
        return f"{self.pass_name}/{self.rule} at {self.site}" if self.rule else self.pass_name


@dataclass(frozen=True)
class _Taken:
    step: int
    action: Action
    line: str | None
    stage: Names
    captured: Names


class Spy(Observer):
    """Follows a run: the program before each pass, and what each rewrite took, in names that exist before it."""

    def __init__(self) -> None:
        self.stages: list[Program] = []
        self.steps: list[Pass] = []
        self.taken: list[_Taken] = []
        self.open: _Taken | None = None  # a rewrite that was begun and never done

    def pipeline_starts(self, pipeline: Pipeline, program: Program) -> None:
        self.stages, self.steps, self.taken, self.open = [], [], [], None
        self._captured = {n: frozenset([n.name]) for n in program.graph.nodes}

    def pass_starts(self, step: Pass, program: Program) -> None:
        self.open = None
        self.steps.append(step)
        self.stages.append(program.copy())
        self._stage = {n: frozenset([n.name]) for n in program.graph.nodes}

    def allows(self, action: Action) -> bool:
        nodes = dict.fromkeys((*action.removed, action.root))
        here, first = (_union(names, nodes) for names in (self._stage, self._captured))
        self.open = _Taken(len(self.stages) - 1, action, source_line(action.root), here, first)
        return True

    def rewritten(self, action: Action, program: Program) -> None:
        assert self.open is not None
        for node in action.created:
            self._stage.setdefault(node, self.open.stage)
            self._captured.setdefault(node, self.open.captured)
        self.taken.append(self.open)
        self.open = None

    @property
    def last(self) -> _Taken | None:
        """The rewrite that was going on, or was the last of the pass that runs."""
        if self.open is not None:
            return self.open
        return self.taken[-1] if self.taken and self.taken[-1].step == len(self.stages) - 1 else None


class Without(Observer):
    """Leaves out what one rule of one pass would rewrite; `ends`: ends the pass there, for some ask for ever."""

    def __init__(self, pass_name: str, rule: str, ends: bool = False):
        self.pass_name, self.rule, self.ends = pass_name, rule, ends

    def allows(self, action: Action) -> bool:
        here = (action.pass_name, action.rule) == (self.pass_name, self.rule)
        if here and self.ends:
            raise PassEnds
        return not here


def find_culprit(
    check: Judge,
    program: Program,
    pipeline: Pipeline,
    wanted: Verdict,
    repeat: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> Culprit | None:
    """Searches for the rewrite behind a verdict; None where it cannot be told.

    A crash names it: it was being made. A wrong result or a broken graph takes a bisection over all rewrites.

    repeat: more than 1 for a fault that does not show at every run.
    """
    spy = Spy()
    if not any(alike(check(program, pipeline, [spy]), wanted) for _ in range(repeat)) or not spy.stages:
        return None
    if wanted.kind in ("crash", "verify") and spy.open is not None:
        return _culprit(spy, spy.open)
    if wanted.kind == "hang":
        return _culprit(spy, spy.last)
    if wanted.kind == "crash" and not wanted.message.startswith(DOES_NOT_RUN):
        return _culprit(spy, None)  # between rewrites: while looking for matches

    def run(limit: int | None, skip: frozenset[int]) -> Outcome:
        watching = Limit(limit, skip)
        verdict = check(program, pipeline, [watching])
        return Outcome(alike(verdict, wanted), {"": watching.entries}, endless=verdict.kind == "hang")

    try:
        found = Bisection(run, flaky=repeat > 1, progress=say).search()
    except UserError:
        return _culprit(spy, None) if wanted.kind == "verify" else None
    if found.kind != "rewrite" or found.number is None or found.number > len(spy.taken):
        return _culprit(spy, None) if wanted.kind == "verify" else None
    return _culprit(spy, spy.taken[found.number - 1])


def _culprit(spy: Spy, taken: _Taken | None) -> Culprit:
    if taken is None:
        step = len(spy.stages) - 1
        return Culprit(step, spy.steps[step].name, spy.stages[step])
    action = taken.action
    return Culprit(
        taken.step,
        action.pass_name,
        spy.stages[taken.step],
        action.rule,
        action.site,
        action.location,
        taken.line,
        taken.stage,
        taken.captured,
    )


def narrowed(check: Judge, wanted: Verdict) -> Judge:
    """A check that looks for one fault alone, at the least cost."""
    if not isinstance(check, Check) or wanted.kind is None:
        return check
    kinds: tuple[str, ...] = (wanted.kind,)
    if wanted.kind == "crash" and wanted.message.startswith(DOES_NOT_RUN):
        kinds = ("crash", "error")
    return replace(check, kinds=kinds, sizes=check.sizes and bool(wanted.size), _references={})


def renewed(check: Judge) -> Judge:
    """The same check without the references that it keeps for programs it has seen."""
    return replace(check, _references={}) if isinstance(check, Check) else check


def _union(names: dict[Node, Names], nodes: dict[Node, None]) -> Names:
    return frozenset().union(*(names.get(n, frozenset()) for n in nodes))
