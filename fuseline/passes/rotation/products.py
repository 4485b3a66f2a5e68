"""Products with a weight: a rotation ends in one, folded into its columns, or begins in one, folded into its rows.

Taken are `linear`, `addmm`, `mm` and `matmul`, products with a stack of matrices (`bmm`, `baddbmm`, and grouped
products over experts), and routed experts, whatever views lie between the parameter and the product.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from ...compiler import ops
from ...compiler.expressions import Expression, Output
from ...compiler.order import touches_written
from ...compiler.rewriter import Builder
from ...compiler.traits import is_transpose
from ..raising.nodes import op_name

aten = torch.ops.aten
_GROUPED = ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")


Weight: TypeAlias = Expression | Node
"""A weight's expression, or a node that computes it at run time."""
Fold = Callable[[Expression, torch.Tensor, int], Weight]
"""A weight, its fake value and a dimension → the weight with that dimension's channels rotated, or centred."""


@dataclass(frozen=True)
class Product:
    """y = x·W + b.

    path: from the weight node to the product's operand, each node a view of the one before. inputs, outputs: the
    dimensions of the weight that x is multiplied along and that y has; position: the operand's among the arguments.
    writer: the product that y comes from, where one call makes several: experts read by one stack and write by another.
    """

    node: Node
    x: Node
    weight: Node
    path: tuple[Node, ...]
    position: int
    inputs: int
    outputs: int
    bias: Node | None = None
    bias_position: int = 2
    writer: Product | None = None

    @property
    def expression(self) -> Expression:
        found: Expression = self.weight.meta["weight"]
        return found

    def weights(self) -> tuple[Expression, ...]:
        """The weight that y comes from, and its bias."""
        if self.writer is not None:
            return self.writer.weights()
        return (self.expression, *(() if self.bias is None else (self.bias.meta["weight"],)))

    def rebuilt(self, new: Builder, x: Node, weight: Weight, bias: Weight | None = None) -> Node:
        """The same product of another input with other weights."""
        table = _weight(new, weight)
        for view in self.path:
            args = [table if a is view.args[0] else a for a in view.args]
            table = new(view.target, *args, **view.kwargs)
        arguments = list(self.node.args)
        arguments[self.position] = table
        arguments[next(i for i, a in enumerate(arguments) if a is self.x and i != self.position)] = x
        if bias is not None:
            arguments[self.bias_position : self.bias_position + 1] = [_weight(new, bias)]
        return new(self.node.target, *arguments, **self.node.kwargs)

    def with_rows(self, new: Builder, fold: Fold) -> Node:
        """The same product of the same input, `fold` applied along the channels that it writes."""
        if self.writer is not None:
            return self.writer.with_rows(new, fold)
        weight = fold(self.expression, self.weight.meta["val"], self.outputs)
        bias = None
        if self.bias is not None:
            bias = fold(self.bias.meta["weight"], self.bias.meta["val"], self.bias.meta["val"].dim() - 1)
        return self.rebuilt(new, self.x, weight, bias)


def _weight(new: Builder, weight: Weight) -> Node:
    return weight if isinstance(weight, Node) else new.weight(weight)


def with_rows(new: Builder, node: Node, fold: Fold) -> Node:
    """What a product or a table writes, with `fold` applied along its channels."""
    made = product(node)
    if made is not None:
        return made.with_rows(new, fold)
    table, *rest = node.args
    folded = _weight(new, fold(table.meta["weight"], table.meta["val"], 1))  # type: ignore[union-attr]
    return new(node.target, folded, *rest, **node.kwargs)


def carried_over(new: Builder, node: Node, operands: Mapping[Node, Node]) -> Node:
    """The same call over other operands; an item of a split, over another split."""
    if node.target is operator.getitem and node.args[0] not in operands:
        operands = {node.args[0]: carried_over(new, node.args[0], operands)}  # type: ignore[dict-item, arg-type]
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: operands.get(n, n))
    return new(node.target, *args, **kwargs)


def product(node: Node) -> Product | None:
    """What a call multiplies, if one of its operands is a weight and the other an activation."""
    name = op_name(node)
    if name == "linear" and not node.kwargs:
        x, table, *rest = node.args
        return _product(node, x, table, 1, rest[0] if rest else None, 2, transposed=True)
    if name in ("mm", "matmul", "bmm", *_GROUPED):
        return _product(node, node.args[0], node.args[1], 1)
    if name in ("addmm", "baddbmm") and not node.kwargs:
        bias, x, table = node.args[:3]
        return _product(node, x, table, 2, bias, 0)
    return _experts(node) if node.target is ops.moe.overload and not node.kwargs else None


def _experts(node: Node) -> Product | None:
    """Routed experts: what they read goes through one stack, and what they write comes from another."""
    x, _, _, *tables = node.args
    writer = _product(node, x, tables[1], 4, transposed=True)
    reader = _product(node, x, tables[0], 3, transposed=True)
    bias = tables[3] if len(tables) > 3 else None
    if reader is None or writer is None or (isinstance(bias, Node) and "weight" not in bias.meta):
        return None
    return replace(reader, writer=replace(writer, bias=bias, bias_position=6))


def _product(
    node: Node, x: Any, table: Any, position: int, bias: Any = None, bias_position: int = 2, transposed: bool = False
) -> Product | None:
    found = weight_behind(table) if isinstance(x, Node) and "weight" not in x.meta else None
    if found is None or (isinstance(bias, Node) and not _is_vector(bias)):
        return None
    weight, path, flipped = found
    rank = weight.meta["val"].dim()
    inputs, outputs = (rank - 1, rank - 2) if flipped != transposed else (rank - 2, rank - 1)
    return Product(node, x, weight, path, position, inputs, outputs, bias, bias_position)


def weight_behind(table: Any) -> tuple[Node, tuple[Node, ...], bool] | None:
    """The weight, a matrix or a stack, that a node is a view of; the views; whether they exchange rows and columns."""
    path: list[Node] = []
    flipped = False
    while isinstance(table, Node) and table.op != "get_attr":
        kind = _view(table)
        if kind is None or touches_written(table):
            return None
        flipped ^= kind == "transpose"
        path.insert(0, table)
        table = table.args[0]
    expression = table.meta.get("weight") if isinstance(table, Node) else None
    if not isinstance(expression, Expression) or any(isinstance(e, Output) for e in expression.walk()):
        return None
    return (table, tuple(path), flipped) if table.meta["val"].dim() in (2, 3) else None


def _is_vector(bias: Node) -> bool:
    return bias.op == "get_attr" and "weight" in bias.meta and bias.meta["val"].dim() == 1


def _view(node: Node) -> str | None:
    """How a view of a weight relates to it: "transpose" exchanges its last two dimensions, "rows" picks matrices."""
    if is_transpose(node):
        return "transpose"
    name, rank = op_name(node), node.meta["val"].dim()
    if name == "index" and rank == 3:
        return "rows" if len(node.args[1]) == 1 else None  # type: ignore[arg-type]
    if name in ("index_select", "select") and rank == 3 - (name == "select") and node.args[1] == 0:
        return "rows"
    return (
        "rows" if name in ("to", "contiguous", "clone", "detach") and node.args[0].meta["val"].dim() == rank else None
    )  # type: ignore[union-attr]
