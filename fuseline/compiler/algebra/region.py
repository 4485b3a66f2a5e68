"""Regions: a replaced node and its replacement, unfolded to the values that they have in common.

The last value that only one of the two sides reads is unfolded, until both read the same ones. Those, the leaves, are
computed by the same nodes before and after the rewrite, so they may be any numbers: what holds for all of them holds
in the program.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from ..action import Action
from ..order import writes
from ..program import Program
from ..structure import describe_value

LARGEST = 5000
"""Nodes on one side, beyond which a region is not read."""

EMPTY = ("empty", "new_empty")
"""Ops whose result has no values yet."""

Definition = tuple[tuple[Any, ...], dict[str, Any]]
"""A node's args and kwargs; an erased node has lost its own."""


class NotTranslated(Exception):
    """A rewrite that cannot be written as algebra, and why."""


class Snapshot:
    """The definitions of all nodes of a graph, as they are now."""

    def __init__(self, graph: Graph):
        self.definitions: dict[Node, Definition] = {n: (n.args, n.kwargs) for n in graph.nodes}
        self.rank = {n: i for i, n in enumerate(self.definitions)}

    def other_changes(self, action: Action) -> list[Node]:
        """Nodes that read something else since, which the rewrite's replacements do not explain."""
        swap = lambda n: action.replaced.get(n, n)
        kept = [(n, d) for n, d in self.definitions.items() if not n._erased]
        changed = [(n, d) for n, d in kept if not (n.args is d[0] and n.kwargs is d[1])]
        return [n for n, d in changed if (n.args, n.kwargs) != torch.fx.node.map_arg(d, swap)]


@dataclass
class Side:
    """The node that a side computes, and its inner nodes, operands first, with their definitions."""

    root: Node
    inner: dict[Node, Definition]


@dataclass
class Region:
    """before, after: the sides; leaves: what both read, in order of appearance; weights: those of either."""

    before: Side
    after: Side
    leaves: list[Node] = field(default_factory=list)
    weights: list[Node] = field(default_factory=list)

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.before, self.after

    def signature(self, program: Program) -> str:
        """What the region computes, whatever its nodes and parameters are called."""
        names: dict[str, str] = {}
        known = {leaf: f"leaf{i}" for i, leaf in enumerate(self.leaves)}
        lines = [f"{known[n]} {describe(n)}" for n in self.leaves]
        for weight in self.weights:
            expression = weight.meta["weight"]
            for name in expression.parameters():
                names.setdefault(name, f"p{len(names)} {tuple(program.sources[name].tensor.shape)}")
            known[weight] = repr(expression.rename(names))
            lines.append(describe(weight))
        for letter, side in zip("ba", self.sides, strict=True):
            here = {**known, **{n: f"{letter}{i}" for i, n in enumerate(side.inner)}}
            for node, definition in side.inner.items():
                lines.append(f"{here[node]} {node.target} {_text(definition, here)} {describe(node)}")
            lines.append(here[side.root])
        return "\n".join(lines)


def regions(action: Action, seen: Snapshot) -> Iterator[Region]:
    """A region for each node that a rewrite has replaced; `seen`: the graph before it.

    Raises:
        NotTranslated: the rewrite did more than to replace them, or what they read is written to.
    """
    if others := seen.other_changes(action):
        raise NotTranslated(f"{others[0].name} was changed as well, and is not among what is replaced")
    created = {n: len(seen.rank) + i for i, n in enumerate(action.created)}
    rank = {**seen.rank, **created}
    for old, new in action.replaced.items():
        yield _region(old, new, seen, rank)


def _region(old: Node, new: Node, seen: Snapshot, rank: dict[Node, int]) -> Region:
    fronts: list[set[Node]] = [{old}, {new}]
    inner: list[dict[Node, Definition]] = [{}, {}]
    while odd := [n for n in fronts[0] ^ fronts[1] if n.op not in ("get_attr", "placeholder")]:
        node = max(odd, key=rank.__getitem__)
        which = 0 if node in fronts[0] else 1
        definition = seen.definitions[node] if which == 0 else (node.args, node.kwargs)
        inner[which][node] = definition
        fronts[which].remove(node)
        fronts[which] |= set(_values_read(node, definition))
        if len(inner[which]) > LARGEST:
            raise NotTranslated(f"more than {LARGEST} nodes between {old.name} and what it has in common")
    ordered = [{n: found[n] for n in sorted(found, key=rank.__getitem__)} for found in inner]
    region = Region(Side(old, ordered[0]), Side(new, ordered[1]))
    for side in region.sides:
        read = [n for d in side.inner.values() for n in operands(d)]
        for node in (*read, side.root):
            into = region.weights if "weight" in node.meta else region.leaves
            if node not in side.inner and node not in into:
                into.append(node)
    _refuse_writes(region, seen)
    return region


def _refuse_writes(region: Region, seen: Snapshot) -> None:
    """Values in memory that the graph writes to must be read with no write between: else they may differ.

    Raises:
        NotTranslated: there is one, or an inner node writes.
    """
    times: list[int] = []
    for side in region.sides:
        for node, definition in side.inner.items():
            if not any(n.meta.get("written") for n in (node, *_values_read(node, definition))):
                continue
            if writes(node):
                raise NotTranslated(f"{node.name} writes to its operand")
            while node not in seen.rank:  # created in front of one that was there
                node = node.next
            times.append(seen.rank[node])
    between = list(seen.rank)[min(times, default=0) : max(times, default=0)]
    for node in between:
        if writes(node):
            raise NotTranslated(f"{node.name} writes to memory between two reads of it")


def operands(definition: Definition) -> list[Node]:
    """The nodes that a definition reads, in order."""
    found: list[Node] = []
    torch.fx.node.map_arg(definition, found.append)
    return found


def _values_read(node: Node, definition: Definition) -> list[Node]:
    """The operands of which more is read than their dtype and device."""
    name = getattr(node.target, "_opname", "")
    found = operands(definition)
    return [] if name.startswith("new_") else found[:1] if name == "type_as" else found


def describe(node: Node) -> str:
    """A node's type, and whether it is zeros."""
    return f"{describe_value(node.meta.get('val'))}{' zeros' if is_zero(node) else ''}"


def is_zero(node: Node) -> bool:
    """Whether a node is a tensor of zeros."""
    return getattr(node.target, "_opname", "") in ("zeros", "zeros_like", "new_zeros")


def _text(value: Any, known: dict[Node, str]) -> str:
    if isinstance(value, Node):
        return known[value]
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_text(v, known) for v in value)})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}={_text(v, known)}' for k, v in value.items())}}}"
    return repr(value)
