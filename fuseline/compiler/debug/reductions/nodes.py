"""Fewer nodes and fewer results: what is cut away becomes an input that holds the value it had."""

from __future__ import annotations

from ..extract import calls, extract, results
from ..search import Search, minimise

SMALL = 60  # nodes; below it, results that only cut nodes read are tried too


def cut_nodes(search: Search) -> bool:
    """Delta debugging over the computing nodes."""

    def test(kept: list[str]) -> bool:
        for escaping in (False, True) if len(kept) <= SMALL else (False,):
            program = extract(search.best.program, set(kept), search.values, escaping=escaping)
            if program is not None and search.tries("fewer nodes", program):
                return True
        return False

    return minimise([n.name for n in calls(search.best.program)], test)


def cut_outputs(search: Search) -> bool:
    """Delta debugging over the results; what only a dropped one needs goes with it."""

    def test(kept: list[str]) -> bool:
        program = search.best.program
        cut = extract(program, {n.name for n in calls(program)}, search.values, set(kept))
        return cut is not None and search.tries("fewer results", cut)

    return minimise([n.name for n in results(search.best.program)], test)
