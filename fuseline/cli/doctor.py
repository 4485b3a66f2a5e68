"""`fuseline doctor`: what this machine has, what is missing or will be slower, and the command that mends it."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from fuseline.cli import options
from fuseline.cli.environment import versions
from fuseline.cli.output import Output, announce
from fuseline.cli.render import following, table

MARKS = {"ok": "ok", "slower": "slower", "missing": "missing", "broken": "BROKEN"}


def doctor(
    trial: Annotated[bool, typer.Option("--trial/--no-trial", help="Compile and run a small model.")] = True,
    json: options.Json = None,
) -> None:
    """Tell what is missing or slow here, and how to mend it.

    Exit code 1 if something is broken. Nothing is installed or downloaded.
    """
    from fuseline.doctor import BROKEN, OK, STATES, examine

    output = Output(json)
    announce("looking around")
    findings = examine(trial)
    table(output, ["what", "state", "found"], [[f.name, MARKS[f.state], f.value] for f in findings])
    wanting = sorted((f for f in findings if f.state != OK), key=lambda f: -STATES.index(f.state))
    for finding in wanting:
        output.line()
        output.line(f"{finding.name}: {finding.effect}")
        if finding.remedy:
            output.console.print(f"  {finding.remedy}", soft_wrap=True)
    broken = [f.name for f in findings if f.state == BROKEN]
    output.line()
    output.line(f"broken: {', '.join(broken)}" if broken else "Fuseline works here." if trial else "nothing is broken")
    if not broken:
        following(output, "fuseline run demo:tiny-decoder", "a first report, of a model that needs nothing else")
    data = {"ok": not broken, "findings": [dataclasses.asdict(f) for f in findings], "versions": versions()}
    output.write(data)
    if broken:
        raise typer.Exit(1)
