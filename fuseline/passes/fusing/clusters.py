"""Clusters of pointwise and row operations: connected, convex, and over the same rows."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from ...compiler import ops, products
from ...compiler.compat import symbolic_expression
from ...compiler.ops import Kind
from ...compiler.order import Partition, is_barrier, touches_written
from ...compiler.program import Program
from ...compiler.traits import arguments, is_view, kind
from .linear import Region

LARGEST = 24


def clusters(program: Program, partition: Partition, taken: set[object]) -> Iterator[Region]:
    """Maximal clusters, grown along the graph; a lone pointwise op is left to PyTorch, a lone row operation is not."""
    member_of: dict[Node, int] = {}
    found: dict[int, set[Node]] = {}
    for node in program.graph.nodes:
        if node in taken or not _fusable(node):
            continue
        home = None
        for source in node.all_input_nodes:
            label = member_of.get(source)
            if label is None or len(found[label]) >= LARGEST or _space(source) != _space(node):
                continue
            if _rows_agree(found[label] | {node}) and partition.fits(found[label] | {node}, ("cluster", label)):
                home = label
                break
        if home is None:
            home = len(found)
            found[home] = set()
        found[home].add(node)
        member_of[node] = home
        if len(found[home]) > 1:
            partition.put(("cluster", home), found[home])
    for nodes in found.values():
        ordered = sorted(nodes, key=partition.reach.index.__getitem__)
        rows = [n for n in ordered if kind(n) is Kind.ROW]
        if len(ordered) < 2 and not rows:
            continue
        yield Region("pointwise", "rows" if rows else "pointwise", ordered)


def _fusable(node: Node) -> bool:
    value = _first(node.meta.get("val"))
    if node.target is operator.getitem:
        return isinstance(node.args[0], Node) and kind(node.args[0]) is Kind.ROW and _fusable(node.args[0])
    return (
        node.op == "call_function"
        and kind(node) in (Kind.POINTWISE, Kind.ROW)
        and not is_view(node.target)
        and any(isinstance(_first(n.meta.get("val")), torch.Tensor) for n in node.all_input_nodes)
        and isinstance(value, torch.Tensor)
        and value.dim() > 0
        and not touches_written(node)
        and not is_barrier(node)
        and products.refuse_rows(node) is None
    )


def _space(node: Node) -> tuple[object, ...]:
    """The iteration space that a node's rows live in: its leading sizes, and its device.

    Sizes are compared as expressions: to ask two symbols for equality would tie them together for good.
    """
    value = _first(node.meta["val"])
    return (*map(symbolic_expression, value.shape[:-1]), value.device)


def _rows_agree(nodes: set[Node]) -> bool:
    """Whether what a Hadamard transform mixes is the row of the other row operations, too: it holds rows whole."""
    if not any(n.target is ops.hadamard.overload for n in nodes):
        return True
    return len({_row(n) for n in nodes if n.target is not operator.getitem and kind(n) is Kind.ROW}) == 1


def _row(node: Node) -> object:
    """The channels that a row operation mixes."""
    given = arguments(node)
    width = symbolic_expression(node.all_input_nodes[0].meta["val"].shape[-1])
    return given.get("block") or given.get("group") or width


def _first(value: Any) -> Any:
    """A value, or the first of several: all outputs of a row operation share their rows."""
    return value[0] if isinstance(value, (tuple, list)) else value
