"""Keeping recomputation where it was planned, once a code generator chooses the order of the backward.

What is computed again depends on saved values alone, so nothing but the order of the graph says when. Inductor fuses
what reads the same tensor, and a rotary table is read by all blocks: the gradient of one block's keys and the keys of
the block before become one kernel, and that block's whole recomputation runs, and waits in memory, before the gradients
are done. Each run of recomputed calls is therefore made to wait for the gradient that stood before it.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from ...compiler.compat import storages
from ...compiler.joint import forward_nodes
from ...compiler.ops import after


def keep_order(forward: GraphModule, backward: GraphModule, results: int) -> None:
    """Has each run of recomputed calls in the backward read saved values `after` the gradient before it.

    A value that was saved is one that the forward hands out behind its `results`; parameters and inputs are not.
    """
    graph = backward.graph
    saved = _saved(forward, backward, results)
    again = set(forward_nodes(backward))
    gradient: Node | None = None
    waits: set[Node] = set()
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node not in again:
            if getattr(node.meta.get("val"), "numel", None) is not None:
                gradient, waits = node, set()
            continue
        if gradient is None:
            continue
        for x in map(_viewed, node.all_input_nodes):
            if x in saved and x not in waits:
                with graph.inserting_before(node):
                    wait = graph.call_function(after.overload, (x, gradient))
                wait.meta["val"] = None
                waits.add(x)
    backward.recompile()


def _viewed(node: Node) -> Node:
    """What a view is of: the value that its storage came with."""
    while node.op == "call_function":
        keys = set(storages(node.meta.get("val")))
        base = next((n for n in node.all_input_nodes if keys & set(storages(n.meta.get("val")))), None)
        if base is None:
            break
        node = base
    return node


def _saved(forward: GraphModule, backward: GraphModule, results: int) -> set[Node]:
    """The backward's inputs that the forward computed."""
    handed = list(forward.graph.output_node().args[0])[results:]  # type: ignore[arg-type]
    computed = {n.name for n in handed if isinstance(n, Node) and n.op == "call_function"}
    return {n for n in backward.graph.nodes if n.op == "placeholder" and n.name in computed}
