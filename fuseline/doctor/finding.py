"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass

OK, SLOWER, MISSING, BROKEN = "ok", "slower", "missing", "broken"
STATES = (OK, SLOWER, MISSING, BROKEN)  # in rising order of what they cost


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    name: what; state: `ok`, `slower` (all works, and something takes longer), `missing` (something cannot be used),
    `broken` (Fuseline will not work). value: what is there. effect: what that means for the user; remedy: the command
    that mends it, or None where there is nothing to do.
    """

    name: str
    state: str
    value: str
    effect: str = ""
    remedy: str | None = None
