"""Liveness: how many bytes of intermediate values are alive at each point of a program's schedule.

Aliases are counted once. What a view shares with its input is read off the fake values; where a rewrite has replaced
the input since, the view is computed again on the fake value that the input has now.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .compat import size_hint, storages
from .program import Program
from .rewriter import fake_call

Key = tuple[Node, int]
"""A storage: the node that allocates it, and which of its results it is."""


@dataclass(frozen=True)
class Liveness:
    """Bytes, symbolic sizes at their hints.

    live: for each node in graph order, what is alive while it runs: its results, and what is read then or later;
    weights, inputs: what the caller owns, alive throughout and not part of `live`. A region counts by its results
    alone, since a kernel keeps the rest in registers.
    """

    live: tuple[int, ...]
    weights: int
    inputs: int

    @property
    def peak(self) -> int:
        """The most bytes alive at once, without weights and inputs."""
        return max(self.live, default=0)


def liveness(program: Program) -> Liveness:
    """The bytes alive over the schedule of a program."""
    nodes = list(program.graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    keys: dict[Node, tuple[Key, ...]] = {}
    sizes: dict[Key, int] = {}
    last: dict[Key, int] = {}
    inputs = 0
    for node in nodes:
        keys[node] = _keys(program, node, keys)
        for key, tensor in zip(keys[node], tensors(node.meta.get("val"))):
            if key[0] is node:
                sizes[key] = storage_bytes(tensor)
                inputs += sizes[key] if node.op == "placeholder" else 0
        until = max((position[user] for user in node.users), default=position[node])
        for key in keys[node]:
            last[key] = max(last.get(key, 0), until)
    changes = [0] * (len(nodes) + 1)
    for key, until in last.items():
        if key[0].op not in ("placeholder", "get_attr"):
            changes[position[key[0]]] += sizes[key]
            changes[until + 1] -= sizes[key]
    live, alive = [], 0
    for change in changes[:-1]:
        alive += change
        live.append(alive)
    return Liveness(tuple(live), program.weight_bytes(), inputs)


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of a value, which may be a tuple of them."""
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def storage_bytes(value: torch.Tensor) -> int:
    """Bytes of the storage that a tensor lies in, symbolic sizes at their hints."""
    if value.layout is not torch.strided:
        return 0
    return size_hint(value.untyped_storage().nbytes())


def _keys(program: Program, node: Node, keys: dict[Node, tuple[Key, ...]]) -> tuple[Key, ...]:
    """For each tensor of a node's value, the storage that it lies in."""
    found = tensors(node.meta.get("val"))
    fresh = tuple((node, i) for i in range(len(found)))
    if node.op != "call_function":
        return fresh
    if node.target is operator.getitem:
        of, which = node.args[0], node.args[1]
        if isinstance(of, Node) and isinstance(which, int) and which < len(keys[of]):
            return (keys[of][which],)
        return fresh
    sources = _aliased(node)
    if not sources or not found:
        return fresh
    value = node.meta["val"]
    if not any(set(storages(value)) & set(storages(source.meta.get("val"))) for source in sources):
        value = fake_call(program, node.target, node.args, node.kwargs, node.meta.get("autocast", ()))
    owner = {s: key for source in sources for s, key in zip(storages(source.meta.get("val")), keys[source])}
    return tuple(owner.get(s, key) for s, key in zip(storages(value), fresh, strict=True))


def _aliased(node: Node) -> list[Node]:
    """The inputs that a result of the node may alias, by the op's schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or all(r.alias_info is None for r in schema.returns):
        return []
    given = dict(zip((a.name for a in schema.arguments), node.args))
    given.update(node.kwargs)
    marked = [given.get(a.name) for a in schema.arguments if a.alias_info is not None]
    return [n for n in torch.utils._pytree.tree_leaves(marked) if isinstance(n, Node)]
