"""Which of two functions is faster on a device: as the host launches them, and replayed from a CUDA graph.

A step that is captured costs what its kernels do; one that is launched kernel by kernel may be bound by the host.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

REPEATS = 7
SECONDS = 0.01  # that one repeat should take at least


@dataclass(frozen=True)
class Times:
    """Seconds of one call."""

    plain: float
    inductor: float
    plain_launched: float
    inductor_launched: float

    def microseconds(self) -> dict[str, float]:
        return {name: round(seconds * 1e6, 2) for name, seconds in asdict(self).items()}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.4g} us" for name, value in self.microseconds().items())


def both(plain: Callable[[], Any], inductor: Callable[[], Any], device: torch.device) -> Times:
    """Times of both in turns, medians; what cannot be captured is timed as launched."""
    launched = _in_turns(plain, inductor, device)
    if device.type != "cuda":
        return Times(*launched, *launched)
    with torch.cuda.device(device):
        calls = max(1, min(20, int(SECONDS / 2 / max(*launched, 1e-6))))
        try:
            replays = [_recorded(call, calls) for call in (plain, inductor)]
        except RuntimeError:
            return Times(*launched, *launched)
        first, second = _in_turns(replays[0].replay, replays[1].replay, device)
        return Times(first / calls, second / calls, *launched)


def _recorded(call: Callable[[], Any], calls: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(calls):
            call()
    return graph


def _in_turns(first: Callable[[], Any], second: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Medians of both, a repeat of one after a repeat of the other, so that a change of clocks meets both."""
    calls = (first, second)
    for call in calls:
        call()
    counts = [max(1, min(100, int(SECONDS / max(_seconds(call, 2, device) / 2, 1e-7)))) for call in calls]
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS):
        for call, count, seconds in zip(calls, counts, found, strict=True):
            seconds.append(_seconds(call, count, device) / count)
    return statistics.median(found[0]), statistics.median(found[1])


def _seconds(call: Callable[[], Any], count: int, device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(count):
            call()
        return time.perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3
