"""Terms over index variables: what one element of an integer, boolean or mask tensor is, as a function of its index.

An element is a linear form over loop indices, sizes and opaque elements of inputs; or a formula over inequalities of
such forms; or a choice between two values. The terms are built by `index_reader` from a graph and decided by
`index_proof`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

import sympy
from torch.fx import Node


@dataclass(frozen=True)
class Variable:
    """A loop index: one dimension of the tensor that is being read."""

    name: str


@dataclass(frozen=True)
class Size:
    """A symbolic size of the program."""

    expression: sympy.Expr


@dataclass(frozen=True)
class Element:
    """One element of a node that the algebra doesn't look into: an input, or an op that it doesn't know."""

    node: Node
    index: tuple[Linear, ...]


Atom: TypeAlias = Variable | Size | Element


@dataclass(frozen=True)
class Linear:
    """Σ coefficient·atom + constant, over the integers."""

    terms: frozenset[tuple[Atom, int]] = frozenset()
    constant: int = 0

    @staticmethod
    def of(atom: Atom) -> Linear:
        return Linear(frozenset({(atom, 1)}))

    def __add__(self, other: Linear | int) -> Linear:
        other = as_linear(other)
        total = dict(self.terms)
        for atom, coefficient in other.terms:
            total[atom] = total.get(atom, 0) + coefficient
        return Linear(frozenset((a, c) for a, c in total.items() if c), self.constant + other.constant)

    def __mul__(self, factor: int) -> Linear:
        return Linear(frozenset((a, c * factor) for a, c in self.terms if factor), self.constant * factor)

    def __neg__(self) -> Linear:
        return self * -1

    def __sub__(self, other: Linear | int) -> Linear:
        return self + -as_linear(other)

    @property
    def value(self) -> int | None:
        """The number that this form is, when it has no atoms."""
        return None if self.terms else self.constant

    def coefficient(self, atom: Atom) -> int:
        return dict(self.terms).get(atom, 0)

    @property
    def atoms(self) -> frozenset[Atom]:
        return frozenset(a for a, _ in self.terms)


def as_linear(value: Linear | int) -> Linear:
    return value if isinstance(value, Linear) else Linear(constant=int(value))


@dataclass(frozen=True)
class AtLeast:
    """form ≥ 0."""

    form: Linear


@dataclass(frozen=True)
class Holds:
    """An opaque boolean element, or its negation."""

    element: Element
    positive: bool = True


@dataclass(frozen=True)
class All:
    """Every part holds; of no parts: true."""

    parts: tuple[Formula, ...] = ()


@dataclass(frozen=True)
class Some:
    """Some part holds; of no parts: false."""

    parts: tuple[Formula, ...] = ()


Formula: TypeAlias = AtLeast | Holds | All | Some
FORMULAS = (AtLeast, Holds, All, Some)
TRUE, FALSE = All(), Some()


def both(*formulas: Formula) -> Formula:
    """The conjunction, flat, with constants folded and repeats dropped."""
    parts: dict[Formula, None] = {}
    for formula in map(_fold, formulas):
        if formula == FALSE:
            return FALSE
        parts.update(dict.fromkeys(formula.parts if isinstance(formula, All) else (formula,)))
    return next(iter(parts)) if len(parts) == 1 else All(tuple(parts))


def either(*formulas: Formula) -> Formula:
    """The disjunction, flat, with constants folded and repeats dropped."""
    return negate(both(*map(negate, formulas)))


def negate(formula: Formula) -> Formula:
    """¬formula, pushed down to the literals; over the integers ¬(x ≥ 0) is −x − 1 ≥ 0."""
    match formula:
        case AtLeast(form):
            return _fold(AtLeast(-form - 1))
        case Holds(element, positive):
            return Holds(element, not positive)
        case All(parts):
            negated = [negate(p) for p in parts]
            return negated[0] if len(negated) == 1 else Some(_flat(negated, Some))
        case Some(parts):
            negated = [negate(p) for p in parts]
            return negated[0] if len(negated) == 1 else All(_flat(negated, All))


def _flat(formulas: list[Formula], kind: type[All] | type[Some]) -> tuple[Formula, ...]:
    return tuple(itertools.chain.from_iterable(f.parts if isinstance(f, kind) else (f,) for f in formulas))


def _fold(formula: Formula) -> Formula:
    if isinstance(formula, AtLeast) and formula.form.value is not None:
        return TRUE if formula.form.value >= 0 else FALSE
    return formula


def equal(a: Linear, b: Linear) -> Formula:
    return both(AtLeast(a - b), AtLeast(b - a))


def literals(formula: Formula) -> Iterator[AtLeast | Holds]:
    """The inequalities and opaque facts that a formula is made of."""
    if isinstance(formula, (All, Some)):
        for part in formula.parts:
            yield from literals(part)
    else:
        yield formula


def variables(term: Formula | Linear | Element) -> frozenset[Variable]:
    """The loop indices that a term depends on, also inside opaque elements."""
    if isinstance(term, Linear):
        found: frozenset[Variable] = frozenset()
        for atom in term.atoms:
            found |= {atom} if isinstance(atom, Variable) else variables(atom) if isinstance(atom, Element) else set()
        return found
    if isinstance(term, Element):
        return frozenset().union(*(variables(i) for i in term.index))
    parts = (variables(x.form if isinstance(x, AtLeast) else x.element) for x in literals(term))
    return frozenset().union(*parts)


def is_opaque(formula: Formula) -> bool:
    """Whether a formula reads data: elements of a tensor that the algebra doesn't look into."""
    for literal in literals(formula):
        if isinstance(literal, Holds) or any(isinstance(a, Element) for a in literal.form.atoms):
            return True
    return False


@dataclass(frozen=True)
class Choice:
    """`then` where the condition holds, `otherwise` elsewhere."""

    condition: Formula
    then: Value
    otherwise: Value


Value: TypeAlias = Linear | AtLeast | Holds | All | Some | float | Choice


def choose(condition: Formula, then: Value, otherwise: Value) -> Value:
    """A choice, with decided conditions and equal branches folded; between formulas it is a formula."""
    if condition == TRUE or then == otherwise:
        return then
    if condition == FALSE:
        return otherwise
    if isinstance(then, FORMULAS) and isinstance(otherwise, FORMULAS):
        return either(both(condition, then), both(negate(condition), otherwise))
    return Choice(condition, then, otherwise)


def apply(function: Callable[..., Value], *values: Value) -> Value:
    """`function` on values without choices, distributed over those that are choices."""
    for position, value in enumerate(values):
        if isinstance(value, Choice):
            before, after = values[:position], values[position + 1 :]
            return choose(
                value.condition,
                apply(function, *before, value.then, *after),
                apply(function, *before, value.otherwise, *after),
            )
    return function(*values)


def is_formula(value: Any) -> TypeGuard[Formula]:
    return isinstance(value, FORMULAS)
