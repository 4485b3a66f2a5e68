"""The evolutionary search for every group's share of the bytes and its split, by the loss of the whole model.

A candidate is a number a group, the logit of the share of its bytes that is read, and another one, the logarithm of
what its costs with a low-rank branch are multiplied by. All candidates keep the budget exactly: their logits are moved
together until they do (`fitted`). Parents are the best so far; children are mixtures of two, changed at random: for all
products of a kind, along the depth of the model, or at some groups. The first generation is the closed form and what
it becomes with slopes measured where it leads (`descent.py`), then the other allocations that cost no search. What is
found is held against the closed form on other data (`selection.py`), since a search fits what it is judged on.

Source: R-Sparse (Zhang et al., 2025), which searches the split of each product under equal shares; here shares are
searched with it. It is a (μ + λ) evolution strategy (Beyer and Schwefel, 2002).
"""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...compiler import checkpoint
from ...compiler.progress import bar, step
from .budgets import Choices, Shares, fitted, sensitivity, split
from .curves import Curve
from .descent import reweighted
from .groups import Group

PARENTS = 4
ROUNDS = 4
"""Of the closed form at the most: as it is, and again with measured slopes, until that is no better."""

EVERY = 20.0
"""Seconds between two writes of what was measured."""


@dataclass(frozen=True)
class Candidate:
    """shares: by group; lean: what the costs of a branch are multiplied by, by group; loss: measured."""

    shares: Shares
    lean: Mapping[Group, float]
    loss: float = math.inf


class Losses:
    """What candidates cost in the order they were asked for; a stopped search finds the first ones in a file.

    The search draws the same candidates again, as it depends on its seed and on these numbers alone.
    measure: gives a loss; slopes: a loss, and the slope of each group of the choices (`slopes.py`).
    """

    def __init__(
        self,
        path: Path | None,
        search: str,
        measure: Callable[[Choices], float],
        slopes: Callable[[Choices], tuple[float, Mapping[Group, float]]],
    ):
        self.path, self.search, self.measure, self.slopes = path, search, measure, slopes
        self.known: list[list[float]] = []
        self.asked, self.written = 0, time.monotonic()
        if path is not None and path.exists():
            self.known = json.loads(checkpoint.read(path, search)[1]["losses"])

    def __call__(self, choices: Choices) -> float:
        return self._next(lambda: [self.measure(choices)])[0]

    def sloped(self, choices: Choices) -> tuple[float, dict[Group, float]]:
        """A loss, and slopes by group."""

        def measured() -> list[float]:
            loss, slopes = self.slopes(choices)
            return [loss, *(slopes[group] for group in choices)]

        loss, *slopes = self._next(measured)
        return loss, dict(zip(choices, slopes, strict=True))

    def _next(self, measured: Callable[[], list[float]]) -> list[float]:
        if self.asked == len(self.known):
            self.known.append(measured())
            if time.monotonic() - self.written >= EVERY:
                self.write()
        self.asked += 1
        return self.known[self.asked - 1]

    def write(self) -> None:
        """Writes the losses so far."""
        if self.path is not None:
            checkpoint.write(self.path, self.search, {}, {"losses": json.dumps(self.known)})
            self.written = time.monotonic()

    def close(self) -> None:
        """Removes the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Found:
    """Of a search: all candidates in order of their loss, best first; those of the closed form, in the order of their
    rounds; each start with its loss; the loss of each trial."""

    candidates: list[Candidate]
    rounds: list[Candidate]
    starts: dict[str, Candidate]
    losses: list[float]

    @property
    def history(self) -> list[float]:
        """The best loss after each trial."""
        return list(itertools.accumulate(self.losses, min))


def evolve(
    starts: Mapping[str, Candidate],
    curves: Mapping[Group, Curve],
    share: float,
    losses: Losses,
    trials: int,
    seed: int,
) -> Found:
    """Searches for the candidate of least loss.

    starts: name → what costs no search, besides the closed form; trials: how many candidates are measured in all.
    """
    draw = random.Random(seed)
    found = Found([], [], {}, [])
    spread, weights = 0.25, dict.fromkeys(curves, 1.0)
    waiting, again = list(starts), True
    with bar("searching", trials) as progress:
        for _ in range(trials):
            if again:
                shares = sensitivity(curves, share, weights)
                choices = split(shares, curves, {})
                loss, slopes = losses.sloped(choices)
                weights = reweighted(curves, weights, slopes, choices)
                one = Candidate(shares, {}, loss)
                again = len(found.rounds) < ROUNDS - 1 and all(loss < other.loss for other in found.rounds)
                found.rounds.append(one)
            else:
                name = waiting.pop(0) if waiting else None
                drawn = starts[name] if name else _child(found.candidates[:PARENTS], share, spread, draw)
                one = replace(drawn, loss=losses(split(drawn.shares, curves, drawn.lean)))
                if name:
                    found.starts[name] = one
                else:  # one in five shall be better (Rechenberg, 1973)
                    better = one.loss < found.candidates[0].loss
                    spread = min(1.0, max(0.05, spread * (1.2 if better else 0.955)))
            found.candidates.append(one)
            found.candidates.sort(key=lambda other: other.loss)
            found.losses.append(one.loss)
            step(progress, f"searching: {found.candidates[0].loss:.4g}")
    return found


def _child(parents: Sequence[Candidate], share: float, spread: float, draw: random.Random) -> Candidate:
    one, other = draw.choice(parents), draw.choice(parents)
    mix = draw.random()
    groups = list(one.shares)
    logits = {g: mix * _logit(one.shares[g]) + (1 - mix) * _logit(other.shares[g]) for g in groups}
    lean = {g: (one if draw.random() < mix else other).lean.get(g, 1.0) for g in groups}
    way = draw.choice(("kind", "depth", "some", "lean"))
    if way == "kind":
        for kind in sorted({g.kind for g in groups}):
            push = draw.gauss(0, spread)
            logits |= {g: logits[g] + push for g in groups if g.kind == kind}
    elif way == "depth":
        centre, width, push = draw.random(), draw.uniform(0.05, 0.4), draw.gauss(0, 1.5 * spread)
        of = draw.choice([None, *sorted({g.kind for g in groups})])
        for i, g in enumerate(groups):
            if of in (None, g.kind):
                logits[g] += push * math.exp(-(((i / len(groups) - centre) / width) ** 2))
    elif way == "some":
        for g in groups:
            if draw.random() < 0.2:
                logits[g] += draw.gauss(0, spread)
    else:
        kind, factor = draw.choice(sorted({g.kind for g in groups})), math.exp(draw.gauss(0, spread))
        lean |= {g: lean[g] * factor for g in groups if g.kind == kind}
    return Candidate(fitted({g: 1 / (1 + math.exp(-v)) for g, v in logits.items()}, share), lean)


def _logit(share: float) -> float:
    share = min(max(share, 1e-4), 1 - 1e-4)
    return math.log(share / (1 - share))
