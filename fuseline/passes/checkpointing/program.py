"""The integer program: which storages to keep, so that what is computed again takes the least time within a limit.

For each value v a binary s_v (kept) and, with offloading, o_v (kept in the host's memory); for each call c and each
event e of the backward (a call that reads a forward value) a_ce: whether c has run again by then. They follow from

    a_ce ≥ 1 − s_v − o_v      v is a result of c and read at e
    a_ce ≥ a_de − s_v − o_v   call d reads v
    a_ce ≥ a_c,e−1

and the bytes alive at e are those of kept values still to be read, of recomputed ones between their run and their last
reader, of other copies of the block, and of gradients. As every coefficient is 0 or ±1, a is integral where s and o
are. All calls that run again before one event are counted as alive together: a bound that is met from above.

Source: the formulation is after Checkmate (Jain et al., 2020, section 4), with each call run at most once more, and in
the order of PyTorch's partition instead of a free one: that leaves a block's program small enough to solve exactly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from ...compiler.errors import UserError
from ...compiler.tape import Tape
from .sections import Section, Sections


@dataclass(frozen=True)
class Limits:
    """memory: bytes that the peak may reach; None to make it as small as it can be. saved: bytes that may be kept.
    kept, again: storages that are saved, or are not, whatever it costs; never: calls that must not run again. host:
    bytes that each copy of a block can move to the host's memory while it computes; 0 for none. offloadable: storages
    that may go there."""

    memory: float | None = None
    saved: float | None = None
    kept: frozenset[int] = frozenset()
    again: frozenset[int] = frozenset()
    never: frozenset[int] = frozenset()
    host: float = 0.0
    offloadable: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Solution:
    """saved: representatives that are kept, offloaded ones among them; seconds: of what runs again; bound: the
    program's own peak, at least the schedule's; gap: how far from the best it may be (0 when proven)."""

    saved: frozenset[int]
    offloaded: frozenset[int]
    seconds: float
    bound: float
    gap: float


@dataclass
class _Rows:
    """A sparse system under construction: rows of {column: coefficient} ≤ right-hand side."""

    cost: list[float] = field(default_factory=list)
    integral: list[int] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    rows: list[dict[int, float]] = field(default_factory=list)
    right: list[float] = field(default_factory=list)

    def column(self, cost: float = 0.0, integral: bool = False, low: float = 0.0, high: float = 1.0) -> int:
        self.cost.append(cost)
        self.integral.append(int(integral))
        self.low.append(low)
        self.high.append(high)
        return len(self.cost) - 1

    def at_most(self, row: Mapping[int, float], right: float) -> None:
        self.rows.append({c: v for c, v in row.items() if v})
        self.right.append(right)


def relevant(tape: Tape) -> set[int]:
    """Storages that the backward reads, or that are needed to compute such."""
    wanted = {s for i in tape.backward for s in tape.reads[i] if tape.is_forward[tape.storages[s].owner]}
    pending = list(wanted)
    while pending:
        owner = tape.storages[pending.pop()].owner
        for s in tape.reads[owner]:
            if s not in wanted:
                wanted.add(s)
                pending.append(s)
    return wanted


def solve(
    found: Sections, sizes: np.ndarray, seconds: np.ndarray, limits: Limits, time: float = 2.0
) -> Solution | None:
    """The best choice within limits, or None if there is none.

    Args:
        sizes: bytes of the tape's distinct sizes; seconds: of each of its calls.
        time: seconds after which the best choice so far is taken.

    Raises:
        UserError: scipy is not installed.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError:
        raise UserError(
            "checkpoint solves an integer program with scipy, which is not installed", remedy="pip install scipy"
        ) from None
    tape = found.tape
    system = _Rows()
    wanted = relevant(tape)
    bytes_ = np.array([sizes[s.size] for s in tape.storages])
    unit = max(1.0, float(bytes_.max(initial=1.0)))
    saves: dict[int, int] = {}
    hosts: dict[int, int] = {}
    slowest = max(float(seconds.sum()), 1e-9)
    for section in found.sections:
        for s in section.values:
            if s not in wanted:
                continue
            low, high = float(s in limits.kept), float(s not in limits.again or s in limits.kept)
            if not low and _is_dominated(tape, s, bytes_, wanted):
                high = 0.0
            # kept for nothing is not wanted: a billionth of all time for a byte in a million
            saves[s] = system.column(1e-6 * section.copies * bytes_[s] / unit, True, low, high)
            if limits.host and s in limits.offloadable and s not in limits.again:
                hosts[s] = system.column(2e-6 * section.copies * bytes_[s] / unit, True)
                system.low[saves[s]] = 0.0
                system.at_most({saves[s]: 1, hosts[s]: 1}, 1)
                if low:
                    system.at_most({saves[s]: -1, hosts[s]: -1}, -1)
    top = system.column(1.0 if limits.memory is None else 0.0, high=np.inf)
    if limits.memory is not None:
        system.high[top] = limits.memory / unit
    for section in found.sections:
        _section(system, found, section, saves, hosts, top, bytes_ / unit, sizes / unit, seconds / slowest, limits)
    if limits.saved is not None:
        copies = {s: section.copies for section in found.sections for s in section.values}
        system.at_most({c: copies[s] * bytes_[s] / unit for s, c in saves.items()}, limits.saved / unit)
    if limits.host:
        for section in found.sections:
            system.at_most({hosts[s]: bytes_[s] / unit for s in section.values if s in hosts}, limits.host / unit)
    matrix_rows = [r for r, row in enumerate(system.rows) for _ in row]
    columns = [c for row in system.rows for c in row]
    values = [v for row in system.rows for v in row.values()]
    shape = (len(system.rows), len(system.cost))
    cost = np.array(system.cost)
    if limits.memory is None:
        cost = np.where(np.arange(len(cost)) == top, 1.0, cost * 1e-3)
    answer = milp(
        cost,
        integrality=np.array(system.integral),
        bounds=Bounds(np.array(system.low), np.array(system.high)),
        constraints=LinearConstraint(
            csr_array((values, (matrix_rows, columns)), shape), -np.inf, np.array(system.right)
        ),
        options={"time_limit": time, "mip_rel_gap": 1e-3},
    )
    if answer.x is None:
        return None
    chosen = frozenset(s for s, c in saves.items() if answer.x[c] > 0.5)
    outside = frozenset(s for s, c in hosts.items() if answer.x[c] > 0.5)
    return Solution(
        chosen | outside, outside, float(answer.fun) * slowest, float(answer.x[top]) * unit,
        float(getattr(answer, "mip_gap", 0.0) or 0.0),
    )  # fmt: skip


