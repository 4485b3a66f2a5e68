"""fuseline::staircase: values of the run on levels of equal steps, by thresholds that training has placed.

N2UQ (Liu et al., 2022): thresholds may lie anywhere, the levels are uniform, so that codes multiply as integers do. A
site's `steps` are one float32 vector: 2^b − 1 widths of the intervals, where the first begins, the factor of what comes
in and that of what goes out. In steps of i = 2 / (2^b − 1),

    y = factor·x,   code = #{k : y > begin + w_0 + … + w_(k−1) + w_k/2},   result = out·(i·code + begin)

N2UQ's levels begin at 0, behind learned biases and a ReLU; these begin where the intervals do, so that signed values
have levels on both sides. Backward (G-STE), the staircase counts as the line through the intervals' ends: of slope
i / w_k in the k-th, flat beyond the first and the last.
"""

from __future__ import annotations

import torch

from ._define import Kind, op

LEAST = 1e-3
"""The least width and factor."""
SPAN = 2.0


def placed(steps: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Thresholds [2^b − 1] of x, the step and the lowest level ([1] each) that `steps` stand for."""
    count = 2**bits - 1
    widths, (begin, factor, out) = steps[:count].clamp(min=LEAST), steps[count:].split(1)
    edges = (begin + widths.cumsum(0) - widths / 2) / factor.clamp(min=LEAST)
    return edges, out * (SPAN / count), out * begin


def begun(bits: int, largest: float, signed: bool) -> list[float]:
    """Steps to start from, of equal widths, for values up to this magnitude."""
    count, factor = 2**bits - 1, (SPAN / 2 if signed else SPAN) / max(largest, 1e-6)
    return [SPAN / count] * count + [-SPAN / 2 if signed else 0.0, factor, 1 / factor]


@op("staircase(Tensor x, Tensor edges, Tensor step, Tensor low) -> Tensor", kind=Kind.OTHER)
def staircase(x: torch.Tensor, edges: torch.Tensor, step: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """low + step·(how many of `edges` lie below x), in float32 at least, in x's dtype. edges: ascending [k]."""
    return (low + step * _codes(x, edges)).to(x.dtype)


def _codes(x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    code = torch.zeros_like(values)
    for edge in edges.to(values.dtype).unbind():
        code = code + (values > edge)
    return code


@staircase.fake
def _(x, edges, step, low):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@op("fake_staircase(Tensor x, Tensor steps, int bits) -> Tensor", kind=Kind.OTHER)
def fake_staircase(x: torch.Tensor, steps: torch.Tensor, bits: int) -> torch.Tensor:
    """What `staircase` gives for `steps` float32 [2^b + 2]; gradients of x and of the steps as above."""
    count = 2**bits - 1
    widths, (begin, factor, out) = steps[:count].clamp(min=LEAST), steps[count:].split(1)
    y = x.to(torch.promote_types(x.dtype, torch.float32)) * factor
    ends = begin + torch.cat((torch.zeros_like(begin), widths.cumsum(0)[:-1]))
    line = torch.zeros_like(y)
    for width, end in zip(widths.unbind(), ends.unbind(), strict=True):
        line = line + ((y - end) / width).clamp(0, 1)
    edges, step, low = (part.detach() for part in placed(steps, bits))
    code = _codes(x.detach(), edges)
    through = out * ((SPAN / count) * (code + line - line.detach()) + begin)
    return ((low + step * code).to(x.dtype).to(y.dtype) + (through - through.detach())).to(x.dtype)


@fake_staircase.fake
def _(x, steps, bits):
    return torch.empty_like(x, memory_format=torch.contiguous_format)
