"""Products with a weight, rewritten: inputs go through codes of the run, weights through codes of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from ..compiler.expressions import Expression
from ..compiler.rewriter import Builder, Rewriter
from ..compiler.schemes import Scheme
from .quantize_sites import Site
from .quantize_values import round_trip, rounded_weight

aten = torch.ops.aten
Codes = Callable[[Site], Expression | None]
"""The expression whose outputs are a site's codes, scales and zero points; None to leave the site, which is refused."""


class Products:
    """Rounds products one by one; a value that several read is rounded once.

    weights, activations: what they are rounded to, None to leave them.
    """

    def __init__(self, rewriter: Rewriter, weights: Scheme | None, activations: Scheme | None):
        self.rewriter, self.weights, self.activations = rewriter, weights, activations
        self.inputs: dict[Node, Node] = {}

    def round(self, site: Site, codes: Expression | None) -> None:
        """One rewrite; codes: of the weight, None to leave it."""
        rule = "convolution" if site.kernel else "linear"
        self.rewriter.rewrite(site.node, [site.node], lambda new: self._build(new, site, codes), rule)

    def _build(self, new: Builder, site: Site, codes: Expression | None) -> Node:
        x, (_, channels) = site.x, site.shape
        dtype = x.meta["val"].dtype
        if self.activations is not None:
            if x not in self.inputs:
                self.inputs[x] = round_trip(new, x, self.activations)
            x = self.inputs[x]
        if codes is not None and self.weights is not None:
            table = rounded_weight(new, codes, self.weights, channels, dtype)
        else:
            table = new.weight(site.weight)
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
