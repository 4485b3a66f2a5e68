"""Order of execution: who must run before whom, writes in place included, and a stable topological sort.

Dataflow alone does not order a read of a KV cache after the write to it: the cache is an input of both. Nodes that
touch a storage which the graph writes to therefore keep their order.
"""

from __future__ import annotations

import heapq

from torch.fx import Graph, Node


def touches_written(node: Node) -> bool:
    """Whether a node writes to, or reads from, a storage that the graph writes to."""
    return bool(node.meta.get("written")) or any(n.meta.get("written") for n in node.all_input_nodes)


def is_barrier(node: Node) -> bool:
    """A node with an effect beyond its result (grad mode, autocast): nothing moves across it."""
    return node.op == "call_function" and node.is_impure() and not touches_written(node)


def dependencies(graph: Graph) -> dict[Node, list[Node]]:
    """For each node, the nodes that must run before it: its inputs, and earlier effects on the same storages."""
    found: dict[Node, list[Node]] = {}
    last_write: Node | None = None
    last_barrier: Node | None = None
    since: list[Node] = []
    for node in graph.nodes:
        before = list(node.all_input_nodes)
        if touches_written(node) and node.op not in ("placeholder", "output"):
            if last_write is not None:
                before.append(last_write)
            last_write = node
        if is_barrier(node):
            before += since
            since, last_barrier = [], node
        elif last_barrier is not None:
            before.append(last_barrier)
        since.append(node)
        found[node] = before
    return found


class Reachability:
    """Which nodes lie downstream of which, kept as bit sets; for the convexity of regions."""

    def __init__(self, graph: Graph):
        self.index = {node: i for i, node in enumerate(graph.nodes)}
        self.ancestors: dict[Node, int] = {}
        self.before = dependencies(graph)
        for node in graph.nodes:
            bits = 0
            for source in self.before[node]:
                bits |= self.ancestors[source] | 1 << self.index[source]
            self.ancestors[node] = bits

    def depends(self, node: Node, on: Node) -> bool:
        """Whether `node` needs `on`, at any distance."""
        return bool(self.ancestors[node] >> self.index[on] & 1)

    def convex(self, nodes: set[Node]) -> bool:
        """Whether no path leaves `nodes` and comes back: they can run as one."""
        members = 0
        for node in nodes:
            members |= 1 << self.index[node]
        for node in nodes:
            for source in self.before[node]:
                if source not in nodes and self.ancestors[source] & members:
                    return False
        return True


def sort(graph: Graph) -> None:
    """Puts nodes in dependency order, otherwise as they are.

    Call it while writes in place still stand in the order that they had at capture.
    """
    nodes = list(graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    before = dependencies(graph)
    waiting = {node: len(set(sources)) for node, sources in before.items()}
    users: dict[Node, list[Node]] = {node: [] for node in nodes}
    for node, sources in before.items():
        for source in set(sources):
            users[source].append(node)
    ready = [position[n] for n in nodes if waiting[n] == 0]
    heapq.heapify(ready)
    order: list[Node] = []
    while ready:
        node = nodes[heapq.heappop(ready)]
        order.append(node)
        for user in users[node]:
            waiting[user] -= 1
            if waiting[user] == 0:
                heapq.heappush(ready, position[user])
    if len(order) != len(nodes):
        raise ValueError("the graph has a cycle")
    anchor = order[0]
    for node in order[1:]:
        anchor.append(node)
        anchor = node
