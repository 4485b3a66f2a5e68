"""Multiply the weights of queries and keys with each other, head by head: `query-key`.

Before                                                  after  raise,query-key
    q = linear(x, Wq, bq)   [B, T, H·D], by heads           q = linear(x, M, c)   [B, T, H·C], by heads
    k = linear(y, Wk, bk)                                   k = y, the same for all heads
    o = attention(q, k, v)                                  o = attention(q, k, v)

A head's logits are q·k = (Wq·x + bq)·(Wk·y + bk). As a product with y they are M·x + c, with M = Wkᵀ·Wq [C, C] and
c = Wkᵀ·bq, plus a part of bk that is the same for all keys of a query, which the softmax takes out. Where queries share
key heads, each multiplies by its own. The scale stays that of D channels.

It is for training with rounding (docs/qat.md): weights rounded apart are each fitted to how the other is rounded just
now, and swing together; here one matrix is rounded, and gradients reach both parameters through it. A pass behind this
one sees it as one weight, under the name of the queries' product:

    raise,query-key,quantize{weights=midrise2,activations=int8,keys=int8}

It is dear: a head has a matrix of C·C in the place of two of C·D, and keys of C channels in the place of D. Models of
few tokens and no cache are what it is meant for (vision transformers, encoders).

Refused, each with its reason: a rotary embedding, a norm or anything else but a factor between a product and attention;
keys that go into a cache, or that something else reads; queries and keys that are a part of one product, unless it is
split along its outputs; a bias of keys under soft-capping, which the softmax does not take out; weights that want
gradients, but in `prepare_qat`, whose graphs pass them through products of weights.

Exact: the weights are multiplied in float64; outputs agree within 1e-5 (max|Δ|/max|reference|, float32) and 1e-12 in
float64. Source: query-key reparameterization of OFQ (Liu et al., 2023), there for self-attention without biases.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..compiler.expressions import Concat, Expression, Matmul, Reshape, Slice, Transpose
from ..compiler.framework import Pass, Tier
from ..compiler.ops import attention
from ..compiler.order import touches_written
from ..compiler.program import Program
from ..compiler.provenance import source_line
from ..compiler.registry import register
from ..compiler.rewriter import Builder, Rewriter
from ..compiler.traits import arguments
from .quantize_sites import Site, sites
from .quantize_taken import left_out
from .quantize_training import needs_training
from .raising.nodes import cast_from, op_name, same_size, value
from .rotation.carriers import is_attention

aten = torch.ops.aten
_SAME = ("clone", "contiguous", "alias", "detach")
_VIEWS = ("view", "reshape", "_unsafe_view", "unflatten")
_CACHES = ("cat", "index_copy", "index_copy_", "index_put", "index_put_", "slice_scatter", "copy_", "scatter_")
_BETWEEN = {
    "rotary": "a rotary embedding turns {what} by their position, which no product of weights can hold",
    "rms_norm": "a norm stands between the product and attention, and is not linear",
    "layer_norm": "a norm stands between the product and attention, and is not linear",
}


@register
@dataclass(frozen=True)
class QueryKey(Pass):
    """Queries' and keys' weights multiplied with each other, one matrix a head."""

    name = "query-key"
    tier = Tier.EXACT
    example = "raise,query-key"
    trial = f'fuseline run demo:tiny-encoder -p "{example}"'
    requires = frozenset({"raised"})

    only: tuple[str, ...] = ()  # module paths of the queries' products to take
    skip: tuple[str, ...] = ()  # module paths to leave

    def run(self, program: Program, rewriter: Rewriter) -> None:
        found = {site.node: site for site in sites(program) if site.kernel is None and not site.is_sparse}
        for node in [n for n in program.graph.nodes if is_attention(n)]:
            pair = _pair(program, node, found)
            if isinstance(pair, str):
                rewriter.refuse(node, pair)
            elif not left_out(pair[0].site.path, self.only, self.skip):
                queries, keys = pair
                build = lambda new, n=node, q=queries, k=keys: _merged(new, n, q, k)
                rewriter.rewrite(node, [node, queries.site.node, keys.site.node], build, "query-key")

    def nothing_matched(self, program: Program) -> tuple[str, ...]:
        count = sum(map(is_attention, program.graph.nodes))
        return () if count else ("the program has no attention that `raise` knows",)


@dataclass(frozen=True)
class Projected:
    """Queries or keys [B, heads, T, width] that a product makes.

    site: the product; item: theirs among the items of its split, where it makes more than them; start: the first of
    its outputs that are theirs; factor: what they are multiplied with behind it.
    """

    site: Site
    heads: int
    width: int
    item: Node | None
    start: int
    factor: float

    def rows(self, head: int) -> Expression:
        """A head's part of the weight, [width, in]."""
        start = self.start + head * self.width
        return Slice(self.site.weight, 0, start, start + self.width)

    @property
    def bias(self) -> Expression | None:
        return None if self.site.bias is None else self.site.bias.meta["weight"]


