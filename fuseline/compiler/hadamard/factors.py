"""How a size splits into a dense core and a power of two, and the core as a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .cores import ORDERS, core_signs


@dataclass(frozen=True)
class Factors:
    """n = order·2^log2: the matrix is core(order) ⊗ H_2 ⊗ … ⊗ H_2, the core outermost.

    order 1: there is no core. kind "hadamard": entries ±1/√n; "hartley": orthogonal, with a Hartley matrix as core.
    """

    order: int
    log2: int
    kind: Literal["hadamard", "hartley"]

    @property
    def n(self) -> int:
        return self.order << self.log2


def factor(n: int) -> Factors:
    """The smallest core with which a matrix of size n exists here; n ≥ 1.

    Hadamard cores of order at most 256 come first, then the Hartley matrix of n's odd part.
    """
    if n < 1:
        raise ValueError(f"no matrix has {n} rows")
    twos = (n & -n).bit_length() - 1
    odd = n >> twos
    if odd == 1:
        return Factors(1, twos, "hadamard")
    for order in ORDERS:
        if n % order == 0 and (n // order).bit_count() == 1:
            return Factors(order, (n // order).bit_length() - 1, "hadamard")
    return Factors(odd, twos, "hartley")


def core(order: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The core of this order, [order, order], symmetric.

    A Hadamard matrix: int8, entries ±1. A Hartley matrix (odd orders): float64, orthogonal, cas(2π·j·k/n)/√n with
    cas = cos + sin. Source: Bracewell, 1983, "Discrete Hartley transform".
    """
    signs = core_signs(order)
    if signs is not None:
        return torch.tensor(signs, dtype=torch.int8, device=device)
    if order % 2 == 0:
        raise ValueError(f"no Hadamard matrix of order {order} is known here")
    j = torch.arange(order, device=device)
    angle = torch.arange(order, dtype=torch.float64, device=device) * (2 * torch.pi / order)
    table = (angle.cos() + angle.sin()) * order**-0.5
    return table[(j[:, None] * j) % order]


def hadamard_matrix(n: int) -> torch.Tensor:
    """The whole orthogonal matrix, float64 [n, n], symmetric: for tests and for small n."""
    split = factor(n)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(split.log2):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    if split.order > 1:
        matrix = torch.kron(core(split.order).double(), matrix)
    return matrix * float(n if split.kind == "hadamard" else 1 << split.log2) ** -0.5
