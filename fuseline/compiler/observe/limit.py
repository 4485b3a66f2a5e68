"""Limit and Journal: rewrites counted over a whole process, so that a script can be run with the first N alone.

Both are switched on by the environment, which is all the state that there is:

    FUSELINE_LIMIT=340         the first 340 rewrites of each process happen, no other
    FUSELINE_SKIP=17,20        these do not happen
    FUSELINE_JOURNAL=DIR       a file a process, with a line of JSON a rewrite, written before it happens

The count runs on over every graph that a process compiles. Below the limit the numbers are the same at every run; that
is what makes a search by halves possible (LLVM's OptBisect).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from torch.fx import Node

from ..action import Action, Observer, PassEnds
from ..errors import UserError
from ..framework import Pass
from ..program import Program
from ..provenance import source_line
from ..structure import describe_value
from .ambient import register_ambient

if TYPE_CHECKING:
    from ..pipeline import Pipeline

VARIABLES = ("FUSELINE_LIMIT", "FUSELINE_SKIP", "FUSELINE_JOURNAL")
DETAILED = 20_000  # rewrites whose nodes are written down; a pass that never ends makes more


@dataclass
class Entry:
    """A rewrite of a journal.

    number: counted over the process; program: which pipeline run it belongs to, from 0; step: position of its pass
    there; location: `file:line` of the rule; line: the user's. before, after: the nodes' text.
    """

    number: int
    program: int
    step: int
    pass_name: str
    rule: str
    site: str
    location: str | None
    line: str | None = None
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"#{self.number} {self.pass_name}/{self.rule} at {self.site}"


class Limit(Observer):
    """Lets the first `limit` rewrites happen, but for those in `skip`, and lists what it was asked about.

    One object serves all pipelines of a search's run; `entries` holds the rewrites that happened, in order.
    """

    def __init__(self, limit: int | None = None, skip: Iterable[int] = (), journal: TextIO | None = None):
        self.limit, self.skip, self.journal = limit, frozenset(skip), journal
        self.entries: list[Entry] = []
        self.count = 0
        self._program, self._step = -1, -1

    def pipeline_starts(self, pipeline: Pipeline, program: Program) -> None:
        self._program, self._step = self._program + 1, -1

    def pass_starts(self, step: Pass, program: Program) -> None:
        self._step += 1

    def allows(self, action: Action) -> bool:
        if self.limit is not None and self.count >= self.limit:
            raise PassEnds
        self.count += 1
        if self.count in self.skip:
            return False
        detailed = self.count <= DETAILED
        entry = Entry(
            self.count, self._program, self._step, action.pass_name, action.rule, action.site, action.location,
            source_line(action.root), [_text(n) for n in action.removed] if detailed else [],
        )  # fmt: skip
        self.entries.append(entry)
        self._write(entry)
        return True

    def rewritten(self, action: Action, program: Program) -> None:
        if self.count <= DETAILED and self.entries:
            self.entries[-1].after = [_text(n) for n in action.created]
            self._write({"number": self.count, "after": self.entries[-1].after})

    def _write(self, record: Any) -> None:
        if self.journal is not None:
            self.journal.write(json.dumps(record if isinstance(record, dict) else asdict(record)) + "\n")
            self.journal.flush()


def read_journal(directory: Path) -> dict[str, list[Entry]]:
    """The rewrites of each process that wrote into `directory`, by the file's name; a torn last line is dropped."""
    found: dict[str, list[Entry]] = {}
    for path in sorted(directory.glob("*.jsonl")):
        entries: dict[int, Entry] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if "rule" in record:
                entries[record["number"]] = Entry(**record)
            elif record["number"] in entries:
                entries[record["number"]].after = record["after"]
        found[path.stem] = list(entries.values())
    return found


def _text(node: Node) -> str:
    arguments = ", ".join(
        [*(_short(a) for a in node.args), *(f"{k}={_short(v)}" for k, v in node.kwargs.items() if v is not None)]
    )
    return f"{node.name} = {node.target}({arguments})  # {describe_value(node.meta.get('val'))}"


def _short(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        inside = ", ".join(map(_short, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    return value.name if isinstance(value, Node) else repr(value)


@register_ambient
def from_environment() -> list[Observer]:
    """The process's own limit, where its environment asks for one."""
    values = tuple(os.environ.get(name) for name in VARIABLES)
    return [_of_process(*values)] if any(values) else []


@cache
def _of_process(limit: str | None, skip: str | None, journal: str | None) -> Limit:
    try:
        first = int(limit) if limit else None
        skipped = [int(part) for part in skip.split(",")] if skip else []
    except ValueError:
        name, text = ("FUSELINE_LIMIT", limit) if limit and not limit.isdigit() else ("FUSELINE_SKIP", skip)
        raise UserError(f"{name} holds numbers of rewrites, not '{text}'", remedy=f"unset {name}") from None
    file = None
    if journal:
        rank = os.environ.get("RANK")
        name = f"rank{rank}" if rank is not None else f"process{os.getpid()}"
        Path(journal).mkdir(parents=True, exist_ok=True)
        file = (Path(journal) / f"{name}.jsonl").open("w", encoding="utf-8")
    return Limit(first, skipped, file)
