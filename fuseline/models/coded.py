"""Linears over the codes that a checkpoint holds, as `fuseline::dequantize` and `fuseline::decode` read them.

A captured program has `linear(x, dequantize(codes, scale, zero))`, or `decode`, where such a module is called, as
`quantize` would have written it, so that codegen, the weight store and the other passes find what they know. Codes are
moved to another place in memory when they are loaded, and are never computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fuseline.compiler import ops
from fuseline.compiler.errors import UserError
from fuseline.compiler.schemes import KERNELS, Scheme


@dataclass(frozen=True)
class Codes:
    """A weight [out, in] in a number format.

    scheme: the format, the channels that share a scale, whether there are zero points. codes: [out, in], one in each
    element, as the format's element stores them (integers of less than 8 bits and those with zero points: uint8, from
    0). scale: [out, in / group], floating-point numbers or the block format's own. zero: uint8 of scale's shape, or
    None. outer: float32 [1], multiplied with the scales, or None. order: int64 [in], the input's channel that each
    column is multiplied with; None where that is its own.
    """

    scheme: Scheme
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    outer: torch.Tensor | None = None
    order: torch.Tensor | None = None

    @staticmethod
    def integers(
        bits: int,
        group: int,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None = None,
        order: torch.Tensor | None = None,
    ) -> Codes:
        """Of unsigned codes, uint8 from 0 to 2^bits − 1; without `zero` (uint8) they stand for code − 2^(bits − 1).

        group: 0 where a row shares a scale. Codes of one bit, and of four in odd groups, are kept as codes of 8 bits.
        """
        if bits == 1 or (bits == 4 and (group or codes.shape[1]) % 2):
            shift = 128 - (1 << (bits - 1))
            codes, zero, bits = codes + shift, None if zero is None else zero + shift, 8
        if bits == 8 and zero is None:
            codes = (codes ^ 128).view(torch.int8)
        return Codes(Scheme(f"int{bits}", group, zero is None), codes, scale, zero, None, order)


@dataclass(frozen=True)
class Rounding:
    """Of a linear's input, at run time.

    scheme: the format and the channels that share a scale (0: one a token, or with rows 0 one for all of the input).
    One that is `static` has its scale, and zero point, in the checkpoint.
    """

    scheme: Scheme

    def __call__(self, x: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None) -> torch.Tensor:
        scheme, n = self.scheme, x.shape[-1]
        group = scheme.group_of(n)
        if scheme.static:
            assert scale is not None
            codes = ops.encode_at(x, scale, zero, scheme.format)
            return ops.decode(codes, scale, zero, None, scheme.format, n, False, x.dtype)
        if scheme.of.affine and scheme.rows == 1:
            made = (ops.quantize if scheme.symmetric else ops.quantize_affine)(x, scheme.bits, group)
            codes, found, *zeros = made
            return ops.dequantize(codes, found, zeros[0] if zeros else None, 8, group, x.dtype)
        codes, found = ops.encode(x, scheme.format, group if scheme.rows else 0)
        return ops.decode(codes, found, None, None, scheme.format, group, False, x.dtype)


class StoredLinear(nn.Module):
    """A linear as a checkpoint has it, with the tensors' names there: what transformers loads into."""

    def __init__(self, like: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = like.in_features, like.out_features, like.bias
        self.dtype = like.weight.dtype

    def hold(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """A place for a tensor of the checkpoint."""
        empty = torch.empty(shape, dtype=dtype, device="meta")
        self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def finished(self, name: str) -> CodedLinear:
        """The linear to run, over the same codes; name: the module's, for messages."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("a StoredLinear is loaded, and then replaced by what it is `finished` as")


class CodedLinear(nn.Module):
    """y = x·Wᵀ + b, W expanded from codes where it is used.

    Buffers: codes, packed as `Scheme.pack` has them; scale, zero, outer and order of `Codes`; input_scale and
    input_zero [1] where the input is rounded by a range that the checkpoint has.
    """

    def __init__(
        self,
        made: Codes,
        bias: nn.Parameter | None,
        inputs: Rounding | None = None,
        input_scale: torch.Tensor | None = None,
        input_zero: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ):
        """dtype: of the expanded weight where nothing is multiplied with it; None: the scales'."""
        super().__init__()
        self.out_features, self.in_features = made.codes.shape
        self.scheme, self.inputs, self.bias = made.scheme, inputs, bias
        self.dtype = dtype or made.scale.dtype
        self.group = made.scheme.group_of(self.in_features)
        self.register_buffer("codes", made.scheme.pack(made.codes).contiguous())
        for name in ("scale", "zero", "outer", "order"):
            self.register_buffer(name, getattr(made, name))
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("input_zero", input_zero)

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.scheme.bits

    @property
    def weight(self) -> torch.Tensor:
        """The weight [out, in], expanded in `dtype`, its columns in the order of `order`."""
        return self.expanded(self.dtype)

    def expanded(self, dtype: torch.dtype) -> torch.Tensor:
        """The same in another dtype; what it is rounded to is the product of a code and a scale, never a scale."""
        if self.scheme.format in KERNELS:
            return ops.dequantize(self.codes, self.scale, self.zero, self.bits, self.group, dtype)
        return ops.decode(self.codes, self.scale, self.zero, self.outer, self.scheme.format, self.group, True, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.order is not None:
            x = x.index_select(-1, self.order)
        if self.inputs is not None:
            x = self.inputs(x, self.input_scale, self.input_zero)
        return nn.functional.linear(x, self.expanded(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, {self.scheme}"


def order_of(groups: torch.Tensor, size: int, name: str) -> torch.Tensor:
    """Channels sorted by their groups, each of which has `size`; groups: int64 [in].

    Raises:
        UserError: it is no division into groups of that size.
    """
    count = len(groups) // size
    inside = bool(((groups >= 0) & (groups < count)).all())
    if not inside or not (torch.bincount(groups, minlength=count) == size).all():
        raise UserError(
            f"'{name}' has groups that are not of {size} channels each",
            ["sorted by their groups, channels would not share scales in runs of one length"],
            "another copy of the checkpoint, or the model's original weights",
        )
    return torch.argsort(groups, stable=True)
