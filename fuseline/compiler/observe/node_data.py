"""A node as data: what a page about a graph needs to know of it, without its tensors.

Nodes are identified by a number each, since names say nothing about identity: a name may be used again.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..compat import size_hint
from ..expressions import Expression, Param
from ..liveness import tensors
from ..program import Program
from ..provenance import is_ours, makers, module_path, source_line, source_lines
from ..sites import op_name
from ..structure import describe_value

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (.+)')
AROUND = 3  # lines of code shown before and after the line that a node comes from
RULE_LINES = 16  # lines of code shown of a rule
LONGEST = 600  # characters of an argument list


class Numbers:
    """Numbers for nodes, from 1, the same at every run; a node keeps its number as long as it lives."""

    def __init__(self) -> None:
        self._known: dict[Node, int] = {}

    def __call__(self, node: Node) -> int:
        return self._known.setdefault(node, len(self._known) + 1)


class Sources:
    """The lines of code that nodes and rules come from, read once each: `file:line` → {"start", "text"}."""

    def __init__(self) -> None:
        self.excerpts: dict[str, dict[str, Any]] = {}
        self.stacks: list[list[str]] = []
        self._stacks: dict[str, int | None] = {}

    def line(self, place: str | None) -> str | None:
        """Keeps the lines around a place; an unreadable file leaves the place without its text."""
        return self._keep(place, AROUND, AROUND)

    def rule(self, place: str | None) -> str | None:
        """Keeps the lines of a rule, from shortly before its first on."""
        return self._keep(place, AROUND, RULE_LINES)

    def stack(self, trace: str | None) -> int | None:
        """The number of a stack of frames outside PyTorch and this package, outermost first; None without any."""
        if not trace:
            return None
        if trace not in self._stacks:
            frames = [f"{file}:{line} in {name}" for file, line, name in _FRAME.findall(trace) if not is_ours(file)]
            self._stacks[trace] = len(self.stacks) if frames else None
            if frames:
                self.stacks.append(frames)
        return self._stacks[trace]

    def _keep(self, place: str | None, before: int, after: int) -> str | None:
        if place is not None and place not in self.excerpts:
            file, _, number = place.rpartition(":")
            lines, line = linecache.getlines(file), int(number)
            start = max(1, line - before)
            if 0 < line <= len(lines):
                text = [text.rstrip("\n") for text in lines[start - 1 : line + after]]
                self.excerpts[place] = {"start": start, "text": text}
        return place


def node_data(program: Program, node: Node, number: Callable[[Node], int], sources: Sources) -> dict[str, Any]:
    """What a node is.

    id, name, op, target; args: the arguments as text; inputs: ids of the nodes it reads; type and bytes of its value
    (symbolic sizes at their hints); module: its path; line and lines: its own source line, and those of what it
    replaced; stack: a number of `Sources.stacks`; makers; weight: the expression of a weight as text, with its
    parameters; region: the nodes inside a region, when it is one. Keys without a value are left out.
    """
    value = node.meta.get("val")
    data: dict[str, Any] = {
        "id": number(node),
        "name": node.name,
        "op": node.op,
        "target": target_text(node),
        "args": arguments_text(node),
        "inputs": [number(n) for n in node.all_input_nodes],
        "type": describe_value(value) if value is not None else None,
        "bytes": sum(size_hint(t.numel()) * t.element_size() for t in tensors(value)) or None,
        "module": module_path(node) or None,
        "line": sources.line(source_line(node)),
        "lines": [sources.line(place) for place in source_lines([node])[1:]] or None,
        "stack": sources.stack(node.meta.get("stack_trace")),
        "makers": list(makers(node)) or None,
    }
    expression = node.meta.get("weight")
    if isinstance(expression, Expression):
        data["weight"] = {"text": expression_text(expression), "parameters": list(expression.parameters())}
    inner = getattr(program.module, str(node.target), None) if node.op == "call_module" else None
    if isinstance(inner, GraphModule):
        data["region"] = region_data(program, node, inner, number, sources)
    return {key: item for key, item in data.items() if item is not None}


def region_data(
    program: Program, call: Node, inner: GraphModule, number: Callable[[Node], int], sources: Sources
) -> dict[str, Any]:
    """A region: its kind, its nodes (their inputs are nodes of the region, or those that the call reads), and the ids
    of the nodes that it gives back."""
    placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
    outside = {p: a for p, a in zip(placeholders, call.args) if isinstance(a, Node)}
    resolve = lambda n: number(outside.get(n, n))
    nodes = [n for n in inner.graph.nodes if n.op not in ("placeholder", "output")]
    (output,) = [n for n in inner.graph.nodes if n.op == "output"]
    return {
        "kind": str(inner.meta.get("kind", "region")),
        "nodes": [node_data(program, n, resolve, sources) for n in nodes],
        "outputs": [resolve(n) for n in torch.utils._pytree.tree_leaves(output.args[0]) if isinstance(n, Node)],
    }


def target_text(node: Node) -> str:
    """`aten.linear.default`, `getitem`, the name of a region."""
    if isinstance(node.target, (torch._ops.OpOverload, str)):
        return str(node.target)
    return op_name(node)


def arguments_text(node: Node) -> str:
    """A call's arguments as they would be written, cut where they are very long."""
    if node.op in ("placeholder", "get_attr"):
        return ""
    parts = [*map(repr, node.args), *(f"{key}={value!r}" for key, value in node.kwargs.items())]
    text = ", ".join(parts)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 2]} …"


def expression_text(expression: Expression) -> str:
    """`pack(quantize(mlp.up_proj.weight).codes)`: a weight expression in short."""
    if isinstance(expression, Param):
        return expression.name
    name, operands = type(expression).__name__.lower(), [expression_text(o) for o in expression.operands()]
    if name == "output" and len(operands) == 1:
        return f"{operands[0]}.{getattr(expression, 'name', '')}"
    extra = [str(getattr(expression, field)) for field in ("scheme", "dtype", "shape") if hasattr(expression, field)]
    return f"{name}({', '.join([*operands, *extra])})"
