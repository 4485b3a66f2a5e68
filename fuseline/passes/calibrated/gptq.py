"""GPTQ: columns are rounded one after the other, and what each one lost is made up for by those still to come.

With H the second derivative of the squared error of the products, and U the upper Cholesky factor of H⁻¹ (UᵀU = H⁻¹):

    for each column i:   q = round(wᵢ),  e = (wᵢ − q) / Uᵢᵢ,  wⱼ −= e·Uᵢⱼ  for all j > i

Columns come in blocks, so that those beyond a block are changed by one product. A group's scale is found when its first
column is reached, from the columns as they are by then; `static` takes it from the weight as it was, and then columns
may be rounded in the order of how much their inputs vary (`order`) and still lie where they lay.

H is damped by a hundredth (`damp`) of its mean diagonal, more where that is not positive definite. A channel that was
zero throughout has no share in the products: its column is rounded to nearest, and makes up for nothing. A row that
rounding to nearest serves better, measured by eᵀ·H·e, keeps it: no row is worse. Source: GPTQ (Frantar et al., 2023),
algorithm 1; the orders and groups are those of its reference implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...compiler.schemes import Scheme

BLOCK = 128
ATTEMPTS = 5

Ranges = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Rounded:
    """parts: codes, scale and zero as `Scheme.quantize` returns them; matrix: what they stand for, [rows, n].

    nearest, found: each row's error eᵀ·H·e when rounded to nearest, and as chosen; damp: what H took.
    """

    parts: dict[str, torch.Tensor]
    matrix: torch.Tensor
    nearest: torch.Tensor
    found: torch.Tensor
    damp: float


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scheme: Scheme,
    damp: float = 0.01,
    static: bool = False,
    order: bool = False,
) -> Rounded:
    """Codes for a weight [rows, n] by its Hessian [n, n], float64.

    Raises:
        ArithmeticError: H is not positive definite even when it is damped by more than itself.
    """
    groups, grid = scheme.grid(weight)
    start, compute = groups.flatten(-2), groups.dtype
    rows, n = start.shape
    size = scheme.group_of(n)

    def ranges(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grid.of(columns, scheme.narrowed(columns.flatten(-2)))

    scale, zero = (part.clone() for part in ranges(groups))
    plain = grid.codes(groups, scale, zero)
    plain_scale, plain_zero = scale.clone(), zero.clone()
    columns = torch.arange(n, device=weight.device)
    if order:
        columns = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    upper, used = _factor(hessian[columns][:, columns], damp)
    upper = upper.to(compute)
    left = start[:, columns].clone()
    codes = torch.zeros_like(left)
    group_of = (columns // size).tolist()
    width = _block(size, n)
    for begin in range(0, n, width):
        end = min(begin + width, n)
        block, factor = left[:, begin:end], upper[begin:end, begin:end]
        errors = torch.zeros_like(block)
        for i in range(end - begin):
            group = group_of[begin + i]
            if not static and (begin + i) % size == 0 and begin + i:
                whole = left[:, begin + i : begin + i + size]  # up to date: a group ends in its block, or begins it
                scale[:, group : group + 1], zero[:, group : group + 1] = ranges(whole.unsqueeze(1))
            step, point = scale[:, group], zero[:, group]
            code = grid.codes(block[:, i : i + 1], step, point)
            codes[:, begin + i : begin + i + 1] = code
            error = (block[:, i : i + 1] - (code - point) * step.to(compute)) / factor[i, i]
            block[:, i + 1 :] -= error * factor[i, i + 1 :]
            errors[:, i : i + 1] = error
        left[:, end:] -= errors @ upper[begin:end, end:]
    back = torch.argsort(columns)
    chosen = codes[:, back].unflatten(-1, (-1, size))
    nearest = _error(start, plain, plain_scale, plain_zero, hessian)
    found = _error(start, chosen, scale, zero, hessian)
    keep = (nearest < found).view(-1, 1, 1)
    codes, scale, zero = (
        torch.where(keep, a, b) for a, b in ((plain, chosen), (plain_scale, scale), (plain_zero, zero))
    )
    matrix = ((codes - zero) * scale.to(compute)).flatten(-2).to(weight.dtype)
    return Rounded(
        scheme.stored(weight, grid, codes, scale, zero), matrix, nearest, torch.minimum(nearest, found), used
    )


def _block(group: int, channels: int) -> int:
    """Columns of a block: whole groups, or a part of one that ends where the group does."""
    if group <= BLOCK:
        return BLOCK // group * group
    return BLOCK if group >= channels or group % BLOCK == 0 else group


def _error(
    weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, hessian: torch.Tensor
) -> torch.Tensor:
    lost = weight - ((codes - zero) * scale.to(weight.dtype)).flatten(-2)
    return ((lost @ hessian.to(weight.dtype)) * lost).sum(-1).clamp(min=0)


def _factor(hessian: torch.Tensor, damp: float) -> tuple[torch.Tensor, float]:
    """U with UᵀU = (H + damp·mean(diag H)·1)⁻¹, and the damping that it took."""
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    alive = diagonal[~dead]
    mean = alive.mean() if len(alive) else diagonal.new_ones(())
    for attempt in range(ATTEMPTS):
        used = damp * 10**attempt
        damped = hessian + torch.diag(torch.where(dead, mean, used * mean))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper, used
    raise ArithmeticError(f"the Hessian is not positive definite, damped by {used:g} of its mean diagonal")
