"""Dump: every stage of a pipeline as numbered, runnable Python.

DIR/000_captured.py        python DIR/001_raise.py   runs that stage on the captured inputs and
DIR/001_raise.py                                     prints its error against stage 000
DIR/inputs.safetensors     the caller's arguments, parameters included
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..action import Observer
from ..errors import UserError
from ..framework import Pass
from ..program import Program
from ..report import PassReport
from ..stage import Recipe, render, save_examples

if TYPE_CHECKING:
    from ..pipeline import Pipeline


class Dump(Observer):
    """Writes each stage into `directory`, which must be new, empty, or hold an earlier dump of ours.

    Args:
        tensors: also save the example inputs, so that the stages can be run.
    """

    def __init__(self, directory: str | Path, tensors: bool = True):
        self.directory, self.tensors = Path(directory), tensors
        self._stage = 0

    def pipeline_starts(self, pipeline: Pipeline, program: Program) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        foreign = [p.name for p in self.directory.iterdir() if not _is_ours(p)]
        if foreign:
            raise UserError(
                f"{self.directory} holds files that are not a dump's: {', '.join(sorted(foreign)[:3])}",
                remedy="name a new or empty directory",
            )
        for path in self.directory.iterdir():
            if path.is_file():
                path.unlink()
        self._stage = 0
        if self.tensors and program.examples is not None:
            save_examples(program, self.directory)
        self._write("captured", f"captured, before {pipeline}", program)

    def pass_ends(self, step: Pass, program: Program, report: PassReport) -> None:
        self._write(step.name, f"after {step}: {report.matched} rewrites, {len(report.refused)} refused", program)

    def _write(self, name: str, title: str, program: Program) -> None:
        path = self.directory / f"{self._stage:03d}_{name}.py"
        recipe = Recipe("file" if self.tensors else "none")
        path.write_text(render(program, f"Stage {self._stage:03d}: {title}", recipe, path.name), encoding="utf-8")
        self._stage += 1


def _is_ours(path: Path) -> bool:
    return path.name in ("inputs.safetensors", "inputs.json", "record.json", "index.html", "__pycache__") or (
        path.suffix == ".py" and path.name[:3].isdigit() and path.name[3:4] == "_"
    )
