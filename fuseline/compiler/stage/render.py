"""A program as a stage: one statement a node, with its type and, where they change, the module and the user's line.

The class `Stage` is ordinary Python over `torch.ops`; the tables below it hold what Python cannot say: what the inputs
and weights are, and where each node comes from.
"""

from __future__ import annotations

import math
import operator
import pprint
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..compat import symbol_bounds, symbols_in
from ..expressions import Expression, Param
from ..program import Program
from ..provenance import makers, module_path, source_line
from ..structure import describe_value
from .tensors import Recipe

FORMAT = 1
_HEADER = '''"""{title}

Run this file to execute the stage on its inputs. Edit `forward` (one call of an op a line), and run it again or go on
from here: fuseline opt {file} -p PIPELINE
"""

import math
import operator
from math import inf, nan

import torch

import fuseline


class Stage:
'''
_ARGUMENTS = ("placeholder", "get_attr")  # in the order of a method's arguments: inputs, then weights
_FOOTER = """

if __name__ == "__main__":
    from fuseline.compiler.stage import run_stage

    run_stage(__file__)
"""


def render(program: Program, title: str, recipe: Recipe | None = None, file: str = "FILE.py", **notes: Any) -> str:
    """A program as the text of a stage; regions become methods.

    Args:
        recipe: where the inputs' and parameters' values come from.
        file: the name to print in the instructions.
        notes: further entries of the table `STAGE` (a reproducer's pipeline and check).
    """
    names = canonical_symbols(program)
    regions = {name: str(module.meta.get("kind", "")) for name, module in _regions(program).items()}
    tables = {
        "STAGE": {
            "format": FORMAT,
            "inputs": dict(_inputs(program, names)),
            "symbols": _symbols(program, names),
            "training": program.training,
            "state": sorted(program.state),
            "regions": regions,
            "tensors": (recipe or Recipe()).to_json(program),
            **notes,
        },
        "WEIGHTS": {node.name: _weight(node.meta["weight"]) for node in program.weights()},
        "PARAMETERS": {name: _parameter(source) for name, source in program.sources.items()},
        "ORIGINS": _origins(program.module),
    }
    text = "\n\n".join(f"{name} = {_literal_table(value)}" for name, value in tables.items())
    return f"{_HEADER.format(title=title, file=file)}{code(program)}\n\n\n{text}\n{_FOOTER}"


def code(program: Program) -> str:
    """The methods of a stage alone: what the program computes, a statement a node."""
    names = canonical_symbols(program)
    methods = [_method(program.module, "forward", names)]
    methods += [_method(module, name, names) for name, module in _regions(program).items()]
    return "\n\n".join(methods)


def _regions(program: Program) -> dict[str, GraphModule]:
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_module"]
    return {target: program.module.get_submodule(target) for target in targets}  # type: ignore[misc]


def canonical_symbols(program: Program) -> dict[str, str]:
    """Symbol → s0, s1, … in the order of the inputs, so that the same program reads the same in every process."""
    found: dict[str, None] = {}
    for node in program.graph.nodes:
        for symbol in symbols_in(node.meta.get("val")):
            found[symbol] = None
    return {symbol: f"s{i}" for i, symbol in enumerate(found)}


def _method(module: GraphModule, name: str, symbols: dict[str, str]) -> str:
    nodes = list(module.graph.nodes)
    arguments = ", ".join(["self", *(n.name for op in _ARGUMENTS for n in nodes if n.op == op)])
    lines = [f"    def {name}({arguments}):"]
    place = None
    for node in nodes:
        if node.op == "output":
            lines.append(f"        return {literal(node.args[0])}")
        elif node.op not in _ARGUMENTS:
            here = (module_path(node), source_line(node))
            if here != place and any(here):
                place = here
                short = (here[1] or "").replace("\\", "/").rpartition("/")[2]
                lines.append(f"        # {here[0] or 'the model'}    {short}".rstrip())
            lines.append(f"        {statement(node)}  # {rename(describe_value(node.meta.get('val')), symbols)}")
    return "\n".join(lines)


