"""Policies: which storages a step keeps, and why; refused where a limit cannot be met."""

from __future__ import annotations

import enum
import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import numpy as np
from torch.fx import Node

from ...compiler.costs import bytes_of, cost, is_attention, is_collective
from ...compiler.errors import UserError
from ...compiler.machine import Machine
from ...compiler.regions import region_of, region_saves
from ...compiler.sites import sites
from ...compiler.tape import FREE, At, Execution, Tape, execute, peak, value_at
from .min_cut import cut
from .program import Limits, Solution, relevant, solve
from .scaling import for_layers, rows_of, traced_blocks
from .sections import Sections, find_sections

SECONDS = 1.5
"""What the solver may take for one choice; the best so far is taken then, and its gap reported."""


class Policy(enum.Enum):
    """What decides."""

    LONG_CONTEXT = "long-context"  # attention's results and the blocks' inputs are kept, the rest runs again
    MIN_CUT = "min-cut"  # the fewest bytes, of which only cheap calls run again
    BUDGET = "budget"  # the least time within a limit on the peak
    FULL = "full"  # the blocks' inputs alone
    NONE = "none"  # all is kept


class Collectives(enum.Enum):
    """Whether an exchange with other devices may run again."""

    AUTO = "auto"  # where that takes less time than its result would to the host's memory and back
    KEEP = "keep"
    RERUN = "rerun"


@dataclass
class Problem:
    """A tape at given sizes, on a machine. fixed: kept or not, as the user's own regions and unknown ops demand."""

    tape: Tape
    machine: Machine
    at: At
    collectives: Collectives = Collectives.AUTO
    offload: bool = False
    layers: int | None = None  # blocks to decide for, where fewer were traced
    sharded: bool = False  # gradients of parameters leave the device as they come, and take no memory
    patience: float = SECONDS  # seconds that the solver may take for one choice
    sizes: np.ndarray = field(init=False)
    seconds: np.ndarray = field(init=False)
    sections: Sections = field(init=False)
    why: dict[int, str] = field(init=False, default_factory=dict)
    kept: set[int] = field(init=False, default_factory=set)
    again: set[int] = field(init=False, default_factory=set)
    never: set[int] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.sizes = self.tape.size_values(self.at)
        if self.sharded:  # what does not grow with the sequence is the parameters'
            self.sizes = self.sizes * [bool(getattr(s, "free_symbols", False)) for s in self.tape.sizes]
        self.seconds = self.tape.seconds(self.machine, self.at)
        self.sections = find_sections(self.tape, self.sizes)
        self._fix()
        self.traced = traced_blocks(self.sections)
        if self.layers is not None:
            for_layers(self.sections, self.layers)

    def _fix(self) -> None:
        """What the policy has no say in."""
        tape = self.tape
        for section in self.sections.sections:
            for i in section.forward:
                node = tape.nodes[i]
                region = region_of(node)
                if region is not None:
                    inside = all(region_of(tape.nodes[r]) == region for r in node_readers(tape, i))
                    saved = bool(region_saves(node))
                    for s in tape.allocates[i]:
                        if saved or inside:
                            (self.kept if saved else self.again).add(s)
                            self.why[s] = "the user's checkpointed region " + ("keeps it" if saved else "runs it again")
                    continue
                reason = self._must_stay(i)
                if reason is not None:
                    self.never.add(i)
                    self.why.update(dict.fromkeys(tape.allocates[i], reason))

    def _must_stay(self, i: int) -> str | None:
        """Why a call must not run again."""
        node, cost = self.tape.nodes[i], self.tape.costs[i]
        if cost is FREE and not is_collective(node):
            return None
        if not cost.known:
            return f"{node.target} has no cost: register_flop_formula gives it one"
        if is_collective(node):
            if self.collectives is Collectives.KEEP:
                return "collectives are kept"
            if self.collectives is Collectives.AUTO and cost is not FREE:
                size = sum(self.sizes[self.tape.storages[s].size] for s in self.tape.allocates[i])
                if self.seconds[i] > 2 * size / self.machine.host:
                    return "exchanging it again takes longer than the host's memory"
        return None

    def limits(self, **given: object) -> Limits:
        """Limits with all that is fixed."""
        kept = frozenset(self.kept | set(given.pop("kept", ())))  # type: ignore[call-overload]
        again = frozenset((self.again | set(given.pop("again", ()))) - kept)  # type: ignore[call-overload]
        return Limits(kept=kept, again=again, never=frozenset(self.never), **given)  # type: ignore[arg-type]

    def run(self, saved: Collection[int], offloaded: Collection[int] = (), lead: int = 0) -> Execution:
        """The schedule of a choice of representatives."""
        spread = self.sections.spread
        return execute(self.tape, spread(saved), spread(offloaded), lead)

    def peak(self, execution: Execution) -> float:
        """Bytes at the fullest step."""
        if self.sections.blocks == self.traced:
            return max(peak(execution, self.sizes))
        return float((rows_of(self.sections, execution, self.sections.blocks) @ self.sizes).max())

    def takes(self, node: Node) -> float:
        """Seconds of a call, of the graph's or of the parts it is split in."""
        return cost(node).seconds(self.machine, lambda size: value_at(size, self.at))

    def arrives(self, node: Node) -> float:
        """Seconds that a value takes to or from the host's memory."""
        return value_at(bytes_of(node.meta["val"]), self.at) / self.machine.host

    def time(self, execution: Execution) -> float:
        """Seconds of what runs again."""
        return float(sum(self.seconds[i] * self.times(i) for i in execution.recomputed))

    def times(self, i: int) -> float:
        """How many calls one of the traced ones stands for."""
        owned = self.tape.allocates[i]
        return self.sections.blocks / self.traced if owned and owned[0] in self.sections.stands_for else 1.0

    @property
    def stay(self) -> set[int]:
        """What calls that must not run again allocate."""
        return {s for i in self.never for s in self.tape.allocates[i]}

    @property
    def everything(self) -> set[int]:
        """Representatives of all that the forward allocates and no region of the user's runs again."""
        return {s for section in self.sections.sections for s in section.values} - self.again

    @property
    def step_seconds(self) -> float:
        """Seconds of forward and backward where nothing runs again."""
        total = 0.0
        for section in self.sections.sections:
            calls = [*section.forward, *(self.tape.backward[p] for p in section.backward)]
            total += section.copies * float(sum(self.seconds[i] for i in calls))
        return total


