"""Progress on long work: a bar on a terminal, nothing in a log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def bar(what: str, total: int | None = None) -> Iterator[Progress]:
    """A bar of `total` steps (of unknown length when None) on standard error; advance it by `step(progress)`."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    more = (TimeRemainingColumn(),) if total else ()
    with Progress(*columns, *more, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(what, total=total)
        yield progress


def step(progress: Progress, what: str | None = None, count: int = 1) -> None:
    """Advances a bar, and says what is done now."""
    task = progress.task_ids[0]
    progress.update(task, advance=count, **({} if what is None else {"description": what}))
