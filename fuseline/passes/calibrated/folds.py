"""Scaling channels of a value where it is exact: x → x/s where x is made, W → W·diag(s) where it is read.

    norm(h)·γ → linear(·, W)            norm(h)·(γ/s) → linear(·, W·diag(s))
    silu(g) * (h·Vᵀ + b) → linear       silu(g) * (h·(V/s)ᵀ + b/s) → linear(·, W·diag(s))

Read must x be by products alone, channel by channel; and between it and where it is made there is only what a factor
above zero passes through. The products are those of `rotate`, found by the same functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from ...compiler import ops
from ...compiler.expressions import Expression, Offset, Planned, Scale
from ...compiler.order import touches_written
from ...compiler.rewriter import Builder, Rewriter
from ..raising.nodes import op_name, same_size
from ..rotation.folds import Folds
from ..rotation.products import Product, product
from ..rotation.stream import is_norm, readers_of

_PASSES = ("relu", "contiguous", "clone", "detach", "alias")
"""Ops of one operand for which f(x/s) = f(x)/s."""


@dataclass(frozen=True)
class Fold:
    """writer: the norm or the product that makes the channels; readers: the products that read them."""

    writer: Node
    readers: tuple[Product, ...]


def find(nodes: Sequence[Node], folds: Folds) -> Fold | str:
    """Where the channels that these products, all of one value, read may be scaled; or why nowhere."""
    made = [product(node) for node in nodes]
    if any(one is None or one.weight.meta["val"].dim() != 2 for one in made):
        return "it is no product with a matrix"
    x = made[0].x  # type: ignore[union-attr]
    readers = readers_of(x, folds)
    if readers is None:
        others = [user.name for user in x.users if user not in nodes]
        return f"{x.name} is read by {others[0]} as well" if others else "its weight is tied or trained"
    if {one.node for one in readers} != set(nodes):
        return f"{x.name} is read by products that are not rounded, or through other views"
    writer = _writer(x, folds)
    return writer if isinstance(writer, str) else Fold(writer, tuple(readers))


def _writer(x: Node, folds: Folds) -> Node | str:
    """The norm with a scale, or the product, that x's channels come from one by one."""
    if x.op != "call_function" or touches_written(x):
        return f"its channels come from {x.name}, which takes no scale"
    if is_norm(x) or x.target is ops.layer_norm.overload:
        vectors = [n for n in x.args[1 : 2 if is_norm(x) else 3] if n is not None]
        known = x.args[1] is not None and all(isinstance(n, Node) and "weight" in n.meta for n in vectors)
        if known and not any(folds.trained(n.meta["weight"]) for n in vectors):  # type: ignore[union-attr]
            return x
        return f"{x.name} has no scale of its own"
    made = product(x)
    if made is not None:
        folded = made.weight.meta["val"].dim() == 2 and all(map(folds, made.weights()))
        return x if folded else f"the weight of {x.name} is tied, trained or a stack"
    name, width = op_name(x), x.meta["val"].shape[-1]
    if x.target is ops.glu.overload:
        operands = [x.args[1]]
    elif name == "mul":
        operands = [n for n in x.args if isinstance(n, Node) and n.meta["val"].dim() == x.meta["val"].dim()]
    elif name in _PASSES:
        operands = [x.args[0]]
    else:
        operands = []
    for operand in operands:
        if len(operand.users) == 1 and same_size(operand.meta["val"].shape[-1], width):  # type: ignore[union-attr]
            found = _writer(operand, folds)  # type: ignore[arg-type]
            if isinstance(found, Node):
                return found
    return f"its channels come through {x.name} ({x.target}), which no scale passes"


def apply(rewriter: Rewriter, fold: Fold, scales: torch.Tensor) -> None:
    """One rewrite that changes no result. scales: s, [channels], above zero; in float64."""
    device = str(fold.writer.meta["val"].device)
    up, down = Planned.of(scales, device), Planned.of(1 / scales, device)

    def scaled(weight: Expression, value: torch.Tensor, dim: int) -> Expression:
        return Scale(weight, down, dim)

    def build(new: Builder) -> dict[Node, Node]:
        writer = product(fold.writer)
        new.at(fold.writer)
        made = {fold.writer: writer.with_rows(new, scaled) if writer else _norm(new, fold.writer, down)}
        for reader in fold.readers:
            weight = Scale(reader.expression, up, reader.inputs)
            made[reader.node] = reader.rebuilt(new.at(reader.node), reader.x, weight)
        return made

    first = fold.readers[0].node
    rewriter.rewrite(first, [fold.writer, *(reader.node for reader in fold.readers)], build, "scales")


def _norm(new: Builder, norm: Node, by: Expression) -> Node:
    x, weight, *rest = norm.args
    scale: Expression = weight.meta["weight"]  # type: ignore[union-attr]
    if not is_norm(norm):
        bias, eps = rest
        shift = None if bias is None else new.weight(Scale(bias.meta["weight"], by, 0))  # type: ignore[union-attr]
        return new(ops.layer_norm, x, new.weight(Scale(scale, by, 0)), shift, eps)
    eps, unit, *others = [*rest, False][: max(2, len(rest))]
    scale = Offset(scale, 1.0) if unit else scale
    return new(ops.rms_norm, x, new.weight(Scale(scale, by, 0)), eps, False, *others)
