"""What `--dump DIR` leaves: every stage as a runnable file, and the record of the run that `fuseline view` draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fuseline.codegen.lower import Lowered, function_name
from fuseline.compiler.action import Observer
from fuseline.compiler.observe import Dump, Record
from fuseline.compiler.observe.record import add_kernels, read_record, write_record


def dump_observers(directory: str | Path | None) -> list[Observer]:
    """The observers behind `--dump DIR`; none without a directory."""
    return [] if directory is None else [Dump(directory), Record(directory)]


def record_kernels(directory: str | Path, lowered: Lowered) -> None:
    """Adds to a directory's record the kernels that its last stage led to."""
    data = read_record(directory)
    describe_lowered(data, lowered)
    write_record(directory, data)


def describe_lowered(data: dict[str, Any], lowered: Lowered) -> None:
    """Adds the kernels to a record, each with the names of the regions that launch it."""
    regions = {function_name(name): name for name in lowered.regions}
    launched: dict[str, list[str]] = {}
    for launcher in lowered.launchers:
        for kernel in launcher.kernels:
            launched.setdefault(kernel.name, []).append(regions[launcher.name])
    kernels = [
        {
            "name": kernel.name,
            "source": kernel.source,
            "ops": list(kernel.ops),
            "lines": list(kernel.lines),
            "made_by": list(kernel.made_by),
            "warps": kernel.num_warps,
            "stages": kernel.num_stages,
            "regions": launched.get(kernel.name, []),
        }
        for kernel in lowered.kernels
    ]
    add_kernels(data, kernels, [{"region": name, "reason": reason} for name, reason in lowered.refusals.items()])
