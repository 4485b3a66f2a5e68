"""Floating-point numbers of 3 to 8 bits: `e2m1` (`fp4`), `e3m2` (`fp6`), `e4m3` (`fp8`), `e5m2`, and any other ExMy.

A code is a sign, E bits of exponent and M of mantissa, with subnormal numbers: m·2^(1−c−M) for exponent 0, else
(1 + m/2^M)·2^(e−c), c = 2^(E−1) − 1. All codes are finite numbers, but for the two that are torch's own types: e4m3
ends at 448 (its last code is NaN), e5m2 at 57344 (its last exponent is infinity and NaN); they are stored in those
types. Rounding is to nearest, ties to even, and saturates.

The exponent's bias is a real number, one for each group, as in LLM-FP4 (Liu et al., 2023, section 3): numbers with bias
b are 2^(c−b) times those above, so that a group's real scale s holds its bias, b = c − log₂ s. By default s = max|w| /
top, which is LLM-FP4's b₀. `:mse` searches as LLM-FP4 does, over biases γ·b₀ with γ from 0.01 to 1.2 in 100 steps, for
the least error of the weight (there: of the layer's output). That search stands still where b₀ is near 0, so its steps
are never finer than those of |b₀| = 4: b = b₀ ± (γ − 1)·max(|b₀|, 4), with the sign of b₀.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from .element import Element

NATIVE = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_UNUSED = {"e4m3": 1, "e5m2": 4}  # the last codes of each sign, which are no numbers
LAYOUTS = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}
"""The integer of a type's width, the bits of its fraction, and its exponent's bias."""
STEADY = 4.0
"""The least |b₀| by which biases are varied."""


@dataclass(frozen=True)
class Float(Element):
    """exponent: E, 1 or more; mantissa: M. Stored in torch's type where it has one, else as uint8, the sign on top."""

    exponent: int
    mantissa: int

    @staticmethod
    def named(word: str) -> Float | None:
        """ExMy of 3 to 8 bits with E from 1 to 5."""
        found = re.fullmatch(r"e([1-5])m([0-6])", word)
        element = Float(int(found[1]), int(found[2])) if found else None
        return element if element and 3 <= element.bits <= 8 else None

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"e{self.exponent}m{self.mantissa}"

    @property
    def bits(self) -> int:  # type: ignore[override]
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        """c, the format's own bias."""
        return 2 ** (self.exponent - 1) - 1

    @property
    def last(self) -> int:
        """The code of the largest number."""
        return 2 ** (self.bits - 1) - 1 - _UNUSED.get(self.name, 0)

    @property
    def top(self) -> float:  # type: ignore[override]
        exponent, mantissa = divmod(self.last, 2**self.mantissa)
        if exponent == 0:
            return math.ldexp(mantissa, 1 - self.bias - self.mantissa)
        return math.ldexp(2**self.mantissa + mantissa, exponent - self.bias - self.mantissa)

    @property
    def stored(self) -> torch.dtype:
        return NATIVE.get(self.name, torch.uint8)

    def parts(self, reach: torch.Tensor) -> torch.Tensor:
        first = torch.frexp(self.top * 2.0**self.bias / reach)
        bias = first.exponent + torch.log2(
            first.mantissa
        )  # b₀ = log₂(top·2^c / reach), where the quotient is subnormal too
        gamma = 0.01 + (1.2 - 0.01) / 99 * torch.arange(100, dtype=reach.dtype, device=reach.device).view(-1, 1, 1)
        shift = (gamma - 1) * bias.abs().clamp(min=STEADY) * torch.where(bias < 0, -1.0, 1.0)
        return torch.exp2(-shift)

    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        if self.stored.is_floating_point and scaled.dtype == torch.float32:
            return scaled.clamp(-self.top, self.top).to(self.stored).to(scaled.dtype)
        if self.mantissa and scaled.dtype in LAYOUTS:
            return self._rounded_by_step(scaled)
        grid = self._magnitudes(scaled)
        found = grid[torch.bucketize(scaled.abs(), self._boundaries(grid)).clamp_(max=self.last)]
        return torch.where(scaled.isnan(), scaled, found.copysign(scaled))

    def _rounded_by_step(self, scaled: torch.Tensor) -> torch.Tensor:
        """To multiples of 2^(e − M), e the exponent of each number, by the bits that it has in memory.

        A multiple of even parity has an even code where there is a mantissa; ten times as fast as a search.
        """
        integer, fraction, offset = LAYOUTS[scaled.dtype]
        exponent = (scaled.abs().view(integer) >> fraction).clamp_(min=1 - self.bias + offset)
        step = (exponent.sub_(self.mantissa) << fraction).view(scaled.dtype)
        return (scaled / step).round_().mul_(step).clamp_(-self.top, self.top)

    def codes(self, numbers: torch.Tensor) -> torch.Tensor:
        numbers = torch.nan_to_num(numbers, nan=0.0)
        if self.stored.is_floating_point:
            return numbers.to(self.stored)
        magnitude = torch.bucketize(numbers.abs(), self._boundaries(self._magnitudes(numbers)))
        return (magnitude + (numbers.signbit().to(torch.int64) << self.bits - 1)).to(torch.uint8)

    def numbers(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if codes.dtype.is_floating_point:
            return codes.to(dtype)
        sign = codes >> self.bits - 1
        magnitude = self._magnitude(codes.to(torch.int32) & 2 ** (self.bits - 1) - 1)
        return torch.where(sign == 0, magnitude, -magnitude).to(dtype)

    def _magnitude(self, code: torch.Tensor) -> torch.Tensor:
        """The numbers of codes without a sign (int32), from the bits of a float32: a table would have to be copied."""
        exponent, mantissa = code >> self.mantissa, code & 2**self.mantissa - 1
        normal = ((exponent + 127 - self.bias << 23) | (mantissa << 23 - self.mantissa)).view(torch.float32)
        return torch.where(exponent == 0, mantissa * 2.0 ** (1 - self.bias - self.mantissa), normal)

    def _magnitudes(self, like: torch.Tensor) -> torch.Tensor:
        """All numbers that are not negative, in order."""
        return self._magnitude(torch.arange(self.last + 1, dtype=torch.int32, device=like.device)).to(like.dtype)

    @staticmethod
    def _boundaries(grid: torch.Tensor) -> torch.Tensor:
        """The largest number that rounds to each of the grid's but the last: half way, just below from an odd code."""
        middle = (grid[:-1] + grid[1:]) / 2
        odd = torch.arange(len(middle), device=grid.device) % 2 == 1
        return torch.where(odd, torch.nextafter(middle, torch.zeros_like(middle)), middle)
