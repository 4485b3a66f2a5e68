"""Gradient descent over orthogonal matrices, by the Cayley transform.

    B = Xᵀ·G − Gᵀ·X        the skew-symmetric direction in which the loss grows, in the rotated basis
    X ← X·(I + B/2)⁻¹·(I − B/2)

keeps XᵀX as it is, whatever B. The direction is divided by its own running size, so that `rate` says how far a step
turns, in radians, on any loss. It is not averaged over steps: rounding gives a rough loss whose gradient soon points
elsewhere, and with momentum less was learned, at every rate. Sources: Wen and Yin (2013), a feasible method for
optimization with orthogonality constraints; Li et al. (2020), Cayley SGD.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class Cayley(torch.optim.Optimizer):
    """Turns orthogonal matrices [n, n], each by at most about 2·rate radians a step.

    Args:
        matrices: leaves in float32 or float64, orthogonal to begin with.
        rate: radians; a scheduler may change it.
        average: the share of what was that the average of the direction's square keeps.
    """

    def __init__(self, matrices: Iterable[torch.Tensor], rate: float, average: float = 0.99):
        super().__init__(matrices, {"lr": rate, "average": average})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._turn(matrix, matrix.grad, group["lr"], group["average"])

    def _turn(self, x: torch.Tensor, gradient: torch.Tensor, rate: float, average: float) -> None:
        product = x.mT @ gradient
        skew = (product - product.mT).double()  # in float32, orthogonality would be lost over many steps
        state = self.state[x]
        if not state:
            state.update(count=0, square=skew.new_zeros(()))
        state["count"] += 1
        state["square"].mul_(average).add_(skew.square().mean(), alpha=1 - average)
        size = (state["square"] / (1 - average ** state["count"])).sqrt()
        if not size > 0:
            return
        n = len(x)
        half = skew / size * (rate / n**0.5 / 2)
        eye = torch.eye(n, dtype=half.dtype, device=x.device)
        x.copy_(x.double() @ torch.linalg.solve(eye + half, eye - half))


def nearest_orthogonal(x: torch.Tensor) -> torch.Tensor:
    """The orthogonal matrix closest to x [n, n], in float64: U·Vᵀ of its singular value decomposition."""
    u, _, v = torch.linalg.svd(x.double())
    return u @ v
