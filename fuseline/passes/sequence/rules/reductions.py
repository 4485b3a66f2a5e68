"""Sums, means, extremes and scans. Along the sequence each rank reduces its own positions and the ranks' results are
put together; positions that do not exist are left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ....compiler.traits import arguments
from ..placement import Partial, Shard, Sharded
from ._define import Dims, Rowwise, overloads, rule, same, value

if TYPE_CHECKING:
    from ..run import Run


def _over(node: Node) -> list[int]:
    """The dimensions that are reduced."""
    given = arguments(node)
    rank = value(given["self"]).dim()
    named = given.get("dim")
    if named is None or named == []:
        return list(range(rank))
    return [int(d) % rank for d in (named if isinstance(named, (list, tuple)) else [named])]


class _Reduction(Rowwise):
    def dims(self, node: Node) -> Dims:
        given, over = arguments(node), _over(node)
        x, kept = given["self"], bool(given.get("keepdim"))
        goes = []
        for d in range(value(x).dim()):
            goes.append(None if d in over else d if kept else d - sum(o < d for o in over))
        return {x: goes}


@rule(*overloads("sum.default sum.dim_IntList"))
class Sum(_Reduction):
    def mixes(self, run: Run, node: Node, source: Node) -> Any:
        return Partial(run.call(node, {source: run.masked(run.values[source])}))


@rule(*overloads("mean.default mean.dim"))
class Mean(_Reduction):
    def mixes(self, run: Run, node: Node, source: Node) -> Any:
        given, over = arguments(node), _over(node)
        x = run.masked(run.values[source])
        total = torch.ops.aten.sum.dim_IntList(x, over, bool(given.get("keepdim")), dtype=given.get("dtype"))
        count: Any = 1
        for d in over:
            count = count * value(source).shape[d]
        return Partial(total / count)


@rule(*overloads("amax.default amin.default max.default min.default any.default any.dim all.default all.dim"))
class Extreme(_Reduction):
    def mixes(self, run: Run, node: Node, source: Node) -> Any:
        """The extreme of the ranks' extremes. A position beyond the end repeats one inside, so it changes none."""
        found = run.values[source]
        name = node.target._opname  # type: ignore[union-attr]
        x = run.repeated(found)
        mine = run.call(node, {source: x})
        every = run.group.all_gather(mine.to(torch.uint8) if mine.dtype is torch.bool else mine)
        if name in ("any", "all"):
            return (every != 0).any(0) if name == "any" else (every != 0).all(0)
        return torch.amax(every, 0) if name in ("amax", "max") else torch.amin(every, 0)


@rule(*overloads("var.correction var.dim std.correction argmax.default argmin.default logsumexp.default "
                 "linalg_vector_norm.default norm.ScalarOpt_dim max.dim min.dim "
                 "var_mean.correction prod.dim_int"))  # fmt: skip
class Other(_Reduction):
    """Reductions that stay within a position."""


@rule(*overloads("cumsum.default"))
class RunningSum(Rowwise):
    def dims(self, node: Node) -> Dims:
        x = node.args[0]
        return {x: same(x, node.args[1])}  # type: ignore[dict-item, arg-type]

    def mixes(self, run: Run, node: Node, source: Node) -> Any:
        """A running sum goes on from the sum of all earlier ranks."""
        found: Sharded = run.values[source]
        shard: Shard = found.shard
        if not (shard.outer == 1 and shard.inner == 1) or shard.axis.zigzag:
            return run.refuse(node, f"it adds up along dimension {shard.dim}, which is no plain sequence")
        mine = run.call(node, {source: run.masked(found)})
        totals = run.group.all_gather(mine.narrow(shard.dim, shard.axis.block - 1, 1))
        if run.group.rank:
            mine = mine + totals[: run.group.rank].sum(0, dtype=mine.dtype)
        else:
            mine = mine + totals[:1].sum(0, dtype=mine.dtype) * 0  # every rank's graph is the same
        return Sharded(mine, shard)
