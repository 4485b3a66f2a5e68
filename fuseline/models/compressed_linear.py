"""A linear as compressed-tensors stores it, and the codes that its tensors stand for.

    weights                   tensors beside `weight_scale`
    integers, packed          weight_packed, int32 words; weight_shape; weight_zero_point, packed down the rows;
                              weight_g_idx [in], the group of each channel, where they are ordered by activation
    integers                  weight, int8; weight_zero_point, int8
    e4m3, mxfp8               weight, float8_e4m3fn
    mxfp4, nvfp4              weight_packed, uint8, the first of two codes in the low half; weight_global_scale, nvfp4's

Scales are [out, in / group], [1] for a whole tensor, [out / rows, in / group] for blocks; uint8 exponents for mxfp4 and
mxfp8, e4m3 for nvfp4, divided by its global scale. Where the input has fixed scales: input_scale, input_zero_point.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fuseline.compiler.formats import FORMATS
from fuseline.compiler.schemes import Scheme
from fuseline.models.coded import CodedLinear, Codes, Rounding, StoredLinear, order_of
from fuseline.models.packing import unpack_words

_SCALES = {"e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Layout:
    """How a checkpoint stores the weight [out, in] of a linear.

    packed: in words or bytes, or one code an element; bits: of a code; group: channels that share a scale (0: all of a
    row, −1: the whole tensor); symmetric: without zero points; number: a format of floating-point codes, or "" for
    integers; rows: that share a scale; ordered: channels have their groups in weight_g_idx.
    """

    packed: bool
    bits: int
    group: int
    symmetric: bool
    number: str = ""
    rows: int = 1
    ordered: bool = False

    @property
    def prescribed(self) -> int:
        """The group that the number format has; 0: any."""
        return FORMATS[self.number].group if self.number else 0

    def scales(self, out: int, channels: int) -> tuple[int, ...]:
        """The shape of its scales."""
        return (1,) if self.group < 0 else (-(-out // self.rows), channels // (self.group or channels))

    def scale_dtype(self, model: torch.dtype) -> torch.dtype:
        """The type of its scales; those of e4m3 codes are float32, which holds any that a file has."""
        scaling = FORMATS[self.number].scaling if self.number else "real"
        return _SCALES.get(scaling, torch.float32 if self.number else model)


class CompressedLinear(StoredLinear):
    """The tensors above, under their names."""

    def __init__(self, like: nn.Linear, layout: Layout, inputs: Rounding | None):
        super().__init__(like)
        self.layout, self.inputs = layout, inputs
        out, channels, bits = like.out_features, like.in_features, layout.bits
        scales = layout.scales(out, channels)
        if layout.number:
            whole = (out, channels // 2) if layout.packed else (out, channels)
            dtype = torch.uint8 if layout.packed else torch.float8_e4m3fn
            self.hold("weight_packed" if layout.packed else "weight", whole, dtype)
            if FORMATS[layout.number].scaling == "e4m3":
                self.hold("weight_global_scale", (1,), torch.float32)
        elif layout.packed:
            self.hold("weight_packed", (out, -(-channels * bits // 32)), torch.int32)
            self.hold("weight_shape", (2,), torch.int64)
        else:
            self.hold("weight", (out, channels), torch.int8)
        self.hold("weight_scale", scales, layout.scale_dtype(self.dtype))
        if not layout.symmetric:
            rows = (-(-out * bits // 32), *scales[1:]) if layout.packed and layout.group >= 0 else scales
            self.hold("weight_zero_point", rows, torch.int32 if rows != scales else torch.int8)
        if layout.ordered:
            self.hold("weight_g_idx", (channels,), torch.int32)
        if inputs is not None and inputs.scheme.static:
            self.hold("input_scale", (1,), torch.float32)
            if not inputs.scheme.symmetric:
                self.hold("input_zero_point", (1,), torch.int8)

    def finished(self, name: str) -> CodedLinear:
        made = self._floats() if self.layout.number else self._integers(name)
        scale = zero = None
        if self.inputs is not None and self.inputs.scheme.static:
            scale = self.input_scale.detach().reshape(1)
            zero = None if self.inputs.scheme.symmetric else _unsigned(self.input_zero_point.detach().reshape(1), 8)
        return CodedLinear(made, self.bias, self.inputs, scale, zero, self.dtype)

    def _integers(self, name: str) -> Codes:
        layout, out, channels = self.layout, self.out_features, self.in_features
        codes = unpack_words(self.weight_packed, layout.bits, channels) if layout.packed else self.weight
        codes, zero = _unsigned(codes.detach(), layout.bits), None
        if not layout.symmetric:
            zero = self.weight_zero_point.detach()
            zero = unpack_words(zero, layout.bits, out, 0) if zero.dtype == torch.int32 else zero
            zero = self._of_rows(_unsigned(zero, layout.bits))
        order = self._order(name) if layout.ordered else None
        codes = codes if order is None else codes[:, order].contiguous()
        return Codes.integers(
            layout.bits, max(layout.group, 0), codes, self._of_rows(self.weight_scale.detach()), zero, order
        )

    def _floats(self) -> Codes:
        layout = self.layout
        scale = self._of_rows(self.weight_scale.detach())
        scheme = Scheme(layout.number, max(layout.group, 0), rows=layout.rows if layout.group >= 0 else 0)
        if not layout.packed:
            return Codes(scheme, self.weight.detach(), scale)
        packed = self.weight_packed.detach()
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
        outer = 1 / self.weight_global_scale.detach().reshape(1) if hasattr(self, "weight_global_scale") else None
        return Codes(scheme, codes, scale, outer=outer)

    def _of_rows(self, part: torch.Tensor) -> torch.Tensor:
        """Scales, or zero points, as the op has them: of each row, [out, in / group]."""
        if self.layout.group < 0:
            return part.expand(self.out_features, 1).contiguous()
        return part.repeat_interleave(self.layout.rows, 0)[: self.out_features] if self.layout.rows > 1 else part

    def _order(self, name: str) -> torch.Tensor:
        """The channels sorted by their groups."""
        groups = self.weight_g_idx.detach().to(torch.int64)
        if groups.is_meta:
            return groups
        return order_of(groups, self.layout.group, f"{name}.weight_g_idx")


def _unsigned(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes as numbers from 0, uint8."""
    return (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
