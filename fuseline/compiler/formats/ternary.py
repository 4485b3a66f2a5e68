"""Three and two levels: `ternary` (−1, 0, 1) and `binary` (−1, 1).

Ternary, absmean: scale = mean|w|, code = round(w / scale) clipped to ±1. Source: BitNet b1.58 (Ma et al., 2024, section
2). ParetoQ (Liu et al., 2025) starts its training from max|w| instead, which without training leaves most weights at
0; `:mse` takes the scale with the least error instead, up to twice the mean (normally distributed weights want 1.5).

Binary: scale = mean|w|, code = sign(w), 0 counting as positive: that scale has the least error. Source: XNOR-Net
(Rastegari et al., 2016, section 3.1); ParetoQ's elastic binarization starts there. A group of zeros has scale 0.

Five ternary codes share a byte, the first as the lowest digit of a number to base 3 (3⁵ = 243): 1.6 bits each, where 2
bits would read a quarter more, and weights of so few bits are kept for the bytes they save. Binary codes take one bit.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from .element import Element, Zeroless, linear_parts

DIGITS = 5


def mean_magnitude(groups: torch.Tensor) -> torch.Tensor:
    """mean|w| of groups [..., g], [..., 1]; a sum of large numbers before the division would overflow."""
    return (groups.abs() / groups.shape[-1]).sum(-1, keepdim=True)


class Ternary(Element):
    """Stored as uint8, code + 1."""

    name, bits, top = "ternary", 2, 1.0

    def reach(self, groups: torch.Tensor) -> torch.Tensor:
        return mean_magnitude(groups)

    def parts(self, reach: torch.Tensor) -> torch.Tensor:
        return linear_parts(reach, 2.0, 0.4)

    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        return torch.round(scaled).clamp_(-1, 1)

    def codes(self, numbers: torch.Tensor) -> torch.Tensor:
        return (torch.nan_to_num(numbers) + 1).to(torch.uint8)

    def numbers(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return codes.to(dtype) - 1

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        fives = pad(codes, (0, -codes.shape[-1] % DIGITS)).unflatten(-1, (-1, DIGITS))
        packed = torch.zeros_like(fives[..., 0])
        for digit in reversed(range(DIGITS)):
            packed = packed * 3 + fives[..., digit]
        return packed

    def unpack(self, packed: torch.Tensor, n: int) -> torch.Tensor:
        return torch.stack([packed // 3**digit % 3 for digit in range(DIGITS)], -1).flatten(-2)[..., :n]

    def packed_bytes(self, n: int) -> int:
        return -(-n // DIGITS)


class Binary(Zeroless):
    """Stored as uint8, 1 for +1."""

    name, bits, top = "binary", 1, 1.0

    def reach(self, groups: torch.Tensor) -> torch.Tensor:
        return mean_magnitude(groups)

    def parts(self, reach: torch.Tensor) -> torch.Tensor:
        return torch.ones(1, 1, 1, dtype=reach.dtype, device=reach.device)

    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        return torch.where(scaled < 0, -torch.ones_like(scaled), torch.ones_like(scaled))

    def codes(self, numbers: torch.Tensor) -> torch.Tensor:
        return (numbers > 0).to(torch.uint8)

    def numbers(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return codes.to(dtype) * 2 - 1
