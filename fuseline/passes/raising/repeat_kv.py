"""Keys and values repeated for their query heads → `fuseline.attention` on the heads that there are.

    k = k[:, :, None].expand(B, h, g, T, D).reshape(B, h * g, T, D)
    o = attention(q, k, v, …)                        o = attention(q, k₀, v₀, …)

Query head i reads key head i // g: what `repeat_interleave(g, 1)` or expand and reshape make. Source: Ainslie et al.,
2023, "GQA: Training Generalized Multi-Query Transformer Models".
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from ...compiler.pattern import Match
from ...compiler.program import Program
from ...compiler.rewriter import Builder
from ...compiler.rule import Rule
from ...compiler.traits import arguments
from .nodes import op_name, same_size, value

RESHAPES = ("reshape", "view", "_unsafe_view", "flatten")


class RepeatedHeads(Rule):
    def matches(self, program: Program) -> Iterator[Match]:
        for node in list(program.graph.nodes):
            if node.target is not torch.ops.fuseline.attention.default:
                continue
            k, v = _Repeat.of(node.args[1]), _Repeat.of(node.args[2])
            if k is not None and v is not None and k.groups == v.groups:  # the op has one grouping for both
                yield Match(node, {"k": k, "v": v}, (node, *k.nodes, *v.nodes))

    def refuse(self, m: Match) -> str | None:
        if not (m.k.interleaved and m.v.interleaved):
            return "the heads are tiled (0, 1, 0, 1), not repeated one by one (0, 0, 1, 1)"
        return None

    def after(self, m: Match, new: Builder) -> Node:
        query, _, _, *rest = m.root.args
        return new(m.root.target, query, m.k.source, m.v.source, *rest, **m.root.kwargs)


class _Repeat:
    """x repeated along its head dimension: by how much, in which order, by which nodes."""

    def __init__(self, source: Node, groups: int, interleaved: bool, nodes: tuple[Node, ...]):
        self.source, self.groups, self.interleaved, self.nodes = source, groups, interleaved, nodes

    @staticmethod
    def of(node: Node) -> _Repeat | None:
        outer = node
        nodes: tuple[Node, ...] = ()
        while op_name(node) in ("clone", "contiguous"):
            node, nodes = node.args[0], (*nodes, node)  # type: ignore[assignment]
        name = op_name(node)
        if name == "repeat_interleave":
            return _Repeat._interleave(node, nodes)
        if name == "repeat":
            return _Repeat._tile(node, nodes)
        if name == "expand":
            return _Repeat._one_head(node, nodes)
        return _Repeat._expanded(node, outer, nodes) if name in RESHAPES else None

    @staticmethod
    def _interleave(node: Node, nodes: tuple[Node, ...]) -> _Repeat | None:
        given = arguments(node)
        source, groups = given["self"], given["repeats"]
        if not isinstance(groups, int) or given["dim"] is None or given["dim"] % value(source).dim() != 1:
            return None
        return _Repeat(source, groups, True, (*nodes, node))

    @staticmethod
    def _tile(node: Node, nodes: tuple[Node, ...]) -> _Repeat | None:
        source, times = arguments(node)["self"], arguments(node)["repeats"]
        rank = value(source).dim()
        if rank != 4 or len(times) != 4 or [t for d, t in enumerate(times) if d != 1] != [1, 1, 1]:
            return None
        single = same_size(value(source).shape[1], 1)
        return _Repeat(source, times[1], single, (*nodes, node)) if isinstance(times[1], int) else None

    @staticmethod
    def _one_head(node: Node, nodes: tuple[Node, ...]) -> _Repeat | None:
        source = node.args[0]
        before, after = value(source).shape, value(node).shape  # type: ignore[arg-type]
        kept = len(before) == 4 and all(same_size(before[d], after[d]) for d in (0, 2, 3))
        if not kept or not same_size(before[1], 1) or not isinstance(after[1], int):
            return None
        return _Repeat(source, after[1], True, (*nodes, node))  # type: ignore[arg-type]

    @staticmethod
    def _expanded(node: Node, outer: Node, nodes: tuple[Node, ...]) -> _Repeat | None:
        """reshape(expand(unsqueeze(x))): interleaved where the new dimension follows the heads, tiled before them."""
        inner, seen = node.args[0], [*nodes, node]
        while op_name(inner) in ("clone", "contiguous"):
            seen.append(inner)  # type: ignore[arg-type]
            inner = inner.args[0]  # type: ignore[union-attr]
        if op_name(inner) != "expand" or op_name(inner.args[0]) != "unsqueeze":  # type: ignore[union-attr]
            return None
        wide = value(inner).shape  # type: ignore[arg-type]
        column: Node = inner.args[0]  # type: ignore[union-attr, assignment]
        source: Node = column.args[0]  # type: ignore[assignment]
        at, shape, result = arguments(column)["dim"] % 5, value(source).shape, value(outer).shape
        if len(wide) != 5 or len(result) != 4 or at not in (1, 2) or not isinstance(wide[at], int):
            return None
        if not all(same_size(a, b) for a, b in zip(shape, (*wide[:at], *wide[at + 1 :]), strict=True)):
            return None  # the expansion widens another dimension too
        kept = all(same_size(shape[d], result[d]) for d in (0, 2, 3)) and same_size(result[1], wide[1] * wide[2])
        if not kept:
            return None
        interleaved = at == 2 or same_size(shape[1], 1)
        return _Repeat(source, wide[at], interleaved, (*seen, inner, column))  # type: ignore[arg-type]
