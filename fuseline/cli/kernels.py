"""`fuseline kernels MODEL -p PIPELINE`: the kernels that a pipeline leads to, and the lines they serve."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import typer

from fuseline import schemas
from fuseline.cli import options
from fuseline.cli.calibrating import again, passes_and_plan
from fuseline.cli.environment import choose_target, versions
from fuseline.cli.graphs import load_program
from fuseline.cli.offline import compile_all, summarise
from fuseline.cli.output import Output
from fuseline.cli.render import following, show_kernels, table
from fuseline.codegen.lower import Lowered
from fuseline.compiler.errors import UserError, nearest
from fuseline.compiler.pipeline import DEFAULT
from fuseline.runtime.kernel_store import KernelStore
from fuseline.runtime.location import cache_root

SCHEMA = "manifest-1"


def _print_schema(asked: bool) -> None:
    if asked:
        typer.echo(schemas.path(SCHEMA).read_text(encoding="utf-8"), nl=False)
        raise typer.Exit()


def kernels(
    model: options.Model,
    pipeline: options.PipelineText = DEFAULT,
    plan: options.Plan = None,
    dtype: options.Dtype = None,
    only: Annotated[str | None, typer.Option("--kernel", metavar="GLOB", help="Only kernels of such names.")] = None,
    resources: Annotated[bool, typer.Option("--resources", help="Registers and the like, for each GPU.")] = False,
    show: Annotated[str | None, typer.Option(metavar="KERNEL", help="Print this kernel's source.")] = None,
    asm: Annotated[
        str | None, typer.Option(metavar="KIND", help="… as ttir, ttgir, llir, ptx, sass or amdgcn.")
    ] = None,
    target: Annotated[str | None, typer.Option("--for", metavar="GPU", help="… for sm_80, sm_90 or gfx942.")] = None,
    out: Annotated[str | None, typer.Option("--output", "-o", metavar="DIR", help="Write the module here.")] = None,
    schema: Annotated[
        bool, typer.Option("--schema", callback=_print_schema, is_eager=True, help="Print the manifest's JSON Schema.")
    ] = False,
    json: options.Json = None,
) -> None:
    """Compile the kernels offline: ops, source lines, resources."""
    from fuseline.codegen.lower import lower

    if show is None and (asm is not None or target is not None):
        raise UserError("--asm and --for print one kernel's code", remedy="--show KERNEL --asm ptx --for sm_90")
    passes, decided = passes_and_plan(pipeline, plan, model)
    _, notes = choose_target(None, "cpu")
    output = Output(json)
    program, _ = passes.run(load_program(model, dtype), plan=decided)
    lowered = lower(program)
    if show is not None:
        output.write(_show(lowered, show, asm, target, output))
        return
    names = _matching(lowered, only)
    compiled = compile_all(lowered, only=names)
    manifest = lowered.manifest()
    for kernel in manifest["kernels"]:
        if kernel["name"] in compiled:
            kernel["targets"] = compiled[kernel["name"]]
    data: dict[str, Any] = {
        "model": model,
        "pipeline": str(passes),
        "versions": versions(),
        "kernels": [kernel for kernel in summarise(lowered, compiled) if kernel["name"] in names],
        "eager": manifest["eager"],
        "manifest": manifest,
        "notes": notes,
    }
    show_kernels(output, data, limit=None)
    _show_resources(output, compiled, resources)
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
        following(output, f"fuseline kernels {model} {again(passes, plan)} --show {example}", "one kernel's source")
    output.write(data)


def _matching(lowered: Lowered, only: str | None) -> list[str]:
    """The names of the kernels that `--kernel` asks for.

    Raises:
        UserError: there are kernels, and none has such a name.
    """
    names = [kernel.name for kernel in lowered.kernels]
    found = [name for name in names if only is None or fnmatch(name, only)]
    if only is not None and not found:
        raise UserError(f"no kernel is called {only!r}{nearest(only, names)}")
    return found


def _show(lowered: Lowered, name: str, asm: str | None, target: str | None, output: Output) -> dict[str, Any]:
    """Prints one kernel's source, or its code for a target."""
    from fuseline.codegen.assembly import assembly, default_target

    found = {kernel.name: kernel for kernel in lowered.kernels}
    if name not in found:
        raise UserError(f"no kernel {name!r}{nearest(name, found)}")
    if asm is None:
        if target is not None:
            raise UserError("the source is the same for every GPU", remedy=f"--show {name} --asm ptx --for {target}")
        text, asm = found[name].source, "source"
    else:
        target = target or default_target(asm)
        text = assembly(found[name], asm, target, KernelStore())
    print(text, file=output.console.file)  # as it is: a console would expand its tabs
    return {"kernel": name, "kind": asm, "target": target, "text": text}


def _show_resources(output: Output, compiled: dict[str, dict[str, dict[str, Any]]], every: bool) -> None:
    """One row a kernel and target, or the highest figures alone; and which kernels spill."""
    found = [(name, target, of) for name, targets in compiled.items() for target, of in targets.items() if of["ok"]]
    if not found:
        return
    if every:
        headings = ["target", "regs", "spill", "shared", "warps", "stages", "code", "kernel"]
        keys = ("registers", "spill_bytes", "shared_bytes", "num_warps", "num_stages", "code_bytes")
        rows = [
            [target, *("-" if of[key] is None else str(of[key]) for key in keys), name if target == first else ""]
            for name, target, of in found
            for first in [next(t for t, x in compiled[name].items() if x["ok"])]
        ]
        output.line()
        table(output, headings, rows)
        output.line("spill, shared, code in bytes: spilled by a thread, shared by a block, of instructions")
    else:
        highest = []
        for key, unit in (("registers", "registers"), ("shared_bytes", "bytes of shared memory")):
            name, target, of = max(found, key=lambda row: row[2][key] or 0)
            highest.append(f"{of[key]} {unit} ({name}, {target})")
        output.line(f"at most {' and '.join(highest)}")
    spilling = [f"{name} ({target}, {of['spill_bytes']} bytes)" for name, target, of in found if of["spill_bytes"]]
    output.line(f"spilling: {', '.join(spilling)}" if spilling else "no kernel spills registers")
    for reason in dict.fromkeys(reason for *_, of in found for reason in of["unknown"].values()):
        output.line(f"not known (-): {reason}")
