"""Products with a weight, rewritten: inputs go through codes of the run, weights through codes of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Node

from ..compiler import ops
from ..compiler.expressions import Expression
from ..compiler.plan import SitePlan
from ..compiler.program import TRAINS
from ..compiler.rewriter import Builder, Rewriter
from ..compiler.schemes import Scheme
from .calibrated import Method
from .quantize_sites import Site
from .quantize_training import Trained, by_thresholds, record, trained_weight
from .quantize_values import round_trip, round_trip_at, rounded_weight

aten = torch.ops.aten


@dataclass(frozen=True)
class Coded:
    """A weight's codes: the expression whose outputs are codes, scales and zero points, and their scheme."""

    expression: Expression
    scheme: Scheme


Codes = Callable[[Site], Coded | None]
"""A site's codes; None to leave the site, which is refused then."""


class Products:
    """Rounds products one by one; a value that several read is rounded once."""

    def __init__(self, rewriter: Rewriter, method: Method):
        self.rewriter, self.method = rewriter, method
        self.inputs: dict[tuple[Node, Scheme], Node] = {}

    def round(
        self, site: Site, codes: Coded | None, activations: Scheme | None, decision: SitePlan | None = None
    ) -> None:
        """One rewrite.

        Args:
            codes: of the weight, None to leave it.
            activations: what the input is rounded to, None to leave it.
            decision: holds the input's range where `activations` is static.
        """
        rule, name = "convolution" if site.kernel else "linear", self.rewriter.site(site.node)
        build = lambda new: self._build(new, site, codes, activations, decision, name)
        done = self.rewriter.rewrite(site.node, [site.node], build, rule)
        if done and codes is not None and TRAINS in self.rewriter.program.state:
            record(self.rewriter.program, Trained(name, site.weight, codes.scheme, self.method))

    def _build(
        self,
        new: Builder,
        site: Site,
        codes: Coded | None,
        activations: Scheme | None,
        decision: SitePlan | None,
        name: str,
    ) -> Node:
        x, (_, channels) = site.x, site.shape  # along which codes lie
        dtype = x.meta["val"].dtype
        if activations is not None:
            if (x, activations) not in self.inputs:
                self.inputs[x, activations] = self._rounded(new, x, activations, decision, name)
            x = self.inputs[x, activations]
        if codes is None:
            table = new.weight(site.weight)
        elif new.trains:
            table = trained_weight(new, new.weight(site.weight), codes.scheme, self.method)
        else:
            table = rounded_weight(new, codes.expression, codes.scheme, channels, dtype)
        if site.kernel is not None:
            return _convolution(new, site, table)
        if site.is_sparse:
            return new(ops.sparse_linear, x, table, *site.node.args[2:])
        if site.bias is not None and site.bias.meta["val"].dim() != 1:  # `addmm` adds anything that broadcasts
            return new(aten.add.Tensor, new(aten.linear.default, x, table, None), site.bias)
        return new(aten.linear.default, x, table, site.bias)

    def _rounded(self, new: Builder, x: Node, scheme: Scheme, decision: SitePlan | None, name: str) -> Node:
        if scheme.thresholds:
            return by_thresholds(new, x, scheme, name, self.rewriter.decisions.get(name))
        if scheme.static and decision is not None:
            return round_trip_at(new, x, scheme, decision)
        return round_trip(new, x, scheme)


def _convolution(new: Builder, site: Site, matrix: Node) -> Node:
    """The same call on the matrix folded back to [out, in / groups, *kernel], in the memory format that it had."""
    before = site.node.args[1].meta["val"]  # type: ignore[union-attr]
    table = new(aten.view.default, matrix, list(site.kernel))  # type: ignore[arg-type]
    for layout in (torch.channels_last, torch.channels_last_3d):
        if before.dim() == (4 if layout is torch.channels_last else 5) and not before.is_contiguous():
            if before.is_contiguous(memory_format=layout):
                table = new(aten.clone.default, table, memory_format=layout)
    return new(site.node.target, site.x, table, *site.node.args[2:], **site.node.kwargs)
