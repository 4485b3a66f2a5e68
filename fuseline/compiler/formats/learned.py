"""Ranges that training learns, ParetoQ's: what a range α says of an element's scale, and where gradients pass.

    weights                       range α₀          scale          gradient passes where
    int2 … int8   LSQ             max|w| / top      α              the code is not clipped
    midrise2 … 4  SEQ             max|w|            α / 2^(b−1)    |w| ≤ 0.99·α
    ternary       SEQ             max|w|            α / 1.5        |w| ≤ 0.99·α
    binary        elastic         mean|w|           α              |w| ≤ α

Of ŵ = scale·nearest(w / scale), the gradient of w is passed through there and is 0 elsewhere; that of α is
Σ g·(ŵ/α − w/α) over what passes and Σ g·ŵ/α over the rest (over all, for binary; of ternary ±1 in the place of ŵ/α =
±⅔), times 1/√(elements·top) with the elements of the whole weight, which keeps it in proportion to the weights' own.
Sources: LSQ (Esser et al., 2020); ParetoQ (Liu et al., 2025, sections 3.1 and 3.2), whose code has these numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .element import Element
from .integer import Integer
from .midrise import MidRise
from .quotient import quotient
from .ternary import Binary, Ternary, mean_magnitude

LEAST = 1e-8
"""A range that training drives below this counts as this; its gradient still passes."""
CLIP = 0.99


@dataclass(frozen=True)
class Learned:
    """How an element's range is learned.

    unit: α / scale. low, high: the ends of w/α within which gradients pass. top: of the gradient's factor. below,
    above: what stands for ŵ/α beyond those ends. follows: whether α's gradient takes off w/α within; else it is ŵ/α
    everywhere.
    """

    unit: float
    low: float
    high: float
    top: float
    below: float
    above: float
    follows: bool = True

    def scale(self, alpha: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
        """The scales of ranges, as they are stored."""
        return quotient(alpha.to(torch.float32).clamp(min=LEAST), self.unit).to(stored)


def learned(element: Element) -> Learned | None:
    """None for an element whose range no published method learns."""
    if isinstance(element, Integer) and element.symmetric:
        low, high = map(float, element.ends)
        return Learned(1.0, low, high, high, low, high)
    if isinstance(element, MidRise):
        end = element.top / element.half
        return Learned(float(element.half), -CLIP, CLIP, element.half - 1.0, -end, end)
    if isinstance(element, Ternary):
        return Learned(1.5, -CLIP, CLIP, 1.0, -1.0, 1.0)
    return Learned(1.0, -1.0, 1.0, 1.0, -1.0, 1.0, follows=False) if isinstance(element, Binary) else None


def initial_range(groups: torch.Tensor, element: Element) -> torch.Tensor:
    """α₀ of groups [..., g], [..., 1], in float32."""
    if isinstance(element, Binary):
        return mean_magnitude(groups).to(torch.float32)
    largest = groups.abs().amax(-1, keepdim=True)
    return (quotient(largest, element.top) if isinstance(element, Integer) else largest).to(torch.float32)
