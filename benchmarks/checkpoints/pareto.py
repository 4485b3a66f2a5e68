"""The plot of a record of `checkpoint.py`: time against memory at one point, ours beside the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fuseline.cli.charts import Series, chart

from .points import OURS, POINTS


def family(candidate: str) -> str:
    """What a row's points are drawn as."""
    if candidate in OURS:
        return "ours, tiled" if "tiled" in candidate else "ours"
    return "PyTorch, its budgets" if candidate.startswith("torch") else candidate


def drawn(record: Mapping[str, Any], point: str) -> str:
    """The plot as SVG: GB at the peak, milliseconds of a step."""
    places: dict[str, list[tuple[float, float]]] = {}
    for row in record["rows"]:
        if row.get("point") == point and "peak_gb" in row and "step_ms" in row:
            places.setdefault(family(row["candidate"]), []).append((row["peak_gb"], row["step_ms"]))
    series = [Series(name, sorted(found), line=False) for name, found in sorted(places.items())]
    at, gpu = POINTS[point], record["environment"]["gpu"]
    return chart(f"A training step of {at.shape}, {at.length} tokens, {gpu}", "GB at the peak", "ms", series)
