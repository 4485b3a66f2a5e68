"""`fuseline diff`: what is printed, as data and as a page, and its exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


def test_a_model_is_the_same_as_itself(cli: Callable) -> None:
    result = cli("diff", "demo:tiny-decoder", "demo:tiny-decoder")
    assert result.code == 0, result.err
    assert result.out.startswith("the same program: ")


def test_before_and_after_a_pipeline(cli: Callable, tmp_path: Path) -> None:
    html, data = tmp_path / "diff.html", tmp_path / "diff.json"
    arguments = ("demo:tiny-decoder", "-p", "quantize{weights=int8}", "--html", str(html), "--json", str(data))
    result = cli("diff", *arguments, "--context", "1")
    assert result.code == 1, result.err
    lines = result.out.splitlines()
    assert lines[:2] == ["--- demo:tiny-decoder", "+++ demo:tiny-decoder after quantize{weights=int8}"]
    assert any(line.startswith("+ dequantize") and "by quantize/linear" in line for line in lines)
    assert any(line.startswith("@@ ") and "decoder.py:" in line for line in lines)
    assert lines[-1].startswith("next: fuseline diff") or lines[-1].startswith("  fuseline diff")
    assert "\x1b[" not in result.out, "no colour in a pipe"
    record = json.loads(data.read_text())
    assert record["same"] is False and record["counts"]["replaced"] == 14
    assert record["html"] == str(html) and html.read_text().startswith("<!doctype html>")
    assert "layers.1.down" in {c["module"] for c in record["changes"]}
    assert all(c["line"] for c in record["changes"])


def test_counts_alone(cli: Callable) -> None:
    result = cli("diff", "demo:tiny-decoder", "-p", "quantize{weights=int8}", "--stat")
    assert result.code == 1
    assert "fuseline.dequantize" in result.out and not any(line.startswith("+ ") for line in result.out.splitlines())
    assert max(map(len, result.out.splitlines()[:-1])) <= 80


def test_what_only_moved(cli: Callable) -> None:
    result = cli("diff", "demo:tiny-decoder", "-p", "fuse", "--provenance")
    assert result.code == 1 and "regions added: " in result.out
    assert "made by: - → fuse/" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo:tiny-decoder",), "a comparison needs a second program"),
        (("demo:tiny-decoder", "demo:tiny-decoder", "-p", "raise"), "a comparison needs a second program"),
        (("demo:tiny-decodr", "demo:tiny-decoder"), "did you mean 'tiny-decoder'"),
        (("demo:tiny-decoder", "-p", "rais"), "did you mean 'raise'"),
        (("demo:tiny-decoder", "-p", "raise", "--html", "/nowhere/at/all.html"), "no such folder"),
    ],
)
def test_mistakes(cli: Callable, arguments: tuple[str, ...], message: str) -> None:
    result = cli("diff", *arguments)
    assert result.code == 2 and message in result.err


def test_dumped_stages(cli: Callable, tmp_path: Path) -> None:
    assert cli("run", "demo:tiny-decoder", "-p", "raise", "--dump", str(tmp_path / "out"), "--windows", "1").code == 0
    first, second = sorted((tmp_path / "out").glob("0*.py"))
    same = cli("diff", "demo:tiny-decoder", str(first))
    assert same.code == 0, same.out + same.err
    result = cli("diff", str(first), str(second), "--json", "-")
    assert result.code == 1, result.err
    assert json.loads(result.out)["counts"]["replaced"] > 0
