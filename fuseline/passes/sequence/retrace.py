"""From a program to one rank's program: run under a tracer, parameters lifted to inputs and put back as weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ...compiler import compat
from ...compiler.inliner import Inliner
from ...compiler.normalize import clean, mark_autocast
from ...compiler.program import Program


class Again(Inliner):
    """The program as it stands, with other values for its weights."""

    def __init__(self, program: Program, weights: dict[Node, torch.Tensor]):
        super().__init__(program.module)
        self.weights = weights

    def run_node(self, n: Node) -> Any:
        return self.weights[n] if n.op == "get_attr" else super().run_node(n)


def retrace(program: Program, run: Callable[[Sequence[Any], dict[Node, torch.Tensor]], Any]) -> GraphModule:
    """The graph of `run`, a function of the placeholders' values and of the weights' by node, that returns the flat
    outputs. Weight nodes keep their names and expressions."""
    weights = program.weights()
    inputs = program.placeholders
    wanting = _wanting_gradients(program)
    fakes = [_as_given(n.meta["val"], n in wanting) for n in (*inputs, *weights)]

    def flat(*values: Any) -> Any:
        return run(values[: len(inputs)], dict(zip(weights, values[len(inputs) :], strict=True)))

    with torch.enable_grad() if program.training else torch.no_grad():
        traced = compat.trace(flat, fakes, program.fake_mode)
    graph: Graph = traced.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    body = next(n for n in graph.nodes if n.op != "placeholder")
    for node, origin in zip(placeholders, (*inputs, *weights), strict=True):
        if origin.op == "placeholder":
            node._rename(origin.name)
            node.target = node.name
            node.meta = dict(origin.meta)
            continue
        name = str(origin.target)
        traced.register_buffer(name, origin.meta["val"], persistent=False)
        if node.users:
            with graph.inserting_before(body):
                weight = graph.get_attr(name)
            weight.meta = dict(origin.meta)
            node.replace_all_uses_with(weight)
        graph.erase_node(node)
    clean(graph, program.training)
    mark_autocast(graph)
    traced.meta.update(program.module.meta)
    traced.recompile()
    return traced


def _wanting_gradients(program: Program) -> set[Node]:
    """Inputs and weights that gradients are wanted for: fake values in a graph no longer tell."""
    if not program.training:
        return set()
    examples = program.examples or ()
    found = {
        node
        for node, position in zip(program.placeholders, program.arguments, strict=True)
        if position < len(examples) and getattr(examples[position], "requires_grad", False)
    }
    for node in program.weights():
        if any(program.sources[name].trainable for name in node.meta["weight"].parameters()):
            found.add(node)
    return found


def _as_given(value: Any, wants_gradient: bool) -> Any:
    return value.detach().requires_grad_() if wants_gradient and value.is_floating_point() else value
