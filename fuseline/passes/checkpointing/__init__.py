"""Decide what a training step keeps for its backward, what it computes again, what it moves to the host: `checkpoint`.

Before                                     after  checkpoint{policy=long-context}
    forward   q, k, v, a, h, g, u, p = …       forward   keeps the block's input x and attention's result a
    backward  reads q, k, v, a, h, g, u, p     backward  computes q, k, v, h, g, u, p from x and a, then goes on

    checkpoint{policy=budget,memory=60GB}      the least time within 60 GB: parameters, gradients and activations
    checkpoint{policy=budget,memory=0.4}       within 0.4 of the peak that keeping everything has
    checkpoint{policy=long-context}            blocks' inputs and attention's results kept, the rest computed again
    checkpoint{policy=min-cut}                 the fewest bytes of which only cheap operations run again
    checkpoint{policy=full}                    blocks' inputs alone, as checkpointing each block
    checkpoint{policy=none}                    all is kept

It works on the graph of forward and backward in training, and says what it decided by PyTorch's own partition tags.
The peak is that of the schedule, step by step, not the sum of what is kept. Blocks are found by structure; one stands
for all, and an integer program over it is solved exactly. Exchanges between devices are priced by their bytes:
`collectives=auto` runs one again where that takes less time than its result would take to the host's memory and back;
`keep` and `rerun` say so. Random operations that run again draw the same numbers. Regions of `torch.utils.checkpoint`
are left as they are asked for. `offload=cpu` moves kept values to pinned host memory while the blocks compute.
`target_seq` decides for another length than the one captured, where that is symbolic. A plan within a size holds it at
every length that it is used for: a longer sequence is captured again, with a plan of its own.

Exact: an operation that runs again gets the same inputs, so gradients are equal bit by bit where the same kernels run.
Sources: Chen et al., 2016; Checkmate (Jain et al., 2020); selective recomputation (Korthikanti et al., 2022); AutoSP's
rule, which `long-context` follows with prices instead of a fixed list; docs/checkpointing.md.
"""

from __future__ import annotations

import enum
import operator
import re
from dataclasses import dataclass
from typing import Any

from ...compiler.compat_joint import tag
from ...compiler.errors import UserError
from ...compiler.framework import Level, Pass, Tier
from ...compiler.joint import FUSED, after_split
from ...compiler.machine import find_machine, machine_of
from ...compiler.program import Program
from ...compiler.registry import register
from ...compiler.rewriter import Rewriter
from ...compiler.tape import At, Tape, saved_bytes, tape
from .lengths import hints, hold_limit, input_bytes, sequence_symbol
from .offload import move_to_host
from .order import keep_order
from .policies import Choice, Collectives, Policy, Problem, choose, gigabytes
from .ranks import agreed
from .remake import remake


class Objective(enum.Enum):
    """What is made small within the limit."""

    TIME = "time"


class Offload(enum.Enum):
    """Where values may be kept besides the device's memory."""

    OFF = "off"
    CPU = "cpu"


