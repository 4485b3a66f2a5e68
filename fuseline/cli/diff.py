"""`fuseline diff A B` and `fuseline diff A -p PIPELINE`: what one program has that another has not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from fuseline.cli import options
from fuseline.cli.calibrating import again, passes_and_plan
from fuseline.cli.graphs import load_program
from fuseline.cli.output import Output
from fuseline.cli.render import following, table
from fuseline.compiler.errors import UserError
from fuseline.compiler.pipeline import DEFAULT

STYLES = {"hunk": "cyan", "removed": "red", "added": "green", "note": "yellow", "context": ""}


def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="A model, a .pt2 file or a dumped stage.")],
    after: Annotated[str | None, typer.Argument(metavar="[B]", help="Another, if there is no -p.")] = None,
    pipeline: Annotated[
        str | None, typer.Option("--pipeline", "-p", metavar="PIPELINE", help="Compare A with A after these passes.")
    ] = None,
    context: Annotated[int, typer.Option(metavar="N", min=0, help="Unchanged nodes around a change.")] = 2,
    stat: Annotated[bool, typer.Option("--stat", help="Only counts, by op and module.")] = False,
    provenance: Annotated[bool, typer.Option("--provenance", help="Also what moved in module, line or maker.")] = False,
    plan: options.Plan = None,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Write both side by side as a page.")] = None,
    dtype: options.Dtype = None,
    json: options.Json = None,
) -> None:
    """Compare two programs node by node, whatever the names.

    Exit code 1 if they differ. Example: fuseline diff demo:tiny-llama -p raise
    """
    from fuseline.compiler.debug.diff import diff as compare
    from fuseline.compiler.debug.diff_html import page
    from fuseline.compiler.debug.diff_text import lines, region_lines, stat as counted, summary

    rewrites = pipeline is not None or plan is not None
    if (after is None) != rewrites:
        raise UserError("a comparison needs a second program: B, or -p PIPELINE, not both", remedy="fuseline diff A B")
    target = Path(html) if html is not None else None
    if target is not None and not target.parent.is_dir():
        raise UserError(f"no such folder: {target.parent}")
    passes, decided = passes_and_plan(pipeline or DEFAULT, plan, before) if rewrites else (None, None)
    output = Output(json)
    first = load_program(before, dtype)
    second = passes.run(first, plan=decided)[0] if passes is not None else load_program(str(after), dtype)
    names = (before, after or f"{before} after {passes}")
    difference = compare(first, second)
    if stat:
        rows = [[module or "-", text] for module, text in counted(difference)]
        if rows:
            table(output, ["module", "changes"], rows)
        for text in region_lines(difference):
            output.line(text)
    elif not difference.same:
        _print(output, "hunk", f"--- {names[0]}")
        _print(output, "hunk", f"+++ {names[1]}")
        for style, text in lines(difference, context):
            _print(output, style, text)
    if provenance:
        for change in difference.provenance:
            shown = change.after or change.before
            output.line(f"{shown.name if shown else ''}: {'; '.join(change.details)}")
    output.line(summary(difference))
    data: dict[str, Any] = {"before": names[0], "after": names[1], **difference.to_json()}
    if target is not None:
        target.write_text(page(difference, *names), encoding="utf-8")
        data["html"] = str(target)
        output.line(f"written to {target}")
    other = again(passes, plan) if passes is not None else str(after)
    if difference.same and passes is not None:
        following(output, f"fuseline why {passes.passes[0].name} {before}", "what came closest to a rewrite")
    elif difference.same:
        following(output, f"fuseline diff {before} {after} --provenance", "what moved in module, line or maker")
    elif html is None:
        following(output, f"fuseline diff {before} {other} --html diff.html", "both side by side")
    else:
        following(output, f"fuseline diff {before} {other} --stat", "counts by module and op")
    output.write(data)
    if not difference.same:
        raise typer.Exit(1)


def _print(output: Output, style: str, text: str) -> None:
    output.console.print(Text(text, style=STYLES[style]), soft_wrap=True)
