"""What pointwise operations make of a kept value is made again behind each wait on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule, Node

import fuseline.passes.checkpointing as checkpointing
from fuseline.compiler.machine import MACHINES
from fuseline.compiler.ops import after
from fuseline.compiler.remade import source
from fuseline.compiler.views import viewed
from fuseline.models.shapes import Decoder, Shape
from fuseline.passes.checkpointing import remake
from tests.checkpointing.test_order import peak
from tests.helpers.joint import assert_all_are_waited_for, split_under_inductor

aten, prims = torch.ops.aten, torch.ops.prims
HOST = "raise{allow_empty},tile{tiles=4},checkpoint{policy=full,offload=cpu}"


class Written:
    """A backward graph, call by call, with fake values by running them on meta tensors."""

    def __init__(self, **inputs: torch.Tensor):
        self.graph = Graph()
        self.inputs = {name: self.graph.placeholder(name) for name in inputs}
        for name, node in self.inputs.items():
            node.meta["val"] = inputs[name].to("meta")

    def call(self, target: Any, *args: Any) -> Node:
        node = self.graph.call_function(target, args)
        values = torch.fx.map_arg(args, lambda n: n.meta["val"])
        node.meta["val"] = None if target is after.overload else target(*values)
        return node

    def module(self, *results: Node) -> GraphModule:
        self.graph.output(results)
        return GraphModule(torch.nn.Module(), self.graph)


def test_a_cast_and_a_norm_are_made_again_from_what_they_read() -> None:
    """Once for all readers between two waits, with what is small taken as it is."""
    w = Written(x=torch.randn(1, 32, 64), scale=torch.randn(64), tangents_1=torch.randn(1, 32, 64))
    x, gradient = w.inputs["x"], w.inputs["tangents_1"]
    wide = w.call(prims.convert_element_type.default, x, torch.float64)
    root = w.call(aten.rsqrt.default, w.call(aten.mean.dim, w.call(aten.mul.Tensor, wide, wide), [-1], True))
    unit = w.call(aten.mul.Tensor, wide, root)
    normed = w.call(aten.mul.Tensor, unit, w.inputs["scale"])
    first = w.call(aten.mul.Tensor, normed, gradient)
    w.call(after.overload, x, [first])
    second, third = w.call(aten.add.Tensor, normed, first), w.call(aten.sub.Tensor, unit, first)
    w.call(after.overload, x, [third])
    last = w.call(aten.mul.Tensor, wide, third)
    module = w.module(first, second, third, last)
    values = [torch.randn(1, 32, 64), torch.randn(64), torch.randn(1, 32, 64)]
    wanted = module(*values)
    remake(module)
    module.graph.lint()
    assert all(torch.equal(a, b) for a, b in zip(module(*values), wanted, strict=True))
    order = {n: i for i, n in enumerate(module.graph.nodes)}
    waits = [order[n] for n in order if n.target is after.overload]
    for node in order:
        if node.op == "call_function" and node.target in (prims.convert_element_type.default, aten.mul.Tensor):
            if node not in (first, last) and node is not root:
                crossed = {sum(i < order[n] for i in waits) for n in (node, *node.users)}
                assert len(crossed) == 1 or node.args[0] is node.args[1], f"{node} is held across a wait"
    assert sum(n.target is aten.rsqrt.default for n in order) == 1
    assert sum(n.target is prims.convert_element_type.default for n in order) == 3


def test_what_reads_another_large_value_is_held() -> None:
    w = Written(x=torch.randn(1, 32, 64), y=torch.randn(1, 32, 64), tangents_1=torch.randn(1, 32, 64))
    x, y, gradient = w.inputs.values()
    both = w.call(aten.add.Tensor, x, y)
    first = w.call(aten.mul.Tensor, both, gradient)
    w.call(after.overload, x, [first])
    last = w.call(aten.mul.Tensor, both, first)
    module = w.module(first, last)
    assert source(both, {}) is None
    remake(module)
    assert last.args == (both, first)


def test_random_numbers_are_not_drawn_again() -> None:
    w = Written(x=torch.randn(4, 8))
    drawn = w.call(aten.rand_like.default, w.inputs["x"])
    product = w.call(aten.mm.default, drawn, w.call(aten.t.default, drawn))
    assert source(drawn, {}) is None and source(product, {}) is None


def backward_of(monkeypatch: pytest.MonkeyPatch) -> GraphModule:
    torch.manual_seed(0)
    model = Decoder(Shape(hidden=32, inner=128, layers=5, heads=4, kv_heads=2, vocabulary=64), loss=False)
    monkeypatch.setitem(MACHINES, "cpu", replace(MACHINES["cpu"], flops_32=1e3))  # there is time enough to copy
    return split_under_inductor(model.to(torch.bfloat16), torch.randint(0, 64, (1, 64)), HOST, monkeypatch)[1]


def test_tiles_hold_nothing_that_their_blocks_input_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    backward = backward_of(monkeypatch)
    order = {n: i for i, n in enumerate(backward.graph.nodes)}
    waits: dict[Node, list[int]] = {}
    for node in order:
        if node.target is after.overload:
            waits.setdefault(viewed(node.args[0]), []).append(order[node])
    casts = [n for n in order if n.target is prims.convert_element_type.default and viewed(n.args[0]) in waits]
    whole = [n for n in casts if n.meta["val"].shape == (1, 64, 32)]
    assert len(whole) >= 2 * 4  # at the start of each block's recomputation, and at its end
    for cast in whole:
        crossed = [i for i in waits[viewed(cast.args[0])] if order[cast] < i < max(order[u] for u in cast.users)]
        assert not crossed, f"{cast} is held across {len(crossed)} waits"
    assert_all_are_waited_for(backward)


@pytest.mark.slow
def test_inductor_holds_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies on the host are in this memory, too: what is saved is four times a block's input, in bfloat16."""
    monkeypatch.setitem(MACHINES, "cpu", replace(MACHINES["cpu"], flops_32=1e6))
    remade = peak(HOST, torch.bfloat16)
    monkeypatch.setattr(checkpointing, "remake", lambda backward: None)
    assert remade < peak(HOST, torch.bfloat16) - 2 * (1024 * 64 * 2)
