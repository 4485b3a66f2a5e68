"""`fuseline export MODEL -p PIPELINE -o DIR`: a rotated or quantized model as a checkpoint that other tools load."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer

from fuseline.cli import options
from fuseline.cli.calibrating import needs_plan
from fuseline.cli.compiling import capture_model
from fuseline.cli.data import pass_data
from fuseline.cli.environment import versions
from fuseline.cli.output import Output
from fuseline.cli.render import following, number, table
from fuseline.compiler.pipeline import Pipeline
from fuseline.compiler.plan import Plan
from fuseline.compiler.progress import bar


def export(
    model: options.Model,
    pipeline: options.RequiredPipeline,
    out: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="A new folder.")],
    plan: options.Plan = None,
    format: Annotated[
        str, typer.Option(metavar="FORMAT", help="hf, without quantization, or compressed-tensors.")
    ] = "hf",
    check: Annotated[bool, typer.Option("--check/--no-check", help="Load it again and compare.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint.")] = False,
    dtype: options.Dtype = None,
    json: options.Json = None,
) -> None:
    """Write rotated or quantized weights as a checkpoint."""
    from fuseline.exporting import check_target, export_program
    from fuseline.models import load, parse_dtype

    passes = Pipeline(pipeline)
    decided = None if plan is None else Plan.load(plan)  # may be a longer pipeline's
    if passes.needs_data and decided is None:
        raise needs_plan(passes, model)
    check_target(out, format, force)
    output = Output(json)
    loaded = load(model, parse_dtype(dtype))
    captured = capture_model(loaded)
    inputs = loaded.example_args, loaded.example_kwargs
    with bar("planning") as progress:

        def show(done: int, total: int, what: str) -> None:
            progress.update(progress.task_ids[0], completed=done, total=total or None, description=what)

        written = export_program(
            loaded.model,
            captured,
            inputs,
            out,
            passes,
            plan=decided,
            format=format,
            check=check,
            force=force,
            progress=show,
        )
    data: dict[str, Any] = {
        "model": model,
        "versions": versions(),
        "pipeline": str(passes),
        "passes": [pass_data(report) for report in written.passes],
        **written.to_json(),
    }
    _show(output, data)
    if data["transforms"] is not None:
        following(output, "docs/saving.md", "how rotations at run time are loaded")
    elif (data["quantization"] or {}).get("kv_cache_scheme") is not None:
        following(output, "docs/saving.md", "who reads a kv_cache_scheme")
    else:
        following(output, f"fuseline run hf:{out}", "what was written, as any other model")
    output.write(data)


def _show(output: Output, data: dict[str, Any]) -> None:
    output.line(f"{data['model']} → {data['path']}")
    changed, neutral, copied, unread = (data[key] for key in ("changed", "neutral", "copied", "unread"))
    output.line(f"weights    {changed} changed, {neutral} norm weights folded away, {copied} as they were")
    if unread:
        output.line(f"           {len(unread)} of these the graph does not read: {', '.join(unread[:3])}")
    rows = []
    for one in data["rotations"]:
        seed = "-" if one["seed"] is None else str(one["seed"])
        counts = [sum(site["how"] == how for site in one["sites"]) for how in ("folded", "online")]
        rows.append([one["kind"], str(one["block"]), seed, *map(str, counts)])
    table(output, ["rotation", "block", "seed", "folded", "online"], rows)
    for report in data["passes"]:
        for reason, count in Counter(report["refused"].values()).most_common():
            output.line(f"{report['name']} refused {count}: {reason}")
    if data["transforms"] is not None:
        groups = data["transforms"]["config_groups"].items()
        named = ", ".join(f"{name} ({group['type']} {group['head_dim']})" for name, group in groups)
        output.line(f"online     {named}: transform_config of compressed-tensors")
    if data["quantization"] is not None:
        _show_codes(output, data["quantization"])
    if data["error"] is not None:
        output.line(f"checked    loaded again, the outputs differ by {number(data['error'])} of the largest")
    else:
        output.line(f"unchecked  {data['unchecked']}")


def _show_codes(output: Output, config: dict[str, Any]) -> None:
    for group in config["config_groups"].values():
        inputs = "" if group["input_activations"] is None else f", inputs {_scheme(group['input_activations'])}"
        what = f"{group['format']}, weights {_scheme(group['weights'])}{inputs}"
        count = "" if group["targets"] == ["Linear"] else f" of {len(group['targets'])} linears"
        output.line(f"codes      {what}{count}")
    if config["kv_cache_scheme"] is not None:
        output.line(f"           keys and values {_scheme(config['kv_cache_scheme'])}")
    if config["ignore"]:
        more = ", …" if len(config["ignore"]) > 3 else ""
        output.line(f"           {len(config['ignore'])} linears as they were: {', '.join(config['ignore'][:3])}{more}")


def _scheme(arguments: dict[str, Any]) -> str:
    """`int4:g64:asym`, as in a pipeline."""
    group = f"g{arguments['group_size']}" if arguments["group_size"] else arguments["strategy"]
    symmetry = "sym" if arguments["symmetric"] else "asym"
    return f"{arguments['type']}{arguments['num_bits']}:{group}:{symmetry}"
