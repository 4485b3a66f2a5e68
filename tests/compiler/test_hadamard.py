"""Hadamard matrices: each order claimed is one, exactly; sizes split into the smallest core; signs are fixed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from fuseline.compiler import ops
from fuseline.compiler.hadamard import ORDERS, core, core_signs, factor, hadamard_matrix, random_signs
from fuseline.compiler.hadamard.cores import PROPUS, is_symmetric_hadamard
from fuseline.compiler.hadamard.fields import add, prime_power, quadratic_character

MODELS = {
    576: (36, 4), 768: (12, 6), 1536: (12, 7), 3072: (12, 8), 4096: (1, 12), 5120: (20, 8), 6400: (100, 6),
    8960: (140, 6), 9728: (76, 7), 11008: (172, 6), 13824: (108, 7), 14336: (28, 9), 18944: (148, 7), 25600: (100, 8),
    28672: (28, 10), 53248: (52, 10),
}  # fmt: skip
"""Hidden and intermediate sizes of published models → order of the core, logarithm of the power of two."""


@pytest.mark.parametrize("order", ORDERS)
def test_a_core_is_a_symmetric_hadamard_matrix(order: int) -> None:
    h = core(order).to(torch.int64)
    assert h.abs().eq(1).all() and torch.equal(h, h.t())
    assert torch.equal(h @ h.t(), order * torch.eye(order, dtype=torch.int64))


def test_orders_that_are_known_here() -> None:
    smaller = {n for n in range(4, 257, 4) if n & (n - 1)}
    reached = {n for n in smaller if factor(n).kind == "hadamard"}
    assert smaller - reached == {188, 236}  # 4·47 and 4·59: no prime power beside them, no sequences here
    assert {12, 20, 28, 36, 44, 52, 60, 100, 108, 116, 140, 148, 156, 172} <= set(ORDERS)


@pytest.mark.parametrize("n", range(1, 257))
def test_the_whole_matrix_is_orthogonal(n: int) -> None:
    h, split = hadamard_matrix(n), factor(n)
    assert split.n == n and torch.equal(h, h.t())
    if split.kind == "hadamard":
        whole = (h * n**0.5).round()
        assert (
            torch.equal(whole @ whole, n * torch.eye(n, dtype=torch.float64))
            and (h.abs() - n**-0.5).abs().max() < 1e-15
        )
    else:
        assert (h @ h - torch.eye(n, dtype=torch.float64)).abs().max() < 1e-13


@pytest.mark.parametrize(("n", "expected"), MODELS.items(), ids=str)
def test_sizes_of_models(n: int, expected: tuple[int, int]) -> None:
    split = factor(n)
    assert (split.order, split.log2, split.kind) == (*expected, "hadamard")


@pytest.mark.parametrize("n", MODELS)
def test_twice_the_transform_is_the_input_exactly(n: int) -> None:
    # Without the divisor everything is an integer below 2^53: float64 is exact, and H·H = n·I leaves no tolerance.
    split, x = factor(n), torch.randint(-8, 9, (3, n)).double()
    dense = core(split.order).double() if split.order > 1 else None
    scale = float(1 << split.log2) ** 0.5

    def whole(x: torch.Tensor) -> torch.Tensor:
        return (ops.hadamard(x, dense) * scale).round()

    unit = torch.zeros(1, n, dtype=torch.float64)
    unit[0, n // 3] = 1
    assert whole(unit).abs().eq(1).all()
    assert torch.equal(whole(whole(x)), n * x)


@given(st.integers(1, 60), st.integers(0, 9))
def test_the_smallest_core_is_taken(odd: int, log2: int) -> None:
    n = (2 * odd + 1) << log2
    split = factor(n)
    cores = [k for k in ORDERS if n % k == 0 and (n // k).bit_count() == 1]
    odd_part = n >> ((n & -n).bit_length() - 1)
    assert split.order == (min(cores) if cores else odd_part) and split.order << split.log2 == n
    assert split.kind == ("hadamard" if cores else "hartley")


def test_what_has_no_matrix_says_so() -> None:
    with pytest.raises(ValueError, match="no matrix has 0 rows"):
        factor(0)
    with pytest.raises(ValueError, match="no Hadamard matrix of order 188 is known here"):
        core(188)
    assert core_signs(18) is None and core_signs(260) is None


def test_a_wrong_matrix_is_found_out() -> None:
    rows = [list(row) for row in core_signs(12) or ()]
    assert is_symmetric_hadamard(rows)
    rows[3][3] = -rows[3][3]
    assert not is_symmetric_hadamard(rows)
    assert not is_symmetric_hadamard([[1, 1], [-1, 1]])  # a Hadamard matrix, not symmetric
    assert not is_symmetric_hadamard([[1, 1], [1, 0]])


@pytest.mark.parametrize("v", PROPUS)
def test_propus_sequences_cancel(v: int) -> None:
    a, b, d = (torch.tensor([1.0 if s == "+" else -1.0 for s in row]) for row in PROPUS[v])
    correlation = [sum(w * (s * s.roll(j)).sum() for w, s in ((1, a), (2, b), (1, d))) for j in range(v)]
    assert correlation == [4 * v] + [0] * (v - 1)
    assert torch.equal(a, a.flip(0).roll(1))


@pytest.mark.parametrize("q", [3, 5, 9, 25, 27, 49, 81, 121, 125, 243])
def test_quadratic_character(q: int) -> None:
    p, _ = prime_power(q) or (0, 0)
    character = quadratic_character(q)
    assert character[0] == 0 and character[1] == 1 and sum(character) == 0
    shifted = [sum(character[a] * character[add(a, b, p)] for a in range(q)) for b in range(1, q)]
    assert set(shifted) == {-1}  # Jacobsthal's sum, which is what makes Paley's matrices orthogonal


def test_fields_that_are_none() -> None:
    assert prime_power(1) is None and prime_power(45) is None and prime_power(32) == (2, 5)
    for q in (8, 15):
        with pytest.raises(ValueError, match=f"{q} is not a power of an odd prime"):
            quadratic_character(q)


def test_signs_are_the_same_everywhere() -> None:
    assert "".join("+-"[s < 0] for s in random_signs(40, 0)) == "--++-+-++-++---+--+--+-+-++----++-+----+"
    many = random_signs(10_000, 7)
    assert abs(sum(many)) < 400 and many[:300] == random_signs(300, 7) and many[:300] != random_signs(300, 8)
