"""Results that are computed when somebody reads them: which ones can be, and how.

A model called with labels returns logits beside its loss, and a training loop reads the loss alone. Where the loss is
fused with the linear layer that makes the logits, they are a *tail* of the graph: a linear layer and pointwise
operations, which nothing else in the graph reads. The compiled graph then returns what the linear reads, a row of H
values in the place of one of V; `runtime/deferred.py` computes the rest when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from .expressions import Param
from .ops import linear_cross_entropy
from .traits import arguments

DEFERS = "results may be deferred"
"""In `Program.state`: results go back to the caller as they are, who reads them or does not."""

_POINTWISE = ("mul", "div", "tanh", "to", "_to_copy", "contiguous", "clone")


@dataclass(frozen=True)
class Tail:
    """x, weight and bias are nodes; steps: what follows the linear, its other arguments, and each result's type."""

    x: Node
    weight: Node
    bias: Node | None
    dtype: torch.dtype
    steps: tuple[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], torch.dtype], ...]

    def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The result, from the values of its nodes: [..., H] → [..., V]; each step in the type that the graph has."""
        with torch.autocast(x.device.type, enabled=False):
            result = F.linear(x.to(self.dtype), weight.to(self.dtype), None if bias is None else bias.to(self.dtype))
            for target, args, options, dtype in self.steps:
                result = target(result, *args, **options).to(dtype)
        return result

    @property
    def result(self) -> torch.dtype:
        return self.steps[-1][3] if self.steps else self.dtype


def tail_of(node: Node) -> Tail | None:
    """The tail that ends in a node; None where it is none. The weight is a parameter as the caller passed it."""
    steps = []
    while getattr(node.target, "_opname", "") in _POINTWISE and node.op == "call_function":
        first, *rest = node.args
        others = (*rest, *node.kwargs.values())
        if not isinstance(first, Node) or any(isinstance(a, Node) for a in others) or node.meta.get("written"):
            return None
        steps.append((node.target, tuple(rest), dict(node.kwargs), node.meta["val"].dtype))
        node = first
    if getattr(node.target, "_opname", "") != "linear" or node.meta.get("written"):
        return None
    given = arguments(node)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    if not all(n is None or is_input(n) for n in (weight, bias)):
        return None
    return Tail(x, weight, bias, node.meta["val"].dtype, tuple(reversed(steps)))  # type: ignore[arg-type]


def is_input(node: Node) -> bool:
    """Whether a node is a tensor as the caller passed it, and stays that."""
    if node.meta.get("written"):
        return False
    if node.op == "placeholder":
        return True
    return node.op == "get_attr" and isinstance(node.meta.get("weight"), Param)


def returned(node: Node) -> Node | None:
    """What the caller gets of a node that nobody else reads, in another type or so; None where somebody does."""
    while getattr(node.target, "_opname", "") in _POINTWISE and len(node.users) == 1:
        user = next(iter(node.users))
        if user.op == "output":
            return node
        node = user
    return None


def cut(module: GraphModule) -> tuple[GraphModule, dict[int, Tail]]:
    """A lifted graph in plain ATen without the tails of its fused losses, and the tails by the results they make.

    The new graph returns what a tail's linear reads in the place of its result.
    """
    graph = module.graph
    fused = {_source(n.args[1]) for n in graph.nodes if n.target is linear_cross_entropy.overload}
    output = graph.output_node()
    results = output.args[0]
    if not fused or not isinstance(results, (list, tuple)):
        return module, {}
    found: dict[int, Tail] = {}
    for position, node in enumerate(results):
        tail = tail_of(node) if isinstance(node, Node) else None
        if tail is not None and tail.weight in fused:
            found[position] = tail
    if found:
        output.args = (type(results)(found[i].x if i in found else r for i, r in enumerate(results)),)
        graph.eliminate_dead_code()
        module.recompile()
    return module, found


def _source(weight: Any) -> Any:
    """The parameter behind a cast."""
    while isinstance(weight, Node) and getattr(weight.target, "_opname", "") in ("to", "_to_copy"):
        weight = weight.args[0]
    return weight


def positions(tail: Tail, placeholders: Sequence[Node]) -> tuple[int, int | None]:
    """Where a tail's weight and bias stand among a graph's inputs."""
    order = {node: i for i, node in enumerate(placeholders)}
    return order[tail.weight], None if tail.bias is None else order[tail.bias]
