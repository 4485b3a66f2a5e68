"""A neighbourhood: the nodes that the guilty rewrite took away, and as many around them as the fault needs."""

from __future__ import annotations

from torch.fx import Node

from ..extract import calls, extract
from ..search import Search

RADII = (0, 1, 2, 3, 5, 8, 13, 21, 34)


def neighbourhood(search: Search) -> bool:
    """What lies within some steps of the guilty rewrite, up or down the graph: the nearest first."""
    culprit = search.culprit
    if culprit is None or not culprit.taken:
        return False
    program = search.best.program
    known = {n.name: n for n in calls(program)}
    seeds = [known[name] for name in (*culprit.taken, *culprit.captured) if name in known]
    reached, edge = dict.fromkeys(seeds), seeds
    distance = 0
    for radius in RADII if seeds else ():
        while distance < radius:
            edge = [n for n in _around(edge) if n not in reached]
            reached.update(dict.fromkeys(edge))
            distance += 1
        if len(reached) >= len(known):
            return False
        names = {n.name for n in reached}
        for escaping in (False, True):
            cut = extract(program, names, search.values, escaping=escaping)
            if cut is not None and search.tries(f"within {radius} of the guilty rewrite", cut):
                return True
    return False


def _around(nodes: list[Node]) -> list[Node]:
    """The computing nodes next to these."""
    near = [other for node in nodes for other in (*node.all_input_nodes, *node.users)]
    return list(dict.fromkeys(n for n in near if n.op in ("call_function", "call_module")))
