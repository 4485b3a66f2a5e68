"""Ranges of integer codes over groups of a weight, and the one that costs the least error.

A range that is narrower than the weights clips the largest and rounds all others more finely. `least_error` tries 80
ranges from the whole one down to a fifth of it and keeps, group by group, the one with the least Σ(ŵ − w)². Source:
QuaRot's and SpinQuant's clipped weights (Ashkboos et al., 2024; Liu et al., 2024), there with the power 2.4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .compat import is_real

STEPS, NARROWEST = 80, 0.2
CHUNK = 1 << 16  # elements that are searched at once on a CPU, so that they stay in its cache
AT_ONCE = 1 << 25  # elements, times ranges, that are searched at once on a GPU, where each step costs a launch


@dataclass(frozen=True)
class Range:
    """Codes of `bits` bits, with a zero point unless `symmetric`; scales are rounded to the type `stored`."""

    bits: int
    symmetric: bool
    stored: torch.dtype

    @property
    def ends(self) -> tuple[int, int]:
        """The least and the largest code."""
        return (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1) if self.symmetric else (0, 2**self.bits - 1)

    def of(self, groups: torch.Tensor, part: float | torch.Tensor = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point, [..., 1], for `part` (one, or [..., 1]) of the range of groups [..., g].

        A group of zeros has scale 1.
        """
        _, top = self.ends
        if self.symmetric:
            scale = self._stored(part * groups.abs().amax(-1, keepdim=True) / top)
            return scale, torch.zeros_like(scale)
        low = part * groups.amin(-1, keepdim=True).clamp(max=0)
        high = part * groups.amax(-1, keepdim=True).clamp(min=0)
        scale = self._stored((high - low) / top)
        return scale, torch.round(-low / scale.to(groups.dtype)).clamp(0, top)

    def codes(self, groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """The nearest codes, as numbers of the groups' type."""
        return torch.round(groups / scale.to(groups.dtype) + zero).clamp(*self.ends)

    def fitted(
        self, groups: torch.Tensor, codes: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The scale with the least Σ(w − ŵ)² for these codes, the one there is where they say nothing of it; then the
        zero point for that scale, rounded."""
        signed = codes - zero
        along, size = (signed * groups).sum(-1, keepdim=True), signed.square().sum(-1, keepdim=True)
        scale = torch.where(along > 0, self._stored(along / size.clamp(min=1)), scale)
        if not self.symmetric:
            zero = (codes - groups / scale.to(groups.dtype)).mean(-1, keepdim=True).round().clamp(*self.ends)
        return scale, zero

    def _stored(self, scale: torch.Tensor) -> torch.Tensor:
        """In the stored type, and 1 where a group is all zeros or its scale would underflow."""
        scale = scale.to(self.stored)
        return torch.where(scale > 0, scale, torch.ones_like(scale))


def least_error(groups: torch.Tensor, grid: Range) -> torch.Tensor:
    """The best of the parts of the range, [..., 1], for each of groups [..., g]."""
    if not is_real(groups) or groups.is_meta:
        return torch.ones_like(groups[..., :1])  # the shape alone is asked for
    flat = groups.reshape(-1, groups.shape[-1])
    rows = max(1, CHUNK // flat.shape[-1]) if flat.device.type == "cpu" else max(1, len(flat))
    return torch.cat([_search(part, grid) for part in flat.split(rows)]).view(*groups.shape[:-1], 1)


def _search(groups: torch.Tensor, grid: Range) -> torch.Tensor:
    at_once = 1 if groups.device.type == "cpu" else max(1, AT_ONCE // max(1, groups.numel()))
    parts = 1 - (1 - NARROWEST) / STEPS * torch.arange(STEPS, dtype=groups.dtype, device=groups.device)
    best, kept = torch.full_like(groups[:, :1], torch.inf), torch.ones_like(groups[:, :1])
    for tried in parts.view(-1, 1, 1).split(at_once):
        scale, zero = grid.of(groups, tried)
        scale = scale.to(groups.dtype)
        rounded = grid.codes(groups, scale, zero).sub_(zero).mul_(scale)
        error, which = rounded.sub_(groups).square_().sum(-1, keepdim=True).min(0)
        better = error < best
        best, kept = torch.where(better, error, best), torch.where(better, tried.view(-1)[which], kept)
    return kept
