"""x·rsqrt(mean(x²) + ε)·w, written out or as `aten.rms_norm` → `fuseline.rms_norm`.

    h = x.float()                                     y = rms_norm(x, w, ε, accumulate=float32, cast_first=True)
    h = h * rsqrt(h.pow(2).mean(-1, keepdim) + ε)
    y = w * h.to(x.dtype)

Also with weights around zero, `(1 + w)` (`unit_offset`); with the cast after the weight (`cast_first=False`); without a
weight or without casts. Source: Zhang and Sennrich, 2019, "Root Mean Square Layer Normalization".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ...compiler.ops import rms_norm
from ...compiler.pattern import Either, Match, Scalar, Term, Var, call, rsqrt, square
from ...compiler.program import Program
from ...compiler.rewriter import Builder
from ...compiler.rule import Rule
from .nodes import CASTS, cast_from, is_last, is_vector, only_user, op_name, value


@dataclass(frozen=True)
class Norm:
    """What to build: the op's arguments and the node that it replaces."""

    root: Node
    x: Node
    weight: Node | None = None
    unit_offset: bool = False
    accumulate: torch.dtype | None = None
    cast_first: bool = True


class RMSNorm(Rule):
    def before(self, h: Var, eps: Var, dims: Var, n: Scalar) -> Term:  # type: ignore[override]
        squares = square(h)
        mean = Either(
            (
                call("mean", squares, dim=dims, keepdim=True, bind="mean"),
                call("div", call("sum", squares, dim=dims, keepdim=True, bind="mean"), n),
            )
        )
        power = Either((mean + eps, mean))
        root = Either((call("sqrt", power), call("pow", power, 0.5)))
        return Either((h * rsqrt(power), call("div", h, root)))

    def matches(self, program: Program) -> Iterator[Match]:
        for core in super().matches(program):
            norm, nodes = grown(core.root, core.h)
            yield Match(norm.root, {**core.bindings, "norm": norm, "core": core.root}, (*core.nodes, *nodes))

    def refuse(self, m: Match) -> str | None:
        rank, eps, size = value(m.h).dim(), m.get("eps", 0.0), value(m.h).shape[-1]
        if not is_last(m.dims, rank):
            return f"the mean runs over the dimensions {list(m.dims)} of {rank}, not over the last one"
        if isinstance(eps, Node):
            return f"ε is the tensor '{eps.name}', not a number"
        if m.get("n", size) != size:
            return f"the sum of {size} squares is divided by {m.n}"
        if value(m.mean).dtype != value(m.h).dtype:
            return f"the mean is taken in {value(m.mean).dtype}, the rest in {value(m.h).dtype}"
        return None

    def after(self, m: Match, new: Builder) -> Node:
        return build(m.norm, float(m.get("eps", 0.0)), new)


class RMSNormCall(Rule):
    """`aten.rms_norm`, which computes 16-bit inputs in float32 and casts after the weight."""

    @property
    def name(self) -> str:
        return "RMSNorm"

    def before(self, x: Var, dims: Var, w: Var, eps: Var) -> Term:  # type: ignore[override]
        return call("rms_norm", x, dims, w, eps)

    def refuse(self, m: Match) -> str | None:
        if len(m.dims) != 1:
            return f"it normalises over the last {len(m.dims)} dimensions, not over the last one"
        return None

    def after(self, m: Match, new: Builder) -> Node:
        dtype = value(m.x).dtype
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        eps = m.eps if m.eps is not None else torch.finfo(wide).eps
        accumulate = wide if wide != dtype else None
        return build(Norm(m.root, m.x, m.w, False, accumulate, cast_first=False), float(eps), new)


def build(norm: Norm, eps: float, new: Builder) -> Node:
    return new(rms_norm, norm.x, norm.weight, eps, norm.unit_offset, norm.accumulate, norm.cast_first)


def grown(core: Node, h: Node) -> tuple[Norm, list[Node]]:
    """The largest RMSNorm around a bare one: the casts and the weight that follow, the cast that came before.

    The statistics' type moves into the op only where the result comes back to the type that the input had.
    """
    x = cast_from(h)
    wide = value(h).dtype
    narrow = value(x).dtype if x is not None else wide
    cast = only_user(core, *CASTS)
    if x is not None and cast is not None and cast_from(cast) is core and value(cast).dtype == narrow:
        weighted = _weighted(cast)
        if weighted is None:
            return Norm(cast, x, accumulate=wide), [h, cast]
        product, factor = weighted
        weight, unit, used = _offset(factor)
        return Norm(product, x, weight, unit, wide), [h, cast, *used, product]
    weighted = _weighted(core)
    if weighted is None:
        return Norm(core, h), []
    product, factor = weighted
    weight, unit, used = _offset(factor)
    last = only_user(product, *CASTS)
    if last is None or cast_from(last) is not product or value(last).dtype != narrow or value(product).dtype != wide:
        return Norm(product, h, weight, unit), [*used, product]
    if x is None:
        return Norm(last, h, weight, unit), [*used, product, last]
    if unit and value(factor).dtype != wide:
        weight, unit, used = factor, False, []  # 1 + w was rounded to the weight's own type
    source = cast_from(weight)
    if source is not None and value(weight).dtype == wide:
        weight, used = source, [*used, weight]  # the op widens w itself
    return Norm(last, x, weight, unit, wide, cast_first=False), [h, *used, product, last]


def _weighted(norm: Node) -> tuple[Node, Node] | None:
    """The product of the norm with a vector over its last dimension, and that vector."""
    product = only_user(norm, "mul")
    if product is None:
        return None
    a, b = product.args
    other = b if a is norm else a
    return (product, other) if is_vector(other, value(norm).shape[-1]) else None  # type: ignore[return-value]


def _offset(factor: Node) -> tuple[Node, bool, list[Node]]:
    """w and whether the factor is 1 + w, with the nodes that this takes in."""
    if op_name(factor) == "add" and factor.kwargs.get("alpha", 1) == 1:
        a, b = factor.args
        terms: list[Any] = [t for t in (a, b) if isinstance(t, Node)]
        if len(terms) == 1 and 1 in (a, b):
            return terms[0], True, [factor]
    return factor, False, []
