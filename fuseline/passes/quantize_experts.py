"""Routed experts: both stacks of a layer as codes, a row of codes for each row of each expert's matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from ..compiler import ops
from ..compiler.expressions import Expression, HalfQuadratic, Quantize as QuantizeExpression, Reshape, Transpose
from ..compiler.program import TRAINS, Program
from ..compiler.rewriter import Builder, Rewriter
from ..compiler.schemes import Scheme
from .calibrated import Method
from .merging.layers import Layer, Stack, layers
from .quantize_values import rounded_weight

if TYPE_CHECKING:
    from .quantize import Quantize

aten = torch.ops.aten
UNTRAINED = "experts are not trained through their rounding: skip=*.experts, and round them after the training"


def rounded_experts(step: Quantize, program: Program, rewriter: Rewriter) -> None:
    """One rewrite a layer, or a refusal with its reason."""
    for found in layers(program, step.only, step.skip):
        if not isinstance(found, Layer):
            node, reason = found
            rewriter.refuse(node, UNTRAINED if TRAINS in program.state else reason)
            continue
        schemes = step.candidates(found.path)
        refused = _refuse(step, program, found, schemes)
        if refused is not None:
            rewriter.refuse(found.node, refused)
        elif schemes:
            rewriter.rewrite(
                found.node, [found.node], lambda new, f=found, s=schemes[0]: _build(step, new, f, s), "experts"  # type: ignore[misc]
            )  # fmt: skip


def _refuse(step: Quantize, program: Program, layer: Layer, schemes: tuple[Scheme, ...]) -> str | None:
    if TRAINS in program.state:
        return UNTRAINED
    if step.activations:
        return "what experts read is not rounded: round their weights in a quantize without activations"
    if step.method not in (Method.RTN, Method.HQQ):
        return f"method={step.method.value} is for single products: method=rtn or method=hqq for experts"
    if len(schemes) > 1:
        return f"bits chooses for products: give experts a format, overrides={layer.path}:FORMAT"
    sizes = ((2 * layer.inner, layer.hidden), (layer.hidden, layer.inner))
    return next((r for s in schemes for m, n in sizes if (r := s.refuse(n, layer.experts * m)) is not None), None)


def _build(step: Quantize, new: Builder, layer: Layer, scheme: Scheme) -> Node:
    given = layer.given
    tables = [_rounded(step, new, layer, name, scheme) for name in ("gate_up", "down")]
    rest = [given[n] for n in ("gate_up_bias", "down_bias", "activation", "interleaved", "alpha", "limit")]
    return new(ops.moe, given["hidden"], given["indices"], given["weights"], *tables, *rest)


def _rounded(step: Quantize, new: Builder, layer: Layer, name: str, scheme: Scheme) -> Node:
    stack: Stack = getattr(layer, name)
    value = layer.given[name].meta["val"]
    e, m, n = (int(size) for size in value.shape)
    weight: Expression = Transpose(stack.weight, 1, 2) if stack.turned else stack.weight
    kind = HalfQuadratic if step.method is Method.HQQ else QuantizeExpression
    table = rounded_weight(new, kind(Reshape(weight, (e * m, n)), scheme), scheme, n, value.dtype)
    return new(aten.view.default, table, [e, m, n])
