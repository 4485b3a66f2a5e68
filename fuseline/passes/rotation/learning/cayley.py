"""Gradient descent over orthogonal matrices, by the Cayley transform.

    A = G·Xᵀ − X·Gᵀ        the skew-symmetric direction in which the loss grows
    X ← (I + A/2)⁻¹·(I − A/2)·X

keeps XᵀX as it is, whatever A. The direction is averaged over steps and divided by its own running size, as in Adam, so
that `rate` says how far a step turns, in radians, on any loss. Sources: Wen and Yin (2013), a feasible method for
optimization with orthogonality constraints; Li et al. (2020), Cayley SGD with momentum.
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
        averages: the shares of what was that the averages of the direction and of its square keep.
    """

    def __init__(self, matrices: Iterable[torch.Tensor], rate: float, averages: tuple[float, float] = (0.9, 0.99)):
        super().__init__(matrices, {"lr": rate, "averages": averages})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._turn(matrix, matrix.grad, group["lr"], group["averages"])

    def _turn(self, x: torch.Tensor, gradient: torch.Tensor, rate: float, averages: tuple[float, float]) -> None:
        product = gradient @ x.mT
        skew = product - product.mT
        state = self.state[x]
        if not state:
            state.update(count=0, mean=torch.zeros_like(x), square=x.new_zeros(()))
        first, second = averages
        state["count"] += 1
        state["mean"].mul_(first).add_(skew, alpha=1 - first)
        state["square"].mul_(second).add_(skew.square().mean(), alpha=1 - second)
        size = (state["square"] / (1 - second ** state["count"])).sqrt()
        if not size > 0:
            return
        n = len(x)
        direction = state["mean"] / (1 - first ** state["count"]) / size * (rate / n**0.5)
        eye = torch.eye(n, dtype=x.dtype, device=x.device)
        x.copy_(torch.linalg.solve(eye + direction / 2, (eye - direction / 2) @ x))


def nearest_orthogonal(x: torch.Tensor) -> torch.Tensor:
    """The orthogonal matrix closest to x [n, n], in float64: U·Vᵀ of its singular value decomposition."""
    u, _, v = torch.linalg.svd(x.double())
    return u @ v
