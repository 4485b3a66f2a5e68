"""Observers that nobody passed: attached for a while by code, or for a process by its environment.

A pipeline that runs deep inside `torch.compile`, in a script that somebody else wrote, is watched through these. Each
source is asked once a pipeline; with none registered, or none that wants to watch, nothing is attached.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

from ..action import Observer

_sources: list[Callable[[], Iterable[Observer]]] = []
_attached: list[Observer] = []


def register_ambient(source: Callable[[], Iterable[Observer]]) -> Callable[[], Iterable[Observer]]:
    """Adds a function that says, at the start of each pipeline, which observers are to watch it; also a decorator."""
    if source not in _sources:
        _sources.append(source)
    return source


@contextlib.contextmanager
def attached(*observers: Observer) -> Iterator[None]:
    """Attaches observers to every pipeline that runs inside the block, in this process."""
    _attached.extend(observers)
    try:
        yield
    finally:
        for observer in observers:
            _attached.remove(observer)


def ambient() -> list[Observer]:
    """The observers that watch a pipeline which starts now."""
    return [*_attached, *(observer for source in _sources for observer in source())]