def node_readers(tape: Tape, i: int) -> list[int]:
    """The forward calls that read a call's results, views looked through."""
    return [r for s in tape.allocates[i] for r in tape.storages[s].reads if tape.is_forward[r]]


@dataclass(frozen=True)
class Choice:
    """saved, offloaded: representatives; execution: the schedule; gap: how far the solver's choice may be from the
    best, 0 when proven or not the solver's; why: for each representative."""

    policy: Policy
    saved: frozenset[int]
    offloaded: frozenset[int]
    execution: Execution
    gap: float
    why: dict[int, str]


def block_inputs(problem: Problem) -> set[int]:
    """Representatives of what goes from one section to a later one."""
    return {p for section in problem.sections.sections for ps in section.imports.values() for p in ps}


def attention_results(problem: Problem) -> set[int]:
    """Representatives of what attention returns: its output and what its backward reads besides."""
    tape = problem.tape
    values = [s for section in problem.sections.sections for s in section.values]
    return {s for s in values if is_attention(tape.nodes[tape.storages[s].owner])}


def choose(problem: Problem, policy: Policy, limit: float | None = None) -> Choice:
    """What a policy keeps. limit: bytes that activations and gradients may reach, for `budget`.

    Raises:
        UserError: the limit cannot be met, with the smallest that can and what stands in the way.
    """
    why = dict(problem.why)
    if policy is Policy.NONE:
        saved = problem.everything
        return _choice(problem, policy, saved, why, "kept: policy none")
    if policy is Policy.FULL:
        kept = block_inputs(problem)
        why.update(dict.fromkeys(kept, "a block's input"))
        chosen = _choice(problem, policy, kept | problem.kept | problem.stay, why, "runs again from its block's input")
        return _moved(problem, chosen, kept) if problem.offload else chosen
    if policy is Policy.MIN_CUT:
        saved = cut(problem.sections, problem.sizes) | problem.kept
        return _choice(problem, policy, saved - problem.again, why, "on the minimum cut")
    if policy is Policy.LONG_CONTEXT:
        return _long_context(problem, why)
    if limit is None:
        raise UserError("policy budget needs a limit", remedy="checkpoint{policy=budget,memory=60GB} or memory=0.4")
    return _budget(problem, limit, why)


