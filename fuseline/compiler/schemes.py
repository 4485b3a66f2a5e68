"""Quantization schemes and their text form: `int8`, `int4:g64`, `int4:g64:sym:mse`, `int4:token:asym`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .clipping import Range, least_error
from .errors import UserError, nearest
from .ops import pack_nibbles

_STORED = {"int8": 8, "int4": 4}
_COMPUTED = {f"int{bits}": bits for bits in range(8, 1, -1)}


@dataclass(frozen=True)
class Scheme:
    """Integer quantization of a tensor whose last dimension is split in groups.

    bits: 8 or 4 for weights, 8 to 2 for values that are quantized at run time; group: channels that share a scale (0:
    the whole last dimension, "channel" for weights and "token" for activations); symmetric: without a zero point; mse:
    a weight's range is narrowed to what costs the least squared error.
    """

    bits: int
    group: int = 0
    symmetric: bool = True
    mse: bool = False

    @staticmethod
    def parse(text: str, *, weights: bool) -> Scheme:
        """Reads `FORMAT[:gN|:channel|:token][:sym|:asym][:mse]`; 4-bit weights are asymmetric unless `sym` is given.

        Raises:
            UserError: an unknown part, or one that weights have and activations do not.
        """
        word, *rest = text.split(":")
        formats = _STORED if weights else _COMPUTED
        if word not in formats:
            raise UserError(f"unknown number format '{word}' in '{text}'{nearest(word, formats)}")
        bits, group = formats[word], 0
        symmetric, mse = not (weights and bits == 4), False
        whole = "channel" if weights else "token"
        for part in rest:
            if part in ("sym", "asym"):
                symmetric = part == "sym"
            elif part == whole:
                group = 0
            elif part[:1] == "g" and part[1:].isdigit() and int(part[1:]) > 0:
                group = int(part[1:])
            elif part == "mse" and weights:
                mse = True
            else:
                known = ("sym", "asym", whole, "g64", *(("mse",) if weights else ()))
                raise UserError(f"unknown part '{part}' in '{text}'{nearest(part, known)}")
        return Scheme(bits, group, symmetric, mse)

    def __str__(self) -> str:
        symmetry = "sym" if self.symmetric else "asym"
        group, mse = [f"g{self.group}"] if self.group else [], ["mse"] if self.mse else []
        return ":".join([f"int{self.bits}", *group, symmetry, *mse])

    def group_of(self, channels: int) -> int:
        """The group size for a last dimension of `channels`."""
        return self.group or channels

    def refuse(self, channels: int) -> str | None:
        """Why a weight's dimension of `channels` cannot be quantized so, or None."""
        reason = self.refuse_group(channels)
        if reason:
            return reason
        if self.bits == 4 and self.group_of(channels) % 2:
            return f"two 4-bit codes share a byte, and a group of {self.group_of(channels)} is odd"
        return None

    def refuse_group(self, channels: int) -> str | None:
        """Why a dimension of `channels` is no number of groups, or None."""
        if not self.group or channels % self.group == 0:
            return None
        near = self.fitting(channels)
        names = f" ({', '.join(map(str, sorted(near)))} would)" if near else ""
        return f"group size {self.group} does not divide {channels}{names}"

    def fitting(self, channels: int, count: int = 5) -> list[int]:
        """Group sizes that divide `channels`, multiples of 16, the nearest to this scheme's first."""
        dividing = [g for g in range(16, channels // 2 + 1, 16) if channels % g == 0]
        return sorted(dividing, key=lambda g: abs(g - self.group))[:count]

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Round to nearest. weight: [..., n] → codes, scale [..., n/group] and, when asymmetric, zero (uint8).

        Computed in float32 at least, the scale rounded to its stored type first so that codes fit what will be
        multiplied back. Symmetric: scale = max|w| / (2^(b−1) − 1) over the codes' positive end for 8 bits;
        for 4 bits max|w| / 7 with codes −8…7. Asymmetric: scale = (max(w, 0) − min(w, 0)) / (2^b − 1).
        """
        groups, grid = self.grid(weight)
        scale, zero = grid.of(groups, self.narrowed(weight))
        return self.stored(grid.codes(groups, scale, zero), scale, zero)

    def stored(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> dict[str, torch.Tensor]:
        """Codes [..., n/group, group], scale and zero [..., n/group, 1] as numbers → what `quantize` returns."""
        if self.symmetric:
            codes = (codes + 8).to(torch.uint8) if self.bits == 4 else codes.to(torch.int8)
            return {"codes": codes.flatten(-2), "scale": scale.squeeze(-1)}
        return {
            "codes": codes.to(torch.uint8).flatten(-2),
            "scale": scale.squeeze(-1),
            "zero": zero.to(torch.uint8).squeeze(-1),
        }

    def narrowed(self, weight: torch.Tensor) -> torch.Tensor | float:
        """The part of each group's range that costs the least, [..., n/group, 1]; 1 without `mse`."""
        return least_error(*self.grid(weight)) if self.mse else 1.0

    def rounded(self, weight: torch.Tensor, part: torch.Tensor | float) -> torch.Tensor:
        """The weight [..., n] as its codes stand for it, for `part` of each group's range."""
        groups, grid = self.grid(weight)
        scale, zero = grid.of(groups, part)
        return ((grid.codes(groups, scale, zero) - zero) * scale.to(groups.dtype)).flatten(-2).to(weight.dtype)

    def grid(self, weight: torch.Tensor) -> tuple[torch.Tensor, Range]:
        """The weight in groups, and their grid."""
        compute = torch.promote_types(weight.dtype, torch.float32)
        groups = weight.to(compute).unflatten(-1, (-1, self.group_of(weight.shape[-1])))
        # float16 has too little range for scales: that of a small weight would be subnormal and lose its precision.
        stored = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
        return groups, Range(self.bits, self.symmetric, stored)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [..., n] in the layout that `fuseline::dequantize` reads."""
        return pack_nibbles(codes, self.group_of(codes.shape[-1])) if self.bits == 4 else codes

    def bytes_per_weight(self, channels: int, scale_bytes: int = 4) -> float:
        """Stored bytes a weight, scales and zero points included."""
        per_group = scale_bytes + (0 if self.symmetric else 1)
        return self.bits / 8 + per_group / self.group_of(channels)
