"""`fuseline reduce GRAPH -p PIPELINE -o OUT.py`: the smallest program and pipeline that still go wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from fuseline.cli import options
from fuseline.cli.checking import Given, given, parse_check
from fuseline.cli.command import command_of
from fuseline.cli.output import Output
from fuseline.cli.render import following, table
from fuseline.cli.repro import SOURCES, proved, writable
from fuseline.compiler.debug.check import Verdict
from fuseline.compiler.debug.command_judge import PLACE, CommandJudge
from fuseline.compiler.debug.reduce import Reduction, reduce as smallest, run
from fuseline.compiler.debug.reproducer import describe
from fuseline.compiler.debug.search import Case, Search
from fuseline.compiler.debug.settle import settle, write_case
from fuseline.compiler.errors import FuselineError, UserError
from fuseline.compiler.progress import bar, step
from fuseline.compiler.stage import read_table
from fuseline.compiler.stage.render import code


def reduce(
    context: typer.Context,
    graph: Annotated[str, typer.Argument(metavar="GRAPH", help="A MODEL, a stage or a reproducer.")],
    out: Annotated[str, typer.Option("--output", "-o", metavar="OUT.py", help="The reproducer to write.")],
    pipeline: Annotated[str | None, typer.Option("--pipeline", "-p", metavar="PIPELINE", help="What fails.")] = None,
    check: Annotated[
        str | None, typer.Option(metavar="CHECK", help="any, crash:REGEX, verify, error:1e-3, hang:9, lower.")
    ] = None,
    match: Annotated[str | None, typer.Option(metavar="REGEX", help="What CMD must print.")] = None,
    most: Annotated[int, typer.Option(metavar="N", min=1, help="Checks at the most.")] = 1000,
    seconds: Annotated[float | None, typer.Option(metavar="S", help="Stop after this long.")] = None,
    repeat: Annotated[int | None, typer.Option(metavar="N", min=1, help="Tries, for what fails at times.")] = None,
    dtype: options.Dtype = None,
    json: options.Json = None,
) -> None:
    """Shrink a failing program and pipeline to a reproducer.

    With -- CMD: while CMD FILE ends as at first. Ctrl-C keeps the best so far.
    """
    path, command = Path(out), command_of(context)
    writable(path)
    if match is not None and not command:
        raise UserError("--match is for the output of a command", remedy=f"fuseline reduce {graph} … -- CMD")
    if command and check is not None:
        raise UserError("either a command says what is interesting, or --check does", remedy="leave one of them out")
    output = Output(json)
    source = given(graph, pipeline, check, dtype, "reduce", needs_pipeline=not command)
    with bar("reducing") as progress:
        if command:
            reduction = _by_command(source, path, command, match, most, seconds, progress)
        else:
            reduction = _by_check(source, path, most, seconds, repeat or source.repeat, progress)
    values = _settle(reduction, source, path, repeat or source.repeat)
    data = _data(graph, reduction, path, values)
    _show(output, data)
    if not command:
        proved(path)
        output.line(f"\n{path}, {SOURCES[values]}: it fails alike in a fresh process")
        following(output, f"fuseline repro {path}", "runs it again")
    else:
        words = " ".join(command)
        following(output, words.replace(PLACE, out) if PLACE in words else f"{words} {out}", "the same of the result")
    output.write(data)
    if reduction.interrupted:
        raise typer.Exit(130)


def _by_check(
    source: Given, path: Path, most: int, seconds: float | None, repeat: int, progress: Progress
) -> Reduction:
    check = parse_check(source.check)

    def improved(case: Case, verdict: Verdict) -> None:
        write_case(path, case, source.check, verdict, repeat)
        step(progress, f"{case.nodes} nodes", 0)

    return smallest(
        source.program,
        source.pipeline,
        check,
        most=most,
        seconds=seconds,
        repeat=repeat,
        wanted=source.verdict if source.verdict is not None and source.verdict.kind is not None else None,
        improved=improved,
        checked=lambda what: step(progress, what),
    )


def _by_command(
    source: Given,
    path: Path,
    command: list[str],
    match: str | None,
    most: int,
    seconds: float | None,
    progress: Progress,
) -> Reduction:
    unknown = source.verdict or Verdict(None)
    judge = CommandJudge(command, lambda case, file: write_case(file, case, source.check, unknown, beside=True), match)
    case = Case(source.program, source.pipeline)
    verdict = judge.start(case)
    search = Search(
        case,
        verdict,
        judge,
        None,
        most,
        seconds,
        lambda case, verdict: write_case(path, case, source.check, unknown),
        lambda what: step(progress, what),
    )
    return run(search)


def _settle(reduction: Reduction, source: Given, path: Path, repeat: int) -> str:
    """Writes the result with no more values than it needs; says which."""
    case, verdict = reduction.after, reduction.verdict
    if reduction.check is None:
        write_case(path, case, source.check, source.verdict or Verdict(None), beside=True)
        return read_table(path)["tensors"]["kind"]
    recipe = settle(path, case, reduction.check, verdict, "reduced", None, repeat)
    if recipe is None:
        write_case(path, case, str(reduction.check), verdict, repeat, beside=True)
        raise FuselineError(
            f"{case} fails here, and not once it is read back from {path}",
            [str(verdict).splitlines()[0]],
            f"fuseline repro {path} --repeat 10, where the fault does not show at every run",
        )
    return recipe.kind


def _data(graph: str, reduction: Reduction, path: Path, values: str) -> dict[str, Any]:
    return {
        "graph": graph,
        "path": str(path),
        "pipeline": str(reduction.after.pipeline),
        "verdict": describe(reduction.verdict),
        "culprit": reduction.culprit.to_json() if reduction.culprit is not None else None,
        "before": _counts(reduction.before),
        "after": _counts(reduction.after),
        "checks": reduction.checks,
        "seconds": round(reduction.seconds, 2),
        "complete": reduction.complete,
        "values": values,
        "code": code(reduction.after.program),
    }


def _counts(case: Case) -> dict[str, int]:
    program = case.program
    return {
        "nodes": case.nodes,
        "inputs": len(program.placeholders),
        "weights": len(program.weights()),
        "passes": len(case.pipeline.passes),
    }


def _show(output: Output, data: dict[str, Any]) -> None:
    rows = [[name, str(data["before"][name]), str(data["after"][name])] for name in data["before"]]
    table(output, ["", "before", "after"], rows)
    verdict = data["verdict"]
    output.line(f"\n{verdict['kind']}: {(verdict['message'].splitlines() or [''])[0]}")
    output.line(f"pipeline: {data['pipeline']}")
    culprit = data["culprit"]
    if culprit is not None and culprit["rule"]:
        rows = [("rule", f"{culprit['pass']}/{culprit['rule']}  {culprit['location'] or 'unknown'}")]
        rows += [("site", culprit["site"]), ("line", culprit["line"] or "unknown")]
        for name, text in rows:
            output.console.print(f"{name}: {text}", soft_wrap=True)
    output.console.print()
    output.console.print(data["code"], soft_wrap=True)
    how = "" if data["complete"] else "; stopped before it was done"
    output.line(f"\n{data['checks']} checks, {data['seconds']:.1f} s{how}")
