"""A model's joint graph, and a step of training by a split of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._guards import TracingContext, tracing
from torch.fx import GraphModule, Node

import fuseline.passes.checkpointing as checkpointing
from fuseline.compiler.action import Observer
from fuseline.compiler.compat_joint import is_backward, joint_graph
from fuseline.compiler.joint import Joint, joint_program
from fuseline.compiler.ops import after
from fuseline.compiler.pipeline import Pipeline
from fuseline.compiler.program import Program
from fuseline.compiler.report import Report
from fuseline.compiler.views import viewed


class Traced:
    """A model's joint graph, with its parameters and inputs in the graph's order."""

    def __init__(self, model: torch.nn.Module, *inputs: torch.Tensor, fused: bool = False):
        self.names = [n for n, _ in model.named_parameters()]
        self.values = [*(p for _, p in model.named_parameters()), *inputs]
        count = len(self.names)

        def function(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            state = dict(zip(self.names, values[:count], strict=True))
            out = torch.func.functional_call(model, state, values[count:])
            return out if isinstance(out, tuple) else (out,)

        torch.manual_seed(0)
        self.graph = joint_graph(function, self.values)
        self.results = len([n for n in self.graph.graph.nodes if "tangents" in str(n.target)])
        self.fused = fused

    def program(self) -> Program:
        """The joint graph as a program of its own."""
        return joint_program(self.graph, self.fused, self.results).copy()

    def split(self, pipeline: str, observers: tuple[Observer, ...] = ()) -> tuple[GraphModule, GraphModule, Joint]:
        """Forward and backward as a pipeline of joint passes decides."""
        joint = Joint(Pipeline(pipeline), self.fused, observers, "quick", Report(pipeline))
        program = self.program()
        with tracing(TracingContext(program.fake_mode)):
            forward, backward = joint.split(program.module, [], num_fwd_outputs=self.results)
        return forward, backward, joint

    def step(self, forward: GraphModule, backward: GraphModule, seed: int = 0) -> list[torch.Tensor]:
        """The function's results and all gradients, for gradients of ones."""
        torch.manual_seed(seed)
        with torch.no_grad():
            given = [v.detach() for v in self.values]
            out = forward(*given)
            results, kept = list(out[: self.results]), list(out[self.results :])
            sizes = [v for v in kept if not isinstance(v, torch.Tensor)]
            tensors = [v for v in kept if isinstance(v, torch.Tensor)]
            tangents = [torch.ones_like(r) for r in results]
            torch.manual_seed(seed + 1)  # nothing that is drawn here may reach a recomputation
            gradients = backward(*sizes, *tensors, *tangents)
        return [*results, *(g for g in gradients if g is not None)]


class Split(Exception):
    """Ends a compilation once forward and backward are apart."""


def split_under_inductor(
    model: torch.nn.Module, ids: torch.Tensor, pipeline: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[GraphModule, GraphModule]:
    """Forward and backward of a model that is compiled for Inductor, as `checkpoint` hands them over in the order it
    keeps, with what is made again."""
    torch.compiler.reset()
    found: list[tuple[GraphModule, GraphModule]] = []
    ordered, remade = checkpointing.keep_order, checkpointing.remake

    def keep_order(forward: GraphModule, backward: GraphModule, results: int) -> None:
        ordered(forward, backward, results)
        found.append((forward, backward))

    def remake(backward: GraphModule) -> None:
        remade(backward)
        raise Split

    monkeypatch.setattr(checkpointing, "keep_order", keep_order)
    monkeypatch.setattr(checkpointing, "remake", remake)
    with pytest.raises(Exception, match="Split"):
        torch.compile(model, backend="fuseline", options={"pipeline": pipeline, "target": "inductor"})(ids)
    return found[0]


def uncheckpointed(traced: Traced) -> list[torch.Tensor]:
    """The results and gradients of a step by PyTorch's default split."""
    from torch._functorch.partitioners import default_partition

    module = traced.program().module
    forward, backward = default_partition(module, [], num_fwd_outputs=traced.results)
    return traced.step(forward, backward)


def agree(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    """Bit for bit."""
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs))


def kept(backward: GraphModule) -> list[Node]:
    """What a backward is given besides parameters, inputs and gradients."""
    placeholders = [n for n in backward.graph.nodes if n.op == "placeholder"]
    return [n for n in placeholders if not str(n.target).startswith(("primals", "tangents"))]


def assert_all_are_waited_for(backward: GraphModule) -> None:
    """Whoever reads a saved value behind a wait comes after all gradients that stand before the wait, whatever order
    code generation chooses: by what it reads, and what that waited for."""
    before: dict[Node, set[Node]] = {}  # of each node, what comes before it in every order
    held: dict[Node, set[Node]] = {}  # of each saved value, what its later readers come after
    made: set[Node] = set()
    for node in backward.graph.nodes:
        read = [viewed(x) for x in node.all_input_nodes]
        before[node] = set().union(*({x} | before[x] | held.get(x, set()) for x in (*node.all_input_nodes, *read)))
        if node.target is after.overload:
            assert isinstance(read[0].meta["val"], torch.Tensor)
            held[read[0]] = before[node]
            left = made - before[node]
            assert not left, f"{node.args[0]} does not wait for {left}"
        elif (
            node.op == "call_function"
            and is_backward(node)
            and isinstance(node.meta.get("val"), torch.Tensor)
            and viewed(node) is node
        ):
            made.add(node)


def count(nodes: Any, word: str) -> int:
    """How many calls have an op of that name."""
    return sum(word in str(n.target) for n in nodes if n.op == "call_function")


Model = Callable[[], torch.nn.Module]
