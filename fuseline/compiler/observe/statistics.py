"""Statistics: which rules fired where."""

from __future__ import annotations

from collections import Counter

from ..action import Action, Observer
from ..program import Program


class Statistics(Observer):
    """Rewrites by rule and by op removed, and every action in order."""

    def __init__(self) -> None:
        self.rules: Counter[str] = Counter()
        self.removed: Counter[str] = Counter()
        self.actions: list[Action] = []

    def rewritten(self, action: Action, program: Program) -> None:
        self.rules[f"{action.pass_name}/{action.rule}"] += 1
        self.removed.update(str(node.target) for node in action.removed if node._erased)
        self.actions.append(action)
