"""Parts of a product: the channels of a joint product (queries, keys and values; gate and up) that one value holds.

However the product is cut: a slice or a split of its last dimension, or of the heads or the groups that a view makes of
it. The numbers of the channels themselves are sent through the views to see where they go.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from ...compiler.compat import size_hint
from ...compiler.order import touches_written
from ..raising.nodes import op_name
from .products import Product, product

aten = torch.ops.aten

SPLITS = ("split", "split_with_sizes", "chunk", "unbind")
_SAME = ("contiguous", "clone", "detach", "alias")
_RESHAPES = ("view", "reshape", "_unsafe_view")
_VIEWS = (
    *_RESHAPES, *_SAME, *SPLITS, "unflatten", "transpose", "swapaxes", "permute", "unsqueeze", "squeeze", "select",
    "slice", "narrow",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Some channels of a product, as one value.

    held: the numbers of the channels, int64 [..., channels of the value], without dimensions that repeat them. shared:
    the views between the product and its parts, each of which holds several parts, in the graph's order. others: the
    parts beside this one.
    """

    product: Product
    held: torch.Tensor
    shared: tuple[Node, ...]
    others: tuple[Node, ...]

    def spans(self, block: int) -> list[tuple[int, int]] | None:
        """From where to where the product's channels are this part's, in order; None where these are no blocks."""
        if self.held.shape[-1] % block:
            return None
        blocks = self.held.unflatten(-1, (-1, block))
        starts = blocks[..., 0]
        if not torch.equal(blocks, starts[..., None] + torch.arange(block)):
            return None
        found: list[tuple[int, int]] = []
        for start in starts.unique().tolist():
            if found and start < found[-1][1]:
                return None
            joins = bool(found) and start == found[-1][1]
            found[-1:] = [(found[-1][0], start + block)] if joins else [*found[-1:], (start, start + block)]
        return found


def part(node: Node) -> Part | None:
    """The part of a product that a node is, where all that reads the product reads parts that share no channel."""
    if not is_view(node):
        return None
    base: Any = node.args[0]
    while is_view(base):
        base = base.args[0]
    made = product(base) if isinstance(base, Node) else None
    return None if made is None else _cut(made, node)


def is_view(node: Any) -> bool:
    """Whether a node only moves the channels of its first argument, or is an item of a split."""
    item = isinstance(node, Node) and node.target is operator.getitem
    of_split = item and op_name(node.args[0]) in SPLITS
    return (of_split or op_name(node) in _VIEWS) and isinstance(node.args[0], Node) and not touches_written(node)


def _cut(made: Product, node: Node) -> Part | None:
    try:
        held = dict(_holders(made, node))
        own = _channels(held[node])
        if len(own) == int(made.node.meta["val"].shape[-1]):
            return None  # the product's whole
        shared, others, pending = [], [], [made.node]
        while pending:
            value = pending.pop()
            for user in value.users:
                if user is node:
                    continue
                if not is_view(user):
                    return None
                has = _channels(_applied(user, held[value]))
                if own.isdisjoint(has):
                    others.append(user)
                elif has <= own:
                    return None
                else:
                    held[user] = _applied(user, held[value])
                    shared.append(user)
                    pending.append(user)
    except (RuntimeError, TypeError, ValueError):  # sizes that are not known, or a view that copies
        return None
    reached = node.args[0] is made.node or node.args[0] in shared
    return Part(made, _distinct(held[node]), tuple(sorted(shared)), tuple(sorted(others))) if reached else None


def _holders(made: Product, node: Node) -> Iterator[tuple[Node, Any]]:
    """Each view from the product down to a node, with the numbers of the channels that it holds."""
    path: list[Node] = [node]
    while path[0] is not made.node:
        path.insert(0, path[0].args[0])  # type: ignore[arg-type]
    shape = [size_hint(size) for size in made.node.meta["val"].shape]
    held: Any = torch.arange(shape[-1]).expand(shape)
    yield made.node, held
    for view in path[1:]:
        held = _applied(view, held)
        yield view, held


def _applied(view: Node, held: Any) -> Any:
    if view.target is operator.getitem:
        return held[view.args[1]]
    name = op_name(view)
    if name in _SAME:
        return held
    args, kwargs = map_arg((view.args[1:], view.kwargs), lambda n: size_hint(n.meta["val"]))
    target: Any = aten.view.default if name in _RESHAPES else view.target  # one that would copy is an error
    return target(held, *args, **kwargs)


def _distinct(held: torch.Tensor) -> torch.Tensor:
    """Without what is repeated along dimensions."""
    return held[tuple(0 if stride == 0 else slice(None) for stride in held.stride()[:-1])]


def _channels(held: Any) -> set[int]:
    tensors = held if isinstance(held, (list, tuple)) else [held]
    return {channel for tensor in tensors for channel in _distinct(tensor).flatten().tolist()}
