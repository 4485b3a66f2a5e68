"""Where a program multiplies by weights: the sites that `quantize` takes, and what it cannot take, with the reason."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..compiler import ops
from ..compiler.expressions import Expression, Output, Reshape, Transpose
from ..compiler.order import Reachability
from ..compiler.program import Program
from ..compiler.provenance import module_path
from ..compiler.traits import arguments, is_transpose

aten = torch.ops.aten
_CONVOLUTIONS = {
    overload
    for packet in (aten.conv1d, aten.conv2d, aten.conv3d)
    for overload in (packet.default, packet.padding)
}  # fmt: skip
_PRODUCT = re.compile(r"mm|matmul|einsum|conv|lstm|gru|rnn_|multi_head_attention|encoder_layer")
_VIEWS = {
    "transpose",
    "permute",
    "t",
    "view",
    "reshape",
    "index",
    "index_select",
    "unsqueeze",
    "select",
    "slice",
    "to",
    "numpy_T",
    "mT",
}


@dataclass(frozen=True)
class Site:
    """A product with a weight.

    weight: the matrix to quantize, an expression [out, in]; shape: (out, in). A sparse product's is input-major, [in,
    out], and so is its shape: its codes lie along the outputs. kernel: for a convolution, the shape
    [out, in / groups, *kernel] that the matrix is folded back to.
    """

    node: Node
    x: Node
    weight: Expression
    bias: Node | None
    shape: tuple[int, int]
    path: str
    kernel: tuple[int, ...] | None = None

    @property
    def is_sparse(self) -> bool:
        """Whether it leaves input channels out, and its matrix is input-major."""
        return self.node.target is ops.sparse_linear.overload


def sites(program: Program) -> Iterator[Site]:
    """Every product of an activation with a weight, convolutions too, in graph order."""
    for node in list(program.graph.nodes):
        site = _convolution(program, node) if node.target in _CONVOLUTIONS else _linear(program, node)
        if site is not None:
            yield site


def _linear(program: Program, node: Node) -> Site | None:
    bias: Any = None
    if node.target is ops.sparse_linear.overload:
        x, table = node.args[:2]
        expression, value = _weight(table)
        if expression is None:
            return None
        return Site(node, x, expression, arguments(node)["bias"], tuple(map(int, value.shape)), path_of(table))  # type: ignore[arg-type]
    if node.target is aten.linear.default:
        x, table, *rest = node.args
        bias, transposed = (rest[0] if rest else None), False
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, x, table = node.args
        transposed = True
    elif node.target in (aten.mm.default, aten.matmul.default):
        x, table = node.args
        transposed = True
    else:
        return None
    if isinstance(table, Node) and table.meta["val"].dim() == 2 and is_transpose(table):
        table, transposed = table.args[0], not transposed
    expression, value = _weight(table)
    if expression is None or value.dim() != 2:
        return None
    rows, columns = int(value.shape[0]), int(value.shape[1])
    weight = Transpose(expression, 0, 1) if transposed else expression
    shape = (columns, rows) if transposed else (rows, columns)
    return Site(node, x, weight, bias, shape, path_of(table))  # type: ignore[arg-type]


def _convolution(program: Program, node: Node) -> Site | None:
    """One row of the matrix an output channel: its inputs, and the kernel's positions, in memory order."""
    x, table, *rest = node.args
    expression, value = _weight(table)
    if expression is None or not isinstance(x, Node):
        return None
    kernel = tuple(int(s) for s in value.shape)
    shape = (kernel[0], value[0].numel())
    bias: Any = rest[0] if rest else node.kwargs.get("bias")
    return Site(node, x, Reshape(expression, shape), bias, shape, path_of(table), kernel)


def _weight(table: Any) -> tuple[Expression | None, Any]:
    """The expression and fake value of a weight of the model that is not codes already.

    A matrix with no parameter in it was put there by a pass: a rotation at run time, which rounding would spoil.
    """
    expression = table.meta.get("weight") if isinstance(table, Node) else None
    value = table.meta.get("val") if isinstance(table, Node) else None
    if not isinstance(expression, Expression) or not isinstance(value, torch.Tensor) or not expression.parameters():
        return None, None
    return (None, None) if any(isinstance(e, Output) for e in expression.walk()) else (expression, value)


def out_of_reach(program: Program) -> Iterator[tuple[Node, str, str]]:
    """Products with weights that are no sites (experts in one tensor, recurrent layers): node, module path, reason."""
    told = {site.node for site in sites(program)}
    for weight in program.weights():
        value, front = weight.meta["val"], [weight]
        if value.dim() < 2 or not value.is_floating_point() or _weight(weight)[0] is None:
            continue
        while front:
            for user in front.pop().users:
                name = getattr(user.target, "_opname", "")
                if name in _VIEWS:
                    front.append(user)
                elif _PRODUCT.search(name) and user not in told:
                    told.add(user)
                    shape = ", ".join(map(str, value.shape))
                    yield user, path_of(weight), f"a weight [{shape}] of {name}: {_what(value, name)}"


def _what(value: torch.Tensor, name: str) -> str:
    if "transpose" in name:
        return "a transposed convolution's output channels are not its first dimension"
    if value.dim() > 2:
        return "matrices and convolutions are quantized, not stacks of matrices"
    return "linears, matrix products and convolutions are quantized"


def path_of(table: Any) -> str:
    """The module that owns a weight: the parameter's name without its last part."""
    expression = table.meta.get("weight") if isinstance(table, Node) else None
    if isinstance(expression, Expression) and expression.parameters():
        return expression.parameters()[0].rpartition(".")[0]
    return module_path(table) if isinstance(table, Node) else ""


def heads(program: Program) -> set[Node]:
    """Linears over the vocabulary: as many outputs as an embedding has rows, and no other product downstream.

    A table as long as it is wide says nothing: in a part of a model the last linear back to the width would look alike.
    """
    tables = [
        n.args[0].meta["val"].shape
        for n in program.graph.nodes
        if n.target is aten.embedding.default and isinstance(n.args[0], Node)
    ]
    rows = {int(length) for length, width in tables if length != width}
    found = list(sites(program))
    candidates = [s for s in found if s.shape[0] in rows and s.kernel is None]
    if not candidates:
        return set()
    reach = Reachability(program.graph)
    return {s.node for s in candidates if not any(reach.depends(o.node, s.node) for o in found if o is not s)}
