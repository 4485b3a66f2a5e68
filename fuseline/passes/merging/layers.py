"""Layers of routed experts in a program: their stacks of matrices, and why some cannot be merged."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ...compiler import ops
from ...compiler.expressions import Expression, Output
from ...compiler.program import Program
from ...compiler.traits import arguments
from ..quantize_sites import path_of

BIASES = ("gate_up_bias", "down_bias")


@dataclass(frozen=True)
class Stack:
    """A weight of a layer, [E, m, n]; turned: the expression is stored [E, n, m]."""

    weight: Expression
    turned: bool = False


@dataclass(frozen=True)
class Layer:
    """A call of `fuseline::moe` over parameters. experts: E; hidden: H; inner: I; itemsize: bytes of an element."""

    node: Node
    path: str
    gate_up: Stack
    down: Stack
    biases: tuple[Expression | None, Expression | None]
    experts: int
    hidden: int
    inner: int

    @property
    def given(self) -> dict[str, Any]:
        """The call's arguments by name."""
        return arguments(self.node)

    @property
    def chosen(self) -> int:
        """Experts a token."""
        return int(self.given["indices"].meta["val"].shape[1])

    @property
    def bytes(self) -> int:
        """Of its matrices."""
        return 3 * self.experts * self.hidden * self.inner * self.given["gate_up"].meta["val"].dtype.itemsize


def layers(program: Program, only: Sequence[str] = (), skip: Sequence[str] = ()) -> Iterator[Layer | tuple[Node, str]]:
    """Each layer, or its node and the reason why it is left, in graph order; those that options leave out are not."""
    for node in list(program.graph.nodes):
        if node.target is ops.moe_pairs.overload:
            yield node, "its experts are packed in pairs already"
        elif node.target is ops.moe.overload:
            given = arguments(node)
            stacks = [_stack(given[name]) for name in ("gate_up", "down")]
            path = path_of(_source(given["gate_up"]))
            named = lambda patterns, path=path: any(fnmatch.fnmatchcase(path, one) for one in patterns)
            if named(skip) or (only and not named(only)):
                continue
            reason = _refuse(program, stacks)
            if reason:
                yield node, reason
                continue
            own = [None if given[name] is None else given[name].meta.get("weight") for name in BIASES]
            biases = (own[0], own[1])
            experts, twice, hidden = (int(size) for size in given["gate_up"].meta["val"].shape)
            gate_up, down = stacks
            assert gate_up is not None and down is not None
            yield Layer(node, path, gate_up, down, biases, experts, hidden, twice // 2)


def _source(table: Node) -> Node:
    """The weight behind a transposed view."""
    name = getattr(table.target, "_opname", "")
    return table.args[0] if table.op == "call_function" and name == "transpose" else table  # type: ignore[return-value]


def _stack(table: Any) -> Stack | None:
    source = _source(table)
    weight = source.meta.get("weight")
    if not isinstance(weight, Expression) or not weight.parameters():
        return None
    if source is not table and {d % 3 for d in table.args[1:3]} != {1, 2}:
        return None
    return Stack(weight, source is not table)


def _refuse(program: Program, stacks: Sequence[Stack | None]) -> str | None:
    for stack in stacks:
        if stack is None:
            return "its experts are computed, and are no parameters"
        if any(isinstance(part, Output) for part in stack.weight.walk()):
            return "its experts are codes already: merge before they are quantized"
        if program.training and any(program.sources[name].trainable for name in stack.weight.parameters()):
            return "its experts want gradients: compile under torch.no_grad(), or freeze them"
    return None


def stacked(layer: Layer, lookup: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrices [E, 2I, H] and [E, H, I], views where they are parameters."""
    found = []
    for stack in (layer.gate_up, layer.down):
        value = stack.weight.evaluate(lookup)
        found.append(value.transpose(1, 2) if stack.turned else value)
    return found[0], found[1]
