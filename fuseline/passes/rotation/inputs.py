"""R4: the input of an MLP's last linear, rotated at run time, and back in the linear's columns.

A site is a product whose input is no norm's and no attention's, but made channel by channel: a gated unit, an
activation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from ...compiler import ops
from ...compiler.ops import glu
from ...compiler.program import Program
from ...compiler.rewriter import Builder, Rewriter
from ..raising.nodes import op_name
from .carriers import carriers, in_blocks
from .folds import Folds
from .products import Product, product
from .rotations import Rotation, no_blocks

INSIDE = "what routed experts' last product reads is made inside their one op: raise{experts=false} keeps them apart"
_ACTIVATIONS = ("gelu", "relu", "silu", "sigmoid", "tanh", "mul", "pow", "square", "leaky_relu", "hardswish", "relu_")


def rotate_inputs(
    program: Program, rewriter: Rewriter, folds: Folds, block: int, rotation: Callable[[Node, int], Rotation | None]
) -> None:
    """Rotates the input of each such product; products of one input share the operation.

    block: channels that are rotated together, 0 for all; rotation: product, channels → R, or None to leave it.
    """
    online: dict[tuple[Node, Rotation], Node] = {}
    for node in list(program.graph.nodes):
        made = product(node)
        if node.target is ops.moe.overload:
            rewriter.refuse(node, f"R4: {INSIDE}")
        if made is None or not is_inner(made.x):
            continue
        value = made.weight.meta["val"]
        size = int(value.shape[made.inputs])
        tied = None if folds(made.expression) else "its weight wants a gradient, or is tied to an embedding"
        reason = no_blocks(size, block or size) or tied
        if reason:
            rewriter.refuse(node, f"R4: {reason}")
            continue
        turn = rotation(node, block or size)
        if turn is None:
            continue

        def build(new: Builder, made: Product = made, turn: Rotation = turn, value: torch.Tensor = value) -> Node:
            if (made.x, turn) not in online:
                online[made.x, turn] = turn.online(new, made.x)
            return made.rebuilt(new, online[made.x, turn], turn.fold(made.expression, value, made.inputs))

        rewriter.rewrite(node, [node], build, "R4 online")


def is_inner(x: Node) -> bool:
    """Whether a value was made channel by channel, from two products or by an activation."""
    width = x.meta["val"].shape[-1]
    while isinstance(width, int) and in_blocks(x, width):
        before = carriers(x, width)
        if before is None or len(before) != 1:
            return x.target is glu.overload or op_name(x) in _ACTIVATIONS
        x = before[0]
    return False
