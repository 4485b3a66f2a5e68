"""How a group's scale is stored, and which scales that leaves.

`Real`          a floating-point number; any scale, rounded to the stored type.
`PowerOfTwo`    E8M0: an exponent in a byte. The scale is 2^(⌊log₂ reach⌋ − ⌊log₂ top⌋), so that a group's largest
                element lies in the format's last binade, and is clipped above `top`; twice that where it is nearer to
                the next binade than to `top`. Source: OCP Microscaling Formats (MX) specification 1.0, section 6.3,
                without that; torchao's and compressed-tensors' rounding of exponents, with it.
`TwoLevel`      E4M3 times one float32 for the whole tensor, max|w| / (448·top), which has the largest group use the end
                of E4M3's range. Source: NVFP4, as in NVIDIA's Transformer Engine and TensorRT model optimizer.

A group of zeros, or one whose scale underflows, has scale 1. A NaN or an infinity in a group makes its scale NaN, and
with it all that the group's codes stand for: no finite number could tell that something was wrong.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from .element import Element, linear_parts
from .quotient import quotient

E4M3_TOP = 448.0


def usable(scale: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """The scale, 1 where it is 0 and NaN where what it was `given` to reach is not finite."""
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.where(given.isfinite(), scale, torch.full_like(scale, math.nan))


class Scales(ABC):
    """Scales as numbers while codes are found (`nearest`), and as what is stored (`store`)."""

    @abstractmethod
    def nearest(self, reach: torch.Tensor, top: float) -> torch.Tensor:
        """The scales that can be stored for groups that reach so far, in reach's type."""

    @abstractmethod
    def store(self, scale: torch.Tensor) -> torch.Tensor:
        """Scales from `nearest` as they are stored."""

    def parts(self, element: Element, reach: torch.Tensor) -> torch.Tensor:
        """The parts of a range that make a difference for `:mse`."""
        return element.parts(reach)


@dataclass(frozen=True)
class Real(Scales):
    dtype: torch.dtype

    def nearest(self, reach: torch.Tensor, top: float) -> torch.Tensor:
        scale = quotient(reach, top).clamp(max=torch.finfo(self.dtype).max)
        return usable(scale.to(self.dtype).to(reach.dtype), reach)

    def store(self, scale: torch.Tensor) -> torch.Tensor:
        return scale.to(self.dtype)


def halfway(top: float) -> float:
    """Between a format's largest number and the next power of two, which counts as 1."""
    return (math.frexp(top)[0] + 1) / 2


class PowerOfTwo(Scales):
    def nearest(self, reach: torch.Tensor, top: float) -> torch.Tensor:
        part, exponent = torch.frexp(reach)
        exponent = exponent - math.frexp(top)[1] + (part >= halfway(top)).to(exponent.dtype)
        exponent = torch.where(reach == 0, torch.zeros_like(exponent), exponent).clamp(-127, 127)
        return usable(power_of_two(exponent + 127).to(reach.dtype), reach)

    def store(self, scale: torch.Tensor) -> torch.Tensor:
        exponent = torch.frexp(scale).exponent + 126
        return torch.where(scale.isfinite(), exponent, torch.full_like(exponent, 255)).to(torch.uint8)

    def parts(self, element: Element, reach: torch.Tensor) -> torch.Tensor:
        """The neighbouring exponents."""
        ones = torch.ones(1, 1, 1, dtype=reach.dtype, device=reach.device)
        return torch.cat((ones, 2 * ones, ones / 2))


@dataclass(frozen=True)
class TwoLevel(Scales):
    """outer: the float32 scale of all the groups at once, as `outer_scale` makes it; it broadcasts against scales."""

    outer: torch.Tensor

    def nearest(self, reach: torch.Tensor, top: float) -> torch.Tensor:
        outer = self.outer.to(reach.dtype)
        inner = (quotient(reach, top) / outer).clamp(max=E4M3_TOP).to(torch.float8_e4m3fn).to(reach.dtype)
        return usable(inner, reach) * outer

    def store(self, scale: torch.Tensor) -> torch.Tensor:
        return (scale / self.outer.to(scale.dtype)).to(torch.float8_e4m3fn)

    def parts(self, element: Element, reach: torch.Tensor) -> torch.Tensor:
        return linear_parts(reach)


def outer_scale(reach: torch.Tensor, top: float) -> torch.Tensor:
    """The scale of all groups that together reach so far, float32."""
    return usable(quotient(reach, top * E4M3_TOP).to(torch.float32), reach)


def power_of_two(stored: torch.Tensor) -> torch.Tensor:
    """2^(stored − 127) in float32, 255 being NaN: E8M0's number for its byte, from the bits of a float32."""
    bits = stored.to(torch.int32)
    normal = (bits << 23).view(torch.float32)
    scale = torch.where(bits == 0, torch.full_like(normal, 2.0**-127), normal)
    return torch.where(bits == 255, torch.full_like(normal, math.nan), scale)


def stretched(scale: torch.Tensor, outer: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Stored scales as numbers of `dtype`."""
    numbers = power_of_two(scale).to(dtype) if scale.dtype == torch.uint8 else scale.to(dtype)
    return numbers if outer is None else numbers * outer.to(dtype)
