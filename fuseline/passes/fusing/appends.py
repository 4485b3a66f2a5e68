"""What a step adds to a cache of keys and values, with the rotation before it and the count of what was there.

q = rotary(q, cos, sin)                         q, keys, values = region(q, k, v, cos, sin, keys, values, count):
k = rotary(k, cos, sin)                             q = rotary(q, cos, sin)
at = arange(S) + count                              at = arange(S) + count
count += S                                →         index_copy_(keys, 2, at, rotary(k, cos, sin))
index_copy_(keys, 2, at, k)                         index_copy_(values, 2, at, v)
index_copy_(values, 2, at, v)                   count += S

At a step of one token each of these is a launch that moves a few kilobytes: together as long as a projection.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from ...compiler.compat import storages
from ...compiler.ops import rotary
from ...compiler.order import Partition, touches_written
from ...compiler.program import Program
from ...compiler.traits import arguments
from ...compiler.views import share
from .linear import Region

aten = torch.ops.aten
WRITE = aten.index_copy_.default
COUNT = aten.add_.Tensor


def append_regions(program: Program, partition: Partition, taken: set[object]) -> Iterator[Region]:
    """Each pair of writes to one cache, keys before values; put into `partition`."""
    paired: set[Node] = set()
    for values in [n for n in program.graph.nodes if n.target is WRITE]:
        keys = _before(values)
        if keys is None or keys in paired or not _is_pair(keys, values):
            continue
        nodes = {keys, values}
        for more in (_rotations(keys), _positions(values)):
            wider = nodes | more
            if not wider & taken and partition.fits(wider):
                nodes = wider
        if partition.fits(nodes):
            partition.put(values, nodes)
            paired |= {keys, values}
            yield Region("append", "cache append", sorted(nodes, key=partition.reach.index.__getitem__))


def delay_counts(program: Program) -> None:
    """Moves `count += S` behind the writes to the cache where nothing between them looks at the count."""
    for count in [n for n in program.graph.nodes if n.target is COUNT]:
        place = count
        while (following := place.next).op == "call_function" and not any(
            share(x, count) for x in following.all_input_nodes
        ):
            place = following
            if place.target is WRITE and _before(place) is not None:
                place.append(count)
                break


def join_counts(program: Program) -> None:
    """Makes one call of the `count += S` of all layers, where no count is looked at behind its own."""
    alike: dict[object, list[Node]] = {}
    seen: set[int] = set()  # storages that are read behind the node at hand
    for node in reversed(program.graph.nodes):
        if node.target is COUNT and not node.users and not node.kwargs and _is_input(node.args[0], seen):
            alike.setdefault(node.args[1], []).insert(0, node)
        if node.op != "output":
            seen.update(s for x in node.all_input_nodes for s in storages(x.meta.get("val")))
    for by, counts in alike.items():
        if len(counts) < 2 or isinstance(by, float) or (isinstance(by, Node) and by.op == "call_function"):
            continue
        last = counts[-1]
        with program.graph.inserting_after(last):
            joined = program.graph.call_function(aten._foreach_add_.Scalar, ([n.args[0] for n in counts], by))
        joined.meta = {**last.meta, "val": None}
        for count in counts:
            program.graph.erase_node(count)


def _is_input(counted: Node, seen: set[int]) -> bool:
    return counted.op == "placeholder" and seen.isdisjoint(storages(counted.meta["val"]))


def _before(node: Node) -> Node | None:
    """The write before a write, where nothing that touches a written storage stands between them."""
    before = node.prev
    while before.op != "root":
        if before.target is WRITE:
            return before
        if touches_written(before):
            return None
        before = before.prev
    return None


def _is_pair(keys: Node, values: Node) -> bool:
    k, v = arguments(keys), arguments(values)
    if k["index"] is not v["index"] or k["self"] is v["self"]:
        return False
    tensors = [x[name].meta["val"] for x in (k, v) for name in ("self", "source")]
    if any(t.dim() != 4 or t.dtype != tensors[0].dtype for t in tensors) or {k["dim"] % 4, v["dim"] % 4} != {2}:
        return False
    same = all(str(a) == str(b) for a, b in zip(tensors[1].shape[:3], tensors[3].shape[:3]))
    return same and k["source"].meta["val"].shape[-1] % 2 == 0


def _rotations(keys: Node) -> set[Node]:
    """The rotation of the keys, and that by the same angles of the queries that are to attend to them."""
    turned = arguments(keys)["source"]
    if turned.target is not rotary.overload or list(turned.users) != [keys] or not _is_plain(turned):
        return set()
    cos, sin = turned.args[1:]
    readers = set(keys.users)
    others = [
        n for n in cos.users if n.target is rotary.overload and n.args[1:] == (cos, sin) and readers & set(n.users)
    ]
    alike = [n for n in others if n is not turned and _is_plain(n) and _shape(n)[2:] == _shape(turned)[2:]]
    return {turned, *(alike if len(alike) == 1 else ())}


def _shape(node: Node) -> list[str]:
    return [str(n) for n in node.meta["val"].shape]


def _is_plain(node: Node) -> bool:
    """A rotation of [B, H, S, D] by angles that all heads share, in one type."""
    x, cos, sin = (a.meta["val"] for a in node.args)  # type: ignore[union-attr]
    if x.dim() != 4 or cos.dim() != 4 or sin.dim() != 4 or cos.shape[1] != 1 or sin.shape[1] != 1:
        return False
    return x.dtype == node.meta["val"].dtype and cos.shape[-1] == sin.shape[-1] == x.shape[-1]


def _positions(values: Node) -> set[Node]:
    """arange(S) + count, where nobody else reads it."""
    at = arguments(values)["index"]
    if at.target is not aten.add.Tensor or len(at.users) != 2 or at.kwargs:
        return set()
    steps = [n for n in at.all_input_nodes if n.target is aten.arange.default and list(n.users) == [at]]
    counts = [n.meta["val"] for n in at.all_input_nodes if n not in steps]
    if len(steps) != 1 or len(counts) != 1 or counts[0].numel() != 1 or counts[0].is_floating_point():
        return set()
    return {at, *steps} if counts[0].device == at.meta["val"].device else set()  # a number of the host's is no pointer
