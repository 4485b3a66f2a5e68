"""A pass with a bug, to hunt with the debugger: docs/debugging.md follows it from the wrong result to its line.

It folds the scale of each RMSNorm into the linears behind it, so that the norm multiplies by nothing:

    linear(rms_norm(x, scale), W)  →  linear(rms_norm(x), W·diag(scale))

Exact, were it right. Run this file to see that it is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import fuseline
from fuseline.compiler.expressions import Scale
from fuseline.compiler.ops import rms_norm


class FoldedScale(fuseline.Rule):
    """The scale of a norm, into the weight of one linear that reads it."""

    def matches(self, program):
        from fuseline.compiler.pattern import Match

        for node in list(program.graph.nodes):
            if node.target is torch.ops.aten.linear.default and node.args[0].target is rms_norm.overload:
                yield Match(node, {"norm": node.args[0], "weight": node.args[1]}, (node,))

    def refuse(self, m):
        return None if "weight" in getattr(m.norm.args[1], "meta", {}) else "the norm has no scale"

    def after(self, m, new):
        x, scale, *options = m.norm.args
        shape = m.weight.meta["val"].shape
        inputs = shape.index(scale.meta["val"].shape[0])  # the dimension of the inputs
        weight = new.weight(Scale(m.weight.meta["weight"], scale.meta["weight"], inputs))
        plain = new(rms_norm, x, None, *options)
        return new(torch.ops.aten.linear.default, plain, weight, *m.root.args[2:])


@fuseline.register
@dataclass(frozen=True)
class FoldScale(fuseline.Pass):
    """Folds the scales of norms into weights; wrongly where a weight is square."""

    name = "fold-scale"
    tier = fuseline.Tier.EXACT

    def rules(self, program):
        yield FoldedScale()


def main() -> None:
    """Bisects the pass on a small model, as `fuseline bisect` does on any."""
    from fuseline.compiler.debug.bisect import Bisection
    from fuseline.compiler.debug.check import Check
    from fuseline.compiler.debug.in_process import InProcess
    from fuseline.models import load

    loaded = load("demo:tiny-decoder")
    torch.manual_seed(0)
    for name, parameter in loaded.model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    program = fuseline.capture(loaded.model, loaded.example_args, loaded.example_kwargs)
    found = Bisection(InProcess(program, fuseline.Pipeline("raise,fold-scale"), Check.parse("any"))).search()
    print(f"rewrite {found.number} of {found.rewrites}, after {found.runs} runs: {found.entry.site}")
    print("\n".join(found.entry.before + found.entry.after))


if __name__ == "__main__":
    main()
