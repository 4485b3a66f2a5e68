"""A pass of one's own: a rule with a refusal, an option, and what the report says.

    python examples/own_pass.py

The rule finds `x * sigmoid(x)` and writes `silu(x)`; operands in the other order are the matcher's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

import fuseline
from fuseline.compiler.pattern import Match, Term, Var, call
from fuseline.compiler.rewriter import Builder


class Silu(fuseline.Rule):
    """x·sigmoid(x) is silu(x) (Elfwing et al., 2018)."""

    def __init__(self, narrow: bool):
        self.narrow = narrow

    def before(self, x: Var) -> Term:
        return x * call("sigmoid", x)

    def refuse(self, m: Match) -> str | None:
        dtype = m.x.meta["val"].dtype
        if dtype.itemsize < 4 and not self.narrow:
            return f"silu rounds {dtype} once and this writes it twice: allow it with swish{{narrow}}"
        return None

    def after(self, m: Match, new: Builder) -> Node:
        return new(torch.ops.aten.silu.default, m.x)


@fuseline.register
@dataclass(frozen=True)
class Swish(fuseline.Pass):
    """Write silu(x) for x·sigmoid(x)."""

    name = "swish"
    tier = fuseline.Tier.EXACT

    narrow: bool = False  # 16-bit types too

    def rules(self, program: fuseline.Program) -> Iterator[fuseline.Rule]:
        yield Silu(self.narrow)


class Net(torch.nn.Module):
    """Two sites, one of them in bfloat16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.sigmoid(x) * x
        z = y.bfloat16()
        return y + z * torch.sigmoid(z)


def main() -> None:
    x = torch.randn(4, 8)
    program = fuseline.capture(Net(), (x,))
    for text in ("swish", "swish{narrow}"):
        after, report = fuseline.Pipeline(text).run(program)
        record = report["swish"]
        print(f"{text}: {record.matched} rewritten, nodes {record.nodes_before} → {record.nodes_after}")
        for site, reason in record.refused.items():
            print(f"  refused {site}: {reason}")
        gap = (after.to_module()(x) - Net()(x)).abs().max().item()
        print(f"  outputs differ by at most {gap:.1e}")
        assert gap < 1e-1 and record.matched == (2 if "narrow" in text else 1)


if __name__ == "__main__":
    main()
