"""Streams: the values that must share a basis, because additions and norms tie them together.

A residual stream is one, and so are the values of an attention with what it returns. Found by flooding: from one value
backwards and forwards through every op that carries a basis (`carriers.py`), to where the stream is written, read, or
met by something that cares for single channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from ...compiler.expressions import Expression
from ...compiler.ops import layer_norm, rms_norm
from ...compiler.order import touches_written
from ..raising.nodes import op_name, same_size
from .carriers import carriers, in_blocks
from .folds import Folds
from .parts import SPLITS, part
from .products import Product, product

aten = torch.ops.aten
Allowed = Callable[[Expression], bool]


@dataclass
class Stream:
    """What a flood found.

    before: each value in the basis → what its own comes from, as `sources` has it; readers: products that read one, by
    node; leaves: member → its first use that needs Rᵀ at run time.
    """

    block: int
    centring: bool = False
    before: dict[Node, tuple[Node, ...] | None] = field(default_factory=dict)
    readers: dict[Node, Product] = field(default_factory=dict)
    leaves: dict[Node, Node] = field(default_factory=dict)

    @property
    def enters(self) -> list[Node]:
        """Members that something else computes, which need R at run time."""
        return [node for node, before in self.before.items() if before is None]

    @property
    def is_written(self) -> bool:
        """Whether R folds into some member."""
        return () in self.before.values()

    @property
    def online(self) -> int:
        """Operations that the stream leaves at run time."""
        return len(self.enters) + len(self.leaves)


def flood(start: Node, block: int, folds: Folds, centring: bool = False) -> Stream:
    """The stream that `start` belongs to; `folds` says whether a weight may be replaced by a rotated one.

    centring: read by layer norms alone, which take the mean away, and by nothing else.
    """
    stream = Stream(block, centring)
    pending = [start]
    while pending:
        node = pending.pop()
        if node in stream.before:
            continue
        before = sources(node, block, folds, folds if centring else folds.turns)
        moves = not touches_written(node)  # as centring does: twins are made further down
        whole = part(node) is None and all(_is_wide(n, block) for n in before or ())
        if centring and (is_norm(node) or not whole or not moves):
            before = None  # a norm, or channels among others: their mean is no mean of what they are made of
        stream.before[node] = before
        pending += before or ()
        for user in _users(node):
            ahead = _reads(user, node, stream, folds)
            if centring and ahead == "carries" and not (_is_wide(user, block) and not touches_written(user)):
                ahead = "leaves"  # a mean over other channels, or what may not be moved
            elif centring and ahead == "reads" and not _is_wide(user, block):
                ahead = "leaves"
            if ahead == "carries":
                pending.append(user)
            elif ahead != "reads":
                stream.leaves.setdefault(node, user)
    return stream


def _users(node: Node) -> Iterator[Node]:
    """Who uses a value; of a split, its items."""
    for user in node.users:
        if op_name(user) in SPLITS:
            yield from user.users
        else:
            yield user


def _is_wide(node: Node, width: int) -> bool:
    """Whether a value's last dimension is the whole width, not several of them."""
    return same_size(node.meta["val"].shape[-1], width)


def sources(node: Node, block: int, folds: Folds, turns: Allowed) -> tuple[Node, ...] | None:
    """What a member's basis comes from: other members; nothing for a weight, a product or a table that R folds into;
    None where R has to be applied to it at run time. `turns` says whether a product's weight may be rotated."""
    weight = node.meta.get("weight")
    if weight is not None:
        return () if folds(weight) else None
    if is_norm(node):
        return (node.args[0],) if commutes(node, folds) else None  # type: ignore[return-value]
    found = part(node)
    if found is not None and found.spans(block):
        return () if all(folds(w) for w in found.product.weights()) else None
    made = product(node)
    if made is not None:
        return () if all(turns(w) for w in made.weights()) else None
    if node.target is aten.embedding.default:
        table = node.args[0].meta.get("weight")  # type: ignore[union-attr]
        return () if table is not None and folds(table) else None
    return carriers(node, block)


def _reads(user: Node, node: Node, stream: Stream, folds: Folds) -> str:
    if stream.centring and (user.target is layer_norm.overload or is_norm(user) or product(user) is not None):
        return "reads" if user.target is layer_norm.overload and not touches_written(user) else "leaves"
    if is_norm(user):
        return "carries" if commutes(user, folds) and not touches_written(user) else "leaves"
    made = product(user)
    if made is not None:
        reads = made.x is node and folds.turns(made.expression) and _contracts(made, stream.block)
        if reads:
            stream.readers[user] = made
        return "reads" if reads else "leaves"
    carried = carriers(user, stream.block)
    return "carries" if carried is not None and node in carried and part(user) is None else "leaves"


def _contracts(made: Product, block: int) -> bool:
    return in_blocks(made.x, block) and made.weight.meta["val"].shape[made.inputs] % block == 0


def is_norm(node: Node) -> bool:
    """An RMSNorm, over the last dimension: whatever rotates that leaves its statistics as they are."""
    return node.target is rms_norm.overload


def commutes(norm: Node, folds: Folds) -> bool:
    """Whether a norm commutes with rotations, once its scale has been folded into whatever reads it."""
    return norm.args[1] is None or scaled_readers(norm, folds) is not None


def scaled_readers(norm: Node, folds: Folds) -> list[Product] | None:
    """The products that read a norm's result, when nothing else does and its scale folds into them."""
    scale = norm.args[1]
    known = isinstance(scale, Node) and "weight" in scale.meta and scale.meta["val"].dim() == 1
    if not known or folds.trained(scale.meta["weight"]):
        return None
    return readers_of(norm, folds.turns)


def readers_of(norm: Node, folds: Allowed) -> list[Product] | None:
    """The products that read a value channel by channel as it is, when nothing else does and their weights fold."""
    width, found, pending = norm.meta["val"].shape[-1], [], [norm]
    while pending:
        value = pending.pop()
        for user in value.users:
            made = product(user)
            if made is not None:
                if made.x is not value or not folds(made.expression):
                    return None
                found.append(made)
            elif (
                not touches_written(user)
                and carriers(user, width) == (value,)
                and same_size(user.meta["val"].shape[-1], width)
            ):
                pending.append(user)
            else:
                return None
    return found or None
