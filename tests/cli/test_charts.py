"""Charts: every point where its numbers say, round ticks, names that need escaping, the front."""

from __future__ import annotations

import random
from xml.etree import ElementTree

import pytest

from fuseline.cli.charts import HEIGHT, WIDTH, Series, chart, decades, front, ticks

SVG = "{http://www.w3.org/2000/svg}"


def test_points_lie_where_their_numbers_say() -> None:
    line = [(0.3, 1.0), (0.7, 0.01), (0.5, 0.1)]
    drawn = chart("a < b", "bytes & more", "loss", [Series("<one>", line), Series("all", [(0.4, 0.2)], False, True)])
    root = ElementTree.fromstring(drawn)
    circles = {c[0].text: (float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{SVG}circle") if len(c)}
    assert set(circles) == {"<one>: 30.0%, 1", "<one>: 70.0%, 0.01", "<one>: 50.0%, 0.1", "all: 40.0%, 0.2"}
    (x0, y0), (x1, y1), (x2, y2) = (circles[f"<one>: {p}"] for p in ("30.0%, 1", "50.0%, 0.1", "70.0%, 0.01"))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x0 < x1
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2) and y0 < y1, "equal factors are equal steps down"
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in circles.values())
    words = {t.text for t in root.iter(f"{SVG}text")}
    assert {"a < b", "bytes & more", "loss", "<one>", "all", "40%", "0.1"} <= words


def test_equal_factors_are_equal_steps_along_powers_too() -> None:
    line = [(1.0, 2.0), (10.0, 20.0), (100.0, 2.0), (0.0, 5.0)]
    root = ElementTree.fromstring(chart("t", "x", "y", [Series("one", line)], powers=True))
    x0, x1, x2 = sorted(float(c.get("cx")) for c in root.iter(f"{SVG}circle") if len(c))  # none at 0
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x1 > x0
    assert {"1", "10", "100"} <= {t.text for t in root.iter(f"{SVG}text")}


def test_no_point_and_one_point() -> None:
    for series in ([], [Series("one", [(0.5, 0.2)])], [Series("none", []), Series("zero", [(0.5, 0.0)])]):
        ElementTree.fromstring(chart("t", "x", "y", series))


def test_the_front_is_what_nothing_beats() -> None:
    draw = random.Random(0)
    points = [(draw.random(), draw.random()) for _ in range(200)]
    found = front(points)
    beaten = lambda p: any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)
    assert sorted(found) == sorted(p for p in points if not beaten(p))


def test_ticks_are_round() -> None:
    assert ticks(0.3, 0.75) == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7])
    assert decades(0.015, 0.6) == pytest.approx([0.02, 0.05, 0.1, 0.2, 0.5])
    assert decades(1e-6, 1.0) == pytest.approx([10.0**p for p in range(-6, 1)])
