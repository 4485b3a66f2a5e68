"""Functions of values, by name, and what may be assumed of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import UndefinedFunction

from .axioms import VIEWS, Axiom

Moves = Callable[[torch.Tensor], torch.Tensor]
Sizes = tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Meaning:
    """What may be assumed of a function; none: nothing.

    axiom: f(…, x·M, …) = f(…, x, …)·M for the operands at `carried` together; linear: and f(x + y) = f(x) + f(y) for
    them; picks: each row of the result is a row of an operand; sizes: of a view, before and after, with a last "*"
    where it leaves the last dimension alone; first: what its first operand is written by, where that is an axiom;
    moves: for a function that moves rows, it itself on a tensor.
    """

    axiom: Axiom | None = None
    carried: tuple[int, ...] = ()
    linear: bool = False
    picks: bool = False
    sizes: Sizes | None = None
    first: Axiom | None = None
    moves: Moves | None = None


MEANING: dict[str, Meaning] = {}
"""Function's name → what may be assumed of it."""


def function(name: str, operands: Sequence[sympy.Expr], means: Meaning) -> sympy.Expr:
    """A function of values, by its name."""
    MEANING[name] = means
    made: Any = UndefinedFunction(name, commutative=False)
    return made(*operands) if operands else sympy.Symbol(name, commutative=False)


def view(x: sympy.Expr, before: tuple[str, ...], after: tuple[str, ...]) -> sympy.Expr:
    """x's elements in another shape."""
    if before[-1] == after[-1]:
        before, after = (*before[:-1], "*"), (*after[:-1], "*")
    if before == after:
        return x
    name = f"view[{','.join(before)}→{','.join(after)}]"
    starred = after[-1] == "*"
    fixed = starred and all(size.isdecimal() for size in after[:-1])
    moves = (lambda t: t.reshape(*map(int, after[:-1]), t.shape[-1])) if fixed else None
    return function(name, [x], Meaning(VIEWS, (0,), True, starred, (before, after), moves=moves))


def composed(x: sympy.Expr, inner: Sizes, outer: Sizes) -> sympy.Expr:
    """view(view(x)) as one."""
    (first, middle), (again, last) = inner, outer
    if middle[-1] == "*" and again[-1] != "*":
        first = (*first[:-1], again[-1])
    elif again[-1] == "*" and middle[-1] != "*":
        last = (*last[:-1], middle[-1])
    return view(x, first, last)
