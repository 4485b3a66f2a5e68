"""No values: a pass that crashes, breaks the graph or never ends does so on types alone."""

from __future__ import annotations

from dataclasses import replace

from ..search import Search


def drop_values(search: Search) -> bool:
    """The program without its example inputs."""
    program = search.best.program
    if program.examples is None or search.verdict.kind == "error":
        return False
    return search.tries("without values", replace(program, examples=None))
