"""Host time by stage: named functions are wrapped by timers, and what they take is summed for each step.

A sampling or tracing profiler costs a call more than what is looked for here, a few microseconds. A timer costs a call
about a third of one, which the stages around it are charged with: time few stages at once where a total is to be kept.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any


class Stages:
    """Seconds that the wrapped functions took, step by step.

    Args:
        functions: label → (owner, attribute): wrapped wherever it is looked up from then on.
    """

    def __init__(self, functions: dict[str, tuple[Any, str]]):
        self.functions = functions
        self.now = dict.fromkeys(functions, 0.0)
        self.steps: list[dict[str, float]] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Wraps the functions for as long as it lasts."""
        originals = {label: getattr(owner, name) for label, (owner, name) in self.functions.items()}
        for label, (owner, name) in self.functions.items():
            setattr(owner, name, self._timed(label, originals[label]))
        try:
            yield
        finally:
            for label, (owner, name) in self.functions.items():
                setattr(owner, name, originals[label])

    def _timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        clock, now = time.perf_counter, self.now

        @functools.wraps(function)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            start = clock()
            try:
                return function(*arguments, **keywords)
            finally:
                now[label] += clock() - start

        return timed

    def step(self, call: Callable[[], Any], label: str = "step") -> None:
        """One step, its own time under `label`."""
        for name in self.functions:
            self.now[name] = 0.0
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        self.steps.append({label: seconds, **{name: self.now[name] for name in self.functions}})

    def medians(self, scale: float = 1e6) -> dict[str, float]:
        """Each stage's median over the steps, in microseconds."""
        return {label: statistics.median(step[label] for step in self.steps) * scale for label in self.steps[0]}

    def difference(self, whole: str, part: str, scale: float = 1e6) -> float:
        """The median of what `whole` took beyond `part`, step by step."""
        return statistics.median(step[whole] - step[part] for step in self.steps) * scale
