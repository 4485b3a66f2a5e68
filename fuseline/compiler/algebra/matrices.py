"""Weight expressions as algebra: each a matrix in the letters of its parameters, [rows, columns] as it is stored.

A stack of matrices is written as one of them, since whatever is done to the last two dimensions is done to all alike.
A vector is a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import sympy

from ..expressions import (
    Add,
    Blocks,
    Cast,
    Centre,
    Concat,
    Constant,
    Expression,
    Hadamard,
    Matmul,
    Offset,
    Orthogonal,
    Param,
    Planned,
    Reshape,
    Scale,
    Signs,
    Slice,
    Transpose,
)  # fmt: skip
from . import letters
from .region import NotTranslated

Shape = tuple[int, ...]


class Matrices:
    """Writes weight expressions; shapes: parameter → its shape; names: parameter → its letter's number."""

    def __init__(self, shapes: Mapping[str, Shape]):
        self._shapes = shapes
        self._letters: dict[str, sympy.Symbol] = {}

    def __call__(self, e: Expression) -> sympy.Expr:
        """The matrix, or the row, that an expression stands for.

        Raises:
            NotTranslated: the expression is no linear algebra (codes of a quantized weight).
        """
        shape = self.shape(e)
        match e:
            case Cast(x):
                return self(x)
            case Param(name):
                return self._letter(name, len(shape))
            case Orthogonal(n, seed):
                return letters.orthogonal(n, seed)
            case Matmul(a, b):
                return self(a) * self(b)
            case Add(a, b) if self.shape(b) == shape:
                return self(a) + self(b)
            case Transpose(x, first, second) if {first % len(shape), second % len(shape)} == {
                len(shape) - 2,
                len(shape) - 1,
            }:
                return sympy.transpose(self(x))
            case Reshape(x) if _is_turned(self.shape(x), shape):
                return sympy.transpose(self(x))
            case Scale(x, by, dim):
                return _times(self(x), self.diagonal(by), dim, shape)
            case Hadamard(x, dim, block):
                return _times(self(x), letters.hadamard(block or shape[dim]), dim, shape)
            case Blocks(x, by, dim):
                return _times(self(x), self(by), dim, shape)
            case Centre(x, dim):
                return _times(self(x), letters.centre(shape[dim]), dim, shape)
            case Slice(x, dim, start, end):
                return self.sliced(self(x), self.shape(x), dim, start, end)
            case Offset(x, by):
                return self(x) + number(by) * letters.ones(shape[-1])
            case Planned(digest, (n, m)) if n == m:
                return letters.planned(n, digest)
            case Constant():
                return letters.constant(e)
            case Concat(xs, dim):
                return joined([(self(x), self.shape(x)[dim]) for x in xs], dim, shape)
        raise NotTranslated(f"weight expression {type(e).__name__.lower()}")

    def diagonal(self, e: Expression) -> sympy.Expr:
        """diag(e) of a vector: what multiplies each channel by its own number."""
        match e:
            case Cast(x):
                return self.diagonal(x)
            case Offset(x, by):
                return self.diagonal(x) + number(by)
            case Signs(length, seed):
                return letters.signs(length, seed)
            case Concat(xs) if len(set(xs)) == 1 and isinstance(xs[0], Signs):
                return letters.signs(xs[0].length, xs[0].seed)
        renamed = e.rename({name: str(self._letter(name, len(self._shapes[name]))) for name in e.parameters()})
        return letters.letter(f"diag({_short(renamed)})", symmetric=True)

    def shape(self, e: Expression) -> Shape:
        match e:
            case Param(name):
                return self._shapes[name]
            case Constant(_, shape) | Reshape(_, shape) | Planned(_, shape):
                return shape
            case Signs(length):
                return (length,)
            case Orthogonal(n):
                return (n, n)
            case Matmul(a, b):
                return (*self.shape(a)[:-1], self.shape(b)[-1])
            case Slice(x, dim, start, end):
                return _with(self.shape(x), dim, end - start)
            case Concat(xs, dim):
                return _with(self.shape(xs[0]), dim, sum(self.shape(x)[dim] for x in xs))
            case Transpose(x, first, second):
                sizes = list(self.shape(x))
                sizes[first], sizes[second] = sizes[second], sizes[first]
                return tuple(sizes)
        operands = e.operands()
        if not operands:
            raise NotTranslated(f"weight expression {type(e).__name__.lower()}")
        return self.shape(operands[0])

    def _letter(self, name: str, rank: int) -> sympy.Symbol:
        if name not in self._letters:
            kind = "w" if rank == 1 else "W" if rank == 2 else "E"
            count = sum(str(known).startswith(kind) for known in self._letters.values())
            self._letters[name] = letters.letter(f"{kind}{count + 1}", meaning={1: "vector", 2: None}.get(rank, "row"))
        return self._letters[name]

    def sliced(self, made: sympy.Expr, shape: Shape, dim: int, start: int, end: int) -> sympy.Expr:
        """Some rows or columns of a matrix of this shape, or some matrices of a stack."""
        if len(shape) == 3 and dim % 3 == 0:
            return self.chosen(made, f"[{start}:{end}]")
        return _times(made, letters.pick(shape[dim], start, end), dim, shape)

    def chosen(self, made: sympy.Expr, which: str) -> sympy.Expr:
        """Some matrices of stacks, for the stacks: what multiplies them all is the same for each."""
        stacks = [symbol for name, symbol in self._letters.items() if len(self._shapes[name]) > 2]
        return made.xreplace({stack: letters.letter(f"{stack}{which}", meaning="row") for stack in stacks})


def joined(parts: Sequence[tuple[sympy.Expr, int]], dim: int, shape: Shape) -> sympy.Expr:
    """Matrices, each with its width along `dim`, side by side: the sum of each times Pᵀ."""
    width, start, terms = sum(size for _, size in parts), 0, []
    for made, size in parts:
        terms.append(_times(made, sympy.transpose(letters.pick(width, start, start + size)), dim, shape))
        start += size
    return reduce(lambda a, b: a + b, terms)


def number(x: float) -> sympy.Expr:
    """A number as it stands in the graph, exactly."""
    return sympy.Rational(x)


def _times(made: sympy.Expr, by: sympy.Expr, dim: int, shape: Shape) -> sympy.Expr:
    dim %= len(shape)
    if dim == len(shape) - 1:
        return made * by
    if dim == len(shape) - 2:
        return sympy.transpose(by) * made
    raise NotTranslated(f"a weight's dimension {dim} of {len(shape)}")


def _with(shape: Shape, dim: int, size: int) -> Shape:
    dim %= len(shape)
    return (*shape[:dim], size, *shape[dim + 1 :])


def _is_turned(before: Shape, after: Shape) -> bool:
    """Whether a row becomes a column, or a column a row."""
    return (len(before), len(after)) in ((1, 2), (2, 1)) and max(before, after, key=len)[-1] == 1


def _short(e: Expression) -> str:
    if isinstance(e, Param):
        return e.name
    return repr(e)
