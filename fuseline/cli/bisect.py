"""`fuseline bisect -- CMD` and `fuseline bisect GRAPH -p PIPELINE --check C`: the single rewrite that makes it fail."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated, Any

import typer

from fuseline.cli import options
from fuseline.cli.checking import SECONDS, parse_bounded, refuse_plans
from fuseline.cli.command import command_of, graph_or_command
from fuseline.cli.graphs import load_program
from fuseline.cli.output import Output
from fuseline.cli.render import following
from fuseline.compiler.debug.bisect import Bisection, Culprit
from fuseline.compiler.debug.commands import Command
from fuseline.compiler.debug.in_process import InProcess
from fuseline.compiler.pipeline import DEFAULT, Pipeline

COMMAND_SECONDS = 600.0


def bisect(
    context: typer.Context,
    graph: Annotated[str | None, typer.Argument(metavar="[GRAPH]", help="A program, or -- and a command.")] = None,
    pipeline: options.PipelineText = DEFAULT,
    check: Annotated[str, typer.Option(metavar="C", help="any, crash:REGEX, verify, error:1e-3.")] = "any",
    match: Annotated[str | None, typer.Option(metavar="REGEX", help="A failure's output must have it.")] = None,
    timeout: Annotated[float | None, typer.Option(metavar="S", help="A run's seconds: 120 (command: 600).")] = None,
    runs: Annotated[int, typer.Option(metavar="N", help="Runs at the most.")] = 200,
    flaky: Annotated[bool, typer.Option("--flaky", help="It doesn't fail at every run.")] = False,
    confidence: Annotated[float, typer.Option(metavar="P", help="How sure to be of a flaky one.")] = 0.95,
    json: options.Json = None,
) -> None:
    """Find the one rewrite that makes a check or a command fail.

    fuseline bisect -- python train.py      (exit code 0 good, 125 cannot tell)
    """
    command = command_of(context)
    graph_or_command(graph, command, "bisect")
    output = Output(json)
    if command:
        run: Any = Command(command, timeout or COMMAND_SECONDS, match)
    else:
        assert graph is not None
        passes, wanted = Pipeline(pipeline), parse_bounded(check, Pipeline(pipeline))
        refuse_plans(passes, "bisect")
        wanted = dataclasses.replace(wanted, seconds=timeout or wanted.seconds or SECONDS)
        run = InProcess(load_program(graph), passes, wanted)
    found = Bisection(run, runs, confidence, flaky, progress=lambda line: print(line, file=sys.stderr)).search()
    again = _again(run, graph, pipeline, found)
    show(output, found, again)
    if graph is not None and found.kind in ("rewrite", "endless"):
        following(
            output, f'fuseline reduce {graph} -p "{pipeline}" --check {check} -o small.py', "the fault in few nodes"
        )
    elif found.entry is not None and found.entry.location is not None:
        name = f"{found.entry.pass_name}/{found.entry.rule}"
        following(output, f"fuseline why {name} {found.entry.site.partition('/')[0]} GRAPH", "what the rule looks for")
    output.write({**dataclasses.asdict(found), "commands": again})
    raise typer.Exit(0 if found.kind == "nothing" else 1)


def _again(run: Any, graph: str | None, pipeline: str, found: Culprit) -> dict[str, str]:
    """What to type to see it fail, and pass."""
    if found.number is None:
        return {}
    repeat = run if isinstance(run, Command) else Command(["fuseline", "compare", str(graph), "-p", pipeline])
    return {"fails": repeat.line(found.number), "passes": repeat.line(found.number - 1)}


def show(output: Output, found: Culprit, again: dict[str, str]) -> None:
    """What was found, in sentences."""
    entry = found.entry
    runs = f"{found.runs} runs"
    if found.kind == "nothing":
        output.line(f"nothing to find: it passes with all {found.rewrites} rewrites ({runs})")
    elif found.kind == "elsewhere":
        output.line(f"it fails without any of the {found.rewrites} rewrites, too ({runs}): {found.detail}")
    elif entry is not None:
        where = f"{entry.pass_name}/{entry.rule} at {entry.site}"
        ending = "" if found.kind == "rewrite" else ", and for ever"
        output.line(f"rewrite {found.number} of {found.rewrites}: {where}{ending}")
        rows = [
            ("rule", entry.location or "unknown"),
            ("line", entry.line or "unknown"),
            *(("before" if i == 0 else "", text) for i, text in enumerate(entry.before)),
            *(("after" if i == 0 else "", text) for i, text in enumerate(entry.after)),
            ("fault", found.detail or "-"),
            ("runs", _runs(found)),
            *(
                ("process" if i == 0 else "", f"{p}: {e}")
                for i, (p, e) in enumerate(found.entries.items())
                if p != "here"
            ),
            *again.items(),
        ]
        for name, text in rows:
            output.console.print(f"  {name:8}{text}", soft_wrap=True)


def _runs(found: Culprit) -> str:
    text = f"{found.runs}, for {found.rewrites} rewrites"
    if found.confidence < 1:
        rate = f"it shows in about {found.failing_rate:.0%} of them"
        return f"{text}; {rate}, so this is sure to {found.confidence:.1%}"
    if found.also:
        return f"{text}; without it alone it still fails: another rewrite after it is wrong, too"
    return text if found.kind == "endless" else f"{text}; without it alone it passes"
