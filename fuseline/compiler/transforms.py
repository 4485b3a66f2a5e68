"""Resolving `torch.vmap` and `torch.func` transforms before capture.

Dynamo writes such a transform into its graph as calls that open and close a level (`_vmap_increment_nesting`, then
`_add_batch_dim` on each input, …). What runs between them runs on wrapped tensors, which a tracer above the dispatcher
does not see. Each stretch from the outermost opening to its closing is therefore traced by itself below the transforms,
into plain ATen ops on plain tensors, and takes the stretch's place.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import Any

from torch.fx import Graph, GraphModule, Node

from . import compat
from .compat_graphs import graph_module
from .inliner import Inliner

_OPENS = re.compile(r"_(vmap|grad|jvp)_increment_nesting$")
_CLOSES = re.compile(r"_(vmap|grad|jvp)_decrement_nesting$")


def resolve_transforms(module: GraphModule, fakes: Sequence[Any], mode: Any) -> GraphModule:
    """`module` with every transform resolved; the same object where it has none. `fakes`: its inputs' fake values."""
    if not stretches(module.graph):
        return module
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    module = graph_module(module, graph)
    found = stretches(module.graph)
    recorder = _Recorder(module, {n for stretch in found for n in _entering(stretch)})
    with mode:
        recorder.run(*fakes)
    for number, stretch in enumerate(found):
        _replace(module, stretch, recorder.values, mode, f"transformed_{number}")
    module.recompile()
    return module


def stretches(graph: Graph) -> list[list[Node]]:
    """The nodes from each outermost opening of a transform to its closing, in order."""
    found: list[list[Node]] = []
    depth = 0
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        if _OPENS.search(name):
            if depth == 0:
                found.append([])
            depth += 1
        if depth:
            found[-1].append(node)
        if _CLOSES.search(name):
            depth -= 1
    return found


class _Recorder(Inliner):
    """Keeps what the wanted nodes hold."""

    def __init__(self, module: GraphModule, wanted: set[Node]):
        super().__init__(module)
        self.wanted, self.values = wanted, dict[Node, Any]()

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.values[n] = value
        return value


def _entering(stretch: list[Node]) -> list[Node]:
    inside = set(stretch)
    return list(dict.fromkeys(n for node in stretch for n in node.all_input_nodes if n not in inside))


def _replace(module: GraphModule, stretch: list[Node], values: dict[Node, Any], mode: Any, name: str) -> None:
    graph, inside = module.graph, set(stretch)
    inputs = _entering(stretch)
    outputs = [n for n in stretch if any(user not in inside for user in n.users)]

    def body(*given: Any) -> list[Any]:
        runner = Inliner(module)
        runner.env = dict(zip(inputs, given, strict=True))
        for node in stretch:
            runner.env[node] = runner.run_node(node)
        return [runner.env[n] for n in outputs]

    setattr(module, name, compat.trace_below_transforms(body, [values[n] for n in inputs], mode))
    with graph.inserting_before(stretch[0]):
        call = graph.call_module(name, tuple(inputs))
        call.meta = {k: v for k, v in stretch[-1].meta.items() if k in ("stack_trace", "nn_module_stack", "custom")}
        for position, node in enumerate(outputs):
            item = graph.call_function(operator.getitem, (call, position))
            item.meta = dict(node.meta)
            if node in values:  # it enters a later stretch
                values[item] = values[node]
            node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in inside)
    for node in reversed(stretch):
        graph.erase_node(node)
