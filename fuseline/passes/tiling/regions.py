"""Position-wise regions: all that leads to one value row by row, and that nothing else reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ...compiler.compat import size_hint
from ...compiler.program import Program
from ...compiler.regions import region_of
from ...compiler.traits import is_view
from ..sequence.placement import Axis, Shard
from ..sequence.rules import find
from ..sequence.rules._define import Rowwise, value
from ..sequence.rules.views import Part, Reshape

WIDER = 1.5
"""How much wider than its ends a region has to be inside."""


@dataclass(frozen=True)
class Region:
    """exit: what it makes; nodes: its calls in order, the exit last; entries: what it reads that has the positions;
    placed: along which dimension each node and entry has them; length: how many there are."""

    exit: Node
    nodes: tuple[Node, ...]
    entries: tuple[Node, ...]
    placed: dict[Node, Shard]
    length: Any


def find_regions(program: Program) -> list[Region]:
    """The regions worth tiling, in the graph's order."""
    seen: set[Node] = set()
    found = []
    order = {n: i for i, n in enumerate(program.graph.nodes)}
    for node in reversed(program.graph.nodes):
        if node in seen or not _has_positions(node):
            continue
        region = _grown(node, order)
        if _is_wide(region):
            found.append(region)
            seen.update(region.nodes)
    return found[::-1]


def _has_positions(node: Node) -> bool:
    x = node.meta.get("val")
    return isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() >= 2 and _is_rowwise(node)


def _grown(exit: Node, order: dict[Node, int]) -> Region:
    """The largest region that makes a value."""
    x = value(exit)
    dim = max(range(x.dim() - 1), key=lambda d: size_hint(x.shape[d], 1))
    length = x.shape[dim]
    placed = {exit: Shard(dim, Axis(length, length, 1, True))}
    inside: set[Node] = set()
    pending = [exit]
    while pending:
        node = max(pending, key=order.__getitem__)  # behind all that it reads: its users were looked at
        pending.remove(node)
        if not _may_be_inside(node, exit, inside):
            continue
        sources = list(find(node.target).back(node, placed[node]))  # type: ignore[union-attr]
        if not sources or any(s in placed and not placed[s].is_like(shard) for s, shard in sources):
            continue
        inside.add(node)
        for source, shard in sources:
            if source not in placed:
                placed[source] = shard
                pending.append(source)
    nodes = tuple(sorted(inside, key=order.__getitem__))
    read = dict.fromkeys(s for n in nodes for s in n.all_input_nodes if s not in inside and s in placed)
    return Region(exit, nodes, tuple(read), placed, length)


def _may_be_inside(node: Node, exit: Node, inside: set[Node]) -> bool:
    if not _is_rowwise(node) or node.meta.get("autocast") != exit.meta.get("autocast"):
        return False
    return node is exit or all(user in inside for user in node.users)


def _is_rowwise(node: Node) -> bool:
    """Whether a call works row by row by its rule, and may be made several of."""
    if node.op != "call_function" or not isinstance(find(node.target), (Rowwise, Reshape, Part)):
        return False
    schema = getattr(node.target, "_schema", None)
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return not random and not (schema is not None and schema.is_mutable) and region_of(node) is None


def _is_wide(region: Region) -> bool:
    ends = max((_size(n) for n in (region.exit, *region.entries)), default=0)
    inner = [n for n in region.nodes if n is not region.exit and not is_view(n.target)]
    return bool(region.entries) and max((_size(n) for n in inner), default=0) >= WIDER * ends


def _size(node: Node) -> int:
    x = node.meta.get("val")
    if not isinstance(x, torch.Tensor):
        return 0
    return size_hint(x.numel(), 0) * x.element_size()
