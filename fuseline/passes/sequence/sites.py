"""Where the sequence is, found from attention: the positions of its queries and keys, followed back to the inputs.

No input is tagged. From the queries' and keys' next-to-last dimension the rules are followed backwards; what they reach
is what can be computed for a block of positions alone, down to the token ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from .placement import Axis, Shard, same_size
from .rules import find
from .written_out import scores

CALLS = (torch.ops.aten.scaled_dot_product_attention.default, torch.ops.fuseline.attention.default)


@dataclass(frozen=True)
class Site:
    """One attention: its node, and its queries, keys and values with the dimension of their positions."""

    node: Node
    ends: tuple[tuple[Node, int], ...]


def attentions(graph: Graph) -> list[Site]:
    """All attentions, in order."""
    found = []
    written_out = set(scores(graph))
    for node in graph.nodes:
        if node.target in CALLS:
            found.append(Site(node, tuple((n, n.meta["val"].dim() - 2) for n in node.args[:3])))
        elif node in written_out:
            left, right = node.args[:2]
            rank = node.meta["val"].dim()
            found.append(Site(node, ((left, rank - 2), (right, rank - 1))))
    return found


def trace_back(sites: list[Site], axis_of: Callable[[Any], Axis]) -> dict[Node, Shard]:
    """For every node that leads to the positions of an attention: along what it would be cut."""
    found: dict[Node, Shard] = {}
    pending = []
    for site in sites:
        for node, dim in site.ends:
            pending.append((node, Shard(dim, axis_of(node.meta["val"].shape[dim]))))
    while pending:
        node, shard = pending.pop()
        if node in found:
            continue
        found[node] = shard
        rule = find(node.target) if node.op == "call_function" else None
        if rule is not None:
            pending += rule.back(node, shard)
    return found


def starts(found: dict[Node, Shard]) -> dict[Node, Shard]:
    """Those among them whose block is better computed alone than cut out of the whole: floating-point results of work
    on their inputs. Whole numbers (token ids, positions, masks, labels) stay whole: they are small, and what depends on
    all of them is then right by itself."""
    chosen = {}
    for node, shard in found.items():
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
            continue
        rule = find(node.target)
        if rule is not None and rule.starts and any(True for _ in rule.back(node, shard)):
            chosen[node] = shard
    return chosen


def inputs(found: dict[Node, Shard]) -> dict[Node, int]:
    """The caller's tensors that hold the sequence, and along which dimension."""
    return {n: s.dim for n, s in found.items() if n.op == "placeholder" and same_size(s.outer, 1)}
