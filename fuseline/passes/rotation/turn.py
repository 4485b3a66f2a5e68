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
from .parts import Part, part
from .products import Weight, carried_over, product, with_rows
from .rotations import Rotation
from .stream import Stream, is_norm

aten = torch.ops.aten


@dataclass(frozen=True)
class Turned:
    """What stands for a value v: `v = node·Rᵀ`, or `(node·Rᵀ)·scale` behind a norm."""

    node: Node
    scale: Expression | None = None


class Turn:
    """Turns the members and readers of a stream, in the graph's order."""

    def __init__(self, program: Program, rewriter: Rewriter, rotation: Rotation, stream: Stream, folds: Folds):
        self.program, self.rewriter, self.rotation = program, rewriter, rotation
        self.stream, self.folds = stream, folds
        self.turned: dict[Node, Turned] = {}

    def apply(self) -> None:
        stream = self.stream
        wanted = stream.before.keys() | stream.readers.keys()
        for node in [n for n in self.program.graph.nodes if n in wanted]:
            if node._erased or "weight" in node.meta:
                continue
            made = self._reader(node) if node in stream.readers else node
            if node in stream.before and made is not None and not made._erased:
                stream.before.setdefault(
                    made, stream.before[node]
                )  # experts read and write: first the one, then the other
                self._member(made)

    def _rewrite(self, rule: str, root: Node, build: Callable[[Builder], Any]) -> None:
        name = f"{self.rotation.label} {rule}"
        self.rewriter.rewrite(root, [root, *root.all_input_nodes], build, name)

    def _member(self, node: Node) -> None:
        before = self.stream.before[node]
        piece = part(node)
        if before is None:
            self._enter(node)
        elif is_norm(node):
            self._norm(node)
        elif before:
            self._carrier(node)
        elif piece is not None:
            self._part(node, piece)
        elif carriers(node, self.rotation.block) == ():
            self.turned[node] = Turned(node)  # zeros
        else:
            self._writer(node)

    def _fold(self, new: Builder, weight: Expression, value: torch.Tensor, dim: int, scale: Any = None) -> Weight:
        """A weight with R in it: folded, or at run time where a gradient should reach it."""
        if self.folds.trained(weight):
            return self.rotation.fold_at_run_time(new, new.weight(weight), dim, scale)
        return self.rotation.fold(weight, value, dim, scale)

    def _writer(self, node: Node) -> None:
        def build(new: Builder) -> Node:
            return self._standing(new, node, with_rows(new, node, lambda *weight: self._fold(new, *weight)))

        self._rewrite("into rows", node, build)

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
        if weight is not None and self.stream.before.get(node) is not None:
            return new.weight(self.rotation.fold(weight, node.meta["val"], -1))
        found = self.turned.get(node)
        return found.node if found is not None and found.scale is None else self.rotation.online(new, node)

    def _enter(self, node: Node) -> None:
        """R at run time, behind a value that something else computes."""

        def build(new: Builder) -> Node:
            same = new(node.target, *node.args, **node.kwargs)
            return self._standing(new, node, self.rotation.online(new, same))

        self._rewrite("enters", node, build)

    def _part(self, node: Node, piece: Part) -> None:
        """The rows of the parts in the stream alone; the others are cut from the new product as from the old."""
        members = [one for one in (node, *piece.others) if one in self.stream.before]
        spans = sorted(span for one in members for span in _spans(one, self.rotation.block))

        def fold(x: Expression, value: torch.Tensor, dim: int) -> Expression:
            pieces: list[Expression] = []
            before = 0
            for start, end in (*spans, (size := int(value.shape[dim]), size)):
                if before < start:
                    pieces.append(Slice(x, dim, before, start))
                if start < end:
                    kept = value.narrow(dim, start, end - start)
                    pieces.append(self.rotation.fold(Slice(x, dim, start, end), kept, dim))
                before = end
            return Concat(tuple(pieces), dim) if len(pieces) > 1 else pieces[0]

        def build(new: Builder) -> dict[Node, Node]:
            made = {piece.product.node: piece.product.with_rows(new.at(piece.product.node), fold)}
            for view in piece.shared:
                made[view] = carried_over(new.at(view), view, made)
            found = {one: carried_over(new.at(one), one, made) for one in (*piece.others, node)}
            return {one: self._standing(new.at(one), one, x) if one in members else x for one, x in found.items()}

        self._rewrite("into rows", node, build)

    def _carrier(self, node: Node) -> None:
        carried = carriers(node, self.rotation.block) or ()
        scale = None
        if len(carried) == 1 and carried[0] in self.turned:
            scale = self.turned[carried[0]].scale

        def build(new: Builder) -> Node:
            operands = {c: self.turned[c].node if scale is not None else self._operand(new, c) for c in carried}
            return self._standing(new, node, carried_over(new, node, operands), scale)

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

    def _reader(self, node: Node) -> Node | None:
        """The product that takes the reader's place, if any does."""
        made = product(node)
        found = self.turned.get(made.x) if made is not None else None
        if made is None or found is None:
            return None  # a rewrite before it was skipped
        built: list[Node] = []

        def build(new: Builder) -> Node:
            value = made.weight.meta["val"]
            weight = self._fold(new, made.expression, value, made.inputs, found.scale)
            built.append(made.rebuilt(new, found.node, weight))
            return built[0]

        self._rewrite("into columns", node, build)
        return built[0] if built else None


def _spans(node: Node, block: int) -> list[tuple[int, int]]:
    found = part(node)
    return (found.spans(block) if found is not None else None) or []
