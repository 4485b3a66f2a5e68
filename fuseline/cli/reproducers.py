"""The reproducers that `run`, `opt` and `kernels` leave of their own accord when a compile fails."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fuseline.cli.output import announce
from fuseline.compiler.action import Observer
from fuseline.compiler.errors import UserError, VerificationError
from fuseline.compiler.framework import Tier
from fuseline.compiler.observe.repro import OFF, VARIABLE, Repro, note, reproducing
from fuseline.failures import of_lowering
from fuseline.runtime.location import cache_root

VERBS = ("run", "opt", "kernels")  # other verbs run what fails on purpose


@contextmanager
def reproducers(arguments: Sequence[str]) -> Iterator[None]:
    """Has a failing compile of these verbs leave a reproducer, in `$FUSELINE_REPRO` or else in the cache."""
    directory = os.environ.get(VARIABLE) or str(cache_root() / "reproducers")
    made: list[Repro] = []

    def attach() -> list[Observer]:
        made.append(Repro(directory, announce))
        return [made[-1]]

    wanted = arguments[:1] and arguments[0] in VERBS and directory != OFF
    with reproducing(attach if wanted else list):
        try:
            yield
        except Exception as error:
            if made:
                with reproducing(list):
                    _explain(error, made[-1])
            raise


def _explain(error: Exception, last: Repro) -> None:
    """A reproducer of what went wrong behind the last pipeline: results that are off, code that cannot be generated."""
    from fuseline.cli import find_ours

    ours = find_ours(error)
    if isinstance(ours, UserError) or last.pipeline is None or not last.ended:
        return
    frames = traceback.extract_tb(error.__traceback__)
    try:
        if isinstance(ours, VerificationError):
            said = _of_results(last)
        elif any(f"{os.sep}codegen{os.sep}" in frame.filename for frame in frames):
            assert last.captured is not None
            said = of_lowering(last, last.captured, last.pipeline)
        else:
            return
    except Exception as failure:  # whatever it is, the user wants to hear of the first error
        said = f"reproducer: none: {type(failure).__name__}: {failure}"
    if said is not None:
        note(ours or error, said)


def _of_results(last: Repro) -> str | None:
    """The first exact pass whose result is wrong, on what the passes before it left."""
    from fuseline.compiler.debug.check import Check
    from fuseline.compiler.debug.search import Case
    from fuseline.compiler.pipeline import Pipeline

    for step, before in last.stages:
        if step.tier is Tier.EXACT:
            case = Case(before, Pipeline([step]))
            verdict = Check(("error",), sizes=False)(case.program, case.pipeline)
            if verdict:
                return last.write(step.name, "error", verdict, [("local", case)])
    return None
