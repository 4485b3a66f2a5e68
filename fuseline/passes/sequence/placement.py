"""Where a value lies: the lattice of `sequence-parallel`.

    Replicate       every rank holds all of it                     a plain tensor
    Shard(dim)      every rank holds a block along one dimension   `Sharded`
    Partial         the ranks' values add up to it                 `Partial`
    Unknown         an op without a rule met a shard               refused: `refusals.py`

A dimension may hold more than the sequence: [B, S, D] seen as [B·S, D] has its sequence inside dimension 0, B times.
A `Shard` therefore says how many elements lie outside and inside of the sequence within its dimension.

Gradients follow one convention: that of a replicated value is partial, its sum over the ranks is the true one; that of
a shard is the shard's own. So the gradient of a slice is a gradient padded with zeros, that of an all-gather a
reduce-scatter, that of an all-to-all the all-to-all back, and parameters are summed once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...compiler.compat import known_size, symbolic_expression


@dataclass(frozen=True)
class Axis:
    """A sequence of `length` positions in `degree` blocks of `block` positions; the last blocks may be short.

    heads: what is cut are attention heads, between two exchanges, and not the sequence.
    zigzag: members of a ring whose causal mask is balanced, 0 for blocks that lie in order. Member r of n holds chunks
    r and 2·n − 1 − r of 2·n, so that a causal mask gives every one the same work; where a member is several ranks, they
    share its two chunks in order.
    even: every block is whole, for sure.
    """

    length: Any
    block: Any
    degree: int
    even: bool
    heads: bool = False
    zigzag: int = 0

    def cut(self, length: Any) -> Axis:
        """The first `length` positions, in the same blocks."""
        if same_size(length, self.length):
            return self
        return replace(self, length=length, even=False)


@dataclass(frozen=True)
class Shard:
    """Dimension `dim` has outer · length · inner elements, of which this rank holds outer · block · inner."""

    dim: int
    axis: Axis
    outer: Any = 1
    inner: Any = 1

    @property
    def local(self) -> Any:
        """The dimension's size on this rank."""
        return self.outer * self.axis.block * self.inner

    def at(self, dim: int) -> Shard:
        return replace(self, dim=dim)

    def is_like(self, other: Shard) -> bool:
        """Whether both cut the same dimension in the same way."""
        return (
            self.dim == other.dim
            and self.axis.heads == other.axis.heads
            and all(map(same_size, self._sizes(), other._sizes()))
        )

    def _sizes(self) -> tuple[Any, ...]:
        return (self.axis.block, self.outer, self.inner)

    def shape(self, whole: Sequence[Any]) -> list[Any]:
        """The local shape of a tensor of this shape."""
        return [self.local if d == self.dim else size for d, size in enumerate(whole)]

    def __str__(self) -> str:
        return f"Shard({self.dim})"


@dataclass(frozen=True)
class Sharded:
    """This rank's block of a value."""

    tensor: torch.Tensor
    shard: Shard


@dataclass(frozen=True)
class Partial:
    """This rank's summand of a value."""

    tensor: torch.Tensor


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are the same expression."""
    return bool(symbolic_expression(a) == symbolic_expression(b))


def is_one(size: Any) -> bool:
    return known_size(size) == 1


def through_reshape(shard: Shard, before: Sequence[Any], after: Sequence[Any]) -> Shard | None:
    """Where the sharded sequence lies once a tensor of shape `before` is seen as one of shape `after`.

    In row-major order the sequence has some elements before it and some behind it, a number that no reshape changes:
    the new dimension is the one whose own elements hold the sequence whole. None if it is torn apart.
    """
    prefix = _product(before[: shard.dim]) * _expr(shard.outer)
    through = prefix * _expr(shard.axis.length)
    start = _expr(1)
    found = None
    for dim, size in enumerate(after):
        end = start * _expr(size)
        outer, inner = _quotient(prefix, start), _quotient(end, through)
        if outer is not None and inner is not None and not is_one(size):
            found = (dim, outer, inner)
            break
        start = end
    if found is None:
        return None
    dim, outer, inner = found
    sizes = [*before, *after, shard.outer, shard.inner]
    return Shard(dim, shard.axis, _number(outer, sizes), _number(inner, sizes))


def _expr(size: Any) -> Any:
    import sympy

    return sympy.sympify(symbolic_expression(size))


def _product(sizes: Sequence[Any]) -> Any:
    result = _expr(1)
    for size in sizes:
        result = result * _expr(size)
    return result


def _quotient(a: Any, b: Any) -> Any:
    """a / b where that is a whole number whatever the symbols; None otherwise."""
    import sympy

    ratio = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    return ratio if sympy.denom(ratio) == 1 else None


def _number(expression: Any, sizes: Sequence[Any]) -> Any:
    """The expression as a size: a number, or made of the SymInts at hand."""
    if expression.is_number:
        return int(expression)
    for size in sizes:
        if isinstance(size, torch.SymInt) and symbolic_expression(size) == expression:
            return size
    result: Any = 1
    for factor in expression.as_ordered_factors():
        if factor.is_number:
            result = result * int(factor)
            continue
        known = next((s for s in sizes if isinstance(s, torch.SymInt) and symbolic_expression(s) == factor), None)
        if known is None:
            raise ValueError(f"no size stands for {factor}")
        result = result * known
    return result
