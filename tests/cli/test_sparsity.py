"""`fuseline sparsity`: a table of what products read, the same as data, and what it says to mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

TEXT = ("--windows", "4", "--length", "64", "--batch", "2")


def test_thresholds_and_what_they_keep(cli, tmp_path: Path) -> None:
    out = tmp_path / "sparsity.json"
    result = cli("sparsity", "demo:tiny-llama", "--keep", "0.5", "--keep", "0.2", *TEXT, "--json", str(out))
    assert result.code == 0, result.err
    assert re.findall(r"^([\w+]+) +2 +", result.out, re.MULTILINE) == ["q+k+v", "o", "gate+up", "down"]
    assert "keep 50%" in result.out
    assert max(map(len, result.out.splitlines())) <= 80
    data = json.loads(out.read_text())
    assert len(data["groups"]) == 8 and data["groups"][0]["rows"] == 4 * 64
    for group in data["groups"]:
        half, fifth = group["energy"]
        assert 0.5 < fifth < half < 1  # the kept channels are the large ones
        assert group["thresholds"][0] < group["thresholds"][1] < group["histogram_end"] * 2
        assert sum(group["histogram"]) == pytest.approx(1, abs=1e-3)
        assert group["quantiles"] == sorted(group["quantiles"])
    assert "only=lm_head" in data["left_out"]["lm_head/linear#0"]


@pytest.mark.slow
def test_every_group_and_rotations(cli) -> None:
    result = cli("sparsity", "demo:tiny-llama", "-p", "raise,rotate{r4}", "--all", *TEXT)
    assert result.code == 0, result.err
    assert "layers.1 q+k+v" in result.out and "layers.1 down" not in result.out
    assert "2 x left out: its input is rotated at run time" in result.out


def test_budgets_and_their_front(cli, tmp_path: Path) -> None:
    plot, out = tmp_path / "front.svg", tmp_path / "sparsity.json"
    text = ("--windows", "6", "--length", "48", "--batch", "1")
    budgets = ("--budget", "0.7", "--budget", "0.4", "--trials", "7")
    result = cli("sparsity", "demo:tiny-llama", *text, *budgets, "--plot", str(plot), "--json", str(out))
    assert result.code == 0, result.err
    assert max(map(len, result.out.splitlines())) <= 80
    assert re.search(r"^budget +sensitivity +again +uniform +channels alone +searched +kept", result.out, re.MULTILINE)
    found = json.loads(out.read_text())["budgets"]
    assert [one["budget"] for one in found] == [0.7, 0.4]
    for one in found:
        assert len(one["losses"]) == 7 and one["held_out"]["calls"] == 4
        assert one["held_out"]["kept"] in ("sensitivity", "searched")
    drawn = plot.read_text()
    for loss in found[1]["losses"]:
        assert f"<title>candidates: {found[1]['read']:.1%}, {loss:.4g}</title>" in drawn
    assert f"<title>front: {found[0]['read']:.1%}, {min(found[0]['losses']):.4g}</title>" in drawn


@pytest.mark.parametrize(
    "words, told",
    [
        (("--keep", "1.5"), "above 0 and below 1"),
        (("--score", "size"), "compared by abs or norm-weighted"),
        (("--budget", "1.5"), "lies above 0, and is 1 at most"),
        (("--plot", "front.png", "--budget", "0.5"), "plots are written as SVG"),
        (("--plot", "front.svg"), "--plot draws the costs of budgets, and none is given"),
        (("--windows", "3", "--batch", "2"), "no whole number of calls"),
    ],
)
def test_mistakes(cli, words: tuple[str, ...], told: str) -> None:
    result = cli("sparsity", "demo:tiny-llama", *words)
    assert result.code == 2 and told in result.err
