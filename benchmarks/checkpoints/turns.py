"""Whose turn the GPU is: processes compile at the same time and measure one after another."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable
from typing import Any

from torch._dynamo import lookup_backend


class Turn:
    """The GPU for one process, until it ends: taken once, when what was compiled is about to run for the first time.

    Args:
        path: of the file that the processes lock.
        early: the turn is not waited for then, as what runs first is short; the process takes it when it likes.
        begin: called once, before anything runs.
    """

    def __init__(self, path: str, early: bool, begin: Callable[[], None]):
        self.file = os.open(path, os.O_RDWR | os.O_CREAT)
        self.taken, self.begun, self.early, self.begin = False, False, early, begin

    def take(self) -> None:
        if not self.taken:
            fcntl.flock(self.file, fcntl.LOCK_EX)
            with contextlib.suppress(PermissionError):  # raising it is not everybody's to do
                os.setpriority(os.PRIO_PROCESS, 0, 0)
            self.taken = True

    def start(self) -> None:
        if not self.early:
            self.take()
        if not self.begun:
            self.begin()
            self.begun = True

    def before(self, backend: str, **given: Any) -> Callable[..., Any]:
        """The backend, whose compiled graphs start the turn."""
        inner = lookup_backend(backend)

        def compile_first(module: Any, inputs: Any) -> Any:
            function = inner(module, inputs, **given)

            def run(*arguments: Any) -> Any:
                self.start()
                return function(*arguments)

            return run

        return compile_first
