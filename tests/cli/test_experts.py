"""`fuseline experts`: a table of how experts are used, the same as data and as a drawing, and mistakes."""

from __future__ import annotations

import json
import xml.etree.ElementTree
from pathlib import Path

import pytest

TEXT = ("--windows", "2", "--length", "64", "--batch", "2")


def test_experts_of_the_demo(cli, tmp_path: Path) -> None:
    out, drawing = tmp_path / "experts.json", tmp_path / "experts.svg"
    result = cli("experts", "demo:tiny-moe", *TEXT, "--json", str(out), "--plot", str(drawing))
    assert result.code == 0, result.err
    assert max(map(len, result.out.splitlines())) <= 80
    assert result.out.count("8 pairs, 0 alone") == 3
    layers = json.loads(out.read_text())["layers"]
    assert len(layers) == 3
    for layer in layers:
        assert (layer["experts"], layer["chosen"], sum(layer["tokens"])) == (16, 2, 2 * 2 * 64)
        assert sum(layer["frequency"]) == pytest.approx(1)
        assert all(layer["likeness"][e][e] == pytest.approx(1) for e in range(16))
        assert len(layer["merge"]["pairs"]) == 8
    root = xml.etree.ElementTree.parse(drawing).getroot()
    assert len(root.findall("{*}rect")) == 1 + 3 * (16 + 16 * 16)


def test_another_merge(cli) -> None:
    result = cli("experts", "demo:tiny-moe", "-p", "raise,merge-experts{method=reap,ratio=0.25}", *TEXT)
    assert result.code == 0 and result.out.count("12 experts, 0 of them merged") == 3


@pytest.mark.parametrize(
    "words, told",
    [
        (("demo:tiny-decoder",), "has no layer of routed experts"),
        (("demo:tiny-moe", "-p", "raise"), "does not end with merge-experts"),
        (("demo:tiny-moe", "--plot", "experts.png"), "plots are written as SVG"),
    ],
)
def test_mistakes(cli, words: tuple[str, ...], told: str) -> None:
    result = cli("experts", *words, *TEXT)
    assert result.code == 2 and told in result.err
