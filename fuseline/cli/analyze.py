"""`fuseline analyze MODEL -p PIPELINE -o plan.json`: has the passes that need data decide, and keeps that as a plan."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fuseline.cli import options
from fuseline.cli.calibrating import DEFAULTS, Size, calibrate
from fuseline.cli.environment import choose_target, versions
from fuseline.cli.output import Output, announce
from fuseline.cli.render import following, megabytes, table
from fuseline.compiler.errors import UserError
from fuseline.compiler.framework import Pass
from fuseline.compiler.pipeline import Pipeline
from fuseline.compiler.plan import Plan


def analyze(
    model: options.Model,
    pipeline: options.RequiredPipeline,
    out: Annotated[str, typer.Option("--output", "-o", metavar="PLAN.json", help="The plan to write.")],
    windows: Annotated[int, typer.Option(metavar="N", min=1, help="Windows of text.")] = DEFAULTS.windows,
    length: Annotated[int, typer.Option(metavar="T", min=2, help="Tokens of each.")] = DEFAULTS.length,
    batch: Annotated[int, typer.Option(metavar="B", min=1, help="Windows a call.")] = DEFAULTS.batch,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="FILE", help="Keep progress here, and go on from it.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a plan.")] = False,
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    json: options.Json = None,
) -> None:
    """Let passes that need data decide, and write their plan."""
    from fuseline.models import load, parse_dtype

    passes = Pipeline(pipeline)
    if not passes.needs_data:
        raise UserError(
            f"no pass of '{passes}' decides from data",
            remedy=f'fuseline run {model} -p "{passes}", which needs no plan',
        )
    path = _check_path(out, force)
    choose_target(None, device)
    output = Output(json)
    loaded = load(model, parse_dtype(dtype)).to(device)
    announce("capturing and analysing")
    try:
        plan, said = calibrate(loaded, passes, Size(windows, length, batch), checkpoint)
    except KeyboardInterrupt:
        if checkpoint is not None and Path(checkpoint).exists():
            print(f"stopped: the same command goes on from {checkpoint}", file=sys.stderr)
        raise
    plan.save(path)
    data: dict[str, Any] = {
        "model": model,
        "pipeline": str(passes),
        "path": str(path),
        "calibration": said,
        "device": device,
        "versions": versions(),
        "passes": [_decided(step, plan) for step in passes.passes if step.needs_data],
    }
    _show(output, data)
    size = sum(file.stat().st_size for file in _files(path))
    output.line(f"\n{path}: {megabytes(size)}, with {path.with_suffix('.safetensors').name} beside it")
    following(output, f"fuseline run {model} --plan {path}", "the pipeline with its plan, measured")
    output.write(data)


def _files(path: Path) -> tuple[Path, Path]:
    return path, path.with_suffix(".safetensors")


def _check_path(out: str, force: bool) -> Path:
    """A path that a plan can be written to.

    Raises:
        UserError: another ending than .json, a folder that is not there, or files that are.
    """
    path = Path(out)
    if path.suffix != ".json":
        raise UserError(f"{out!r} does not end in .json", remedy=f"-o {path.with_suffix('.json')}")
    if not path.parent.is_dir():
        raise UserError(f"no such folder: {path.parent}")
    there = [file for file in _files(path) if file.exists()]
    if there and not force:
        raise UserError(f"{there[0]} exists already", remedy="another -o, or --force to replace it")
    return path


def _decided(step: Pass, plan: Plan) -> dict[str, Any]:
    decisions = plan.of(step.name)
    found = step.findings(decisions)
    return {
        "name": step.name,
        "text": str(step),
        "headings": found.headings,
        "rows": found.rows,
        "lines": found.lines,
        "sites": {site: decision.structure for site, decision in decisions.items()},
    }


def _show(output: Output, data: dict[str, Any]) -> None:
    output.line(f"{data['model']}: calibrated on {data['calibration']}")
    for one in data["passes"]:
        output.line(f"\n{one['text']}")
        if one["rows"]:
            table(output, one["headings"], one["rows"])
        for line in one["lines"]:
            output.line(line)
