"""What the published recipes do otherwise, to be measured beside: an optimizer, and a centred embedding.

Only for comparison: centring the embedding's rows changes a model whose norms do not take the mean away.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable
from typing import Any

import torch


def centred(model: torch.nn.Module) -> torch.nn.Module:
    """A copy whose embedding has rows of mean zero, its head untied and as it was (QuaRot, SpinQuant)."""
    model = copy.deepcopy(model)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    rows = table.weight.detach().double()
    centre = (rows - rows.mean(-1, keepdim=True)).to(table.weight.dtype)
    table.weight = torch.nn.Parameter(centre, requires_grad=False)
    model.config.tie_word_embeddings = False
    return model


class CayleySgd(torch.optim.Optimizer):
    """SpinQuant's descent: Cayley steps by five fixed-point iterations (Li et al., 2020), without momentum.

    The matrix is taken as X = Mᵀ. W is the skew part of what the gradient leaves after its normal component; a step is
    at most 1/‖W‖₁ long. With probability 1/101 the matrix is first made orthogonal again by a QR decomposition.
    """

    def __init__(self, matrices: Iterable[torch.Tensor], rate: float, seed: int = 0):
        super().__init__(matrices, {"lr": rate})
        self.random = random.Random(seed)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self.turn(matrix, matrix.grad, group["lr"])

    def turn(self, matrix: torch.Tensor, gradient: torch.Tensor, rate: float) -> None:
        if self.random.randint(1, 101) == 1:
            q, r = torch.linalg.qr(matrix)
            matrix.copy_(q * torch.diagonal(r).sign())
        v = -gradient.T  # no momentum: V is the gradient alone
        xv = matrix @ v
        hat = v @ matrix - 0.5 * matrix.T @ (xv @ matrix)
        skew = hat - hat.T
        step = min(rate, float(1 / (torch.linalg.matrix_norm(skew, 1) + 1e-8)))
        y = matrix.T + step * v
        for _ in range(5):
            y = matrix.T + step / 2 * skew @ (matrix.T + y)
        matrix.copy_(y.T)
