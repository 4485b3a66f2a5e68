"""Regions that no kernel of ours takes: run op by op through PyTorch, or compiled by Inductor where that is faster.

A region's first call compiles it and times both on the inputs that it was given; the faster one runs from then on. The
choice is kept in the cache on disk, so that the next process compiles only what won. Regions of equal graphs, as the
layers of a model have, share one compilation and one choice. Nothing here fails a call: where Inductor raises, or its
result has another layout, the region runs through PyTorch, and the compilation's `refusals` say why.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch.fx import GraphModule

from ..compiler.compat import fresh_copies, guarded, inductor_region
from ..compiler.flatten import flatten_on
from .cache import Cache
from .entry import Entry
from .kernel_store import versions
from .stopwatch import Times, both

log = logging.getLogger("fuseline")
CHOICES = ("auto", "inductor", "eager")
KIND = "leftovers"  # in the cache
GAIN = 1.03  # how much faster a compiled region must be, replayed on the GPU
LOSS = 1.10  # how much slower it may be as the host launches it

Test = Callable[[Sequence[Any]], bool]


@dataclass
class Compiled:
    """A region through Inductor, once a process: `run` is None where that failed, for `reason`."""

    run: Callable[..., Any] | None = None
    holds: Test | None = None  # for which sizes, where any are symbolic
    reason: str = ""


@dataclass
class Shared:
    """What regions of one identity have in common; `choices`: by the sizes' magnitudes, whether Inductor runs."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    compiled: Compiled | None = None
    choices: dict[tuple[int, ...], bool] = field(default_factory=dict)
    times: dict[tuple[int, ...], Times] = field(default_factory=dict)


_shared: dict[str, Shared] = {}


