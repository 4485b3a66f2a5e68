"""Views in a graph, told by the storages of the fake values: what a view is of, and who reads a value through views."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from .compat import storages


def viewed(node: Node) -> Node:
    """What a view is of: the tensor that its storage came with."""
    return views(node)[-1]


def views(node: Node) -> list[Node]:
    """A node and, one behind the other, what it is a view of; the last is a tensor of its own."""
    chain, tensors = [node], 1
    while (last := chain[-1]).op == "call_function":
        base = next((n for n in last.all_input_nodes if share(last, n)), None)
        if base is None:
            break
        chain.append(base)
        if isinstance(base.meta["val"], torch.Tensor):
            tensors = len(chain)
    return chain[:tensors]  # not the call whose results come in a tuple


def readers(node: Node) -> Iterator[Node]:
    """Who reads a value, also through its views."""
    for user in node.users:
        if user.op == "call_function" and share(node, user):
            yield from readers(user)
        else:
            yield user


def share(node: Node, other: Node) -> bool:
    """Whether two values have a storage in common."""
    return not set(storages(node.meta.get("val"))).isdisjoint(storages(other.meta.get("val")))
