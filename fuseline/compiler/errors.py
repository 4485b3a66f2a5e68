"""Errors a user can cause or read: what went wrong, where, and what to do next.

Every `FuselineError` prints as one block. Its class says who has to act: `UserError` (exit code 2 on the command
line) means that the input is wrong; a plain `FuselineError` that the compiler refuses or found itself at fault.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class FuselineError(Exception):
    """An error with a headline, details and a remedy.

    Args:
        headline: one sentence, without a full stop.
        details: further lines, each printed indented.
        remedy: what the reader can do, ideally a command or a line of code.
    """

    exit_code = 1

    def __init__(self, headline: str, details: Sequence[str] = (), remedy: str | None = None):
        self.headline, self.details, self.remedy = headline, tuple(details), remedy
        super().__init__(headline)

    def __str__(self) -> str:
        lines = [self.headline, *(f"  {line}" for line in self.details)]
        if self.remedy:
            lines.append(f"  try: {self.remedy}")
        return "\n".join(lines)


class UserError(FuselineError):
    """The input is wrong: a name, an option, a file, a value."""

    exit_code = 2


class PassError(FuselineError):
    """A pass refused, matched nothing, or broke an invariant."""


class EmptyPassError(PassError, UserError):
    """A pass that was asked for matched no site."""

    exit_code = 2


class ExpectationError(PassError, UserError):
    """A pass matched fewer sites than it was expected to."""

    exit_code = 2


class CaptureError(UserError):
    """A model that cannot be captured as one graph."""


class VerificationError(FuselineError):
    """The graph breaks a rule of the verifier."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """`"; did you mean 'rotate'? (valid: …)"`, or the valid names alone when none is close."""
    names = sorted(valid)
    likeness = lambda candidate: difflib.SequenceMatcher(None, candidate, name).ratio()
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    close = [c for c in close if likeness(c) >= 0.85 * likeness(close[0])]  # a second one only where it is as likely
    hint = f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
    return f"{hint} (valid: {', '.join(names)})"
