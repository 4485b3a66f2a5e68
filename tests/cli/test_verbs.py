"""`fuseline passes`, `opt` and `kernels`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fuseline.models import load, logits_of

ROOT = Path(__file__).resolve().parents[2]


def own_passes() -> list:
    from fuseline.compiler import registry

    return [kind for kind in registry.available().values() if kind.__module__.startswith("fuseline.")]


@pytest.mark.slow
@pytest.mark.parametrize("name", [k.name for k in own_passes()])
def test_what_a_page_says_to_try_runs(cli: Callable, name: str) -> None:
    """In small, as the commands of the documentation; those that are no command of ours have tests of their own."""
    from fuseline.cli.passes import describe
    from fuseline.compiler import registry

    for command in describe(registry.find(name))["trials"]:
        program, *arguments = shlex.split(command.replace("demo:smollm2", "demo:tiny-llama"))
        if program == "fuseline":
            result = cli(*arguments, *(["--windows", "1"] if arguments[0] == "run" else []))
            assert result.code == (1 if arguments[0] == "diff" else 0), result.err  # 1: they differ
        else:
            assert any((ROOT / word).is_file() for word in arguments), command


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


def test_every_option_says_what_it_is(cli: Callable) -> None:
    pages = json.loads(cli("passes", "--json", "-").out)["passes"]
    own = [p for p in pages if p["name"] in {k.name for k in own_passes()}]
    assert not [f"{p['name']}.{o['name']}" for p in own for o in p["options"] if not o["help"]]
    policy = cli("passes", "checkpoint").out
    assert "what is kept: long-context, min-cut, budget, full, none" in " ".join(policy.split())
    assert max(map(len, cli("passes", "quantize").out.partition("tier lossy")[2].splitlines())) <= 80


def test_an_option_is_described_by_the_comment_behind_it() -> None:
    from dataclasses import dataclass

    from fuseline.compiler.option_help import comments

    @dataclass(frozen=True)
    class Base:
        one: int = 1  # from the base

    @dataclass(frozen=True)
    class Derived(Base):
        two: tuple[str, ...] = ()  # over lines: it's one
        three: str = "# no comment"

    helps = comments(Derived)
    assert (helps["one"], helps["two"], helps["three"]) == ("from the base", "over lines: it's one", "")
    assert comments(type("Made", (), {"__annotations__": {"x": int}})) == {}


def test_passes_lists_the_recipes(cli: Callable) -> None:
    from fuseline.compiler.recipes import recipes

    listed = cli("passes", "--json", "-")
    assert [r["name"] for r in json.loads(listed.out)["recipes"]] == list(recipes())
    assert "w4a4kv4-rotated" in listed.err and max(map(len, listed.err.splitlines())) <= 80
    one = cli("passes", "w4a16", "--json", "-")
    assert json.loads(one.out)["recipe"]["pipeline"] == recipes()["w4a16"].pipeline
    assert "quantize{weights=int4:g64" in one.err


@pytest.mark.slow
@pytest.mark.parametrize("model", ["demo:tiny-decoder", "demo:tiny-llama"])
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


@pytest.mark.slow
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
