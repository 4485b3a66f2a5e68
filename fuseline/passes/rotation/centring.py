"""LayerNorm as RMSNorm of a centred stream, so that rotations commute with it.

    layer_norm(x, γ, β)  =  rms_norm(x − mean(x), γ) + β

The mean is taken away where the stream is written: C = I − 11ᵀ/n, folded into the rows of every product that writes it
and into embeddings. That is exact where layer norms alone read the stream, since they ignore the mean; where anything
else does, or the stream is written by a norm (as behind each block of a post-norm encoder), it is refused. β goes into
the biases of the products behind the norm. Source: Ashkboos et al., 2024, arXiv:2401.15024, section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ...compiler import ops
from ...compiler.expressions import Add, Cast, Centre, Expression, Matmul, Reshape, Transpose
from ...compiler.program import Program
from ...compiler.rewriter import Builder, Rewriter
from ...compiler.traits import is_transpose
from .carriers import carriers
from .folds import Folds
from .products import Product, carried_over, with_rows
from .stream import Stream, flood, readers_of

aten = torch.ops.aten


def centre(program: Program, rewriter: Rewriter, folds: Folds, online: int) -> None:
    """Replaces the layer norms of each stream that can be centred; `online` means at most may be taken at run time."""
    known: dict[Node, tuple[_Twins, str | None]] = {}
    for norm in [n for n in program.graph.nodes if n.target is ops.layer_norm.overload]:
        x: Any = norm.args[0]
        if x not in known:
            stream = flood(x, int(norm.meta["val"].shape[-1]), folds, centring=True)
            known.update(dict.fromkeys(stream.before, (_Twins(stream), _refuse(stream, online, folds))))
        twins, reason = known[x]
        if reason is None:
            _replace(rewriter, norm, twins, folds)
        else:
            rewriter.refuse(norm, f"R1: {reason}")


def _refuse(stream: Stream, online: int, folds: Folds) -> str | None:
    if stream.leaves:
        use = next(iter(stream.leaves.values()))
        return f"its input cannot be centred: {use.name} ({use.target}) reads it as well, mean and all"
    if len(stream.enters) > online:
        first = stream.enters[0]
        return (
            f"its input cannot be centred where it is made: {first.name} ({first.target}) and "
            f"{len(stream.enters) - 1} others are no products"
        )
    if not stream.is_written:
        return (
            f"its input comes from {stream.enters[0].name} ({stream.enters[0].target}), which cannot be centred, alone"
        )
    norms = {u for n in stream.before for u in n.users if u.target is ops.layer_norm.overload}
    if not any(readers_of(norm, folds) for norm in norms):
        return "what it returns is read by others than products, or by a tied head alone"
    return None


class _Twins:
    """The centred values beside the values of a stream, made when they are asked for."""

    def __init__(self, stream: Stream):
        self.stream = stream
        self.made: dict[Node, Node] = {}

    def __call__(self, new: Builder, node: Node) -> Node:
        if node not in self.made:
            self.made[node] = self._make(new, node)
        return self.made[node]

    def _make(self, new: Builder, node: Node) -> Node:
        before, carried = self.stream.before[node], carriers(node, self.stream.block)
        if before:
            return carried_over(new, node, {c: self(new, c) for c in before})
        if before is None or carried == ():  # something else, or zeros
            return new(aten.sub.Tensor, node, new(aten.mean.dim, node, [-1], True))
        if "weight" in node.meta:
            return new.weight(_centred(node.meta["weight"], node.meta["val"], -1))
        return with_rows(new, node, _centred)


def _centred(x: Expression, value: torch.Tensor, dim: int) -> Expression:
    return Cast(Centre(Cast(x, torch.float64), dim % value.dim()), value.dtype)


def _replace(rewriter: Rewriter, norm: Node, twins: _Twins, folds: Folds) -> None:
    x, scale, shift, eps = norm.args
    readers = readers_of(norm, folds) if shift is not None else None
    trained = shift is not None and folds.trained(shift.meta["weight"])
    into = readers if readers and not trained and all(_takes_bias(r, folds) for r in readers) else None

    def build(new: Builder) -> Node | dict[Node, Node]:
        dtype = norm.meta["val"].dtype
        wide = torch.float32 if dtype.itemsize < 4 else None
        plain = new(ops.rms_norm, twins(new, x), scale, eps, False, wide, True)  # type: ignore[arg-type]
        if into is None:
            return plain if shift is None else new(aten.add.Tensor, plain, shift)
        copies = {norm: plain}
        return {reader.node: _biased(new, reader, copies, shift) for reader in into}  # type: ignore[arg-type]

    rule = "layer norm of a centred stream"
    rewriter.rewrite(norm, [norm, *(reader.node for reader in into or ())], build, rule)


def _takes_bias(reader: Product, folds: Folds) -> bool:
    """Whether a product has a bias that may be replaced, or is a linear but for the spelling."""
    if reader.bias is not None and folds.trained(reader.bias.meta["weight"]):
        return False
    known = reader.node.target in (aten.linear.default, aten.addmm.default)
    return known or (reader.weight.meta["val"].dim() == 2 and all(is_transpose(view) for view in reader.path))


def _biased(new: Builder, reader: Product, copies: dict[Node, Node], shift: Node) -> Node:
    """The product of the norm without β, which its bias takes: b + W·β."""
    new.at(reader.node)
    value = reader.weight.meta["val"]
    table = Cast(reader.expression, torch.float64)
    rows = table if reader.inputs == 1 else Transpose(table, 0, 1)
    width = int(value.shape[reader.inputs])
    moved: Expression = Reshape(
        Matmul(rows, Reshape(shift.meta["weight"], (width, 1))), (int(value.shape[reader.outputs]),)
    )
    if reader.bias is not None:
        moved = Add(moved, reader.bias.meta["weight"])
    x, bias = _copied(new, reader.x, copies), Cast(moved, value.dtype)
    if reader.node.target in (aten.linear.default, aten.addmm.default):
        return reader.rebuilt(new, x, reader.expression, bias)
    weight = reader.expression if reader.inputs == 1 else Transpose(reader.expression, 0, 1)
    return new(aten.linear.default, x, new.weight(weight), new.weight(bias))


def _copied(new: Builder, node: Node, copies: dict[Node, Node]) -> Node:
    """The views between the norm and a product, over the new norm."""
    if node not in copies:
        source: Any = node.args[0]
        copies[node] = carried_over(new, node, {source: _copied(new, source, copies)})
    return copies[node]
