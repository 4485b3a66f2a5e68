"""Lines and points over two axes, as SVG: what is paid against what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 380, 64, 40, 176, 48
COLOURS = ("#1f4e8c", "#c0392b", "#2e7d32", "#8e5ea2", "#b8860b", "#00838f", "#6d4c41")


@dataclass(frozen=True)
class Series:
    """points: (x, y), y above 0; line: whether they are joined, in the order of x; faint: drawn behind, without a name
    of their own on the right."""

    name: str
    points: Sequence[tuple[float, float]]
    line: bool = True
    faint: bool = False


def chart(title: str, across: str, up: str, series: Sequence[Series], powers: bool = False) -> str:
    """An SVG: x in per cent, or with `powers` on a logarithmic scale as y is; the names of the series on the right."""
    scaled = math.log10 if powers else float
    able = [
        Series(s.name, sorted(p for p in s.points if p[1] > 0 and (p[0] > 0 or not powers)), s.line, s.faint)
        for s in series
    ]
    points = [point for one in able for point in one.points]
    xs, ys = [scaled(x) for x, _ in points] or [0.0, 1.0], [math.log10(y) for _, y in points] or [0.0]
    low, high = min(xs), max(xs)
    low, high = (low, high) if high > low else (low - 0.05, high + 0.05)
    least, most = min(ys) - 0.05, max(ys) + 0.05
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    x_of = lambda x: LEFT + wide * (scaled(x) - low) / (high - low)
    said = (lambda x: f"{x:.3g}") if powers else (lambda x: f"{100 * x:.3g}%")
    y_of = lambda y: TOP + tall * (most - math.log10(y)) / (most - least)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="13">{escape(title)}</text>',
        f'<text x="{LEFT + wide / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">{escape(across)}</text>',
        f'<text x="{LEFT - 48}" y="{TOP - 6}">{escape(up)}</text>',
    ]
    for x in decades(10**low, 10**high) if powers else ticks(low, high):
        parts.append(f'<path d="M{x_of(x):.1f},{TOP} v{tall}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{x_of(x):.1f}" y="{TOP + tall + 16}" text-anchor="middle">{said(x)}</text>')
    for y in decades(10**least, 10**most):
        parts.append(f'<path d="M{LEFT},{y_of(y):.1f} h{wide}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y_of(y) + 4:.1f}" text-anchor="end">{y:.3g}</text>')
    named = 0
    for number, one in enumerate(sorted(able, key=lambda s: not s.faint)):
        colour = "#bbbbbb" if one.faint else COLOURS[number % len(COLOURS)]
        places = [(x_of(x), y_of(y), x, y) for x, y in one.points]
        if one.line and len(places) > 1:
            path = " L".join(f"{x:.1f},{y:.1f}" for x, y, *_ in places)
            parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for u, v, x, y in places:
            told = f"<title>{escape(one.name)}: {f'{x:.4g}' if powers else f'{x:.1%}'}, {y:.4g}</title>"
            parts.append(
                f'<circle cx="{u:.1f}" cy="{v:.1f}" r="{2 if one.faint else 3}" fill="{colour}">{told}</circle>'
            )
        if one.points:
            row = TOP + 10 + 18 * named
            named += 1
            parts.append(f'<circle cx="{WIDTH - RIGHT + 16}" cy="{row - 4}" r="4" fill="{colour}"/>')
            parts.append(f'<text x="{WIDTH - RIGHT + 26}" y="{row}">{escape(one.name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both: of less x, or the same, and less y (Pareto)."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not found or y < found[-1][1]:
            found.append((x, y))
    return found


def ticks(low: float, high: float) -> list[float]:
    """Some five round numbers between two."""
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(s - rough))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each power of ten between two numbers above 0; only powers where there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) < 5 else (1,)
    return [m * 10.0**p for p in powers for m in steps if low <= m * 10.0**p <= high]
