"""Progress of long work: a bar on a terminal, nothing in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import length_hint
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")


@contextmanager
def bar(what: str, total: int | None = None, completed: int = 0) -> Iterator[Progress]:
    """A bar of `total` steps (of unknown length when None) on standard error; advance it by `step(progress)`.

    completed: how many of the steps were done before.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    more = (TimeRemainingColumn(),) if total else ()
    with Progress(*columns, *more, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(what, total=total, completed=completed)
        yield progress


def step(progress: Progress, what: str | None = None, count: int = 1) -> None:
    """Advances a bar, and says what is done now."""
    progress.update(progress.task_ids[0], advance=count, description=what)


def steps(work: Iterable[T], what: str, total: int | None = None, completed: int = 0) -> Iterator[T]:
    """The items of `work`, with a bar; total: how many there are in all, where `work` does not say."""
    if not sys.stderr.isatty():  # a library does not import rich for nothing
        yield from work
        return
    with bar(what, total or length_hint(work) or None, completed) as progress:
        for item in work:
            yield item
            step(progress)
