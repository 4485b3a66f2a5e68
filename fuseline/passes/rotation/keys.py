"""R3: queries and keys, rotated alike where attention multiplies them; q·R·Rᵀ·kᵀ = q·kᵀ.

It pays where the keys are quantized behind it. Keys that come from a cache are left alone: the whole cache would be
rotated at every step.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from ...compiler.order import touches_written
from ...compiler.program import Program
from ...compiler.rewriter import Builder, Rewriter
from .carriers import carriers, in_blocks, is_attention
from .rotations import Rotation


def rotate_keys(program: Program, rewriter: Rewriter, rotation: Callable[[Node, int], Rotation | None]) -> None:
    """Rotates the queries and keys of every attention that makes its keys itself.

    rotation: attention, head size → R, or None to leave it.
    """
    for node in [n for n in program.graph.nodes if is_attention(n)]:
        q, k, *rest = node.args
        reason = cached(k)  # type: ignore[arg-type]
        if reason:
            rewriter.refuse(node, f"R3: keys {reason}", "keys")
            continue
        turn = rotation(node, int(q.meta["val"].shape[-1]))  # type: ignore[union-attr]
        if turn is None:
            continue

        def build(new: Builder, node: Node = node, q=q, k=k, rest=rest, turn: Rotation = turn) -> Node:
            return new(node.target, turn.online(new, q), turn.online(new, k), *rest, **node.kwargs)

        rewriter.rewrite(node, [node], build, "R3 online")


def cached(keys: Node) -> str | None:
    """Why keys, or values, are not this call's alone: some are an input's."""
    size, pending, seen = int(keys.meta["val"].shape[-1]), [keys], set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder":
            return f"come from outside ({node.name}), from a cache perhaps"
        if touches_written(node):  # whatever is written there, and into other views of it
            pending += [n for n in node.all_input_nodes if in_blocks(n, 1)]
            pending += [user for user in node.users if user.meta.get("written")]
        else:
            pending += carriers(node, size) or ()
    return None
