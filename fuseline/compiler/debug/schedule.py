"""When each part of a comparison can be done, and when a value may go: so that few values are held at a time.

Time is the position in the captured program: at time t its cell t has just been computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .cells import Cell, Flat
from .correspondence import Claim, Claims, Job


class Schedule:
    """due: jobs by time; when: for each rewritten cell its time; leaving, leaving_after: what goes after a time, or
    after a rewritten cell.
    """

    def __init__(self, claims: Claims, after: Flat, claimed: Mapping[Cell, Sequence[Claim]]):
        self.claimed = claimed
        before = claims.captured
        self.last = {cell: cell.position for cell in before.cells}
        last_after = {cell: cell.position for cell in after.cells}
        for cell in before.cells:
            self._keep(cell.inputs, cell.position)
        self.due: dict[int, list[Job]] = {}
        for job in claims.jobs:
            time = self.time(job)
            self.due.setdefault(time, []).append(job)
            self._keep(_reads(job), time)
        self.when: list[int] = []
        now = 0
        for cell in after.cells:
            mine = [claim.cell for claim in claimed.get(cell, ())]
            now = max([now, *(c.position for c in mine)])
            self.when.append(now)
            self._keep(mine, now)
            self._keep(self._leaves(cell), now)  # an effect may be followed through it
            for source in cell.inputs:
                last_after[source] = max(last_after[source], cell.position)
        self._keep([*before.outputs, *before.mutated], len(before.cells))
        last_after |= dict.fromkeys([*after.outputs, *after.mutated], len(after.cells))
        self.leaving, self.leaving_after = _by_time(self.last), _by_time(last_after)

    def time(self, job: Job) -> int:
        """When everything that a job reads is there."""
        return max((cell.position for cell in _reads(job)), default=0)

    def _keep(self, cells: Sequence[Cell], until: int) -> None:
        for cell in cells:
            self.last[cell] = max(self.last[cell], until)

    def _leaves(self, cell: Cell) -> list[Cell]:
        """The captured cells that stand for what a rewritten cell reads, through cells that nothing is claimed of."""
        found: list[Cell] = []
        pending, seen = list(cell.inputs), set()
        while pending:
            source = pending.pop()
            if source in self.claimed:
                found.append(self.claimed[source][0].cell)
            elif source not in seen:
                seen.add(source)
                pending += source.inputs
        return found


def _reads(job: Job) -> list[Cell]:
    captured = [] if job.captured is None else [job.captured]
    return [*captured, *job.before.reads(), *job.after.reads()]


def _by_time(last: Mapping[Cell, int]) -> dict[int, list[Cell]]:
    found: dict[int, list[Cell]] = {}
    for cell, time in last.items():
        found.setdefault(time, []).append(cell)
    return found
