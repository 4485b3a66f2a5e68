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
from .carriers import carriers, is_attention
from .rotations import Rotation


def rotate_keys(program: Program, rewriter: Rewriter, rotation: Callable[[Node, int], Rotation | None]) -> None:
    """Rotates the queries and keys of every attention that makes its keys itself.

    rotation: attention, head size → R, or None to leave it.
    """
    for node in [n for n in program.graph.nodes if is_attention(n)]:
        q, k, *rest = node.args
        reason = cached(k)  # type: ignore[arg-type]
        if reason:
            rewriter.refuse(node, f"R3: the keys: {reason}")
            continue
        turn = rotation(node, int(q.meta["val"].shape[-1]))  # type: ignore[union-attr]
        if turn is None:
            continue

        def build(new: Builder, node: Node = node, q=q, k=k, rest=rest, turn: Rotation = turn) -> Node:
            return new(node.target, turn.online(new, q), turn.online(new, k), *rest, **node.kwargs)

        rewriter.rewrite(node, [node], build, "R3 online")


def cached(keys: Node) -> str | None:
    """Why keys, or values, are not this call's alone: some are an input's, or lie where the graph writes."""
    size, pending, seen = int(keys.meta["val"].shape[-1]), [keys], set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if touches_written(node):
            return f"they lie in memory that is written to ({node.name}), a cache perhaps"
        if node.op == "placeholder":
            return f"they come from outside ({node.name}), from a cache perhaps"
        pending += carriers(node, size) or ()
    return None
