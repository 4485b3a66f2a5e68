"""fuseline::dequantize: (codes − zero)·scale, from one or two codes a byte.

Four-bit codes are packed so that one group's bytes hold two contiguous runs of channels: byte j of a group of g holds
channel j in its low nibble and channel j + g/2 in its high one. A kernel then multiplies each half by a contiguous
piece of the activations.
"""

from __future__ import annotations

import torch

from ._define import Kind, op


@op(
    "dequantize(Tensor codes, Tensor scale, Tensor? zero, int bits, int group, ScalarType dtype) -> Tensor",
    kind=Kind.ROW,
)
def dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    group: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Codes → [..., n] in `dtype`, computed in scale's type (float32 at least).

    bits 8: codes int8 [..., n] (symmetric) or uint8 with `zero`. bits 4: codes uint8 [..., n/2], packed as above;
    without `zero` they stand for code − 8. scale: [..., n/group]; zero: uint8 of scale's shape.
    """
    if bits == 4:
        groups = unpack_nibbles(codes, group).unflatten(-1, (-1, group))
    else:
        groups = codes.unflatten(-1, (-1, group))
    compute = torch.promote_types(scale.dtype, torch.float32)
    values = groups.to(compute)
    if zero is not None:
        values = values - zero.to(compute).unsqueeze(-1)
    elif bits == 4:
        values = values - 8
    return (values * scale.to(compute).unsqueeze(-1)).to(dtype).flatten(-2)


@dequantize.fake
def _(codes, scale, zero, bits, group, dtype):
    n = codes.shape[-1] * (2 if bits == 4 else 1)
    return codes.new_empty((*codes.shape[:-1], n), dtype=dtype)


def pack_nibbles(codes: torch.Tensor, group: int) -> torch.Tensor:
    """Codes 0…15 as uint8 [..., n] → uint8 [..., n/2] in the layout above. `group` is even and divides n."""
    low, high = codes.unflatten(-1, (-1, group)).chunk(2, -1)
    return (low | (high << 4)).flatten(-2)


def unpack_nibbles(packed: torch.Tensor, group: int) -> torch.Tensor:
    """The inverse: uint8 [..., n]."""
    pairs = packed.unflatten(-1, (-1, group // 2))
    return torch.cat((pairs & 15, pairs >> 4), -1).flatten(-2)


dequantize.lowers_to("codegen/templates/linear.py")
