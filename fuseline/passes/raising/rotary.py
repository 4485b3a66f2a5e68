"""x·cos + [−x₂, x₁]·sin on halves of the last dimension → `fuseline.rotary`.

    q = q * cos + rotate_half(q) * sin          q = rotary(q, cos, sin)
    k = k * cos + rotate_half(k) * sin          k = rotary(k, cos, sin)        one action for the pair

Halves may be slices, chunks or splits. Where only part of the head turns, x is that part. Source: Su et al., 2021,
"RoFormer", in the layout on halves (pairs of neighbours in the paper).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch.fx import Node

from ...compiler.ops import rotary
from ...compiler.pattern import Either, Match, Term, Var, call, same_value
from ...compiler.program import Program
from ...compiler.rewriter import Builder
from ...compiler.rule import Rule
from ...compiler.traits import arguments
from .nodes import only_user, op_name, same_size, value


class Rotary(Rule):
    """One rotation, which no other shares its cosines and sines with."""

    def before(self, a: Var, b: Var, lower: Var, upper: Var, sin: Var, dim: Var) -> Term:  # type: ignore[override]
        turned = call("cat", (Either((-upper, upper * -1)), lower), dim=dim, bind="turned")
        return a * b + turned * sin

    def matches(self, program: Program) -> Iterator[Match]:
        for m in super().matches(program):
            source = _source(m.lower) or _source(m.upper)
            kept = [n for n in (m.a, m.b) if source is not None and same_value(n, source)]
            if not kept:
                continue  # a cat of other tensors: no rotation
            cos = m.b if kept[0] is m.a else m.a
            root, nodes = _whole(m.root)
            yield Match(root, {**m.bindings, "x": source, "cos": cos}, (*m.nodes, *nodes))

    def refuse(self, m: Match) -> str | None:
        rank = value(m.x).dim()
        if m.dim % rank != rank - 1:
            return f"the halves are joined along dimension {m.dim % rank}, not along the last one"
        if _half(m.lower, m.x) != 0 or _half(m.upper, m.x) != 1:
            return "what is joined is not [−second half, first half] of the input"
        return None

    def after(self, m: Match, new: Builder) -> Node | dict[Node, Node]:
        return new(rotary, m.x, m.cos, m.sin)


class RotaryPair(Rotary):
    """Queries and keys turned by the same cosines and sines."""

    def matches(self, program: Program) -> Iterator[Match]:
        for first, second in self._pairs(program):
            if not (first.x._erased or second.x._erased):
                yield Match(first.root, {"first": first, "second": second}, (*first.nodes, *second.nodes))

    def _pairs(self, program: Program) -> list[tuple[Match, Match]]:
        """Each with the nearest earlier one that it shares its angles with and doesn't depend on."""
        order = {node: position for position, node in enumerate(program.graph.nodes)}
        waiting: list[Match] = []
        pairs = []
        for m in super().matches(program):
            if super().refuse(m) is not None:
                continue
            partner = next((w for w in waiting if _share(w, m) and not _depends(m.root, w.root, order)), None)
            if partner is None:
                waiting.append(m)
            else:
                waiting.remove(partner)
                pairs.append((partner, m))
        return pairs

    def refuse(self, m: Match) -> str | None:
        return None

    def after(self, m: Match, new: Builder) -> dict[Node, Node]:
        built = {}
        for part in (m.first, m.second):
            built[part.root] = new.at(part.root)(rotary, part.x, part.cos, part.sin)
        return built


SPLITS = ("chunk", "split", "split_with_sizes")


def _share(a: Match, b: Match) -> bool:
    return same_value(a.cos, b.cos) and same_value(a.sin, b.sin)


def _depends(later: Node, earlier: Node, order: dict[Node, int]) -> bool:
    """Whether `later` is computed from `earlier`."""
    pending, seen, floor = [later], {later}, order[earlier]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source is earlier:
                return True
            if source not in seen and order[source] > floor:
                seen.add(source)
                pending.append(source)
    return False


def _source(part: Any) -> Node | None:
    """What a node is a part of."""
    name = op_name(part)
    if name in ("slice", "narrow"):
        return part.args[0]
    if isinstance(part, Node) and part.target is operator.getitem and op_name(part.args[0]) in SPLITS:
        return part.args[0].args[0]
    return None


def _half(part: Node, x: Node) -> int | None:
    """0 or 1, where `part` is the first or second half of x along the last dimension."""
    rank, size = value(x).dim(), value(x).shape[-1]
    if _source(part) is not x or not isinstance(size, int) or size % 2 or value(part).shape[-1] != size // 2:
        return None
    if part.target is operator.getitem:
        given = arguments(part.args[0])
        start = sum(value(part.args[0])[i].shape[-1] for i in range(part.args[1]))
    else:
        given = arguments(part)
        start = given.get("start") or 0
        if given.get("step", 1) != 1:
            return None
        start = start + size if isinstance(start, int) and start < 0 else start
    if given["dim"] % rank != rank - 1:
        return None
    return {0: 0, size // 2: 1}.get(start) if isinstance(start, int) else None


def _whole(root: Node) -> tuple[Node, list[Node]]:
    """The root, or its concatenation with an empty remainder (all of the head turns, none passes through)."""
    joined = only_user(root, "cat")
    if joined is None:
        return root, []
    others = [t for t in joined.args[0] if t is not root]
    empty = all(same_size(value(t).shape[-1], 0) and value(t).dim() == value(root).dim() for t in others)
    last = arguments(joined)["dim"] % value(root).dim() == value(root).dim() - 1
    alone = len(others) == len(joined.args[0]) - 1 and empty and last
    return (joined, [joined]) if alone else (root, [])
