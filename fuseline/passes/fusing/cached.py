"""Attention over a cache of codes: what reads the expanded cache reads the codes, and takes in what wrote them.

cache_write(k…, length)                                 y = region(q, k…, v…):
cache_write(v…, length)                                     cache_write(k…, length)
keys, values = cache_read(k…), cache_read(v…)     →         cache_write(v…, length)
y = attention(q, keys, values, mask)                        cache_attention(q, k…, v…, mask)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.fx import Node

from ...compiler import ops
from ...compiler.order import touches_written, writes
from ...compiler.program import Program
from ...compiler.provenance import source_line
from ...compiler.rewriter import Builder, Rewriter
from ...compiler.traits import arguments
from .linear import Region

PARTS = ("codes", "scale", "low", "mean", "recent")


def fold_reads(program: Program, rewriter: Rewriter) -> None:
    """attention(q, cache_read(…), cache_read(…), mask) → cache_attention(q, …, mask), where that is the same."""
    for node in [n for n in program.graph.nodes if n.target is ops.attention.overload]:
        given = arguments(node)
        reads = [given[name] for name in "kv"]
        if not all(read.target is ops.cache_read.overload for read in reads):
            continue
        reason = _refuse(node, given, reads)
        if reason:
            rewriter.refuse(node, reason)
            continue
        rewriter.rewrite(node, [*reads, node], lambda new, given=given: _folded(new, given), "cache")  # type: ignore[misc]


def _refuse(node: Node, given: dict[str, Any], reads: list[Node]) -> str | None:
    keys, values = (arguments(read) for read in reads)
    if keys["values"] or not values["values"]:
        return "its keys are read from a cache's values, or the other way round"
    if keys["length"] is not values["length"] or keys["block"] != values["block"]:
        return "its keys and values are read from caches of different lengths or blocks"
    if given["dropout"]:
        return "attention with dropout over a cache of codes"
    if given["mask"] is None and given["kind"] == "full":
        return "no mask hides the empty rows of the cache"
    if keys["recent"].meta["val"].dtype != given["q"].meta["val"].dtype:
        return "queries and cache differ in dtype"
    between, place = reads[0] if reads[0] < reads[1] else reads[1], None
    while between is not node and place is None:
        between = between.next
        place = between if writes(between) and between is not node else None
    return f"the cache may be written to before its attention, by {place.target} at {_line(place)}" if place else None


def _line(node: Node) -> str:
    return source_line(node) or node.name


def _folded(new: Builder, given: dict[str, Any]) -> Node:
    keys, values = (arguments(given[name]) for name in "kv")
    parts = [side[part] for side in (keys, values) for part in PARTS]
    rest = (given["mask"], given["scale"], given["kind"], keys["scheme"], values["scheme"], keys["block"])
    more = (given["offset"], given["window"], given["softcap"])
    return new(ops.cache_attention, given["q"], *parts, keys["length"], *rest, *more)


def cached_regions(program: Program) -> Iterator[Region]:
    """Each attention over codes, with the writes to its cache where nothing touches a written storage between them."""
    for node in program.graph.nodes:
        if node.target is ops.cache_attention.overload:
            given = arguments(node)
            wanted = {given[f"{side}_codes"] for side in "kv"}
            nodes, before = [node], node.prev
            while len(nodes) < 3 and before.op not in ("placeholder", "root"):
                if before.target is ops.cache_write.overload and before.args[0] in wanted:
                    nodes.insert(0, before)
                elif touches_written(before):
                    break
                before = before.prev
            yield Region("cached", "attention over codes", nodes)
