"""fuseline::quantize: dynamic symmetric integer quantization of activations, one scale a group of channels."""

from __future__ import annotations

import torch

from ..formats.quotient import quotient
from ._define import Kind, op


@op("quantize(Tensor x, int bits, int group) -> (Tensor, Tensor)", kind=Kind.ROW)
def quantize(x: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x: [..., n], group divides n (group = n: one scale a token) → codes int8 [..., n], scale [..., n / group].

    scale = max|x| / (2^(bits−1) − 1) in float32 at least; codes = round(x / scale), half to even. A group of zeros
    has scale 1. Source: ZeroQuant (Yao et al., 2022), section 3.
    """
    top = 2 ** (bits - 1) - 1
    compute = torch.promote_types(x.dtype, torch.float32)
    groups = x.to(compute).unflatten(-1, (-1, group))
    largest = groups.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, quotient(largest, top), torch.ones_like(largest))
    codes = torch.round(groups / scale).clamp(-top, top).to(torch.int8)
    return codes.flatten(-2), scale.squeeze(-1)


@quantize.fake
def _(x, bits, group):
    compute = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], x.shape[-1] // group), dtype=compute)


quantize.lowers_to("codegen/emitter.py")
