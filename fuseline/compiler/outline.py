"""Outlining: a convex set of nodes becomes one call of a subgraph, a *region*, which codegen turns into kernels."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Graph, GraphModule, Node

from .compat_graphs import graph_module
from .program import Program


@dataclass(frozen=True)
class Cut:
    """A region cut out of a graph: its subgraph, the nodes it reads, and the nodes whose values it gives back."""

    module: GraphModule
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]


def cut(program: Program, nodes: Sequence[Node], kind: str) -> Cut:
    """The subgraph of `nodes` (in graph order), regions among them included; the program itself is not changed."""
    members = set(nodes)
    inputs = tuple(dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in members))
    outputs = tuple(n for n in nodes if any(u not in members for u in n.users))
    graph = Graph()
    mapping: dict[Node, Node] = {}
    for node in inputs:
        placeholder = graph.placeholder(node.name)
        placeholder.meta = {k: v for k, v in node.meta.items() if k != "weight"}
        if "weight" in node.meta:
            placeholder.meta["is_weight"] = True
        mapping[node] = placeholder
    for node in nodes:
        mapping[node] = graph.node_copy(node, mapping.__getitem__)
    results = tuple(mapping[n] for n in outputs)
    out = graph.output(results[0] if len(results) == 1 else results)
    out.meta["val"] = tuple(n.meta["val"] for n in outputs) if len(outputs) > 1 else outputs[0].meta["val"]
    inner = {str(n.target): program.module.get_submodule(str(n.target)) for n in nodes if n.op == "call_module"}
    module = graph_module(inner, graph, class_name=kind.title().replace("_", ""))
    module.meta["kind"] = kind
    return Cut(module, inputs, outputs)


def inline(module: GraphModule) -> GraphModule:
    """A copy in which the regions' nodes stand in the graph again."""
    graph = Graph()
    mapping: dict[Node, Node] = {}
    for node in module.graph.nodes:
        if node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), GraphModule):
            inner = module.get_submodule(str(node.target))
            assert isinstance(inner, GraphModule)
            inputs = [n for n in inner.graph.nodes if n.op == "placeholder"]
            inside = {p: mapping[a] for p, a in zip(inputs, node.args, strict=True)}  # type: ignore[index]
            result = graph.graph_copy(inner.graph, inside)
            if isinstance(result, tuple):
                for user in list(node.users):
                    assert user.target is operator.getitem
                    mapping[user] = result[user.args[1]]  # type: ignore[index]
            else:
                mapping[node] = result  # type: ignore[assignment]
        elif node not in mapping:
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
            mapping[node].meta = copy.copy(node.meta)
    return graph_module(module, graph)
