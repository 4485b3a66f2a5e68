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
    place = {node: i for i, node in enumerate(program.graph.nodes)}
    for node in place:
        if node.target not in ROUTED:
            continue
        given = arguments(node)
        expanded = [_expanded(given[name]) for name in ("gate_up", "down")]
        if node.target is ops.moe.overload and all(expanded) and expanded[0][-1] is not expanded[1][-1]:
            nodes = sorted((n for found in expanded for n in found), key=place.__getitem__)
            yield Region("experts", f"{_format(nodes)} + experts", [*nodes, node])
        else:
            yield Region("experts", "experts", [node])


def _expanded(matrix: Node) -> list[Node]:
    """What makes a stack of codes that a template can read, in order; nothing where it is none: the decoding, its view
    as a stack, and low ranks that are added to it, with the decoding of their factors."""
    found, factors = [matrix], []
    if matrix.target is ops.lowrank_add.overload:
        given = arguments(matrix)
        factors = [given[name] for name in ("up", "down") if products.rows_of_codes(given[name]) is not None]
        found.insert(0, given["base"])
    while found[0].target in VIEWS:
        found.insert(0, found[0].args[0])  # type: ignore[arg-type]
    decoded = found[0]
    if decoded.target is ops.decode_pairs.overload:
        if products.pair_words_of(decoded) is None:
            return []
    elif decoded.target not in DECODINGS or products.words_of(decoded, False) is None:
        return []
    found = [*factors, *found]
    alone = all(len(n.users) == 1 and not touches_written(n) for n in found)
    return found if alone else []


def _format(nodes: list[Node]) -> str:
    decoded = next(n for n in nodes if n.target in (*DECODINGS, ops.decode_pairs.overload))
    given = arguments(decoded)
    kind = f"int{given['bits']}" if "bits" in given else str(given["format"])
    if decoded.target is ops.decode_pairs.overload:
        return f"pairs in {kind}"
    return f"{kind} and low ranks" if any(n.target is ops.lowrank_add.overload for n in nodes) else kind
