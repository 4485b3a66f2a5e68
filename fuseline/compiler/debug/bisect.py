"""Bisection: which single rewrite makes a check fail, found by running with the first N rewrites alone.

Numbers of rewrites are stable below the limit, so one failing run's journal serves the whole search: it splits at the
ends of passes first, and inside the guilty pass then. A fault that does not show at every run is searched for with a
posterior over all rewrites (Bayesian bisection: a failure is conclusive, a success only evidence).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ..errors import UserError
from ..observe.limit import Entry

Progress = Callable[[str], None]
REPEATED = 100  # rewrites by one rule at one site, after which it will never stop
RETRIES = 4  # of a run that contradicts the search, before the fault is called flaky


@dataclass
class Outcome:
    """One run: `failed` is None where it cannot tell (exit code 125, as for `git bisect run`).

    entries: the rewrites that happened, by process; endless: it was stopped for taking too long.
    """

    failed: bool | None
    entries: dict[str, list[Entry]] = field(default_factory=dict)
    detail: str = ""
    endless: bool = False

    @property
    def longest(self) -> list[Entry]:
        return max(self.entries.values(), key=len, default=[])


Run = Callable[[int | None, frozenset[int]], Outcome]


@dataclass
class Culprit:
    """What a search found.

    kind: "rewrite", the one named in `entries` (by process: several compile the same graphs in a distributed job);
    "endless", a pass that rewrites for ever, of which `entries` holds the first of the repeated rewrites; "nothing",
    the check holds with all rewrites; "elsewhere", it fails without any.
    confidence: the probability that it is this rewrite; 1 where every run agreed.
    also: the check still fails without this rewrite alone, so another one is wrong as well.
    """

    kind: str
    rewrites: int = 0
    runs: int = 0
    number: int | None = None
    entries: dict[str, Entry] = field(default_factory=dict)
    confidence: float = 1.0
    detail: str = ""
    also: bool = False
    failing_rate: float = 1.0

    @property
    def entry(self) -> Entry | None:
        return next(iter(self.entries.values()), None)


class Bisection:
    """One search.

    Args:
        run: runs with the first N rewrites of each process (None: with all), but for some.
        most: runs at the most; confidence: what a flaky fault is searched for to.
        flaky: expect a fault that does not show at every run.
        progress: told each run as a line.
    """

    def __init__(
        self,
        run: Run,
        most: int = 200,
        confidence: float = 0.95,
        flaky: bool = False,
        progress: Progress = lambda line: None,
    ):
        self._run, self.most, self.confidence, self.flaky, self.progress = run, most, confidence, flaky, progress
        self.runs = 0
        self.known: dict[int, bool] = {}  # limit → whether it failed at any run
        self.detail = ""

    def search(self) -> Culprit:
        """Runs until the rewrite is found.

        Raises:
            UserError: neither end of the search can be judged, or it takes more than `most` runs.
        """
        full = self._try(None)
        tries = 1
        while self.flaky and not full.failed and tries < 3 * RETRIES:
            full, tries = self._try(None), tries + 1
        if full.failed is None:
            raise UserError("the command cannot tell (exit code 125) with all rewrites", [full.detail])
        total = len(full.longest)
        if not full.failed:
            return Culprit("nothing", total, self.runs)
        if self._try(0).failed:
            return Culprit("elsewhere", total, self.runs, detail=self.detail)
        if not total:
            raise UserError(
                "the command fails, and no rewrite of Fuseline's happened in it",
                [full.detail],
                "is the model compiled in it? a cache of compiled graphs may stand in the way",
            )
        if full.endless and not self._try(_before_repetition(full.longest)).failed:
            return self._endless(full.entries)
        if self.flaky:
            return self._noisy(full, failures=1, tries=tries)
        number = self._halves(full.longest)
        return self._confirm(number, full)

    def _try(self, limit: int | None, skip: frozenset[int] = frozenset()) -> Outcome:
        if self.runs >= self.most:
            raise UserError(f"not found in {self.most} runs", remedy=f"--runs {2 * self.most}")
        self.runs += 1
        outcome = self._run(limit, skip)
        which = "all rewrites" if limit is None else f"the first {limit}"
        if skip:
            which += f" but {', '.join(map(str, sorted(skip)))}"
        word = {True: "fails", False: "passes", None: "cannot tell"}[outcome.failed]
        self.progress(f"run {self.runs}: {which}: {word}{f' ({outcome.detail})' if outcome.detail else ''}")
        if outcome.failed:
            self.detail = outcome.detail
        return outcome

    def _halves(self, entries: list[Entry]) -> int:
        """The smallest limit that fails."""
        low, high = 0, len(entries)
        while high - low > 1:
            for limit in _splits(entries, low, high):
                failed = self._try(limit).failed
                if failed is not None:
                    low, high = (low, limit) if failed else (limit, high)
                    break
            else:
                raise UserError(
                    f"the command cannot tell (exit code 125) anywhere between rewrite {low} and {high}",
                    [f"first: {entries[low]}", f"last:  {entries[high - 1]}"],
                )
        return high

    def _confirm(self, number: int, full: Outcome) -> Culprit:
        """Leaves the culprit out alone: what still fails then is flaky, or wrong in a second place."""
        without = self._try(None, frozenset({number}))
        also = bool(without.failed)
        if also:
            for _ in range(RETRIES):
                if self._try(number - 1).failed:
                    return self._noisy(full, failures=1, tries=1)
        return self._culprit(number, full, also=also)

    def _culprit(self, number: int, full: Outcome, also: bool = False, **rest: float) -> Culprit:
        entries = {p: found[number - 1] for p, found in full.entries.items() if len(found) >= number}
        total = len(full.longest)
        return Culprit("rewrite", total, self.runs, number, entries, detail=self.detail, also=also, **rest)  # type: ignore[arg-type]

    def _endless(self, entries: dict[str, list[Entry]]) -> Culprit:
        """The rule whose rewrites a run that did not end was full of at its end."""
        found = max(entries.values(), key=len)
        last, start = found[-1], _before_repetition(found)
        if start == len(found):  # at one site after the other
            start -= _alike_at_end(found, lambda e: (e.program, e.step, e.rule))
        first = found[start]
        name = next(p for p, e in entries.items() if e is found)
        repeated = last.number - first.number + 1
        detail = f"{repeated} rewrites by {last.pass_name}/{last.rule}, and no end: it matches what it makes"
        return Culprit("endless", len(found), self.runs, first.number, {name: first}, detail=detail)

    def _noisy(self, full: Outcome, failures: int, tries: int) -> Culprit:
        """Bayesian search: a run that fails with the first N puts the fault among them; one that passes only makes
        that less likely, by the rate at which the fault shows."""
        total = len(full.longest)
        for _ in range(RETRIES):
            tries, failures = tries + 1, failures + bool(self._try(None).failed)
        rate = min((failures + 1) / (tries + 2), 0.95)
        posterior = [1 / total] * total
        while max(posterior) < self.confidence:
            limit = _most_informative(posterior, rate)
            failed = self._try(limit).failed
            if failed is None:
                continue
            inside, outside = (1.0, 0.0) if failed else (1 - rate, 1.0)
            posterior = [p * (inside if i < limit else outside) for i, p in enumerate(posterior)]
            scale = sum(posterior)
            posterior = [p / scale for p in posterior]
        number = posterior.index(max(posterior)) + 1
        return self._culprit(number, full, confidence=max(posterior), failing_rate=rate)


def _before_repetition(entries: list[Entry]) -> int:
    """The limit that tells a rule without end from a rewrite that hangs.

    Where the last rewrites are all at one site, the limit before them: it ends, and soon. Else all that the run came
    to: those have been made in the time there was, so that they end if each of them does.
    """
    repeated = _alike_at_end(entries, lambda e: (e.program, e.step, e.rule, e.site))
    return len(entries) - (repeated if repeated >= REPEATED else 0)


def _alike_at_end(entries: list[Entry], key: Callable[[Entry], object]) -> int:
    """How many of the last rewrites have one key."""
    last = key(entries[-1])
    return next((i for i, entry in enumerate(reversed(entries)) if key(entry) != last), len(entries))


def _splits(entries: list[Entry], low: int, high: int) -> Iterator[int]:
    """Limits to try between two, best first: the end of a pass nearest to the middle, then rewrites near the middle."""
    step = lambda entry: (entry.program, entry.step)
    middle = (low + high) // 2
    ends = [i for i in range(low + 1, high) if step(entries[i - 1]) != step(entries[i])]
    near = lambda limit: abs(limit - middle)
    # A pass boundary is taken unless it is so far off that the search would become longer by it.
    good = [i for i in ends if min(i - low, high - i) * 4 >= high - low]
    yield from dict.fromkeys([*sorted(good, key=near)[:1], *sorted(range(low + 1, high), key=near)[:8]])


def _most_informative(posterior: list[float], rate: float) -> int:
    """The limit whose run tells most: the mutual information of its outcome and the place of the fault."""
    entropy = lambda p: 0.0 if p <= 0 or p >= 1 else -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    best, chosen, mass = -1.0, 1, 0.0
    for i, p in enumerate(posterior):
        mass = min(mass + p, 1.0)
        information = entropy(rate * mass) - mass * entropy(rate)
        if information > best + 1e-12:
            best, chosen = information, i + 1
    return chosen
