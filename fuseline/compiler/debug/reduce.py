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
from ..pipeline import Pipeline
from ..program import Program
from .check import Check, Verdict
from .culprit import Culprit, Without, find_culprit, narrowed, renewed
from .culprit import Judge as Checker
from .reductions import FIRST, REPEATED
from .reproducer import alike
from .search import Case, Enough, Search

ROUNDS = 12


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
    """A judge: the check finds the same fault again."""

    def __init__(self, check: Checker, wanted: Verdict, culprit: Culprit | None, pipeline: Pipeline, repeat: int = 1):
        self.check, self.wanted, self.repeat = check, wanted, repeat
        self.guilty: tuple[str, str] | None = None
        if culprit is not None and culprit.rule and wanted.kind == "error" and self._goes_with(culprit, pipeline):
            self.guilty = (culprit.pass_name, culprit.rule)

    def __call__(self, case: Case) -> Verdict | None:
        check = renewed(self.check)
        try:
            found = failing(check, case, self.wanted, self.repeat)
            if found is None or self.guilty is None:
                return found
            return None if alike(check(case.program, case.pipeline, [Without(*self.guilty)]), self.wanted) else found
        except Exception:  # the case itself cannot be run, before any pass
            return None

    def _goes_with(self, culprit: Culprit, pipeline: Pipeline) -> bool:
        """Whether the fault goes with the rule's rewrites: it may have other origins as well."""
        alone = Pipeline(pipeline.passes[culprit.step : culprit.step + 1])
        try:
            found = renewed(self.check)(culprit.stage, alone, [Without(culprit.pass_name, culprit.rule)])
        except Exception:
            return False
        return not alike(found, self.wanted)


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
    improved: Callable[[Case, Verdict], None] = lambda case, verdict: None,
    checked: Callable[[str], None] = lambda what: None,
) -> Reduction:
    """Reduces what `check` finds wrong with a pipeline over a program.

    Args:
        most, seconds: checks and time that the search may take.
        repeat: how often a check is tried that finds nothing, for a fault that does not show at every run.
        improved: told each smaller case; checked: told each check before it is made.

    Raises:
        UserError: the check finds nothing wrong.
    """
    started = time.monotonic()
    before = Case(program, pipeline)
    checked("the fault as it is")
    wanted = failing(check, before, None, repeat)
    if wanted is None:
        raise UserError(
            f"there is nothing to reduce: {check} finds nothing wrong with {pipeline} here",
            remedy="another --check, or --repeat 10 for a fault that does not show at every run",
        )
    check = narrowed(check, wanted)
    if isinstance(check, Check) and check.seconds is None:  # a smaller case may not end at all
        check = replace(check, seconds=max(20.0, 10 * (time.monotonic() - started)))
    culprit = find_culprit(renewed(check), program, pipeline, wanted, lambda line: checked(f"bisecting, {line}"))
    judge = SameFault(check, wanted, culprit, pipeline, repeat)
    search = Search(before, wanted, judge, culprit, most, seconds, improved, checked, started=started)
    return replace(run(search), check=check)


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
