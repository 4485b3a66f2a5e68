"""Normal form: writes in place, aliases, constants and no-ops mean after capture what they meant before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fuseline
from fuseline.compiler.capture import from_dynamo
from fuseline.compiler.errors import CaptureError
from fuseline.compiler.expressions import Constant
from fuseline.compiler.normalize import clean
from fuseline.compiler.verifier import verify
from tests.helpers.models import ops, traced


def same_as_eager(function: Callable[..., Any], *args: torch.Tensor, calls: int = 2) -> set[str]:
    """Checks results, their dtypes and what happened to the inputs, over several calls; gives the declared writes."""
    program = traced(function, *[a.clone() for a in args])
    verify(program, "full")
    run = program.to_module()
    ours, theirs = [a.clone() for a in args], [a.clone() for a in args]
    with torch.no_grad():
        for _ in range(calls):
            actual, expected = run(*ours), function(*theirs)
            flat = [torch.utils._pytree.tree_leaves(v) for v in (actual, expected)]
            for a, e in zip(*flat, strict=True):
                assert a.dtype == e.dtype and torch.equal(a, e)
    assert all(map(torch.equal, ours, theirs))
    return set(program.mutated)


def chunk_of_input(x):
    a = x.chunk(2, -1)[0]
    a.mul_(2)
    return x + 1


def chunk_of_intermediate(x):
    y = x * 1.5
    y.chunk(2, -1)[0].mul_(2)
    return y


def view_of_intermediate(x):
    y = x + 1
    y.view(-1)[0].fill_(7)
    return y.sum(), y


def eval_dropout_is_its_input(x):
    y = x * 1.5
    d = F.dropout(y, 0.5, False)
    d.relu_()
    return y + d


def eval_dropout_of_input(x):
    d = F.dropout(x, 0.5, False)
    d.relu_()
    return x + d


def copies_are_no_aliases(x):
    y = x.double()
    y.add_(1)
    z = x.t().reshape(-1)
    z.mul_(2)
    return y, z


def chain_of_writes(x):
    y = x + 1
    y.relu_()
    y.mul_(3).add_(1)
    return y - x


def read_between_writes(x):
    y = x + 1
    before = y * 2
    y.zero_()
    return before + y


def out_argument(x):
    y = torch.empty_like(x)
    torch.add(x, 1, out=y)
    return y * 2


def several_at_once(x):
    y, z = x * 2, x + 3
    torch._foreach_add_([y, z], 1)
    return y + z


def views_behind_the_write(x):
    y = x * 2
    y.clamp_(-1, 1)
    return y.view(-1), y[0]


def views_read_before_the_write(x):
    y = x * 2
    before = y.view(-1) + 1
    y.relu_()
    return before, y.t()


def a_view_read_behind_the_write(x):
    y = x * 2
    view = y.view(-1)
    y.relu_()
    return view + 1, y


def a_view_is_written(x):
    y = x * 2
    view = y.view(-1)
    view.relu_()
    return y + 1


def quotient_of_topk(x):
    values, indices = torch.topk(x, 2)
    values /= values.sum(-1, keepdim=True)
    return values.view(-1), indices


def compare_in_place(x):
    y = x * 1
    y.gt_(0)
    return y


def part_of_topk(x):
    values, indices = torch.topk(x, 2)
    values.neg_()
    return values, indices


@pytest.mark.parametrize(
    ("function", "written"),
    [
        (chunk_of_input, {"x"}), (chunk_of_intermediate, set()), (view_of_intermediate, set()),
        (eval_dropout_is_its_input, set()), (eval_dropout_of_input, {"x"}), (copies_are_no_aliases, set()),
        (chain_of_writes, set()), (read_between_writes, set()), (several_at_once, set()),
        (out_argument, set()), (compare_in_place, set()),
        (part_of_topk, set()), (views_behind_the_write, set()), (views_read_before_the_write, set()),
        (a_view_read_behind_the_write, set()), (a_view_is_written, set()), (quotient_of_topk, set()),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)  # fmt: skip
def test_writes_mean_what_they_meant(function: Callable[..., Any], written: set[str]) -> None:
    assert same_as_eager(function, torch.randn(3, 4)) == written


def test_several_inputs_written_at_once():
    def function(x, y):
        torch._foreach_mul_([x, y], 2)
        return x + y

    assert len(same_as_eager(function, torch.randn(3, 4), torch.randn(3, 4))) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_writes_in_place_keep_their_type(dtype: torch.dtype) -> None:
    def function(x, y):
        z = x * 2
        z.add_(y)
        z.mul_(y)
        return z - 1

    same_as_eager(function, torch.randn(3, 4).to(dtype), torch.randn(3, 4))
    assert "to" in ops(traced(function, torch.randn(3, 4).to(dtype), torch.randn(3, 4)))


def test_private_writes_become_functional_and_others_are_marked() -> None:
    private = traced(chain_of_writes, torch.randn(3, 4))
    assert ops(private) == ["add", "relu", "mul", "add", "sub"]
    assert not any(n.meta.get("written") for n in private.graph.nodes)
    for function in (views_behind_the_write, views_read_before_the_write, quotient_of_topk):
        assert not any(n.meta.get("written") for n in traced(function, torch.randn(3, 4)).graph.nodes)
    for function in (a_view_read_behind_the_write, a_view_is_written):
        assert any(n.meta.get("written") for n in traced(function, torch.randn(3, 4)).graph.nodes)
    aliased = traced(chunk_of_intermediate, torch.randn(3, 4))
    assert {n.name for n in aliased.graph.nodes if n.meta.get("written")} >= {"mul", "getitem", "mul_"}


def test_a_full_tensor_keeps_its_type_whatever_the_default_is_at_run_time() -> None:
    graph = torch.fx.Graph()
    full = graph.call_function(torch.ops.aten.full.default, ([3], 0.5))
    full.meta["val"] = torch.full((3,), 0.5)
    graph.output(full)
    clean(graph, training=False)
    assert full.kwargs["dtype"] is torch.float32


def test_casts_to_ones_own_type_and_whole_slices_vanish() -> None:
    def function(x):
        return F.dropout(x.float()[:, :].to(torch.float32), 0.1, False).detach() + 1

    assert ops(traced(function, torch.randn(3, 4))) == ["add"]


class Constants(torch.nn.Module):
    """A constant that is read, one that is written, and one that is handed out behind a view."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        written = torch.tensor([1.0, 2.0, float("-inf")])
        written += x
        return x * torch.tensor([2.0, 3.0, 4.0]), written.clamp(min=-5), torch.tensor([1.0, 2.0]).view(2, 1)


