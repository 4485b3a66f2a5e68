"""Rewrites under PyTorch's own bisector: `torch._inductor.compiler_bisector` finds a backend, then one of our rewrites.

The bisector knows the backend `fuseline` where it was imported before this package, or after `join()`: one subsystem,
whose applications are our rewrites, counted over the process. It is attached only while a bisection runs.
"""

from __future__ import annotations

import sys

from .. import compat
from ..action import Action, Observer, PassEnds
from .ambient import register_ambient

BACKEND, SUBSYSTEM = "fuseline", "rewrites"


class Bisected(Observer):
    """Asks PyTorch's bisector about each rewrite."""

    def allows(self, action: Action) -> bool:
        info = f"{action} ({action.location})"
        if compat.bisector_disables(BACKEND, SUBSYSTEM, lambda: info):
            raise PassEnds
        return True


@register_ambient
def while_bisecting() -> list[Observer]:
    """An observer while `torch._inductor.compiler_bisector` drives."""
    return [Bisected()] if compat.bisector_is_running() else []


def join() -> None:
    """Makes PyTorch's bisector search our rewrites after its own backends."""
    compat.join_bisector(BACKEND, SUBSYSTEM)


if "torch._inductor.compiler_bisector" in sys.modules:  # importing it here would cost every user a second or two
    join()
