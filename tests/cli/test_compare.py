"""`fuseline compare`: exit codes, what is said of a fault, JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fuseline import Pass
from tests.helpers.models import registered

aten = torch.ops.aten


@dataclass(frozen=True)
class Doubled(Pass):
    """Doubles the second SiLU."""

    name = "doubled"

    def run(self, program, rewriter):
        silu = [n for n in program.graph.nodes if n.target is aten.silu.default][1]
        rewriter.rewrite(
            silu, [silu], lambda new: new(aten.mul.Tensor, new(aten.silu.default, *silu.args), 2.0), "twice"
        )


@pytest.fixture
def doubled() -> Iterator[None]:
    with registered(Doubled):
        yield


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dumped stage, which is loaded faster than a model is captured."""
    from fuseline.cli.graphs import load_program
    from fuseline.compiler.observe import Dump
    from fuseline.compiler.pipeline import Pipeline

    folder = tmp_path_factory.mktemp("dump")
    Pipeline("raise").run(load_program("demo:tiny-decoder"), [Dump(folder)])
    return folder / "000_captured.py"


def test_only_rounding_exits_with_0(
    cli: Callable, stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "found.json"
    monkeypatch.chdir(stage.parent)
    result = cli("compare", stage.name, "-p", "raise,fuse", "--worst", "2", "--json", str(file))
    assert result.code == 0, result.err
    assert "nothing diverges: only rounding" in result.out
    assert max(map(len, result.out.splitlines())) <= 80
    assert (
        result.out.rstrip()
        .splitlines()[-1]
        .lstrip()
        .removeprefix("next: ")
        .startswith("fuseline diff 000_captured.py -p")
    )
    data = json.loads(file.read_text())
    assert data["ok"] and data["first"] is None and [p["name"] for p in data["passes"]] == ["raise", "fuse"]
    shown = re.findall(r"^\d+ +raise/", result.out, re.MULTILINE)
    assert len(shown) == 2 < len(data["rewrites"])


def test_a_fault_exits_with_1_and_is_charged_to_its_rule(cli: Callable, stage: Path, doubled: None) -> None:
    result = cli("compare", str(stage), "-p", "doubled,raise,fuse", "--json", "-")
    assert result.code == 1
    data = json.loads(result.out)
    assert data["first"]["pass"] == "doubled" and data["first"]["location"].startswith(__file__)
    shown = " ".join(result.err.split())
    assert "first divergence: node 'mul_tensor' is off by 1.0e0, where rounding makes" in shown
    assert "because it computes something else: the difference stays in float64" in shown
    assert "rewrite #1 doubled/twice at layers.1/silu#0" in shown
    assert f"rule {__file__}:" in shown and "decoder.py:" in shown
    assert f"fuseline reduce {stage} -p" in shown


def test_an_edited_stage_is_shown_with_its_line(cli: Callable, stage: Path) -> None:
    edited = stage.with_name("009_edited.py")
    text = stage.read_text()
    edited.write_text(re.sub(r"(silu_1 = torch\.ops\.aten)\.silu\.", r"\1.relu.", text, count=1))
    line = next(i for i, row in enumerate(edited.read_text().splitlines(), 1) if row.lstrip().startswith("silu_1 = "))
    result = cli("compare", str(stage), str(edited))
    assert result.code == 1, result.err
    shown = " ".join(result.out.split())
    assert "first divergence: node 'silu_1' is off by" in shown
    assert re.search(r"was silu\(linear_\d+\) now relu\(linear_\d+\)", shown)
    assert f"edited {edited}:{line}" in shown
    assert "next: " in result.out and f"fuseline diff {stage} {edited}" in shown
    same = cli("compare", str(stage), str(stage))
    assert same.code == 0 and "nothing diverges" in same.out


@pytest.mark.parametrize("arguments", [(), ("other.py", "-p", "raise")])
def test_it_needs_a_second_program_or_a_pipeline(cli: Callable, arguments: tuple[str, ...]) -> None:
    result = cli("compare", "demo:tiny-decoder", *arguments)
    assert result.code == 2
    assert "a comparison needs a second program: OTHER, or -p PIPELINE, not both" in result.err
    assert "try: fuseline compare demo:tiny-llama -p raise,fuse" in result.err


@pytest.mark.slow
def test_lossy_passes_exit_with_0(cli: Callable) -> None:
    result = cli("compare", "demo:tiny-decoder", "-p", "quantize{weights=int8}", "--worst", "0")
    assert result.code == 0
    assert "nothing diverges: what lossy passes are there for, and rounding" in result.out
    assert re.search(r"quantize +lossy +14 ", result.out)
