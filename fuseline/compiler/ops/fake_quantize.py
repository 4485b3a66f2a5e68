"""fuseline::fake_quantize: a weight as codes with a learned range stand for it, with gradients for both."""

from __future__ import annotations

import math

import torch

from ..formats import FORMATS
from ..formats.learned import Learned, learned
from ..formats.quotient import quotient
from ._define import Kind, op


def rule_of(format: str) -> Learned:
    """How the range of this format is learned; callers refuse formats that have no such rule."""
    found = learned(FORMATS[format].element)
    assert found is not None, format
    return found


def learned_codes(x: torch.Tensor, range: torch.Tensor, format: str, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the format [..., n / group, group] and stored scales [..., n / group] for x and its ranges.

    Scales are of x's type where that is bfloat16, else float32.
    """
    stored = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    scale = rule_of(format).scale(range, stored)
    groups = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, group))
    numbers = FORMATS[format].element.nearest(groups / scale.to(groups.dtype).unsqueeze(-1))
    return numbers, scale


@op("fake_quantize(Tensor x, Tensor range, str format, int group) -> Tensor", kind=Kind.OTHER)
def fake_quantize(x: torch.Tensor, range: torch.Tensor, format: str, group: int) -> torch.Tensor:
    """x: [..., n], group divides n; range: float32 [..., n / group] → [..., n] in x's dtype.

    What `fuseline::decode` gives for the codes of x at the scales that the ranges stand for (`formats/learned.py`,
    which has the gradients and their sources). format: a name of `formats.FORMATS`.
    """
    numbers, scale = learned_codes(x, range, format, group)
    return (numbers.to(torch.float32) * scale.to(torch.float32).unsqueeze(-1)).to(x.dtype).flatten(-2)


@fake_quantize.fake
def _(x, range, format, group):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@op(
    "fake_quantize_backward(Tensor grad, Tensor x, Tensor range, str format, int group) -> (Tensor, Tensor)",
    kind=Kind.OTHER,
)
def fake_quantize_backward(
    grad: torch.Tensor, x: torch.Tensor, range: torch.Tensor, format: str, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x, in its dtype, and of its ranges, float32, for that of `fake_quantize`'s result."""
    rule = rule_of(format)
    numbers, scale = learned_codes(x, range, format, group)
    groups = x.to(numbers.dtype).unflatten(-1, (-1, group))
    grads = grad.to(numbers.dtype).unflatten(-1, (-1, group))
    ratio = groups / (scale.to(numbers.dtype).unsqueeze(-1) * rule.unit)
    passes = (ratio >= rule.low) & (ratio <= rule.high)
    along = quotient(numbers, rule.unit)
    if rule.follows:
        ends = torch.where(ratio < rule.low, rule.below, rule.above).to(ratio.dtype)
        along = torch.where(passes, along - ratio, ends)
    factor = 1 / math.sqrt(x.numel() * rule.top)
    of_range = (grads * along).sum(-1) * factor
    return torch.where(passes, grads, torch.zeros_like(grads)).to(x.dtype).flatten(-2), of_range.to(range.dtype)


@fake_quantize_backward.fake
def _(grad, x, range, format, group):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(range)


@fake_quantize.backward
def _(ctx, grad):
    x, range = ctx.saved_tensors
    of_x, of_range = fake_quantize_backward(grad.contiguous(), x, range, *(value for _, value in ctx.layout[2:]))
    return of_x, of_range, None, None
