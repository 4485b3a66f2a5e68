"""The gated unit between an expert's two products: its activation, and where gates and ups lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from ....compiler.ops.moe import ALPHA, CLAMPED, LIMIT
from ....compiler.traits import arguments
from ..nodes import op_name, value
from .reading import called, item


@dataclass(frozen=True)
class Gate:
    """both: what gates and ups are halves of [..., 2I]; the others as `fuseline::moe` takes them."""

    both: Node
    activation: str
    interleaved: bool = False
    alpha: float = ALPHA
    limit: float = LIMIT


def gate_of(node: Any) -> Gate | None:
    """The gated unit that a node computes; None where it is none that is known.

    Known are `fuseline::glu` of halves (so rules for gated units go first), and the clamped one.
    """
    found = called(node, "glu")
    if found is not None:
        return _of(found["gate"], found["up"], found["activation"])
    for up, gated in _operands(node, "mul"):
        clamped = _clamped(up, gated)
        if clamped is not None:
            return clamped
    return None


def _of(gate: Any, up: Any, activation: str, alpha: float = ALPHA, limit: float = LIMIT) -> Gate | None:
    first, second = half(gate), half(up)
    if first is None or second is None or first[0] is not second[0] or first[2] != second[2]:
        return None
    return Gate(first[0], activation, first[2], alpha, limit) if (first[1], second[1]) == (0, 1) else None


def _clamped(up: Any, gated: Any) -> Gate | None:
    """(clamp(u, ±c) + 1) · g·σ(a·g) with g = min(gate, c)."""
    plus = [x for x, one in _operands(up, "add") if one == 1]
    bounds = called(plus[0], "clamp") if plus else None
    found = called(gated, "glu")
    if bounds is None or found is None or found["activation"] != "sigmoid":
        return None
    low, scaled = found["up"], found["gate"]
    top = called(low, "clamp") or called(low, "clamp_max")
    alphas = [a for x, a in _operands(scaled, "mul") if x is low and isinstance(a, (int, float))]
    if top is None or top.get("min") is not None or not alphas:
        return None
    limit = top["max"]
    if bounds["max"] != limit or bounds["min"] != -limit or not isinstance(limit, (int, float)):
        return None
    return _of(top["self"], bounds["self"], CLAMPED, float(alphas[0]), float(limit))


def half(node: Any) -> tuple[Node, int, bool] | None:
    """What a node is a half of along the last dimension, which half, and whether halves are even and odd places."""
    for number in (0, 1):
        source = item(node, number, "chunk", "split", "split_with_sizes", "unbind")
        if source is not None:
            return _split(source, number)
    found = called(node, "slice", "narrow", "select")
    if found is None:
        return None
    x, rank = found["self"], value(found["self"]).dim()
    if found["dim"] % rank != rank - 1:
        return None
    size = value(x).shape[-1]
    if op_name(node) == "select":
        return _pairs(x, found["index"]) if size == 2 else None
    start = found["start"] or 0
    if op_name(node) == "narrow":
        end, step = start + found["length"], 1
    else:
        end, step = min(size if found["end"] is None else found["end"], size), found["step"]
    if step == 2 and start in (0, 1) and end >= size - 1 + start:
        return x, start, True
    if step == 1 and 2 * (end - start) == size and start in (0, size // 2):
        return x, int(start > 0), False
    return None


def _split(source: Node, number: int) -> tuple[Node, int, bool] | None:
    found = arguments(source)
    x, last = found["self"], value(found["self"]).dim() - 1
    if found["dim"] % (last + 1) != last:
        return None
    size = value(x).shape[-1]
    if op_name(source) == "unbind":
        return _pairs(x, number) if size == 2 else None
    parts = found.get("chunks", found.get("split_size", found.get("split_sizes")))
    is_half = parts == 2 if "chunks" in found else parts in (size // 2, [size // 2] * 2)
    return (x, number, False) if is_half and size % 2 == 0 else None


def _pairs(x: Node, number: int) -> tuple[Node, int, bool] | None:
    """Of [..., I, 2] that is [..., 2I] reshaped."""
    found = called(x, "view", "reshape", "unflatten", "_unsafe_view")
    if found is None or value(found["self"]).dim() != value(x).dim() - 1:
        return None
    return (found["self"], number % 2, True) if value(found["self"]).shape[-1] == 2 * value(x).shape[-2] else None


def _operands(node: Any, name: str) -> list[tuple[Any, Any]]:
    """Both orders of the operands of a sum or product, without a factor on the second one."""
    found = called(node, name)
    if found is None or found.get("alpha", 1) != 1:
        return []
    a, b = found["self"], found["other"]
    return [(a, b), (b, a)]