def statement(node: Node) -> str:
    """A node as an assignment."""
    target = f"self.{node.target}" if node.op == "call_module" else target_name(node.target)
    words = [*map(literal, node.args), *(f"{k}={literal(v)}" for k, v in node.kwargs.items())]
    return f"{node.name} = {target}({', '.join(words)})"


def target_name(target: Any) -> str:
    """The Python expression that names an op or a function."""
    if isinstance(target, torch._ops.OpOverload):
        return f"torch.ops.{target}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"torch.ops.higher_order.{target.name()}"
    module = str(target.__module__).removeprefix("_")
    name = getattr(target, "__qualname__", target.__name__)
    return f"{'operator' if getattr(operator, name, None) is target else module}.{name}"


def literal(value: Any) -> str:
    """An argument of a node as Python."""
    if isinstance(value, Node):
        return value.name
    if isinstance(value, tuple):
        return f"({', '.join(map(literal, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k!r}: {literal(v)}' for k, v in value.items())}}}"
    if isinstance(value, float) and not math.isfinite(value):
        return "math.nan" if value != value else ("math.inf" if value > 0 else "-math.inf")
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, slice):
        return f"slice({literal(value.start)}, {literal(value.stop)}, {literal(value.step)})"
    return "..." if value is ... else str(value) if isinstance(value, _WORDS) else repr(value)


_WORDS = (torch.dtype, torch.layout, torch.memory_format)


def rename(text: str, symbols: dict[str, str]) -> str:
    """A type's text with its symbols renamed, all at once."""
    if not symbols:
        return text
    import re

    return re.sub(r"\b[su]\w*\d+\b", lambda m: symbols.get(m[0], m[0]), text)


def _inputs(program: Program, symbols: dict[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for node, position in zip(program.placeholders, program.arguments, strict=True):
        value = node.meta["val"]
        entry: dict[str, Any] = {"index": position}
        if isinstance(value, torch.Tensor):
            entry["type"] = rename(describe_value(value), symbols)
            if value.device.type != "cpu":
                entry["device"] = str(value.device)
            if not value.is_contiguous():
                entry["strides"] = [rename(str(s), symbols) for s in value.stride()]
            if value.requires_grad:
                entry["requires_grad"] = True
        elif isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            entry["type"] = f"{type(value).__name__}({rename(str(value), symbols)})"
        else:
            entry["value"] = value
        if node.name in program.mutated:
            entry["written"] = True
        yield node.name, entry


def _symbols(program: Program, names: dict[str, str]) -> dict[str, dict[str, int]]:
    bounds = symbol_bounds(program.fake_mode)
    return {name: bounds[symbol] for symbol, name in names.items() if symbol in bounds}


def _weight(expression: Expression) -> Any:
    return expression.name if isinstance(expression, Param) else expression.to_json()


def _parameter(source: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"index": source.index, "type": describe_value(source.tensor)}
    if source.tensor.device.type not in ("cpu", "meta"):
        entry["device"] = str(source.tensor.device)
    if source.trainable:
        entry["trainable"] = True
    if source.constant:
        entry["constant"] = True
    return entry


def _origins(module: GraphModule) -> dict[str, Any]:
    """Where nodes come from, each distinct module path, line and chain of makers written once."""
    tables: dict[str, dict[Any, int]] = {"modules": {}, "lines": {}, "makers": {}}
    number = lambda table, value: tables[table].setdefault(value, len(tables[table]))

    def rows(graph_module: GraphModule, prefix: str) -> Iterable[tuple[str, Any]]:
        for node in graph_module.graph.nodes:
            if node.op == "call_module":
                yield from rows(graph_module.get_submodule(str(node.target)), f"{node.target}.")  # type: ignore[arg-type]
            if node.op == "output":
                continue
            lines = [source_line(node) or "", *node.meta.get("custom", {}).get("fuseline_lines", ())]
            row = (
                number("modules", module_path(node)),
                [number("lines", line) for line in lines],
                number("makers", makers(node)),
            )
            if row != (number("modules", ""), [number("lines", "")], number("makers", ())):
                yield prefix + node.name, row

    nodes = dict(rows(module, ""))
    return {**{table: list(values) for table, values in tables.items()}, "nodes": nodes}


def _literal_table(value: Any) -> str:
    return pprint.pformat(value, indent=1, width=110, compact=True, sort_dicts=False)
