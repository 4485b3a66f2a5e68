"""Nodes as text: the call, the value, where it comes from."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..compat import symbolic_expression
from ..expressions import Expression, Output, Param
from ..provenance import makers, module_path, source_line
from .inlined import HOLE, Item

_PLAIN = ("self", "other", "exponent", "0", "1")  # names of arguments that say nothing


@dataclass(frozen=True)
class Shown:
    """A node as it is shown.

    text: the call; value: dtype and shape; line: the user's; made_by: passes and rules; region: the one that holds it.
    """

    name: str
    op: str
    text: str
    value: str
    module: str
    line: str | None
    made_by: tuple[str, ...]
    region: str


def show(item: Item, value: str) -> Shown:
    """An item with the text of its value."""
    node, inputs = item.node, iter(item.inputs)
    if item.is_weight:
        text = weight_text(node.meta["weight"])
    elif item.kind in ("input", "attribute"):
        text = item.label
    else:
        given = "".join(name_text(next(inputs)) if c == HOLE else c for c in given_text(item))
        text = f"{op_text(item)}({given})"
    origin = module_path(node), source_line(node), makers(node)
    return Shown(name_text(item), op_text(item), text, value, *origin, item.region)


def op_text(item: Item) -> str:
    """`mul` for `aten.mul.Tensor`, `fuseline.glu` for a dialect op."""
    return item.kind.removeprefix("aten.").rsplit(".", 1)[0] if "." in item.kind else item.kind


def name_text(item: Item) -> str:
    """A weight by the end of its parameter's name, another node by its own."""
    expression = item.node.meta.get("weight") if item.is_weight else None
    parameters = expression.parameters() if expression is not None else ()
    return ".".join(parameters[0].split(".")[-2:]) if parameters and item.kind == "weight" else item.node.name


def given_text(item: Item) -> str:
    """The arguments, holes where inputs go, without what every reader knows: the names of the first tensors."""
    parts: list[str] = []
    for name, value in item.given.items():
        bare = name in _PLAIN or (value == HOLE and all(part == HOLE for part in parts))
        parts.append(plain(value) if bare else f"{name}={plain(value)}")
    return ", ".join(parts)


def plain(argument: str) -> str:
    """An argument's text; the largest integer is an end, a device its type."""
    return re.sub(r"device\(type='(\w+)'\)", r"\1", argument).replace(str(sys.maxsize), "max")


def differing(a: Item, b: Item) -> Iterator[str]:
    """What two items of one op have apart: the weight, the position, or each argument."""
    if a.is_weight:
        yield f"{weight_text(a.node.meta['weight'])} → {weight_text(b.node.meta['weight'])}"
    elif not a.given and not b.given:
        yield f"{a.label} → {b.label}"
    for name in dict.fromkeys((*a.given, *b.given)):
        was, now = (plain(i.given.get(name, "its default")).replace(HOLE, "…") for i in (a, b))
        if a.given.get(name) != b.given.get(name):
            yield f"{name}: {was} → {now}"


def weight_text(expression: Expression) -> str:
    """`pack(quantize(mlp.up_proj.weight).codes)`."""
    if isinstance(expression, Param):
        return expression.name
    if isinstance(expression, Output):
        return f"{weight_text(expression.x)}.{expression.name}"
    return f"{type(expression).__name__.lower()}({', '.join(map(weight_text, expression.operands()))})"


def value_text(value: Any, names: Mapping[Any, Any]) -> str:
    """`float32[1, s0, 64]`; symbols that are keys of `names` are written as their values."""
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(_size_text(s, names) for s in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(value_text(v, names) for v in value)})"
    return _size_text(value, names) if isinstance(value, torch.SymInt) else str(value)


def _size_text(size: Any, names: Mapping[Any, Any]) -> str:
    if isinstance(size, int):
        return str(size)
    expression = symbolic_expression(size)
    return str(expression.xreplace(names) if names and hasattr(expression, "xreplace") else expression)
