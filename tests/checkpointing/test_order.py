"""Recomputed calls stay where they were planned when a code generator chooses the order of the backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Node

import fuseline.passes.checkpointing as checkpointing
from fuseline.compiler import compat_joint
from fuseline.compiler.compat_joint import is_backward
from fuseline.compiler.costs import cost
from fuseline.compiler.machine import MACHINES
from fuseline.compiler.ops import arrived, from_host
from fuseline.models.shapes import Decoder, Shape
from fuseline.passes.checkpointing import offload, policies
from tests.checkpointing.test_exact import Dropping
from tests.helpers.joint import Traced, agree, assert_all_are_waited_for, uncheckpointed


def traced(**given: Any) -> Traced:
    torch.manual_seed(0)
    model = Decoder(Shape(hidden=32, inner=64, layers=3, heads=4, kv_heads=2, vocabulary=128), loss=False)
    return Traced(model, torch.randint(0, 128, (1, 16)), **given)


def waits(graph: torch.fx.Graph) -> list[Node]:
    return [n for n in graph.nodes if "after" in str(n.target)]


def test_each_block_waits_for_the_gradients_of_the_one_behind_it() -> None:
    given = traced(fused=True)
    forward, backward, _ = given.split("checkpoint{policy=long-context}")
    order = {n: i for i, n in enumerate(backward.graph.nodes)}
    found = waits(backward.graph)
    assert len({tuple(wait.args[1]) for wait in found}) >= 2  # three blocks; the last one's comes before all gradients
    for wait in found:
        saved, others = wait.args
        assert isinstance(saved, Node) and others
        assert saved.op == "placeholder" and not saved.name.startswith("primals")
        assert all(is_backward(n) and order[n] < order[wait] for n in others)
        assert any(order[u] > order[wait] for u in saved.users)
    assert_all_are_waited_for(backward)
    assert not waits(forward.graph)
    assert agree(given.step(forward, backward), uncheckpointed(given))


def test_what_comes_from_the_host_waits_too() -> None:
    given = Traced(nn.Sequential(*(Dropping(rate=0.0) for _ in range(6))), torch.randn(2, 12, 16), fused=True)
    forward, backward, _ = given.split("checkpoint{policy=full,offload=cpu}")
    fetched = [n for n in backward.graph.nodes if "from_host" in str(n.target)]
    held = {wait.args[0] for wait in waits(backward.graph)}
    assert len(fetched) >= 4
    assert fetched[0].args[0] not in held  # the last block's begins with the backward
    assert all(n.args[0] in held for n in fetched[1:])
    assert all(n in held for n in fetched)  # and their readers wait
    sent = [n for n in forward.graph.nodes if "to_host" in str(n.target)]
    assert [(w.args[0], w.args[1]) for w in waits(forward.graph)] == [(n.args[0], [n]) for n in sent]
    assert agree(given.step(forward, backward), uncheckpointed(given))


def test_eager_runs_the_graph_in_its_order_and_needs_no_waiting() -> None:
    _, backward, _ = traced(fused=False).split("checkpoint{policy=long-context}")
    assert not waits(backward.graph)


@pytest.mark.parametrize("host", [1e3, 1e6, 1e12])
def test_values_come_from_the_host_as_late_as_they_are_in_time(monkeypatch: pytest.MonkeyPatch, host: float) -> None:
    """Half as fast as they should be they would still arrive, but for those that no earlier call is left for, or that a
    block's worth of others is still before."""
    monkeypatch.setitem(MACHINES, "cpu", replace(MACHINES["cpu"], host=host))
    given = Traced(nn.Sequential(*(Dropping(rate=0.0) for _ in range(6))), torch.randn(2, 12, 16), fused=True)
    monkeypatch.setattr(policies, "host_bytes", lambda problem: 1e9)
    forward, backward, joint = given.split("checkpoint{policy=full,offload=cpu}")
    body = [n for n in backward.graph.nodes if n.op == "call_function"]
    fetched = [i for i, n in enumerate(body) if n.target is from_host.overload]
    early = 0
    for place, i in enumerate(fetched):
        value = body[i].meta["val"]
        wait = body.index(next(u for u in body[i].users if u.target is arrived.overload))
        takes = lambda j: sum(cost(n).seconds(MACHINES["cpu"], float) for n in body[i:j])  # noqa: B023
        needed = 2 * value.numel() * value.element_size() / host
        early += takes(wait) >= needed
        assert place == 0 or takes(wait) < 3 * needed + 1e-4, "it lies there for long"
    assert early >= (len(fetched) - 2 if host > 1e9 else 0)
    assert agree(given.step(forward, backward), uncheckpointed(given))


def peak(pipeline: str, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the second step under Inductor on the CPU, at most, above those before it."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Decoder(Shape(hidden=64, inner=256, layers=4, heads=4, kv_heads=2, vocabulary=128), loss=False).to(dtype)
    ids = torch.randint(0, 128, (1, 1024))
    run = torch.compile(model, backend="fuseline", options={"pipeline": pipeline, "target": "inductor"})
    run(ids).square().mean().backward()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run(ids).square().mean().backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.slow
def test_inductor_holds_no_other_blocks_values(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = "raise{allow_empty},checkpoint{policy=full}"
    kept = peak(pipeline)
    monkeypatch.setattr(checkpointing, "keep_order", lambda forward, backward, results: None)
    assert kept <= peak(pipeline)
    monkeypatch.setattr(compat_joint, "IN_ORDER", {})
    assert kept < 0.85 * peak(pipeline)


def test_a_value_that_takes_no_time_to_arrive_still_comes_before_its_reader() -> None:
    graph = torch.fx.Graph()
    kept, gradient = graph.placeholder("kept"), graph.placeholder("tangents_1")
    product = graph.call_function(torch.ops.aten.mm.default, (gradient, gradient))
    view = graph.call_function(torch.ops.aten.t.default, (kept,))
    graph.output((graph.call_function(torch.ops.aten.mm.default, (view, product)),))
    for n in graph.nodes:
        n.meta["val"] = torch.empty(2, 2)
    backward = torch.fx.GraphModule(torch.nn.Module(), graph)
    for takes, arrives in ((0.0, 0.0), (1e9, 1e-9)):
        module = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
        module.graph.output(module.graph.graph_copy(backward.graph, {}))
        offload._fetch(module, ["kept"], 1, lambda n, takes=takes: takes * ("mm" in str(n.target)), lambda n: arrives)  # noqa: B023
        module.graph.lint()
        assert [str(n.target).split(".")[0] for n in module.graph.nodes].count("fuseline") == 2
