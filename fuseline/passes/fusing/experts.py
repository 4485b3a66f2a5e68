"""Regions of routed experts: the op, and what expands its matrices from codes.

gate_up, down = view(decode(codes…)), view(decode(codes…))
y = moe(hidden, indices, weights, gate_up, down)              →   y = region(hidden, indices, weights, codes…)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from ...compiler import ops, products
from ...compiler.order import touches_written
from ...compiler.program import Program
from ...compiler.traits import arguments
from .linear import DECODINGS, Region

aten = torch.ops.aten
ROUTED = (ops.moe.overload, ops.moe_pairs.overload)
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def expert_regions(program: Program) -> Iterator[Region]:
    """One for each call of routed experts."""
    for node in program.graph.nodes:
        if node.target not in ROUTED:
            continue
        given = arguments(node)
        expanded = [_expanded(given[name]) for name in ("gate_up", "down")]
        if node.target is ops.moe.overload and all(expanded) and expanded[0] != expanded[1]:
            nodes = [n for found in expanded for n in found]
            yield Region("experts", f"{_format(nodes[0])} + experts", [*nodes, node])
        else:
            yield Region("experts", "experts", [node])


def _expanded(matrix: Node) -> list[Node]:
    """The decoding of codes that a template can read, and its view as a stack; nothing where it is none."""
    found = [matrix]
    while found[0].target in VIEWS:
        found.insert(0, found[0].args[0])  # type: ignore[arg-type]
    decoded = found[0]
    if decoded.target not in DECODINGS or products.words_of(decoded, False) is None:
        return []
    alone = all(len(n.users) == 1 and not touches_written(n) for n in found)
    return found if alone else []


def _format(decoded: Node) -> str:
    given = arguments(decoded)
    return f"int{given['bits']}" if "bits" in given else str(given["format"])