class Leftover:
    """Stands for a region's function in a generated module: the same arguments, the same results.

    Args:
        plain: the function as generated.
        region: its graph; placeholders hold fake values.
        refusals: is told, under `name`, why a region cannot go through Inductor.
        always: Inductor without asking which is faster.
    """

    def __init__(
        self,
        name: str,
        plain: Callable[..., Any],
        region: GraphModule,
        refusals: dict[str, str],
        cache: Cache | None = None,
        always: bool = False,
    ):
        self.name, self.plain, self.region, self.always = name, plain, region, always
        self.refusals, self.cache = refusals, cache or Cache()
        self.identity: str = region.meta["identity"]
        self.shared = _shared.setdefault(f"{self.identity} {always}", Shared())
        self.sizes = _symbolic(region)
        self.known: dict[tuple[int, ...], Callable[..., Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        sizes = tuple([arguments[i] if dim < 0 else arguments[i].shape[dim] for i, dim in self.sizes])
        run = self.known.get(sizes)
        if run is None:
            run = self._choose(sizes, arguments)
        if run is self.plain:
            return run(*arguments)
        try:
            return run(*arguments)
        except Exception as error:  # it computes from its inputs alone, so it can be run again
            self._give_up(error)
            return self.plain(*arguments)

    def _choose(self, sizes: tuple[int, ...], arguments: Sequence[Any]) -> Callable[..., Any]:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return self.plain  # nothing can be compiled or timed now; calls that are captured were run before
        with self.shared.lock:
            magnitude = tuple(s.bit_length() for s in sizes)
            choices = self.shared.choices
            if magnitude not in choices:
                choices[magnitude] = self._measured(magnitude, arguments)
            run = self.plain
            if self.shared.compiled is not None and self.shared.compiled.run is None:
                self.refusals[self.name] = self.shared.compiled.reason
            if choices[magnitude]:
                compiled = self._compile()
                if compiled.run is not None and (compiled.holds is None or compiled.holds(arguments)):
                    run = compiled.run
            if len(self.known) >= 256:
                self.known.clear()
            self.known[sizes] = run
            return run

    def _measured(self, magnitude: tuple[int, ...], arguments: Sequence[Any]) -> bool:
        """Whether Inductor is faster, from the cache or by trying."""
        if self.always:
            return True
        device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
        fields = {
            "region": self.identity,
            "sizes": list(magnitude),
            "target": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            **versions(),
        }
        stored = self.cache.get(KIND, "choice", fields)
        if isinstance(stored, Entry):
            chosen = bool(json.loads(stored.files["choice.json"])["chosen"])
            log.debug("region %s: %s, as measured before", self.name, _word(chosen))
            return chosen
        compiled = self._compile()
        if compiled.run is None or compiled.holds is not None and not compiled.holds(arguments):
            return False
        try:
            times = self._timed(compiled.run, arguments, device)
        except Exception as error:
            self._give_up(error)
            return False
        self.shared.times[magnitude] = times
        chosen = times.inductor * GAIN < times.plain and times.inductor_launched < times.plain_launched * LOSS
        log.debug("region %s: %s (%s)", self.name, _word(chosen), times)
        record = {"chosen": chosen, **times.microseconds()}
        because = f"{_word(chosen)} was taken: {times}"
        self.cache.put(KIND, "choice", fields, {"choice.json": json.dumps(record).encode()}, because)
        return chosen

    def _timed(self, run: Callable[..., Any], arguments: Sequence[Any], device: torch.device) -> Times:
        expected, result = _layout(self.plain(*arguments)), _layout(run(*arguments))
        if expected != result:
            raise TypeError(f"Inductor gives {result}, not {expected}")
        return both(lambda: self.plain(*arguments), lambda: run(*arguments), device)

    def _compile(self) -> Compiled:
        if self.shared.compiled is None:
            try:
                self.shared.compiled = _through_inductor(self.region)
            except Exception as error:
                self._give_up(error)
        assert self.shared.compiled is not None
        return self.shared.compiled

    def _give_up(self, error: Exception) -> None:
        text = str(error).splitlines()
        reason = f"Inductor: {type(error).__name__}{f': {text[0]}' if text else ''}"
        log.debug("region %s runs through PyTorch: %s", self.name, reason)
        self.refusals[self.name] = reason
        self.shared.compiled = Compiled(reason=reason)
        self.shared.choices = dict.fromkeys(self.shared.choices, False)
        self.known.clear()


def install(
    module: ModuleType,
    regions: dict[str, GraphModule],
    refusals: dict[str, str],
    choice: str = "auto",
    cache: Cache | None = None,
) -> dict[str, Leftover]:
    """Puts a `Leftover` in the place of each of these functions of a generated module, unless one is there."""
    found = {}
    for name, region in regions.items():
        function = getattr(module, name)
        if not isinstance(function, Leftover):
            function = Leftover(name, function, region, refusals, cache, always=choice == "inductor")
            setattr(module, name, function)
        found[name] = function
    return found


def _through_inductor(region: GraphModule) -> Compiled:
    values = [n.meta["val"] for n in region.graph.nodes if n.op == "placeholder"]
    mode, fakes = fresh_copies(values)
    with torch.inference_mode(False), torch.no_grad():
        run = inductor_region(flatten_on(fakes, mode, region), fakes)
    result = next(n for n in region.graph.nodes if n.op == "output").args[0]
    holds = guarded(mode, fakes)
    return Compiled(run if isinstance(result, (tuple, list)) else _first(run), holds)


def _first(run: Callable[..., Any]) -> Callable[..., Any]:
    """A region with one result gives it as it is."""

    def call(*arguments: Any) -> Any:
        result = run(*arguments)
        return result[0] if isinstance(result, (tuple, list)) else result

    return call


def _symbolic(region: GraphModule) -> tuple[tuple[int, int], ...]:
    """(argument, dimension) of the sizes that differ from call to call, each formula once; dimension -1: a number."""
    found: dict[Any, tuple[int, int]] = {}
    for position, node in enumerate(n for n in region.graph.nodes if n.op == "placeholder"):
        value = node.meta["val"]
        sizes = enumerate(value.shape) if isinstance(value, torch.Tensor) else [(-1, value)]
        for dim, size in sizes:
            if isinstance(size, torch.SymInt):
                found.setdefault(str(size), (position, dim))
    return tuple(found.values())


def _layout(result: Any) -> list[Any]:
    tensors = result if isinstance(result, (tuple, list)) else [result]
    return [(tuple(t.shape), t.stride(), t.dtype) if isinstance(t, torch.Tensor) else type(t) for t in tensors]


def _word(chosen: bool) -> str:
    return "Inductor" if chosen else "PyTorch"