def _is_dominated(tape: Tape, s: int, bytes_: np.ndarray, wanted: Collection[int]) -> bool:
    """Whether keeping what a value's only reader makes of it is better: no more bytes, and less that runs again."""
    readers = set(tape.storages[s].reads)
    if len(readers) != 1 or s in tape.results:
        return False
    made = tape.allocates[reader] if tape.is_forward[reader := next(iter(readers))] else []
    return len(made) == 1 and made[0] in wanted and bytes_[made[0]] <= bytes_[s]


def _section(
    system: _Rows, found: Sections, section: Section, saves: Mapping[int, int], hosts: Mapping[int, int], top: int,
    bytes_: np.ndarray, sizes: np.ndarray, seconds: np.ndarray, limits: Limits,
) -> None:  # fmt: skip
    """The columns and rows of one section."""
    tape = found.tape
    own = [s for s in section.values if s in saves]
    in_section = set(section.forward)
    direct: dict[int, list[int]] = defaultdict(list)  # where in the backward each value is read
    for place in section.backward:
        for s in tape.reads[tape.backward[place]]:
            direct[s].append(place)
    ours = set(own)
    # calls run again only at events: where a value is read for the first time
    events = sorted({direct[s][0] for s in direct if s in ours})
    event_of = {place: e for e, place in enumerate(events)}
    last = len(events) - 1
    calls = [i for i in section.forward if any(s in saves for s in tape.allocates[i])] if events else []
    again: dict[tuple[int, int], int] = {}
    for c in calls:
        free = c not in limits.never or any(s in limits.again for s in tape.allocates[c])
        for e in range(len(events)):
            cost = section.copies * seconds[c] if e == last else 0.0
            again[c, e] = system.column(cost, high=float(free))
            if e:
                system.at_most({again[c, e - 1]: 1, again[c, e]: -1}, 0)
    kept = lambda s: {c: 1.0 for c in (saves[s], hosts.get(s)) if c is not None}
    readers = {s: [r for r in dict.fromkeys(tape.storages[s].reads) if (r, 0) in again] for s in own}
    for s in own:
        owner = tape.storages[s].owner
        if direct[s]:
            system.at_most({again[owner, event_of[direct[s][0]]]: -1, **dict.fromkeys(kept(s), -1)}, -1)
        for d in readers[s]:
            for e in range(len(events)):
                system.at_most({again[d, e]: 1, again[owner, e]: -1, **dict.fromkeys(kept(s), -1)}, 0)
    for s, providers in section.imports.items():
        for provider in providers:
            if provider not in saves:
                continue
            if direct[s]:
                system.at_most(dict.fromkeys(kept(provider), -1), -1)
            for d in (r for r in dict.fromkeys(tape.storages[s].reads) if r in in_section and (r, last) in again):
                system.at_most({again[d, last]: 1, **dict.fromkeys(kept(provider), -1)}, 0)
    others = _others(found, section, saves, bytes_)
    window = {hosts[s]: 2.0 * bytes_[s] for s in own if s in hosts} if section.copies > 1 else {}
    shifts = {0: section.which, section.copies - 1: section.which - section.copies + 1}
    bases = found.gradients[section.backward.start : section.backward.stop] @ sizes
    grows = float(section.grows @ sizes)
    # what is alive changes at events, behind them, and behind last reads; between, the fullest place stands for all
    changes = {section.backward.start, section.backward.stop, *events, *(e + 1 for e in events)}
    changes.update(direct[s][-1] + 1 for s in own if direct[s])
    points = sorted(p for p in changes if section.backward.start <= p <= section.backward.stop)
    done = -1
    for begin, end in zip(points, points[1:]):
        now = begin in event_of
        before, done = (event_of[begin] - 1, event_of[begin]) if now else (done, done)
        live: dict[int, float] = defaultdict(float)
        constant = 0.0
        for s in own:
            constant += _alive(
                system, s, begin, direct[s], readers[s], tape.storages[s].owner, saves, again, last, before, done,
                bytes_, live,
            )  # fmt: skip
        base = float(bases[begin - section.backward.start : end - section.backward.start].max())
        for copy, shift in shifts.items():
            row = dict(live)
            for c, v in (*others(copy).items(), *window.items()):
                row[c] = row.get(c, 0.0) + v
            row[top] = -1.0
            system.at_most(row, -(base + shift * grows + constant))
    _ahead(system, found, section, saves, hosts, top, bytes_, others)


