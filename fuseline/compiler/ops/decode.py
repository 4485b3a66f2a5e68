"""fuseline::decode: what codes of any number format stand for.

`fuseline::dequantize` is the same for the integers of 8 and 4 bits that kernels read.
"""

from __future__ import annotations

import torch

from ..formats import FORMATS, stretched
from ._define import Kind, op


@op(
    "decode(Tensor codes, Tensor scale, Tensor? zero, Tensor? outer, str format, int group, bool packed, "
    "ScalarType dtype) -> Tensor",
    kind=Kind.ROW,
)
def decode(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    outer: torch.Tensor | None,
    format: str,
    group: int,
    packed: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(number of the code − zero)·scale → [..., n] in `dtype`, computed in float32 at least.

    format: a name of `formats.FORMATS`. codes: [..., n], one in each element, or `packed` as the format's element packs
    a row. scale: [..., n / group], or [1, …, 1] for all: floating-point numbers, or uint8 exponents, 2^(s − 127).
    zero: uint8 of scale's shape, for integers. outer: float32, multiplied with scale. Numbers beyond `dtype` saturate;
    a scale of NaN makes its group NaN.
    """
    form = FORMATS[format]
    element = form.of(zero is None)
    compute = torch.float64 if scale.dtype == torch.float64 else torch.float32
    n = scale.shape[-1] * group
    plain = element.unpack(codes, n) if packed else codes
    values = element.numbers(plain, compute).unflatten(-1, (-1, group))
    if zero is not None:
        values = values - zero.to(compute).unsqueeze(-1)
    most = min(torch.finfo(dtype).max, torch.finfo(compute).max)
    values = values * stretched(scale, outer, compute).unsqueeze(-1)
    return values.clamp(-most, most).to(dtype).flatten(-2)


@decode.fake
def _(codes, scale, zero, outer, format, group, packed, dtype):
    n = scale.shape[-1] * group if packed else codes.shape[-1]
    return codes.new_empty((*codes.shape[:-1], n), dtype=dtype)


decode.lowers_to("codegen/decode_rows.py")
