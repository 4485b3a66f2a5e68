"""fuseline::round_through: rounded as a scheme says, with the gradient passed straight through."""

from __future__ import annotations

import torch

from ._define import Kind, op
from .decode import decode
from .dequantize import dequantize
from .encode import encode
from .quantize import quantize
from .quantize_affine import quantize_affine


@op("round_through(Tensor x, str scheme, bool weights) -> Tensor", kind=Kind.OTHER)
def round_through(x: torch.Tensor, scheme: str, weights: bool) -> torch.Tensor:
    """x [..., n] → the same in x's dtype, as codes of `scheme` stand for it, ranges taken from x itself.

    weights: rounded as a weight is by `Scheme.quantize`, else as values of the run are by `fuseline::quantize`,
    `quantize_affine` or `encode`. The gradient of the result is x's (the straight-through estimator, Bengio et al.,
    2013): with `int4:sym` of weights, `int8` of activations, keys and values this is LLM-QAT (Liu et al., 2023).
    """
    from ..schemes import Scheme  # which needs ops

    chosen = Scheme.parse(scheme, weights=weights)
    group = chosen.group_of(x.shape[-1])
    if weights:
        parts = chosen.quantize(x)
        codes, scale = parts["codes"], parts["scale"]
        return decode.naive(codes, scale, parts.get("zero"), parts.get("outer"), chosen.format, group, False, x.dtype)
    if not chosen.of.affine or chosen.rows != 1:
        codes, scale = encode.naive(x, chosen.format, group if chosen.rows else 0)
        return decode.naive(codes, scale, None, None, chosen.format, group, False, x.dtype)
    parts = (quantize if chosen.symmetric else quantize_affine).naive(x, chosen.bits, group)
    zero = None if chosen.symmetric else parts[2]
    return dequantize.naive(parts[0], parts[1], zero, 8, group, x.dtype)


@round_through.fake
def _(x, scheme, weights):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@round_through.backward
def _(ctx, grad):
    return grad, None, None