def _alive(
    system: _Rows, s: int, begin: int, direct: list[int], readers: list[int], owner: int, saves: Mapping[int, int],
    again: Mapping[tuple[int, int], int], last: int, before: int, done: int, bytes_: np.ndarray,
    live: dict[int, float],
) -> float:  # fmt: skip
    """Adds a value's bytes to the row of the places from `begin` on; the part that does not depend on the choice.

    before, done: the last event whose calls have run again before this place, and when it is left.
    """
    size = float(bytes_[s])
    if not size:
        return 0.0
    final = direct[-1] if direct else -1
    if direct and direct[0] <= begin <= final:
        return size  # kept or computed again, it is there
    if begin <= final:  # read later: there if it is kept, or was computed again for another's sake
        column = system.column()
        live[column] += size
        system.at_most({saves[s]: 1, column: -1}, 0)
        if done >= 0:
            system.at_most({again[owner, done]: 1, column: -1}, 0)
        return 0.0
    coming = [d for d in readers if before < last]
    if not coming:
        return 0.0
    column = system.column()  # no direct reader is left; a call that runs again now or later may read it
    live[column] += size
    for d in coming:
        row: dict[int, float] = {again[d, last]: 1.0}
        if before >= 0:
            row[again[d, before]] = -1.0
        system.at_most({**row, saves[s]: 1, column: -1}, 1)
        if done >= 0:
            joined = dict(row)
            joined[again[owner, done]] = joined.get(again[owner, done], 0.0) + 1
            system.at_most({**joined, column: -1}, 1)
    return 0.0


def _others(found: Sections, section: Section, saves: Mapping[int, int], bytes_: np.ndarray):  # type: ignore[no-untyped-def]
    """For a copy of a section: what earlier sections and copies keep, as coefficients of their columns."""
    before = []
    for one in found.sections:
        if one is section:
            break
        before.append(one)

    def coefficients(copy: int) -> dict[int, float]:
        row: dict[int, float] = {}
        for one in before:
            for s in one.values:
                if s in saves:
                    row[saves[s]] = float(one.copies * bytes_[s])
        for s in section.values if copy else ():
            if s in saves:
                row[saves[s]] = float(copy * bytes_[s])
        return row

    return coefficients


def _ahead(
    system: _Rows, found: Sections, section: Section, saves: Mapping[int, int], hosts: Mapping[int, int], top: int,
    bytes_: np.ndarray, others: object,
) -> None:  # fmt: skip
    """Memory while a section's last copy runs forward."""
    tape = found.tape
    place = {i: p for p, i in enumerate(section.forward)}
    base = np.zeros(len(section.forward) + 1)
    ends: dict[int, list[int]] = defaultdict(list)
    for s in section.values:
        owner = tape.storages[s].owner
        inside = [place[r] for r in tape.storages[s].reads if r in place]
        leaves = s in tape.results or any(
            tape.is_forward[r] and r not in place for r in tape.storages[s].reads
        )  # what later sections read stays
        until = len(section.forward) - 1 if leaves else max(inside, default=place[owner])
        base[place[owner]] += bytes_[s]
        base[until + 1] -= bytes_[s]
        if s in saves:
            ends[until + 1].append(s)
    base = np.cumsum(base)[:-1]
    row: dict[int, float] = dict(others(section.copies - 1))  # type: ignore[operator]
    if section.copies > 1:
        for s in section.values:  # offloaded values of two copies may still be on their way
            if s in hosts:
                row[hosts[s]] = 2.0 * float(bytes_[s])
    points = sorted({0, *ends, len(section.forward)})
    for begin, end in zip(points, points[1:]):
        for s in ends.get(begin, ()):
            row[saves[s]] = row.get(saves[s], 0.0) + float(bytes_[s])
        system.at_most({**row, top: -1.0}, -float(base[begin:end].max(initial=0.0)))
