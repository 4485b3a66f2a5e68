"""Two experts' matrices as codes of few bits: one magnitude, and a state that says who has it, and with which sign.

A pair of values that share a magnitude is in one of eight states, 3 bits:

    state    0    1    2    3    4    5    6    7
    first    +    −    0    0    +    +    −    −
    second   0    0    +    −    +    −    +    −

Magnitude 0 is zero for both, in state 0. So a pair takes 3 bits beside its magnitude, and no mask for zeros:

    fp8      7 bits of an E4M3 number, 10 bits a pair, 0.625 of two E4M3 numbers
    int4     1 … 7 in 3 bits, 6 bits a pair, 0.75 of two 4-bit integers

Magnitudes are rounded to the nearest code of their group's scale; those that round to zero are zero for both. A row of
codes is a plane of its low bits, then one of what is left: 8 and 2 bits for fp8, 6 for int4, each dense (`bits.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .bits import pack, unpack


@dataclass(frozen=True)
class PairCodes:
    """bits: of a magnitude; top: the largest magnitude, which a group's largest weight is scaled to."""

    bits: int
    top: float

    @property
    def planes(self) -> tuple[int, ...]:
        """Widths of the planes of a pair's code."""
        whole = self.bits + 3
        return (whole,) if whole <= 7 else (8, whole - 8)

    def row(self, n: int) -> int:
        """Bytes of n pairs."""
        return sum(-(-n * width // 8) for width in self.planes)

    def magnitudes(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest codes uint8 of magnitudes up to `top`, float32 [...]."""
        if self.bits == 3:
            return x.round().clamp(0, 7).to(torch.uint8)
        return x.to(torch.float8_e4m3fn).view(torch.uint8)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What magnitudes' codes stand for, float32."""
        return codes.float() if self.bits == 3 else codes.view(torch.float8_e4m3fn).float()

    def pack(self, codes: torch.Tensor, masks: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
        """Bytes [..., row(n)] of magnitudes' codes uint8 [..., n]; masks, signs: bool [2, ..., n]."""
        first, second = masks
        minus, other = signs.to(torch.int16)
        both = 4 + 2 * minus + other
        state = torch.where(first & second, both, torch.where(first, minus, 2 + other))
        has = (first | second) & (codes > 0)
        return self.planed(torch.where(has, codes.to(torch.int16) | state << self.bits, 0))

    def planed(self, whole: torch.Tensor) -> torch.Tensor:
        """Bytes [..., row(n)] of magnitudes' codes and states together, int16 [..., n], the states above."""
        planes, shift = [], 0
        for width in self.planes:
            plane = (whole >> shift & (1 << width) - 1).to(torch.uint8)
            planes.append(plane if width == 8 else pack(plane, width))
            shift += width
        return torch.cat(planes, -1)

    def whole(self, packed: torch.Tensor, n: int) -> torch.Tensor:
        """The inverse of `planed`."""
        whole = torch.zeros((*packed.shape[:-1], n), dtype=torch.int16, device=packed.device)
        start = shift = 0
        for width in self.planes:
            size = -(-n * width // 8)
            plane = packed[..., start : start + size]
            whole |= (plane if width == 8 else unpack(plane, width, n)).to(torch.int16) << shift
            start, shift = start + size, shift + width
        return whole

    def parts(self, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Magnitudes' codes uint8 [...], and the signs of both slots, int8 [2, ...]: −1, 0 or 1."""
        codes, state = whole & (1 << self.bits) - 1, whole >> self.bits
        first = torch.where(state >= 4, 1 - 2 * (state >> 1 & 1), torch.where(state < 2, 1 - 2 * state, 0))
        second = torch.where(state >= 2, 1 - 2 * (state & 1), 0)
        signs = torch.stack((first, second)) * (codes > 0)
        return codes.to(torch.uint8), signs.to(torch.int8)

    def unpack(self, packed: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The `parts` of n pairs in bytes."""
        return self.parts(self.whole(packed, n))

    def experts(
        self, whole: torch.Tensor, scale: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Matrices [E, m, n] in dtype of pairs int16 [R, m, n], scales [R, m, n / group] and each expert's place."""
        codes, signs = self.parts(whole)
        sizes = (self.values(codes).unflatten(-1, (scale.shape[-1], -1)) * scale.float().unsqueeze(-1)).flatten(-2)
        return (sizes[rows] * signs[slots.long(), rows.long()]).to(dtype)


PAIR_CODES = {"fp8": PairCodes(7, 448.0), "int4": PairCodes(3, 7.0)}
