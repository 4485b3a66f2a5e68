"""What a number of GPUs can train: for each degree and kind of sequence parallelism and each policy, memory, time, and
length.

Parameters, gradients and optimizer states are sharded over all GPUs (FSDP, ZeRO-3). A sequence is split over `degree`
of them: each holds S / degree tokens. What attention and its exchanges take for a kind is predicted as `kind=auto` does
it (`passes/sequence/choice.py`). The gathered weights of two blocks and one block's gradients are there at a time, or
the head's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from ..compiler.machine import Machine
from ..compiler.program import Program
from ..compiler.tape import tape
from ..models.shapes import Shape
from ..passes.checkpointing import sequence_symbol
from ..passes.checkpointing.policies import Choice, Policy, Problem, choose, smallest
from ..passes.sequence.choice import Layout, Work, layouts, predict
from ..passes.sequence.heads import Heads
from .formulas import Formula, longest, step_formula

STATE = 16
"""Bytes a parameter with Adam in mixed precision: 2 of weight, 2 of gradient, 12 of master weight and moments."""
POLICIES = (Policy.NONE, Policy.MIN_CUT, Policy.LONG_CONTEXT, Policy.FULL)


@dataclass(frozen=True)
class Row:
    """One way to train. layout: how the degree is shared between heads and a ring; formula: bytes on a GPU by the whole
    sequence's length; closed: the longest by memory M; seconds: of a step at the length that was asked for, None where
    it does not fit."""

    layout: Layout
    policy: str
    formula: Formula
    longest: int
    closed: Any
    peak: float | None = None
    seconds: float | None = None
    tokens: float | None = None

    @property
    def degree(self) -> int:
        return self.layout.degree

    @property
    def kind(self) -> str:
        """`-` for one GPU a sequence."""
        return self.layout.kind if self.degree > 1 else "-"


@dataclass
class Planner:
    """Policies decided once at the length that was asked for, on the part of it that a GPU holds."""

    shape: Shape
    program: Program
    machine: Machine
    gpus: int
    memory: float
    length: int

    def __post_init__(self) -> None:
        self.tape = tape(self.program)
        self.symbol = sequence_symbol(self.tape)

    def degrees(self) -> list[int]:
        """Degrees that divide the GPUs."""
        return [d for d in range(1, self.gpus + 1) if self.gpus % d == 0]

    def layouts(self, degree: int) -> list[Layout]:
        """The kinds at a degree; of hybrids the fastest one."""
        pure = [k for k in layouts(degree) if k.kind != "hybrid"]
        mixed = [k for k in layouts(degree) if k.kind == "hybrid"]
        mixed.sort(key=lambda k: predict(self.work(), k, self.machine).total)
        return [*pure, *mixed[:1]]

    def work(self) -> Work:
        """One block's attention."""
        shape = self.shape
        return Work(1, self.length, shape.heads, shape.kv_heads, shape.hidden // shape.heads, 2, True)

    def state(self) -> tuple[float, float]:
        """Bytes on a GPU that do not depend on the length: its share of all states, and what is gathered at a time."""
        total = self.shape.parameters
        head = self.shape.vocabulary * self.shape.hidden
        block = (total - head * (1 if self.shape.tied else 2)) / self.shape.layers
        shards = self.gpus
        return STATE * total / shards, 0.0 if shards == 1 else max(3 * 2 * block, 2 * 2 * head)

    def rows(self, degrees: Sequence[int] | None = None) -> list[Row]:
        """Every degree with every policy."""
        asked = list(degrees or self.degrees())
        at = self.problem(asked[len(asked) // 2])  # what a policy keeps is the same at any length
        chosen = {policy.value: choose(at, policy) for policy in POLICIES}
        solution, execution = smallest(at)
        chosen["smallest"] = Choice(Policy.BUDGET, solution.saved, solution.offloaded, execution, solution.gap, {})
        found = []
        for degree in asked:
            problem = self.problem(degree)
            for name, choice in chosen.items():
                formula = step_formula(problem, choice, self.symbol, self.shape.layers, self.gpus > 1)
                found += [self.row(layout, name, problem, choice, formula) for layout in self.layouts(degree)]
        return found

    def problem(self, degree: int) -> Problem:
        """One GPU's part of the sequence."""
        local = max(256, self.length // degree)
        at = {self.symbol: local}
        return Problem(self.tape, self.machine, at, layers=self.shape.layers, sharded=self.gpus > 1)

    def row(self, layout: Layout, name: str, problem: Problem, choice: Choice, formula: Formula) -> Row:
        """formula: bytes of activations and gradients by the number of tokens that a GPU holds."""
        degree = layout.degree
        formula = formula.plus(self.in_transit(layout) * self.symbol)
        state = sum(self.state()) if self.gpus > 1 else self._unsharded()
        formula = formula.of(sympy.Rational(1, degree)).plus(sympy.Float(state))
        most, closed = longest(formula, self.memory)
        peak = formula.at(self.length)
        seconds = self.seconds(layout, problem, choice) if peak <= self.memory else None
        tokens = self.gpus / degree * self.length / seconds if seconds is not None else None
        return Row(layout, name, formula, most, closed, peak, seconds, tokens)

    def in_transit(self, layout: Layout) -> int:
        """Bytes a token of a GPU's that attention's exchanges hold at a time: queries, keys, values and the result,
        sent and received; in a ring two pairs of keys and values and their gradients in float32, and the result."""
        work = self.work()
        share = Heads(work.heads, work.keys, layout.heads)
        h, k = (layout.heads * n * work.width for n in (share.local, share.local_keys))
        exchanged = 2 * 2 * (2 * h + 2 * k) if layout.heads > 1 else 0
        return exchanged + (2 * 2 * (2 + 4) * k + 4 * h if layout.ring > 1 else 0)

    def _unsharded(self) -> float:
        """One GPU: all states but the gradients, which the schedule holds."""
        return (STATE - 2) * self.shape.parameters

    def seconds(self, layout: Layout, problem: Problem, choice: Choice) -> float:
        """A step's time: blocks times layers, what is computed again, and exchanges that nothing hides."""
        found, work = problem.tape, self.work()
        computed = layout.heads * Heads(work.heads, work.keys, layout.heads).local / work.heads
        seconds = problem.seconds.copy()
        for i, cost in enumerate(found.costs):
            if cost.attention != 0:
                seconds[i] *= layout.degree * computed  # the whole sequence, on its share of heads or of a ring
        again = set(choice.execution.recomputed)
        total = 0.0
        for section in problem.sections.sections:
            calls = [*section.forward, *(found.backward[p] for p in section.backward)]
            count = self.shape.layers if section.copies > 1 else 1
            total += count * float(sum(seconds[i] for i in calls))
            total += count * float(sum(seconds[i] for i in section.forward if i in again))
        total += self.shape.layers * predict(work, layout, self.machine).exposed
        if self.gpus > 1:  # weights gathered twice, gradients scattered once, behind the computation as far as it goes
            moved = 3 * 2 * self.shape.parameters
            lane = (
                self.machine.link
                if self.gpus <= self.machine.per_node
                else self.machine.network * self.machine.per_node
            )
            total = max(total, moved / (lane * self.machine.bandwidth_share))
        return total
