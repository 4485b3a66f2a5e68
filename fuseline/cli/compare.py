"""`fuseline compare GRAPH -p PIPELINE` and `fuseline compare GRAPH OTHER`: what is off, how far, and whose fault."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from fuseline.cli import options
from fuseline.cli.calibrating import again, passes_and_plan
from fuseline.cli.graphs import load_program
from fuseline.cli.output import Output
from fuseline.cli.render import following, number, table
from fuseline.compiler.debug.compare import compare as compare_passes
from fuseline.compiler.debug.comparison import Comparison, RewriteError
from fuseline.compiler.debug.edits import compare_programs
from fuseline.compiler.errors import UserError
from fuseline.compiler.pipeline import DEFAULT, Pipeline
from fuseline.compiler.progress import bar
from fuseline.compiler.stage import is_stage


def compare(
    graph: Annotated[str, typer.Argument(metavar="GRAPH", help="A model, a .pt2 file or a dumped stage.")],
    other: Annotated[str | None, typer.Argument(metavar="[OTHER]", help="Another, if there is no -p.")] = None,
    pipeline: Annotated[
        str | None, typer.Option("--pipeline", "-p", metavar="PIPELINE", help="Compare GRAPH with itself after these.")
    ] = None,
    plan: options.Plan = None,
    worst: Annotated[int, typer.Option(metavar="N", min=0, help="Rewrites to show.")] = 8,
    dtype: options.Dtype = None,
    json: options.Json = None,
) -> None:
    """Find the first node that is off by more than rounding.

    Each node is held against float64, each rewrite by itself. Exit code 1 where
    one diverges. Example: fuseline compare demo:smollm2 -p raise,fuse
    """
    rewrites = pipeline is not None or plan is not None
    if (other is None) != rewrites:
        raise UserError(
            "a comparison needs a second program: OTHER, or -p PIPELINE, not both",
            remedy="fuseline compare demo:tiny-llama -p raise,fuse",
        )
    passes, decided = passes_and_plan(pipeline or DEFAULT, plan, graph) if rewrites else (None, None)
    output = Output(json)
    first = load_program(graph, dtype)
    second = load_program(other, dtype) if other is not None else None
    with bar("comparing") as progress:
        told = lambda done, total: progress.update(progress.task_ids[0], completed=done, total=total)
        found = (
            compare_programs(first, second, told)
            if second is not None
            else compare_passes(first, Pipeline(passes or ""), plan=decided, progress=told)
        )
    title = f"{graph} after {passes}" if passes is not None else f"{other} against {graph}"
    output.line(f"{title}: {len(found.nodes)} nodes of {found.dtype}, held against float64\n")
    _show_passes(output, found)
    _show_rewrites(output, found, worst)
    for one in found.outputs:
        verdict = "only rounding" if one.ok else "more than rounding"
        output.line(f"{one.name}: error {number(one.error)}, rounding noise {number(one.noise)}: {verdict}")
    _show_fault(output, found, other)
    _show_notes(output, found)
    _next(output, found, graph, other or again(passes or Pipeline(), plan), reducible=rewrites and plan is None)
    output.write({"graph": graph, "other": other, "pipeline": str(passes) if passes else None, **found.to_json()})
    if not found.ok:
        raise typer.Exit(1)


def _show_passes(output: Output, found: Comparison) -> None:
    rows = [
        [
            p.name,
            p.tier,
            str(p.rewrites),
            number(p.local),
            number(p.noise),
            number(p.error),
            ", ".join(f"{count} {verdict}" for verdict, count in p.verdicts.items()),
        ]
        for p in found.passes
    ]
    if rows:
        table(output, ["pass", "tier", "rewrites", "local", "noise", "results", "found"], rows)
        output.line()


def _show_rewrites(output: Output, found: Comparison, worst: int) -> None:
    rows = [
        [
            str(one.rewrite.number),
            one.rewrite.rule if one.rewrite.details else f"{one.rewrite.pass_name}/{one.rewrite.rule}",
            number(one.local),
            number(one.noise),
            one.verdict,
            one.node if one.rewrite.details else one.rewrite.site,
        ]
        for one in found.worst(worst)
    ]
    if rows:
        edits = all(one.rewrite.details for one in found.rewrites)
        table(output, ["#", "edit" if edits else "rewrite", "local", "noise", "found", "at"], rows)
        output.line()


def _show_fault(output: Output, found: Comparison, other: str | None) -> None:
    first, node = found.first, found.unexplained
    if first is not None:
        output.line(
            f"\nfirst divergence: node '{first.node}' is off by {number(first.local)}, where rounding makes "
            f"{number(first.noise)}"
        )
        more = list(dict.fromkeys(one.node for one in found.faults[1:]))
        facts = _facts(first, other) + ([("then", f"{len(more)} more: {', '.join(more[:4])}")] if more else [])
    elif node is not None:
        output.line(
            f"\nnode '{node.node}' is off by {number(node.error)}, where rounding makes {number(node.noise)}, and each "
            "rewrite is right by itself: something runs in another order, past a write in place"
        )
        facts = [("touched", f"by {node.rewrite}" if node.rewrite else "by no rewrite"), ("line", node.line or "-")]
    else:
        return
    for label, text in facts:
        output.console.print(f"  {label:8s} {text}", soft_wrap=True)


def _show_notes(output: Output, found: Comparison) -> None:
    if found.not_finite is not None:
        output.line(f"\nnode '{found.not_finite}' is the first with NaN or infinity where the captured graph has none")
    below = [r for r in found.rewrites if r.verdict == "below rounding"]
    if below:
        largest = max(below, key=lambda r: r.change)
        output.line(
            f"\nnote: {len(below)} compute something else, by less than rounding: {number(largest.change)} at most, in "
            f"'{largest.node}'"
        )
    if found.ok:
        what = "what lossy passes are there for, and rounding" if found.lossy else "only rounding"
        output.line(f"\nnothing diverges: {what}")


def _facts(first: RewriteError, other: str | None) -> list[tuple[str, str]]:
    rewrite = first.rewrite
    facts = [("because", first.explain())]
    if rewrite.details:
        was, now = rewrite.details
        facts += [("was", was), ("now", now)]
        if (line := _line_in_stage(first.node, other)) is not None:
            facts.append(("edited", line))
    else:
        facts += [("rewrite", str(rewrite)), ("rule", rewrite.location or "-")]
    return [*facts, ("against", f"'{first.stands_for}' of the captured graph"), ("line", rewrite.line or "-")]


def _line_in_stage(node: str, stage: str | None) -> str | None:
    """`DIR/000_captured.py:123`: where a stage's file computes the node."""
    if stage is None or not is_stage(stage):
        return None
    text = Path(stage).read_text(encoding="utf-8", errors="replace")
    found = re.search(rf"^ +{re.escape(node)} = ", text, re.MULTILINE)
    return f"{stage}:{text[: found.start()].count(chr(10)) + 1}" if found else None


def _next(output: Output, found: Comparison, graph: str, second: str, reducible: bool) -> None:
    if reducible and not found.ok:
        following(output, f"fuseline reduce {graph} {second} --check error -o small.py", "the fault in few nodes")
    else:
        following(output, f"fuseline diff {graph} {second}", "what differs in the graphs themselves")
