"""Progress of long work inside of passes: a bar on a terminal, nothing in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def steps(work: Iterable[T], what: str, total: int | None = None, completed: int = 0) -> Iterator[T]:
    """The items of `work`, with a bar on stderr if that is a terminal.

    total: how many there are in all, where `work` does not say; completed: how many of them were done before.
    """
    if not sys.stderr.isatty():
        yield from work
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield from bar.track(work, total=total, completed=completed, description=what)
