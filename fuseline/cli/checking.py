"""What `--check` means on the command line, and what a GRAPH that is a reproducer brings along."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fuseline.cli.graphs import load_program
from fuseline.compiler.debug.check import Check, Verdict
from fuseline.compiler.debug.culprit import Judge
from fuseline.compiler.debug.reproducer import is_reproducer, load_reproducer
from fuseline.compiler.errors import UserError
from fuseline.compiler.pipeline import Pipeline
from fuseline.compiler.program import Program
from fuseline.compiler.stage import is_stage

SECONDS = 120.0  # after which a pipeline hangs, unless a check says otherwise


def parse_check(text: str, pipeline: Pipeline | None = None) -> Judge:
    """A check of passes (`compiler/debug/check.py`), or `lower`: whether the kernels compile.

    Raises:
        UserError: for another word, with the nearest; or the pipeline approximates, and no bound is given.
    """
    if text.partition(":")[0] == "lower":
        from fuseline.codegen.check import LowerCheck

        return LowerCheck.parse(text)
    check = parse_bounded(text, pipeline)
    return replace(check, seconds=check.seconds or SECONDS) if "hang" in check.kinds else check


def parse_bounded(text: str, pipeline: Pipeline | None = None) -> Check:
    """A check of passes; one of results says how large an error may be where the pipeline approximates.

    Raises:
        UserError: for another word, with the nearest; or no bound is given where one is needed.
    """
    check = Check.parse(text)
    if "error" in check.kinds and check.bound is None and pipeline is not None and pipeline.lossy:
        names = ", ".join(f"'{step.name}'" for step in pipeline.lossy)
        raise UserError(
            f"{names} approximates: how large an error is one too many has to be said",
            remedy=f"--check '{text}|error:0.1'" if text != "any" else "--check 'any|error:0.1'",
        )
    return check


def refuse_plans(passes: Pipeline, verb: str) -> None:
    """Holds a verb that runs parts of pipelines to passes that need no plan, which is made for a whole one.

    Raises:
        UserError: with the way around it.
    """
    names = [step.name for step in passes.passes if step.needs_data]
    if names:
        raise UserError(
            f"'{names[-1]}' decides from data, and '{verb}' takes no plan",
            remedy=f"fuseline opt MODEL --plan plan.json --dump DIR, then fuseline {verb} DIR/00N_{names[-1]}.py "
            "with the passes behind it",
        )


@dataclass(frozen=True)
class Given:
    """A program, a pipeline over it and what to look for; verdict: what a reproducer recorded."""

    program: Program
    pipeline: Pipeline
    check: str
    verdict: Verdict | None = None
    repeat: int = 1


def given(
    graph: str, pipeline: str | None, check: str | None, dtype: str | None, verb: str, needs_pipeline: bool = True
) -> Given:
    """GRAPH, `-p` and `--check` together; a reproducer has all three, and options take the place of its own.

    Raises:
        UserError: there is no pipeline, or it needs a plan.
    """
    passes = Pipeline(pipeline) if pipeline is not None else None
    if passes is not None:
        refuse_plans(passes, verb)
    if is_stage(graph) and is_reproducer(graph):
        read = load_reproducer(graph)
        verdict = read.verdict if passes is None and check is None else None
        if passes is not None or check is not None:
            parse_check(check or read.check, passes or read.pipeline)
        return Given(read.program, passes or read.pipeline, check or read.check, verdict, read.repeat)
    if passes is None and not needs_pipeline:
        return Given(load_program(graph, dtype), Pipeline(()), check or "any")
    if passes is None:
        raise UserError(
            f"{graph} is no reproducer, and there is no pipeline", remedy=f'fuseline {verb} {graph} -p "raise,fuse" …'
        )
    parse_check(check or "any", passes)
    return Given(load_program(graph, dtype), passes, check or "any")
