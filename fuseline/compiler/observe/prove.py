"""Prove: a proof of a run, rewrite by rewrite, for the passes that declare an algebra (`compiler/algebra`).

    program, proof = fuseline.prove(program, "raise,rotate{r1,r2,r4}")
    print(proof)
    proof.check()

A rewrite is judged by the graphs before and after it, so that a proof covers this run and not the pass (translation
validation, Pnueli et al., 1998). Rewrites that claim the same of other layers are judged once.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..action import Action, Observer
from ..algebra.letters import MEANING, ORTHOGONAL, Rotation, residual
from ..algebra.numeric import BOUND
from ..algebra.region import NotTranslated, Region, Snapshot, regions
from ..algebra.statement import Statement, state
from ..errors import UserError, VerificationError
from ..framework import Pass
from ..program import Program
from ..report import Report

if TYPE_CHECKING:
    from ..pipeline import Pipeline
    from ..plan import Plan


@dataclass
class Proof:
    """What was proved of a run.

    statements: one for each kind of rewrite; rotations: max|R·Rᵀ − 1| of each orthogonal matrix in them; unread:
    pass → rewrites of a pass that declares no algebra, of which nothing is said.
    """

    pipeline: str
    statements: list[Statement] = field(default_factory=list)
    rotations: dict[str, float] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many statements about replaced values were read, of all layers."""
        return sum(s.count for s in self.statements)

    @property
    def proved(self) -> int:
        return sum(s.count for s in self.statements if s.is_proved)

    @property
    def axioms(self) -> dict[str, int]:
        """Axiom → how often it was used, in all layers; the most used first."""
        used: Counter[str] = Counter()
        for s in self.statements:
            used.update({axiom: n * s.count for axiom, n in s.axioms.items()})
        return dict(used.most_common())

    @property
    def is_complete(self) -> bool:
        """Whether there are statements, all proved, and every rotation is orthogonal."""
        return 0 < self.proved == self.count and all(r <= ORTHOGONAL for r in self.rotations.values())

    def check(self) -> None:
        """Nothing, where the proof is complete.

        Raises:
            VerificationError: a statement is not proved, or a rotation is not orthogonal.
            UserError: there was no rewrite to prove.
        """
        if not self.count:
            raise UserError(
                f"'{self.pipeline}' made no rewrite that could be proved", remedy='-p "raise,rotate{r1,r2,r4}"'
            )
        details = []
        for s in self.statements:
            if not s.is_proved:
                off = f"max|Δ|/max|before| {s.error:.1e}" if s.error is not None else f"no numbers: {s.reason}"
                details += [f"{s.rule}: {s.status} ({off}), {s.count} times, first at {s.sites[0]}"]
                details += [f"  {s.text}"] if s.text else []
                details += [f"  left: {s.left}"] if s.left else []
        bent = {name: r for name, r in self.rotations.items() if r > ORTHOGONAL}
        details += [f"{name} is not orthogonal: max|R·Rᵀ − 1| = {r:.1e}" for name, r in bent.items()]
        if details:
            raise VerificationError(
                f"{self.count - self.proved} of {self.count} statements are not proved", details,
                "fuseline bisect names the first rewrite that changes the results",
            )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        statements = [{**dataclasses.asdict(s), "proved": s.is_proved} for s in self.statements]
        return {
            "pipeline": self.pipeline, "count": self.count, "proved": self.proved, "complete": self.is_complete,
            "bound": BOUND, "statements": statements, "axioms": self.axioms, "rotations": self.rotations,
            "unread": self.unread,
        }  # fmt: skip

    def __str__(self) -> str:
        lines = [f"{self.proved} of {self.count} statements of '{self.pipeline}' are proved"]
        lines += [f"{s.count} x {s.rule}: {s.status}\n    {s.text}" for s in self.statements]
        return "\n".join(lines)


class Prove(Observer):
    """Proves the rewrites of every pass that declares an algebra; `proof` holds what was found."""

    def __init__(self) -> None:
        self.proof = Proof("")
        self._step: Pass | None = None
        self._seen: Snapshot | None = None
        self._known: dict[tuple[str, str], Statement] = {}

    def pipeline_starts(self, pipeline: Pipeline, program: Program) -> None:
        self.proof = Proof(str(pipeline))
        self._known.clear()
        if not any(step.algebra for step in pipeline.passes):
            raise UserError(
                f"no pass of '{pipeline}' says what its rewrites claim, so there is nothing to prove",
                remedy='-p "raise,rotate{r1,r2,r4}"',
            )

    def pass_starts(self, step: Pass, program: Program) -> None:
        self._step = step

    def allows(self, action: Action) -> bool:
        if self._step is not None and self._step.algebra is not None:
            self._seen = Snapshot(action.root.graph)
        return True

    def rewritten(self, action: Action, program: Program) -> None:
        seen, self._seen = self._seen, None
        if seen is None:
            unread = self.proof.unread
            unread[action.pass_name] = unread.get(action.pass_name, 0) + 1
            return
        try:
            for region in regions(action, seen):
                self._add(action, self._statement(action.rule, region, program))
        except NotTranslated as reason:
            key = (action.rule, f"not translated: {reason}")
            self._add(action, self._known.setdefault(key, Statement(action.rule, status=key[1])))

    def _statement(self, rule: str, region: Region, program: Program) -> Statement:
        assert self._step is not None and self._step.algebra is not None
        key = (rule, region.signature(program))
        if key not in self._known:
            made = state(rule, region, program, self._step.algebra)
            same = next((s for s in self.proof.statements if s.says(made)), None)
            if same is not None:
                same.error = max(same.error or 0.0, made.error or 0.0)
            self._known[key] = made if same is None else same
        return self._known[key]

    def _add(self, action: Action, found: Statement) -> None:
        if not found.count:
            self.proof.statements.append(found)
        found.count += 1
        found.sites.append(action.site)

    def pipeline_ends(self, program: Program, report: Report) -> None:
        used = {name for s in self.proof.statements for name in s.rotations}
        rotations = {str(s): m for s, m in MEANING.items() if isinstance(m, Rotation)}
        self.proof.rotations = {name: residual(rotations[name]) for name in sorted(used)}


def prove(program: Program, pipeline: Pipeline | str, plan: Plan | None = None) -> tuple[Program, Proof]:
    """Runs a pipeline, and returns the program that it makes with the proof of its rewrites.

    Raises:
        UserError: no pass of the pipeline declares an algebra.
    """
    from ..pipeline import Pipeline

    observer = Prove()
    after, _ = Pipeline(pipeline).run(program, [observer], plan=plan)
    return after, observer.proof
