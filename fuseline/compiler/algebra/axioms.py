"""Axioms: what may be assumed of operations beyond linear algebra; and what a pass declares so as to be proved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import sympy

if TYPE_CHECKING:
    from .values import Call


@dataclass(frozen=True)
class Axiom:
    """An equation that holds for all values; its text is its name."""

    text: str

    def __str__(self) -> str:
        return self.text


ORTHOGONAL = Axiom("R·Rᵀ = 1")
PARTS = Axiom("Pᵢᵀ·Pⱼ = 1 if i = j, else 0: P picks channels")
BLOCKS = Axiom("P·R = R·P, P picking whole blocks")
ROWS = Axiom("f(x·M) = f(x)·M: f mixes or moves rows")
LINEAR = Axiom("f(x + y) = f(x) + f(y)")
CONSTANT = Axiom("f(w) = w: f picks rows, w is all of them")
VIEWS = Axiom("view(x·R) = view(x)·R, whole blocks")
HEADS = Axiom("view(x) = Σ headᵢ(x·Pᵢ), Pᵢ the channels of head i")
NORM = Axiom("rms(x·R) = rms(x)·R")
SCORES = Axiom("attention reads q and k as q·kᵀ")

ALL = frozenset({ORTHOGONAL, PARTS, BLOCKS, ROWS, LINEAR, CONSTANT, VIEWS, HEADS, NORM, SCORES})

Translator = Callable[["Call"], sympy.Expr | None]
"""A call → its value in terms of its operands' (`Call.value`); None: by an opaque function of them."""


@dataclass(frozen=True)
class Algebra:
    """What proves the rewrites of a pass.

    axioms: the equations that a proof may use, linear algebra (sums, products, casts, views) apart; calls: op name →
    how a call of it is written, where linear algebra alone does not say.
    """

    axioms: frozenset[Axiom]
    calls: Mapping[str, Translator] = field(default_factory=dict)
