"""Ops that pick elements by index, and experts: the picked dimension is read whole, the index row by row."""

from __future__ import annotations

from torch.fx import Node

from ....compiler.traits import arguments
from ._define import Dims, aligned, dialect, nothing, overloads, rule, same, tensors, value


@rule(*overloads("gather.default take_along_dim.default"))
def gather(node: Node) -> Dims:
    given = arguments(node)
    x, index = given["self"], given.get("index", given.get("indices"))
    return {x: same(x, given["dim"]), index: same(index)}


@rule(*overloads("scatter.value scatter.src scatter_add.default scatter.reduce"))
def scatter(node: Node) -> Dims:
    dim = arguments(node)["dim"]
    return {n: same(n, dim) for n in tensors(node)}


@rule(*overloads("index_select.default"))
def index_select(node: Node) -> Dims:
    given = arguments(node)
    x, dim = given["self"], int(given["dim"]) % value(given["self"]).dim()
    return {x: same(x, dim), given["index"]: [dim]}


@rule(*overloads("index.Tensor"))
def index(node: Node) -> Dims:
    """x[i, j]: the indices broadcast to dimensions of their own, which stand where the first of them does."""
    x, indices = node.args[:2]
    at = [d for d, i in enumerate(indices) if i is not None]  # type: ignore[arg-type]
    given = [i for i in indices if i is not None]  # type: ignore[union-attr]
    if any(value(i).dtype.is_floating_point or value(i).element_size() == 1 for i in given):  # a mask: sizes unknown
        return {n: nothing(n) for n in tensors(node)}
    wide = max(value(i).dim() for i in given)
    together = at == list(range(at[0], at[-1] + 1))
    first = at[0] if together else 0
    rank = value(x).dim()  # type: ignore[arg-type]
    goes: list[int | None] = []
    for d in range(rank):
        if d in at:
            goes.append(None)
        else:
            before = sum(o < d for o in at)
            behind = d > at[-1] or not together or d > at[0]
            goes.append(d - before + (wide if behind else 0))
    return {**{i: [d + first for d in aligned(i, wide)] for i in given}, x: goes}  # type: ignore


@rule(*dialect("moe"))
def experts(node: Node) -> Dims:
    """Routed experts: each token's result is its own."""
    given = arguments(node)
    rows = {given[name]: same(given[name], -1) for name in ("hidden", "indices", "weights")}
    return {**{n: nothing(n) for n in tensors(node)}, **rows}
