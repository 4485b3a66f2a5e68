"""Products with a weight: a rotation ends in one, folded into its columns, or begins in one, folded into its rows.

Taken are `linear`, `addmm`, `mm` and `matmul`, and products with a stack of matrices (`bmm`, `baddbmm`, and grouped
products over experts), whatever views lie between the parameter and the product.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from ...compiler.expressions import Expression, Output
from ...compiler.rewriter import Builder
from ...compiler.traits import is_transpose
from ..raising.nodes import op_name, same_size

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

    @property
    def expression(self) -> Expression:
        found: Expression = self.weight.meta["weight"]
        return found

    def weights(self) -> tuple[Expression, ...]:
        """The weight, and the bias."""
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
        weight = fold(self.expression, self.weight.meta["val"], self.outputs)
        bias = None if self.bias is None else fold(self.bias.meta["weight"], self.bias.meta["val"], 0)
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
    """The same call over other operands."""
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
    return None


def _product(
    node: Node, x: Any, table: Any, position: int, bias: Any = None, bias_position: int = 2, transposed: bool = False
) -> Product | None:
    if not isinstance(x, Node) or not isinstance(table, Node) or "weight" in x.meta:
        return None
    path: list[Node] = []
    flips = transposed
    while table.op != "get_attr":
        kind = _view(table)
        if kind is None or not isinstance(table.args[0], Node):
            return None
        flips ^= kind == "transpose"
        path.insert(0, table)
        table = table.args[0]
    expression, rank = table.meta.get("weight"), table.meta["val"].dim()
    if not isinstance(expression, Expression) or any(isinstance(e, Output) for e in expression.walk()):
        return None
    if rank not in (2, 3) or (isinstance(bias, Node) and not _is_vector(bias)):
        return None
    inputs, outputs = (rank - 1, rank - 2) if flips else (rank - 2, rank - 1)
    return Product(node, x, table, tuple(path), position, inputs, outputs, bias, bias_position)


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


@dataclass(frozen=True)
class Part:
    """Some channels of a product: a slice of its last dimension, or an item of its split.

    path: views between the product and what is cut, each of the one before; cut: the slice or the split;
    start, end: which channels; others: the parts that are cut beside it.
    """

    product: Product
    path: tuple[Node, ...]
    cut: Node
    start: int
    end: int
    others: tuple[Node, ...]


def part(node: Node) -> Part | None:
    """The part of a product that a node is, where the product is read in parts alone."""
    item = node.target is operator.getitem
    cut = node.args[0] if item else node
    if not isinstance(cut, Node) or not (_is_split(cut) if item else op_name(cut) == "slice"):
        return None
    base: Any = cut.args[0]
    path: list[Node] = []
    while op_name(base) in ("view", "reshape", "_unsafe_view"):
        path.insert(0, base)
        base = base.args[0]
        if len(base.users) != 1 or not same_size(base.meta["val"].shape[-1], path[0].meta["val"].shape[-1]):
            return None
    made = product(base) if isinstance(base, Node) else None
    if made is None:
        return None
    pieces = _pieces(path[-1] if path else base)
    if pieces is None or node not in pieces:
        return None
    ends = sorted(pieces.values())
    if any(first[1] > second[0] for first, second in zip(ends, ends[1:], strict=False)):
        return None
    return Part(made, tuple(path), cut, *pieces[node], tuple(piece for piece in pieces if piece is not node))


def _is_split(node: Node) -> bool:
    return op_name(node) in ("split", "chunk", "split_with_sizes")


def _pieces(value: Node) -> dict[Node, tuple[int, int]] | None:
    """Each part of a value's last dimension with its channels; None where something else uses the value."""
    found: dict[Node, tuple[int, int]] = {}
    for user, ends in _parts(value):
        if ends is None:
            return None
        found[user] = ends
    return found


def _parts(value: Node) -> Iterator[tuple[Node, tuple[int, int] | None]]:
    last = value.meta["val"].dim() - 1
    for user in value.users:
        if op_name(user) == "slice" and len(user.args) < 5:
            dim, start = (*user.args[1:], *(0, 0)[len(user.args) - 1 :])[:2]
            width = user.meta["val"].shape[-1]
            start = start or 0
            fixed = isinstance(start, int) and isinstance(width, int) and start >= 0 and int(dim) % (last + 1) == last  # type: ignore[arg-type]
            yield user, (start, start + width) if fixed else None  # type: ignore[operator]
        elif _is_split(user):
            dim = user.args[2] if len(user.args) > 2 else user.kwargs.get("dim", 0)
            widths = [piece.shape[-1] for piece in user.meta["val"]]
            fixed = int(dim) % (last + 1) == last and all(isinstance(w, int) for w in widths)  # type: ignore[arg-type]
            for item in user.users:
                if not fixed or item.target is not operator.getitem:
                    yield item, None
                else:
                    start = sum(widths[: int(item.args[1])])  # type: ignore[arg-type]
                    yield item, (start, start + widths[int(item.args[1])])  # type: ignore[arg-type]
        else:
            yield user, None
