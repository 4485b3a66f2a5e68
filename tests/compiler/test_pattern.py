"""Patterns: one rule matches a computation however a model spells it, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fuseline.compiler.pattern import Either, Scalar, Var, call, find, maybe_cast, mean, root_ops, rsqrt, square
from fuseline.compiler.pipeline import Pipeline
from fuseline.compiler.program import Program
from fuseline.compiler.structure import same_structure
from tests.helpers.models import traced

X, W, EPS = Var("x"), Var("w"), Scalar("eps")
NORM = maybe_cast(maybe_cast(X, "wide") * rsqrt(mean(square(maybe_cast(X))) + EPS), "back") * W


def last(program: Program) -> torch.fx.Node:
    return program.graph.output_node().args[0][0] if isinstance(program.graph.output_node().args[0], tuple) else (
        program.graph.output_node().args[0]
    )  # fmt: skip


def match(function: Callable, *args: torch.Tensor, pattern=NORM):
    return find(pattern, last(traced(function, *args)))


@pytest.mark.parametrize(
    "spelling",
    [
        lambda x, w: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w,
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        lambda x, w: w * (torch.rsqrt(1e-6 + torch.square(x).mean(-1, True)) * x),
        lambda x, w: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6) ** -0.5 * w,
        lambda x, w: w * (x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-6)).float(),
    ],
)
def test_one_pattern_many_spellings(spelling: Callable) -> None:
    found = match(spelling, torch.randn(2, 4), torch.randn(4))
    assert found is not None
    x = found.x if found.x.op == "placeholder" else found.x.args[0]  # the cast itself, where both uses share it
    assert (x.name, found.w.name, found.eps) == ("x", "w", 1e-6)
    assert list(found.dims) == [-1] and found.get("nothing", 5) == 5


@pytest.mark.parametrize(
    "other",
    [
        lambda x, w: x * torch.rsqrt((x * w).mean(-1, keepdim=True) + 1e-6) * w,  # not a square
        lambda x, w: x * torch.rsqrt((x * x).mean(-1, keepdim=False)[:, None] + 1e-6) * w,
        lambda x, w: w * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w,  # x used once is w
        lambda x, w: x * torch.rsqrt(torch.add((x * x).mean(-1, keepdim=True), 1e-6, alpha=2)) * w,
        lambda x, w: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + w) * w,  # eps is no number
        lambda x, w: x * torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w,
    ],
)
def test_what_only_looks_like_it(other: Callable) -> None:
    assert match(other, torch.randn(4, 4), torch.randn(4)) is None


def test_a_written_value_is_left_alone() -> None:
    def function(x, w):
        square = x * x
        view = square.view(-1)
        view.add_(1)
        return x * torch.rsqrt(square.mean(-1, keepdim=True) + 1e-6) * w

    assert match(function, torch.randn(2, 4), torch.randn(4)) is None


def test_an_op_of_the_same_name_in_another_library_is_another_op() -> None:
    """`fuseline::rms_norm` has other arguments than `aten::rms_norm`: `raise` may run twice."""
    pattern = call("rms_norm", X, Var("dims"), W, Var("eps"))
    ours = lambda x, w: torch.ops.fuseline.rms_norm(x, w, 1e-6)
    theirs = lambda x, w: torch.rms_norm(x, (4,), w, 1e-6)
    x, w = torch.randn(2, 4), torch.randn(4)
    assert match(theirs, x, w, pattern=pattern) is not None and match(ours, x, w, pattern=pattern) is None
    once, _ = Pipeline("raise").run(traced(theirs, x, w))
    twice, report = Pipeline("raise{allow_empty}").run(once)
    assert report.rewrites == 0 and same_structure(once, twice)


def test_equal_computations_are_equal_and_random_ones_are_not() -> None:
    doubled = X + X
    assert match(lambda x: torch.neg(x) + torch.neg(x), torch.randn(3), pattern=doubled) is not None
    assert match(lambda x: torch.neg(x) + torch.abs(x), torch.randn(3), pattern=doubled) is None
    drop = torch.nn.functional.dropout
    assert match(lambda x: drop(x, 0.5, True) + drop(x, 0.5, True), torch.randn(3), pattern=doubled) is None


def test_options_bind_and_bound_nodes_are_read() -> None:
    pattern = call("softmax", Var("x"), dim=Var("dim"), bind="softmax")
    found = match(lambda x: torch.softmax(x, 1), torch.randn(2, 3), pattern=pattern)
    assert found.dim == 1 and found.softmax is found.root
    with pytest.raises(AttributeError):
        _ = found.other


def test_lists_of_operands() -> None:
    pattern = call("cat", [-Var("b"), Var("a")])
    found = match(lambda x: torch.cat((-x[:, 2:], x[:, :2]), -1), torch.randn(2, 4), pattern=pattern)
    assert found.a is not found.b
    assert match(lambda x: torch.cat((-x, x, x), -1), torch.randn(2, 4), pattern=pattern) is None


def test_root_ops() -> None:
    assert root_ops(maybe_cast(X * W)) == {"mul", "to", "_to_copy"}
    assert root_ops(Either((X - W, X / W, X @ W))) == {"sub", "div", "matmul", "bmm", "mm"}
    with pytest.raises(TypeError, match="needs an op at its root"):
        root_ops(X)
