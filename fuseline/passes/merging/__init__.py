"""Merge the experts of a mixture: `merge-experts`.

Before                                                     after  merge-experts{method=puzzle,ratio=0.5}
    y = moe(h, indices, weights, gate_up, down)                y = moe_pairs(h, indices, weights, pairs, pairs, rows, …)
        gate_up: bfloat16 [8, 2I, H]                               int16 words [4, 2I, H], two experts in each

`method`     what becomes of a layer's experts:
             puzzle   pairs share their magnitudes: weights that are alike in size become their mean, of others the
                      salient one stays and the other expert has zero there; each keeps its signs. The router, and which
                      experts run for a token, stay as they are. 16-bit words hold both (`formats/pairs.py`).
             average  random groups become their mean
             hc       clusters of alike mean outputs become their mean, by frequency (HC-SMoE)
             reap     those that contribute least go, with their rows of the router (REAP)
             partial-preservation  the more important half of what stays is left as it is, the other half absorbs what
                      goes, by importance (arXiv 2605.08738)
             milo     all stay, in codes of `weights` with low ranks that make up for what rounding loses (MiLo)
`ratio`      the share of the experts' memory that goes; puzzle: 0.5 at most, the others alone in their row
`tau`        puzzle: how much two magnitudes may differ, relative to their sum, and still be alike
`saliency`   puzzle: activation, |w| times the norm of its input over the expert's tokens; or magnitude, without data
`pairs`      puzzle: random; or searched, a matching of least cost over all experts of a layer
`pack`       puzzle: bf16, 16-bit words, for magnitudes from 2^-15 to 2^17; fp8 or int4, 10 or 6 bits a pair
             (`formats/pair_codes.py`), with a scale for each row or for `group` channels; none: matrices as large as
             before, to measure the merge alone
`importance` what experts are ranked by: reap, the mean weight times ‖output‖; frequency; or gate, the sum of weights
`router`     map: all rows stay, and the choice of any member is one of its group; slice: one row a group stays. auto:
             map for average and hc, slice for reap and partial-preservation
`weights`, `rank`, `ranks`, `compensator`, `rounds`   milo: the format, the mean rank of an expert, how ranks are
             divided (uniform; kurtosis of its weights; frequency of its tokens), the factors' own format (none: as they
             are), and how often codes and factors are fitted in turn
`only`, `skip`  module paths to take or to leave, with `*`, separated by `|`

`raise` finds the layers: it goes first. Experts that no calibration token chose count as the mean one for saliency.
`quantize` behind this pass rounds what average, hc, reap and partial-preservation leave.

Lossy. Sources: PuzzleMoE (2025); HC-SMoE (Chen et al., 2025); REAP (Lasby et al., 2026); arXiv 2605.08738 (2026),
partial preservation; MiLo (Huang et al., 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...compiler.errors import UserError
from ...compiler.framework import Findings, Pass, Study, Tier
from ...compiler.plan import SitePlan
from ...compiler.program import Program
from ...compiler.registry import register
from ...compiler.rewriter import Rewriter
from ...compiler.schemes import Scheme
from .decide import decide, decision, parameters
from .findings import findings
from .layers import Layer, layers
from .options import Importance, Method, Pack, Pairs, Ranks, Router, Saliency
from .rewrite import rewrite


@register
@dataclass(frozen=True)
class MergeExperts(Pass):
    """Experts of a mixture merged, packed in pairs, left out, or in few bits with low ranks."""

    name = "merge-experts"
    tier = Tier.LOSSY
    requires = frozenset({"raised"})
    example = "raise,merge-experts{saliency=magnitude}"
    trial = f'fuseline run demo:tiny-moe -p "{example}"'

    method: Method = Method.PUZZLE  # what becomes of a layer's experts
    ratio: float = 0.5  # the share of the experts' memory that goes
    tau: float = 0.4  # puzzle: how much magnitudes may differ and be alike
    saliency: Saliency = Saliency.ACTIVATION  # puzzle: which of two weights stays
    pairs: Pairs = Pairs.RANDOM  # puzzle: who becomes a pair
    pack: Pack = Pack.BF16  # puzzle: what pairs are stored as
    group: int = 64  # puzzle: channels that share a scale of fp8 and int4, 0 for a row
    importance: Importance = Importance.REAP  # what experts are ranked by
    router: Router = Router.AUTO  # what becomes of the router's rows
    weights: str = "int3:g64"  # milo: the format of codes
    rank: int = 16  # milo: of an expert, on average
    ranks: Ranks = Ranks.UNIFORM  # milo: how they are divided
    compensator: str = "int8:sym"  # milo: the format of factors, or none
    rounds: int = 10  # milo: codes and factors in turn
    seed: int = 0  # of random pairs and groups
    only: tuple[str, ...] = ()  # module paths to take
    skip: tuple[str, ...] = ()  # module paths to leave

    def __post_init__(self) -> None:
        top = 0.5 if self.method is Method.PUZZLE else 1.0
        if not 0 < self.ratio <= top or self.ratio == 1:
            limit = "0.5 at most, since two experts share a row" if top == 0.5 else "below 1"
            raise UserError(
                f"ratio={self.ratio:g}: the share that goes lies above 0, and is {limit}", remedy="ratio=0.5"
            )
        if not 0 <= self.tau < 1:
            raise UserError(f"tau={self.tau:g}: |a − b| ≤ tau·(a + b) holds for all from 1 on", remedy="tau=0.4")
        if self.router is Router.MAP and self.method in (Method.REAP, Method.PARTIAL):
            raise UserError(
                f"method={self.method.value} keeps one row of the router for each expert that stays",
                remedy="router=slice, or method=hc",
            )
        if self.router is not Router.AUTO and self.method in (Method.PUZZLE, Method.MILO):
            raise UserError(f"method={self.method.value} leaves the router as it is", remedy="leave `router` out")
        if self.rank < 0 or self.rounds < 1:
            raise UserError("a rank is 0 at least, and codes are fitted once at least", remedy="rank=16,rounds=10")
        if self.method is Method.MILO:
            self.schemes()

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        """Whether anything is decided from data."""
        if self.method is Method.PUZZLE:
            return self.saliency is Saliency.ACTIVATION
        return self.ranks is Ranks.FREQUENCY if self.method is Method.MILO else self.method is not Method.AVERAGE

    @property
    def routes(self) -> Router:
        """What becomes of the router, decided."""
        if self.router is not Router.AUTO:
            return self.router
        return Router.SLICE if self.method in (Method.REAP, Method.PARTIAL) else Router.MAP

    def schemes(self) -> tuple[Scheme, Scheme | None]:
        """milo: of codes and of factors."""
        factors = None if self.compensator == "none" else Scheme.parse(self.compensator, weights=True)
        return Scheme.parse(self.weights, weights=True), factors

    def decide(self, study: Study) -> dict[str, SitePlan]:
        return decide(self, study)

    def findings(self, decisions: Mapping[str, SitePlan]) -> Findings:
        return findings(decisions)

    def run(self, program: Program, rewriter: Rewriter) -> None:
        lookup = parameters(program)
        for found in layers(program, self.only, self.skip):
            if not isinstance(found, Layer):
                rewriter.refuse(*found)
                continue
            if self.needs_data:
                decided = rewriter.decision(found.node)
            else:
                decided = decision(self, found, rewriter.site(found.node), lookup, None)
            if decided is None:
                continue
            if "reason" in decided.structure:
                rewriter.refuse(found.node, decided.structure["reason"])
            else:
                rewrite(self, rewriter, found, decided)

    def nothing_matched(self, program: Program) -> tuple[str, ...]:
        return ("the program has no layer of routed experts that raise recognises",)
