"""Repro: a failing compile leaves one file that fails alike in a fresh process, and says so in its error.

Switched on for a process by its environment, which is how it reaches into `torch.compile`:

    FUSELINE_REPRO=DIR    reproducers are written there, named after the failure, so that none takes another's place
    FUSELINE_REPRO=off    none are written; the command line writes some of its own accord

A *local* reproducer is the program just before the failing pass and that pass alone; where it does not fail, the
*global* one is tried: the captured program and the whole pipeline. Types alone are tried before random values, and
those before real ones. What does not fail alike in a fresh process is deleted again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from ..action import Observer
from ..errors import FuselineError, UserError, VerificationError
from ..framework import Pass
from ..program import Program
from ..report import PassReport, Report
from .ambient import register_ambient

if TYPE_CHECKING:
    from ..debug.check import Verdict
    from ..debug.search import Case
    from ..pipeline import Pipeline

VARIABLE, OFF = "FUSELINE_REPRO", "off"
MOST = 8  # reproducers by one process; a search runs what fails hundreds of times
_written: dict[str, str] = {}  # failure → what was said of it


class Repro(Observer):
    """Writes a reproducer into `directory` when a pass fails or the verifier finds fault with what it left.

    The program is copied before each pass: a pass that fails has half rewritten it.

    Args:
        say: told what is being done, since a rerun takes seconds.
    """

    def __init__(self, directory: str | Path, say: Callable[[str], None] = lambda line: None):
        self.directory, self.say = Path(directory), say
        self.stages: list[tuple[Pass, Program]] = []
        self.pipeline: Pipeline | None = None
        self.captured: Program | None = None
        self.done, self.ended = 0, False

    def pipeline_starts(self, pipeline: Pipeline, program: Program) -> None:
        self.pipeline, self.captured = pipeline, program.copy()
        self.stages, self.done, self.ended = [], 0, False

    def pass_starts(self, step: Pass, program: Program) -> None:
        self.stages.append((step, program.copy()))

    def pass_ends(self, step: Pass, program: Program, report: PassReport) -> None:
        self.done = len(self.stages)

    def pipeline_ends(self, program: Program, report: Report) -> None:
        self.ended = True

    def stopped(self, error: Exception) -> None:
        if not isinstance(error, FuselineError) or isinstance(error, UserError):
            return
        if self.done == len(self.stages) and not isinstance(error, VerificationError):
            return  # between passes: one of them needs another before it
        try:
            note(error, self.explain(error))
        except Exception as failure:  # whatever it is, the user wants to hear of the first error
            note(error, f"reproducer: none: {type(failure).__name__}: {failure}")

    def explain(self, error: FuselineError) -> str:
        """Writes a reproducer of an error that a pipeline just raised; what to tell the user of it."""
        from ..debug.check import Verdict
        from ..debug.search import Case
        from ..pipeline import Pipeline

        assert self.pipeline is not None and self.captured is not None and self.stages
        verdict = Verdict("verify" if isinstance(error, VerificationError) else "crash", str(error))
        step, before = self.stages[-1]
        whole = Case(self.captured, self.pipeline)
        cases = [("local", Case(before, Pipeline([step]))), ("global", whole)]
        return self.write(step.name, str(verdict.kind), verdict, cases)

    def write(self, name: str, check: str, verdict: Verdict, cases: list[tuple[str, Case]]) -> str:
        """Writes the first of these cases that is proved to fail alike, with the fewest values."""
        from ..debug.reproducer import digest

        key = digest(cases[-1][1].program, cases[-1][1].pipeline, check, verdict.signature)
        if key not in _written:
            if len(_written) >= MOST:
                return f"reproducer: none, since this process has written {MOST} already"
            _written[key] = self._reproduced(f"{name}_{key}", check, verdict, cases)
        return _written[key]

    def _reproduced(self, stem: str, check: str, verdict: Verdict, cases: list[tuple[str, Case]]) -> str:
        from ..debug.reproducer import write_reproducer
        from ..debug.rerun import rerun
        from ..debug.settle import discard, recipes

        path, why = self.directory / f"{stem}.py", "it has no values"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for scope, case in cases:
                for recipe in recipes(case, verdict, path):
                    self.say(f"trying whether a {scope} reproducer fails alike in a fresh process")
                    write_reproducer(path, case.program, case.pipeline, check, verdict, recipe, scope)
                    again = rerun(path)
                    if again.reproduced:
                        return f"reproducer: {path} (fails alike in a fresh process)"
                    why = again.reason or f"a fresh process finds that it {again.status}"
                    discard(path, recipe)
        except (FuselineError, OSError) as error:  # a pass that no other process has; a folder that can't be written
            path.unlink(missing_ok=True)
            why = getattr(error, "headline", str(error))
        return f"reproducer: none that fails alike in a fresh process: {why}"


def note(error: BaseException, line: str) -> None:
    """Adds a last line to an error, unless it has one of this kind."""
    if isinstance(error, FuselineError):
        if not any(detail.startswith("reproducer: ") for detail in error.details):
            error.details = (*error.details, line)
    elif line not in getattr(error, "__notes__", ()):
        error.add_note(line)


_choice: ContextVar[Callable[[], list[Observer]] | None] = ContextVar("reproducers", default=None)


@contextlib.contextmanager
def reproducing(choice: Callable[[], list[Observer]]) -> Iterator[None]:
    """Inside the block, `choice` says who writes reproducers of a pipeline that starts, and not the environment."""
    token = _choice.set(choice)
    try:
        yield
    finally:
        _choice.reset(token)


@register_ambient
def from_environment() -> list[Observer]:
    """A `Repro` where the process asks for one, unless a tool that runs what fails on purpose has said otherwise."""
    choice = _choice.get()
    if choice is not None:
        return choice()
    directory = os.environ.get(VARIABLE)
    return [] if directory in (None, "", OFF) else [Repro(str(directory))]
