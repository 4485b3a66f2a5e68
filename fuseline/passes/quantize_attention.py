"""Keys and values rounded where a call makes them, so that a cache and attention hold the same.

    k ──► round ──► cat(past, ·) ──► attention
                              └───► the caller's cache

Where a rotation left a pair R·Rᵀ around what a call adds to a cache, they are rounded between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from ..compiler.program import Program
from ..compiler.provenance import module_path
from ..compiler.rewriter import Builder, Rewriter
from ..compiler.schemes import Scheme
from .quantize_values import round_trip
from .rotation.caches import added, between
from .rotation.carriers import is_attention


def rounded_attention(
    program: Program,
    rewriter: Rewriter,
    keys: Scheme | None,
    values: Scheme | None,
    left_out: Callable[[str], bool],
    unfit: str | None = None,
) -> None:
    """Rounds the keys and values of every attention, those of the call's own tokens, one scale a head and token.

    left_out: says of a module's path whether its attention is left as it is; unfit: why all are.
    """
    rounded: dict[Node, Scheme] = {}
    for node in [n for n in program.graph.nodes if is_attention(n)]:
        if left_out(module_path(node)):
            continue
        for at, what, scheme in ((1, "keys", keys), (2, "values", values)):
            if scheme is not None:
                reason = unfit or _round(rewriter, node.args[at], scheme, what, rounded)
                if reason:
                    rewriter.refuse(node, f"{what}: {reason}", what)


def _round(rewriter: Rewriter, operand: Any, scheme: Scheme, what: str, rounded: dict[Node, Scheme]) -> str | None:
    """Rounds what a call adds to an operand of attention; `rounded` holds what was rounded so far."""
    reason = scheme.refuse_group(int(operand.meta["val"].shape[-1]))
    held = added(operand)
    if reason or isinstance(held, str) or held.also:
        return reason or (held if isinstance(held, str) else held.also)
    if any(rounded.get(node, scheme) != scheme for node in held.nodes):
        return "keys and values are one tensor, and their schemes differ"
    for node in held.nodes:
        if node in rounded:
            continue
        place = between(node) or node

        def build(new: Builder, node: Node = node, place: Node = place) -> Node:
            made = round_trip(new, new(place.target, *place.args, **place.kwargs), scheme)
            rounded[made if place is node else node] = scheme
            return made

        rewriter.rewrite(place, [place], build, what)
    return None
