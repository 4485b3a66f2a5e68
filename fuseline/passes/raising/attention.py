"""`aten.scaled_dot_product_attention` → `fuseline.attention`, with its mask proved where that can be done."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ...compiler.ops import attention
from ...compiler.pattern import Match
from ...compiler.program import Program
from ...compiler.rewriter import Builder
from ...compiler.rule import Rule
from ...compiler.traits import arguments
from .mask_arguments import MaskArguments
from .masks import Claim, Mask, Masks
from .nodes import op_name, shape_text, value

aten = torch.ops.aten


@dataclass(frozen=True)
class Site:
    """An attention as a model wrote it. q: [B, H, S, D]; k: [B, h, T, D]; v: [B, h, T, Dv]."""

    root: Node
    q: Node
    k: Node
    v: Node
    mask: Mask
    scale: float
    causal: bool = False
    softcap: float = 0.0
    dropout: float = 0.0


class AttentionRule(Rule):
    """What both spellings share: the guards, and the op with the mask that was proved."""

    def __init__(self, masks: Masks, built: MaskArguments):
        self._masks, self._built = masks, built

    @property
    def name(self) -> str:
        return "Attention"

    def refuse(self, m: Match) -> str | None:
        site: Site = m.site
        for name, node in (("queries", site.q), ("keys", site.k), ("values", site.v)):
            if value(node).dim() != 4:
                return f"the {name} have the shape {shape_text(node)}, not batch, heads, length, size"
        q, k, v = (value(n) for n in (site.q, site.k, site.v))
        if _differ(q.shape[0], k.shape[0]) or _differ(q.shape[0], v.shape[0]):
            return f"the batch of the queries is {q.shape[0]}, that of the keys {k.shape[0]}"
        if site.dropout:
            return f"it drops weights with p={site.dropout:g}: the op's backward would draw another mask"
        return None

    def after(self, m: Match, new: Builder) -> Node:
        site: Site = m.site
        claim = self._claim(site)
        if isinstance(claim, Claim):
            mask, offset, window = self._built.build(claim, new, site.root)
            return self._op(site, new, mask, claim.kind, offset, window)
        node = self._op(site, new, _as_argument(site, new), "full", 0, 0)
        node.meta["custom"]["fuseline_mask"] = claim  # why the mask stayed, for those who look
        return node

    def _claim(self, site: Site) -> Claim | str:
        if site.causal:
            return Claim("causal")
        claim = self._masks.claim(site.mask, value(site.q), value(site.k))
        if isinstance(claim, Claim) and not self._built.can_build(claim, site.root):
            return "the graph does not compute the sizes that the mask depends on"
        return claim

    def _op(self, site: Site, new: Builder, mask: Node | None, kind: str, offset: Any, window: Any) -> Node:
        k, v = site.k, site.v
        if _differ(value(k).shape[1], value(v).shape[1]):  # the op has one grouping for both
            k, v = (_repeated(x, value(site.q).shape[1], new) for x in (k, v))
        return new(attention, site.q, k, v, mask, site.scale, kind, offset, window, site.softcap)


class Attention(AttentionRule):
    """A call of `scaled_dot_product_attention`."""

    def matches(self, program: Program) -> Iterator[Match]:
        for node in list(program.graph.nodes):
            if op_name(node) != "scaled_dot_product_attention" or node._erased or node.meta.get("written"):
                continue
            given = arguments(node)
            size = value(given["query"]).shape[-1]
            scale = given["scale"] if given["scale"] is not None or not isinstance(size, int) else size**-0.5
            if isinstance(scale, (int, float)) and math.isfinite(scale):
                mask = Mask(given["attn_mask"], dtype=value(given["query"]).dtype)
                q, k, v = (given[name] for name in ("query", "key", "value"))
                site = Site(node, q, k, v, mask, float(scale), given["is_causal"], dropout=given["dropout_p"])
                yield Match(node, {"site": site}, (node,))


class CausalCall(Attention):
    """A call that stays PyTorch's, for it drops weights or runs under autocast: without the mask that was proved.

    `is_causal` stands for the causal mask, and no mask for one that shows every key, so that fused kernels apply.
    """

    settles = True

    @property
    def name(self) -> str:
        return "CausalCall"

    def matches(self, program: Program) -> Iterator[Match]:
        for m in super().matches(program):
            if m.site.mask.node is not None:
                claim = self._claim(m.site)
                yield Match(m.root, {**m.bindings, "claim": claim}, m.nodes)

    def refuse(self, m: Match) -> str | None:
        claim: Claim | str = m.claim
        if isinstance(claim, str):
            return claim
        plain = claim.kind != "sliding" and claim.padding is None and claim.offset.value == 0
        return None if plain else "PyTorch's call has no word for this mask but the mask itself"

    def after(self, m: Match, new: Builder) -> Node:
        given = arguments(m.root)
        return new(
            m.root.target, given["query"], given["key"], given["value"], None, given["dropout_p"],
            m.claim.kind == "causal", scale=given["scale"], enable_gqa=given["enable_gqa"],
        )  # fmt: skip


def _differ(a: Any, b: Any) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a != b


def _repeated(x: Node, heads: int, new: Builder) -> Node:
    """Keys or values with one head for each query head."""
    groups = heads // value(x).shape[1]
    return x if groups == 1 else new(aten.repeat_interleave.self_int, x, groups, 1)


def _as_argument(site: Site, new: Builder) -> Node | None:
    """The model's own mask; a fill becomes the additive mask that means the same."""
    if site.mask.node is None or site.mask.fill is None:
        return site.mask.node
    hidden = new(aten.logical_not.default, site.mask.node) if site.mask.shows else site.mask.node
    zeros = new(aten.zeros_like.default, hidden, dtype=site.mask.dtype)
    return new(aten.masked_fill.Scalar, zeros, hidden, site.mask.fill)
