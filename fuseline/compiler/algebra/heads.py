"""Heads of a joint product: a view that cuts channels into heads, as the sum of the heads, each put in its place.

Functions that move rows take some heads and drop others. Which, is found by moving a tensor that is 1 where a head is.
"""

from __future__ import annotations

import sympy
import torch
from sympy.core.function import AppliedUndef

from .axioms import HEADS
from .functions import MEANING, Meaning, Moves, Sizes, function, view
from .letters import pick


def cut_of(sizes: Sizes) -> int:
    """How many dimensions a view cuts the last one into; 0 where it does something else."""
    before, after = sizes
    if "*" in (before[-1], after[-1]) or not before[-1].isdecimal():
        return 0
    total, count = 1, 0
    while count < len(after) and after[-1 - count].isdecimal() and total < int(before[-1]):
        total *= int(after[-1 - count])
        count += 1
    return count if total == int(before[-1]) and count > 1 else 0


def by_heads(x: sympy.Expr, sizes: Sizes, cut: int) -> sympy.Expr:
    """A view that cuts the last dimension, as the sum over the heads of the channels of each, put in their place."""
    (*rows, width), after = sizes
    lead, head = after[:-cut], int(after[-1])
    x = view(x, (*rows, "*"), (*lead, "*"))
    found = []
    for i, start in enumerate(range(0, int(width), head)):
        name = f"head{i}[{','.join(after)}]"
        part = x * pick(int(width), start, start + head)
        found.append(function(name, [part], Meaning(HEADS, (0,), True, moves=_place(i, after, cut))))
    return sympy.Add(*found)


def _place(i: int, sizes: tuple[str, ...], cut: int) -> Moves:
    """Where head i is: ones there, zeros elsewhere, as a function of nothing; symbolic sizes are 3."""

    def placed(_: torch.Tensor) -> torch.Tensor:
        shape = [int(size) if size.isdecimal() else 3 for size in sizes]
        heads = torch.zeros(shape[len(shape) - cut : -1]).flatten()
        heads[i] = 1
        return heads.reshape(*shape[len(shape) - cut : -1], 1).expand(shape)

    return placed


def is_lost(moves: Moves, x: sympy.Expr) -> bool:
    """Whether a function that moves rows takes none of a head."""
    seen = _seen(x)
    if seen is None:
        return False
    try:
        made = moves(seen)
    except (RuntimeError, IndexError):  # of sizes that are not known
        return False
    return made.numel() > 0 and not made.any()


def _seen(x: sympy.Expr) -> torch.Tensor | None:
    """Where a head is, behind functions that move rows."""
    means = MEANING[x.func.__name__] if isinstance(x, AppliedUndef) else None
    if means is None or means.moves is None:
        return None
    if means.axiom is HEADS:
        return means.moves(torch.empty(0))
    inner = _seen(x.args[0])
    try:
        return None if inner is None else means.moves(inner)
    except (RuntimeError, IndexError):
        return None
