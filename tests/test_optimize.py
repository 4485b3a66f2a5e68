"""fuseline.optimize: on a model, as a decorator, on subclasses, copied, pickled, and twice."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch

import fuseline
from fuseline import UserError
from tests.helpers.models import Mlp, error


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


@torch.no_grad()
def test_on_a_model() -> None:
    model, x = Mlp(), torch.randn(3, 8)
    expected = model(x)
    assert fuseline.optimize(model, "fuse") is model
    assert fuseline.reports(model) == []  # nothing is compiled before the first call
    assert error(model(x), expected) < 1e-6
    (compilation,) = fuseline.reports(model)
    assert compilation.report["fuse"].matched > 0 and compilation.target == "eager"


@torch.no_grad()
def test_exact_passes_only_when_none_are_named() -> None:
    model, x = fuseline.optimize(Mlp()), torch.randn(3, 8)
    assert error(model(x), Mlp.forward(model, x)) < 1e-6
    assert not [p for p in fuseline.reports(model)[0].report.passes if p.tier == "lossy"]


@fuseline.optimize("quantize{weights=int8,allow_empty},fuse{allow_empty}")
class Decorated(torch.nn.Module):
    """A docstring that stays."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.inner = Mlp(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * 2


class Child(Decorated):
    def __init__(self) -> None:
        super().__init__(8)
        self.extra = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.extra(super().forward(x))


@fuseline.optimize("fuse")
class Grandchild(Child):
    pass


def test_a_decorated_class_is_still_itself() -> None:
    assert Decorated.__name__ == "Decorated" and Decorated.__doc__ == "A docstring that stays."
    model = Decorated(width=4)
    assert isinstance(model, Decorated) and model.inner.norm.shape == (4,)
    assert list(model.state_dict()) == list(torch.nn.ModuleDict({"inner": Mlp(4)}).state_dict())


@torch.no_grad()
def test_a_decorated_class_is_compiled() -> None:
    model, x = Decorated(), torch.randn(3, 8)
    result = model(x)
    assert 0 < error(result, Decorated.forward(model, x)) < 0.05  # int8: compiled, and close
    assert fuseline.reports(model)[0].report["quantize"].matched == 3


@torch.no_grad()
def test_a_subclass_runs_its_own_forward() -> None:
    model, x = Child(), torch.randn(3, 8)
    assert error(model(x), Child.forward(model, x)) < 0.05
    assert fuseline.reports(model)[0].report["quantize"].matched == 4  # with the child's own linear


@torch.no_grad()
def test_the_outermost_decorator_decides() -> None:
    model, x = Grandchild(), torch.randn(3, 8)
    assert error(model(x), Grandchild.forward(model, x)) < 1e-6
    assert [p.name for p in fuseline.reports(model)[0].report.passes] == ["fuse"]


@torch.no_grad()
def test_optimizing_twice_takes_the_last_pipeline() -> None:
    model, x = fuseline.optimize(Mlp(), "quantize{weights=int4}"), torch.randn(3, 8)
    model(x)
    fuseline.optimize(model, "fuse")
    assert fuseline.reports(model) == []
    assert error(model(x), Mlp.forward(model, x)) < 1e-6
    assert [p.name for p in fuseline.reports(model)[0].report.passes] == ["fuse"]


@torch.no_grad()
def test_copies_and_files_hold_the_plain_model() -> None:
    model, x = fuseline.optimize(Mlp(), "fuse"), torch.randn(3, 8)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert error(other(x), expected) < 1e-6
        with pytest.raises(UserError, match="this model was not optimized"):
            fuseline.reports(other)
        other.down.weight.mul_(-1)
        assert error(model(x), expected) == 0  # the copy's parameters are its own
        assert error(fuseline.optimize(other, "fuse")(x), Mlp.forward(other, x)) < 1e-6


def test_a_state_dict_moves_between_optimized_and_plain(tmp_path: Path) -> None:
    model, plain = fuseline.optimize(Mlp(), "quantize{weights=int8}"), Mlp()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(3, 8)
    with torch.no_grad():
        assert error(model(x), plain(x)) < 0.03
        model.load_state_dict(Mlp().state_dict())
        assert error(model(x), Mlp.forward(model, x)) < 0.03


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda m: fuseline.optimize(m, "fusee"), "unknown pass 'fusee'; did you mean 'fuse'"),
        (lambda m: fuseline.optimize(m, "fuse", target="trito"), "unknown target 'trito'; did you mean 'triton'"),
        (lambda m: fuseline.optimize(m, "fuse{linear=true}"), "has no option 'linear'; did you mean 'linears'"),
        (lambda m: fuseline.optimize(Mlp), "the decorator takes a pipeline"),
        (lambda m: fuseline.optimize("fuse")(m), "fuseline.optimize decorates nn.Module classes, not Mlp("),
        (lambda m: fuseline.optimize("fusee"), "unknown pass 'fusee'"),
        (lambda m: fuseline.reports(Mlp()), "this model was not optimized"),
    ],
)
def test_mistakes_are_told_at_once_and_change_nothing(wrong, message: str) -> None:
    model = Mlp()
    with pytest.raises(UserError) as caught:
        wrong(model)
    assert message in str(caught.value)
    assert model._compiled_call_impl is None


@torch.no_grad()
def test_fullgraph_and_dynamic_reach_dynamo() -> None:
    model = fuseline.optimize(Mlp(), "fuse", dynamic=True, fullgraph=True)
    for rows in (3, 5, 9):
        model(torch.randn(rows, 8))
    assert len(fuseline.reports(model)) == 1
