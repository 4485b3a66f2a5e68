"""fuseline::quantize_affine: dynamic asymmetric integer quantization, one scale and zero point a group of channels."""

from __future__ import annotations

import torch

from ..formats.quotient import quotient
from ._define import Kind, op


@op("quantize_affine(Tensor x, int bits, int group) -> (Tensor, Tensor, Tensor)", kind=Kind.ROW)
def quantize_affine(x: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x: [..., n], group divides n → codes uint8 [..., n], scale [..., n / group], zero uint8 of scale's shape.

    Over each group's range with 0 in it, h − l: scale = (h − l) / (2^bits − 1) in float32 at least, 1 where the group
    is all zeros; zero = round(−l / scale); codes = round(x / scale) + zero, half to even. Source: LLM-QAT (Liu et al.,
    2023), section 3; KIVI (Liu et al., 2024), equation 1.
    """
    top = 2**bits - 1
    compute = torch.promote_types(x.dtype, torch.float32)
    groups = x.to(compute).unflatten(-1, (-1, group))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    step = quotient(high - low, top)
    scale = torch.where(step > 0, step, torch.ones_like(step))
    zero = torch.round(-low / scale).clamp(0, top)
    codes = (torch.round(groups / scale) + zero).clamp(0, top).to(torch.uint8)
    return codes.flatten(-2), scale.squeeze(-1), zero.to(torch.uint8).squeeze(-1)


@quantize_affine.fake
def _(x, bits, group):
    compute = torch.promote_types(x.dtype, torch.float32)
    shape = (*x.shape[:-1], x.shape[-1] // group)
    codes, zero = x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(shape, dtype=torch.uint8)
    return codes, x.new_empty(shape, dtype=compute), zero


quantize_affine.lowers_to("codegen/emitter.py")
