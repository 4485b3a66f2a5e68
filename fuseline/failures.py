"""Reproducers of what fails behind the passes: code that cannot be generated, or that does not compile."""

from __future__ import annotations

from .compiler.errors import FuselineError, UserError
from .compiler.observe.repro import Repro, from_environment, note, reproducing
from .compiler.pipeline import Pipeline
from .compiler.program import Program


def explain_lowering(error: Exception, program: Program, pipeline: Pipeline) -> None:
    """Says of a reproducer in an error of lowering, where the process asks for such (`FUSELINE_REPRO`).

    Raises:
        FuselineError: in the place of an error that is none of ours: Dynamo passes on an error's text, and no notes.
    """
    writers = [observer for observer in from_environment() if isinstance(observer, Repro)]
    if not writers or isinstance(error, UserError):
        return
    try:
        said = of_lowering(writers[0], program, pipeline)
    except Exception as failure:  # whatever it is, the user wants to hear of the first error
        said = f"reproducer: none: {type(failure).__name__}: {failure}"
    if said is not None and isinstance(error, FuselineError):
        note(error, said)
    elif said is not None:
        raise FuselineError(f"no code could be generated: {type(error).__name__}: {error}", [said]) from error


def of_lowering(writer: Repro, program: Program, pipeline: Pipeline) -> str | None:
    """What to tell of a reproducer, in which a pipeline's result does not lower or compile; None where it does."""
    from .codegen.check import LowerCheck  # needed once something has failed, and not before
    from .compiler.debug.search import Case

    with reproducing(list):
        verdict = LowerCheck()(program, pipeline)
        return writer.write("lower", "lower", verdict, [("global", Case(program, pipeline))]) if verdict else None