def _long_context(problem: Problem, why: dict[int, str]) -> Choice:
    """Attention's results and the blocks' inputs; outside of the blocks, the least time of the smallest peak."""
    inputs, attention = block_inputs(problem), attention_results(problem)
    why.update(dict.fromkeys(inputs, "a block's input"))
    why.update(dict.fromkeys(attention, "attention's result"))
    kept = inputs | attention | problem.stay
    blocks = [s for s in problem.sections.sections if s.copies > 1] or problem.sections.sections
    kept |= {s for s, kind in problem.sections.like.items() if kind in kept}
    again = ({s for section in blocks for s in section.values} | set(problem.sections.like)) - kept
    if len(problem.sections.sections) == 1:
        return _choice(problem, Policy.LONG_CONTEXT, (kept | problem.kept) - problem.again, why, "runs again")
    least = _solve(problem, problem.limits(kept=kept - problem.again, again=again))
    if least is None:  # its time was over
        return _choice(problem, Policy.LONG_CONTEXT, (kept | problem.kept) - problem.again, why, "runs again")
    best = _solve(problem, problem.limits(kept=kept - problem.again, again=again, memory=least.bound * 1.0001)) or least
    found = problem.run(best.saved)
    return _labelled(problem, Policy.LONG_CONTEXT, best, found, why)


def _solve(problem: Problem, limits: Limits, time: float | None = None) -> Solution | None:
    time = problem.patience if time is None else time
    if problem.offload:
        large = frozenset(_offloadable(problem))
        limits = Limits(**{**vars(limits), "host": host_bytes(problem), "offloadable": large})
    return solve(problem.sections, problem.sizes, problem.seconds, limits, time)


def _offloadable(problem: Problem) -> set[int]:
    """Representatives of what is worth the way to the host's memory: the blocks' own and the first one's input, a
    megabyte or more."""
    blocks = [section for section in problem.sections.sections if section.copies > 1]
    values = {s for section in blocks for s in section.values}
    values |= {p for section in blocks for ps in section.imports.values() if len(ps) > 1 for p in ps}
    return {s for s in values if problem.sizes[problem.tape.storages[s].size] >= 2**20 or _on_cpu(problem)}


def _moved(problem: Problem, choice: Choice, kept: set[int]) -> Choice:
    """A choice with those of `kept` in the host's memory that get there while a block computes, the largest first."""
    left, moved = host_bytes(problem), set()
    sizes = {s: float(problem.sizes[problem.tape.storages[s].size]) for s in kept & _offloadable(problem)}
    for s, size in sorted(sizes.items(), key=lambda item: -item[1]):
        if size <= left:
            left -= size
            moved.add(s)
    return replace(choice, offloaded=frozenset(moved), execution=problem.run(choice.saved, moved))


def _on_cpu(problem: Problem) -> bool:
    return problem.machine.name == "cpu"


def host_bytes(problem: Problem) -> float:
    """Bytes that go to the host's memory while one copy of a block runs forward."""
    block = max(problem.sections.sections, key=lambda s: s.copies)
    if block.copies == 1:
        return 0.0
    return float(sum(problem.seconds[i] for i in block.forward)) * problem.machine.host


def _budget(problem: Problem, limit: float, why: dict[int, str]) -> Choice:
    """The least time within a limit on the schedule's peak."""
    best: tuple[float, Solution, Execution] | None = None
    allowed = limit
    started = time.monotonic()
    for _ in range(3):  # the program's peak is a bound: what it is too high by may be given back
        left = problem.patience - (time.monotonic() - started)
        if best is not None and left < problem.patience / 2:
            break
        solution = _solve(problem, problem.limits(memory=allowed), max(left, problem.patience / 4))
        if solution is None:
            break
        execution = problem.run(solution.saved, solution.offloaded)
        reached, seconds = problem.peak(execution), problem.time(execution)
        if reached <= limit * 1.0000001 and (best is None or seconds < best[0]):
            best = (seconds, solution, execution)
        slack = solution.bound - reached
        if slack <= 0.005 * limit or reached > limit:
            break
        allowed = limit + slack
    if best is None:
        solution, execution = smallest(problem)
        if problem.peak(execution) > limit:
            raise refused(problem, limit, execution)
        best = (problem.time(execution), solution, execution)
    return _labelled(problem, Policy.BUDGET, best[1], best[2], why)


