"""One plan for all ranks: exchanges that run again have to run again on every rank, in the same order.

The solver stops by the clock, so two processes may find two plans for one graph. Where the graph exchanges data that
may be exchanged again, all ranks of the group take the first one's: with several groups one after another, in the order
of the graph, as of the rows of a mesh and then of its columns.
"""

from __future__ import annotations

import json
from dataclasses import replace

from ...compiler.costs import is_collective
from ...compiler.errors import UserError
from ...compiler.process_groups import follow, named
from ...compiler.traits import arguments
from .policies import Choice, Problem


def agreed(problem: Problem, choice: Choice) -> Choice:
    """The first rank's choice, where ranks have to choose alike; else this process's own.

    Raises:
        UserError: the ranks compile different graphs, or the first compiles none.
    """
    groups = _groups(problem)
    if not groups:
        return choice
    tape = problem.tape
    graph = f"{len(tape.nodes)} nodes, {len(tape.storages)} values, {len(problem.sections.instances)} a block"
    ours = {"graph": graph, "saved": sorted(choice.saved), "offloaded": sorted(choice.offloaded)}
    text = json.dumps(ours)
    for name in groups:
        text = follow(named(name), text, "checkpoint")
    said = json.loads(text)
    if said == ours:
        return choice
    if said["graph"] != graph:
        raise UserError(
            "checkpoint: ranks that exchange data compile different graphs",
            [f"the first rank: {said['graph']}", f"this rank: {graph}"],
            "give every rank of a group batches of the same sizes, and the same code",
        )
    saved, offloaded = frozenset(said["saved"]), frozenset(said["offloaded"])
    why = dict(choice.why)
    why.update(dict.fromkeys(saved ^ choice.saved, "as the first rank decided"))
    return replace(choice, saved=saved, offloaded=offloaded, execution=problem.run(saved, offloaded), why=why)


def _groups(problem: Problem) -> list[str]:
    """The process groups of exchanges that may run again, in the graph's order."""
    tape = problem.tape
    calls = (i for i in tape.forward if is_collective(tape.nodes[i]) and i not in problem.never)
    found = (arguments(tape.nodes[i]).get("group_name") for i in calls)
    return list(dict.fromkeys(str(name) for name in found if name is not None))
