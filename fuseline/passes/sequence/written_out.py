"""Attention that is written out as two products with a softmax between them: cut by heads from the first to the second.

scores = q @ kᵀ        both factors hold the sequence: their heads are exchanged for it
… mask, soft-capping, softmax …       on this rank's heads, all positions
y = scores @ v         v follows, and the result goes back to this rank's positions
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, Node

from ...compiler.compat import known_size
from .placement import Axis, Shard, Sharded, same_size

if TYPE_CHECKING:
    from .run import Run

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default)
_SOFTMAX = ("softmax", "_softmax", "_safe_softmax")
_STEPS = 24  # nodes between the scores and their softmax: scale, cap, mask, cast


def scores(graph: Graph) -> Iterator[Node]:
    """The products whose result reaches a softmax over its last dimension, element by element."""
    found: dict[Node, None] = {}
    for node in graph.nodes:
        if getattr(node.target, "_opname", "") not in _SOFTMAX or node.args[1] not in (-1, node.meta["val"].dim() - 1):
            continue
        pending, seen = [node.args[0]], 0
        while pending and seen < _STEPS:
            at, seen = pending.pop(), seen + 1
            if at.target in PRODUCTS:
                if all(isinstance(a, Node) and a.op != "get_attr" for a in at.args[:2]):
                    found[at] = None
            elif at.op == "call_function" and same_rank(at, node):
                pending += [n for n in at.all_input_nodes if same_rank(n, node)]
    yield from found


def same_rank(a: Node, b: Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    return isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and x.shape[-2:] == y.shape[-2:]


def product_by_heads(run: Run, node: Node) -> Any:
    """The product with its factors cut by heads."""
    left, right = node.args[:2]
    rank = node.meta["val"].dim()
    if rank < 3 or any(n.meta["val"].dim() != rank for n in (left, right)):
        return run.refuse(node, "both factors hold the sequence, and they have no heads to be cut instead")
    at = rank - 3
    count = known_size(node.meta["val"].shape[at])
    if count is None or any(known_size(n.meta["val"].shape[at]) != count for n in (left, right)):
        return run.refuse(node, f"both factors hold the sequence, and dimension {at} is no number of heads")
    factors = [_by_heads(run, n, at, count) for n in (left, right)]
    result = run.call(node, dict(zip((left, right), factors)))
    back = run.values[right]
    rows = node.meta["val"].shape[-2]
    if isinstance(back, Sharded) and not back.shard.axis.heads and back.shard.dim == rank - 2:
        if not same_size(back.shard.axis.length, rows):
            return run.refuse(node, "its queries and keys are sequences of two lengths (cross-attention)")
        mine = run.group.heads_to_sequence(result, rank - 2, back.shard.axis, at)
        mine = mine if count % run.group.degree == 0 else mine.narrow(at, 0, count)
        return Sharded(mine, Shard(rank - 2, back.shard.axis))
    return Sharded(result, Shard(at, _heads(run, count)))


def _heads(run: Run, count: int) -> Axis:
    block = -(-count // run.group.degree)
    return Axis(count, block, run.group.degree, count % run.group.degree == 0, heads=True)


def _by_heads(run: Run, node: Node, at: int, count: int) -> torch.Tensor:
    found, axis = run.values[node], _heads(run, count)
    if not isinstance(found, Sharded):
        return run.local(node, list(range(node.meta["val"].dim())), Shard(at, axis), node)
    if found.shard.axis.heads:
        return found.tensor
    x = found.tensor
    if not axis.even:
        order = torch.arange(run.group.degree * axis.block, device=x.device).clamp(max=count - 1)
        x = x.index_select(at, order)
    return run.group.sequence_to_heads(x, found.shard.dim, found.shard.axis, at)