def smallest(problem: Problem) -> tuple[Solution, Execution]:
    """The choice of the smallest peak that the solver finds."""
    solution = _solve(problem, problem.limits(), max(5.0, problem.patience))
    if solution is None:  # its time was over: the better of two that need no solver
        found = min(
            (choose(problem, p) for p in (Policy.FULL, Policy.MIN_CUT)), key=lambda c: problem.peak(c.execution)
        )
        reached = problem.peak(found.execution)
        return Solution(found.saved, frozenset(), problem.time(found.execution), reached, 1.0), found.execution
    return solution, problem.run(solution.saved, solution.offloaded)


def refused(problem: Problem, limit: float, execution: Execution) -> UserError:
    """The error for a limit that no choice meets; execution: the schedule of the smallest peak."""
    least = problem.peak(execution)
    return UserError(
        f"checkpoint cannot keep activations and gradients within {gigabytes(limit)}",
        [f"the smallest that can be reached is {gigabytes(least)}; at its fullest step are alive:",
         *(f"{gigabytes(size):>10}  {what}" for size, what in at_peak(problem, execution))],
        f"memory={gigabytes(least * 1.01)} or more" + ("" if problem.offload else "; offload=cpu; a shorter sequence"),
    )  # fmt: skip


def at_peak(problem: Problem, execution: Execution, rows: int = 6) -> list[tuple[float, str]]:
    """What is alive at the fullest step: bytes and what it is, equal kinds together, the largest first."""
    tape, sizes = problem.tape, problem.sizes
    profile = max(execution.forward, execution.backward, key=lambda p: p.at(sizes).max(initial=0))
    step = int(np.argmax(profile.at(sizes)))
    place = {i: p for p, i in enumerate(profile.steps)}
    names = sites(tape.nodes[0].graph)
    groups: dict[str, list[float]] = {}
    behind = profile is execution.backward
    for s, one in enumerate(tape.storages):
        reads = [place[r] for r in one.reads if r in place]
        last = max(reads, default=place.get(one.owner, -1))
        if s in (tape.gradients if behind else tape.results) or (not behind and s in execution.saved):
            last = len(profile.steps)
        first = place.get(one.owner, 0 if s in execution.saved or tape.nodes[one.owner].op == "placeholder" else None)
        if s in execution.saved and behind:
            first = 0
        if first is not None and first <= step <= last:
            site = names.get(tape.nodes[one.owner], tape.nodes[one.owner].name)
            role = "gradients of" if not tape.is_forward[one.owner] else "kept" if s in execution.saved else "in use:"
            kind = site.rpartition("/")[2].partition("#")[0]
            groups.setdefault(f"{role} {kind}", []).append(float(sizes[one.size]))
    ranked = sorted(((sum(v), f"{len(v)} x {k}") for k, v in groups.items()), reverse=True)
    return ranked[:rows]


def _labelled(
    problem: Problem, policy: Policy, solution: Solution, execution: Execution, why: dict[int, str]
) -> Choice:
    wanted = relevant(problem.tape)
    for section in problem.sections.sections:
        for s in section.values:
            if s in wanted and s not in why:
                why[s] = reason(problem, s, s in solution.saved, section.copies)
    return Choice(policy, solution.saved, solution.offloaded, execution, solution.gap, why)


def reason(problem: Problem, s: int, saved: bool, copies: int) -> str:
    """The price of a decision: seconds that keeping it saves, or bytes that not keeping it does."""
    one = problem.tape.storages[s]
    seconds = float(problem.seconds[one.owner]) * copies
    size = float(problem.sizes[one.size]) * copies
    if saved:
        return f"{1e3 * seconds:.3g} ms for {megabytes(size)}"
    return f"{megabytes(size)} for {1e3 * seconds:.3g} ms"


def _choice(problem: Problem, policy: Policy, saved: set[int], why: dict[int, str], rest: str) -> Choice:
    wanted = relevant(problem.tape)
    for section in problem.sections.sections:
        for s in section.values:
            if s in wanted:
                why.setdefault(s, rest)
    chosen = frozenset(saved & {v for section in problem.sections.sections for v in section.values})
    return Choice(policy, chosen, frozenset(), problem.run(chosen), 0.0, why)


def gigabytes(size: float) -> str:
    """`12.3GB`, in powers of ten, as a budget is written."""
    return f"{size / 1e9:.3g}GB" if size >= 1e8 else f"{size / 1e6:.3g}MB"


def megabytes(size: float) -> str:
    """`12.3 MB`."""
    return f"{size / 1e6:.3g} MB"