@register
@dataclass(frozen=True)
class Checkpoint(Pass):
    name = "checkpoint"
    tier = Tier.EXACT
    level = Level.JOINT
    example = "checkpoint{policy=budget,memory=0.4}"
    trial = "fuseline memory demo:tiny-decoder"

    policy: Policy = Policy.LONG_CONTEXT  # what is kept
    memory: str = ""  # for budget: of the whole step (60GB), or a share of the peak without recomputation (0.4)
    objective: Objective = Objective.TIME  # what is made least within the memory
    offload: Offload = Offload.OFF  # whether kept values may wait in the host's memory
    target_seq: int = 0  # the length to decide for; 0: as captured
    collectives: Collectives = Collectives.AUTO  # whether exchanges run again
    device: str = ""  # a100, h100, h200, b200 or cpu, whose rates decide; empty: the graph's own

    def run(self, program: Program, rewriter: Rewriter) -> None:
        problem = self.problem(program)
        choice = agreed(problem, choose(problem, self.policy, self.limit(problem)))
        predicted = self._predicted(problem, choice)
        if self.policy is Policy.BUDGET and (size := read_memory(self.memory)) > 1:
            predicted["longest"] = hold_limit(program, problem, choice.execution, size)
        self._tag(problem, choice, rewriter)
        program.module.meta["checkpoint"] = predicted
        if choice.offloaded:
            moved = problem.sections.spread(choice.offloaded) & choice.execution.saved
            names = [problem.tape.storages[s].node.name for s in moved]
            ahead = max(1, *(len(choice.offloaded.intersection(s.values)) for s in problem.sections.sections))
            after_split(program, move_to_host(names, ahead, problem.takes, problem.arrives))
        if FUSED in program.state:
            after_split(program, keep_order)
            after_split(program, lambda forward, backward, results: remake(backward))

    def _predicted(self, problem: Problem, choice: Choice) -> dict[str, float]:
        """Bytes and seconds of the step: its peak apart from parameters and inputs, what is kept between forward and
        backward on the device, what is on the host, and the time that is computed again; of a plan within a size
        also the longest sequence that it holds it for."""
        outside = problem.sections.spread(choice.offloaded) & choice.execution.saved
        kept = choice.execution.saved - outside
        return {
            "peak": problem.peak(choice.execution),
            "kept": saved_bytes(problem.tape, kept, problem.sizes),
            "host": saved_bytes(problem.tape, outside, problem.sizes),
            "seconds": problem.time(choice.execution),
            "step_seconds": problem.step_seconds,
        }

    def problem(self, program: Program, layers: int | None = None) -> Problem:
        """The program's storages, sizes and costs. layers: blocks to decide for, where fewer were traced.

        Raises:
            UserError: `target_seq` and a length that is no symbol.
        """
        found = tape(program)
        machine = find_machine(self.device) if self.device else machine_of(_device(program))
        at = _sizes(program, found, self.target_seq)
        return Problem(found, machine, at, self.collectives, self.offload is Offload.CPU, layers)

    def limit(self, problem: Problem, owned: float | None = None) -> float | None:
        """Bytes for activations and gradients. owned: those of parameters and inputs, where not all were traced.

        Raises:
            UserError: the option `memory` is no size and no share, or parameters and inputs alone are more.
        """
        if self.policy is not Policy.BUDGET:
            if self.memory:
                raise UserError(
                    f"policy {self.policy.value} takes no memory", remedy="checkpoint{policy=budget,memory=60GB}"
                )
            return None
        size = read_memory(self.memory)
        if size <= 1:
            return size * problem.peak(problem.run(problem.everything))
        owned = input_bytes(problem.tape, problem.at) if owned is None else owned
        if owned >= size:
            raise UserError(
                f"checkpoint cannot keep a step within {self.memory}: parameters and inputs take {gigabytes(owned)}",
                remedy="more memory, or parameters that are sharded or in a smaller type",
            )
        return size - owned

    def _tag(self, problem: Problem, choice: Choice, rewriter: Rewriter) -> None:
        found = problem.tape
        saved = choice.execution.saved
        again = {i for i in choice.execution.backward.steps if found.is_forward[i]}
        stands_for = problem.sections.stands_for
        stays: set[int] = set()  # calls whose decision an observer skipped: their results are kept
        for i in found.forward:
            node = found.nodes[i]
            if found.is_size[i]:
                continue
            if not found.allocates[i]:
                tag(node, i not in again or (node.target is operator.getitem and found.inputs[i][0] in stays))
                continue
            why = choice.why.get(stands_for.get(found.allocates[i][0], found.allocates[i][0]), "not read again")
            if i in again:
                done = rewriter.decide(node, "recompute", why)
                tag(node, not done)
                if not done:
                    stays.add(i)
            else:
                tag(node, True)
                if any(s in saved for s in found.allocates[i]):
                    rewriter.decide(node, "save", why)


def read_memory(text: str) -> float:
    """`60GB` → 60e9, `512MiB` → 536870912, `0.4` → 0.4.

    Raises:
        UserError: it is neither a size nor a share.
    """
    units = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", text.strip())
    if match is None or (match[2] is None and not 0 < float(match[1]) <= 1):
        raise UserError(
            f"memory is a size or a share of the peak, not '{text}'", remedy="memory=60GB, memory=512MiB or memory=0.4"
        )
    return float(match[1]) * (units[match[2]] if match[2] else 1.0)


def _device(program: Program) -> Any:
    devices = [v.device for n in program.graph.nodes if hasattr(v := n.meta.get("val"), "device")]
    return next((d for d in devices if d.type == "cuda"), devices[0])


def _sizes(program: Program, found: Tape, target: int) -> At:
    """Every symbol's value: as captured, and `target` for the sequence's."""
    at = hints(program)
    if not target:
        return at
    symbol = sequence_symbol(found)
    if symbol is None:
        raise UserError(
            f"target_seq={target}: this graph was captured with a fixed sequence length",
            remedy="torch._dynamo.mark_dynamic(input_ids, 1) before the first call, or leave target_seq out",
        )
    return {**at, symbol: target}
