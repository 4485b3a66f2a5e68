"""A drawing of a mixture's layers: how often each expert is chosen, and how alike all pairs are."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

SIDE, GAP, BAR = 160, 28, 60


def draw(title: str, layers: list[dict[str, Any]]) -> str:
    """An SVG: a column a layer, bars of frequency above a map of cosines, four layers a row."""
    across = min(4, max(1, len(layers)))
    down = -(-len(layers) // across)
    width, height = across * (SIDE + GAP) + GAP, down * (SIDE + BAR + 3 * GAP) + 2 * GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{GAP}" y="20" font-size="13">{escape(title)}: share of choices by expert; cosine of outputs</text>',
    ]
    for number, layer in enumerate(layers):
        x = GAP + number % across * (SIDE + GAP)
        y = 2 * GAP + number // across * (SIDE + BAR + 3 * GAP)
        parts += _layer(layer, x, y)
    return "\n".join([*parts, "</svg>", ""])


def _layer(layer: dict[str, Any], x: float, y: float) -> list[str]:
    count, frequency = layer["experts"], layer["frequency"]
    step, top = SIDE / count, max(frequency) or 1.0
    name = ".".join(layer["path"].split(".")[-3:])
    parts = [f'<text x="{x}" y="{y}">{escape(name)}, most {top:.1%}</text>']
    for e, share in enumerate(frequency):
        size = BAR * share / top
        title = f"<title>expert {e}: {share:.2%} of choices</title>"
        parts.append(_rect(x + e * step, y + GAP / 4 + BAR - size, step * 0.9, size, "#3b6ea5", title))
    below = y + BAR + GAP / 2
    for i, row in enumerate(layer["likeness"]):
        for j, cosine in enumerate(row):
            title = f"<title>experts {i} and {j}: {cosine:.3f}</title>"
            parts.append(_rect(x + j * step, below + i * step, step, step, _colour(cosine), title))
    return parts


def _rect(x: float, y: float, width: float, height: float, fill: str, inside: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height:.2f}" fill="{fill}">{inside}</rect>'


def _colour(cosine: float) -> str:
    """White at 0, blue at 1, red at −1."""
    c = max(-1.0, min(1.0, cosine))
    faded = [round(255 - abs(c) * (255 - part)) for part in ((31, 78, 140) if c >= 0 else (178, 34, 34))]
    return "#" + "".join(f"{part:02x}" for part in faded)
