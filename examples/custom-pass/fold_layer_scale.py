"""Fold the scale behind a linear into its weight: `fold-layer-scale`.

Before                                  after  fold-layer-scale
    y = linear(x, W, b) * s                 y = linear(x, diag(s)·W, s·b)

Exact: outputs agree within 1e-5 in float32. Source: LayerScale (Touvron et al., 2021), section 2.
"""

from dataclasses import dataclass

import torch

import fuseline
from fuseline.compiler.expressions import Scale
from fuseline.compiler.pattern import Var, call


def weight(node):
    """A node's weight expression; None for a value that is computed."""
    return getattr(node, "meta", {}).get("weight")


class Folded(fuseline.Rule):
    """linear(x, W, b) · s, with W, b and s parameters."""

    def __init__(self, training: bool):
        self.training = training

    def before(self, x, w, b, s):
        return call("linear", x, w, bias=Var("b")) * s

    def refuse(self, m):
        if self.training:
            return "it is being trained, and s needs its gradient: call the model under torch.no_grad()"
        if weight(m.s) is None or weight(m.w) is None:
            return "the weight or the scale is computed, not a parameter"
        if m.s.meta["val"].shape != m.w.meta["val"].shape[:1]:
            return f"the scale is {list(m.s.meta['val'].shape)}, not one number for each output"
        return None

    def after(self, m, new):
        folded = [new.weight(Scale(weight(node), weight(m.s), 0)) for node in (m.w, m.b) if node is not None]
        return new(torch.ops.aten.linear.default, m.x, *folded)


@fuseline.register
@dataclass(frozen=True)
class FoldLayerScale(fuseline.Pass):
    name = "fold-layer-scale"
    tier = fuseline.Tier.EXACT

    def rules(self, program):
        yield Folded(program.training)
