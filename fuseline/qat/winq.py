"""WinQ: weights set back towards their rounded values every so often, and gradients taken at weights with noise.

    every K steps    w ← (1 − λ)·w + λ·Q(w)
    each forward     Q(w + σ·rms(w)·ε), ε standard normal, in training

Weights that training leaves far from the grid lie where the loss is flat and move little; set back, they are nearer to
where rounding changes. Source: WinQ (Li et al., 2026, arXiv 2605.17471), resets by interpolation and noise against
flatness; the defaults of K, λ and σ here are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..compiler.errors import UserError
from ..compiler.ops import fake_quantize, round_through
from ..passes.calibrated import Method
from .module import QuantizationAware, Rounded
from .wrapper import Wrapper


class WinQ(Wrapper):
    """Resets the rounded weights of `qat` after each `every` steps of `base`.

    Args:
        base: any optimizer of PyTorch's over `qat.parameters()`; its averages are kept at a reset.
        every: K, steps between resets.
        mix: λ, from 0 (nothing happens) to 1 (weights become their rounded values).
        noise: σ, sets `qat.noise`; 0 for none.
        until: no reset after this step, so that training ends undisturbed.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        qat: QuantizationAware,
        *,
        every: int = 100,
        mix: float = 0.5,
        noise: float = 0.0,
        until: int | None = None,
    ):
        super().__init__(base)
        if every < 1 or not 0 <= mix <= 1 or noise < 0:
            raise UserError(
                f"WinQ resets every {every} steps by {mix}, with noise {noise}", remedy="every=100, mix=0.5"
            )
        self.qat, self.every, self.mix, self.until = qat, every, mix, until
        self.weights = [(one, qat.editable(one)[1]) for one in qat.rounded if one.one.method is not Method.PARQ]
        if not self.weights:
            raise UserError(
                "WinQ has no rounded weights to reset",
                [f"the pipeline is {qat.pipeline}"],
                "prepare_qat(model, 'raise,quantize{weights=midrise2,method=paretoq}', example)",
            )
        qat.noise = noise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base, and a reset where one is due."""
        loss = self.base.step(closure)
        self.steps += 1
        if self.steps % self.every == 0 and (self.until is None or self.steps <= self.until):
            for rounded, weight in self.weights:
                weight.lerp_(rounded_weight(self.qat, rounded, weight), self.mix)
        return loss


def rounded_weight(qat: QuantizationAware, rounded: Rounded, weight: torch.Tensor) -> torch.Tensor:
    """Q(w) as the forward has it, for a weight [out, in]."""
    scheme = rounded.one.scheme
    made: torch.Tensor = (
        round_through(weight, str(scheme), True)
        if rounded.key is None
        else fake_quantize(weight, qat.range(rounded), scheme.format, scheme.group_of(weight.shape[-1]))
    )
    return made
