"""`fuseline passes`, `opt` and `kernels`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fuseline.models import load, logits_of


def test_passes_lists_what_is_registered(cli: Callable) -> None:
    from fuseline.compiler import registry

    result = cli("passes", "--json", "-")
    pages = json.loads(result.out)["passes"]
    assert [p["name"] for p in pages] == sorted(registry.available())
    assert max(map(len, result.err.splitlines())) <= 80
    for page in pages:
        assert page["summary"] and page["page"], f"pass '{page['name']}' has no documentation"
        assert page["name"] in result.err


def test_a_pass_page_has_its_options(cli: Callable) -> None:
    result = cli("passes", "quantize", "--json", "-")
    page = json.loads(result.out)
    weights = next(o for o in page["options"] if o["name"] == "weights")
    assert weights["default"] is None and "str" in weights["type"]
    assert page["options"][-1]["name"] == "allow_empty"
    assert "Before" in result.err and "weights" in result.err


def test_passes_lists_the_recipes(cli: Callable) -> None:
    from fuseline.compiler.recipes import recipes

    listed = cli("passes", "--json", "-")
    assert [r["name"] for r in json.loads(listed.out)["recipes"]] == list(recipes())
    assert "w4a4kv4-rotated" in listed.err and max(map(len, listed.err.splitlines())) <= 80
    one = cli("passes", "w4a16", "--json", "-")
    assert json.loads(one.out)["recipe"]["pipeline"] == recipes()["w4a16"].pipeline
    assert "quantize{weights=int4:g64" in one.err


@pytest.mark.parametrize("model", ["demo:tiny-decoder", pytest.param("demo:tiny-llama", marks=pytest.mark.slow)])
def test_opt_writes_a_program_that_computes_the_same(cli: Callable, tmp_path: Path, model: str) -> None:
    out = tmp_path / "out.pt2"
    result = cli("opt", model, "-p", "quantize{weights=int8}", "-o", str(out), "--json", "-")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert data["path"] == str(out) and data["passes"][0]["matched"] == 14
    assert [p.name for p in tmp_path.glob("*.pt2")] == ["out.pt2"], "no partial file is left"
    original, written = load(model), load(str(out))
    for length in (64, 9):  # the size at capture, and another: the sequence stays symbolic
        ids = torch.arange(length).unsqueeze(0)
        with torch.no_grad():
            expected = logits_of(original.model(ids, **original.example_kwargs))
            found = logits_of(written.model(ids))
        error = (found - expected).abs().max() / expected.abs().max()
        assert 0 < error < 0.05
    again = cli("run", str(out), "-p", "quantize{weights=int4:g64,only=*,allow_empty}", "--json", "-")
    assert again.code == 0, again.err
    assert json.loads(again.out)["passes"][0]["nodes_before"] > 0


def test_kernels_shows_sources(cli: Callable, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    result = cli("kernels", "demo:tiny-decoder", "-p", "fuse", "-o", str(tmp_path / "module"), "--json", "-")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert data["kernels"] and max(map(len, result.err.splitlines()[:-1])) <= 80
    for kernel in data["kernels"]:
        assert kernel["count"] >= 1 and set(kernel["targets"].values()) == {"ok"}
    assert any("decoder.py:" in line for kernel in data["kernels"] for line in kernel["lines"])
    assert Path(data["path"]).is_file() and Path(data["path"]).with_suffix(".json").is_file()
    name = data["kernels"][0]["name"]
    shown = cli("kernels", "demo:tiny-decoder", "-p", "fuse", "--show", name)
    assert "@triton.jit" in shown.out and f"def {name}(" in shown.out
    wrong = cli("kernels", "demo:tiny-decoder", "-p", "fuse", "--show", name + "x")
    assert wrong.code == 2 and f"did you mean '{name}'" in wrong.err