def constants_stay_fresh(run: Callable[..., Any]) -> None:
    x = torch.randn(3)
    for _ in range(2):
        results = run(x)
        assert all(map(torch.equal, results, Constants()(x)))
        results[2].zero_()


@torch.no_grad()
def test_constants_are_fresh_at_every_call() -> None:
    program = fuseline.capture(Constants(), (torch.randn(3),))
    assert ops(program).count("lift_fresh_copy") == 1  # the one that the caller could write to
    constants_stay_fresh(program.to_module())


@torch.no_grad()
def test_constants_through_dynamo_are_written_down() -> None:
    torch.compiler.reset()
    found = []

    def backend(graph_module, inputs):
        program = from_dynamo(graph_module, inputs)
        found.append(program)
        return lambda *flat: program.run(flat)

    constants_stay_fresh(torch.compile(Constants(), backend=backend))
    assert [type(n.meta["weight"]) for n in found[0].weights()] == [Constant] * 3


def large(x: torch.Tensor) -> torch.Tensor:
    return x + torch.tensor([1.0] * 70000)


@torch.no_grad()
def test_a_large_constant_is_refused_with_the_line_and_the_remedy() -> None:
    torch.compiler.reset()
    with pytest.raises(Exception, match="a constant of 70000 elements") as caught:
        torch.compile(large, backend=from_dynamo)(torch.randn(70000))
    assert "register_buffer" in str(caught.value) and "test_normal_form.py" in str(caught.value)


def test_an_autocast_region_is_closed_when_tracing_fails() -> None:
    class Fails(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y = x @ x
                return y if y.sum() > 0 else x

    with pytest.raises(CaptureError):
        fuseline.capture(Fails(), (torch.randn(2, 2),))
    assert not torch.is_autocast_enabled("cpu")


@torch.no_grad()
def test_autocast_through_export() -> None:
    class Region(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y = x @ x
            return y.float() / 3

    x = torch.randn(4, 4)
    result = fuseline.capture(Region(), (x,)).to_module()(x)
    assert result.dtype == torch.float32 and torch.equal(result, Region()(x))
