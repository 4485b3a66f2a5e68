"""The weight expression of codes with low-rank compensation: MiLo (Huang et al., MLSys 2025), section 3.

Minimises ‖W − Q(W − U·V) − U·V‖: in turn Q by half-quadratic splitting, and U·V from the largest singular values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .expert_expressions import is_real
from .expressions import GRAMMAR, Lookup, Quantize
from .half_quadratic import half_quadratic
from .schemes import Scheme

EXTRA, TURNS = 8, 3
"""Of the search for the largest singular values: dimensions more than are wanted, and steps towards them."""


@dataclass(frozen=True)
class Compensated(Quantize):
    """x [E, m, n] → codes, scale and zero of [E·m, n] as `Quantize` names them, and up [R, m] and down [R, n] in x's
    dtype, R the sum of `ranks`. turned: x is stored with its last two dimensions exchanged."""

    ranks: tuple[int, ...] = ()
    rounds: int = 10
    turned: bool = False

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        x = values[0].transpose(1, 2) if self.turned else values[0]
        if not is_real(x):
            matrix, total = x.new_empty(x.shape[0] * x.shape[1], x.shape[2]), sum(self.ranks)
            factors = {"up": x.new_empty(total, x.shape[1]), "down": x.new_empty(total, x.shape[2])}
            return self.scheme.quantize(matrix) | factors
        found: dict[str, list[torch.Tensor]] = {}
        for weight, rank in zip(x, self.ranks, strict=True):
            parts = compensated(weight, self.scheme, rank, self.rounds)
            for name, part in parts.items():
                found.setdefault(name, []).append(part)
        return {name: torch.cat(parts) for name, parts in found.items()}


def compensated(weight: torch.Tensor, scheme: Scheme, rank: int, rounds: int) -> dict[str, torch.Tensor]:
    """Codes and factors of one matrix [m, n]; of all rounds the one with the least squared error."""
    w = weight.to(torch.promote_types(weight.dtype, torch.float32))
    up, down = w.new_zeros(rank, w.shape[0]), w.new_zeros(rank, w.shape[1])
    best: dict[str, torch.Tensor] = {}
    least = float("inf")
    for _ in range(rounds if rank else 1):
        rest = w - up.t() @ down
        groups, grid = scheme.grid(rest)
        scale, zero = half_quadratic(groups, grid)
        codes = grid.codes(groups, scale, zero)
        rounded = ((codes - zero) * scale).flatten(-2).to(w.dtype)
        if rank:
            up, down = _low_rank(w - rounded, rank)
        error = float((w - rounded - up.t() @ down).square().sum())
        if error < least:
            least = error
            best = scheme.stored(rest, grid, codes, scale, zero)
            best |= {"up": up.to(weight.dtype), "down": down.to(weight.dtype)}
    return best


def _low_rank(x: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest matrix of this rank as upᵀ·down, the singular values shared between both (Eckart and Young, 1936).

    Of a large matrix in the space that a random one is drawn into, turned towards the largest singular values (Halko,
    Martinsson and Tropp, 2011, algorithm 4.4); the random numbers are the same each time.
    """
    wide = rank + EXTRA
    if min(x.shape) > 2 * wide:
        draw = torch.randn(x.shape[1], wide, generator=torch.Generator().manual_seed(rank))
        basis = torch.linalg.qr(x @ draw.to(x)).Q
        for _ in range(TURNS):
            basis = torch.linalg.qr(x @ torch.linalg.qr(x.t() @ basis).Q).Q
        inner, s, vh = torch.linalg.svd(basis.t() @ x, full_matrices=False)
        u = basis @ inner
    else:
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).t().contiguous(), (vh[:rank] * root[:, None]).contiguous()


GRAMMAR["compensated"] = Compensated
