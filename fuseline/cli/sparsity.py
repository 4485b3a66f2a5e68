"""`fuseline sparsity MODEL`: what each product reads, and what a threshold would leave of it."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer

from fuseline.calibrate import flat_arguments
from fuseline.cli import options
from fuseline.cli.calibrating import DEFAULTS, Size, calibration_calls, capture_calls
from fuseline.cli.environment import choose_target, versions
from fuseline.cli.output import Output, announce
from fuseline.cli.render import following, table
from fuseline.compiler.errors import UserError
from fuseline.compiler.pipeline import Pipeline

BINS = 16
BARS = " ▁▂▃▄▅▆▇█"


def sparsity(
    model: options.Model,
    pipeline: Annotated[str, typer.Option("--pipeline", "-p", metavar="PIPELINE", help="Passes before.")] = "raise",
    keep: Annotated[
        list[float] | None, typer.Option("--keep", metavar="F", help="Shares of the channels (several times).")
    ] = None,
    score: Annotated[str, typer.Option(metavar="SCORE", help="abs or norm-weighted.")] = "abs",
    windows: Annotated[int, typer.Option(metavar="N", min=1, help="Windows of text.")] = 8,
    length: Annotated[int, typer.Option(metavar="T", min=2, help="Tokens of each.")] = DEFAULTS.length,
    batch: Annotated[int, typer.Option(metavar="B", min=1, help="Windows a call.")] = DEFAULTS.batch,
    every: Annotated[bool, typer.Option("--all", help="A row for every group of products.")] = False,
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    json: options.Json = None,
) -> None:
    """Show activations by site, thresholds, and what they keep."""
    from fuseline.models import load, parse_dtype
    from fuseline.passes.sparsity.inspect import inspect
    from fuseline.passes.sparsity.options import Score

    kept = keep or [0.25, 0.5, 0.75]
    if not all(0 < share < 1 for share in kept):
        raise UserError("--keep is a share of the channels, above 0 and below 1", remedy="--keep 0.5")
    if score not in [one.value for one in Score]:
        raise UserError(f"--score {score}: channels are compared by abs or norm-weighted", remedy="--score abs")
    choose_target(None, device)
    output = Output(json)
    loaded = load(model, parse_dtype(dtype)).to(device)
    announce("capturing and reading activations")
    with torch.no_grad():
        calls, said = calibration_calls(loaded, Size(windows, length, batch))
        captured = capture_calls(loaded, calls)
        data = flat_arguments(captured, calls)
        program, _ = Pipeline(pipeline).run(captured)
        seen = inspect(program, data, Score(score), kept, BINS)
    output.line(f"{model}: the inputs of {len(seen.groups)} groups of products, on {said}\n")
    _show(output, seen.groups, kept, every)
    for count, reason in seen.reasons():
        output.line(f"{count} x left out: {reason}")
    output.line("cells: threshold, and the share of Σx² that it keeps; sizes: |x| from 0 to its 99.9% quantile")
    following(
        output, f'fuseline analyze {model} -p "raise,rsparse{{budget=0.5}}" -o plan.json', "thresholds, as a plan"
    )
    output.write(
        {
            "model": model,
            "calibration": said,
            "score": score,
            "versions": versions(),
            "groups": seen.groups,
            "left_out": seen.refused,
        }
    )


def _show(output: Output, groups: list[dict[str, Any]], kept: list[float], every: bool) -> None:
    """A row a group, or one for the groups of a kind: means, and the histogram of all of them."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        kind = group["kind"].replace("_proj", "")
        place = ".".join(group["block"].split(".")[-2:])
        kinds.setdefault(f"{place} {kind}".strip() if every else kind, []).append(group)
    rows = []
    for name, ones in kinds.items():
        mean = lambda key, i, ones=ones: sum(one[key][i] for one in ones) / len(ones)
        bars = [sum(one["histogram"][b] for one in ones) for b in range(BINS)]
        figures = [f"{mean('thresholds', i):.3g} {mean('energy', i):.0%}" for i in range(len(kept))]
        rows.append([name, str(len(ones)), *figures, spark(bars)])
    table(output, ["inputs of", "count", *(f"keep {share:.0%}" for share in kept), "sizes"], rows)


def spark(counts: list[float]) -> str:
    """Counts as bars, on a logarithmic scale of three decades."""
    import math

    top = max(counts) or 1
    level = lambda c: 0 if c <= 0 else max(1, round((len(BARS) - 1) * (1 + math.log10(c / top) / 3)))
    return "".join(BARS[min(level(c), len(BARS) - 1)] for c in counts)
