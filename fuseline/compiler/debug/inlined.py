"""A program as one flat list of items, regions opened: what two graphs are compared by.

An item is a node without its name: what it computes (`label`), from which items, for whom. The nodes of a region stand
where its call stands and remember the region, so a graph before `fuse` and one after it are the same computation in
another grouping. Weights stand before their first user.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ..expressions import Expression
from ..order import touches_written
from ..program import Program
from ..traits import arguments

HOLE = "\N{WHITE SQUARE}"


@dataclass(eq=False, slots=True)
class Item:
    """One computation.

    kind: the op; label: the op with its literal arguments, or a weight's expression, or an input's position;
    inputs: in the order of the arguments, repeats included; users: (item, position among its inputs).
    given: the arguments by name, as text, a hole where an input goes.
    region: path of the region that holds it, "" outside; effect: its place among the others matters.
    """

    index: int
    node: Node
    kind: str
    label: str
    inputs: list[Item]
    region: str = ""
    effect: bool = False
    given: dict[str, str] = field(default_factory=dict)
    users: list[tuple[Item, int]] = field(default_factory=list)

    @property
    def is_weight(self) -> bool:
        return self.kind == "weight"


@dataclass(eq=False)
class Region:
    """A call of a subgraph: its kind ("linear", "pointwise", …) and what is in it."""

    path: str
    kind: str
    members: list[Item] = field(default_factory=list)


@dataclass
class Inlined:
    items: list[Item]
    regions: dict[str, Region]


def inlined(program: Program) -> Inlined:
    """The items of a program, in the order in which they run, weights moved to their first user."""
    builder = _Builder(program)
    builder.walk(program.module, {}, "")
    return builder.finish()


class _Builder:
    def __init__(self, program: Program):
        self.program = program
        self.items: list[Item] = []
        self.regions: dict[str, Region] = {}
        states = sorted(source.index for source in program.sources.values())
        # Two captures of one model may pass different numbers of parameters before an input.
        positions = [p - sum(s < p for s in states) for p in program.arguments]
        self.positions = dict(zip(program.placeholders, positions, strict=False))

    def walk(self, module: GraphModule, values: dict[Node, Any], region: str) -> Any:
        """Adds the items of one graph; returns what it gives back, an item or a tuple of these."""
        for node in module.graph.nodes:
            if node.op == "placeholder":
                if not region:
                    values[node] = self.placeholder(node)
            elif node.op == "output":
                if region:
                    return map_arg(node.args[0], values.get)
                self.add(node, "output", values, region)
            elif node.op == "get_attr":
                values[node] = self.attribute(node, region)
            elif node.op == "call_module" and isinstance(inner := _submodule(module, node), GraphModule):
                values[node] = self.region(node, inner, values, region)
            elif node.target is operator.getitem and isinstance(values.get(node.args[0]), (tuple, list)):
                values[node] = values[node.args[0]][node.args[1]]
            else:
                values[node] = self.add(node, kind_of(node, module), values, region)
        return None

    def region(self, node: Node, inner: GraphModule, values: dict[Node, Any], around: str) -> Any:
        path = f"{around}/{node.target}".lstrip("/")
        self.regions[path] = Region(path, str(inner.meta.get("kind") or str(node.target).rstrip("0123456789_")))
        first = len(self.items)
        inputs = [n for n in inner.graph.nodes if n.op == "placeholder"]
        given = [values[a] if isinstance(a, Node) else a for a in node.args]
        result = self.walk(inner, dict(zip(inputs, given, strict=True)), path)
        self.regions[path].members = [i for i in self.items[first:] if i.region == path]
        return result

    def placeholder(self, node: Node) -> Item:
        return self.new(node, "input", f"input {self.positions.get(node)}", [], "")

    def attribute(self, node: Node, region: str) -> Item:
        weight = node.meta.get("weight")
        if isinstance(weight, Expression):
            return self.new(node, "weight", f"weight {weight!r}", [], region)
        return self.new(node, "attribute", f"attribute {node.target}", [], region)

    def add(self, node: Node, kind: str, values: dict[Node, Any], region: str) -> Item:
        inputs: list[Item] = []

        def hole(value: Any) -> str:
            """The text of an argument, each node in it a hole."""
            if isinstance(value, Node):
                return hole(values[value]) if value in values else "undefined"  # a broken graph can be compared too
            if isinstance(value, Item):
                inputs.append(value)
                return HOLE
            if isinstance(value, (tuple, list)):
                return f"[{', '.join(map(hole, value))}]"
            if isinstance(value, slice):
                return f"slice({hole(value.start)}, {hole(value.stop)}, {hole(value.step)})"
            if isinstance(value, dict):
                return f"{{{', '.join(f'{k}: {hole(v)}' for k, v in value.items())}}}"
            return str(value) if isinstance(value, torch.dtype) else repr(value)

        given = {name: hole(value) for name, value in _given(node).items()}
        item = self.new(node, kind, f"{kind}({', '.join(f'{k}={v}' for k, v in given.items())})", inputs, region)
        item.given = given
        item.effect = node.op == "call_function" and (touches_written(node) or node.is_impure())
        return item

    def new(self, node: Node, kind: str, label: str, inputs: list[Item], region: str) -> Item:
        item = Item(len(self.items), node, kind, label, inputs, region)
        for slot, source in enumerate(inputs):
            source.users.append((item, slot))
        self.items.append(item)
        return item

    def finish(self) -> Inlined:
        def place(item: Item) -> tuple[int, int]:
            first = min((u.index for u, _ in item.users), default=item.index) if item.is_weight else item.index
            return first, item.index - len(self.items) if item.is_weight else 0

        ordered = sorted(self.items, key=place)
        for index, item in enumerate(ordered):
            item.index = index
        return Inlined(ordered, self.regions)


def kind_of(node: Node, module: GraphModule) -> str:
    """`aten.mul.Tensor`, `getitem`, the class of a leaf module."""
    if node.op == "call_module":
        return type(_submodule(module, node)).__name__
    target = node.target
    return str(target) if hasattr(target, "_schema") else str(getattr(target, "__name__", target))


def _submodule(module: GraphModule, node: Node) -> Any:
    try:
        return module.get_submodule(str(node.target))
    except AttributeError:
        return None


def _given(node: Node) -> dict[str, Any]:
    """The arguments by name, those at their schema's default left out: a default may be written or not."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return arguments(node)
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return {
        name: value
        for name, value in arguments(node).items()
        if name not in defaults or isinstance(value, Node) or not _same_literal(value, defaults[name])
    }


def _same_literal(value: Any, default: Any) -> bool:
    return type(value) is type(default) and not isinstance(value, (list, tuple, dict)) and bool(value == default)
