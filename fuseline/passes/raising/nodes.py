"""Small questions about nodes that several rules ask."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

CASTS = ("to", "_to_copy", "type_as")


def op_name(node: Any) -> str:
    """`mul` for a call of `aten.mul.Tensor`; "" for anything but a call of an op."""
    is_call = isinstance(node, Node) and node.op == "call_function"
    return getattr(node.target, "_opname", "") if is_call else ""


def value(node: Node) -> torch.Tensor:
    """A node's fake tensor."""
    return node.meta["val"]


def only_user(node: Node, *ops: str) -> Node | None:
    """The one node that uses this one, if it is a call of one of `ops`."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    return user if op_name(user) in ops and not user.meta.get("written") else None


def cast_from(node: Node) -> Node | None:
    """x, where the node is x in another floating-point type and nothing else."""
    if op_name(node) not in CASTS or node.meta.get("written"):
        return None
    source = node.args[0]
    if not isinstance(source, Node) or value(source).device != value(node).device:
        return None
    return source if value(source).is_floating_point() and value(node).is_floating_point() else None


def is_last(dims: Any, rank: int) -> bool:
    """Whether a reduction's dimensions are the last one alone."""
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    return len(dims) == 1 and dims[0] % rank == rank - 1


def is_vector(node: Any, size: Any) -> bool:
    """Whether a node is a tensor [size]."""
    fake = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(fake, torch.Tensor) and fake.dim() == 1 and same_size(fake.shape[0], size)


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are the same number or the same expression; never adds a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return str(a) == str(b)


def same_shape(a: Node, b: Node) -> bool:
    first, second = value(a).shape, value(b).shape
    return len(first) == len(second) and all(same_size(x, y) for x, y in zip(first, second, strict=True))


def shape_text(node: Node) -> str:
    """`[2, 8, 64]`."""
    return f"[{', '.join(map(str, value(node).shape))}]"
