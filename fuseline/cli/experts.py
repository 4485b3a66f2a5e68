"""`fuseline experts MODEL`: how a mixture's experts are chosen, how alike they are, and what a merge would do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fuseline.calibrate import flat_arguments
from fuseline.cli import options
from fuseline.cli.calibrating import DEFAULTS, Size, calibration_calls, capture_calls
from fuseline.cli.environment import choose_target, versions
from fuseline.cli.output import Output, announce
from fuseline.cli.render import following, table
from fuseline.cli.sparsity import BARS
from fuseline.compiler.errors import UserError
from fuseline.compiler.framework import Study
from fuseline.compiler.pipeline import Pipeline

MERGE = "merge-experts"


def experts(
    model: options.Model,
    merge: Annotated[
        str, typer.Option("--pipeline", "-p", metavar="PIPELINE", help="Passes before, and merge-experts last.")
    ] = f"raise,{MERGE}",
    plot: Annotated[str | None, typer.Option(metavar="FILE.svg", help="Draw frequencies and likeness.")] = None,
    windows: Annotated[int, typer.Option(metavar="N", min=1, help="Windows of text.")] = 8,
    length: Annotated[int, typer.Option(metavar="T", min=2, help="Tokens of each.")] = DEFAULTS.length,
    batch: Annotated[int, typer.Option(metavar="B", min=1, help="Windows a call.")] = DEFAULTS.batch,
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    json: options.Json = None,
) -> None:
    """Show how a mixture's experts are used, and what merges."""
    from fuseline.cli.expert_plots import draw
    from fuseline.models import load, parse_dtype

    *before, step = _passes(merge)
    if plot is not None and not plot.endswith(".svg"):
        raise UserError(f"{plot}: plots are written as SVG", remedy="--plot experts.svg")
    choose_target(None, device)
    output = Output(json)
    loaded = load(model, parse_dtype(dtype)).to(device)
    announce("capturing and watching experts")
    with torch.no_grad():
        calls, said = calibration_calls(loaded, Size(windows, length, batch))
        captured = capture_calls(loaded, calls)
        data = flat_arguments(captured, calls)
        program, _ = Pipeline(before).run(captured)
        found = _watched(model, program, data)
        decisions = step.decide(Study(program, data))
    for one in found:
        one["merge"] = decisions[one["site"]].structure if one["site"] in decisions else None
    output.line(f"{model}: {len(found)} layers of experts, on {said}\n")
    table(
        output, ["layer", "experts", "top", "tokens each", "by frequency", "most alike"], [_row(one) for one in found]
    )
    merged = step.findings(decisions)
    output.line(f"\n{step}:")
    table(output, merged.headings, merged.rows)
    for line in merged.lines:
        output.line(line)
    output.line("by frequency: a bar for the experts from the most to the least chosen one; alike: cosine of outputs")
    if plot is not None:
        Path(plot).write_text(draw(model, found), encoding="utf-8")
        output.line(f"drawn: {plot}")
    following(output, f'fuseline analyze {model} -p "{merge}" -o plan.json', "this merge, as a plan")
    output.write({"model": model, "calibration": said, "pipeline": merge, "versions": versions(), "layers": found})


def _passes(text: str) -> Any:
    passes = Pipeline(text).passes
    if not passes or passes[-1].name != MERGE:
        raise UserError(f"'{text}' does not end with {MERGE}", remedy=f'-p "raise,{MERGE}{{method=reap}}"')
    return passes


def _watched(model: str, program: Any, data: Any) -> list[dict[str, Any]]:
    """A record a layer: site, experts, frequency, gates, reap, likeness."""
    from fuseline.compiler.sites import sites
    from fuseline.passes.merging.grouping import cosines
    from fuseline.passes.merging.layers import Layer, layers
    from fuseline.passes.merging.statistics import statistics

    names = sites(program.graph)
    found = [layer for layer in layers(program) if isinstance(layer, Layer)]
    if not found:
        raise UserError(
            f"{model} has no layer of routed experts that raise recognises",
            ["a layer is a sum over experts that a topk chooses, each with a gated unit between two products"],
            "fuseline why MODEL -p raise    what the rules looked for",
        )
    records = []
    for layer, seen in statistics(program, found, data).items():
        records.append(
            {
                "site": names[layer.node],
                "path": layer.path,
                "experts": layer.experts,
                "chosen": layer.chosen,
                "bytes": layer.bytes,
                "tokens": [int(n) for n in seen.tokens.tolist()],
                "frequency": seen.frequency.tolist(),
                "gates": seen.gates.tolist(),
                "reap": seen.reap.tolist(),
                "likeness": cosines(seen.outputs).tolist(),
            }
        )
    return records


def _row(one: dict[str, Any]) -> list[str]:
    count, likeness = one["experts"], one["likeness"]
    pair = max(((i, j) for i in range(count) for j in range(i)), key=lambda p: likeness[p[0]][p[1]], default=None)
    alike = "-" if pair is None else f"{pair[1]}, {pair[0]}: {likeness[pair[0]][pair[1]]:.2f}"
    place = ".".join(one["path"].split(".")[-3:])
    spread = f"{min(one['tokens'])} … {max(one['tokens'])}"
    return [place, str(count), str(one["chosen"]), spread, _bars(one["frequency"]), alike]


def _bars(frequency: list[float], width: int = 16) -> str:
    """Frequencies from the largest on as bars of equal numbers of experts."""
    ordered = sorted(frequency, reverse=True)
    parts = [ordered[i * len(ordered) // width : (i + 1) * len(ordered) // width] for i in range(width)]
    means = [sum(part) / len(part) for part in parts if part]
    top = max(means) or 1.0
    return "".join(BARS[max(1, round((len(BARS) - 1) * mean / top)) if mean else 0] for mean in means)
