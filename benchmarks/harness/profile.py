"""Kernels that really ran on the GPU, from the profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def launched(function: Callable[[], Any]) -> dict[str, dict[str, float]]:
    """Each kernel's count and microseconds in total while `function` ran; empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    found: dict[str, dict[str, float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            entry = found.setdefault(event.name, {"count": 0, "us": 0.0})
            entry["count"] += 1
            entry["us"] += event.time_range.elapsed_us()
    return dict(sorted(found.items(), key=lambda item: -item[1]["us"]))
