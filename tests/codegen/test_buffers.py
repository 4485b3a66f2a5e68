"""The buffer plan: what a call's results may be an alias of is the caller's, everything else has a lifetime."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fuseline
from fuseline.codegen.buffers import live
from fuseline.codegen.lower import Lowered, lower
from fuseline.compiler.compat import _ALWAYS_NEW, may_return_an_input
from tests.codegen import append_cases
from tests.codegen.test_leftovers import function

pytest.importorskip("triton")
aten = torch.ops.aten


def lowered(code, *inputs: torch.Tensor, dynamic=None) -> Lowered:
    program = fuseline.capture(function(code).eval(), inputs, {}, dynamic)
    after, _ = fuseline.Pipeline("fuse").run(program)
    return lower(after)


def planned(result: Lowered) -> list[str]:
    """The regions that write into the arena."""
    return [line.split("= run_")[1].split("(")[0] for line in result.source.splitlines() if "=planned[" in line]


X, W = torch.randn(4, 8), torch.randn(8, 8)


def linear_then(*rest):
    """linear → relu (a region) → each of `rest`; the last one's value is the result."""

    def code(x, w):
        value = torch.relu(torch.nn.functional.linear(x, w))
        for step in rest:
            value = step(value, w)
        return value

    return code


def again(value, w):
    return torch.relu(torch.nn.functional.linear(value, w))


def test_a_chain_needs_memory_for_all_but_its_result():
    result = lowered(linear_then(again, again), X, W)
    assert planned(result) == ["linear_0", "linear_1"] and "from fuseline.runtime.arena import Plan" in result.source
    assert (
        "        ((4, 8), None, torch.float32, 2, 3),\n        ((4, 8), None, torch.float32, 3, 4),\n" in result.source
    )
    assert "PLAN(args_0)" in result.source or "planned = PLAN(" in result.source


@pytest.mark.parametrize(
    "view",
    [
        lambda v, w: v.view(8, 4),
        lambda v, w: v.t(),
        lambda v, w: v[1:],
        lambda v, w: v.reshape(2, 16),
        lambda v, w: v.t().contiguous().t(),
        lambda v, w: v.view(2, 16).view(4, 8).unsqueeze(0),
        lambda v, w: torch.split(v, 2)[1],
        lambda v, w: v.type_as(w),
    ],
)
def test_what_the_result_may_be_an_alias_of_is_not_planned(view):
    assert planned(lowered(linear_then(again, view), X, W)) == ["linear_0"]


def test_a_result_that_is_also_read_on_is_not_planned():
    def code(x, w):
        first = torch.relu(torch.nn.functional.linear(x, w))
        return again(first, w), first

    assert planned(lowered(code, X, W)) == []


def test_an_alias_keeps_its_value_alive():
    def code(x, w):
        first = torch.relu(torch.nn.functional.linear(x, w))
        part = first[:2]
        second = again(again(first, w), w)
        return torch.cat([second, part]).cumsum(0)

    program = fuseline.capture(function(code).eval(), (X, W))
    after, _ = fuseline.Pipeline("fuse").run(program)
    result = lower(after)
    module, _ = after.lift()
    names = {x.name.removeprefix("run_"): x for x in result.launchers}
    lives = {str(value[0].target): span for value, span in live(module, names).items()}
    nodes = list(module.graph.nodes)
    cat = next(k for k, n in enumerate(nodes) if n.target is aten.cat.default or "cat" in n.name)
    assert lives["linear_0"][1] >= cat - 1 and lives["linear_1"][1] < cat


def test_symbolic_sizes_are_arguments_of_the_plan():
    def code(x, w):
        return again(again(x, w), w)

    n = torch.export.Dim("n", min=2, max=512)
    result = lowered(code, X, W, dynamic={"inputs": ({0: n}, None)})
    (head,) = [line for line in result.source.splitlines() if line.startswith("def planned_sizes(")]
    symbol = head[len("def planned_sizes(") : -len("):")]
    assert f"(({symbol}, 8), None, torch.float32, " in result.source and ".shape[0])" in result.source


def test_a_program_without_intermediates_has_no_plan():
    result = lowered(linear_then(), X, W)
    assert "Plan" not in result.source


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (aten.view.default, True), (aten.reshape.default, True), (aten.contiguous.default, True),
        (aten.to.dtype, True), (aten.type_as.default, True), (aten.dropout.default, True), (aten.div_.Tensor, True),
        (aten.chunk.default, True), (aten.linear.default, False), (aten.matmul.default, False),
        (aten.topk.default, False), (aten.cat.default, False), (aten.bmm.default, False), (aten.clone.default, False),
    ],
)  # fmt: skip
def test_which_ops_may_return_an_argument(op, expected):
    assert may_return_an_input(op) is expected


def test_ops_taken_to_give_new_memory_do():
    x = torch.ones(1, 4, 4)
    calls = {
        "matmul": lambda: torch.matmul(x, torch.eye(4)),
        "linear": lambda: nn.functional.linear(x, torch.eye(4)),
        "conv1d": lambda: nn.functional.conv1d(x, torch.eye(4)[:, :, None]),
        "conv2d": lambda: nn.functional.conv2d(x[None], torch.ones(1, 1, 1, 1)),
        "softmax": lambda: torch.softmax(x, 0),
        "log_softmax": lambda: torch.log_softmax(x, 0),
        "layer_norm": lambda: nn.functional.layer_norm(x, (4,)),
        "rms_norm": lambda: nn.functional.rms_norm(x, (4,)),
        "group_norm": lambda: nn.functional.group_norm(x, 1),
        "batch_norm": lambda: nn.functional.batch_norm(x, torch.zeros(4), torch.ones(4)),
        "where": lambda: torch.where(x > 0, x, x),
    }
    assert set(calls) | {"conv3d", "scaled_dot_product_attention"} == set(_ALWAYS_NEW)
    for name, call in calls.items():
        assert call().untyped_storage().data_ptr() != x.untyped_storage().data_ptr(), name


def test_what_is_added_to_a_cache_may_have_any_length():
    """`generate()` takes a prompt of any length to a static cache."""

    def code(q, k, v, cos, sin, keys, values, at):
        turned, _, _ = append_cases.step(True, True, True)(q, k, v, cos, sin, keys, values, at)
        return torch.nn.functional.scaled_dot_product_attention(turned, keys, values)

    given = append_cases.inputs((1, 4, 2, 2, 16, 16, True, True, True), torch.float32)
    length = torch.export.Dim("length", min=2, max=9)
    along = [{3: None, 2: length} if name in ("q", "k", "v", "cos", "sin") else None for name in given]
    result = lowered(code, *given.values(), dynamic={"inputs": tuple(along)})
    assert planned(result) == ["append_0"] and "((1, 2, s" in result.source
