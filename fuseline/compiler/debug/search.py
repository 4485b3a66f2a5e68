"""The search behind `reduce`: the smallest case so far, and whether another is still interesting.

A case is a program and a pipeline. What is interesting is decided by a `Judge`: a check in this process that must find
the same fault again, or a command that must end as it did at first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..errors import VerificationError
from ..pipeline import Pipeline
from ..program import Program
from ..structure import structural_hash
from ..verifier import verify
from .check import Verdict
from .culprit import Culprit
from .extract import calls
from .values import Values


@dataclass(frozen=True)
class Case:
    """A program, and the pipeline that goes wrong over it."""

    program: Program
    pipeline: Pipeline

    @property
    def nodes(self) -> int:
        """How many nodes compute something."""
        return len(calls(self.program))

    def __str__(self) -> str:
        return f"{self.nodes} nodes, {len(self.program.placeholders)} inputs, {self.pipeline}"


class Judge(Protocol):
    """Whether a case still shows the fault; what it found is kept with the case."""

    def __call__(self, case: Case) -> Verdict | None: ...


class Enough(Exception):
    """The search has spent what it was given."""


@dataclass
class Search:
    """Keeps the best case; strategies propose others.

    most, seconds: how many checks and how much time it may take. improved: told each better case. checked: told each
    check, with what is tried.
    """

    best: Case
    verdict: Verdict
    judge: Judge
    culprit: Culprit | None = None
    most: int | None = None
    seconds: float | None = None
    improved: Callable[[Case, Verdict], None] = lambda case, verdict: None
    checked: Callable[[str], None] = lambda what: None
    checks: int = 0
    started: float = field(default_factory=time.monotonic)
    _seen: set[str] = field(default_factory=set)
    _values: Values | None = None

    def __post_init__(self) -> None:
        self._seen.add(_key(self.best))

    def tries(self, what: str, program: Program | None = None, pipeline: Pipeline | None = None) -> bool:
        """Takes a case (None: the best one's program or pipeline) if it is valid and still interesting.

        Raises:
            Enough: no check is left.
        """
        case = Case(program or self.best.program, pipeline or self.best.pipeline)
        key = _key(case)
        if key in self._seen:
            return False
        self._seen.add(key)
        if self.spent:
            raise Enough
        self.checks += 1
        self.checked(what)
        try:
            verify(case.program)
        except VerificationError:
            return False
        verdict = self.judge(case)
        if verdict is None:
            return False
        if case.program is not self.best.program:
            self._values = None
        self.best, self.verdict = case, verdict
        self.improved(case, verdict)
        return True

    @property
    def spent(self) -> bool:
        late = self.seconds is not None and time.monotonic() - self.started >= self.seconds
        return late or (self.most is not None and self.checks >= self.most)

    @property
    def values(self) -> Values | None:
        """The values of the best program's nodes; None where it has no example inputs, or does not run on them."""
        if self.best.program.examples is None:
            return None
        if self._values is None:
            self._values = Values(self.best.program)
        return self._values


Strategy = Callable[[Search], bool]
"""Proposes smaller cases; returns whether one was taken."""


def minimise(items: list[str], test: Callable[[list[str]], bool]) -> bool:
    """Delta debugging (Zeller and Hildebrandt, 2002): the smallest list that `test` takes, up to single items.

    `test` is asked about parts of the last list that it took. Returns whether it took any.
    """
    taken, parts = False, 2
    while len(items) >= 2:
        size = -(-len(items) // parts)
        chunks = [items[i : i + size] for i in range(0, len(items), size)]
        rests = [[x for other in chunks if other is not chunk for x in other] for chunk in chunks]
        candidates = [(chunk, 2) for chunk in chunks] if parts <= 4 else []
        candidates += [(rest, max(parts - 1, 2)) for rest in rests if parts > 2]
        for candidate, next_parts in candidates:
            if test(candidate):
                items, parts, taken = candidate, next_parts, True
                break
        else:
            if parts >= len(items):
                break
            parts = min(2 * parts, len(items))
    return taken


def _key(case: Case) -> str:
    shapes = [list(x.shape) for x in case.program.examples or () if isinstance(x, torch.Tensor)]
    return f"{structural_hash(case.program)} {case.pipeline} {shapes} {case.program.examples is None}"
