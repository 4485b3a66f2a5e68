"""Graph breaks: the lines at which Dynamo ended a graph and left a step to Python, and why.

Dynamo compiles what comes before such a line and what comes after it, each part as a graph of its own; where it cannot
go on in the middle of a function (in a loop, in a `with` block that it does not know), the whole function runs in
Python and only the functions that it calls are compiled. Either way the result is right and slower, so it is told.
"""

from __future__ import annotations

import functools
import linecache
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from . import compat
from .provenance import is_ours, is_pythons

log = logging.getLogger("fuseline")
_EXPLANATION = re.compile(r"^\s*Explanation: (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class GraphBreak:
    """One line at which a graph ended.

    reason: in Dynamo's words, its first sentence.
    function: set where no graph could be made of a function at all: its name; it runs in Python.
    """

    file: str
    line: int
    reason: str
    function: str | None = None

    @property
    def code(self) -> str:
        """The line itself."""
        return linecache.getline(self.file, self.line).strip()

    def __str__(self) -> str:
        whole = f" ({self.function} runs in Python as a whole)" if self.function else ""
        return f"{self.file}:{self.line}: {self.reason}{whole}"


def read(note: compat.BreakNote) -> GraphBreak | None:
    """Dynamo's note of a break: the innermost line that is not PyTorch's, ours or Python's own, and the reason in a
    sentence."""
    frames = [f for f in note.frames if not is_ours(f[0])] or list(note.frames)
    if not frames:
        return None
    frames = [f for f in frames if not is_pythons(f[0])] or frames
    explained = _EXPLANATION.search(note.reason)
    reason = explained[1] if explained else note.reason.strip().splitlines()[0]
    if reason.startswith("generic_jump"):
        reason = "a branch depends on the values of a tensor"
    return GraphBreak(*frames[-1], reason.strip().rstrip("."), note.function)


def distinct(breaks: Iterable[GraphBreak | None]) -> list[GraphBreak]:
    """Without repetitions: a break in a function that was called is noted for its caller too, and once a capture."""
    found: dict[tuple[str, int, str], GraphBreak] = {}
    for one in breaks:
        if one is not None:
            key = (one.file, one.line, one.reason)
            found[key] = one if one.function or key not in found else found[key]
    return list(found.values())


def watched(call: Callable[..., Any], found: list[GraphBreak], name: str) -> Callable[..., Any]:
    """`call`, adding to `found` the graph breaks of what Dynamo compiles during it; the first ones are logged.

    What Dynamo compiled between two calls belongs to others and is passed over. A call that compiles nothing costs two
    comparisons.
    """
    notes = compat.BreakNotes()

    @functools.wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a part of somebody else's graph
            return call(*args, **kwargs)
        notes.skip()
        result = call(*args, **kwargs)
        fresh = notes.fresh()
        if fresh:
            first = not found
            found[:] = distinct([*found, *map(read, fresh)])
            if first and found:
                tell(name, found)
        return result

    return run


def tell(name: str, breaks: list[GraphBreak]) -> None:
    """A warning with a line a break."""
    count = f"{len(breaks)} graph breaks" if len(breaks) > 1 else "a graph break"
    lines = "\n".join(f"  {one}" for one in breaks)
    log.warning(
        "%s in %s: these lines run in Python, and the code around them is compiled in parts\n%s", count, name, lines
    )


_told: set[GraphBreak] = set()


def tell_of(module: torch.fx.GraphModule) -> None:
    """Logs the break that ended this graph of Dynamo's, once a process: for a backend that knows no model."""
    note = compat.break_after(module)
    one = read(note) if note is not None else None
    if one is not None and one not in _told:
        _told.add(one)
        tell("the compiled code", [one])
