"""The points of `checkpoint.py`, a shape and a length each, and what is measured at them."""

from __future__ import annotations

from dataclasses import dataclass

SHARES = (0.15, 0.25, 0.35, 0.45, 0.5, 0.65, 0.8)
TILED = "raise{allow_empty},tile{tiles=8},"
OURS = {
    "ours long-context": "checkpoint{policy=long-context",
    "ours full": "checkpoint{policy=full",
    "ours min-cut": "checkpoint{policy=min-cut",
    **{f"ours {share}": f"checkpoint{{policy=budget,memory={share}" for share in SHARES},
    "ours long-context, host": "checkpoint{policy=long-context,offload=cpu",
    "ours tiled long-context": TILED + "checkpoint{policy=long-context",
    "ours tiled full": TILED + "checkpoint{policy=full",
    "ours tiled full, host": TILED + "checkpoint{policy=full,offload=cpu",
}
THEIRS = ("torch", *(f"torch budget {b / 10}" for b in (1, 2, 3, 5, 7, 9)), "full-block eager", "full-block compiled",
          "AutoSP's rule")  # fmt: skip
CANDIDATES = (*OURS, *THEIRS)
LONGEST = ("full-block compiled", "ours full", "ours tiled long-context", "ours tiled full", "ours tiled full, host")


@dataclass(frozen=True)
class Point:
    """name; shape: of fuseline.models.shapes; length: tokens; layers: fewer than the shape's, if the default does not
    fit at that length; repeats: steps that are timed."""

    name: str
    shape: str
    length: int
    layers: int = 0
    repeats: int = 3


POINTS = {
    point.name: point
    for point in (
        Point("1b-8k", "llama-3.2-1b", 8192, repeats=7),
        Point("1b-32k", "llama-3.2-1b", 32768),
        Point("1b-64k", "llama-3.2-1b", 65536),
        Point("8b-8k", "llama-3.1-8b", 8192),
        Point("8b-32k", "llama-3.1-8b", 32768, layers=16),
    )
}


def rows(points: list[str], candidates: list[str]) -> dict[str, tuple[Point, str]]:
    """Row's name → its point and candidate."""
    return {f"{point} {candidate}": (POINTS[point], candidate) for point in points for candidate in candidates}
