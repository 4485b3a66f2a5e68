"""Graph breaks: each part is compiled and right, and each break is told once, with the user's line and the reason."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import fuseline
from tests.helpers.models import error


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


@contextmanager
def unknown_to_dynamo() -> Iterator[None]:
    yield


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)


class Between(Pair):
    def forward(self, x):
        x = self.first(x)
        print(end="")  # here
        return self.second(x)


class AtTheStart(Pair):
    def forward(self, x):
        print(end="")  # here
        return self.second(self.first(x))


class OnAValue(Pair):
    def forward(self, x):
        x = self.first(x)
        if x.sum() > 0:  # here
            return self.second(x)
        return x


class InACall(Pair):
    def forward(self, x):
        return self.inner(self.first(x)) + 1

    def inner(self, x):
        print(end="")  # here
        return self.second(x)


class ByHand(Pair):
    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()  # here
        return self.second(x)


class InALoop(Pair):
    def forward(self, x):
        for layer in (self.first, self.second):
            x = self.step(layer, x)
            print(end="")  # here
        return x

    def step(self, layer, x):
        return torch.relu(layer(x))


class InAWithBlock(Pair):
    def forward(self, x):
        with unknown_to_dynamo():
            print(end="")  # here
            return self.after(x)

    def after(self, x):
        return self.second(self.first(x)) * 2


NOT_TRACED = "Dynamo does not know how to trace builtin operator `print`"
CASES = [  # model, graphs, reason, the function that no graph could be made of
    (Between, 2, NOT_TRACED, None),
    (AtTheStart, 1, NOT_TRACED, None),
    (OnAValue, 2, "a branch depends on the values of a tensor", None),
    (InACall, 3, NOT_TRACED, None),
    (ByHand, 2, "User-inserted graph break", None),
    (InALoop, 1, NOT_TRACED, "forward"),
    (InAWithBlock, 1, NOT_TRACED, "forward"),
]


def line_of(kind: type) -> int:
    lines, start = inspect.getsourcelines(kind)
    return start + next(i for i, line in enumerate(lines) if "# here" in line)


@pytest.mark.parametrize(("kind", "graphs", "reason", "function"), CASES, ids=[c[0].__name__ for c in CASES])
@torch.no_grad()
def test_parts_are_compiled_and_breaks_are_told(kind, graphs, reason, function, caplog) -> None:
    torch.manual_seed(0)
    model, x = fuseline.optimize(kind(), "fuse{allow_empty}"), torch.randn(3, 8)
    assert fuseline.breaks(model) == []
    with caplog.at_level(logging.WARNING, "fuseline"):
        for value in (x, -x, x):
            assert error(model(value), kind.forward(model, value)) < 1e-6
    assert len(fuseline.reports(model)) == graphs
    (one,) = fuseline.breaks(model)
    assert (one.file, one.line, one.function) == (__file__, line_of(kind), function)
    assert one.reason.startswith(reason) and one.code.endswith("# here")
    (told,) = [r.getMessage() for r in caplog.records if r.name == "fuseline"]
    assert f"a graph break in {kind.__name__}: these lines run in Python" in told
    assert f"{__file__}:{one.line}: {reason}" in told
    assert ("(forward runs in Python as a whole)" in told) == (function is not None)


@torch.no_grad()
def test_each_model_has_its_own() -> None:
    broken, other, x = fuseline.optimize(Between(), "fuse{allow_empty}"), InACall(), torch.randn(3, 8)
    whole = fuseline.optimize(nn.Sequential(nn.Linear(8, 8)), "fuse{allow_empty}")
    torch.compile(other, backend="eager")(x)  # somebody else's breaks, before and between
    broken(x)
    torch.compile(OnAValue(), backend="eager")(x)
    whole(x)
    assert [b.line for b in fuseline.breaks(broken)] == [line_of(Between)]
    assert fuseline.breaks(whole) == []


@torch.no_grad()
def test_the_backend_alone_tells_too(caplog) -> None:
    model, x = Between(), torch.randn(3, 8)
    with caplog.at_level(logging.WARNING, "fuseline"):
        compiled = torch.compile(model, backend="fuseline", options={"pipeline": "fuse{allow_empty}"})
        assert error(compiled(x), model(x)) < 1e-6
    (told,) = [r.getMessage() for r in caplog.records if r.name == "fuseline"]
    assert f"{__file__}:{line_of(Between)}: {NOT_TRACED}" in told


def test_gradients_cross_a_break() -> None:
    torch.manual_seed(0)
    model, x = Between(), torch.randn(3, 8)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    fuseline.optimize(model, "fuse{allow_empty}")(x).square().sum().backward()
    for p, reference in zip(model.parameters(), expected, strict=True):
        assert error(p.grad, reference) < 1e-6
    assert len(fuseline.breaks(model)) == 1


@torch.no_grad()
def test_quantize_reaches_every_part() -> None:
    model, x = Between(), torch.randn(3, 8)
    expected = model(x)
    fuseline.optimize(model, "quantize{weights=int8,allow_empty}")
    assert 0 < error(model(x), expected) < 0.05
    assert [c.report["quantize"].matched for c in fuseline.reports(model)] == [1, 1]


@torch.no_grad()
def test_an_optimized_model_inside_a_compiled_one() -> None:
    inner, x = fuseline.optimize(nn.Sequential(nn.Linear(8, 8)), "fuse{allow_empty}"), torch.randn(3, 8)
    outer = torch.compile(lambda value: inner(value) + 1, backend="eager")
    assert error(outer(x), inner[0](x) + 1) < 1e-6
    assert error(outer(-x), inner[0](-x) + 1) < 1e-6


def test_a_model_that_was_not_optimized() -> None:
    with pytest.raises(fuseline.UserError, match="this model was not optimized"):
        fuseline.breaks(nn.Linear(2, 2))
