"""Quantization, read back from what `quantize` left in a graph."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from ..compiler import ops
from ..compiler.expressions import Decode, Dequantize, Expression, Quantize as QuantizeExpression, rounding_in
from ..compiler.program import Program
from ..compiler.schemes import Scheme
from ..compiler.traits import arguments


@dataclass(frozen=True)
class Rounded:
    """A value x that a graph rounds at run time."""

    x: Node
    scheme: Scheme


def dequantized(node: Any) -> Dequantize | Decode | None:
    """The weight, as an expression, where a node is a quantized weight expanded."""
    if not isinstance(node, Node) or node.target not in (ops.dequantize.overload, ops.decode.overload):
        return None
    parts = {name: part.meta.get("weight") for name, part in arguments(node).items() if isinstance(part, Node)}
    if any(part is None for part in parts.values()) or quantization(parts.get("codes")) is None:
        return None
    kind = Dequantize if node.target is ops.dequantize.overload else Decode
    return kind(**{**arguments(node), **parts})


def quantization(value: Any) -> QuantizeExpression | None:
    """What is quantized and how, in the expression of a quantized weight or of a part of one."""
    return rounding_in(value) if isinstance(value, Expression) else None


def rounded(node: Any) -> Rounded | None:
    """The value and the scheme, where a node is a value quantized at run time and expanded."""
    if not isinstance(node, Node) or node.target not in (ops.dequantize.overload, ops.decode.overload):
        return None
    part: Any = node.args[0]
    made = part.args[0] if isinstance(part, Node) and part.target is operator.getitem else None
    if not isinstance(made, Node):
        return None
    x: Any = made.args[0]
    if made.target is ops.encode.overload:
        _, format, group = made.args
        whole = int(x.meta["val"].shape[-1])
        scheme = Scheme(str(format), 0 if group in (0, whole) else group, rows=1 if group else 0)  # type: ignore[arg-type]
        return Rounded(x, scheme)
    if made.target not in (ops.quantize.overload, ops.quantize_affine.overload):
        return None
    _, bits, group = made.args
    whole = int(x.meta["val"].shape[-1])
    symmetric = made.target is ops.quantize.overload
    return Rounded(x, Scheme(f"int{bits}", 0 if group == whole else group, symmetric))  # type: ignore[arg-type]


def quantized_weights(program: Program) -> list[QuantizeExpression]:
    """Every weight that a program reads as codes, once."""
    found = (quantization(node.meta["weight"]) for node in program.weights())
    return [*dict.fromkeys(one for one in found if one is not None)]
