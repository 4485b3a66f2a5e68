"""From a loss up to the linear layer that makes its logits: what lies between, and why it cannot be passed over.

Between them may lie one cast, products with numbers, a soft cap (a tanh between numbers), and whatever only moves rows:
reshapes that keep the last dimension, slices, transpositions. Rows moved after the linear are rows moved before it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from ...compiler.deferred import returned
from ...compiler.index_reader import literal
from ...compiler.provenance import source_line
from ...compiler.rewriter import Builder
from ...compiler.traits import arguments, is_transpose
from ..raising.nodes import CASTS, op_name, same_size, value

aten = torch.ops.aten
RESHAPES = ("view", "reshape", "_unsafe_view")
COPIES = ("contiguous", "clone")
ALONG = dict.fromkeys(("slice", "narrow", "select", "index_select", "unsqueeze", "squeeze", "unflatten"), "dim")
ALONG["flatten"] = "end_dim"
"""Ops that move rows along one dimension, and that dimension's name: of several the last."""


@dataclass
class Chain:
    """The way from a loss's logits up to a linear layer.

    linear: the layer's node; logits = softcap·tanh(scale·linear / softcap); moves: the nodes that move rows, the
    loss's side first; nodes: all of them, the linear last; returned: what the caller gets of them.
    """

    linear: Node
    scale: float = 1.0
    softcap: float = 0.0
    moves: list[Node] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    returned: list[Node] = field(default_factory=list)


def follow(logits: Node, loss: Node) -> Chain | str:
    """The chain behind `logits`, which `loss` reads; or why there is none, for a person."""
    chain = Chain(logits)
    node, reader = logits, loss
    numbers: list[float] = []  # between the loss and the cap; then those above the cap
    types = [value(logits).dtype]
    cap: float | None = None
    while True:
        reason = _other_reader(node, reader, chain)
        if reason is not None:
            return reason
        chain.nodes.append(node)
        name = op_name(node)
        if name in ("linear", "matmul", "mm"):
            break
        if node.op != "call_function" or node.meta.get("written"):
            return f"the logits come from '{node.name}', not from a linear layer"
        source = node.args[0]
        if name == "tanh" and cap is None:
            cap, numbers = math.prod(numbers), []
        elif name in ("mul", "div"):
            source, factor = _factor(node, name)
            if factor is None:
                return f"the logits are {'scaled' if name == 'mul' else 'divided'} by a tensor"
            numbers.append(factor)
        elif name in CASTS and value(source).device == value(node).device:  # type: ignore[arg-type]
            types.append(value(source).dtype)  # type: ignore[arg-type]
        elif _moves_rows(node, name):
            chain.moves.append(node)
        elif name not in COPIES:
            return f"the logits pass through {name or node.name}, which the fused loss does not know"
        reader, node = node, source  # type: ignore[assignment]
    chain.linear = node
    if sum(a != b for a, b in itertools.pairwise(types)) > 1:
        return f"the logits are cast more than once: {' → '.join(str(t) for t in types[::-1])}"
    inside = math.prod(numbers)
    if cap == 0 or inside == 0:
        return "the logits are multiplied by 0"
    chain.scale, chain.softcap = (inside, 0.0) if cap is None else (inside * cap, cap)
    return chain


def _factor(node: Node, name: str) -> tuple[Any, float | None]:
    """x and c of x·c, where c is a number; None for c else."""
    x, other, *_ = arguments(node).values()
    if arguments(node).get("rounding_mode") is not None:
        return x, None
    first, second = literal(x), literal(other)
    if isinstance(second, (int, float)) and isinstance(first, Node):
        return x, float(second) if name == "mul" else (1.0 / second if second else 0.0)
    return (other, float(first)) if name == "mul" and isinstance(first, (int, float)) else (x, None)


def _moves_rows(node: Node, name: str) -> bool:
    """Whether each row of the result (its last dimension) is a row of the source."""
    source = node.args[0]
    before, after = value(source), value(node)  # type: ignore[arg-type]
    if before.dim() < 1 or after.dim() < 1 or not same_size(before.shape[-1], after.shape[-1]):
        return False
    given = arguments(node)
    if name in RESHAPES:
        return isinstance(before.shape[-1], int) and isinstance(node.args[1], (list, tuple))  # not as another dtype
    if name in ALONG:
        rank = after.dim() if name == "unsqueeze" else before.dim()
        dim = given.get(ALONG[name])
        return isinstance(dim, int) and dim % rank != rank - 1
    if name == "transpose":
        return all(given[d] % before.dim() != before.dim() - 1 for d in ("dim0", "dim1"))
    return name == "permute" and given["dims"][-1] % before.dim() == before.dim() - 1


def _other_reader(node: Node, reader: Node, chain: Chain) -> str | None:
    """Notes what the caller gets of a node; a reason where something else reads it."""
    for user in node.users:
        if user is reader or user in chain.nodes:
            continue
        result = node if user.op == "output" else returned(user)
        if result is None:
            line = source_line(user)
            return f"the logits are also read by {op_name(user) or user.name}{f' at {line}' if line else ''}"
        chain.returned.append(result)
    return None


def rows_of(chain: Chain, new: Builder) -> tuple[Node, Node, Node | None]:
    """The rows that the loss reads, as inputs of the linear [..., H], its weight [V, H] and its bias.

    Under autocast they are cast to the type that the linear works in.
    """
    given = list(arguments(chain.linear).values())
    x, weight, bias = (*given, None)[:3]
    if op_name(chain.linear) != "linear":  # x @ W
        weight = weight.args[0] if is_transpose(weight) else new(aten.t.default, weight)
        bias = None
    dtype = value(chain.linear).dtype
    x, weight, bias = (n if n is None or value(n).dtype == dtype else new(aten.to.dtype, n, dtype) for n in
                       (x, weight, bias))  # fmt: skip
    size = value(x).shape[-1]
    for node in reversed(chain.moves):
        if op_name(node) in RESHAPES:
            x = new(aten.reshape.default, x, [*node.args[1][:-1], size])  # type: ignore[index, misc]
        else:
            x = new(node.target, x, *node.args[1:], **node.kwargs)
    return x, weight, bias
