"""Letters: the non-commutative symbols that statements are made of.

    x1, x2    values, rows of channels          W1, w1   parameters: matrices, vectors; E1: stacks of matrices
    H6 S6 Q6  orthogonal, on runs of 6 channels C12      takes the mean of 12 channels away
    P2:5/9    picks channels 2 to 5 of 9        diag(w)  multiplies each channel by its own number
    1s12      12 ones                           K…       a tensor of constants

Letters of one name are equal in every statement but for x, W, w and E, which each statement numbers for itself. Q6 is
drawn (from a seed, Q6/seed1) or a plan's (Q6/1f0c…, by its contents): taken for orthogonal where it is, as measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy
import torch

from ..expressions import Constant, Expression, Hadamard, Orthogonal, Param, Signs
from ..planned import kept


class Symmetric(sympy.Symbol):
    """A matrix that is its own transpose."""

    def _eval_transpose(self) -> sympy.Expr:
        return self


ORTHOGONAL = 1e-12
"""Of max|R·Rᵀ − 1|, up to which R is taken for orthogonal."""


@dataclass(frozen=True)
class Rotation:
    """A matrix on runs of `block` channels, meant to be orthogonal; matrix: how it is computed, [block, block] in
    float64."""

    block: int
    matrix: Callable[[], torch.Tensor]

    @property
    def is_orthogonal(self) -> bool:
        return residual(self) <= ORTHOGONAL


@dataclass(frozen=True)
class Pick:
    """Channels `start` to `end` of `width`."""

    width: int
    start: int
    end: int


MEANING: dict[sympy.Symbol, Rotation | Pick | str] = {}
"""What letters mean that axioms speak of: rotations, picks of channels, "row": another for each row, and "vector"."""


def letter(name: str, symmetric: bool = False, meaning: Rotation | Pick | str | None = None) -> sympy.Symbol:
    """The letter of a name."""
    made: Any = (Symmetric if symmetric else sympy.Symbol)(name, commutative=False)
    if meaning is not None:
        MEANING.setdefault(made, meaning)
    return made


def hadamard(block: int) -> sympy.Symbol:
    def matrix() -> torch.Tensor:
        eye = torch.eye(block, dtype=torch.float64)
        value: torch.Tensor = Hadamard(Param("1"), 1, block).evaluate(lambda _: eye)
        return value

    return letter(f"H{block}", True, Rotation(block, cache(matrix)))


def orthogonal(n: int, seed: int) -> sympy.Symbol:
    made = Orthogonal(n, seed, "cpu")
    return letter(f"Q{n}{_seed(seed)}", False, Rotation(n, cache(lambda: _value(made))))


def planned(n: int, digest: str) -> sympy.Symbol:
    """A plan's matrix."""
    return letter(f"Q{n}/{digest[:8]}", False, Rotation(n, cache(lambda: kept(digest).double())))


def signs(n: int, seed: int) -> sympy.Symbol:
    made = Signs(n, seed, torch.float64, "cpu")
    return letter(f"S{n}{_seed(seed)}", True, Rotation(n, cache(lambda: torch.diag(_value(made)))))


def centre(width: int) -> sympy.Symbol:
    return letter(f"C{width}", True)


def ones(width: int) -> sympy.Symbol:
    return letter(f"1s{width}", meaning="vector")


def constant(e: Constant) -> sympy.Symbol:
    name = hashlib.sha256(repr(e).encode()).hexdigest()[:8]
    return letter(f"K{name}", meaning="vector" if len(e.shape) == 1 else None)


def pick(width: int, start: int, end: int) -> sympy.Expr:
    """The matrix [width, end − start] that picks channels; 1 where it picks them all."""
    if (start, end) == (0, width):
        return sympy.S.One
    return letter(f"P{start}:{end}/{width}", False, Pick(width, start, end))


def of_row(symbol: sympy.Symbol) -> bool:
    """Whether a letter stands for something else in each row: a value, a matrix of a stack."""
    return MEANING.get(symbol) == "row"


def meaning(factor: sympy.Expr) -> tuple[Rotation | Pick | str | None, bool]:
    """What a factor of a product means, and whether it is transposed."""
    turned = isinstance(factor, sympy.transpose)
    return MEANING.get(factor.args[0] if turned else factor), turned


@cache
def residual(rotation: Rotation) -> float:
    """max|R·Rᵀ − 1|."""
    matrix = rotation.matrix()
    return float((matrix @ matrix.t() - torch.eye(rotation.block, dtype=torch.float64)).abs().max())


def _seed(seed: int) -> str:
    return f"/seed{seed}" if seed else ""


def _value(expression: Expression) -> torch.Tensor:
    value: torch.Tensor = expression.evaluate(lambda name: torch.empty(0))
    return value
