"""Quantization, read back from what `quantize` left in a graph."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from ..compiler import ops
from ..compiler.expressions import Dequantize, Expression, rounding_in
from ..compiler.expressions import Quantize as QuantizeExpression
from ..compiler.program import Program
from ..compiler.schemes import Scheme


@dataclass(frozen=True)
class Rounded:
    """A value x that a graph rounds at run time."""

    x: Node
    scheme: Scheme


def dequantized(node: Any) -> Dequantize | None:
    """The weight, as an expression, where a node is a quantized weight expanded."""
    if not isinstance(node, Node) or node.target is not ops.dequantize.overload:
        return None
    *parts, bits, group, dtype = node.args
    codes, scale, zero = (part.meta.get("weight") if isinstance(part, Node) else None for part in parts)
    if codes is None or scale is None or quantization(codes) is None:
        return None
    return Dequantize(codes, scale, zero, bits, group, dtype)  # type: ignore[arg-type]


def quantization(value: Any) -> QuantizeExpression | None:
    """What is quantized and how, in the expression of a quantized weight or of a part of one."""
    return rounding_in(value) if isinstance(value, Expression) else None


def rounded(node: Any) -> Rounded | None:
    """The value and the scheme, where a node is a value quantized at run time and expanded."""
    if not isinstance(node, Node) or node.target is not ops.dequantize.overload:
        return None
    part: Any = node.args[0]
    made = part.args[0] if isinstance(part, Node) and part.target is operator.getitem else None
    if not isinstance(made, Node) or made.target not in (ops.quantize.overload, ops.quantize_affine.overload):
        return None
    x, bits, group = made.args
    whole = int(x.meta["val"].shape[-1])  # type: ignore[union-attr]
    symmetric = made.target is ops.quantize.overload
    return Rounded(x, Scheme(f"int{bits}", 0 if group == whole else group, symmetric))  # type: ignore[arg-type]


def quantized_weights(program: Program) -> list[QuantizeExpression]:
    """Every weight that a program reads as codes, once."""
    found = (quantization(node.meta["weight"]) for node in program.weights())
    return [*dict.fromkeys(one for one in found if one is not None)]
