"""Garbage collection while a program is compiled."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def settled() -> Iterator[None]:
    """Leaves out what lives already: libraries, models and Dynamo's records are most of what a collection walks over.

    What is made inside is collected as ever; garbage from before waits until the end. A heap that the caller froze
    (before a fork) stays as it is, and an inner or another thread's use adds nothing.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
