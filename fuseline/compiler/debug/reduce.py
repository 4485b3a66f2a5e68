"""Reduce: the smallest program and pipeline that still show a fault, and that very one.

First the guilty rewrite is found, and the program cut to what lies around it; then ever smaller cases are tried, until
none is left that shows the fault (`reductions/`). A case counts only if it fails with the same kind and message as the
first one, and, where a result is wrong, only if it is right without the guilty rule's rewrites.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..errors import UserError
from ..observe.repro import reproducing
from ..pipeline import Pipeline
from ..program import Program
from .check import Check, Verdict
from .culprit import Culprit, Judge as Checker, Without, find_culprit, narrowed, renewed
from .reductions import FIRST, REPEATED
from .reproducer import alike
from .search import Case, Enough, Search

ROUNDS = 12
PATIENCE = 5.0  # seconds


@dataclass(frozen=True)
class Reduction:
    """What a reduction came to. `complete`: it ended by itself, and not by a limit or by the user."""

    before: Case
    after: Case
    verdict: Verdict
    culprit: Culprit | None
    checks: int
    seconds: float
    complete: bool
    interrupted: bool = False
    check: Checker | None = None  # for this fault alone; None where a command judges


class SameFault:
    """A judge: the check finds the same fault again.

    Where a result is wrong, it has to be right without the rewrites of the guilty rule, if that is so at first: a
    program can be made small in ways that make another rewrite go wrong. What hangs is given the less time to do so the
    smaller it is.
    """

    def __init__(self, check: Checker, wanted: Verdict, culprit: Culprit | None, pipeline: Pipeline, repeat: int = 1):
        self.check, self.wanted, self.repeat = check, wanted, repeat
        self.guilty: tuple[str, str] | None = None
        self._pace: float | None = None  # what a node takes that does not hang, in seconds
        if culprit is not None and culprit.rule and wanted.kind in ("error", "hang"):
            started = time.monotonic()
            right = self._is_right_without(culprit, pipeline)
            if right and wanted.kind == "hang":
                self._pace = (time.monotonic() - started) / max(1, len(culprit.stage))
            elif right:
                self.guilty = (culprit.pass_name, culprit.rule)

    def __call__(self, case: Case) -> Verdict | None:
        check = self._hurried(case)
        try:
            found = failing(check, case, self.wanted, self.repeat)
            if found is not None and self.guilty is not None:
                if alike(check(case.program, case.pipeline, [Without(*self.guilty)]), self.wanted):
                    return None
        except Exception:  # the case itself cannot be run, before any pass
            return None
        if found is not None:
            self.check = check
        return found

    def _hurried(self, case: Case) -> Checker:
        """The check, made anew, with as many seconds as a case of this size may take."""
        check = renewed(self.check)
        if self._pace is None or not isinstance(check, Check) or check.seconds is None:
            return check
        return replace(check, seconds=round(min(check.seconds, max(1.0, 5 * self._pace * len(case.program))), 1))

    def _is_right_without(self, culprit: Culprit, pipeline: Pipeline) -> bool:
        alone = Pipeline(pipeline.passes[culprit.step : culprit.step + 1])
        try:
            without = Without(culprit.pass_name, culprit.rule, ends=self.wanted.kind == "hang")
            found = renewed(self.check)(culprit.stage, alone, [without])
        except Exception:
            return False
        return not alike(found, self.wanted)


def _patient(check: Checker) -> Checker:
    """The check to record: a fresh process, on a busy machine, needs longer for what does not hang."""
    if isinstance(check, Check) and check.seconds is not None:
        return replace(check, seconds=max(check.seconds, PATIENCE))
    return check


def failing(check: Checker, case: Case, wanted: Verdict | None, repeat: int = 1) -> Verdict | None:
    """What the check finds in a case, if it is a fault, and the wanted one where there is one; tried up to `repeat`
    times, since some do not show at every run."""
    for _ in range(repeat):
        verdict = check(case.program, case.pipeline, [])
        if (verdict.kind is not None) if wanted is None else alike(verdict, wanted):
            return verdict
    return None


def reduce(
    program: Program,
    pipeline: Pipeline,
    check: Checker,
    *,
    most: int | None = None,
    seconds: float | None = None,
    repeat: int = 1,
    wanted: Verdict | None = None,
    improved: Callable[[Case, Verdict], None] = lambda case, verdict: None,
    checked: Callable[[str], None] = lambda what: None,
) -> Reduction:
    """Reduces what `check` finds wrong with a pipeline over a program.

    Args:
        most, seconds: checks and time that the search may take.
        repeat: how often a check is tried that finds nothing, for a fault that does not show at every run.
        wanted: what was found before, if it is that and nothing else.
        improved: told each smaller case; checked: told each check before it is made.

    Raises:
        UserError: the check finds nothing wrong, or another fault than the wanted one.
    """
    with reproducing(list):  # what fails here fails on purpose
        return _reduce(program, pipeline, check, most, seconds, repeat, wanted, improved, checked)


def _reduce(
    program: Program,
    pipeline: Pipeline,
    check: Checker,
    most: int | None,
    seconds: float | None,
    repeat: int,
    told: Verdict | None,
    improved: Callable[[Case, Verdict], None],
    checked: Callable[[str], None],
) -> Reduction:
    started = time.monotonic()
    before = Case(program, pipeline)
    checked("the fault as it is")
    wanted = failing(check, before, told, repeat)
    if wanted is None:
        if told is not None:
            raise UserError(
                f"it does not fail as it did: {str(told).splitlines()[0]}",
                remedy="fuseline repro FILE    what it does now; with --check any, reduce takes any fault",
            )
        raise UserError(
            f"there is nothing to reduce: nothing is wrong with {pipeline} here",
            [f"checked for: {check}"],
            "another --check, or --repeat 10 for a fault that does not show at every run",
        )
    check = narrowed(check, wanted)
    if isinstance(check, Check) and check.seconds is None:  # a smaller case may not end at all
        check = replace(check, seconds=max(20.0, 10 * (time.monotonic() - started)))
    say = lambda line: checked(f"bisecting, {line}")
    culprit = find_culprit(renewed(check), program, pipeline, wanted, repeat, say)
    judge = SameFault(check, wanted, culprit, pipeline, repeat)
    search = Search(before, wanted, judge, culprit, most, seconds, improved, checked, started=started)
    return replace(run(search), check=_patient(judge.check))


def run(search: Search) -> Reduction:
    """Applies all strategies until a round of them changes nothing, or the search has spent what it was given."""
    before, complete, interrupted = search.best, False, False
    try:
        for strategy in FIRST:
            strategy(search)
        for _ in range(ROUNDS):
            if not [strategy for strategy in REPEATED if strategy(search)]:
                complete = True
                break
    except Enough:
        pass
    except KeyboardInterrupt:
        interrupted = True
    spent = time.monotonic() - search.started
    return Reduction(before, search.best, search.verdict, search.culprit, search.checks, spent, complete, interrupted)
