"""Turning a stream into another basis, one exact rewrite at a time.

Each rewrite replaces one member v by Rᵀ applied to what the member is in the new basis, so that the program computes
the same after any number of them:

    writer    linear(x, W, b)            →  linear(x, W·R, b·R)·Rᵀ               R folded into rows
    carrier   add(a·Rᵀ, b·Rᵀ)            →  add(a, b)·Rᵀ                         R commutes
    norm      rms_norm(x·Rᵀ, γ)          →  (rms_norm(x)·Rᵀ)·γ                   as |x·Rᵀ| = |x|
    reader    linear((x·Rᵀ)·γ, W)        →  linear(x, W·γ·R)                     Rᵀ and γ folded into columns

What is replaced is read by nothing once its readers are turned, and goes. What is left of Rᵀ is where the stream is
read by something else.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ...compiler import ops
from ...compiler.expressions import Concat, Expression, Offset, Slice
from ...compiler.program import Program
from ...compiler.rewriter import Builder, Rewriter
from .carriers import carriers
from .folds import Folds
from .products import Part, Product, part, product
from .rotations import Rotation
from .stream import Stream, commutes, is_norm, writes_blocks

aten = torch.ops.aten


@dataclass(frozen=True)
class Turned:
    """What stands for a value v: `v = node·Rᵀ`, or `(node·Rᵀ)·scale` behind a norm."""

    node: Node
    scale: Expression | None = None


class Turn:
    """Turns the members and readers of a stream, in the graph's order."""

    def __init__(self, program: Program, rewriter: Rewriter, rotation: Rotation, folds: Folds):
        self.program, self.rewriter, self.rotation, self.folds = program, rewriter, rotation, folds
        self.turned: dict[Node, Turned] = {}

    def apply(self, stream: Stream) -> None:
        wanted = stream.members | stream.readers.keys()
        for node in [n for n in self.program.graph.nodes if n in wanted]:
            if node._erased or "weight" in node.meta:
                continue
            if node in stream.readers:
                self._reader(node)
            if node in stream.members and not node._erased:
                self._member(node)

    def _rewrite(self, rule: str, root: Node, build: Callable[[Builder], Any]) -> None:
        name = f"{self.rotation.label} {rule}"
        self.rewriter.rewrite(root, [root, *root.all_input_nodes], build, name)

    def _member(self, node: Node) -> None:
        if is_norm(node):
            if commutes(node, self.folds):
                self._norm(node)
            return
        piece = part(node)
        if piece is not None and writes_blocks(piece, self.rotation.block):
            return self._part(node, piece)
        made = product(node)
        if made is not None:
            return self._writer(node, made)
        if node.target is aten.embedding.default:
            return self._embedding(node)
        carried = carriers(node, self.rotation.block)
        if carried is None:
            return self._enter(node)
        if carried:
            self._carrier(node, carried)
        else:
            self.turned[node] = Turned(node)  # zeros

    def _standing(self, new: Builder, root: Node, turned: Node, scale: Expression | None = None) -> Node:
        """What replaces a member: the turned value, turned back."""
        dtype = root.meta["val"].dtype
        if turned.meta["val"].dtype != dtype:  # a norm whose scale is of a wider type
            turned = new(aten.to.dtype, turned, dtype)
        back = self.rotation.online(new, turned, inverse=True)
        if scale is not None:
            back = new(aten.mul.Tensor, back, new.weight(scale))
        if back.meta["val"].dtype != dtype:
            back = new(aten.to.dtype, back, dtype)
        self.turned[back] = Turned(turned, scale)
        return back

    def _operand(self, new: Builder, node: Node) -> Node:
        """An operand in the new basis."""
        weight = node.meta.get("weight")
        if weight is not None:
            return new.weight(self.rotation.fold(weight, node.meta["val"], -1))
        found = self.turned.get(node)
        return found.node if found is not None and found.scale is None else self.rotation.online(new, node)

    def _enter(self, node: Node) -> None:
        """R at run time, behind a value that something else computes."""

        def build(new: Builder) -> Node:
            same = new(node.target, *node.args, **node.kwargs)
            return self._standing(new, node, self.rotation.online(new, same))

        self._rewrite("enters", node, build)

    def _writer(self, node: Node, made: Product) -> None:
        if not all(map(self.folds, made.weights())):
            return self._enter(node)

        def build(new: Builder) -> Node:
            return self._standing(new, node, made.rebuilt(new, made.x, *self._rows(made)))

        self._rewrite("into rows", node, build)

    def _rows(self, made: Product, start: int = 0, end: int | None = None) -> tuple[Expression, Expression | None]:
        """Weight and bias with R folded into these output channels."""
        value = made.weight.meta["val"]
        weight = self._between(made.expression, value, made.outputs, start, end)
        if made.bias is None:
            return weight, None
        return weight, self._between(made.bias.meta["weight"], made.bias.meta["val"], 0, start, end)

    def _between(self, x: Expression, value: torch.Tensor, dim: int, start: int, end: int | None) -> Expression:
        size = int(value.shape[dim])
        if end is None or (start, end) == (0, size):
            return self.rotation.fold(x, value, dim)
        inner = self.rotation.fold(Slice(x, dim, start, end), value.narrow(dim, start, end - start), dim)
        around = [Slice(x, dim, 0, start)] if start else []
        behind = [Slice(x, dim, end, size)] if end < size else []
        return Concat((*around, inner, *behind), dim)

    def _part(self, node: Node, piece: Part) -> None:
        """The part's rows alone; the other parts are cut from the new product as they were from the old."""
        if not all(map(self.folds, piece.product.weights())):
            return self._enter(node)

        def build(new: Builder) -> dict[Node, Node]:
            first = min((node, *piece.others))
            new.at(first)
            whole = piece.product.rebuilt(new, piece.product.x, *self._rows(piece.product, piece.start, piece.end))
            for view in piece.path:
                whole = new(view.target, whole, *view.args[1:], **view.kwargs)
            again: dict[Node, Node] = {}

            def cut(one: Node) -> Node:
                if one.target is not operator.getitem:
                    return new(one.target, whole, *one.args[1:], **one.kwargs)
                split: Any = one.args[0]
                if split not in again:
                    again[split] = new(split.target, whole, *split.args[1:], **split.kwargs)
                return new(one.target, again[split], one.args[1])

            others = {one: cut(one) for one in piece.others}
            return {**others, node: self._standing(new, node, cut(node))}

        self._rewrite("into rows", node, build)

    def _embedding(self, node: Node) -> None:
        table, *rest = node.args
        weight = table.meta.get("weight")  # type: ignore[union-attr]
        if weight is None or not self.folds(weight):
            return self._enter(node)

        def build(new: Builder) -> Node:
            folded = new.weight(self.rotation.fold(weight, table.meta["val"], 1))  # type: ignore[union-attr]
            return self._standing(new, node, new(node.target, folded, *rest, **node.kwargs))

        self._rewrite("into rows", node, build)

    def _carrier(self, node: Node, carried: tuple[Node, ...]) -> None:
        scale = None
        if len(carried) == 1 and carried[0] in self.turned:
            scale = self.turned[carried[0]].scale

        def build(new: Builder) -> Node:
            operands = {c: self.turned[c].node if scale is not None else self._operand(new, c) for c in carried}
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: operands.get(n, n))
            return self._standing(new, node, new(node.target, *args, **kwargs), scale)

        self._rewrite("commutes", node, build)

    def _norm(self, node: Node) -> None:
        given: Any = node.args
        x, weight, eps, *rest = given
        rest += [False, None, True][len(rest) :]
        unit, accumulate, cast_first = rest

        def build(new: Builder) -> Node:
            plain = new(ops.rms_norm, self._operand(new, x), None, eps, False, accumulate, cast_first)  # type: ignore[arg-type]
            if weight is None:
                return self._standing(new, node, plain)
            scale = weight.meta["weight"]  # type: ignore[union-attr]
            return self._standing(new, node, plain, Offset(scale, 1.0) if unit else scale)

        self._rewrite("commutes with the norm", node, build)

    def _reader(self, node: Node) -> None:
        made = product(node)
        found = self.turned.get(made.x) if made is not None else None
        if made is None or found is None:
            return  # a rewrite before it was skipped

        def build(new: Builder) -> Node:
            value = made.weight.meta["val"]
            weight = self.rotation.fold(made.expression, value, made.inputs, found.scale)
            return made.rebuilt(new, found.node, weight)

        self._rewrite("into columns", node, build)
