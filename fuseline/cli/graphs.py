"""GRAPH on the command line: a program from a model's spec, a `.pt2` file or a dumped stage."""

from __future__ import annotations

from pathlib import Path

from fuseline.cli.compiling import capture_model
from fuseline.compiler.errors import UserError
from fuseline.compiler.program import Program
from fuseline.compiler.stage import is_stage, load_stage
from fuseline.models import LoadedModel


def load_program(spec: str, dtype: str | None = None) -> Program:
    """The program that a GRAPH names: MODEL or FILE.pt2, captured, or a dumped stage (`DIR/003_fuse.py`).

    Raises:
        UserError: there is no such model or file, or it is not what its name says.
    """
    return load_graph(spec, dtype)[0]


def load_graph(spec: str, dtype: str | None = None) -> tuple[Program, LoadedModel | None]:
    """The program that a GRAPH names, and the model it was captured from; a stage has none."""
    from fuseline.models import load, parse_dtype

    if spec.endswith(".py") and not spec.startswith("py:"):
        if not Path(spec).exists():
            raise UserError(f"no such file: {spec}")
        if not is_stage(spec):
            raise UserError(f"{spec} is a Python file, and not a dumped stage", remedy=f"py:{Path(spec)}:FACTORY")
        return load_stage(spec), None
    loaded = load(spec, parse_dtype(dtype))
    return capture_model(loaded), loaded
