"""The fewest bytes between forward and backward where only cheap calls run again: a minimum cut.

Every value is an edge as wide as its bytes, every read an edge that cannot be cut; what must not run again hangs on the
source, what the backward reads on the sink. Source: Chen et al., 2016; the cut is that of PyTorch's partition (He, Yu,
2022), on the storages of one section at a time.
"""

from __future__ import annotations

import networkx as nx
import numpy as np

from ...compiler.compat_joint import is_random
from ...compiler.costs import is_attention, is_collective
from ...compiler.tape import FREE, Tape
from .program import relevant
from .sections import Section, Sections


def expensive(tape: Tape) -> frozenset[int]:
    """Calls that a cut never runs again: products, attention, collectives, random draws, and what has no cost."""
    found = set()
    for i in tape.forward:
        node, cost = tape.nodes[i], tape.costs[i]
        heavy = cost is not FREE and (cost.products != 0 or cost.attention != 0 or not cost.known)
        if heavy or is_attention(node) or is_collective(node) or is_random(node):
            found.add(i)
    return frozenset(found)


def cut(found: Sections, sizes: np.ndarray) -> set[int]:
    """Representatives of the storages to keep."""
    wanted, never = relevant(found.tape), expensive(found.tape)
    kept: set[int] = set()
    for section in found.sections:
        kept |= _cut_section(found.tape, section, sizes, wanted, never)
        for providers in section.imports.values():
            kept.update(p for p in providers if p in wanted)
    return kept


def _cut_section(tape: Tape, section: Section, sizes: np.ndarray, wanted: set[int], never: frozenset[int]) -> set[int]:
    graph = nx.DiGraph()
    own = set(section.values) & wanted
    behind = {tape.backward[p] for p in section.backward}
    for s in own:
        one = tape.storages[s]
        graph.add_edge(("in", s), ("out", s), capacity=max(float(sizes[one.size]), 1.0))
        if one.owner in never:
            graph.add_edge("source", ("in", s))
        for r in tape.reads[one.owner]:
            if r in own:
                graph.add_edge(("out", r), ("in", s))
        if any(r in behind or not tape.is_forward[r] for r in one.reads):
            graph.add_edge(("out", s), "sink")
    if "source" not in graph or "sink" not in graph:
        return set()
    _, (reachable, _) = nx.minimum_cut(graph, "source", "sink")
    return {s for s in own if ("in", s) in reachable and ("out", s) not in reachable}
