"""The evolutionary search for every group's share of the bytes and its split, by the loss of the whole model.

A candidate is a number a group, the logit of the share of its bytes that is read, and another one, the logarithm of
what its costs with a low-rank branch are multiplied by. All candidates keep the budget exactly: their logits are moved
together until they do (`fitted`). Parents are the best so far; children are mixtures of two, changed at random: for all
products of a kind, along the depth of the model, or at some groups. The allocations that cost no search are the first
generation; what is found is held against them again on other data, since a search fits what it is judged on.

Source: R-Sparse (Zhang et al., 2025), which searches the split of each product under equal shares; here shares are
searched with it. It is a (μ + λ) evolution strategy (Beyer and Schwefel, 2002).
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...compiler import checkpoint
from ...compiler.progress import bar, step
from .budgets import Choices, Shares, fitted, split
from .curves import Curve
from .groups import Group

PARENTS = 4
EVERY = 20.0
"""Seconds between two writes of what was measured."""


@dataclass(frozen=True)
class Candidate:
    """shares: by group; lean: what the costs of a branch are multiplied by, by group; loss: measured."""

    shares: Shares
    lean: Mapping[Group, float]
    loss: float = math.inf


class Losses:
    """Losses of candidates in the order they were asked for; a search that was stopped finds its first ones in a file.

    The search draws the same candidates again, as it depends on its seed and on losses alone.
    """

    def __init__(self, path: Path | None, search: str, measure: Callable[[Choices], float]):
        self.path, self.search, self.measure = path, search, measure
        self.known: list[float] = []
        self.asked, self.written = 0, time.monotonic()
        if path is not None and path.exists():
            self.known = json.loads(checkpoint.read(path, search)[1]["losses"])

    def __call__(self, choices: Choices) -> float:
        if self.asked == len(self.known):
            self.known.append(self.measure(choices))
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


def evolve(
    starts: Sequence[Candidate],
    curves: Mapping[Group, Curve],
    share: float,
    losses: Losses,
    trials: int,
    seed: int,
) -> tuple[list[Candidate], list[float]]:
    """The candidates in order of their loss, best first, and the best loss after each trial.

    trials: how many candidates are measured in all, `starts` among them.
    """
    draw = random.Random(seed)
    found: list[Candidate] = []
    history: list[float] = []
    spread = 0.25
    with bar("searching", trials) as progress:
        for number in range(trials):
            drawn = starts[number] if number < len(starts) else _child(found[:PARENTS], share, spread, draw)
            loss = losses(split(drawn.shares, curves, drawn.lean))
            better = not found or loss < found[0].loss
            if number >= len(starts):  # one in five shall be better (Rechenberg, 1973)
                spread = min(1.0, max(0.05, spread * (1.2 if better else 0.955)))
            found.append(Candidate(drawn.shares, drawn.lean, loss))
            found.sort(key=lambda one: one.loss)
            history.append(found[0].loss)
            step(progress, f"searching: {found[0].loss:.4g}")
    return found, history


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
