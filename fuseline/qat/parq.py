"""PARQ: weights that the optimizer draws to the grid, a little more at each step.

    z ← base optimizer's step          with the gradient at p, the stored weight
    p ← clamp(c + (z − c) / ρ, q₋, q₊)    q₋ and q₊ the grid's numbers around z, c half-way between them

ρ falls from 1 (p is z) to 0 (p is the nearest number of the grid: the straight-through estimator) along a sigmoid. No
module is changed: the forward reads p. Source: PARQ (Jin et al., 2025); grids and their defaults as in its code,
torchao.prototype.parq: 2^b − 1 steps up to min(b·mean|z|, max|z|), ternary 1.1·mean|z|, binary mean|z|, for each row or
group, taken anew every few steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..compiler.errors import UserError
from ..compiler.formats import FORMATS, Element, Integer
from ..compiler.formats.ternary import Binary, Ternary, mean_magnitude
from ..compiler.ops.fake_quantize import rule_of
from ..passes.calibrated import Method
from .module import QuantizationAware
from .wrapper import Wrapper


@dataclass
class _Weight:
    """A parameter, its matrix [out, in] as a view, the latent matrix, and the ranges of its grid."""

    parameter: torch.nn.Parameter
    stored: torch.Tensor
    latent: torch.Tensor
    range: torch.Tensor
    format: str
    group: int


class PARQ(Wrapper):
    """Anneals the weights of `method=parq` onto their grid; at step `end` they lie on it.

        qat = fuseline.prepare_qat(model, "raise,quantize{weights=midrise2,method=parq}", example)
        optimizer = PARQ(torch.optim.AdamW(qat.parameters(), 1e-3), qat, start=100, end=900)

    Args:
        base: takes the steps; any optimizer of PyTorch's over `qat.parameters()`.
        start, end: the steps between which ρ goes from 1 to 0.
        steepness: of the sigmoid between them; near 0 it is a line.
        every: steps between two looks at the grid's ranges.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        qat: QuantizationAware,
        *,
        start: int,
        end: int,
        steepness: float = 10.0,
        every: int = 10,
    ):
        super().__init__(base)
        if not 0 <= start < end or steepness <= 0 or every < 1:
            raise UserError(
                f"PARQ anneals from step {start} to {end}, with steepness {steepness}, ranges every {every} steps",
                remedy="0 <= start < end, steepness above 0, every 1 or more",
            )
        self.start, self.end, self.steepness, self.every = start, end, steepness, every
        self.weights: list[_Weight] = []
        for rounded in qat.rounded:
            if rounded.one.method is Method.PARQ:
                parameter, view = qat.editable(rounded)
                group = rounded.one.scheme.group_of(view.shape[-1])
                self.weights.append(
                    _Weight(parameter, view, view.clone(), qat.range(rounded), rounded.one.scheme.format, group)
                )
        if not self.weights:
            raise UserError(
                "PARQ has no weights to draw to a grid",
                [f"the pipeline is {qat.pipeline}"],
                "prepare_qat(model, 'raise,quantize{weights=midrise2,method=parq}', example)",
            )

    @property
    def inverse_slope(self) -> float:
        """ρ after the steps that were taken."""
        if self.steps < self.start:
            return 1.0
        if self.steps >= self.end:
            return 0.0
        sigmoid = lambda part: 1 / (1 + math.exp(self.steepness * (part - 0.5)))
        first, last = sigmoid(0.0), sigmoid(1.0)
        return (sigmoid((self.steps - self.start) / (self.end - self.start)) - last) / (first - last)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base on the latent weights, then the stored ones from these."""
        loss = None
        if closure is not None:  # at the stored weights, before the latent ones take their place
            with torch.enable_grad():
                loss = closure()
        for weight in self.weights:
            weight.stored.copy_(weight.latent)
        self.base.step()
        refresh = self.steps % self.every == 0
        self.steps += 1
        rho = self.inverse_slope
        for weight in self.weights:
            weight.latent.copy_(weight.stored)
            if refresh:
                weight.range.copy_(_range(weight))
            if self.steps >= self.start:
                weight.stored.copy_(_drawn(weight, rho))
        return loss

    def own_state(self) -> dict[str, Any]:
        return {"latent": [weight.latent for weight in self.weights]}

    def load_own_state(self, state: dict[str, Any]) -> None:
        for weight, latent in zip(self.weights, state["latent"], strict=True):
            weight.latent.copy_(latent)


def _range(weight: _Weight) -> torch.Tensor:
    """The ranges [out, in / group] of a grid for the latent weight."""
    groups = weight.latent.float().unflatten(-1, (-1, weight.group))
    element, mean = FORMATS[weight.format].element, mean_magnitude(groups)
    if isinstance(element, Binary):
        scale = mean
    elif isinstance(element, Ternary):
        scale = 1.1 * mean
    else:
        scale = torch.minimum(element.bits * mean, groups.abs().amax(-1, keepdim=True)) / element.top
    return (scale * rule_of(weight.format).unit).squeeze(-1)


def _drawn(weight: _Weight, rho: float) -> torch.Tensor:
    """The stored weight for the latent one: the nearest numbers at ρ = 0."""
    short = torch.bfloat16 if weight.stored.dtype == torch.bfloat16 else torch.float32
    scale = rule_of(weight.format).scale(weight.range, short).float().unsqueeze(-1)
    element = FORMATS[weight.format].element
    scaled = weight.latent.float().unflatten(-1, (-1, weight.group)) / scale
    if rho == 0:
        numbers = element.nearest(scaled)
    else:
        low, high = _around(scaled, element)
        centre = (low + high) / 2
        numbers = torch.minimum(torch.maximum(centre + (scaled - centre) / rho, low), high)
    return (numbers * scale).flatten(-2)


def _around(scaled: torch.Tensor, element: Element) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers of a uniform grid below and above; twice the same beyond its ends."""
    step = 2.0 if isinstance(element, Binary) else 1.0
    least = float(element.ends[0]) if isinstance(element, Integer) else -element.top
    last = (element.top - least) / step
    place = torch.floor((scaled - least) / step)
    low, high = place.clamp(0, last), (place + 1).clamp(0, last)
    return least + step * low, least + step * high