def _pair(program: Program, node: Node, found: dict[Node, Site]) -> tuple[Projected, Projected] | str:
    """What makes an attention's queries and keys, or why its weights are not multiplied."""
    if node.meta.get("autocast"):
        return "autocast rounds queries and keys where they are made"
    queries, keys = (_projected(node.args[i], found, what, node) for i, what in enumerate(("queries", "keys")))
    for one in (queries, keys):
        if isinstance(one, str):
            return one
    assert isinstance(queries, Projected) and isinstance(keys, Projected)
    read = [e for one in (queries, keys) for e in (one.site.weight, one.bias) if e is not None]
    if needs_training(program) and any(program.sources[n].trainable for e in read for n in e.parameters()):
        return (
            "their weights want gradients, and through a product of weights they pass in fuseline.prepare_qat alone: "
            "freeze them (requires_grad_(False)), or compile under torch.no_grad()"
        )
    if queries.heads % keys.heads:
        return f"{queries.heads} heads of queries are no multiple of {keys.heads} of keys"
    if queries.site.x.meta["val"].dtype != keys.site.x.meta["val"].dtype:
        return "what makes queries and what makes keys have two types"
    if keys.site.bias is not None and arguments(node).get("softcap"):
        return "the softmax takes the keys' bias out, but not through soft-capping"
    return queries, keys


def _projected(operand: Any, found: dict[Node, Site], what: str, reader: Node) -> Projected | str:
    """The product that makes queries or keys, through views and factors alone."""
    node, heads, width, item, start, factor = operand, 0, 0, None, 0, 1.0
    by_heads = True  # [B, heads, T, width]; then [B, T, heads, width]; then, once heads is known, [B, T, ·]
    while True:
        if others := [user for user in node.users if user is not reader]:
            return f"{what}: {others[0].name} ({others[0].target}) reads them as well"
        if reader.all_input_nodes.count(node) != 1 or sum(a is node for a in reader.args) > 1:
            return f"{what}: {reader.name} ({reader.target}) reads them twice"
        if touches_written(node):
            return f"{what} lie in memory that is written to, as a cache is"
        name, step = op_name(node), _step(node)
        if node in found and heads:
            site = found[node]
            if site.bias is not None and "weight" not in site.bias.meta:
                return f"{what}: their bias is computed by the run"
            if site.bias is not None and site.bias.meta["val"].dim() != 1:
                return f"{what}: their bias is no vector"
            return Projected(site, heads, width, item, start, factor)
        if isinstance(step, float):
            factor *= step
            onward = node.args[0] if isinstance(node.args[0], Node) else node.args[1]
        elif name in _SAME or (cast_from(node) is not None and value(node).dtype == value(node.args[0]).dtype):
            onward = node.args[0]
        elif by_heads and not heads and _exchanges_heads(node):
            by_heads, onward = False, node.args[0]
        elif not by_heads and not heads and name in _VIEWS and _splits_heads(node):
            heads, width = (int(n) for n in value(node).shape[-2:])
            onward = node.args[0]
        elif heads and item is None and (first := _start(node)) is not None:
            item, start, split = node, first, node.args[0]
            reader, node = split, split.args[0]
            continue
        else:
            return _reason(node, what)
        reader, node = node, onward


def _step(node: Node) -> float | None:
    """The number that a node multiplies its operand with."""
    name, args = op_name(node), node.args
    if name == "mul" and isinstance(args[1], (int, float)):
        return float(args[1])
    if name == "mul" and isinstance(args[0], (int, float)):
        return float(args[0])
    plain = name == "div" and len(args) == 2 and not node.kwargs
    return 1.0 / float(args[1]) if plain and isinstance(args[1], (int, float)) and args[1] else None


