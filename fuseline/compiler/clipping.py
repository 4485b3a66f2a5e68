"""The part of each group's range that costs the least error.

A range that is narrower than the weights clips the largest and rounds all others more finely. `least_error` tries the
whole range and the parts that a format names (integers: 80, down to a fifth) and keeps, group by group, the one with
the least Σ|ŵ − w|^p: squares, LLM-FP4's measure, for floating point, 2.5 for integers. Source of those: QuaRot's and
SpinQuant's clipped weights (Ashkboos et al., 2024; Liu et al., 2024), with the power 2.4.
"""

from __future__ import annotations

import torch

from .compat import is_real
from .formats import Grid

CHUNK = 1 << 16  # elements that are searched at once on a CPU, so that they stay in its cache
AT_ONCE = 1 << 25  # elements, times ranges, that are searched at once on a GPU, where each step costs a launch


def least_error(groups: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The best of the parts of the range, [..., 1], for each of groups [..., g]; 1 where none is better."""
    if not is_real(groups) or groups.is_meta:
        return torch.ones_like(groups[..., :1])  # the shape alone is asked for
    flat = groups.reshape(-1, groups.shape[-1])
    rows = max(1, CHUNK // flat.shape[-1]) if flat.device.type == "cpu" else max(1, len(flat))
    return torch.cat([_search(part, grid) for part in flat.split(rows)]).view(*groups.shape[:-1], 1)


def _search(groups: torch.Tensor, grid: Grid) -> torch.Tensor:
    at_once = 1 if groups.device.type == "cpu" else max(1, AT_ONCE // max(1, groups.numel()))
    parts = grid.scales.parts(grid.element, grid.element.reach(groups))
    best, kept = torch.full_like(groups[:, :1], torch.inf), torch.ones_like(groups[:, :1])
    for tried in (kept.unsqueeze(0), *parts.split(at_once)):
        rounded = grid.element.rounded(groups, *grid.of(groups, tried))
        error, which = grid.element.loss(rounded.sub_(groups)).sum(-1, keepdim=True).min(0)
        better = error < best
        chosen = tried.expand(-1, len(groups), 1).gather(0, which.unsqueeze(0)).squeeze(0)
        best, kept = torch.where(better, error, best), torch.where(better, chosen, kept)
    return kept
