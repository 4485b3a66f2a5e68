"""Attention: where positions meet. Queries, keys and values go to the ranks by heads, results come back by positions.

One all-to-all brings all three (their heads for a rank lie side by side in what it is sent), one brings the result
back. In between a rank sees the whole sequence for its heads: masks, causality and windows mean what they meant.
Source: DeepSpeed-Ulysses (Jacobs et al., 2023); what differs is in `heads.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ....compiler.traits import arguments
from ...raising.repeat_kv import _Repeat
from ..collectives import Group, pad_to
from ..heads import Heads
from ..placement import Axis, Shard, Sharded, is_one, same_size
from ..ring import around
from ._define import Rule, overloads, rule, value

if TYPE_CHECKING:
    from ..run import Run

SEQUENCE, HEADS = 2, 1  # of [batch, heads, sequence, width]


@rule(*overloads("scaled_dot_product_attention.default"), torch.ops.fuseline.attention.default)
class Attention(Rule):
    starts = True

    def back(self, node: Node, shard: Shard) -> Iterator[tuple[Node, Shard]]:
        query: Node = node.args[0]  # type: ignore[assignment]
        if shard.dim == value(query).dim() - 2:
            yield query, shard

    def forward(self, run: Run, node: Node) -> Any:
        names = list(arguments(node))
        given = arguments(node)
        query, key, val = (given[name] for name in names[:3])
        mask = given[names[3]]
        if value(query).dim() != 4:
            return run.refuse(node, f"its queries have {value(query).dim()} dimensions, not 4")
        if any(isinstance(s := run.values[n], Sharded) and s.shard.axis.heads for n in (query, key, val)):
            return run.refuse(node, "its heads are cut already")
        keys, values = _Repeat.of(key), _Repeat.of(val)
        if keys and values and keys.interleaved and values.interleaved and keys.groups == values.groups:
            key, val = keys.source, values.source
        shards = [run.values[n].shard if isinstance(run.values[n], Sharded) else None for n in (query, key, val)]
        if all(s is None for s in shards[1:]):
            return self._own_queries(run, node, query, key, val, mask)
        if any(s is not None and s.dim != SEQUENCE for s in shards):
            return run.refuse(node, "it is cut along another dimension than the sequence")
        if not same_size(value(query).shape[2], value(key).shape[2]):
            return run.refuse(node, "its queries and keys are sequences of two lengths (cross-attention)")
        if run.rings is not None:
            return self._around(run, run.rings, node, query, key, val)
        return self._by_heads(run, node, query, key, val, mask)

    def _around(self, run: Run, rings: Group, node: Node, query: Node, key: Node, val: Node) -> Sharded:
        """Around a ring, each of whose members may be several ranks: they exchange heads for their positions first."""
        shard = next(run.values[n].shard for n in (query, key, val) if isinstance(run.values[n], Sharded))
        q, k, v = (run.local(n, [0, 1, 2, 3], shard, node) for n in (query, key, val))
        inner, length = run.inner, shard.axis.length
        if inner is None:
            return Sharded(around(rings, node, q, k, v, length), shard)
        heads = Heads(int(value(query).shape[1]), int(value(key).shape[1]), inner.degree)
        member = Axis(inner.degree * shard.axis.block, shard.axis.block, inner.degree, True)
        q, k, v = exchange(inner, heads, member, q, k, v)
        return Sharded(bring_back(inner, heads, member, around(rings, node, q, k, v, length)), shard)

    def _by_heads(self, run: Run, node: Node, query: Node, key: Node, val: Node, mask: Node | None) -> Sharded:
        shard = next(run.values[n].shard for n in (query, key, val) if isinstance(run.values[n], Sharded))
        q, k, v = (run.local(n, [0, 1, 2, 3], shard, node) for n in (query, key, val))
        heads = Heads(int(value(query).shape[1]), int(value(key).shape[1]), run.group.degree)
        q, k, v = exchange(run.group, heads, shard.axis, q, k, v)
        result = self._call(run, node, q, k, v, run.mask_of_heads(mask, heads), heads)
        return Sharded(bring_back(run.group, heads, shard.axis, result), shard)

    def _call(self, run: Run, node: Node, q: Any, k: Any, v: Any, mask: Any, heads: Heads) -> torch.Tensor:
        given = {name: run.whole(a) if isinstance(a, Node) and i > 3 else a
                 for i, (name, a) in enumerate(arguments(node).items())}  # fmt: skip
        names = list(given)
        given.update(zip(names[:4], (q, k, v, mask)))
        if "enable_gqa" in given:
            given["enable_gqa"] = q.shape[1] != k.shape[1]
        schema = node.target._schema  # type: ignore[union-attr]
        keyword = {a.name: given.pop(a.name) for a in schema.arguments if a.kwarg_only}
        return node.target(*given.values(), **keyword)  # type: ignore[operator]

    def _own_queries(self, run: Run, node: Node, query: Node, key: Node, val: Node, mask: Node | None) -> Any:
        """Keys and values that every rank holds whole: each rank attends from its own queries."""
        shard = run.values[query].shard
        given = arguments(node)
        if shard.dim != SEQUENCE:
            return run.refuse(node, "it is cut along another dimension than the sequence")
        if given.get("is_causal") or given.get("kind", "full") != "full":
            return run.refuse(node, "its keys are whole on every rank, and its mask counts from the first query")
        local = None
        if mask is not None:
            rows = run.whole(mask)
            at = rows.dim() - 2
            local = rows if is_one(rows.shape[at]) else run.group.take(rows, Shard(at, shard.axis))
        heads = Heads(int(value(query).shape[1]), int(value(key).shape[1]), 1)
        result = self._call(run, node, run.values[query].tensor, run.whole(key), run.whole(val), local, heads)
        return Sharded(result, shard)


def exchange(group: Group, heads: Heads, axis: Axis, *parts: torch.Tensor) -> list[torch.Tensor]:
    """q [B, H, block, D], k and v [B, K, block, D] → this rank's heads of all positions, in one all-to-all.

    What is sent is laid out [degree, block, B, heads · D]: its first two dimensions are the sequence once it has
    arrived, so nothing is copied there.
    """
    degree = heads.degree
    device = parts[0].device
    keys = heads.key_order(device)
    orders = (heads.query_order(device), keys, keys)
    counts = (heads.local, heads.local_keys, heads.local_keys)
    sent = []
    for x, order, count in zip(parts, orders, counts):
        x = x.permute(2, 0, 1, 3)  # [block, B, heads, D]
        if order is not None:
            x = x.index_select(2, order)
        sent.append(x.unflatten(2, (degree, count)).permute(2, 0, 1, 3, 4).flatten(3))
    arrived = group.all_to_all(torch.cat(sent, -1)).flatten(0, 1)
    if not axis.even:
        arrived = arrived.narrow(0, 0, axis.length)
    found = []
    for x, part, count in zip(parts, arrived.split([s.shape[-1] for s in sent], -1), counts):
        found.append(part.unflatten(2, (count, x.shape[3])).permute(1, 2, 0, 3))
    places = heads.read_by(group.rank, device)
    if places is not None:
        found[1:] = [x.index_select(1, places) for x in found[1:]]
    return found


def bring_back(group: Group, heads: Heads, axis: Axis, x: torch.Tensor) -> torch.Tensor:
    """[B, heads of this rank, S, D] → [B, H, block, D], stored as [B, block, H, D], as the next layer reads it."""
    degree, (batch, count, _, width) = heads.degree, x.shape
    rows = pad_to(x, SEQUENCE, degree * axis.block, axis).permute(2, 0, 1, 3)
    sent = rows.reshape(degree, axis.block, batch, count * width)
    arrived = group.all_to_all(sent).permute(2, 1, 0, 3)  # [B, block, degree, heads · D]
    whole = arrived.reshape(batch, axis.block, degree * count, width)
    whole = whole if degree * count == heads.queries else whole.narrow(2, 0, heads.queries)
    return whole.transpose(1, 2)
