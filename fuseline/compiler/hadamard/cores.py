"""Symmetric Hadamard matrices of the orders that are not powers of two.

Paley II: order 2(q + 1), q ≡ 1 mod 4 a prime power. Paley I: order q + 1, q ≡ 3 mod 4; with χ(a + b) in the place of
χ(a − b) it is symmetric. Source: Paley, 1933.

Propus: order 4v from ±1 sequences A, B, D of length v, A symmetric, whose periodic autocorrelations A + 2B + D cancel,
in a Goethals-Seidel array with the second sequence repeated. Source: Seberry and Balonin, 2015, "The propus
construction for symmetric Hadamard matrices"; the sequences below were found by a search of our own, for 39 and 43
among those that the subgroup of order 3 leaves alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

from .fields import add, prime_power, quadratic_character

Matrix = tuple[tuple[int, ...], ...]

LARGEST = 256
"""The largest order: a core is multiplied as a dense matrix, and what is left of a size is a power of two."""

PROPUS = {
    23: ("+-+-+--+---++---+--+-+-", "++++--++-++--+-+-------", "+++--+----+-++----+----"),
    29: ("+-+---+++-+--+--+--+-+++---+-", "++++-+++--+-+-++--++-+++++---", "--+++-+----------++-++++-++-+"),
    39: (
        "+-++-+-+++-+++-----++-----+++-+++-+-++-",
        "+++-+++---+-+++++++---++-+---++-+--++-+",
        "++--+-+-+-++---++-+++-+--+--+--+-------",
    ),
    43: (
        "+-++------+-+-+-+++--++--+++-+-+-+------++-",
        "++---+++++++-++-++-----+--++--++-+-++++--++",
        "+-+--+-++++++---++-+++-+-+--+++-+-+--+-++-+",
    ),
}


@lru_cache
def core_signs(order: int) -> Matrix | None:
    """A symmetric Hadamard matrix of this order, of 1 and −1, or None where no construction here gives one."""
    construction = _construction(order)
    if construction is None:
        return None
    matrix = construction()
    if not is_symmetric_hadamard(matrix):
        raise AssertionError(f"the matrix of order {order} is not a symmetric Hadamard matrix")
    return matrix


def is_symmetric_hadamard(matrix: Sequence[Sequence[int]]) -> bool:
    """Whether all entries are ±1, H = Hᵀ and H·Hᵀ = n·I, exactly: rows are compared as bit patterns."""
    n = len(matrix)
    if any(len(row) != n or any(entry not in (1, -1) for entry in row) for row in matrix):
        return False
    if any(matrix[i][j] != matrix[j][i] for i in range(n) for j in range(i)):
        return False
    bits = [sum(1 << j for j, entry in enumerate(row) if entry < 0) for row in matrix]
    return all(2 * (bits[i] ^ bits[j]).bit_count() == n for i in range(n) for j in range(i))


def _construction(order: int) -> Callable[[], Matrix] | None:
    """What makes the matrix of this order."""
    if order % 4 or not order & (order - 1) or order > LARGEST:
        return None
    for q, residue, paley in ((order // 2 - 1, 1, _paley_two), (order - 1, 3, _paley_one)):
        found = prime_power(q)
        if q % 4 == residue and found is not None:
            return partial(paley, q, found[0])
    if order // 4 in PROPUS:
        return partial(_propus, *(tuple(1 if s == "+" else -1 for s in row) for row in PROPUS[order // 4]))
    return None


def _paley_one(q: int, p: int) -> Matrix:
    """[[1, 1], [1, χ(a + b) − (a + b = 0)]]."""
    entry = [-1, *quadratic_character(q)[1:]]
    return ((1,) * (q + 1), *((1, *(entry[add(a, b, p)] for b in range(q))) for a in range(q)))


def _paley_two(q: int, p: int) -> Matrix:
    """C ⊗ [[1, 1], [1, −1]] + I ⊗ [[1, −1], [−1, −1]], where C = [[0, 1], [1, χ(a − b)]] is a conference matrix."""
    character = quadratic_character(q)
    difference = [[0] * q for _ in range(q)]
    for a in range(q):
        for b in range(q):
            difference[add(a, b, p)][b] = character[a]  # (a + b) − b = a
    conference = [[0] + [1] * q, *([1, *row] for row in difference)]
    n = 2 * (q + 1)
    off, on = ((1, 1), (1, -1)), ((1, -1), (-1, -1))
    return tuple(
        tuple(
            on[i % 2][j % 2] if i // 2 == j // 2 else conference[i // 2][j // 2] * off[i % 2][j % 2] for j in range(n)
        )
        for i in range(n)
    )


def _propus(a: Sequence[int], b: Sequence[int], d: Sequence[int]) -> Matrix:
    """Circulants A, B, D, and R the matrix that reverses:

    −A   B·R   B·R   D·R
    B·R  Dᵀ·R   A   −Bᵀ·R
    B·R   A   −Dᵀ·R  Bᵀ·R
    D·R −Bᵀ·R  Bᵀ·R   A
    """
    v = len(a)
    plain = lambda s, i, j: s[(j - i) % v]
    turned = lambda s, i, j: s[(-1 - j - i) % v]  # S·R
    both = lambda s, i, j: s[(i + j + 1) % v]  # Sᵀ·R
    blocks = (
        ((-1, plain, a), (1, turned, b), (1, turned, b), (1, turned, d)),
        ((1, turned, b), (1, both, d), (1, plain, a), (-1, both, b)),
        ((1, turned, b), (1, plain, a), (-1, both, d), (1, both, b)),
        ((1, turned, d), (-1, both, b), (1, both, b), (1, plain, a)),
    )
    return tuple(
        tuple(sign * entry(s, i, j) for sign, entry, s in row for j in range(v)) for row in blocks for i in range(v)
    )


ORDERS = tuple(n for n in range(4, LARGEST + 1, 4) if _construction(n) is not None)
"""The orders that `core_signs` has. Powers of two are not among them: they need no core."""
