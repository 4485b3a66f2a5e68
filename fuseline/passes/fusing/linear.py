"""Regions around linears: a norm before, several weights of one input, pointwise operations after."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ...compiler import ops, products
from ...compiler.compat import symbolic_expression
from ...compiler.ops import Kind
from ...compiler.order import Partition, touches_written
from ...compiler.program import Program
from ...compiler.traits import arguments, is_view, kind

aten = torch.ops.aten
LONGEST_EPILOGUE = 8
DECODINGS = (ops.dequantize.overload, ops.decode.overload)
KINDS: dict[Any, str] = {aten.linear.default: "linear", ops.sparse_linear.overload: "sparse"}
"""Products that a template serves: op → the region's kind."""


@dataclass(frozen=True)
class Region:
    """Nodes to become one subgraph, in graph order; `rule` names its shape for the statistics."""

    kind: str
    rule: str
    nodes: list[Node]


def linear_regions(program: Program, partition: Partition) -> Iterator[Region]:
    """Every linear belongs to exactly one region, which is put into `partition`."""
    by_input: dict[tuple[Node, object], list[Node]] = {}
    for node in program.graph.nodes:
        if node.target in KINDS and not touches_written(node):
            by_input.setdefault((node.args[0], (_mask(node), _format(node))), []).append(node)
    taken: set[Node] = set()
    for linears in by_input.values():
        for group in _gated_apart(linears):
            for part in _independent(group, partition):
                nodes, rule = _grow(part, partition, taken)
                taken |= nodes
                partition.put(part[0], nodes)
                yield Region(KINDS[part[0].target], rule, sorted(nodes, key=partition.reach.index.__getitem__))


def _independent(linears: list[Node], partition: Partition) -> Iterator[list[Node]]:
    """Apart where one waits for another: its weight is computed, or it stands in another grad mode."""
    parts: list[list[Node]] = []
    for linear in linears:
        home = next((part for part in parts if partition.fits({*part, linear})), None)
        if home is None:
            parts.append([linear])
        else:
            home.append(linear)
    yield from parts


def _mask(linear: Node) -> object:
    """What sparse siblings share; dense ones have none."""
    if linear.target is aten.linear.default:
        return None
    given = arguments(linear)
    return given["threshold"], given["down"], given["dense_above"]


def _format(linear: Node) -> str:
    """What a template must agree on among sibling linears: how the weight is stored, and whether there is a bias."""
    weight = linear.args[1]
    if isinstance(weight, Node) and weight.target in DECODINGS:
        given = arguments(weight)
        kind = given.get("bits") or f"{given['format']} {given['packed']}"
        return f"{given['codes'].meta['val'].dtype} {given['zero'] is None} {kind} {given['group']} {given['dtype']}"
    return str(weight.meta["val"].dtype)  # type: ignore[union-attr]


def _gated_apart(linears: list[Node]) -> Iterator[list[Node]]:
    """Gate and up of one gated unit together; the others of the same input in one group."""
    rest = list(linears)
    for linear in linears:
        users = list(linear.users)
        if linear not in rest or len(users) != 1 or users[0].target is not ops.glu.overload:
            continue
        pair = [a for a in users[0].args[:2] if a in rest and len(a.users) == 1]  # type: ignore[union-attr]
        if len(pair) == 2 and pair[0] is not pair[1]:
            rest = [x for x in rest if x not in pair]
            yield pair  # type: ignore[misc]
    if rest:
        yield rest


def _grow(linears: list[Node], partition: Partition, taken: set[Node]) -> tuple[set[Node], str]:
    nodes = set(linears)
    name = "linear" if linears[0].target is aten.linear.default else "sparse linear"
    words = [name if len(linears) == 1 else f"{name} x{len(linears)}"]
    for linear in linears:
        weight = linear.args[1]
        if isinstance(weight, Node) and _is_decoded(weight) and len(weight.users) == 1:
            nodes.add(weight)
            if len(words) == 1:
                given = arguments(weight)
                words.insert(0, f"int{given['bits']}" if "bits" in given else given["format"])
    tail = _only_user_of_all(linears)
    if tail is not None and tail.target is ops.glu.overload and _may_join(tail, nodes, partition, taken):
        nodes.add(tail)
        words.append("glu")
    last: Node | None = tail if tail in nodes else (linears[0] if len(linears) == 1 else None)
    while last is not None and len(words) < LONGEST_EPILOGUE and len(last.users) == 1:
        user = next(iter(last.users))
        if kind(user) is not Kind.POINTWISE or is_view(user.target) or not _may_join(user, nodes, partition, taken):
            break
        if not _same_shape(user, last) or user.target is ops.glu.overload:
            break
        nodes.add(user)
        words.append(user.target._opname)  # type: ignore[union-attr]
        last = user
    source = linears[0].args[0]
    if (
        linears[0].target is aten.linear.default  # a mask is taken of what a norm has rounded, once for all programs
        and isinstance(source, Node)
        and source.target in (ops.rms_norm.overload, ops.layer_norm.overload)
        and all(user in nodes for user in source.users)
        and _may_join(source, nodes, partition, taken)
    ):
        nodes.add(source)
        words.insert(0, source.target._opname)  # type: ignore[union-attr]
    elif isinstance(source, Node) and _multiplied_as_codes(source, linears, nodes):
        if _may_join(source, nodes, partition, taken):
            nodes.add(source)
            words.insert(0, f"{source.args[0].meta['val'].dtype} codes".removeprefix("torch."))  # type: ignore[union-attr]
    return nodes, " + ".join(words)


def _is_decoded(weight: Node) -> bool:
    """Whether a template can read a weight's codes."""
    return weight.target is ops.dequantize.overload or products.refuse_words(weight) is None


def _multiplied_as_codes(source: Node, linears: list[Node], nodes: set[Node]) -> bool:
    """Whether the input is decoded for these linears alone, whose kernels multiply its codes as they are."""
    codes = products.activation(source)
    if codes is None or any(user not in nodes for user in source.users):
        return False
    weights = [linear.args[1] for linear in linears]
    dtype = codes[0].meta["val"].dtype
    return all(w in nodes and products.refuse_codes(w, dtype) is None for w in weights)  # type: ignore[arg-type, operator]


def _only_user_of_all(linears: list[Node]) -> Node | None:
    users = {user for linear in linears for user in linear.users}
    return next(iter(users)) if len(users) == 1 and len(linears) > 1 else None


def _may_join(node: Node, nodes: set[Node], partition: Partition, taken: set[Node]) -> bool:
    return (
        node.op == "call_function"
        and node not in taken
        and not touches_written(node)
        and partition.fits(nodes | {node})
    )


def _same_shape(first: Node, second: Node) -> bool:
    a, b = first.meta.get("val"), second.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return [*map(symbolic_expression, a.shape)] == [*map(symbolic_expression, b.shape)]
