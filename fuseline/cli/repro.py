"""`fuseline repro FILE`: does a reproducer still fail; `fuseline repro GRAPH -p PIPELINE -o FILE`: make one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fuseline.cli import options
from fuseline.cli.checking import given, parse_check
from fuseline.cli.output import Output
from fuseline.cli.render import following, table
from fuseline.compiler.debug.check import Verdict
from fuseline.compiler.debug.culprit import Judge
from fuseline.compiler.debug.reproducer import (
    Reproducer,
    alike,
    describe,
    load_reproducer,
    versions,
)
from fuseline.compiler.debug.rerun import SECONDS, rerun
from fuseline.compiler.errors import FuselineError, UserError
from fuseline.compiler.stage.tensors import example_bytes

CODES = {"passes": 0, "reproduces": 1, "different": 3}
SAID = {
    "passes": "it does not fail any more",
    "reproduces": "it fails alike",
    "different": "it fails in another way",
}
SOURCES = {"none": "types only", "random": "random values", "embedded": "real values", "file": "real values"}


def repro(
    graph: Annotated[str, typer.Argument(metavar="FILE", help="A reproducer; with -o, a GRAPH to make one of.")],
    out: Annotated[str | None, typer.Option("--output", "-o", metavar="FILE.py", help="Make one.")] = None,
    pipeline: Annotated[str | None, typer.Option("--pipeline", "-p", metavar="PIPELINE", help="What fails.")] = None,
    check: Annotated[
        str | None, typer.Option(metavar="CHECK", help="any, crash:REGEX, verify, error:1e-3, hang:9, lower.")
    ] = None,
    values: Annotated[str | None, typer.Option(metavar="V", help="none, random or real; else what is enough.")] = None,
    repeat: Annotated[int | None, typer.Option(metavar="N", min=1, help="Tries, for what fails at times.")] = None,
    here: Annotated[bool, typer.Option("--here", help="Run in this process, not in a fresh one.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing; the exit code tells.")] = False,
    seconds: Annotated[float, typer.Option(metavar="S", help="Wait this long for a fresh process.")] = SECONDS,
    dtype: options.Dtype = None,
    json: options.Json = None,
) -> None:
    """Run a reproducer, or make one, proved in a fresh process.

    Exit codes: 1 it fails alike, 0 it fails no more, 3 it fails otherwise.
    """
    output = Output(json)
    output.console.quiet = quiet
    if out is not None:
        _make(output, graph, Path(out), pipeline, check, values, repeat or 1, dtype, seconds)
        return
    for name, value in (("-p", pipeline), ("--check", check), ("--values", values)):
        if value is not None:
            raise UserError(f"{name} is for making a reproducer", remedy=f"fuseline repro {graph} -p … -o FILE.py")
    if not Path(graph).is_file():
        raise UserError(f"no such file: {graph}", remedy="fuseline repro GRAPH -p PIPELINE -o FILE.py    makes one")
    data = _here(Path(graph), repeat) if here else _fresh(Path(graph), seconds)
    _show(output, data)
    output.write(data)
    raise typer.Exit(CODES[data["status"]])


def _here(path: Path, repeat: int | None) -> dict[str, Any]:
    """Runs a reproducer in this process."""
    read = _read(path)
    check = parse_check(read.check)
    try:
        found, status = _run(read, check, repeat or read.repeat)
    except Exception as error:  # not in a pass: the program itself does not run here
        found, status = Verdict("crash", f"the program does not run here: {error}"), "different"
    return _data(read, found, status)


def _read(path: Path) -> Reproducer:
    """A reproducer's file. That it cannot be read has an exit code of its own: 1 means that it fails alike."""
    try:
        return load_reproducer(path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _run(read: Reproducer, check: Judge, repeat: int) -> tuple[Verdict, str]:
    first: Verdict | None = None
    for _ in range(repeat):
        found = check(read.program, read.pipeline, [])
        if alike(found, read.verdict) or (read.verdict.kind is None and found.kind is not None):
            return found, "reproduces"
        if first is None or (first.kind is None and found.kind is not None):
            first = found
    assert first is not None
    return first, "passes" if first.kind is None else "different"


def _fresh(path: Path, seconds: float) -> dict[str, Any]:
    """Runs a reproducer in a fresh process."""
    read = _read(path)
    again = rerun(path, seconds)
    if again.found is not None:
        return again.found
    if again.status == "unusable":
        raise UserError(f"a fresh process cannot run {path}: {again.reason}", remedy=f"fuseline repro {path} --here")
    return _data(read, Verdict("hang" if "not done" in again.reason else "crash", again.reason), again.status)


def _data(read: Reproducer, found: Verdict, status: str) -> dict[str, Any]:
    now = versions(read.pipeline)
    return {
        "path": str(read.path),
        "pipeline": str(read.pipeline),
        "check": read.check,
        "scope": read.scope,
        "values": read.values,
        "nodes": sum(n.op.startswith("call_") for n in read.program.graph.nodes),
        "recorded": describe(read.verdict),
        "found": describe(found),
        "status": status,
        "versions": {"then": read.versions, "now": now},
    }


def _show(output: Output, data: dict[str, Any]) -> None:
    nodes, source = data["nodes"], SOURCES[data["values"]]
    output.line(f"{data['path']}: {data['scope']}, {nodes} nodes, {source}")
    output.line(f"pipeline  {data['pipeline']}")
    output.line(f"recorded  {_said(data['recorded'])}")
    output.line(f"now       {_said(data['found'])}")
    then, now = data["versions"]["then"], data["versions"]["now"]
    changed = [name for name in dict.fromkeys((*then, *now)) if then.get(name) != now.get(name)]
    if changed:
        output.line()
        table(
            output,
            ["version of", "then", "now"],
            [[n, str(then.get(n) or "-"), str(now.get(n) or "-")] for n in changed],
        )
    output.line(f"\n{SAID[data['status']]}{'' if changed else ', with the same versions'}")
    if data["status"] == "reproduces":
        following(output, f"fuseline reduce {data['path']} -o smaller.py", "the smallest that fails alike")
    else:
        following(output, f'fuseline opt {data["path"]} -p "{data["pipeline"]}" --dump DIR', "stage by stage")


def _said(verdict: dict[str, Any]) -> str:
    if verdict["kind"] is None:
        return "nothing is wrong"
    message, size = (verdict["message"].splitlines() or [""])[0], verdict["size"]
    return f"{verdict['kind']}: {message}{f' ({size})' if size else ''}"


def _make(
    output: Output,
    graph: str,
    path: Path,
    pipeline: str | None,
    check: str | None,
    values: str | None,
    repeat: int,
    dtype: str | None,
    seconds: float,
) -> None:
    from fuseline.compiler.debug.culprit import narrowed
    from fuseline.compiler.debug.reduce import failing
    from fuseline.compiler.debug.search import Case
    from fuseline.compiler.debug.settle import settle

    writable(path)
    source = given(graph, pipeline, check, dtype, "repro")
    case, checker = Case(source.program, source.pipeline), parse_check(source.check)
    verdict = failing(checker, case, None, repeat)
    if verdict is None:
        raise UserError(
            f"there is nothing to reproduce: {source.check} finds nothing wrong with {source.pipeline}",
            remedy="another --check, or --repeat 10 for a fault that does not show at every run",
        )
    recipe = settle(path, case, narrowed(checker, verdict), verdict, "global", values, repeat)
    if recipe is None:
        size = example_bytes(source.program)
        raise FuselineError(
            f"what is written to a file does not fail alike: {str(verdict).splitlines()[0]}",
            [f"tried: {values or 'types only, random values, real ones of up to 64 MB'}; here are {size / 1e6:.1f} MB"],
            f'fuseline reduce {graph} -p "{source.pipeline}" --check {source.check} -o {path}',
        )
    data = proved(path, seconds)
    _show(output, data)
    output.write(data)


def proved(path: Path, seconds: float = SECONDS) -> dict[str, Any]:
    """What a fresh process makes of a reproducer that was just written.

    Raises:
        FuselineError: it does not fail alike there; the file stays, for a look.
    """
    again = rerun(path, seconds)
    if not again.reproduced or again.found is None:
        raise FuselineError(
            f"{path} fails here, and not in a fresh process: {again.reason or SAID.get(again.status, again.status)}",
            ["something of this process is part of the fault, or it does not show at every run"],
            f"fuseline repro {path} --repeat 10",
        )
    return again.found


def writable(path: Path) -> None:
    """Holds a file to write to its name.

    Raises:
        UserError: it does not end in .py, its folder is not there, or it holds something else.
    """
    from fuseline.compiler.stage import is_stage

    if path.suffix != ".py":
        raise UserError(f"'{path}' does not end in .py", remedy=f"-o {path.with_suffix('.py')}")
    if not path.parent.is_dir():
        raise UserError(f"no such folder: {path.parent}")
    if path.exists() and not is_stage(path):
        raise UserError(f"{path} exists, and is no reproducer", remedy="-o another.py")
