"""Running a stage's own Python on its inputs, as `python DIR/001_raise.py` does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from ..binder import Binder
from ..errors import UserError
from ..expressions import Expression, Param
from ..importing import import_file
from ..precision import error, floats
from .tensors import examples, placed


def execute(path: str | Path) -> Any:
    """The outputs of a dumped stage on its inputs, through Python: a `print` in it prints.

    Raises:
        UserError: the stage has no values for its inputs.
    """
    path = Path(path)
    module = import_file(path, f"fuseline_stage_{path.stem}", keep=False)
    flat = examples(module.STAGE["tensors"], path.parent)
    if flat is None:
        remedy = f"fuseline repro {path}" if "pipeline" in module.STAGE else "dump again with tensors=True"
        raise UserError(f"{path.name} holds types and no values", remedy=remedy)
    flat = placed(flat, [*module.STAGE["inputs"].values(), *module.PARAMETERS.values()])
    expressions = [Param(e) if isinstance(e, str) else Expression.from_json(e) for e in module.WEIGHTS.values()]
    binder = Binder(expressions, {name: entry["index"] for name, entry in module.PARAMETERS.items()})
    with torch.no_grad():
        return module.Stage().forward(
            *[flat[entry["index"]] for entry in module.STAGE["inputs"].values()], *binder(flat)
        )


def run_stage(path: str | Path) -> None:
    """Runs a stage and prints its outputs and their error against stage 000."""
    outputs = floats(execute(path))
    first = next(iter(sorted(Path(path).parent.glob("000_*.py"))), None)
    reference = floats(execute(first)) if first is not None and first.name != Path(path).name else outputs
    for position, (actual, expected) in enumerate(zip(outputs, reference, strict=True)):
        sys.stdout.write(f"output {position}: {list(actual.shape)} error {error(actual, expected):.3g}\n")
