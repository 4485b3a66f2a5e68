"""Times: medians and spread of repetitions after a warm-up, on the device's own clock where it has one.

On a GPU short calls are captured in one CUDA graph that runs them over rotating buffers, so that operands come from
memory as they do in a model, and the host's launches are not what is measured. On a CPU the same functions time plain
loops, for trying a benchmark out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

ROTATED_BYTES = 160e6  # three times the L2 of an H100
COPIES = (4, 400)  # at least, at most


@dataclass(frozen=True)
class Timing:
    """Seconds of each repetition of one thing."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The shortest and the longest."""
        return min(self.seconds), max(self.seconds)

    def per(self, count: float) -> Timing:
        """The same for one of `count` equal parts."""
        return Timing(tuple(second / count for second in self.seconds))

    def row(self, name: str, scale: float) -> dict[str, Any]:
        """Median and spread under `name` and `name_spread`, in units of 1/scale seconds."""
        return {name: self.median * scale, f"{name}_spread": [second * scale for second in self.spread]}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stopwatch(device: torch.device) -> Callable[[], Callable[[], float]]:
    """A function that starts a measurement and returns the function that ends it, in seconds of the device's time."""

    def on_host() -> Callable[[], float]:
        start = time.perf_counter()
        return lambda: time.perf_counter() - start

    def on_device() -> Callable[[], float]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()

        def stop() -> float:
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3

        return stop

    return on_device if device.type == "cuda" else on_host


def repeated(call: Callable[[], Any], repeats: int, device: torch.device, warmup: int = 1) -> Timing:
    """Times `call` as it is launched."""
    start = stopwatch(device)
    for _ in range(warmup):
        call()
    synchronize(device)
    seconds = []
    for _ in range(repeats):
        stop = start()
        call()
        seconds.append(stop())
    return Timing(tuple(seconds))


def rotated(size: int, device: torch.device) -> int:
    """How many copies of operands of `size` bytes exceed the device's cache together."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) if device.type == "cuda" else 0
    fewest, most = COPIES
    return min(max(int(max(ROTATED_BYTES, 3 * cache) / max(size, 1)) + 1, fewest), most)


def replayed(call: Callable[[int], Any], copies: int, device: torch.device) -> Callable[[], Any]:
    """A function that runs `call` for each of 0 … copies-1: a replay on a GPU, a loop elsewhere."""
    if device.type != "cuda":
        return lambda: [call(i) for i in range(copies)]
    call(0)
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            call(i)
    return graph.replay


def graph_replays(call: Callable[[int], Any], copies: int, device: torch.device, replays: int = 12) -> Timing:
    """Times one call, over replays of a graph of `copies` calls; call(i) works on the i-th copy of its operands."""
    return repeated(replayed(call, copies, device), replays, device, warmup=2).per(copies)


def paired(long: Sequence[float], short: Sequence[float], difference: int) -> Timing:
    """Seconds of one step, from runs that differ by so many steps: what both have in common falls out."""
    return Timing(tuple((a - b) / difference for a, b in zip(long, short, strict=True)))
