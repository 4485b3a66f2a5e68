"""`fuseline why RULE [SITE] GRAPH`: why a rule does not match at a place, or does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fuseline.cli import options
from fuseline.cli.graphs import load_program
from fuseline.cli.output import Output
from fuseline.cli.render import following, table
from fuseline.compiler.errors import UserError
from fuseline.compiler.pipeline import Pipeline

if TYPE_CHECKING:
    from fuseline.compiler.debug.closest import NearMiss, Problem
    from fuseline.compiler.debug.near_miss import Explanation, Fit


def why(
    rule: Annotated[str, typer.Argument(metavar="RULE", help="PASS/RULE or PASS, such as raise/RMSNorm.")],
    where: Annotated[
        list[str], typer.Argument(metavar="[SITE] GRAPH", help="A site, module, node or file.py:174; a model or file.")
    ],
    pipeline: Annotated[
        str | None, typer.Option("--pipeline", "-p", metavar="PIPELINE", help="Passes that run before.")
    ] = None,
    top: Annotated[int, typer.Option(metavar="N", min=1, help="How many near misses to list.")] = 12,
    dtype: options.Dtype = None,
    json: options.Json = None,
) -> None:
    """Explain why a rule does not match, or does.

    Without SITE: its near misses. Exit code 0 if it matches there (or misses
    nothing), else 1. fuseline why raise/RMSNorm model.norm demo:tiny-llama
    """
    from fuseline.compiler.debug import why as engine

    if len(where) > 2:
        raise UserError(f"too many arguments: {' '.join(where)}", remedy="fuseline why RULE SITE GRAPH")
    site, graph = (where[0], where[1]) if len(where) == 2 else (None, where[0])
    before = Pipeline(pipeline) if pipeline is not None else None
    output = Output(json)
    program = load_program(graph, dtype)
    if before is not None:
        program = before.run(program)[0]
    step, name = engine.parse(rule, program)
    found = engine.why(program, step, name, site)
    best = engine.best_of(found)
    data: dict[str, Any] = {
        "rule": rule,
        "graph": graph,
        "pipeline": str(before) if before is not None else "",
        "site": site,
        "explanations": [one.to_json() for one in found],
    }
    if site is None:
        code = _overview(output, step.name, found, top, f"{graph}{f' -p {chr(34)}{before}{chr(34)}' if before else ''}")
    else:
        data["verdict"] = best.verdict
        _show(output, step.name, best)
        following(output, f"fuseline why {step.name} {graph}", "near misses of the whole pass")
        code = 0 if best.verdict == "matches" else 1
    output.write(data)
    if code:
        raise typer.Exit(code)


def _show(output: Output, pass_name: str, found: Explanation) -> None:
    rule = found.rule if found.rule.startswith(pass_name) else f"{pass_name}/{found.rule}"
    output.line(f"{rule} at {found.place}: {found.verdict}")
    for fit in found.fits[:8]:
        output.line()
        _fit(output, fit)
    if len(found.fits) > 8:
        output.line(f"… and {len(found.fits) - 8} more")
    for miss in found.misses[:3]:
        output.line()
        _miss(output, miss)
    if not found.fits and not found.misses and not found.notes:
        output.line("nothing there has any part of the pattern")
    for note in found.notes:
        output.line(note)
    if found.location:
        _field(output, "rule", _short(found.location))


def _fit(output: Output, fit: Fit) -> None:
    _field(output, "refused" if fit.refusal else "matches", fit.refusal or f"as {fit.rule}, {len(fit.nodes)} nodes")
    _field(output, "root", f"{fit.root} ({fit.site})")
    if fit.line:
        _field(output, "line", _short(fit.line))
    for position, text in enumerate(fit.nodes):
        _field(output, "" if position else "nodes", text)


def _miss(output: Output, miss: NearMiss) -> None:
    _field(output, "closest", f"{miss.root.name}: {miss.fits} of {miss.parts} parts of the pattern fit")
    for problem in miss.problems:
        _field(output, "missed", problem.text)
        _field(output, "", problem.call)
        place = "  ".join(filter(None, (problem.module, _short(problem.line) if problem.line else "")))
        if place:
            _field(output, "", place)
    _field(output, "pattern", miss.pattern)
    if miss.marks:
        _field(output, "", miss.marks)


def _overview(output: Output, pass_name: str, found: Sequence[Explanation], top: int, graph: str) -> int:
    """Counts by rule, and the near misses, the likeliest first; 1 if there are any."""
    groups: dict[str, list[Explanation]] = {}
    for one in found:
        groups.setdefault(one.rule, []).append(one)
    rows = []
    for name, group in groups.items():
        refused = sum(fit.refusal is not None for one in group for fit in one.fits)
        taken = sum(len(one.fits) for one in group) - refused
        rows.append([name, str(taken), str(refused), str(sum(len(one.misses) for one in group))])
    table(output, ["rule", "sites", "refused", "near misses"], rows)
    for name, group in groups.items():
        fits = [fit for one in group for fit in one.fits if fit.refusal]
        for reason in dict.fromkeys(fit.refusal for fit in fits):
            output.line(f"{name} refused: {reason} ({next(fit.site for fit in fits if fit.refusal == reason)})")
        for note in dict.fromkeys(note for one in group for note in one.notes if len(groups) == 1):
            output.line(note)
    misses = [(one.rule, miss) for one in found for miss in one.misses]
    misses.sort(key=lambda pair: -pair[1].share)
    if misses:
        output.line()
        told = [
            [f"{m.fits}/{m.parts}", rule, m.root.name, "; ".join(map(_told, m.problems))] for rule, m in misses[:top]
        ]
        table(output, ["fits", "rule", "root", "missed"], told)
        if len(misses) > top:
            output.line(f"… and {len(misses) - top} more")
        rule, miss = misses[0]
        following(output, f"fuseline why {pass_name}/{rule} {miss.root.name} {graph}", "the closest, in full")
    else:
        following(output, f"fuseline why {pass_name} SITE {graph}", "one place, in full")
    return int(bool(misses))


def _told(problem: Problem) -> str:
    line = f" ({problem.line.rsplit(os.sep, 1)[-1]})" if problem.line else ""
    return f"{problem.text}, at {problem.node}{line}"


def _field(output: Output, name: str, text: str) -> None:
    output.console.print(f"{name:<9} {text}", soft_wrap=True)


def _short(path: str) -> str:
    """Relative to the working directory, where it lies below."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative
