"""`fuseline examine MODEL`: what will be captured, where it breaks, what each pass takes, what stays with PyTorch."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.text import Text

from fuseline.cli import options
from fuseline.cli.environment import versions
from fuseline.cli.output import Output
from fuseline.cli.render import following, megabytes, place, shorten_ops, table
from fuseline.compiler.errors import UserError
from fuseline.compiler.pipeline import Pipeline

if TYPE_CHECKING:
    from fuseline.examination import Examination
    from fuseline.models import LoadedModel

LISTED = 6
FIXED = {
    "size": "numbers until a second value comes (one more capture):",
    "constant": "numbers for good, by the weights or the code:",
    "value": "another value of these is another capture:",
}


def examine(
    model: options.Model,
    pipeline: Annotated[
        str | None, typer.Option("--pipeline", "-p", metavar="PIPELINE", help="Passes; the default ones if left out.")
    ] = None,
    report: Annotated[str | None, typer.Option(metavar="FILE.md", help="Write a report, ready for an issue.")] = None,
    dtype: options.Dtype = None,
    json: options.Json = None,
) -> None:
    """Tell what will become of a model, before anything is compiled.

    Exit code 0 if it is one graph, each pass takes sites, and each region has a
    kernel; 1 otherwise. Example: fuseline examine demo:tiny-llama
    """
    from fuseline.models import load, parse_dtype

    passes = Pipeline(pipeline) if pipeline is not None else None
    path = Path(report) if report is not None else None
    if path is not None and not path.absolute().parent.is_dir():
        raise UserError(f"no such folder: {path.parent}")
    output = Output(json)
    found = _examine(load(model, parse_dtype(dtype)), passes)
    found.model = model
    data = {**found.to_json(), "versions": versions(), "report": str(path) if path is not None else None}
    show(output, data)
    if path is not None:
        path.write_text(str(found), encoding="utf-8")
        output.line(f"report: {path}")
    _next(output, data, pipeline)
    output.write(data)
    if not found.ok:
        raise typer.Exit(1)


def _examine(loaded: LoadedModel, passes: Pipeline | None) -> Examination:
    """A model's call on its example inputs, its dynamic sizes free; what it prints goes to standard error."""
    from fuseline.cli.compiling import capture_model
    from fuseline.examination import examine as examine_call, examine_program

    if loaded.exported is not None:
        return examine_program(loaded.model, lambda: capture_model(loaded), passes)
    names = list(loaded.dynamic_shapes() or {})
    for name, argument in [*zip(names, loaded.example_args, strict=False), *loaded.example_kwargs.items()]:
        for dim in loaded.dynamic.get(name, ()):
            torch._dynamo.maybe_mark_dynamic(argument, dim)
    with torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
        return examine_call(loaded.model, *loaded.example_args, pipeline=passes, **loaded.example_kwargs)


def show(output: Output, data: dict[str, Any]) -> None:
    """The examination as tables, then what is to be looked at, with its remedy."""
    graphs = data["graphs"]
    nodes = f", {graphs[0]['nodes']} nodes" if len(graphs) == 1 else ""
    headline = f"{data['model']}: {_count(len(graphs), 'graph')}{nodes}, {_parameters(data)}"
    output.console.print(Text(f"{headline}\n"), soft_wrap=True)
    if len(graphs) > 1:
        _show_graphs(output, graphs)
    compiled = [graph for graph in graphs if graph["refusal"] is None]
    if compiled:
        _show_passes(output, compiled)
        output.line()
        _show_codegen(output, compiled)
    _show_inputs(output, data)
    for number, finding in enumerate(data["findings"], 1):
        output.line(f"\n{number}. {finding['what']}")
        if finding["where"] is not None:
            code = next((b["code"] for b in data["breaks"] if f"{b['file']}:{b['line']}" == finding["where"]), "")
            output.console.print(Text(f"   at {finding['where']}"), soft_wrap=True)
            if code:
                output.console.print(Text(f"      {code}"), soft_wrap=True)
        if finding["remedy"] is not None:
            output.line(f"   try: {finding['remedy']}")


def _show_graphs(output: Output, graphs: list[dict[str, Any]]) -> None:
    rows = []
    for number, graph in enumerate(graphs):
        launched = sum(one["count"] for one in graph["leftovers"] if not one["view"])
        note = "not compiled" if graph["refusal"] is not None else "for training" if graph["training"] else ""
        lines = [line for one in graph["passes"] for taken in one["taken"] for line in taken["lines"]]
        lines += [line for one in graph["leftovers"] for line in one["lines"]]
        rows.append([str(number), str(graph["nodes"]), str(graph["kernels"]), str(launched), note or place(lines[:1])])
    table(output, ["graph", "nodes", "kernels", "aten", "first line"], rows)
    output.line()


