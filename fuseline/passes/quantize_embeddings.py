"""Embeddings: codes and scales gathered by row, and only the gathered rows dequantized."""

from __future__ import annotations

import torch
from torch.fx import Node

from ..compiler.expressions import Param, Quantize as QuantizeExpression
from ..compiler.program import Program
from ..compiler.rewriter import Builder, Rewriter
from ..compiler.schemes import Scheme
from .calibrated import Method
from .quantize_training import needs_gradient, trained_weight
from .quantize_values import rounded_weight

aten = torch.ops.aten


def rounded_embedding(program: Program, rewriter: Rewriter, node: Node, scheme: Scheme) -> None:
    """One rewrite of an `aten.embedding`, or a refusal with its reason."""
    table, indices = node.args[:2]
    expression = table.meta.get("weight") if isinstance(table, Node) else None
    if not isinstance(expression, Param):
        rewriter.refuse(node, "the embedding's table is computed, not a parameter")
        return
    rows, channels = (int(s) for s in table.meta["val"].shape)  # type: ignore[union-attr]
    reason = scheme.refuse(channels, rows) or needs_gradient(program, expression)
    if reason:
        rewriter.refuse(node, reason)
        return

    def build(new: Builder) -> Node:
        if new.trains:
            rounded = trained_weight(new, table, scheme, Method.RTN)
            return new(aten.embedding.default, rounded, *node.args[1:], **node.kwargs)
        gathered = lambda part: new(aten.embedding.default, part, indices)
        codes = QuantizeExpression(expression, scheme)
        return rounded_weight(new, codes, scheme, channels, node.meta["val"].dtype, gathered)

    rewriter.rewrite(node, [node], build, "embedding")
