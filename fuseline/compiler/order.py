"""Order of execution: who must run before whom, writes in place included, and a stable topological sort.

Dataflow alone does not order a read of a KV cache after the write to it: the cache is an input of both. Nodes that
touch a storage which the graph writes to therefore keep their order.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from torch.fx import Graph, Node


def touches_written(node: Node) -> bool:
    """Whether a node writes to, or reads from, a storage that the graph writes to."""
    return bool(node.meta.get("written")) or any(n.meta.get("written") for n in node.all_input_nodes)


def writes(node: Node) -> bool:
    """Whether a node writes in place."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


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
    """Which nodes lie downstream of which, kept as bit sets."""

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

    def bits(self, nodes: Iterable[Node]) -> int:
        """A set of nodes as a bit set."""
        found = 0
        for node in nodes:
            found |= 1 << self.index[node]
        return found


class Partition:
    """Sets of nodes that will run as one each. What it keeps free of cycles is the graph of those sets: two sets that
    are convex on their own can still wait for each other."""

    def __init__(self, reach: Reachability):
        self.reach = reach
        self._groups: dict[object, tuple[int, int]] = {}  # members, and all that they need

    def fits(self, nodes: set[Node], name: object = None) -> bool:
        """Whether `nodes` can run as one beside the other sets; `name` is the set that they would replace."""
        reach, members, needed = self.reach, self.reach.bits(nodes), 0
        for node in nodes:
            for source in reach.before[node]:
                if source not in nodes:
                    needed |= reach.ancestors[source] | 1 << reach.index[source]
        others = [group for key, group in self._groups.items() if key != name]
        while not needed & members:
            waiting = [group for group in others if not group[0] & needed]
            if len(waiting) == len(others):
                return True
            for inside, before in others:
                if inside & needed:
                    needed |= inside | before
            others = waiting
        return False

    def put(self, name: object, nodes: set[Node]) -> None:
        """Adds a set that fits, or replaces the one of that name."""
        needed = 0
        for node in nodes:
            needed |= self.reach.ancestors[node]
        self._groups[name] = (self.reach.bits(nodes), needed)


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
