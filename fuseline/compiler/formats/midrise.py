"""Mid-rise integers of 2 to 4 bits, half-way between whole numbers: `midrise2` is ±½ and ±1½ times its scale.

A grid of 2^b levels that is symmetric has no room for zero: −(2^(b−1) − ½), …, −½, ½, …, 2^(b−1) − ½. Integers with a
zero among them waste a level at one end, which of 4 levels is a quarter. Source: SEQ of ParetoQ (Liu et al., 2025,
section 3.2), where 2^(b−1) scales are the learned range α; the range of 2·mean|w| that is taken here without training
is StatsQ's (OFQ: Liu et al., 2023, section 4.1) and LLM-QAT's at 2 bits. `:mse` searches around it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .element import Zeroless, linear_parts
from .ternary import mean_magnitude


@dataclass(frozen=True)
class MidRise(Zeroless):
    """Stored as uint8: code k stands for k − 2^(b−1) + ½."""

    bits: int

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"midrise{self.bits}"

    @property
    def half(self) -> int:
        """Levels above zero."""
        return 2 ** (self.bits - 1)

    @property
    def top(self) -> float:  # type: ignore[override]
        return self.half - 0.5

    def reach(self, groups: torch.Tensor) -> torch.Tensor:
        mean = mean_magnitude(groups)
        reach = 2 * self.top / self.half * mean
        return torch.where(mean.isfinite(), reach.clamp(max=torch.finfo(reach.dtype).max), reach)

    def parts(self, reach: torch.Tensor) -> torch.Tensor:
        return linear_parts(reach, 2.0, 0.4)

    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        known = torch.nan_to_num(scaled, nan=0.0)  # of a group of zeros, 0 / 0
        return (torch.round(known - 0.5) + 0.5).clamp_(-self.top, self.top)

    def codes(self, numbers: torch.Tensor) -> torch.Tensor:
        return (torch.nan_to_num(numbers, nan=0.5) + self.top).to(torch.uint8)

    def numbers(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return codes.to(dtype) - self.top