def _show_passes(output: Output, graphs: list[dict[str, Any]]) -> None:
    """One row a pass, over all graphs; then the rules that fired, and refusals by reason with a site and its line."""
    rows, notes = [], []
    for each in zip(*(graph["passes"] for graph in graphs), strict=True):
        taken = [taken for one in each for taken in one["taken"]]
        refused = [refused for one in each for refused in one["refused"]]
        nodes = f"{sum(p['nodes_before'] for p in each)} → {sum(p['nodes_after'] for p in each)}"
        rows.append([each[0]["name"], each[0]["tier"], str(len(taken)), str(len(refused)), nodes])
        rules = Counter(one["rule"] for one in taken)
        if rules:
            notes.append(f"{each[0]['name']}: {', '.join(f'{count} {rule}' for rule, count in rules.items())}")
        for reason, count in Counter(one["reason"] for one in refused).most_common(4):
            first = next(one for one in refused if one["reason"] == reason)
            line = f", {place([first['line']])}" if first["line"] else ""
            notes.append(f"  refused {count}: {reason} ({first['site']}{line}{', …' if count > 1 else ''})")
        near = [one for p in each for one in p["near"]]
        for one in near[:LISTED]:
            where = ", ".join(part for part in (one["module"], place([one["line"]]) if one["line"] else "") if part)
            notes.append(f"  nearly {one['rule']} ({one['fits']} of {one['parts']}): {one['problem']} ({where})")
        if len(near) > LISTED:
            notes.append(f"  … and {len(near) - LISTED} more near misses")
    table(output, ["pass", "tier", "sites", "refused", "nodes"], rows)
    for note in notes:
        output.line(note)


def _show_codegen(output: Output, graphs: list[dict[str, Any]]) -> None:
    kernels, regions = sum(g["kernels"] for g in graphs), sum(g["regions"] for g in graphs)
    if not all(graph["training"] for graph in graphs):
        output.line(f"kernels  {kernels} for {_count(regions, 'region')}")
    fallbacks = [one for graph in graphs for one in graph["fallbacks"]]
    for one in fallbacks:
        output.line(f"aten     {shorten_ops(one['ops'])}: {one['reason']} ({place(one['lines'])})")
    counted: Counter[str] = Counter()
    lines: dict[str, dict[str, None]] = {}
    for one in (one for graph in graphs for one in graph["leftovers"] if not one["view"]):
        op = shorten_ops([one["op"]])
        counted[op] += one["count"]
        lines.setdefault(op, {}).update(dict.fromkeys(one["lines"]))
    if counted:
        ops = ", ".join(f"{count} {op} ({place(list(lines[op]))})" for op, count in counted.most_common())
        output.line(f"aten     outside of regions: {ops}")
    before, after = sum(g["weights_before"] for g in graphs), sum(g["weights_after"] for g in graphs)
    whole = [one for graph in graphs for one in graph["whole"]]
    output.line(f"weights  {megabytes(before)} → {megabytes(after)}")
    for one in whole[:4]:
        output.line(f"  {one['name']} stays {megabytes(one['bytes'])}: {one['reason']}")
    if len(whole) > 4:
        output.line(f"  … and {len(whole) - 4} more, {megabytes(sum(one['bytes'] for one in whole[4:]))}")


def _show_inputs(output: Output, data: dict[str, Any]) -> None:
    inputs = data["graphs"][0]["inputs"] if data["graphs"] else []
    for one in inputs[:LISTED]:
        written = ", written to" if one["mutated"] else ""
        output.line(f"input    {one['name']}: {one['dtype']}[{', '.join(map(str, one['shape']))}]{written}")
    if len(inputs) > LISTED:
        written = sum(one["mutated"] for one in inputs[LISTED:])
        output.line(f"  … and {len(inputs) - LISTED} more, {written} of them written to")
    for kind, text in FIXED.items():
        fixed = [f"{one['name']} = {one['value']}" for one in data["fixed"] if one["kind"] == kind]
        if fixed:
            more = f", … and {len(fixed) - LISTED} more" if len(fixed) > LISTED else ""
            output.line(f"  {text} {', '.join(fixed[:LISTED])}{more}")


def _next(output: Output, data: dict[str, Any], pipeline: str | None) -> None:
    option = f' -p "{pipeline}"' if pipeline is not None else ""
    if data["ok"]:
        following(output, f"fuseline run {data['model']}{option}", "what it does to the results, measured")
    elif data["report"] is None:
        following(output, f"fuseline examine {data['model']}{option} --report report.md", "all sites, for an issue")
    else:
        following(output, f"fuseline examine {data['model']}{option}", "again, once the first remedy is in")


def _parameters(data: dict[str, Any]) -> str:
    each = [
        f"{one['count']} {dtype} parameters ({megabytes(one['bytes'])})" for dtype, one in data["parameters"].items()
    ]
    return ", ".join(each) or "no parameters"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
