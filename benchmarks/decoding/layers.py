"""Shortened models: what a row is called then, and what the whole model would take."""

from __future__ import annotations

from typing import Any


def label(point: str | None, candidate: str, layers: int | None, total: int) -> str:
    """A row's name: `8b-1k fuseline-bf16`, `8b-b16 fuseline-bf16, 8 of 32 layers`; no point where it is None."""
    if point is None:
        return candidate if layers in (None, total) else f"{candidate}, {layers} of {total} layers"
    return f"{point} {label(None, candidate, layers, total)}"


def extrapolated(
    rows: list[dict[str, Any]], point: str | None, names: list[str], counts: list[int], total: int
) -> None:
    """Writes what a layer adds into the rows of the longer model, and what all layers would take by that.

    All layers are alike, so time and bytes are a line in their number: two points give embedding, head and layer apart.
    """
    found = {row["name"]: row for row in rows if "failed" not in row and "ms" in row}
    few, many = counts
    for name in names:
        short, long = (found.get(label(point, name, count, total)) for count in counts)
        if short is None or long is None:
            continue
        each = {key: (long[key] - short[key]) / (many - few) for key in ("ms", "floor_ms")}
        long["layer_ms"] = each["ms"]
        if many == total:
            continue
        long |= {f"full_{key}": long[key] + (total - many) * more for key, more in each.items()}
        long["full_to_floor"] = long["full_ms"] / long["full_floor_ms"]
        long["extrapolated"] = f"full_ms: {total} layers, from {few} and {many} that were measured"
