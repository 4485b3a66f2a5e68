"""Tiles that run again wait for one another: each for the gradients of the tile behind it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.fx import Node

from fuseline.compiler.joint import forward_nodes
from fuseline.compiler.machine import MACHINES
from fuseline.compiler.views import viewed
from fuseline.models.shapes import Decoder, Shape
from tests.helpers.joint import assert_all_are_waited_for, split_under_inductor


def test_each_tile_waits_for_the_gradients_of_the_one_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by the view of the block's input that it reads: a wait for another tile's would hold nothing back."""
    torch.manual_seed(0)
    model = Decoder(Shape(hidden=32, inner=128, layers=4, heads=4, kv_heads=2, vocabulary=64), loss=False)
    pipeline = "raise{allow_empty},tile{tiles=4},checkpoint{policy=long-context}"
    _, backward = split_under_inductor(model, torch.randint(0, 64, (1, 64)), pipeline, monkeypatch)
    again = set(forward_nodes(backward))
    held: set[Node] = set()
    tiles = 0
    gradient = False
    for node in backward.graph.nodes:
        if "after" in str(node.target):
            held.add(node.args[0])
        elif node.op == "call_function" and node not in again:
            if isinstance(node.meta.get("val"), torch.Tensor) and viewed(node) is node:
                gradient, held = True, set()
        elif node in again and gradient:
            for source in saved_by(node):
                assert source in held, f"{node.name} reads {source.name} whenever it likes"
                tiles += source.meta["val"].shape[-2:] == (16, 32)
    assert tiles >= 3 * 3
    assert_all_are_waited_for(backward)


@pytest.mark.parametrize("symbolic", [False, True])
def test_what_goes_to_the_host_leaves_no_view_behind(symbolic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles read views of a block's input; handed out by the forward, each would keep the whole of it."""
    torch.manual_seed(0)
    model = Decoder(Shape(hidden=32, inner=128, layers=5, heads=4, kv_heads=2, vocabulary=64), loss=False)
    ids = torch.randint(0, 64, (1, 64))
    if symbolic:
        torch._dynamo.mark_dynamic(ids, 1)
    monkeypatch.setitem(MACHINES, "cpu", replace(MACHINES["cpu"], flops_32=1e3))  # there is time enough to copy
    pipeline = "raise{allow_empty},tile{tiles=4},checkpoint{policy=full,offload=cpu}"
    forward, backward = split_under_inductor(model, ids, pipeline, monkeypatch)
    handed = [n for n in forward.graph.output_node().args[0] if isinstance(n, Node)]
    sent = [n.args[0] for n in handed if "to_host" in str(n.target)]
    assert len(sent) >= 3
    assert not {viewed(n) for n in handed} & {*sent}
    given = [n for n in backward.graph.nodes if n.op == "placeholder" and not n.name.startswith("tangents")]
    assert len(given) == len(handed) - 1
    fetched = [n for n in backward.graph.nodes if "from_host" in str(n.target)]
    assert all(sum(viewed(u) is n and u.op == "call_function" for u in n.users) for n in fetched)
    assert_all_are_waited_for(backward)


def saved_by(node: Node) -> list[Any]:
    """Saved values that a node reads, not through others."""
    given = [n for n in node.all_input_nodes if n.op == "placeholder"]
    return [n for n in given if not n.name.startswith(("primals", "tangents", "rng"))]
