"""The router in front of a layer's experts, when some of these go: their logits become minus infinity.

That is what a router without their rows computes: softmax and sigmoid give them nothing, and no topk chooses them. A
vector of one number an expert that is added on the way, such as a correction of the balance, is masked alike. All
shapes stay, and what else reads the logits reads them as they were. The numbers that are chosen are then those of the
experts that stayed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from ...compiler.expressions import Add, Cast, Constant, Expression
from ...compiler.rewriter import Builder
from .layers import Layer

aten = torch.ops.aten
PRODUCTS = ("linear", "mm", "matmul", "addmm")


@dataclass(frozen=True)
class Router:
    """logits: [T, E]; table: the weight that they are products with; bias: its bias, if any; vectors: weights [E]
    that are added later; region: nodes from the logits to what the experts are given, in graph order; blocks: groups
    of experts that the router chooses among first."""

    logits: Node
    table: Node
    bias: Node | None
    vectors: tuple[Node, ...]
    region: tuple[Node, ...]
    blocks: int = 1


def router(layer: Layer) -> Router | str:
    """The router of a layer, or why it cannot be told."""
    given = layer.given
    ends = [given["indices"], given["weights"]]
    before = _ancestors(ends)
    products = [
        n for n in before
        if getattr(n.target, "_opname", "") in PRODUCTS and n.meta["val"].shape[-1] == layer.experts and _table(n)
    ]  # fmt: skip
    if not products:
        return "no product with a row an expert leads to the experts' numbers"
    order = {n: i for i, n in enumerate(layer.node.graph.nodes)}
    logits = max(products, key=order.__getitem__)
    after = _descendants(logits)
    region = tuple(n for n in layer.node.graph.nodes if n in after and n in before)
    if given["indices"] not in after:
        return "the experts' numbers do not depend on the router's logits"
    for node in region:
        if node.meta.get("written"):
            return "the router writes a value in place"
    vectors = dict.fromkeys(
        n
        for node in region
        for n in node.all_input_nodes
        if n not in after and "weight" in n.meta and tuple(n.meta["val"].shape) == (layer.experts,)
    )
    return Router(logits, _table(logits), _bias(logits), tuple(vectors), region, _blocks(region, layer))  # type: ignore[arg-type]


def _table(node: Node) -> Node | None:
    """The weight of a product, seen through casts and transposition."""
    for operand in reversed(node.all_input_nodes):
        source = operand
        while source.op == "call_function" and getattr(source.target, "_opname", "") in (
            "to",
            "_to_copy",
            "t",
            "transpose",
        ):
            source = source.args[0]  # type: ignore[assignment]
        if "weight" in source.meta and source.meta["val"].dim() == 2:
            return source
    return None


def _bias(node: Node) -> Node | None:
    return next((n for n in node.all_input_nodes if "weight" in n.meta and n.meta["val"].dim() == 1), None)


def _blocks(region: tuple[Node, ...], layer: Layer) -> int:
    """[T, E] as [T, G, E/G]: the router chooses groups first."""
    for node in region:
        value, sources = node.meta.get("val"), node.all_input_nodes
        if getattr(node.target, "_opname", "") in ("view", "reshape", "unflatten") and isinstance(value, torch.Tensor):
            before = sources[0].meta["val"].shape
            if value.dim() == len(before) + 1 and before[-1] == layer.experts and value.shape[-1] != layer.experts:
                return int(value.shape[-2])
    return 1


def _ancestors(nodes: list[Node]) -> set[Node]:
    found, pending = set(nodes), list(nodes)
    while pending:
        for node in pending.pop().all_input_nodes:
            if node not in found:
                found.add(node)
                pending.append(node)
    return found


def _descendants(node: Node) -> set[Node]:
    found, pending = {node}, [node]
    while pending:
        for user in pending.pop().users:
            if user not in found:
                found.add(user)
                pending.append(user)
    return found


def without(new: Builder, layer: Layer, found: Router, kept: list[int]) -> tuple[Node, Node]:
    """What chooses among the experts of `kept` alone, by their numbers from 0: indices and weights, as copies of the
    region behind masked logits."""
    device = str(layer.node.meta["val"].device)
    places = {e: i for i, e in enumerate(kept)}
    gone = [0.0 if e in places else float("-inf") for e in range(layer.experts)]
    mask = Constant(tuple(gone), (layer.experts,), torch.float32, device)
    masked = new(aten.add.Tensor, found.logits, new.weight(_cast(mask, found.logits.meta["val"].dtype)))
    copies: dict[Node, Node] = {found.logits: masked}
    for vector in found.vectors:
        copies[vector] = new.weight(Add(vector.meta["weight"], mask))
    for node in found.region:
        if node not in copies:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: copies.get(n, n))
            copies[node] = new(node.target, *args, **kwargs)  # type: ignore[arg-type]
    indices, weights = (copies.get(layer.given[name], layer.given[name]) for name in ("indices", "weights"))
    return numbered(new, layer, indices, [places.get(e, 0) for e in range(layer.experts)]), weights


def numbered(new: Builder, layer: Layer, indices: Node, numbers: list[int]) -> Node:
    """Each expert's number replaced by another."""
    device = str(layer.node.meta["val"].device)
    table = new.weight(Constant(tuple(numbers), (layer.experts,), torch.int64, device))
    return new(aten.index.Tensor, table, [indices])


def _cast(mask: Expression, dtype: torch.dtype) -> Expression:
    return mask if dtype == torch.float32 else Cast(mask, dtype)
