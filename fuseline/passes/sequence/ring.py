"""Attention around a ring: what can go there, and its node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ...compiler.errors import UserError
from ...compiler.ops import ring_attention
from ...compiler.provenance import source_line
from ...compiler.traits import arguments

if TYPE_CHECKING:
    from .collectives import Group


CALLS = ("scaled_dot_product_attention", "attention")


def reason(node: Node) -> str | None:
    """What keeps an attention from going around a ring; None where nothing does."""
    if getattr(node.target, "_opname", "") not in CALLS:
        return "it is written out"
    given = arguments(node)
    if given.get("attn_mask", given.get("mask")) is not None:
        return "it has a mask that is no known kind"
    if given.get("kind", "full") not in ("full", "causal") or given.get("offset") or given.get("softcap"):
        return f"its mask is {given.get('kind')}, with an offset, a window or soft-capped logits"
    if given.get("dropout_p", given.get("dropout")):
        return "it drops weights out"
    return None


def is_causal(node: Node) -> bool:
    given = arguments(node)
    return bool(given.get("is_causal") or given.get("kind") == "causal")


def check(attentions: list[Node]) -> bool:
    """Whether the attentions of a program are causal.

    Raises:
        UserError: one of them cannot go around a ring, or some are causal and others not: they want two layouts.
    """
    for node in attentions:
        why = reason(node)
        if why is not None:
            raise UserError(
                f"pass 'sequence-parallel' cannot send this attention around a ring: {why}",
                [f"at {source_line(node) or 'an unknown line'}", f"node: {node.format_node()}"],
                "raise,sequence-parallel{kind=ring}: raise proves masks causal; or kind=ulysses, which takes all masks",
            )
    kinds = set(map(is_causal, attentions))
    if len(kinds) > 1:
        raise UserError(
            "pass 'sequence-parallel': some attentions of this program are causal and others are not",
            ["around a ring they want positions in two layouts"],
            "kind=ulysses",
        )
    return kinds.pop()


def around(group: Group, node: Node, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: Any) -> torch.Tensor:
    """This member's block of the result, over the ring of `group`."""
    given = arguments(node)
    scale = given.get("scale")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return ring_attention(q, k, v, scale, is_causal(node), length, group.rank, group.degree, group.name)[0]
