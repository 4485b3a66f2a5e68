"""Ranges by half-quadratic splitting: no data, and robust to outliers among the weights.

Minimises Σ|w − ŵ|^p with p < 1 over a group's scale and zero point. The error is split into a sparse part e and the
rest: e = shrink(w − ŵ), then scale and zero point are fitted to w − e by least squares, and again. Errors are shrunk in
steps of the first grid, so that nothing depends on the weight's magnitude. Source: HQQ (Badri and Shaji, 2023), where
zero points are real numbers and only they are fitted; here they are codes, so the scale is fitted as well.
"""

from __future__ import annotations

import torch

from .formats import Grid

POWER, BETA, KAPPA, ITERATIONS = 0.7, 10.0, 1.01, 20


def half_quadratic(
    groups: torch.Tensor, grid: Grid, part: float | torch.Tensor = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point, [..., 1], for groups [..., g]; never a larger objective than where it starts.

    part: of each group's range, to start from.
    """
    scale, zero = grid.of(groups, part)
    best, step, beta = (scale, zero), scale.to(groups.dtype), BETA
    codes = grid.codes(groups, scale, zero)
    least = cost(groups, codes, scale, zero)
    for _ in range(ITERATIONS):
        error = (groups - (codes - zero) * scale.to(groups.dtype)) / step
        aim = groups - step * _shrink(error, beta)
        scale, zero = grid.fitted(aim, codes, zero, scale)
        codes = grid.codes(groups, scale, zero)
        found = cost(groups, codes, scale, zero)
        better = found < least
        least = torch.where(better, found, least)
        best = (torch.where(better, scale, best[0]), torch.where(better, zero, best[1]))
        beta *= KAPPA
    return best


def cost(groups: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Σ|w − ŵ|^p of each group, [..., 1]."""
    return (groups - (codes - zero) * scale.to(groups.dtype)).abs().pow(POWER).sum(-1, keepdim=True)


def _shrink(x: torch.Tensor, beta: float) -> torch.Tensor:
    """The generalised soft threshold of |x|^p: sign(x)·max(|x| − |x|^(p−1)/β, 0)."""
    size = x.abs()
    return x.sign() * (size - size.clamp(min=1e-8).pow(POWER - 1) / beta).clamp(min=0)
