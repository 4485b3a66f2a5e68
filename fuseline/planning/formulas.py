"""A step's memory as a formula in the sequence's length, and the longest sequence under a limit in closed form.

The peak is the largest of the steps of a schedule, and each of those a polynomial in the length whose coefficients are
counts of storages: the formula is a maximum of few polynomials, those that are the largest somewhere. More layers than
were traced add what one block keeps to the steps behind the last block's forward, and what its backward leaves behind
to the steps of the first block's backward; between those ends memory is linear in the layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy

from ..passes.checkpointing.policies import Choice, Problem
from ..passes.checkpointing.scaling import rows_of

GRID = tuple(sorted({round(2 ** (k / 2)) for k in range(51)}))
"""Lengths at which steps are compared that are no straight lines in the length: 1 to 32M tokens."""


@dataclass(frozen=True)
class Formula:
    """The maximum of polynomials in `symbol`, bytes."""

    symbol: Any
    terms: tuple[Any, ...]

    def at(self, length: float) -> float:
        """Bytes at a length."""
        return max(float(sympy.sympify(t).subs(self.symbol, length)) for t in self.terms)

    def plus(self, constant: Any) -> Formula:
        """With something more, alive throughout."""
        return Formula(self.symbol, tuple(sympy.expand(t + constant) for t in self.terms))

    def of(self, share: Any) -> Formula:
        """The same at a share of the length: S → share·S."""
        return Formula(self.symbol, tuple(sympy.expand(sympy.sympify(t).subs(self.symbol, share * self.symbol))
                                          for t in self.terms))  # fmt: skip

    def __str__(self) -> str:
        texts = [text_of(t, self.symbol) for t in self.terms]
        return texts[0] if len(texts) == 1 else f"max({', '.join(texts)})"


def step_formula(
    problem: Problem, choice: Choice, symbol: Any, layers: int | None = None, sharded: bool = False
) -> Formula:
    """The peak of activations and gradients of a choice, with `layers` blocks in place of those that were traced.

    sharded: without what does not depend on the length, the parameters' gradients: each leaves the device as soon as it
    is there.
    """
    tape = problem.tape
    rows = rows_of(problem.sections, choice.execution, layers)
    if sharded:
        rows = np.unique(rows * [bool(getattr(s, "free_symbols", False)) for s in tape.sizes], axis=0)
    values = np.array([tape.size_values({**problem.at, symbol: length}) for length in GRID])
    terms = []
    for r in _largest(rows @ values.T):
        sizes = (int(c) * sympy.sympify(s) for c, s in zip(rows[r], tape.sizes) if c)
        terms.append(sympy.expand(sum(sizes, sympy.S(0))))
    fixed = {s: v for s, v in problem.at.items() if s != symbol}
    return Formula(symbol, tuple(dict.fromkeys(t.subs(fixed) for t in terms)))


def _largest(steps: np.ndarray) -> list[int]:
    """Which steps [steps, lengths of GRID] are the largest at some length: exactly so where all are straight lines."""
    slopes = steps[:, 1] - steps[:, 0]
    offsets = steps[:, 0] - slopes * GRID[0]
    if not np.allclose(steps, offsets[:, None] + slopes[:, None] * np.array(GRID), rtol=1e-9, atol=0.5):
        return list(dict.fromkeys(int(r) for r in np.argmax(steps, 0)))
    found, length = [], float(GRID[0])
    current = max(range(len(steps)), key=lambda r: (offsets[r] + slopes[r] * length, slopes[r]))
    while True:
        found.append(current)
        steeper = np.flatnonzero(slopes > slopes[current])
        if not len(steeper):
            return found
        meets = (offsets[current] - offsets[steeper]) / (slopes[steeper] - slopes[current])
        nearest = meets.min()
        current = int(max(steeper[meets <= nearest * (1 + 1e-12)], key=lambda r: slopes[r]))


def closed_text(closed: Any) -> str:
    """The longest length by the memory M, as it is written: (M - 22.8 GB) / 234 KB."""
    room = sympy.Symbol("M", positive=True)
    if sympy.sympify(closed).is_number:
        return "nothing fits" if closed == 0 else "no limit"
    poly = sympy.Poly(closed, room) if closed.is_polynomial(room) else None
    if poly is None or poly.degree() != 1:
        return str(closed).replace("**", "^")
    slope, offset = (float(c) for c in poly.all_coeffs())
    room = "M" if abs(offset / slope) < 1 else f"(M - {size_text(-offset / slope)})"
    return f"{room} / {size_text(1 / slope)}"


def longest(formula: Formula, limit: float) -> tuple[int, Any]:
    """The longest sequence whose peak is within a limit, and the formula that gives it in closed form.

    Returns (0, …) where nothing fits.
    """
    room = sympy.Symbol("M", positive=True)
    solutions: list[tuple[float, Any]] = []
    for term in formula.terms:
        poly = sympy.Poly(term, formula.symbol)
        if poly.degree() < 1:
            if float(term) > limit:
                return 0, sympy.S(0)
            continue
        roots = sympy.solve(sympy.Eq(term, room), formula.symbol)
        closed = next((r for r in roots if float(r.subs(room, limit)) > 0), None)
        if closed is None:
            return 0, sympy.S(0)
        solutions.append((float(closed.subs(room, limit)), closed))
    if not solutions:
        return 2**62, sympy.oo
    value, closed = min(solutions, key=lambda pair: pair[0])
    return int(value), closed


def text_of(term: Any, symbol: Any) -> str:
    """`1.2 GB + 393 KB·S`: a polynomial's coefficients as sizes."""
    poly = sympy.Poly(term, symbol)
    words = []
    for (power,), c in sorted(poly.terms()):
        unit = "" if power == 0 else "·S" if power == 1 else f"·S^{power}"
        words.append(f"{size_text(float(c))}{unit}")
    return " + ".join(words)


def size_text(size: float) -> str:
    """Bytes in the largest power of ten that leaves a whole digit: 1.23 GB."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if abs(size) >= factor:
            return f"{size / factor:.4g} {unit}"
    return f"{size:.4g} B"
