"""What a number of GPUs can train: for each degree of sequence parallelism and each policy, memory, time, and length.

Parameters, gradients and optimizer states are sharded over all GPUs (FSDP, ZeRO-3). A sequence is split over `degree`
of them (DeepSpeed-Ulysses, Jacobs et al., 2023): each holds S / degree tokens, and exchanges heads for tokens around
attention, four all-to-alls a block forward and four backward; attention sees the whole sequence on its share of the
heads. The gathered weights of two blocks and one block's gradients are there at a time, or the head's.
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
from .formulas import Formula, longest, step_formula

STATE = 16
"""Bytes a parameter with Adam in mixed precision: 2 of weight, 2 of gradient, 12 of master weight and moments."""
POLICIES = (Policy.NONE, Policy.MIN_CUT, Policy.LONG_CONTEXT, Policy.FULL)


@dataclass(frozen=True)
class Row:
    """One way to train. formula: bytes on a GPU by the whole sequence's length; closed: the longest by memory M;
    seconds: of a step at the length that was asked for, None where it does not fit."""

    degree: int
    policy: str
    formula: Formula
    longest: int
    closed: Any
    peak: float | None = None
    seconds: float | None = None
    tokens: float | None = None


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
        """Degrees that divide the GPUs and the heads."""
        return [d for d in range(1, self.gpus + 1) if self.gpus % d == 0 and self.shape.heads % d == 0]

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
            found += [self.row(degree, name, problem, choice) for name, choice in chosen.items()]
        return found

    def problem(self, degree: int) -> Problem:
        """One GPU's part of the sequence."""
        local = max(256, self.length // degree)
        at = {self.symbol: local}
        return Problem(self.tape, self.machine, at, layers=self.shape.layers, sharded=self.gpus > 1)

    def row(self, degree: int, name: str, problem: Problem, choice: Choice) -> Row:
        sharded = self.gpus > 1
        formula = step_formula(problem, choice, self.symbol, self.shape.layers, sharded)
        if degree > 1:  # what is sent and received around attention: queries, keys, values and the result, twice each
            width = self.shape.hidden // self.shape.heads
            sent = 2 * 2 * width * (2 * self.shape.heads + 2 * max(self.shape.kv_heads, degree))
            formula = formula.plus(sent * self.symbol)
        state = sum(self.state()) if sharded else self._unsharded()
        formula = formula.of(sympy.Rational(1, degree)).plus(sympy.Float(state))
        most, closed = longest(formula, self.memory)
        peak = formula.at(self.length)
        seconds = self.seconds(degree, problem, choice) if peak <= self.memory else None
        tokens = self.gpus / degree * self.length / seconds if seconds is not None else None
        return Row(degree, name, formula, most, closed, peak, seconds, tokens)

    def _unsharded(self) -> float:
        """One GPU: all states but the gradients, which the schedule holds."""
        return (STATE - 2) * self.shape.parameters

    def seconds(self, degree: int, problem: Problem, choice: Choice) -> float:
        """A step's time: blocks times layers, what is computed again, and exchanges; nothing overlaps."""
        found = problem.tape
        seconds = problem.seconds.copy()
        for i, cost in enumerate(found.costs):
            if cost.attention != 0:
                seconds[i] *= degree  # its share of the heads over the whole sequence
        again = set(choice.execution.recomputed)
        total = 0.0
        for section in problem.sections.sections:
            calls = [*section.forward, *(found.backward[p] for p in section.backward)]
            count = self.shape.layers if section.copies > 1 else 1
            total += count * float(sum(seconds[i] for i in calls))
            total += count * float(sum(seconds[i] for i in section.forward if i in again))
        lane = self.machine.link if degree <= self.machine.per_node else self.machine.network
        width = self.shape.hidden // self.shape.heads
        tokens = self.length / degree
        sent = (
            2 * width * tokens * (2 * self.shape.heads + 2 * max(self.shape.kv_heads, degree)) * (degree - 1) / degree
        )
        total += 2 * self.shape.layers * sent / (lane * self.machine.bandwidth_share)
        if self.gpus > 1:  # weights gathered twice, gradients scattered once, behind the computation as far as it goes
            moved = 3 * 2 * self.shape.parameters
            lane = (
                self.machine.link
                if self.gpus <= self.machine.per_node
                else self.machine.network * self.machine.per_node
            )
            total = max(total, moved / (lane * self.machine.bandwidth_share))
        return total