def _exchanges_heads(node: Node) -> bool:
    """[B, T, heads, width] → [B, heads, T, width]."""
    if value(node).dim() != 4:
        return False
    if op_name(node) in ("transpose", "swapaxes", "swapdims"):
        return {d % 4 for d in node.args[1:]} == {1, 2}  # type: ignore[operator]
    return op_name(node) == "permute" and [d % 4 for d in node.args[1]] == [0, 2, 1, 3]  # type: ignore[operator, union-attr]


def _splits_heads(node: Node) -> bool:
    """[B, T, heads·width] → [B, T, heads, width]."""
    before, after = value(node.args[0]).shape, value(node).shape  # type: ignore[arg-type]
    if len(before) != 3 or len(after) != 4 or not all(isinstance(n, int) for n in (before[-1], *after[-2:])):
        return False
    return before[-1] == after[-2] * after[-1] and all(same_size(a, b) for a, b in zip(before[:2], after, strict=False))


def _start(node: Node) -> int | None:
    """The first channel of an item of a split along the last dimension; None for any other node."""
    split: Any = node.args[0] if node.target is operator.getitem else None
    if op_name(split) not in ("split", "split_with_sizes", "chunk"):
        return None
    sizes, last = [v.shape[-1] for v in split.meta["val"]], value(split.args[0]).dim() - 1
    along = arguments(split)["dim"] in (-1, last) and all(isinstance(n, int) for n in sizes)
    return sum(sizes[: node.args[1]]) if along else None  # type: ignore[misc]


def _reason(node: Any, what: str) -> str:
    name = op_name(node)
    if name in _BETWEEN:
        return _BETWEEN[name].format(what=what)
    if name in _CACHES:
        return f"{what} are joined to others ({name}): a cache holds them as its caller laid it out"
    if isinstance(node, Node) and node.target is operator.getitem:
        made = node.args[0].target  # type: ignore[union-attr]
        return f"{what} are an item of {made}: a product of several things is taken where it is split along its outputs"
    if not name:
        return f"{what} are an argument of the graph, or no call of an op: no weight makes them"
    line = source_line(node)
    return (
        f"between the product that makes {what} and attention stands {node.target}{f' at {line}' if line else ''}: "
        "only views by head and factors may, no rotary embedding or norm"
    )


def _merged(new: Builder, node: Node, queries: Projected, keys: Projected) -> dict[Node, Node]:
    """The same attention over one product for queries, and what was projected to keys; and what else a split made, as
    products of its own."""
    group, channels = queries.heads // keys.heads, keys.site.shape[1]
    rows = [(queries.rows(head), keys.rows(head // group)) for head in range(queries.heads)]
    weight = Concat(tuple(Transpose(Matmul(Transpose(q, 0, 1), k), 0, 1) for q, k in rows), 0)
    bias = None
    if queries.bias is not None:
        each = []
        for head, (_, k) in enumerate(rows):
            start = queries.start + head * queries.width
            row = Reshape(Slice(queries.bias, 0, start, start + queries.width), (1, queries.width))
            each.append(Reshape(Matmul(row, k), (channels,)))
        bias = Concat(tuple(each), 0)
    product = new(aten.linear.default, queries.site.x, new.weight(weight), None if bias is None else new.weight(bias))
    q = new(aten.transpose.int, new(aten.unflatten.int, product, -1, [queries.heads, channels]), 1, 2)
    one = new(aten.unsqueeze.default, keys.site.x, 1)
    k = new(aten.expand.default, one, [-1, keys.heads, -1, -1])
    _, _, *rest = node.args
    factor, kwargs = queries.factor * keys.factor, dict(node.kwargs)
    if node.target is attention.overload:
        rest[2] *= factor  # v, mask, scale
    else:
        kwargs["scale"] = (kwargs.get("scale") or queries.width**-0.5) * factor
    made = {node: new(node.target, q, k, *rest, **kwargs)}
    items = {one.item: one.site for one in (queries, keys) if one.item is not None}
    for taken, site in items.items():
        for item in taken.args[0].users:  # type: ignore[union-attr]
            if item not in items and item not in made and item.users:
                made[item] = _alone(new.at(item), item, site)
    return made


def _alone(new: Builder, item: Node, site: Site) -> Node:
    """An item of a product's split as a product of its own."""
    first, width = _start(item), int(value(item).shape[-1])
    assert first is not None
    weight = new.weight(Slice(site.weight, 0, first, first + width))
    bias = None if site.bias is None else new.weight(Slice(site.bias.meta["weight"], 0, first, first + width))
    return new(aten.linear.default, site.x, weight, bias)
