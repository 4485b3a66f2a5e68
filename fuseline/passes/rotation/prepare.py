"""Exact rewrites that show where a basis goes, before any is followed.

squeeze(bmm(W, unsqueeze(x, -1)), -1)  →  squeeze(bmm(unsqueeze(x, 1), Wᵀ), 1)   experts, a matrix for each token
type_as(x, y), new_empty(y, size)      →  to(x, y's dtype), empty(size)          y's channels are not read
index(x, [None, …, c]), one number c   →  slice                                  heads that are picked by a constant
W + 1, split(W)[i]                     →  weights of their own                   a norm's w of 1 + w, joint weights
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch.fx import Node

from ...compiler.expressions import Constant, Expression, Offset, Slice
from ...compiler.order import touches_written
from ...compiler.program import Program
from ...compiler.rewriter import Builder, Rewriter
from ..raising.nodes import op_name
from .carriers import in_blocks
from .folds import Folds
from .products import weight_behind

aten = torch.ops.aten
_NEW: dict[Any, Any] = {
    aten.new_empty.default: aten.empty.memory_format,
    aten.new_zeros.default: aten.zeros.default,
    aten.new_ones.default: aten.ones.default,
}


def prepare(program: Program, rewriter: Rewriter, folds: Folds) -> None:
    """Applies each of the rewrites wherever it fits."""
    for node in list(program.graph.nodes):
        if node.target in _NEW:
            _without_like(rewriter, node)
        if node._erased or touches_written(node):
            continue
        columns = _columns(node)
        if columns is not None:
            _as_rows(rewriter, node, *columns)
        elif node.target is aten.type_as.default:
            _without_like(rewriter, node)
        elif (position := _position(node)) is not None:
            _as_slice(rewriter, node, *position)
        elif (weight := _derived(node, folds)) is not None:
            _as_weight(rewriter, node, weight)


def _columns(node: Node) -> tuple[Node, Node] | None:
    """x [n, inputs] and the stack W [n, outputs, inputs], where a node is W·x matrix by matrix, [n, outputs]."""
    drops_last = op_name(node) == "squeeze" and node.args[1:] in ((-1,), (2,), ([-1],), ([2],))
    product: Any = node.args[0] if drops_last else None
    if op_name(product) != "bmm" or len(product.users) != 1:
        return None
    stack, column = product.args
    is_column = op_name(column) == "unsqueeze" and column.args[1] in (-1, 2)
    return (column.args[0], stack) if is_column and weight_behind(stack) is not None else None


def _as_rows(rewriter: Rewriter, node: Node, x: Node, stack: Node) -> None:
    def build(new: Builder) -> Node:
        rows = new(aten.bmm.default, new(aten.unsqueeze.default, x, 1), new(aten.transpose.int, stack, 1, 2))
        return new(aten.squeeze.dim, rows, 1)

    rewriter.rewrite(node, [node, *node.all_input_nodes], build, "columns as rows")


def written_down(node: Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A call's target and arguments; dtype and device that it takes from another tensor are written out."""
    value = node.meta.get("val")
    if node.target in _NEW:
        return _NEW[node.target], (node.args[1],), {"dtype": value.dtype, "device": value.device}
    if node.target is aten.type_as.default and value.device == node.args[0].meta["val"].device:  # type: ignore[union-attr]
        return aten.to.dtype, (node.args[0], value.dtype), {}
    return node.target, node.args, dict(node.kwargs)


def _without_like(rewriter: Rewriter, node: Node) -> None:
    target, args, kwargs = written_down(node)

    def build(new: Builder) -> Node:
        made = new(target, *args, **kwargs)
        made.meta.update({key: node.meta[key] for key in ("written",) if key in node.meta})
        return made

    if target is not node.target:
        rewriter.rewrite(node, [node], build, "new as fresh" if node.target in _NEW else "type as cast")


def _as_weight(rewriter: Rewriter, node: Node, weight: Expression) -> None:
    rewriter.rewrite(node, [node], lambda new: new.weight(weight), "derived weight")


def _position(node: Node) -> tuple[int, int] | None:
    """The dimension and the index in it that a node takes of its operand, where that is a constant of one element."""
    if op_name(node) != "index":
        return None
    *before, index = node.args[1]  # type: ignore[misc]
    constant = index.meta.get("weight") if isinstance(index, Node) else None
    is_number = isinstance(constant, Constant) and constant.dtype not in (torch.bool, torch.uint8)  # no mask
    known = is_number and constant.shape == (1,) and not any(before)  # type: ignore[union-attr]
    return (len(before), int(constant.values[0])) if known else None  # type: ignore[union-attr]


def _as_slice(rewriter: Rewriter, node: Node, dim: int, start: int) -> None:
    end = start + 1 if start != -1 else sys.maxsize
    rewriter.rewrite(node, [node], lambda new: new(aten.slice.Tensor, node.args[0], dim, start, end), "index as slice")


def _derived(node: Node, folds: Folds) -> Expression | None:
    """The weight that a node makes of another alone: its sum with a number, or an item of its split into rows."""
    item = node.target is operator.getitem
    split: Any = node.args[0] if item else node
    source = split.args[0] if isinstance(split, Node) and split.args else None
    weight = source.meta.get("weight") if isinstance(source, Node) else None
    if not isinstance(weight, Expression) or not in_blocks(source, 1) or not folds(weight):
        return None
    if node.target is aten.add.Tensor and not node.kwargs and isinstance(node.args[1], (int, float)):
        return Offset(weight, float(node.args[1]))
    if not item or op_name(split) not in ("split", "split_with_sizes") or len(split.args) > 2 or split.kwargs:
        return None
    rows = [int(piece.shape[0]) for piece in split.meta["val"]]
    start = sum(rows[: int(node.args[1])])  # type: ignore[arg-type]
    return Slice(weight, 0, start, start + rows[int(node.args[1])])  # type: ignore[arg-type]
