"""Products: a linear layer works row by row on all but the last dimension, a matrix product on its outer ones.

Where both factors hold the sequence, as the scores of attention that is written out do, the heads are cut instead and
the product stays whole along the sequence: `attention.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.fx import Node

from ....compiler.traits import arguments
from ..placement import Partial, Sharded
from ..written_out import product_by_heads
from ._define import Dims, Rowwise, aligned, nothing, overloads, rule, same, tensors, value

if TYPE_CHECKING:
    from ..run import Run


@rule(*overloads("linear.default"))
def linear(node: Node) -> Dims:
    given = arguments(node)
    return {**{n: nothing(n) for n in tensors(node)}, given["input"]: same(given["input"], -1)}


@rule(*overloads("addmm.default"))
def addmm(node: Node) -> Dims:
    bias, a, b = node.args[:3]
    return {bias: aligned(bias, 2), b: [None, 1], a: [0, None]}  # type: ignore[arg-type, dict-item]


@rule(*overloads("matmul.default mm.default bmm.default"))
class Product(Rowwise):
    def dims(self, node: Node) -> Dims:
        a, b = node.args[:2]
        rank = value(node).dim()
        if value(a).dim() == 1 or value(b).dim() == 1:  # type: ignore[arg-type]
            left = same(a, -1)  # type: ignore[arg-type]
            return {b: nothing(b), a: left}  # type: ignore[arg-type, dict-item]
        return {b: _factor(b, rank, 1), a: _factor(a, rank, 0)}  # type: ignore[arg-type, dict-item]

    def forward(self, run: Run, node: Node) -> Any:
        a, b = (run.values.get(n) for n in node.args[:2])  # type: ignore[arg-type]
        if isinstance(a, Sharded) and isinstance(b, Sharded):
            to = self.dims(node)
            rows, columns = (to[n][s.shard.dim] for n, s in zip(node.args[:2], (a, b)))  # type: ignore[index]
            if a.shard.axis.heads != b.shard.axis.heads or (
                rows is not None and columns is not None and rows != columns
            ):
                return product_by_heads(run, node)
            if rows is None and columns is None:
                return self._summed(run, node, a, b)
        return super().forward(run, node)

    def _summed(self, run: Run, node: Node, a: Sharded, b: Sharded) -> Partial:
        """A sum over the sequence: each rank adds up its own positions."""
        left, right = run.masked(a), run.masked(b)
        return Partial(run.call(node, {node.args[0]: left, node.args[1]: right}))  # type: ignore[dict-item]


def _factor(x: Node, rank: int, kept: int) -> list[int | None]:
    """Outer dimensions broadcast; of the last two the contracted one goes nowhere."""
    own = value(x).dim()
    outer: list[int | None] = [d + rank - own for d in range(own - 2)]
    return [*outer, rank - 2, None] if kept == 0 else [*outer, None, rank - 1]
