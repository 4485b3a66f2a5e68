"""Attention written out → `fuseline.attention`.

    w = q @ k.transpose(-1, -2) * scale            o = attention(q, k, v, None, scale, "causal", softcap=c)
    w = c * tanh(w / c)                            the soft cap on logits
    w = softmax(w + mask, -1, dtype=float32)
    o = w.to(q.dtype) @ v

The mask may be added, filled in (`masked_fill`) or chosen (`where`). A mask that hides with a finite number is replaced
by a proved kind only where every query surely sees a key: softmax spreads a row of equal lowest numbers evenly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from ...compiler.index_reader import literal
from ...compiler.pattern import Either, Match, Term, Through, Var, call
from ...compiler.program import Program
from ...compiler.rewriter import Builder
from ...compiler.traits import arguments
from .attention import AttentionRule, Site
from .masks import Claim, Mask
from .nodes import CASTS, is_last, op_name, value

aten = torch.ops.aten
SCALARS = ("scale", "divisor", "cap", "uncap", "fill")


class EagerAttention(AttentionRule):
    def before(  # type: ignore[override]
        self, q: Var, kt: Var, v: Var, scale: Var, divisor: Var, cap: Var, uncap: Var, mask: Var, hidden: Var,
        shown: Var, fill: Var, dim: Var,
    ) -> Term:  # fmt: skip
        dot = call("matmul", q, kt, bind="dot")
        scaled = Either((dot * scale, call("div", dot, divisor), dot))
        capped = Either((call("tanh", call("div", scaled, cap)) * uncap, scaled))
        filled = (call("masked_fill", capped, hidden, fill), call("where", shown, capped, fill))
        masked = Either((capped + mask, *filled, capped))
        soft = call(("softmax", "_softmax"), masked, dim, bind="softmax")
        return call("matmul", Through(soft, (*CASTS, "dropout", "contiguous")), v)

    _training = False

    def matches(self, program: Program) -> Iterator[Match]:
        self._training = program.training
        for m in super().matches(program):
            if not isinstance(m.get("mask"), Node | None):
                continue  # a number is added to the logits
            numbers = {name: literal(m.get(name)) for name in SCALARS}
            drops = [arguments(n) for n in m.nodes if op_name(n) == "dropout"]
            dropout = max((d["p"] for d in drops if d["train"]), default=0.0)
            scale = 1.0 if numbers["scale"] is None else numbers["scale"]
            if numbers["divisor"] is not None and not isinstance(numbers["divisor"], Node):
                scale = scale / numbers["divisor"]
            site = Site(
                m.root, m.q, m.kt, m.v, _mask(m, numbers["fill"]),
                scale, softcap=numbers["cap"] or 0.0, dropout=dropout,
            )  # fmt: skip
            yield Match(m.root, {**m.bindings, "numbers": numbers, "site": site}, m.nodes)

    def refuse(self, m: Match) -> str | None:
        numbers: dict[str, Any] = m.numbers
        for name, what in (("scale", "scaled"), ("divisor", "scaled"), ("cap", "capped"), ("fill", "filled")):
            if isinstance(numbers[name], Node):
                return f"the logits are {what} by the tensor '{numbers[name].name}', not by a number"
        if numbers["cap"] != numbers["uncap"]:
            return f"the soft cap divides by {numbers['cap']:g} and multiplies by {numbers['uncap']}"
        if not is_last(m.dim, value(m.softmax).dim()):
            return f"the softmax runs over dimension {m.dim} of {value(m.softmax).dim()}, not over the keys"
        mask: Mask = m.site.mask
        fits = (torch.float32, value(m.q).dtype)
        if mask.node is not None and mask.fill is None and value(mask.node).dtype not in fits:
            return f"the mask is {value(mask.node).dtype}, the queries are {value(m.q).dtype}"
        if mask.fill is not None and not _swallows(mask.fill, mask.dtype):
            return f"hidden logits are replaced by {mask.fill:g}, which a mask that is added cannot express"
        proved = self._claim(m.site)
        certain = isinstance(proved, Claim) and proved.padding is None
        if self._training and mask.node is not None and not certain:
            return "a row may see no key, and the op's gradient there is not that of what is written"
        return super().refuse(m)

    def after(self, m: Match, new: Builder) -> Node:
        site: Site = m.site
        keys, transposed = _untransposed(site.k)
        k = keys if transposed else new(aten.transpose.int, site.k, -1, -2)
        m.bindings["site"] = Site(site.root, site.q, k, site.v, site.mask, site.scale, False, site.softcap)
        return super().after(m, new)


def _swallows(fill: float, dtype: torch.dtype) -> bool:
    """Whether adding `fill` to a logit is the same as putting it in its place: the logit is lost in the rounding."""
    low = torch.tensor(fill, dtype=dtype)
    return fill < 0 and bool(low + 1e4 == low)


def _mask(m: Match, fill: Any) -> Mask:
    dtype = value(m.dot).dtype
    if m.get("mask") is not None:
        return Mask(m.mask, dtype=dtype)
    if m.get("hidden") is not None:
        return Mask(m.hidden, fill, dtype)
    if m.get("shown") is not None:
        return Mask(m.shown, fill, dtype, shows=True)
    return Mask(None, dtype=dtype)


def _untransposed(node: Node) -> tuple[Node, bool]:
    """x, where the node is x with its last two dimensions exchanged."""
    rank, name = value(node).dim(), op_name(node)
    if name not in ("transpose", "swapaxes", "swapdims", "permute", "mT") or node.meta.get("written"):
        return node, False
    source, *rest = arguments(node).values()
    last = [rank - 2, rank - 1]
    if name == "permute":
        swapped = [d % rank for d in rest[0]] == [*range(rank - 2), *last[::-1]]
    else:
        swapped = name == "mT" or sorted(d % rank for d in rest) == last
    return (source, True) if swapped else (node, False)
