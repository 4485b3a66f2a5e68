"""A product on a rounded weight and rounded activations, in the place of the one on the weight itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from ..compiler.expressions import Expression
from ..compiler.plan import SitePlan
from ..compiler.rewriter import Builder
from .quantize_sites import Site
from .quantize_training import by_thresholds, trained_weight
from .quantize_values import round_trip, rounded_weight

if TYPE_CHECKING:
    from .quantize import Quantize

aten = torch.ops.aten


def quantized(
    new: Builder,
    site: Site,
    codes: Expression | None,
    step: Quantize,
    inputs: dict[Node, Node],
    name: str,
    decision: SitePlan | None,
) -> Node:
    """codes: the expression of the weight's codes, None to leave the weight; inputs: those that were rounded so far;
    name, decision: the site's, and the plan's for it, where there is one."""
    schemes = step.schemes()
    weights, activations = schemes["weights"], schemes["activations"]
    x, (_, channels) = site.x, site.shape
    dtype = x.meta["val"].dtype
    if activations is not None:
        if x not in inputs:
            placed = activations.thresholds
            inputs[x] = (
                by_thresholds(new, x, activations, name, decision) if placed else round_trip(new, x, activations)
            )
        x = inputs[x]
    if codes is None or weights is None:
        table = new.weight(site.weight)
    elif new.trains:
        table = trained_weight(new, new.weight(site.weight), weights, step.method)
    else:
        table = rounded_weight(new, codes, weights, channels, dtype)
    if site.kernel is not None:
        return _convolution(new, site, table)
    if site.bias is not None and site.bias.meta["val"].dim() != 1:  # `addmm` adds anything that broadcasts
        return new(aten.add.Tensor, new(aten.linear.default, x, table, None), site.bias)
    return new(aten.linear.default, x, table, site.bias)


def _convolution(new: Builder, site: Site, matrix: Node) -> Node:
    """The same call on the matrix folded back to [out, in / groups, *kernel], in the memory format that it had."""
    before = site.node.args[1].meta["val"]  # type: ignore[union-attr]
    table = new(aten.view.default, matrix, list(site.kernel))  # type: ignore[arg-type]
    for layout in (torch.channels_last, torch.channels_last_3d):
        if before.dim() == (4 if layout is torch.channels_last else 5) and not before.is_contiguous():
            if before.is_contiguous(memory_format=layout):
                table = new(aten.clone.default, table, memory_format=layout)
    return new(site.node.target, site.x, table, *site.node.args[2:], **site.node.kwargs)
