"""What one code of a format can stand for, before a scale stretches it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from . import bits as dense

if TYPE_CHECKING:
    from .scales import Scales

STEPS, NARROWEST = 80, 0.2


def linear_parts(like: torch.Tensor, first: float = 1.0, last: float = NARROWEST) -> torch.Tensor:
    """80 parts of a range, [80, 1, 1], from `first` towards `last`."""
    steps = torch.arange(STEPS, dtype=like.dtype, device=like.device)
    return (first - (first - last) / STEPS * steps).view(-1, 1, 1)


class Element(ABC):
    """A finite set of numbers, their codes, and how codes lie in memory.

    name: as in a scheme's text. bits: of a code before it is packed. top: the largest number. symmetric: codes stand
    for numbers without a zero point.
    """

    name: str
    bits: int
    top: float
    symmetric: bool = True

    @property
    def stored(self) -> torch.dtype:
        """The type of codes that are not packed."""
        return torch.uint8

    def reach(self, groups: torch.Tensor) -> torch.Tensor:
        """What `top` shall stand for in each of groups [..., g]: the largest magnitude, [..., 1]."""
        return groups.abs().amax(-1, keepdim=True)

    def fit(
        self, groups: torch.Tensor, part: float | torch.Tensor, scales: Scales
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point, [..., 1] in the groups' type, for `part` (one, or [..., 1]) of each group's range."""
        scale = scales.nearest(part * self.reach(groups), self.top)
        return scale, torch.zeros_like(scale)

    def parts(self, reach: torch.Tensor) -> torch.Tensor:
        """The parts of a range that `:mse` tries beside the whole one: [steps, 1, 1], or [steps, rows, 1]."""
        return linear_parts(reach)

    def loss(self, error: torch.Tensor) -> torch.Tensor:
        """What errors count for in that search: their squares. `error` is overwritten."""
        return error.square_()

    def rounded(self, groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """The groups as their codes stand for them."""
        return self.nearest(groups / scale + zero).sub_(zero).mul_(scale)

    @abstractmethod
    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        """The nearest numbers of the set, a new tensor; what lies outside is clipped, ties go to the even code."""

    @abstractmethod
    def codes(self, numbers: torch.Tensor) -> torch.Tensor:
        """Numbers of the set as codes, one in each element of the result; NaN has the code of 0."""

    @abstractmethod
    def numbers(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What codes stand for, in float32 or float64."""

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [..., n] without unused bits, each row in whole bytes."""
        return codes if self.bits == 8 else dense.pack(codes, self.bits)

    def unpack(self, packed: torch.Tensor, n: int) -> torch.Tensor:
        """The inverse: codes [..., n]."""
        return packed if self.bits == 8 else dense.unpack(packed, self.bits, n)

    def packed_bytes(self, n: int) -> int:
        """Bytes of a packed row of n codes."""
        return -(-n * self.bits // 8)


class Zeroless(Element):
    """Numbers without a zero among them: a group of zeros has scale 0, so that it stays zero."""

    def fit(
        self, groups: torch.Tensor, part: float | torch.Tensor, scales: Scales
    ) -> tuple[torch.Tensor, torch.Tensor]:
        reach = part * self.reach(groups)
        scale = scales.nearest(reach, self.top)
        scale = torch.where(reach == 0, torch.zeros_like(scale), scale)
        return scale, torch.zeros_like(scale)
