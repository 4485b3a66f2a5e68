"""Dump: every stage of a pipeline as numbered, runnable Python.

DIR/000_captured.py        python DIR/001_raise.py   runs that stage on the captured inputs and
DIR/001_raise.py                                     prints its error against stage 000
DIR/inputs.safetensors     the caller's arguments, parameters included
"""

from __future__ import annotations

import importlib.util
import json
import pprint
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from ..action import Observer
from ..binder import Binder
from ..errors import UserError
from ..expressions import Expression
from ..framework import Pass
from ..program import Program
from ..report import PassReport
from .numerics import error, floats

if TYPE_CHECKING:
    from ..pipeline import Pipeline

_HEADER = '''"""Stage {number:03d}: {title}

Run this file to execute the stage on the captured inputs; edit `forward` and run it again.
"""

from math import inf, nan

import torch
from torch import device

import fuseline

WEIGHTS = {weights}
SOURCES = {sources}
ARGUMENTS = {arguments}


class Stage:
'''
_FOOTER = """

if __name__ == "__main__":
    from fuseline.compiler.observe.dump import run_stage

    run_stage(__file__)
"""


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
            _save_inputs(self.directory, program)
        self._write("captured", f"captured, before {pipeline}", program)

    def pass_ends(self, step: Pass, program: Program, report: PassReport) -> None:
        self._write(step.name, f"after {step}: {report.matched} rewrites, {len(report.refused)} refused", program)

    def _write(self, name: str, title: str, program: Program) -> None:
        path = self.directory / f"{self._stage:03d}_{name}.py"
        path.write_text(render(program, title, self._stage))
        self._stage += 1


def render(program: Program, title: str, number: int = 0) -> str:
    """A program as one runnable file; regions become methods of the stage."""
    module, expressions = program.lift()
    header = _HEADER.format(
        number=number,
        title=title,
        weights=_literal([e.to_json() for e in expressions]),
        sources=_literal({s.name: s.index for s in program.sources.values()}),
        arguments=program.arguments,
    )
    methods = [_method(module, "forward")]
    for node in module.graph.nodes:
        if node.op == "call_module":
            inner = module.get_submodule(str(node.target))
            assert isinstance(inner, GraphModule)
            methods.append(_method(inner, str(node.target)))
    return header + "\n\n".join(methods) + _FOOTER


def _method(module: GraphModule, name: str) -> str:
    source = module.graph.python_code("self").src
    source = source[source.index("def forward(") :].replace("def forward(", f"def {name}(", 1)
    return "\n".join(f"    {line}".rstrip() for line in source.rstrip().splitlines())


def _literal(value: Any) -> str:
    return pprint.pformat(value, indent=1, width=110, compact=True, sort_dicts=False)


def _is_ours(path: Path) -> bool:
    return path.name in ("inputs.safetensors", "inputs.json", "__pycache__") or (
        path.suffix == ".py" and path.name[:3].isdigit() and path.name[3:4] == "_"
    )


def _save_inputs(directory: Path, program: Program) -> None:
    from safetensors.torch import save_file

    flat = list(program.examples or ())
    tensors = {f"argument_{i}": x.detach().clone().contiguous() for i, x in enumerate(flat) if torch.is_tensor(x)}
    save_file(tensors, directory / "inputs.safetensors")
    plain = (bool, int, float, str)
    rest = {
        str(i): x if isinstance(x, plain) else int(x)
        for i, x in enumerate(flat)
        if isinstance(x, (*plain, torch.SymInt))
    }
    (directory / "inputs.json").write_text(json.dumps({"count": len(flat), "numbers": rest}))


def load_stage(path: str | Path) -> Any:
    """A dumped stage's module, imported from its file."""
    spec = importlib.util.spec_from_file_location(f"fuseline_stage_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a dumped stage")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def execute(path: str | Path) -> Any:
    """The outputs of a dumped stage on its captured inputs."""
    from safetensors.torch import load_file

    path = Path(path)
    if not (path.parent / "inputs.safetensors").exists():
        raise UserError(f"{path.parent} holds no inputs.safetensors", remedy="dump again with tensors=True")
    record = json.loads((path.parent / "inputs.json").read_text())
    flat: list[Any] = [record["numbers"].get(str(i)) for i in range(record["count"])]
    for name, tensor in load_file(path.parent / "inputs.safetensors").items():
        flat[int(name.removeprefix("argument_"))] = tensor
    module = load_stage(path)
    binder = Binder([Expression.from_json(e) for e in module.WEIGHTS], module.SOURCES)
    with torch.no_grad():
        return module.Stage().forward(*[flat[i] for i in module.ARGUMENTS], *binder(flat))


def run_stage(path: str | Path) -> None:
    """Runs a stage and prints its outputs and their error against stage 000."""
    outputs = floats(execute(path))
    first = next(iter(sorted(Path(path).parent.glob("000_*.py"))), None)
    reference = floats(execute(first)) if first is not None and first.name != Path(path).name else outputs
    for position, (actual, expected) in enumerate(zip(outputs, reference, strict=True)):
        sys.stdout.write(f"output {position}: {list(actual.shape)} error {error(actual, expected):.3g}\n")
