"""Running a user's command with some of the rewrites: all state in its environment, nothing left behind."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from ..observe.limit import VARIABLES, read_journal
from .bisect import Outcome

CANNOT_TELL = 125  # the exit code by which a command says that this run can't be judged, as for `git bisect run`

_ERROR = re.compile(r"(error: |[\w.]*(Error|Exception|Failed)\b)")

QUIET = {"FUSELINE_REPRO": "off"}  # what fails in a search fails on purpose, and leaves no reproducers


@dataclass
class Command:
    """A command whose exit code judges a run: 0 is good, 125 cannot tell, anything else is bad, a signal too.

    Args:
        seconds: a run that takes longer is stopped, with all processes it started, and is bad.
        match: only a failure whose output has this regular expression is bad; another one cannot tell.
        environment: further variables for each run.
    """

    words: Sequence[str]
    seconds: float | None = None
    match: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    output: str = ""  # of the last run

    def __call__(self, limit: int | None, skip: frozenset[int] = frozenset()) -> Outcome:
        with tempfile.TemporaryDirectory(prefix="fuseline-") as journal:
            variables = {k: v for k, v in os.environ.items() if k not in VARIABLES}
            variables |= {**QUIET, **self.environment, "FUSELINE_JOURNAL": journal, **_limits(limit, skip)}
            code, self.output = run_words(self.words, variables, self.seconds)
            entries = read_journal(Path(journal))
        if code is None:
            return Outcome(self._matches(), entries, f"not done after {self.seconds:g} s", endless=True)
        detail = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if code == 0:
            return Outcome(False, entries)
        telling = _telling_line(self.output)
        detail = f"{detail}: {telling[:120]}" if telling else detail
        if code == CANNOT_TELL:
            return Outcome(None, entries, detail)
        return Outcome(self._matches(), entries, detail)

    def _matches(self) -> bool | None:
        return True if self.match is None or re.search(self.match, self.output) else None

    def line(self, limit: int | None, skip: frozenset[int] = frozenset()) -> str:
        """What to type to repeat a run."""
        settings = [f"{k}={v}" for k, v in {**self.environment, **_limits(limit, skip)}.items()]
        return " ".join([*settings, shlex.join(self.words)])


def _telling_line(output: str) -> str:
    """The last line that names an error, or the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or lines or [""])[-1]


def _limits(limit: int | None, skip: frozenset[int]) -> dict[str, str]:
    found = {} if limit is None else {"FUSELINE_LIMIT": str(limit)}
    return {**found, "FUSELINE_SKIP": ",".join(map(str, sorted(skip)))} if skip else found


def run_words(words: Sequence[str], variables: dict[str, str], seconds: float | None) -> tuple[int | None, str]:
    """Exit code (None where it had to be stopped) and output; the whole process group is ended with it."""
    try:
        process = subprocess.Popen(
            words, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"'{words[0]}' cannot be run: {error.strerror}", remedy="name a command after --") from None
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]
    except BaseException:  # the user's Ctrl-C: leave nothing running
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
