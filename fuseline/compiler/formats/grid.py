"""What a group's elements are rounded to, for methods that choose codes themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .element import Element
from .scales import Scales


@dataclass(frozen=True)
class Grid:
    """An element's numbers, stretched by scales that can be stored. All are of the groups' type."""

    element: Element
    scales: Scales

    def of(self, groups: torch.Tensor, part: float | torch.Tensor = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point, [..., 1], for `part` of the range of groups [..., g]."""
        return self.element.fit(groups, part, self.scales)

    def codes(self, groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """The nearest of the element's numbers: ŵ = (number − zero)·scale."""
        return self.element.nearest(groups / scale + zero)

    def fitted(
        self, groups: torch.Tensor, codes: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The scale with the least Σ(w − ŵ)² for these numbers, the one there is where they say nothing of it; then the
        zero point for that scale, rounded."""
        signed = codes - zero
        along, size = (signed * groups).sum(-1, keepdim=True), signed.square().sum(-1, keepdim=True)
        tiny = torch.finfo(size.dtype).tiny
        scale = torch.where(along > 0, self.scales.nearest(along / size.clamp(min=tiny), 1.0), scale)
        if not self.element.symmetric:
            zero = (codes - groups / scale).mean(-1, keepdim=True).round().clamp(0, self.element.top)
        return scale, zero
