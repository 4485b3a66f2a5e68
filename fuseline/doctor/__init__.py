"""What this machine has, what is missing or will be slower here, and the command that mends it.

    findings = fuseline.doctor.examine()        every check; nothing is installed, downloaded or changed
    findings = fuseline.doctor.examine(trial=False)   without compiling and running a small model

`fuseline doctor` prints them. A check is a function that gives findings, in `checks.py`, `machine.py` or `trial.py`;
one that fails itself is a finding, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .checks import cache, extras, packages, passes, settings
from .finding import BROKEN, MISSING, OK, SLOWER, STATES, Finding
from .machine import compiler, gpu, processor
from .trial import trial as run_trial

Check = Callable[[], Iterable[Finding]]
CHECKS: tuple[Check, ...] = (packages, compiler, gpu, processor, extras, passes, cache, settings)


def examine(trial: bool = True, checks: Iterable[Check] = CHECKS) -> list[Finding]:
    """The findings of all checks, in order.

    Args:
        trial: also capture, rewrite and run a small model, on the GPU where there is one (about two seconds).
    """
    found: list[Finding] = []
    for check in (*checks, *((run_trial,) if trial else ())):
        try:
            found += check()
        except Exception as error:  # a doctor that crashes helps nobody: what it could not look at is what is wrong
            found.append(
                Finding(
                    check.__name__,
                    BROKEN,
                    f"{type(error).__name__}: {error}",
                    "this could not be looked at",
                    "report it with the output of fuseline doctor --json -",
                )
            )
    return found
