"""Executable: a compiled graph behind the caller's flat arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..compiler.binder import Binder
from .graphs import CudaGraphs


class Executable:
    """Selects a graph's inputs among the caller's flat arguments, binds its weights, and runs it.

    Args:
        run: the compiled graph: its inputs, then its weights.
        arguments: positions of the graph's inputs among the flat arguments.
        binder: the weights for the parameters that the caller passed.
        graphs: captures what is called again and again; None where that cannot be done.
    """

    def __init__(
        self, run: Callable[..., Any], arguments: Sequence[int], binder: Binder, graphs: CudaGraphs | None = None
    ):
        self.run, self.arguments, self.binder, self.graphs = run, tuple(arguments), binder, graphs

    def __call__(self, *flat: Any) -> Any:
        if self.graphs is not None:
            return self.graphs(flat)
        return self.run(*[flat[i] for i in self.arguments], *self.binder(flat))
