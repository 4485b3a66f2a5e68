"""`fuseline sparsity MODEL`: what each product reads, and what a threshold would leave of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from fuseline.calibrate import flat_arguments
from fuseline.cli import options
from fuseline.cli.calibrating import DEFAULTS, Size, calibration_calls, capture_calls
from fuseline.cli.charts import Series, chart, front
from fuseline.cli.environment import choose_target, versions
from fuseline.cli.output import Output, announce
from fuseline.cli.render import following, table
from fuseline.compiler.errors import UserError
from fuseline.compiler.pipeline import Pipeline
from fuseline.runtime.tensor_store import TensorStore

if TYPE_CHECKING:
    from fuseline.passes.sparsity.front import Searched

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
    budget: Annotated[
        list[float] | None,
        typer.Option("--budget", metavar="F", help="Search at this share of the bytes (several times)."),
    ] = None,
    trials: Annotated[int, typer.Option(metavar="N", min=1, help="Candidates of each search.")] = 16,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE.svg", help="Draw what the searches measured, and their front.")
    ] = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    json: options.Json = None,
) -> None:
    """Show activations, what thresholds keep, and what budgets cost."""
    from fuseline.compiler.framework import Study
    from fuseline.models import load, parse_dtype
    from fuseline.passes.sparsity import RSparse
    from fuseline.passes.sparsity.front import searched
    from fuseline.passes.sparsity.inspect import inspect
    from fuseline.passes.sparsity.options import Score

    kept = keep or [0.25, 0.5, 0.75]
    if not all(0 < share < 1 for share in kept):
        raise UserError("--keep is a share of the channels, above 0 and below 1", remedy="--keep 0.5")
    if score not in [one.value for one in Score]:
        raise UserError(f"--score {score}: channels are compared by abs or norm-weighted", remedy="--score abs")
    if plot is not None and not plot.endswith(".svg"):
        raise UserError(f"{plot}: plots are written as SVG", remedy="--plot front.svg")
    if plot is not None and not budget:
        raise UserError("--plot draws the costs of budgets, and none is given", remedy="--budget 0.7 --budget 0.5")
    steps = [RSparse(budget=share, trials=trials, score=Score(score)) for share in budget or ()]
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
        study = Study(program, data, results=TensorStore())
        fronts = searched(steps[0], study, [one.budget for one in steps]) if steps else []
    output.line(f"{model}: the inputs of {len(seen.groups)} groups of products, on {said}\n")
    _show(output, seen.groups, kept, every)
    for count, reason in seen.reasons():
        output.line(f"{count} x left out: {reason}")
    output.line("cells: threshold, and the share of Σx² that it keeps; sizes: |x| from 0 to its 99.9% quantile")
    if fronts:
        output.line("")
        _show_budgets(output, fronts)
    if plot is not None:
        Path(plot).write_text(drawn(f"{model}: bytes that are read, and what that costs", fronts), encoding="utf-8")
        output.line(f"drawn: {plot}")
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
            "budgets": [asdict(one) for one in fronts],
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


def _show_budgets(output: Output, fronts: list[Searched]) -> None:
    """A row a budget: the losses of what costs no search, of the best candidate, and what would be kept."""
    names = list(fronts[0].measured)
    rows = [
        [f"{one.budget:.0%}", *(f"{one.measured[name]:.4g}" for name in names), one.held_out["kept"]] for one in fronts
    ]
    table(output, ["budget", *names, "kept"], rows)
    output.line("cells: loss on the search's calls (KL in nats a position for a model with logits)")
    output.line("kept: searched where it is better beyond noise on calls that the search did not see")


def drawn(title: str, fronts: Sequence[Searched]) -> str:
    """All that was measured as points; lines through uniform shares, the closed form, and the front of all."""
    points = [(one.read, loss) for one in fronts for loss in one.losses]
    lines = {name: [(one.read, one.measured[name]) for one in fronts] for name in ("uniform", "sensitivity")}
    series = [Series("candidates", points, line=False, faint=True)]
    series += [Series(name, line) for name, line in lines.items()]
    return chart(title, "bytes read", "loss", [*series, Series("front", front(points))])


def spark(counts: list[float]) -> str:
    """Counts as bars, on a logarithmic scale of three decades."""
    import math

    top = max(counts) or 1
    level = lambda c: 0 if c <= 0 else max(1, round((len(BARS) - 1) * (1 + math.log10(c / top) / 3)))
    return "".join(BARS[min(level(c), len(BARS) - 1)] for c in counts)
