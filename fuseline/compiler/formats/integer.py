"""Integers of 2 to 8 bits, with or without a zero point: `int8` … `int2`.

Without one, codes are −2^(b−1) … 2^(b−1) − 1 and the positive end reaches the largest magnitude: scale = max|w| /
(2^(b−1) − 1). With one, codes are 0 … 2^b − 1 over the range with 0 in it, h − l: scale = (h − l) / (2^b − 1), zero =
round(−l / scale). Source: Jacob et al., 2018, section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .element import Element
from .scales import Scales


@dataclass(frozen=True)
class Integer(Element):
    """Stored as int8 (8 bits, no zero point), or else as uint8: with a zero point as they are, without q + 2^(b−1)."""

    bits: int
    symmetric: bool = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"int{self.bits}"

    @property
    def stored(self) -> torch.dtype:
        return torch.int8 if self.symmetric and self.bits == 8 else torch.uint8

    @property
    def ends(self) -> tuple[int, int]:
        """The least and the largest code."""
        return (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1) if self.symmetric else (0, 2**self.bits - 1)

    @property
    def top(self) -> float:  # type: ignore[override]
        return self.ends[1]

    def fit(
        self, groups: torch.Tensor, part: float | torch.Tensor, scales: Scales
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.symmetric:
            return super().fit(groups, part, scales)
        low = part * groups.amin(-1, keepdim=True).clamp(max=0)
        high = part * groups.amax(-1, keepdim=True).clamp(min=0)
        scale = scales.nearest(high - low, self.top)
        return scale, torch.round(-low / scale).clamp(0, self.top)

    def loss(self, error: torch.Tensor) -> torch.Tensor:
        """The power 2.5, which a root gives cheaply and is near QuaRot's and llm-compressor's 2.4. Squares clip the
        large weights of a group with a zero point so much that whole ranges can cost less (docs/quantization.md)."""
        return error.abs().sqrt_().mul_(error.square_())

    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        return torch.round(scaled).clamp_(*self.ends)

    def codes(self, numbers: torch.Tensor) -> torch.Tensor:
        return (torch.nan_to_num(numbers) + self._offset).to(self.stored)

    def numbers(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return codes.to(dtype) - self._offset

    @property
    def _offset(self) -> int:
        return 2 ** (self.bits - 1) if self.symmetric and self.bits < 8 else 0
