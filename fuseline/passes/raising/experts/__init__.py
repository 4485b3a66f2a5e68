"""Routed experts → `fuseline.moe`, one call a layer.

    the layer's products, sorting and weighting       out = moe(hidden, indices, weights, gate_up, down, …, "silu")

Recognised are experts in one tensor (`stacked.py`: batched and grouped products) and experts in modules of their own
(`separate.py`: dense with masks, scattered weights, and gathered rows). The router in front stays as it is written:
softmax before or after the choice, sigmoids, groups. Shared experts are no part of the layer.

Source: Shazeer et al., 2017, "Outrageously Large Neural Networks".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from ....compiler import ops
from ....compiler.pattern import Match
from ....compiler.program import Program
from ....compiler.rewriter import Builder
from ....compiler.rule import Rule
from ..nodes import op_name, value
from .reading import below
from .separate import Separate, separate
from .stacked import Found, stacked

aten = torch.ops.aten

__all__ = ["SeparateExperts", "StackedExperts"]


class StackedExperts(Rule):
    """Experts whose matrices lie in two tensors [E, 2I, H] and [E, H, I], or these transposed."""

    def matches(self, program: Program) -> Iterator[Match]:
        for node in list(program.graph.nodes):
            if node._erased or op_name(node) not in ("sum", "to", "_to_copy"):
                continue
            found = stacked(node)
            if found is None:
                continue
            inside = _between(node, [found.hidden, found.indices, found.weights, found.gate_up, found.down])
            yield Match(node, {"found": found}, tuple(inside))

    def refuse(self, m: Match) -> str | None:
        found: Found = m.found
        experts = value(found.gate_up).shape[0]
        if not below(found.indices, experts):
            return f"the experts' numbers are not proved to lie in 0 … {experts - 1}: they come from no topk over them"
        return _types(found.hidden, found.gate_up, found.down)

    def after(self, m: Match, new: Builder) -> Node:
        found: Found = m.found
        stacks = [
            new(aten.transpose.int, stack, 1, 2) if turned else stack
            for stack, turned in zip((found.gate_up, found.down), found.turned, strict=True)
        ]
        gate = found.gate
        activation = (gate.activation, gate.interleaved, gate.alpha, gate.limit)
        rows = [found.hidden, found.indices, found.weights]
        return _moe(new, rows, stacks, [found.gate_up_bias, found.down_bias], activation)


class SeparateExperts(Rule):
    """Experts in modules of their own, whose results are weighted and added up one by one.

    training: whether the program wants gradients, which then pass through the stacks.
    """

    def __init__(self, training: bool):
        self.training = training

    def matches(self, program: Program) -> Iterator[Match]:
        for node in reversed(list(program.graph.nodes)):
            if node._erased or op_name(node) not in ("add", "index_add"):
                continue
            found = separate(node)
            if found is not None:
                yield Match(node, {"found": found}, tuple(_between(node, [found.hidden, found.indices, found.weights])))

    def refuse(self, m: Match) -> str | None:
        found: Separate = m.found
        if not below(found.indices, found.experts):
            return (
                f"the experts' numbers are not proved to lie in 0 … {found.experts - 1}: an expert may be missing here"
            )
        return _types(found.hidden)

    def after(self, m: Match, new: Builder) -> Node:
        found: Separate = m.found
        rows = [found.hidden, found.indices, found.weights]
        rank = value(found.hidden).dim()
        if rank > 2:
            rows = [new(aten.flatten.using_ints, x, 0, -2) for x in rows]
        stacks = found.stacks(new, self.training)
        out = _moe(new, rows, stacks[:2], stacks[2:], found.activation)
        out = out if rank == 2 else new(aten.view_as.default, out, found.hidden)
        return out if found.before is None else new(aten.add.Tensor, found.before, out)


def _moe(
    new: Builder, rows: list[Node], stacks: Sequence[Node | None], biases: Sequence[Node | None], activation: Any
) -> Node:
    hidden, indices, weights = rows
    if value(indices).dtype != torch.int64:
        indices = new(aten.to.dtype, indices, torch.int64)
    kind, interleaved, *numbers = activation
    return new(ops.moe, hidden, indices, weights, *stacks, *biases, kind, interleaved, *numbers)


def _types(hidden: Node, *stacks: Node) -> str | None:
    dtype = value(hidden).dtype
    others = [value(stack).dtype for stack in stacks if value(stack).dtype != dtype]
    return f"the experts are {others[0]}, and what they read is {dtype}" if others else None


def _between(root: Node, inputs: list[Node]) -> list[Node]:
    """What lies between the inputs and the root, in graph order: what the layer computes."""
    stops, found, pending = set(inputs), {root}, [root]
    while pending:
        for node in pending.pop().all_input_nodes:
            inside = node not in stops and node.op == "call_function" and node not in found
            if inside and not _before(node, stops):
                found.add(node)
                pending.append(node)
    return [node for node in root.graph.nodes if node in found]


def _before(node: Node, stops: set[Node]) -> bool:
    """Whether a node is read by one of the inputs, so that it belongs to what is in front of the layer."""
    return any(user in stops for user in node.users)
