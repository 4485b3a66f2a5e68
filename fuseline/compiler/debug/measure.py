"""One program measured against another, cell by cell, with few values held at a time; `compare.py` says how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import UserError
from ..order import touches_written
from ..precision import NARROW, clone, widen
from ..program import Program
from .cells import Cell, Flat, Weights, compute, flatten, random_cell
from .comparison import Comparison, NodeError, OutputError, RewriteError, node_error
from .correspondence import Claim, Claims, Job
from .deviation import describe, deviation, fits, floating, is_finite, last_place, narrow, snapshot, types
from .effects import Effects
from .schedule import Schedule

# How many times the noise rounding may be: of one rewrite, and of a node after everything before it. Each linear, norm,
# attention and activation of a 30-layer model in other words (393 rewrites, float32 and bfloat16) came to 1.8 times the
# noise by itself, and to 6.3 times down the graph.
FACTOR = 8
CUMULATIVE = 32
UNPROMOTED = 1e-9  # what is rounding where the program itself computes in float64
WIDER = dict.fromkeys((*NARROW, torch.float32), torch.float64)


Progress = Callable[[int, int], None]


def measure(
    claims: Claims,
    after: Flat,
    flat: Sequence[Any],
    after_flat: Sequence[Any] | None = None,
    progress: Progress | None = None,
    stages: Sequence[Program] = (),
) -> Comparison:
    """Runs both programs, cell by cell, and measures what is claimed.

    Args:
        after_flat: the second program's own arguments, parameters among them, where they are not the first's.
        stages: programs between the two, of which only the results are measured, in order.
    """
    drawn = random_cell([*claims.captured.cells, *after.cells])
    if drawn is not None:
        raise UserError(
            f"'{drawn.name}' draws random numbers: two runs of this program differ by themselves",
            remedy="model.eval(), or dropout with probability 0",
        )
    with torch.no_grad():
        measured = _Measured(claims, after, flat, flat if after_flat is None else after_flat)
        comparison = measured.run(progress)
        comparison.stages = [measured.results(flatten(stage)) for stage in stages]
        comparison.stages.append(max((o.error for o in comparison.outputs if o.name.startswith("output")), default=0.0))
        return comparison


class _Measured:
    """One walk over the captured program's cells, in their order; everything else happens as soon as it can."""

    def __init__(self, claims: Claims, after: Flat, flat: Sequence[Any], after_flat: Sequence[Any]):
        self.claims, self.before, self.after = claims, claims.captured, after
        self.flat, self.after_flat = flat, after_flat
        self.wider = WIDER
        self.weights = Weights(self.before.program, flat, self.wider)
        self.after_weights = Weights(after.program, after_flat, self.wider)
        self.reference: dict[Cell, Any] = {}  # captured cells, in higher precision
        self.plain: dict[Cell, Any] = {}  # captured cells, in the program's precision
        self.types: dict[Cell, Any] = {}
        self.kept: dict[Cell, Any] = {}  # the reference as it was, of what the program writes to
        self.noise: dict[Cell, float] = {}
        self.finite: dict[Cell, bool] = {}
        self.values: dict[Cell, Any] = {}  # rewritten cells, in the program's precision
        self.wide_values: dict[Cell, Any] = {}  # and in higher precision
        self.claimed = self._claimed()
        self.schedule = Schedule(claims, after, self.claimed)
        ends = {*after.outputs, *after.mutated}
        first = {cell: found[0].cell for cell, found in self.claimed.items()}
        self.effects = Effects(first, self.wide, self.after_weights.wide, self.wider, ends)
        self._measured: list[tuple[NodeError, Cell]] = []
        self.tainted: set[Cell] = set()
        self.tainted_state = False  # what the program writes to holds a value that is off
        self.faulty: set[Cell] = set()
        self.broken: dict[Cell, str] = {}  # rewritten cell → the first one with a value that is not finite
        self.result = Comparison(self._dtype())

    def _dtype(self) -> str:
        held = [c.node.meta.get("val") for c in self.before.cells if c.node is not None]
        found = [t.dtype for value in held for t in floating(value)]
        return str(max(set(found), key=found.count, default=torch.float32)).removeprefix("torch.")

    def _claimed(self) -> dict[Cell, list[Claim]]:
        """The claims of each rewritten cell, those of a region's call among them."""
        found: dict[Cell, list[Claim]] = {}
        for node, cell in self.after.of.items():
            if isinstance(cell, Cell) and cell.kind not in ("output", "mode"):
                for claim in self.claims.of.get(node, ()):
                    if all(claim.cell is not c.cell for c in found.setdefault(cell, [])):
                        found[cell].append(claim)
        return {cell: claims for cell, claims in found.items() if claims}

    def run(self, progress: Progress | None) -> Comparison:
        pending = iter(zip(self.after.cells, self.schedule.when, strict=True))
        coming = next(pending, None)
        for position, cell in enumerate(self.before.cells):
            self._captured(cell)
            for job in self.schedule.due.get(position, ()):
                self._job(job)
            while coming is not None and coming[1] <= position:
                self._rewritten(coming[0])
                coming = next(pending, None)
            for gone in self.schedule.leaving.get(position, ()):
                for held in (self.reference, self.plain, self.kept):
                    held.pop(gone, None)
            if progress is not None:
                progress(position + 1, len(self.before.cells))
        self._outputs()
        good = self.effects.made_good()
        for node, cell in self._measured:
            node.explained |= cell in good
        return self.result

    def wide(self, cell: Cell) -> Any:
        """The reference's value of a captured cell."""
        cell = cell.target if cell.kind == "reference" else cell
        return self.weights.wide(cell.target) if cell.kind == "weight" else self.reference[cell]

    def rounded(self, cell: Cell) -> Any:
        """The reference's value, rounded to the type that it has where it is read."""
        source = cell.target if cell.kind == "reference" else cell
        if source.kind == "weight":
            return self.weights(source.target)
        held = cell.node.meta.get("val") if cell.node is not None else None
        dtypes = held.dtype if isinstance(held, torch.Tensor) else self.types[source]
        return narrow(self.reference[source], dtypes)

    def _captured(self, cell: Cell) -> None:
        if cell.kind in ("mode", "output", "weight"):
            return
        if cell.kind == "input":
            plain = clone(self.flat[cell.target])
            wide = widen(clone(plain), self.wider)
        else:
            plain = compute(cell, lambda c: self.weights(c.target) if c.kind == "weight" else self.plain[c])
            wide = compute(cell, self.wide, self.wider)
        self.plain[cell], self.reference[cell], self.types[cell] = plain, wide, types(plain)
        self.noise[cell] = deviation(plain, wide)
        self.finite[cell] = is_finite(plain)
        if cell.node is not None and cell.node.meta.get("written"):
            self.kept[cell] = snapshot(wide)

    def _job(self, job: Job) -> None:
        exact = job.before.value(self.wide, self.weights.wide, self.wider)
        was = job.before.value(self.rounded, self.weights)
        now = job.after.value(self.rounded, self.after_weights)
        wide = job.after.value(self.wide, self.after_weights.wide, self.wider)
        found = RewriteError(
            job.rewrite, job.name, job.captured.name if job.captured else "-", describe(now),
            self.schedule.time(job), deviation(now, exact), deviation(was, exact), deviation(wide, exact),
            fits(now, exact), is_finite(was) and not is_finite(now),
        )  # fmt: skip
        found.judge(last_place(now), last_place(exact), FACTOR, UNPROMOTED)
        self.result.rewrites.append(found)
        if job.captured is not None and found.fault:
            self.faulty.add(job.captured)
            if found.verdict == "formula":
                self.effects.suspect(job.captured, found)

    def _rewritten(self, cell: Cell) -> None:
        if cell.kind in ("mode", "output"):
            return
        if cell.kind == "input":
            self.values[cell] = self._own(cell, self.values)
            self.wide_values[cell] = widen(clone(self.values[cell]), self.wider)
        elif cell.kind == "call":
            self.values[cell] = self._own(cell, self.values)
            wide = lambda c: self.after_weights.wide(c.target) if c.kind == "weight" else self.wide_values[c]
            self.wide_values[cell] = compute(cell, wide, self.wider)
        self._taint(cell)
        self.effects.follow(cell)
        if cell.kind != "weight":
            self._node(cell)
        for gone in self.schedule.leaving_after.get(cell.position, ()):
            self.values.pop(gone, None)
            self.wide_values.pop(gone, None)
            self.effects.forget(gone)

    def _own(self, cell: Cell, held: dict[Cell, Any]) -> Any:
        """A cell of the rewritten program in its own precision."""
        if cell.kind == "input":
            return clone(self.after_flat[cell.target])
        return compute(cell, lambda c: self.after_weights(c.target) if c.kind == "weight" else held[c])

    def results(self, stage: Flat) -> float:
        """The largest error of another program's results."""
        last = {source: cell for cell in stage.cells for source in cell.inputs}
        held: dict[Cell, Any] = {}
        for cell in stage.cells:
            if cell.kind in ("input", "call"):
                held[cell] = self._own(cell, held)
            if cell.kind != "output":
                for source in cell.inputs:
                    if last[source] is cell:
                        held.pop(source, None)
        value = lambda c: self.after_weights(c.target) if c.kind == "weight" else held[c]
        pairs = zip(self.before.outputs, stage.outputs, strict=False)
        return max((deviation(value(b), self.wide(a)) for a, b in pairs), default=0.0)

    def _taint(self, cell: Cell) -> None:
        """Notes that a lossy rewrite, or one at fault, lies upstream: the cell's error is explained by that."""
        claims = self.claimed.get(cell, ())
        maker = self.claims.makers.get(cell.node) if cell.node is not None else None
        rewrites = [r for c in claims for r in c.rewrites] + ([maker] if maker is not None else [])
        if (
            any(i in self.tainted for i in cell.inputs)
            or (self.tainted_state and cell.node is not None and touches_written(cell.node))
            or any(c.cell in self.faulty for c in claims)
            or any(r.lossy for r in rewrites)
        ):
            self.tainted.add(cell)
            self.tainted_state |= cell.writes

    def _node(self, cell: Cell) -> None:
        value, claims = self.values[cell], self.claimed.get(cell, [])
        if not is_finite(value) and all(self.finite[c.cell] for c in claims):
            self.broken[cell] = next((self.broken[i] for i in cell.inputs if i in self.broken), cell.name)
            if claims and self.result.not_finite is None:
                self.result.not_finite = self.broken[cell]
        if not claims:
            self.result.unclaimed += 1
            return
        references = [self.kept.get(c.cell, self.reference[c.cell]) for c in claims]
        errors = [deviation(value, r) for r in references]
        worst = max(range(len(claims)), key=errors.__getitem__)
        change = max(deviation(self.wide_values[cell], r) for r in references)
        noise = self._noise(claims[worst].cell)
        ok = self._is_noise(errors[worst], noise, value) and self._is_noise(change, noise, value, FACTOR)
        found = node_error(cell, errors[worst], noise, change, ok, claims[worst])
        found.explained = cell in self.tainted
        self.result.nodes.append(found)
        self._measured.append((found, cell))

    def _noise(self, cell: Cell) -> float:
        """What rounding does to a captured cell, or did to what it is computed from: it may be small by luck."""
        return max([self.noise[cell], *(self.noise.get(i, 0.0) for i in cell.inputs)])

    def _is_noise(self, error: float, noise: float, value: Any, factor: float = CUMULATIVE) -> bool:
        unit = last_place(value)
        floor = UNPROMOTED if unit == torch.finfo(torch.float64).eps else 0.0
        return error <= max(floor, factor * noise, factor * unit)

    def _outputs(self) -> None:
        pairs = [("output", a, b) for a, b in zip(self.before.outputs, self.after.outputs, strict=False)]
        written = {c.target: c for c in self.after.mutated}
        pairs += [("state", a, written[a.target]) for a in self.before.mutated if a.target in written]
        for kind, a, b in pairs:
            wide, plain = self.wide(a), self.weights(a.target) if a.kind == "weight" else self.plain[a]
            value = self.after_weights(b.target) if b.kind == "weight" else self.values[b]
            error, noise = deviation(value, wide), deviation(plain, wide)
            self.result.outputs.append(
                OutputError(f"{kind} {a.name}", error, noise, self._is_noise(error, noise, value))
            )
