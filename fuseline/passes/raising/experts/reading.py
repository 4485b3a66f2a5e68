"""Reading a graph upwards: what calls look like, and what their values are known to be."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from ....compiler.traits import arguments
from ..nodes import op_name, same_size, value

RESHAPES = ("view", "_unsafe_view", "reshape", "flatten", "unflatten")


def called(node: Any, *names: str) -> dict[str, Any] | None:
    """The arguments of a call of one of these ops, by their names in its schema; None for anything else."""
    if op_name(node) not in names or node.meta.get("written"):
        return None
    return arguments(node)


def item(node: Any, number: int, *names: str) -> Node | None:
    """The call of one of these ops that `node` is the `number`-th result of."""
    if not isinstance(node, Node) or node.target is not operator.getitem or node.args[1] != number:
        return None
    source = node.args[0]
    return source if isinstance(source, Node) and op_name(source) in names else None


def indexed(node: Any) -> tuple[Node, list[Any]] | None:
    """x and the indices of x[i, j, …]."""
    found = called(node, "index")
    return None if found is None else (found["self"], list(found["indices"]))


def dim_of(dim: int, node: Node) -> int:
    """A dimension counted from the front."""
    return dim % value(node).dim()


def unsqueezed(node: Any, dim: int) -> Node | None:
    """x, where the node is x with a dimension of one put in at `dim`, counted from the front."""
    found = called(node, "unsqueeze")
    if found is not None:
        return found["self"] if found["dim"] % value(node).dim() == dim else None
    found = called(node, *RESHAPES[:3])
    if found is None:
        return None
    before, after = list(value(found["self"]).shape), list(value(node).shape)
    same = len(after) == len(before) + 1 and all(map(same_size, after, [*before[:dim], 1, *before[dim:]]))
    return found["self"] if same else None


def squeezed(node: Any, dim: int) -> Node | None:
    """x, where the node is x without its dimension `dim`, which has one element."""
    found = called(node, "squeeze")
    if found is None or "dim" not in found:
        return None
    dims = [found["dim"]] if isinstance(found["dim"], int) else list(found["dim"])
    return found["self"] if [dim_of(d, found["self"]) for d in dims] == [dim] else None


def flattened(node: Any, *shape: Any) -> Node | None:
    """x, where the node is x reshaped and x has these sizes; None among them for any."""
    while (found := called(node, *RESHAPES)) is not None:
        node = found["self"]
        if shaped(node, *shape):
            return node  # type: ignore[no-any-return]
    return None


def shaped(node: Any, *shape: Any) -> bool:
    """Whether a node is a tensor of these sizes; None among them for any."""
    fake = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(fake, torch.Tensor) or fake.dim() != len(shape):
        return False
    return all(want is None or same_size(size, want) for size, want in zip(fake.shape, shape, strict=True))


def zeros(node: Any) -> bool:
    """Whether a value is zero throughout: the number, or a tensor made so."""
    if isinstance(node, (int, float)):
        return node == 0
    if called(node, "zeros", "zeros_like", "new_zeros") is not None:
        return True
    full = called(node, "full", "full_like", "new_full")
    return full is not None and full["fill_value"] == 0


def below(node: Any, count: int) -> bool:
    """Whether integers are proved to lie in 0 … count − 1: they are the places that `topk` or `sort` found."""
    while isinstance(node, Node):
        source = item(node, 1, "topk", "sort")
        if source is not None:
            given = arguments(source)
            size = value(given["self"]).shape[given.get("dim", -1)]
            return isinstance(size, int) and size <= count
        found = called(node, *RESHAPES, "to", "_to_copy", "contiguous", "clone", "detach", "alias", "slice")
        if found is None:
            clamped = called(node, "clamp")
            return clamped is not None and clamped["min"] == 0 and clamped["max"] == count - 1
        node = found["self"]
    return False


def distinct(node: Any) -> bool:
    """Whether a row's integers are proved to differ: they are the places that `topk` found."""
    while isinstance(node, Node):
        if item(node, 1, "topk") is not None:
            return True
        found = called(node, "to", "_to_copy", "contiguous", "clone", "detach", "alias")
        node = None if found is None else found["self"]
    return False
