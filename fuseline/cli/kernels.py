"""`fuseline kernels MODEL -p PIPELINE`: the kernels that a pipeline leads to, and the lines they serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fuseline.cli import options
from fuseline.cli.compiling import capture_model
from fuseline.cli.environment import choose_target, versions
from fuseline.cli.offline import describe_kernels
from fuseline.cli.output import Output
from fuseline.cli.render import following, show_kernels
from fuseline.compiler.errors import UserError, nearest
from fuseline.compiler.pipeline import DEFAULT, Pipeline
from fuseline.runtime.location import cache_root


def kernels(
    model: options.Model,
    pipeline: options.PipelineText = DEFAULT,
    dtype: options.Dtype = None,
    show: Annotated[str | None, typer.Option(metavar="KERNEL", help="Print this kernel's source.")] = None,
    out: Annotated[str | None, typer.Option("--output", "-o", metavar="DIR", help="Write the module here.")] = None,
    json: options.Json = None,
) -> None:
    """Compile the kernels offline; list their ops and source lines."""
    from fuseline.codegen.lower import lower
    from fuseline.models import load, parse_dtype

    passes = Pipeline(pipeline)
    _, notes = choose_target(None, "cpu")
    output = Output(json)
    loaded = load(model, parse_dtype(dtype))
    program, _ = passes.run(capture_model(loaded))
    lowered = lower(program)
    if show is not None:
        found = {kernel.name: kernel for kernel in lowered.kernels}
        if show not in found:
            raise UserError(f"no kernel {show!r}{nearest(show, found)}")
        output.console.print(found[show].source, soft_wrap=True)
        return
    data: dict[str, Any] = {
        "model": model,
        "pipeline": str(passes),
        "versions": versions(),
        "kernels": describe_kernels(lowered),
        "eager": [{"region": name, "reason": reason} for name, reason in lowered.refusals.items()],
        "notes": notes,
    }
    show_kernels(output, data, limit=None)
    found, total = (sum(len(k[key]) for k in data["kernels"]) for key in ("cached", "targets"))
    if total:
        every = "nothing was compiled: all of it was" if found == total else f"{total - found} compiled, {found} were"
        output.line(f"{every} in the cache ({cache_root()})")
    if not data["kernels"]:
        output.line(f"no kernels: {len(program)} nodes, none in a region (the pass 'fuse' makes regions)")
    reasons = [item["reason"] for item in data["eager"]]
    for reason in dict.fromkeys(reasons):
        output.line(f"through PyTorch: {reasons.count(reason)} regions, {reason}")
    if out is not None:
        data["path"] = str(lowered.write(Path(out)))
        output.line(f"written to {data['path']}")
    for note in notes:
        output.line(f"note: {note}")
    if data["kernels"]:
        example = data["kernels"][0]["name"]
        following(output, f'fuseline kernels {model} -p "{passes}" --show {example}', "one kernel's source")
    output.write(data)
