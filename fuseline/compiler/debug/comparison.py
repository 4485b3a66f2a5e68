"""What a comparison measured, as data: nodes, rewrites, passes, results, and what is at fault."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..provenance import source_line
from .cells import Cell
from .correspondence import Claim, Rewrite

# What a rewrite can be found to be; `FAULTS` are ones, of whatever pass.
FAULTS = ("shape", "not finite", "formula", "precision")
VERDICTS = (*FAULTS, "lossy", "regrouped", "below rounding", "rounding", "moved")
_WORDS = {
    "shape": "its result has another shape",
    "not finite": "it gives NaN or infinity where what it replaced does not",
    "formula": "it computes something else: the difference stays in float64",
    "precision": "it rounds worse: the formula is the same, and the difference goes in float64",
}


@dataclass
class RewriteError:
    """One value that a rewrite computes.

    local: the error of its computation on the reference's values; noise: that of the computation it replaced; change:
    its error in float64, where the formula alone counts.
    """

    rewrite: Rewrite
    node: str
    stands_for: str
    value: str
    position: int
    local: float
    noise: float
    change: float
    fits: bool = True
    broken: bool = False  # not finite where the computation that it replaced is
    verdict: str = "rounding"

    def judge(self, unit: float, wide: float, factor: float, floor: float) -> None:
        """Sets the verdict.

        Args:
            unit: of the last place, relative, in the program's precision; wide: in the reference's.
            floor: what is rounding where the two are one.
        """
        if not self.fits:
            self.verdict = "shape"
        elif self.broken:
            self.verdict = "not finite"
        elif unit == wide:
            self.verdict = "rounding" if self.local <= max(floor, factor * self.noise) else "formula"
        elif not self.change <= max(self.noise, unit / 2):
            self.verdict = "formula"
        elif not self.local <= factor * max(self.noise, unit):
            self.verdict = "precision"
        elif self.change > 1e3 * wide:
            self.verdict = "below rounding"
        if self.rewrite.lossy and self.verdict in ("formula", "precision", "below rounding"):
            self.verdict = "lossy"

    @property
    def fault(self) -> bool:
        return self.verdict in FAULTS

    def explain(self) -> str:
        """Why it diverges, for a person to read."""
        return _WORDS.get(self.verdict, self.verdict)

    def to_json(self) -> dict[str, Any]:
        r = self.rewrite
        return {
            "number": r.number, "pass": r.pass_name, "rule": r.rule, "site": r.site, "location": r.location,
            "line": r.line, "node": self.node, "stands_for": self.stands_for, "value": self.value, "local": self.local,
            "noise": self.noise, "change": self.change, "verdict": self.verdict, "lossy": r.lossy,
            "details": list(r.details),
        }  # fmt: skip


@dataclass
class NodeError:
    """One node of the rewritten program, run from its inputs on.

    noise: the error of the captured node; change: the error where both programs run in float64; rewrite: the last one
    that touched it.
    """

    node: str
    stands_for: str
    op: str
    region: str
    line: str | None
    error: float
    noise: float
    change: float
    ok: bool
    rewrite: Rewrite | None = None
    explained: bool = False  # a lossy rewrite, or one at fault, lies upstream

    def to_json(self) -> dict[str, Any]:
        return {
            "node": self.node, "stands_for": self.stands_for, "op": self.op, "region": self.region, "line": self.line,
            "error": self.error, "noise": self.noise, "change": self.change, "diverges": not self.ok,
            "explained": self.explained, "rewrite": self.rewrite.number if self.rewrite is not None else None,
        }  # fmt: skip


def node_error(cell: Cell, error: float, noise: float, change: float, ok: bool, claim: Claim) -> NodeError:
    """What was measured of a cell that must have a claimed value."""
    line = source_line(cell.node) if cell.node is not None else None
    op = str(getattr(cell.target, "_opname", None) or getattr(cell.target, "__name__", cell.kind))
    last = claim.rewrites[-1] if claim.rewrites else None
    return NodeError(cell.name, claim.cell.name, op, cell.region, line, error, noise, change, ok, last)


@dataclass
class OutputError:
    """One result, or one input that the program writes to ("state"), after the run."""

    name: str
    error: float
    noise: float
    ok: bool


@dataclass
class PassErrors:
    """One pass: how many rewrites, their largest local error and its noise, and what they were found to be.

    error: the largest error of the program's results after this pass, with all that the passes before it added.
    """

    name: str
    tier: str
    rewrites: int
    error: float | None
    local: float
    noise: float
    verdicts: dict[str, int]


@dataclass
class Comparison:
    """Everything that was measured. dtype: the program's own, as most of its values have it."""

    dtype: str
    nodes: list[NodeError] = field(default_factory=list)
    rewrites: list[RewriteError] = field(default_factory=list)
    outputs: list[OutputError] = field(default_factory=list)
    passes: list[PassErrors] = field(default_factory=list)
    stages: list[float] = field(default_factory=list)  # the largest error of the results after each pass
    unclaimed: int = 0  # nodes inside of rewrites: no node of the captured program has their value
    lossy: bool = False
    not_finite: str | None = None  # the first node with NaN or infinity where the captured program has none

    @property
    def faults(self) -> list[RewriteError]:
        """The rewrites at fault, in the order in which what they stand for is computed."""
        return sorted((r for r in self.rewrites if r.fault), key=lambda r: (r.position, r.rewrite.number))

    @property
    def first(self) -> RewriteError | None:
        """The first node that diverges by the rewrite that made it."""
        return next(iter(self.faults), None)

    @property
    def unexplained(self) -> NodeError | None:
        """The first node that diverges although every rewrite before it is right by itself."""
        return next((n for n in self.nodes if not n.ok and not n.explained), None)

    @property
    def ok(self) -> bool:
        """Whether only rounding, and what lossy passes are there for, stands between the two programs."""
        return self.first is None and self.unexplained is None and self.not_finite is None

    def worst(self, count: int) -> list[RewriteError]:
        """The rewrites with the largest local error, faults first; one value each."""
        best: dict[int, RewriteError] = {}
        for found in self.rewrites:
            known = best.get(found.rewrite.number)
            if known is None or _weight(found) > _weight(known):
                best[found.rewrite.number] = found
        return sorted(best.values(), key=_weight, reverse=True)[:count]

    def summarise(self, passes: Sequence[tuple[str, str]], rewrites: Sequence[Rewrite]) -> None:
        """Fills `passes` from (name, tier) and all rewrites, moved ones among them."""
        self.lossy = any(tier == "lossy" for _, tier in passes)
        errors = dict(zip((name for name, _ in passes), self.stages, strict=False))
        for name, tier in dict.fromkeys(passes):
            mine = [r for r in self.rewrites if r.rewrite.pass_name == name]
            made = [r for r in rewrites if r.pass_name == name]
            worst = max(mine, key=lambda r: r.local, default=None)
            local, noise = (worst.local, worst.noise) if worst is not None else (0.0, 0.0)
            verdicts = {v: sum(r.verdict == v for r in mine) for v in VERDICTS}
            verdicts["moved"] = sum(r.moved for r in made)
            found = {v: n for v, n in verdicts.items() if n}
            self.passes.append(PassErrors(name, tier, len(made), errors.get(name), local, noise, found))

    def to_json(self) -> dict[str, Any]:
        first, unexplained = self.first, self.unexplained
        return {
            "ok": self.ok,
            "dtype": self.dtype,
            "first": first.to_json() if first else None,
            "unexplained": unexplained.to_json() if unexplained else None,
            "not_finite": self.not_finite,
            "passes": [vars(p) for p in self.passes],
            "outputs": [vars(o) for o in self.outputs],
            "rewrites": [r.to_json() for r in self.rewrites],
            "nodes": [n.to_json() for n in self.nodes],
            "unclaimed": self.unclaimed,
        }


def _weight(found: RewriteError) -> tuple[bool, float, float]:
    return found.fault, found.local, found.noise
