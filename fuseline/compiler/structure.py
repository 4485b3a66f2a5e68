"""What a graph is, apart from its nodes' names: a hash, and an equality for tests."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .compat import symbolic_expression
from .program import Program


def structural_hash(module: GraphModule | Program) -> str:
    """A digest of ops, arguments, shapes, dtypes and weight expressions in topological order, names left out."""
    return hashlib.sha256("\n".join(_lines(_module(module))).encode()).hexdigest()


def same_structure(first: GraphModule | Program, second: GraphModule | Program) -> bool:
    """Whether two graphs are alike but for names."""
    return _lines(_module(first)) == _lines(_module(second))


def describe_value(value: Any) -> str:
    """`f32[2, s0, 64]` for a tensor, its text otherwise."""
    if isinstance(value, torch.Tensor):
        sizes = ", ".join([str(s) if type(s) is int else _size(symbolic_expression(s)) for s in value.shape])
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(describe_value(v) for v in value)})"
    return str(value)


@lru_cache(maxsize=4096)
def _size(expression: Any) -> str:
    """A size's text; sympy is slow to write one, and a graph has few."""
    return str(expression)


def _module(module: GraphModule | Program) -> GraphModule:
    return module.module if isinstance(module, Program) else module


def _lines(module: GraphModule) -> list[str]:
    numbers: dict[Node, int] = {}
    lines: list[str] = []

    def number(node: Node) -> str:
        return f"%{numbers.get(node, '?')}"  # a broken graph has a hash as well; the verifier names what is wrong

    for node in module.graph.nodes:
        numbers[node] = len(numbers)
        args = torch.fx.node.map_arg(node.args, number)
        kwargs = {k: torch.fx.node.map_arg(v, number) for k, v in sorted(node.kwargs.items())}
        if node.op == "get_attr":
            target = repr(node.meta.get("weight", node.target))
        elif node.op == "call_module":
            inner = getattr(module, str(node.target), None)
            target = structural_hash(inner) if isinstance(inner, GraphModule) else str(node.target)
        else:
            target = "" if node.op in ("placeholder", "output") else str(node.target)
        # An output's type is that of its arguments, and only some captures write it down.
        value = "" if node.op == "output" else describe_value(node.meta.get("val"))
        lines.append(f"{node.op} {target} {args} {kwargs} {value}")
    return lines
