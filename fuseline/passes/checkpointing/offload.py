"""Moving kept values to the host's memory in the forward, and fetching them ahead of their readers in the backward."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Mapping
from itertools import accumulate

import torch
from torch.fx import GraphModule, Node

from ...compiler.ops import arrived, from_host, to_host
from ...compiler.views import readers, viewed, views

MARGIN = 2.0
"""How many times what its copy takes a value is sent for before its reader: times are the cost model's."""

Seconds = Callable[[Node], float]


def move_to_host(
    names: Collection[str], ahead: int, takes: Seconds, arrives: Seconds
) -> Callable[[GraphModule, GraphModule, int], None]:
    """A rewrite of forward and backward after the split: `names` are the kept values' in both.

    Args:
        ahead: how many values are on their way, or have arrived and wait for their reader, at most: a block's.
        takes: the seconds of a call.
        arrives: the seconds that the copy of a value takes.
    """

    def rewrite(forward: GraphModule, backward: GraphModule, results: int) -> None:
        for name in names:
            _view_again(forward, backward, name, results)
        moved = [n for n in names if _send(forward, n, results)]
        _fetch(backward, moved, ahead, takes, arrives)
        forward.recompile()
        backward.recompile()

    return rewrite


def _view_again(forward: GraphModule, backward: GraphModule, name: str, results: int) -> None:
    """Has the backward make its views of a value from that value: views that the forward hands out would keep the
    memory. One that takes sizes which the backward cannot tell stays."""
    output = forward.graph.output_node()
    handed = list(output.args[0])  # type: ignore[arg-type]
    node = next((n for n in handed[results:] if isinstance(n, Node) and n.name == name), None)
    order = {n: i for i, n in enumerate(backward.graph.nodes)}
    known = {n.name: n for n in order if n.op == "placeholder"}
    if node is None or name not in known:
        return
    made: dict[Node, Node] = {node: known[name]}
    found = [n for n in handed[results:] if isinstance(n, Node) and n is not node and viewed(n) is node]
    first = {
        n: min(known[n.name].users, key=order.__getitem__) for n in found if n.name in known and known[n.name].users
    }
    for view, reader in sorted(first.items(), key=lambda pair: order[pair[1]]):
        chain = _missing(view, made, known)
        if chain is None:
            continue
        with backward.graph.inserting_before(reader):
            for one in chain:
                made[one] = backward.graph.node_copy(one, lambda n: made.get(n) or known[n.name])
        given = known.pop(view.name)
        given.replace_all_uses_with(made[view])
        backward.graph.erase_node(given)
        handed.remove(view)
    output.args = (handed,)


def _missing(view: Node, made: Mapping[Node, Node], known: Mapping[str, Node]) -> list[Node] | None:
    """The calls that make a view and the sizes it takes, in order, from what is made and known; None if a value of
    another kind is among them."""
    through = set(views(view))
    chain: dict[Node, None] = {}
    pending = [view]
    while pending:
        node = pending.pop()
        left = [n for n in node.all_input_nodes if n not in made and n not in chain]
        left = [n for n in left if n.name not in known or n in through]
        if any(n.op != "call_function" or not (n in through or _is_size(n)) for n in left):
            return None
        if left:
            pending += [node, *left]
        else:
            chain[node] = None
    return list(chain)


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def _send(module: GraphModule, name: str, results: int) -> bool:
    """Has the forward hand out a value's copy on the host in its place, sent off after its last reader."""
    graph = module.graph
    node = next((n for n in graph.nodes if n.name == name), None)
    output = graph.output_node()
    handed = list(output.args[0])  # type: ignore[arg-type]
    if node is None or node not in handed[results:]:
        return False
    order = {n: i for i, n in enumerate(graph.nodes)}
    computed = max((u for u in readers(node) if u.op != "output"), key=order.__getitem__, default=node)
    with graph.inserting_after(computed):
        sent = graph.call_function(to_host.overload, (node,))
    sent.meta["val"] = torch.empty_like(node.meta["val"], device="cpu")
    output.args = ([*handed[:results], *(sent if n is node else n for n in handed[results:])],)
    return True


def _fetch(module: GraphModule, names: Collection[str], ahead: int, takes: Seconds, arrives: Seconds) -> None:
    """Has the backward fetch the values one after another, each as late as it still arrives in time, and not before the
    reader of the one that is `ahead` places before it is reached."""
    graph = module.graph
    body = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    order = {n: i for i, n in enumerate(body)}
    inputs = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    wanted = [inputs[name] for name in names if name in inputs]
    first = {n: min(order[u] for u in n.users if u in order) for n in wanted if any(u in order for u in n.users)}
    queue = sorted(first, key=first.__getitem__)
    begins = list(accumulate(map(takes, body), initial=0.0))
    leads: list[int] = []
    due = begins[-1]
    for node in reversed(queue):
        due = min(due, begins[first[node]]) - MARGIN * arrives(node)
        leads.append(min(max(bisect.bisect_right(begins, due) - 1, 0), first[node]))
    for place, (node, late) in enumerate(zip(queue, reversed(leads), strict=True)):
        value = node.meta["val"]
        lead = body[max(late, first[queue[place - ahead]]) if place >= ahead else late]
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
