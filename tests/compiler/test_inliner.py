"""Higher-order ops in Dynamo's graph: those that wrap a body are inlined, the others refused with a way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fuseline
from tests.helpers.models import error


class Halved(torch.autograd.Function):
    """x, with half its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad / 2


class OwnBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(Halved.apply(self.inner(x)))


class Choice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda t: t * 2, lambda t: t - 1, (x,))


class Outside(Choice):
    """The same after the way out that the error names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.choice(self.inner(x)))

    @torch.compiler.disable
    def choice(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def optimized(model: nn.Module) -> nn.Module:
    torch.compiler.reset()
    return fuseline.optimize(model.eval(), "raise{allow_empty}")


def test_a_body_that_is_chosen_is_refused() -> None:
    with torch.no_grad(), pytest.raises(Exception, match="the model calls cond, whose body is a graph of its own") as e:
        optimized(Choice())(torch.randn(4))
    assert "put that call in a function under torch.compiler.disable" in str(e.value)


@torch.no_grad()
def test_the_way_out_leads_out() -> None:
    model, x = Outside(), torch.randn(3, 4)
    expected = model(x)
    assert error(optimized(model)(x), expected) < 1e-6
    assert len(fuseline.reports(model)) >= 2


def test_a_backward_of_its_own_is_kept_out_of_training_and_let_into_inference() -> None:
    model, x = OwnBackward(), torch.randn(3, 4)
    with torch.no_grad():
        expected = model(x)
        assert error(optimized(model)(x), expected) < 1e-6
    with pytest.raises(Exception, match="a torch.autograd.Function has a backward of its own"):
        optimized(OwnBackward())(x)
