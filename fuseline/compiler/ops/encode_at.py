"""fuseline::encode_at: values of the run as codes of a number format, by a scale that was found before."""

from __future__ import annotations

import torch

from ..formats import FORMATS
from ._define import Kind, op


@op("encode_at(Tensor x, Tensor scale, Tensor? zero, str format) -> Tensor", kind=Kind.OTHER)
def encode_at(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, format: str) -> torch.Tensor:
    """x: [..., n] → codes [..., n], one in each element: the nearest numbers to x / scale + zero, clipped.

    format: a name of `formats.FORMATS`. scale: one number, floating-point, of shape [1]; zero: uint8 [1], for integers.
    What lies beyond the range that scale and zero span saturates; NaN has the code of 0. Codes are int8 for int8
    without a zero point, torch's own type for e4m3 and e5m2, and uint8 for others.
    """
    element = FORMATS[format].of(zero is None)
    compute = torch.promote_types(x.dtype, torch.float32)
    scaled = x.to(compute) / scale.to(compute)
    return element.codes(element.nearest(scaled if zero is None else scaled + zero.to(compute)))


@encode_at.fake
def _(x, scale, zero, format):
    return x.new_empty(x.shape, dtype=FORMATS[format].of(zero is None).stored)
