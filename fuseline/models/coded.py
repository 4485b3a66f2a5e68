"""Linears over the codes that a checkpoint holds, as `fuseline::dequantize` reads them.

A captured program has `linear(x, dequantize(codes, scale, zero))` where such a module is called, as `quantize` would
have written it, so that codegen, the weight store and the other passes find what they know. Codes are moved to another
place in memory when they are loaded, and are never computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fuseline.compiler import ops
from fuseline.compiler.ops import pack_nibbles
from fuseline.models.packing import unpack_words


@dataclass(frozen=True)
class Layout:
    """How a checkpoint stores the weight [out, in] of a linear.

    packed: in words, or one code an int8; bits: of a code; group: channels that share a scale (0: all of a row, −1: the
    whole tensor); symmetric: without zero points.
    """

    packed: bool
    bits: int
    group: int
    symmetric: bool

    def scales(self, out: int, channels: int) -> tuple[int, ...]:
        """The shape of its scales."""
        return (1,) if self.group < 0 else (out, channels // (self.group or channels))


@dataclass(frozen=True)
class Rounding:
    """Of a linear's input, at run time; group: channels that share a scale (0: one a token)."""

    bits: int
    group: int
    symmetric: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        group = self.group or x.shape[-1]
        made = (ops.quantize if self.symmetric else ops.quantize_affine)(x, self.bits, group)
        codes, scale, *zero = made
        return ops.dequantize(codes, scale, zero[0] if zero else None, 8, group, x.dtype)


class StoredLinear(nn.Module):
    """A linear as the checkpoint has it, with the tensors' names there: what transformers loads into."""

    def __init__(self, like: nn.Linear, layout: Layout, inputs: Rounding | None):
        super().__init__()
        self.layout, self.inputs = layout, inputs
        self.in_features, self.out_features, self.bias = like.in_features, like.out_features, like.bias
        out, channels = like.out_features, like.in_features
        scales = layout.scales(out, channels)
        if layout.packed:
            self._hold("weight_packed", (out, -(-channels * layout.bits // 32)), torch.int32)
            self._hold("weight_shape", (2,), torch.int64)
        else:
            self._hold("weight", (out, channels), torch.int8)
        self._hold("weight_scale", scales, like.weight.dtype)
        if not layout.symmetric:
            rows = (-(-out * layout.bits // 32), *scales[1:]) if layout.packed and layout.group >= 0 else scales
            self._hold("weight_zero_point", rows, torch.int32 if rows != scales else torch.int8)

    def _hold(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        empty = torch.empty(shape, dtype=dtype, device="meta")
        self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def finished(self) -> CodedLinear:
        """The linear to run, over the same codes."""
        layout, out, channels = self.layout, self.out_features, self.in_features
        codes = unpack_words(self.weight_packed, layout.bits, channels) if layout.packed else self.weight
        scale, zero = self.weight_scale.detach(), None
        if not layout.symmetric:
            zero = self.weight_zero_point.detach()
            zero = unpack_words(zero, layout.bits, out, 0) if zero.dtype == torch.int32 else zero
        if layout.group < 0:  # the op has no scale of a whole tensor
            scale = scale.expand(out, 1).contiguous()
            zero = None if zero is None else zero.expand(out, 1).contiguous()
        return CodedLinear(codes.detach(), scale, zero, self.bias, layout, self.inputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("a StoredLinear is loaded, and then replaced by what it is `finished` as")


class CodedLinear(nn.Module):
    """y = x·Wᵀ + b, W expanded from codes where it is used.

    codes: as `fuseline::dequantize` has them, two to a byte where they have 4 bits and groups are even, else one.
    scale: [out, in / group]; zero: uint8, or None.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        bias: nn.Parameter | None,
        layout: Layout,
        inputs: Rounding | None,
    ):
        """codes, zero: signed, int8 [out, in] and of scale's shape."""
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.inputs, self.bias = inputs, bias
        self.group = max(layout.group, 0) or self.in_features
        self.bits = 4 if layout.bits == 4 and self.group % 2 == 0 else 8
        if self.bits == 4:
            codes = pack_nibbles((codes + 8).to(torch.uint8), self.group)
        elif zero is not None:
            codes = _unsigned(codes, 128)
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("zero", None if zero is None else _unsigned(zero, 8 if self.bits == 4 else 128))

    @property
    def weight(self) -> torch.Tensor:
        """The weight [out, in], expanded, in the scales' dtype."""
        return ops.dequantize(self.codes, self.scale, self.zero, self.bits, self.group, self.scale.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x if self.inputs is None else self.inputs(x), self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, {self.bits}-bit codes, group {self.group}"


def _unsigned(codes: torch.Tensor, offset: int) -> torch.Tensor:
    return (codes.to(torch.int16) + offset).to(torch.uint8)
