"""A judge that is a command of the user's: a case is interesting while the command ends as it did on the first one."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import UserError
from .check import Verdict
from .commands import QUIET, run_words
from .search import Case

PLACE = "{}"
KIND = "command"


class CommandJudge:
    """Runs a command on each case, written to a file.

    Args:
        command: its words; `{}` among them stands for the file's path, which comes last where there is none.
        write: writes a case to a path.
        match: a regular expression that the command's output must contain, besides the exit code being the same.
    """

    def __init__(self, command: Sequence[str], write: Callable[[Case, Path], None], match: str | None = None):
        self.command, self.write = list(command), write
        self.status: int | None = 0
        self.seconds: float | None = None
        try:
            self.match = re.compile(match) if match is not None else None
        except re.error as error:
            raise UserError(f"'{match}' is no pattern: {error}", remedy="--match 'NaN in layer'") from None

    def start(self, case: Case) -> Verdict:
        """The first run, which says what every other has to be like.

        Raises:
            UserError: there is no such command, or its output does not match.
        """
        started = time.monotonic()
        status, printed = self._run(case)
        self.status, self.seconds = status, max(60.0, 10 * (time.monotonic() - started))
        if self.match is not None and not self.match.search(printed):
            last = [line for line in printed.splitlines() if line.strip()][-3:]
            raise UserError(f"the command's output does not match '{self.match.pattern}'", last)
        return self._verdict()

    def __call__(self, case: Case) -> Verdict | None:
        status, printed = self._run(case)
        same = status == self.status and (self.match is None or self.match.search(printed) is not None)
        return self._verdict() if same else None

    def _verdict(self) -> Verdict:
        said = f" and prints '{self.match.pattern}'" if self.match is not None else ""
        return Verdict(KIND, f"{' '.join(self.command)} ends with {self.status}{said}")

    def _run(self, case: Case) -> tuple[int | None, str]:
        with tempfile.TemporaryDirectory(prefix="fuseline-reduce-") as folder:
            path = Path(folder) / "case.py"
            self.write(case, path)
            words = [word.replace(PLACE, str(path)) for word in self.command]
            if words == self.command:
                words.append(str(path))
            return run_words(words, {**os.environ, **QUIET}, self.seconds)
