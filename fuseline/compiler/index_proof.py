"""Deciding formulas of the index algebra: what holds for every index and every size that the program allows.

A claim is proved by refutation: its negation, in disjunctive normal form, must be infeasible clause by clause under the
ranges of indices and sizes. A clause is infeasible when it holds a fact and its negation, or when Fourier-Motzkin
elimination with integer tightening (Pugh, 1991, "The Omega test", section 2) derives a contradiction. Elimination over
the rationals is incomplete for integers but sound: "proved" is always right, "not proved" may be a missed truth.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import sympy
import torch

from . import compat
from .index_algebra import (
    TRUE,
    All,
    AtLeast,
    Atom,
    Element,
    Formula,
    Holds,
    Linear,
    Size,
    Variable,
    as_linear,
    both,
    either,
    negate,
)

CLAUSES, CONSTRAINTS = 256, 1500
"""Above these a proof is given up, which counts as not proved."""

UNBOUNDED = 2**62


class TooHard(Exception):
    """The formula has more clauses than the prover takes on."""


class Prover:
    """Ranges of loop indices and symbolic sizes, and proofs under them."""

    def __init__(self, shape_env: torch.fx.experimental.symbolic_shapes.ShapeEnv | None = None):
        self._shape_env = shape_env
        self._sizes: dict[Variable, Linear] = {}
        self._names = itertools.count()

    def variable(self, name: str, size: Linear | int) -> Linear:
        """A fresh index that runs over 0 … size − 1."""
        variable = Variable(f"{name}.{next(self._names)}")
        self._sizes[variable] = as_linear(size)
        return Linear.of(variable)

    def extent(self, variable: Variable) -> Linear:
        """How many values an index takes."""
        return self._sizes[variable]

    def size(self, value: int | torch.SymInt | sympy.Expr) -> Linear:
        """A size as a linear form; nonlinear parts become atoms of their own."""
        expression = value if isinstance(value, sympy.Expr) else compat.symbolic_expression(value)
        if isinstance(expression, int):
            return Linear(constant=expression)
        total = Linear()
        for term, factor in sympy.expand(expression).as_coefficients_dict().items():
            if not factor.is_integer:
                return Linear.of(Size(expression))
            total += Linear(constant=int(factor)) if term == 1 else Linear.of(Size(term)) * int(factor)
        return total

    def proves(self, claim: Formula, given: Formula = TRUE) -> bool:
        """Whether `claim` holds wherever `given` does, for all indices and sizes in range."""
        try:
            return all(self._infeasible(clause) for clause in _clauses(both(given, negate(claim))))
        except TooHard:
            return False

    def equivalent(self, a: Formula, b: Formula) -> bool:
        """Whether two formulas hold at the same indices."""
        return self.proves(a, given=b) and self.proves(b, given=a)

    def simplify(self, formula: Formula) -> Formula:
        """The formula without the parts that the others and the ranges imply; TRUE or FALSE where it is decided."""
        if self.proves(formula):
            return TRUE
        if self.proves(negate(formula)):
            return either()
        parts = list(formula.parts) if isinstance(formula, All) else [formula]
        for part in list(parts):
            rest = [p for p in parts if p is not part]
            if self.proves(part, given=both(*rest)):
                parts = rest
        return both(*parts)

    def _infeasible(self, clause: tuple[AtLeast | Holds, ...]) -> bool:
        facts = {(x.element, x.positive) for x in clause if isinstance(x, Holds)}
        if any((element, not positive) in facts for element, positive in facts):
            return True
        forms = [x.form for x in clause if isinstance(x, AtLeast)]
        return contradictory([*forms, *self._ranges(forms)])

    def _ranges(self, forms: Iterable[Linear]) -> list[Linear]:
        """What is known of the atoms in these forms, and of the atoms in that, until nothing is new."""
        pending: list[Atom] = [a for f in forms for a in f.atoms]
        seen: set[Atom] = set()
        facts: list[Linear] = []
        while pending:
            atom = pending.pop()
            if atom in seen:
                continue
            seen.add(atom)
            found = self._known(atom)
            facts += found
            pending += [a for f in found for a in f.atoms]
        return facts

    def _known(self, atom: Atom) -> list[Linear]:
        me = Linear.of(atom)
        if isinstance(atom, Variable):
            return [me, self._sizes[atom] - me - 1]
        if isinstance(atom, Element):
            return []
        expression, known = atom.expression, []
        if expression.func.__name__ == "Max":
            known += [me - self.size(a) for a in expression.args]
        if expression.func.__name__ == "Min":
            known += [self.size(a) - me for a in expression.args]
        lower, upper = self._bounds(expression)
        known += [me - lower] if lower is not None else []
        known += [Linear(constant=upper) - me] if upper is not None else []
        return known

    def _bounds(self, expression: sympy.Expr) -> tuple[int | None, int | None]:
        if self._shape_env is None:
            return None, None
        bounds = self._shape_env.bound_sympy(expression)
        ends = [int(b) if b.is_Integer and abs(int(b)) < UNBOUNDED else None for b in (bounds.lower, bounds.upper)]
        return ends[0], ends[1]


def _clauses(formula: Formula) -> list[tuple[AtLeast | Holds, ...]]:
    """Disjunctive normal form."""
    if isinstance(formula, (AtLeast, Holds)):
        return [(formula,)]
    if isinstance(formula, All):
        clauses: list[tuple[AtLeast | Holds, ...]] = [()]
        for part in formula.parts:
            clauses = [a + b for a, b in itertools.product(clauses, _clauses(part))]
            if len(clauses) > CLAUSES:
                raise TooHard
        return clauses
    found = [c for part in formula.parts for c in _clauses(part)]
    if len(found) > CLAUSES:
        raise TooHard
    return found


def contradictory(forms: Iterable[Linear]) -> bool:
    """Whether no integers make every form ≥ 0 (True is certain, False may be a missed contradiction)."""
    pending = {_tightened(f) for f in forms}
    while True:
        if any(f.value is not None and f.value < 0 for f in pending):
            return True
        pending = {f for f in pending if f.value is None}
        if not pending:
            return False
        atoms = set().union(*(f.atoms for f in pending))
        atom = min(atoms, key=lambda a: _growth(a, pending))
        above = [f for f in pending if f.coefficient(atom) > 0]
        below = [f for f in pending if f.coefficient(atom) < 0]
        rest = {f for f in pending if not f.coefficient(atom)}
        for high, low in itertools.product(above, below):
            rest.add(_tightened(high * -low.coefficient(atom) + low * high.coefficient(atom)))
        if len(rest) > CONSTRAINTS:
            return False
        pending = rest


def _growth(atom: Atom, forms: set[Linear]) -> int:
    signs = [f.coefficient(atom) for f in forms]
    above, below = sum(s > 0 for s in signs), sum(s < 0 for s in signs)
    return above * below - above - below


def _tightened(form: Linear) -> Linear:
    """Divided by the common factor of its coefficients; the constant rounds down, as the atoms are integers."""
    factor = math.gcd(*(c for _, c in form.terms)) if form.terms else 1
    if factor == 1:
        return form
    return Linear(frozenset((a, c // factor) for a, c in form.terms), form.constant // factor)
