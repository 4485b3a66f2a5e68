"""Executable: a compiled graph behind the caller's flat arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..compiler.binder import Binder


class Executable:
    """Selects a graph's inputs among the caller's flat arguments, binds its weights, and runs it.

    Args:
        run: the compiled graph: its inputs, then its weights.
        arguments: positions of the graph's inputs among the flat arguments.
        binder: the weights for the parameters that the caller passed.
    """

    def __init__(self, run: Callable[..., Any], arguments: Sequence[int], binder: Binder):
        self.run, self.arguments, self.binder = run, tuple(arguments), binder

    def __call__(self, *flat: Any) -> Any:
        return self.run(*[flat[i] for i in self.arguments], *self.binder(flat))
