"""Finite fields, as much of them as Paley's matrices need: addition, and which elements are squares.

An element of GF(p^k) is an integer below p^k: its digits to the base p are the coefficients of a polynomial.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None


@lru_cache
def quadratic_character(q: int) -> tuple[int, ...]:
    """χ(a) for every element a of GF(q), q odd: 0 for zero, 1 for squares, −1 for the others."""
    found = prime_power(q)
    if found is None or found[0] == 2:
        raise ValueError(f"{q} is not a power of an odd prime")
    p, k = found
    character = [0] * q
    for exponent, element in enumerate(_powers(p, k)):
        character[element] = -1 if exponent % 2 else 1
    return tuple(character)


def add(a: int, b: int, p: int) -> int:
    """The sum of two elements: digit by digit, without carries."""
    total, weight = 0, 1
    while a or b:
        total += (a % p + b % p) % p * weight
        a, b, weight = a // p, b // p, weight * p
    return total


def _powers(p: int, k: int) -> list[int]:
    """1, x, x², … for an x whose powers are all elements but zero: the field's polynomial is searched until one is."""
    for tail in product(range(p), repeat=k):  # x^k = tail, constant term first
        powers = [1]
        while len(powers) < p**k:
            following = _times_x(powers[-1], tail, p)
            if following in (0, 1):
                break
            powers.append(following)
        if len(powers) == p**k - 1:
            return powers
    raise AssertionError(f"GF({p}^{k}) has no primitive polynomial")  # every finite field has one


def _times_x(element: int, tail: tuple[int, ...], p: int) -> int:
    k = len(tail)
    digits = [element // p**i % p for i in range(k)]
    shifted = [0, *digits[:-1]]
    return sum((s + digits[-1] * t) % p * p**i for i, (s, t) in enumerate(zip(shifted, tail)))
