"""vmap and torch.func transforms inside a model: captured as plain ATen ops, equal to eager, gradients too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fuseline
from fuseline.compiler.transforms import stretches
from tests.helpers.models import error, ops


class Mapped(nn.Module):
    """A vmap over a closure with a weight, one vmap in another, and a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = torch.vmap(lambda a, b: self.inner(a) * b.sum(), in_dims=(0, 1))(x, w)
        z = torch.vmap(torch.vmap(lambda a, b: a + b))(y, torch.relu(y))
        slope = torch.func.grad(lambda t: (self.inner(t) ** 2).sum())(x)
        return torch.relu(z) + slope


def called(dynamic: bool | None) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    torch.compiler.reset()
    model, inputs = Mapped().eval(), (torch.randn(5, 8), torch.randn(3, 5))
    expected = model(*inputs)
    fuseline.optimize(model, "raise{allow_empty}", fullgraph=True, dynamic=dynamic)
    return model, model(*inputs), expected


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [None, True])
def test_captured_whole_and_equal(dynamic: bool | None) -> None:
    model, actual, expected = called(dynamic)
    assert error(actual, expected) < 1e-6
    (compilation,) = fuseline.reports(model)
    names = ops(compilation.captured)
    assert not any("nesting" in name or "batch_dim" in name for name in names) and "mm" in names


def test_gradients_pass() -> None:
    model, actual, expected = called(None)
    weight = model.inner.weight
    (wanted,) = torch.autograd.grad(expected.square().sum(), weight)
    (found,) = torch.autograd.grad(actual.square().sum(), weight)
    assert error(found, wanted) < 1e-5


def test_stretches_are_the_outermost_ones() -> None:
    def _vmap_increment_nesting() -> None: ...
    def _vmap_decrement_nesting() -> None: ...

    graph = torch.fx.Graph()
    for target in (_vmap_increment_nesting, _vmap_increment_nesting, torch.relu, _vmap_decrement_nesting,
                   _vmap_decrement_nesting, torch.sin, _vmap_increment_nesting, _vmap_decrement_nesting):  # fmt: skip
        graph.call_function(target, ())
    assert [len(stretch) for stretch in stretches(graph)] == [5, 2]
