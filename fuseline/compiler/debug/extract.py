"""Extraction: some nodes of a program as a program of their own, whose inputs are what they read of the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..compat import storages
from ..normalize import functionalize
from ..program import Program, Source
from .values import Values


def calls(program: Program) -> list[Node]:
    """The nodes that compute: what a reduced program is counted in."""
    return [n for n in program.graph.nodes if n.op in ("call_function", "call_module")]


def results(program: Program) -> list[Node]:
    """The nodes that a program gives back, each once."""
    return list(dict.fromkeys(program.graph.output_node().all_input_nodes))


def extract(
    program: Program,
    keep: Collection[str],
    values: Values | None,
    outputs: Collection[str] | None = None,
    escaping: bool = False,
) -> Program | None:
    """The nodes named in `keep`, as a program.

    Args:
        values: of the program's nodes, for the new inputs; None gives a program without examples.
        outputs: names of the nodes to give back; None: those that nothing in `keep` reads.
        escaping: also give back what only nodes outside of `keep` read.

    Returns None where nothing is left: the nodes read what can be no input (a tuple), or compute no tensor.
    """
    members = _closed(program, keep)
    back = _outputs(program, members, outputs, escaping)
    members = _alive(members, back)
    back = [n for n in back if n in members or (outputs is not None and n.op == "placeholder")]
    if not members or not back:
        return None
    needed = dict.fromkeys(i for n in members for i in n.all_input_nodes if i not in members)
    needed.update(dict.fromkeys(n for n in back if n not in members))
    weights = [n for n in needed if n.op == "get_attr"]
    inputs = [n for n in needed if n.op != "get_attr" and not _is_number(n)]

    graph = Graph()
    new: dict[Node, Any] = {n: n.meta["val"] for n in needed if _is_number(n)}
    for node in inputs:
        new[node] = graph.placeholder(node.name)
        new[node].meta = {k: v for k, v in node.meta.items() if k != "written"}
    for node in (*weights, *members):
        new[node] = graph.node_copy(node, lambda n: new[n])
        new[node].meta.pop("written", None)
    output = graph.output(tuple(new[n] for n in back))
    output.meta["val"] = tuple(n.meta["val"] for n in back)
    if any("written" in n.meta for n in program.graph.nodes):
        functionalize(graph)
    return _assemble(program, graph, inputs, [new[n] for n in inputs], [new[n] for n in weights], values)


def _assemble(
    program: Program,
    graph: Graph,
    inputs: list[Node],
    placeholders: list[Node],
    weights: list[Node],
    values: Values | None,
) -> Program:
    names = dict.fromkeys(name for n in weights for name in n.meta["weight"].parameters())
    sources: dict[str, Source] = {}
    for position, name in enumerate(names, len(inputs)):
        sources[name] = replace(program.sources[name], index=position)
    flat: list[Any] | None = None
    if values is not None and program.examples is not None:
        found = values.of(inputs)
        flat = [found[n.name] for n in inputs] + [program.examples[program.sources[name].index] for name in names]
    written = _written(graph)
    mutated = {n.name for n in placeholders if set(storages(n.meta["val"])) & written}
    return Program(
        GraphModule(program.module, graph),
        program.fake_mode,
        list(range(len(inputs))),
        sources,
        frozenset(mutated),
        program.training,
        flat,
        program.state,
    )


def _closed(program: Program, keep: Collection[str]) -> dict[Node, None]:
    """The computing nodes of these names, without those that read what can be no input."""
    members: dict[Node, None] = {}
    for node in calls(program):
        if node.name in keep and all(i in members or _is_value(i) for i in node.all_input_nodes):
            members[node] = None
    return members


def _outputs(
    program: Program, members: dict[Node, None], outputs: Collection[str] | None, escaping: bool
) -> list[Node]:
    if outputs is not None:
        return [n for n in results(program) if n.name in outputs]
    tensors = [n for n in members if isinstance(n.meta.get("val"), torch.Tensor)]
    last = [n for n in tensors if not any(u in members for u in n.users)]
    if not escaping:
        return last
    return [n for n in tensors if n in last or any(u not in members for u in n.users)]


def _alive(members: dict[Node, None], back: Iterable[Node]) -> dict[Node, None]:
    """The members that a result needs, and those that write."""
    needed = set(back)
    for node in reversed(members):
        schema = getattr(node.target, "_schema", None)
        if node in needed or (schema is not None and schema.is_mutable):
            needed.add(node)
            needed.update(node.all_input_nodes)
    return {n: None for n in members if n in needed}


def _is_value(node: Node) -> bool:
    """Whether a node's value can be an input: a tensor, a size or a number."""
    value = node.meta.get("val")
    return isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat)) or _is_number(node)


def _is_number(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (bool, int, float)) and node.op != "get_attr"


def _written(graph: Graph) -> set[int]:
    """The storages that some node writes to."""
    found: set[int] = set()
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        for position, argument in enumerate(schema.arguments):
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write:
                for one in torch.utils._pytree.tree_leaves(value):
                    found.update(storages(one.meta.get("val")) if isinstance(one, Node) else ())
    return found
