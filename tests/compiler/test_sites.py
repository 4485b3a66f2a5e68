"""A module called twice, a parameter in two modules: ordinals count calls, and a weight is worked out once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fuseline
from fuseline.compiler.program import Program
from fuseline.compiler.sites import sites
from fuseline.compiler.weights import STORE
from tests.compiler.test_plan import Threshold
from tests.helpers.models import Mlp, error


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    torch.manual_seed(0)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x):
        return self.mlp(self.mlp(x))


class SharedParameter(nn.Module):
    """Two modules of one weight, each with a bias of its own; the first of them is called again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.a(torch.relu(self.b(torch.relu(self.a(x)))))


class OneLayerThrice(nn.Module):
    """A list that holds one layer three times, as ALBERT does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8)] * 3)

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def linears(program: Program) -> list[str]:
    return [site for node, site in sites(program.graph).items() if node.target is torch.ops.aten.linear.default]


@torch.no_grad()
def test_ordinals_count_calls() -> None:
    model, x = Twice(), torch.randn(3, 8)
    expected = [f"mlp.{name}/linear#{call}" for call in (0, 1) for name in ("gate", "up", "down")]
    assert linears(fuseline.capture(model, (x,))) == expected
    fuseline.optimize(model, "fuse{allow_empty}")(x)
    assert linears(fuseline.reports(model)[0].captured) == expected


@torch.no_grad()
@pytest.mark.parametrize(("kind", "calls", "weights"), [(Twice, 6, 3), (SharedParameter, 3, 1), (OneLayerThrice, 3, 1)])
def test_a_weight_is_quantized_once(kind: type[nn.Module], calls: int, weights: int) -> None:
    model, x = kind(), torch.randn(3, 8)
    expected, before = model(x), STORE.misses
    fuseline.optimize(model, "quantize{weights=int8}")
    assert 0 < error(model(x), expected) < 0.05
    (compilation,) = fuseline.reports(model)
    assert compilation.report["quantize"].matched == calls
    derived = {n.meta["weight"] for n in compilation.program.weights() if compilation.program.parameter(n) is None}
    assert len({name for expression in derived for name in expression.parameters()}) == weights
    assert STORE.misses - before == weights, "eager expands each weight once, however often it is used"


@torch.no_grad()
@pytest.mark.parametrize("kind", [Twice, SharedParameter, OneLayerThrice])
def test_every_call_sees_an_edit(kind: type[nn.Module]) -> None:
    model, x = kind(), torch.randn(3, 8)
    fuseline.optimize(model, "quantize{weights=int8}")(x)
    for parameter in model.parameters():
        parameter.mul_(-2)
    assert error(model(x), kind.forward(model, x)) < 0.05
    assert len(fuseline.reports(model)) == 1


def test_gradients_of_all_calls_add_up() -> None:
    for kind in (Twice, SharedParameter, OneLayerThrice):
        torch.compiler.reset()
        model, x = kind(), torch.randn(3, 8)
        model(x).square().sum().backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        fuseline.optimize(model, "raise{allow_empty},fuse{allow_empty}")(x).square().sum().backward()
        for parameter, reference in zip(model.parameters(), expected, strict=True):
            assert error(parameter.grad, reference) < 1e-5


@torch.no_grad()
def test_a_plan_decides_for_each_call() -> None:
    """What comes in differs from call to call, so each is a site; the weight is the same parameter at both."""
    model, x = Twice(), torch.randn(16, 8)
    plan = fuseline.analyze(model, [Threshold(share=0.25)], [x])
    bounds = [plan.sites[f"mlp.up/linear#{call}"]["threshold"].tensors["bound"] for call in (0, 1)]
    assert len(plan.sites) == 6 and bounds[0] != bounds[1]
    expected = (
        fuseline.Pipeline([Threshold(share=0.25)])
        .run(fuseline.capture(model, (x,)), plan=plan)[0]
        .run(fuseline.capture(model, (x,)).examples)[0]
    )
    assert error(fuseline.optimize(model, [Threshold(share=0.25)], plan=plan)(x), expected) < 1e-6
