"""Moving kept values to the host's memory in the forward, and fetching them ahead of their readers in the backward."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch.fx import GraphModule, Node

from ...compiler.ops import arrived, from_host, to_host


def move_to_host(names: Collection[str], ahead: int) -> Callable[[GraphModule, GraphModule, int], None]:
    """A rewrite of forward and backward after the split: `names` are the kept values' in both.

    Args:
        ahead: how many values are on their way, or have arrived and wait for their reader, at a time: a block's.
    """

    def rewrite(forward: GraphModule, backward: GraphModule, results: int) -> None:
        moved = [n for n in names if _send(forward, n, results)]
        _fetch(backward, moved, ahead)
        forward.recompile()
        backward.recompile()

    return rewrite


def _send(module: GraphModule, name: str, results: int) -> bool:
    """Has the forward hand out a value's copy on the host in its place, sent off after its last reader."""
    graph = module.graph
    node = next((n for n in graph.nodes if n.name == name), None)
    output = graph.output_node()
    handed = list(output.args[0])  # type: ignore[arg-type]
    if node is None or node not in handed[results:]:
        return False
    order = {n: i for i, n in enumerate(graph.nodes)}
    computed = max((u for u in _readers(node) if u.op != "output"), key=order.__getitem__, default=node)
    with graph.inserting_after(computed):
        sent = graph.call_function(to_host.overload, (node,))
    sent.meta["val"] = torch.empty_like(node.meta["val"], device="cpu")
    output.args = ([*handed[:results], *(sent if n is node else n for n in handed[results:])],)
    return True


def _readers(node: Node) -> list[Node]:
    """Who reads a value, through views too."""
    found, pending = [], [node]
    while pending:
        for user in pending.pop().users:
            found.append(user)
            schema = getattr(user.target, "_schema", None)
            if schema is not None and any(r.alias_info is not None for r in schema.returns):
                pending.append(user)
    return found


def _fetch(module: GraphModule, names: Collection[str], ahead: int) -> None:
    """Has the backward fetch the values one after another: each begins when the reader of the one that is so many
    places before it is reached."""
    graph = module.graph
    body = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    order = {n: i for i, n in enumerate(body)}
    inputs = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    wanted = [inputs[name] for name in names if name in inputs]
    first = {n: min(order[u] for u in n.users if u in order) for n in wanted if any(u in order for u in n.users)}
    queue = sorted(first, key=first.__getitem__)
    for place, node in enumerate(queue):
        value = node.meta["val"]
        lead = body[first[queue[place - ahead]]] if place >= ahead else body[0]
        reader = body[first[node]]
        users = list(node.users)
        with graph.inserting_before(lead):
            here = graph.call_function(from_host.overload, (node, value.device))
        here.meta["val"] = value
        with graph.inserting_before(reader):
            wait = graph.call_function(arrived.overload, (here,))
        wait.meta["val"] = None
        for user in users:
            user.replace_input_with(node, here)
        node.meta["val"] = torch.empty_like(value, device="cpu")
