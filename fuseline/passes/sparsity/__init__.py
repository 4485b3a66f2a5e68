"""Leave out the input channels that are small: `rsparse`.

Before                                  after  rsparse{budget=0.5}
    q = linear(h, Wq)                       q = sparse_linear(h, Wqᵀ, t, down, upq)     channels |h_j| <= t dropped,
    k = linear(h, Wk)                       k = sparse_linear(h, Wkᵀ, t, down, upk)     a low rank in their place
    v = linear(h, Wv)                       v = sparse_linear(h, Wvᵀ, t, down, upv)     where that pays

y ≈ W·σ(x) + up·down·(x − σ(x)): σ keeps the channels of each row that are larger than a threshold, and what is left out
goes through few dimensions. Products of one input share the mask and `down`. With one row, what σ drops is not read.

`budget`     the share of the products' bytes that is read, of the whole model: kept columns, and the branch
`budgets`    how it is divided among products:
             searched     the closed form with slopes measured again, then evolution, by the loss of the whole model on
                          `calls` calibration calls, `trials` candidates; kept where it is better on the other calls
             sensitivity  in closed form, by what each costs to second order
             greedy       block by block, the cheapest step next (TEAL)
             uniform      the same share everywhere
`split`      of a product's bytes, the share that goes to channels: `searched`, or a number (R-Sparse 0.95, TEAL 1)
`low_rank`   auto: a branch only where it costs less than channels for its bytes; on: everywhere; off: nowhere
`factors`    data: fitted to what the mask drops; weights: the weights' singular vectors, as published
`score`      abs: by |x_j|; norm-weighted: by |x_j|·‖W_:,j‖, as a threshold for each channel
`prefill`    dense: calls of more than `rows` rows are dense; sparse: all rows are sparse, in a dense product
`rows`       rows up to which kernels leave channels out; with more, the union of the masks is all channels
`only`, `skip`  module paths to take or to leave, with `*`, separated by `|`

Thresholds are quantiles over the calibration data. Refused, and counted as dense within the budget: products whose
input is rotated at run time, or the same at every position. Routed experts, which are one op, are refused too. The head
over the vocabulary is left alone unless `only` names it. Every linear of a program can be a site, whatever its shape;
bytes are the true ones of each.

Weights are stored input-major. `quantize` behind this pass packs codes along the outputs, so that a dropped channel is
dropped bytes.

Lossy. Sources: R-Sparse (Zhang et al., 2025); TEAL (Liu et al., 2025); WINA (Chen et al., 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch.fx import Node

from ...compiler import ops
from ...compiler.errors import UserError
from ...compiler.expressions import Cast, Expression, Fitted, Planned, Transpose
from ...compiler.framework import Findings, Pass, Study, Tier
from ...compiler.plan import SitePlan
from ...compiler.program import Program
from ...compiler.registry import register
from ...compiler.rewriter import Builder, Rewriter
from ..quantize_sites import Site, sites
from .budgets import Budgets
from .decide import decide
from .factors import Factors
from .findings import findings
from .groups import left_out
from .options import LowRankUse, Prefill, Score

MOST_ROWS = 16
"""Of half-sparse masks, so many leave one channel in 65,536 to none."""


@register
@dataclass(frozen=True)
class RSparse(Pass):
    """Input channels below a threshold are left out, with a low rank in their place where that pays."""

    name = "rsparse"
    tier = Tier.LOSSY
    needs_data = True
    example = "raise,rsparse{budget=0.5,budgets=sensitivity}"

    budget: float = 0.5  # the share of the products' bytes that is read
    budgets: Budgets = Budgets.SEARCHED  # how it is divided among products
    split: str = "searched"  # the share of a product's bytes for channels; or searched
    score: Score = Score.ABS  # what a channel's size is
    low_rank: LowRankUse = LowRankUse.AUTO  # where the branch is used
    factors: Factors = Factors.DATA  # what it is fitted to
    prefill: Prefill = Prefill.DENSE  # what calls of many rows do
    rows: int = 4  # rows up to which kernels leave channels out
    trials: int = 64  # candidates that a search measures
    calls: int = 2  # calibration calls that each is measured on
    seed: int = 0  # of the search
    only: tuple[str, ...] = ()  # module paths to take
    skip: tuple[str, ...] = ()  # module paths to leave

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise UserError(
                f"budget={self.budget:g}: the share of the bytes that is read lies above 0, and is 1 at most",
                remedy="rsparse{budget=0.5}",
            )
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise UserError(
                f"split={self.split}: the share of a product's bytes for channels lies above 0, and is 1 at most",
                remedy="split=0.95, or split=searched",
            )
        if not 1 <= self.rows <= MOST_ROWS:
            raise UserError(
                f"rows={self.rows}: with more than {MOST_ROWS} rows some row keeps every channel, and none is left out",
                remedy="rows=4; calls of more rows are dense (prefill=dense)",
            )
        if self.trials < 1 or self.calls < 1:
            raise UserError("a search takes one trial and one call at least", remedy="trials=64,calls=2")

    @property
    def ratio(self) -> float | None:
        """`split` as a number; None where it is searched."""
        if self.split == "searched":
            return None
        try:
            return float(self.split)
        except ValueError:
            raise UserError(f"split={self.split} is neither a number nor 'searched'", remedy="split=0.95") from None

    def decide(self, study: Study) -> dict[str, SitePlan]:
        return decide(self, study)

    def findings(self, decisions: Mapping[str, SitePlan]) -> Findings:
        found = findings(decisions)
        if self.prefill is Prefill.SPARSE:
            return found
        note = f"calls of more than {self.rows} rows are dense: to measure on windows of text, prefill=sparse"
        return replace(found, lines=(*found.lines, note))

    def run(self, program: Program, rewriter: Rewriter) -> None:
        for node in program.graph.nodes:
            if node.target is ops.moe.overload:
                reason = "its experts' products are in one op, which reads all channels"
                rewriter.refuse(node, f"{reason}: raise{{experts=false}} keeps them apart")
        for site in sites(program):
            if left_out(site, self.only, self.skip):
                continue
            decision = rewriter.decision(site.node)
            if decision is None:
                continue
            if "reason" in decision.structure:
                rewriter.refuse(site.node, decision.structure["reason"])
                continue
            leader = rewriter.decisions[decision.structure["leader"]]
            rewriter.rewrite(
                site.node,
                [site.node],
                lambda new, site=site, own=decision, leader=leader: self._sparse(new, site, own, leader),  # type: ignore[misc]
                "linear",
            )

    def _sparse(self, new: Builder, site: Site, own: SitePlan, leader: SitePlan) -> Node:
        device, dtype = str(site.node.meta["val"].device), site.node.meta["val"].dtype
        threshold = new.weight(Planned.of(leader.tensors["threshold"], device))
        factors: list[Node | None] = [None, None]
        if "up" in own.tensors:
            one, other = own.structure["probe"]
            down: Expression = Planned.of(leader.tensors["down"], device)
            up: Expression = Fitted(site.weight, Planned.of(own.tensors["up"], device), (one, other))
            factors = [new.weight(Cast(down, dtype)), new.weight(Cast(up, dtype))]
        limit = self.rows if self.prefill is Prefill.DENSE else 0
        weight = new.weight(Transpose(site.weight, 0, 1))
        return new(ops.sparse_linear, site.x, weight, threshold, *factors, site.bias, limit)

    def nothing_matched(self, program: Program) -> tuple[str, ...]:
        found = list(sites(program))
        if not found:
            return ("the program has no product with a parameter",)
        return (f"it has {len(found)} products, such as {found[0].path}, and the plan knows none of them",)
