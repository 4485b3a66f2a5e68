"""Statistics: which rules were tried where, which fired, which refused, and what that took."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from ..action import Action, Observer
from ..framework import Pass
from ..program import Program
from ..rule import Rule, searching


@dataclass
class RuleStatistics:
    """One rule of one pass, summed over every program that was watched.

    tried: nodes whose op is the outermost of one of its patterns, None for a rule or pass that searches in its own way;
    rewritten: sites where it fired; refused: sites where it fitted and gave a reason not to; ms: search and rewrites.
    """

    tried: int | None = None
    rewritten: int = 0
    refused: int = 0
    ms: float = 0.0


class Statistics(Observer):
    """Rewrites by rule and by op removed, and every action in order.

    by_rule: (pass, rule) → its figures. Passes with a run of their own have no rule to time: their rewrites are counted
    under the names that they give, their refusals under the rule "".
    """

    def __init__(self) -> None:
        self.rules: Counter[str] = Counter()
        self.removed: Counter[str] = Counter()
        self.actions: list[Action] = []
        self.by_rule: dict[tuple[str, str], RuleStatistics] = {}
        self._pass, self._rule = "", ""

    def pass_starts(self, step: Pass, program: Program) -> None:
        self._pass, self._rule = step.name, ""

    @contextlib.contextmanager
    def applying(self, rule: Rule, program: Program) -> Iterator[None]:
        self._rule, started = rule.name, time.perf_counter()
        figures = self._figures(rule.name)
        with searching() as searched:
            try:
                yield
            finally:
                figures.ms += (time.perf_counter() - started) * 1e3
                if searched.terms:
                    hits = figures.rewritten + figures.refused  # some rules have a search of their own besides
                    figures.tried = max((figures.tried or 0) + searched.nodes, hits)
                self._rule = ""

    def rewritten(self, action: Action, program: Program) -> None:
        self.rules[f"{action.pass_name}/{action.rule}"] += 1
        self.removed.update(str(node.target) for node in action.removed if node._erased)
        self.actions.append(action)
        self._figures(action.rule).rewritten += 1

    def refused(self, site: str, reason: str) -> None:
        self._figures(self._rule).refused += 1

    def _figures(self, rule: str) -> RuleStatistics:
        return self.by_rule.setdefault((self._pass, rule), RuleStatistics())
