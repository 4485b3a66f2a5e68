"""What a call adds to a cache: keys and values of its own tokens, before they are joined to those of earlier calls.

    k ──► cat(past, k) ──► attention          k ──► index_copy(cache, at, k) ──► attention
    ▲                 └──► the caller         ▲

A cache is read by other graphs, so what lies in it keeps its basis. Around what is added a pair R·Rᵀ changes nothing,
and between the two there is a place where a later pass may round in the rotated basis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ...compiler.expressions import Expression, Transpose
from ...compiler.ops import hadamard
from ...compiler.order import touches_written, writes
from ...compiler.rewriter import Builder, Rewriter
from ..raising.nodes import op_name
from .carriers import carriers, in_blocks, is_attention
from .rotations import Rotation

_JOINS = ("cat", "index_copy", "index_copy_", "index_put", "index_put_", "slice_scatter", "copy", "copy_", "scatter_")


@dataclass(frozen=True)
class Added:
    """The values of a call's own tokens in an attention's keys or values.

    nodes: one for each part that is joined to others, or the operand itself; shared: whether a cache or the caller
    reads them beside attentions; also: what else does, as a reason not to change them.
    """

    nodes: tuple[Node, ...]
    shared: bool
    also: str | None = None


def added(operand: Node) -> Added | str:
    """What this call computes of an attention's keys or values, or why that cannot be told."""
    size = int(operand.meta["val"].shape[-1])
    joined, found, pending = {operand}, list[Node](), [operand]
    while pending:
        node = pending.pop()
        before = [n for n in _before(node, size) if n not in joined] if _holds_past(node, size) else None
        if before is None:
            if node not in found:
                found.append(node)
            continue
        for value in before:
            if not _is_past(value):
                joined.add(value)
                pending.append(value)
    if not found:
        return "this call adds none of its own to them"
    readers = {user for node in found for user in node.users}
    kept = [user for user in readers if user in joined or user.op == "output" or _joins(user)]
    strange = next((user for user in readers if user not in kept and not is_attention(user)), None)
    also = f"{strange.name} ({strange.target}) reads what this call adds to them as well" if strange else None
    return Added(tuple(found), found != [operand] or bool(kept), also)


def _joins(node: Node) -> bool:
    return op_name(node) in _JOINS or writes(node)


def _is_past(node: Node) -> bool:
    """Memory that an earlier call filled, or that is still empty."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return True
    return node.op != "call_function" or op_name(node) in ("zeros", "zeros_like", "new_zeros", "empty", "new_empty")


def _before(node: Node, size: int) -> Iterator[Node]:
    """The tensors that a value holds rows of: what carries it, what is joined, what was written to its memory."""
    if _joins(node) or touches_written(node):
        yield from (n for n in node.all_input_nodes if in_blocks(n, size))
    else:
        yield from carriers(node, size) or ()
    memories = [n for n in (node, *node.all_input_nodes) if n.meta.get("written")]
    yield from (user for memory in memories for user in memory.users if writes(user) and user is not node)


def _holds_past(node: Node, size: int) -> bool:
    """Whether some rows of a value come from memory."""
    pending, seen = [node], set()
    while pending:
        one = pending.pop()
        if one in seen:
            continue
        seen.add(one)
        if _is_past(one):
            return True
        pending += _before(one, size)
    return False


def pair_around(rewriter: Rewriter, found: Added, rotation: Rotation, rule: str) -> None:
    """x → (x·R)·Rᵀ for each part that is added."""
    for node in found.nodes:

        def build(new: Builder, node: Node = node) -> Node:
            same = new(node.target, *node.args, **node.kwargs)
            return rotation.online(new, rotation.online(new, same), inverse=True)

        rewriter.rewrite(node, [node], build, rule)


def between(node: Node) -> Node | None:
    """The rotated value inside of a pair R·Rᵀ that `node` is the end of, as `pair_around` made it."""
    if _is_product(node) and (matrix := _matrix(node)) is not None:
        middle: Any = node.args[0]
        start = _matrix(middle) if _is_product(middle) else None
        return middle if isinstance(matrix, Transpose) and matrix.x == start else None
    signs = node.args[1] if node.target is torch.ops.aten.mul.Tensor else None
    end: Any = node if signs is None else node.args[0]
    if not isinstance(end, Node) or end.target is not hadamard.overload:
        return None
    middle = end.args[0]
    if middle.target is not hadamard.overload or middle.args[1:] != end.args[1:]:
        return None
    if signs is None:
        return middle
    first: Any = middle.args[0]
    return middle if first.target is torch.ops.aten.mul.Tensor and first.args[1] is signs else None


def _is_product(node: Any) -> bool:
    return isinstance(node, Node) and node.target is torch.ops.aten.matmul.default


def _matrix(product: Node) -> Expression | None:
    table: Any = product.args[1]
    return table.meta.get("weight")  # type: ignore[no-any-return]
