"""R3: queries and keys, rotated alike where attention multiplies them; q·R·Rᵀ·kᵀ = q·kᵀ.

It pays where the keys are quantized behind it. Where keys go into a cache, or are the caller's as well, they keep their
basis there: a pair R·Rᵀ is put around those of the call's own tokens, for the quantization to round between the two.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from ...compiler.program import Program
from ...compiler.rewriter import Builder, Rewriter
from .caches import Added, added, pair_around
from .carriers import is_attention
from .rotations import Rotation


def rotate_keys(program: Program, rewriter: Rewriter, rotation: Callable[[Node, int], Rotation | None]) -> None:
    """Rotates the queries and keys of every attention that makes its keys itself.

    rotation: attention, head size → R, or None to leave it.
    """
    for node in [n for n in program.graph.nodes if is_attention(n)]:
        q, k, *rest = node.args
        held = added(k)  # type: ignore[arg-type]
        reason = held if isinstance(held, str) else held.also if held.shared else None
        if reason is not None:
            rewriter.refuse(node, f"R3: the keys: {reason}", "keys")
            continue
        turn = rotation(node, int(q.meta["val"].shape[-1]))  # type: ignore[union-attr]
        if turn is None:
            continue
        if isinstance(held, Added) and held.shared:
            pair_around(rewriter, held, turn, "R3 pair")
            continue

        def build(new: Builder, node: Node = node, q=q, k=k, rest=rest, turn: Rotation = turn) -> Node:
            return new(node.target, turn.online(new, q), turn.online(new, k), *rest, **node.kwargs)

        rewriter.rewrite(node, [node], build, "R3 online")
