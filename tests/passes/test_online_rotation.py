"""A rotation at run time in a pass of one's own: its core and signs are weights, its inverse is folded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import fuseline
from fuseline import Pass, Rule
from fuseline.compiler.ops import hadamard
from fuseline.compiler.pattern import call
from fuseline.compiler.precision import error
from fuseline.passes.rotation.rotations import Kind, Rotation

aten = torch.ops.aten


class Turned(Rule):
    """linear(x, W) → linear(hadamard(x·s), W·S·H): exact, as H is its own inverse and s is one of signs."""

    def before(self, x, w):
        return call("linear", x, w)

    def refuse(self, m):
        return "done" if m.x.target in (hadamard.overload, aten.mul.Tensor) else None

    def after(self, m, new):
        turn = Rotation("turn", m.x.meta["val"].shape[-1], Kind.RANDOM_HADAMARD, seed=7)
        weight = turn.fold(m.w.meta["weight"], m.w.meta["val"], 1)
        return new(aten.linear.default, turn.online(new, m.x), new.weight(weight))


@fuseline.register
@dataclass(frozen=True)
class TurnEveryLinear(Pass):
    """Rotates the input of every linear."""

    name = "turn-every-linear"

    def rules(self, program):
        yield Turned()


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 96, bias=False), torch.nn.Linear(96, 47, bias=False)
        self.last = torch.nn.Linear(47, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.down(torch.tanh(self.up(x)))))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_it_is_exact(dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    model, x = Net().to(dtype), torch.randn(5, 64, dtype=dtype)
    expected = model.double()(x.double()) if dtype == torch.float64 else model(x)
    fuseline.optimize(model, "turn-every-linear,fuse", target="eager", keep_originals=True)
    with torch.no_grad():
        assert error(model(x), expected) < bound


def test_gradients_pass_through_it() -> None:
    torch.manual_seed(0)
    model, x, y = Net(), torch.randn(5, 64, requires_grad=True), torch.randn(5, 64, requires_grad=True)
    y.data.copy_(x.data)
    model(x).square().sum().backward()
    fuseline.optimize(model, "turn-every-linear,fuse", target="eager", keep_originals=True)
    model(y).square().sum().backward()
    assert error(y.grad, x.grad) < 1e-5


@torch.no_grad()
def test_a_saved_model_has_its_signs_and_cores(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(5, 64)
    expected = model(x)
    fuseline.optimize(model, "turn-every-linear,fuse", target="eager")
    result = model(x)
    assert error(result, expected) < 2e-6
    loaded = fuseline.load(fuseline.save(model, tmp_path / "out"), model=Net)
    assert torch.equal(loaded(x), result)
