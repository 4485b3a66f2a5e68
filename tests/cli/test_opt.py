"""`fuseline opt`: passes over models, files and stages, stopped and printed where asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fuseline.compiler.stage import load_stage
from fuseline.models import load, logits_of

TINY = "demo:tiny-decoder"


def test_a_stage_is_resumed_where_it_was_stopped(cli: Callable, tmp_path: Path) -> None:
    stopped, whole, resumed = (str(tmp_path / f"{name}.py") for name in ("stopped", "whole", "resumed"))
    first = cli("opt", TINY, "-p", "raise,fuse", "--stop-after", "raise:3", "-o", stopped, "--json", "-")
    assert first.code == 0, first.err
    assert [(p["name"], p["matched"]) for p in json.loads(first.out)["passes"]] == [("raise", 3)]
    assert cli("opt", stopped, "-p", "raise,fuse", "-o", resumed, "--verify").code == 0
    assert cli("opt", TINY, "-p", "raise,fuse", "-o", whole).code == 0
    targets = lambda path: [str(n.target) for n in load_stage(path).graph.nodes if n.op == "call_function"]
    assert sorted(targets(resumed)) == sorted(targets(whole)), "the rest of the rewrites happened"


@pytest.mark.slow
def test_a_stage_becomes_a_program_that_pytorch_loads(cli: Callable, tmp_path: Path) -> None:
    stage, program = str(tmp_path / "stage.py"), str(tmp_path / "program.pt2")
    assert cli("opt", TINY, "-p", "quantize{weights=int8}", "-o", stage).code == 0
    result = cli("opt", stage, "-p", "fuse", "-o", program)
    assert result.code == 0, result.err
    ids = torch.arange(9).unsqueeze(0)
    with torch.no_grad():
        found, expected = logits_of(load(program).model(ids)), logits_of(load(TINY).model(ids))
    assert 0 < (found - expected).abs().max() / expected.abs().max() < 0.05


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("which", "shown"),
    [("all", ["raise", "fuse", "raise{allow_empty}"]), ("changed", ["raise", "fuse"]), ("fuse", ["fuse"])],
)
def test_programs_are_printed_after_passes(cli: Callable, which: str, shown: list[str]) -> None:
    result = cli("opt", TINY, "-p", "raise,fuse,raise{allow_empty}", "--print-after", which, "--json", "-")
    titles = [line.split(": ")[0] for line in result.err.splitlines() if line.startswith("# after ")]
    assert titles == [f"# after {step}" for step in shown]
    assert "torch.ops.aten.embedding.default(" in result.err


@pytest.mark.slow
def test_a_dump_is_left_to_look_at(cli: Callable, tmp_path: Path) -> None:
    result = cli("opt", TINY, "-p", "raise,fuse", "--dump", str(tmp_path / "d"))
    assert result.code == 0 and f"fuseline view {tmp_path / 'd'}" in " ".join(result.out.split())
    assert [p.name for p in sorted((tmp_path / "d").glob("*.py"))] == ["000_captured.py", "001_raise.py", "002_fuse.py"]


def test_rules_are_counted_and_timed(cli: Callable) -> None:
    result = cli("opt", TINY, "--stats", "--json", "-")
    data = json.loads(result.out)
    rows = {(s["pass"], s["rule"]): s for s in data["statistics"]}
    for record in data["passes"]:
        mine = {rule: s["rewritten"] for (name, rule), s in rows.items() if name == record["name"] and s["rewritten"]}
        assert mine == record["rules"]
    assert rows["raise", "LayerNorm"]["tried"] > 0 == rows["raise", "LayerNorm"]["rewritten"]
    norm = rows["raise", "RMSNorm"]
    assert norm["tried"] >= norm["rewritten"] > 0 < norm["ms"] < data["passes"][0]["ms"]
    assert "tried" in result.err and "checks" in result.err
    assert "tried" not in cli("opt", TINY).out


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--stop-after", "raize"), "no pass 'raize' in the pipeline; did you mean 'raise'"),
        (("--stop-after", "raise:few"), "'few' is no number of rewrites\n  try: --stop-after raise:10"),
        (("--print-after", "everything"), "no pass 'everything' in the pipeline"),
        (("--verify=fully",), "unknown verification 'fully'; did you mean 'full'"),
        (("-o", "out.txt"), "'out.txt' ends in neither .pt2 nor .py\n  try: -o out.pt2"),
        (("-o", "no/such/out.py"), "no such folder: no/such"),
    ],
)
def test_slips_are_told(cli: Callable, arguments: tuple[str, ...], message: str) -> None:
    result = cli("opt", TINY, "-p", "raise,fuse", *arguments)
    assert result.code == 2 and message in result.err


def test_a_python_file_that_is_no_stage(cli: Callable, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print(1)")
    result = cli("opt", str(tmp_path / "train.py"))
    assert result.code == 2 and "is a Python file, and not a dumped stage" in result.err
    assert "no such file" in cli("opt", str(tmp_path / "absent.py")).err


@pytest.mark.slow
def test_a_stage_of_types_is_rewritten_without_figures(cli: Callable, tmp_path: Path) -> None:
    from fuseline.cli.graphs import load_program
    from fuseline.compiler.stage import render

    path = tmp_path / "types.py"
    path.write_text(render(load_program(TINY), "types only"))
    result = cli("opt", str(path), "-p", "raise", "-o", str(tmp_path / "out.py"), "--json", "-")
    assert result.code == 0, result.err
    assert json.loads(result.out)["passes"][0]["error"] is None
    assert "cannot be checked: this program has types" in cli("opt", str(path), "-p", "raise", "--verify").err
    assert "this stage has types only" in cli("opt", str(path), "-p", "raise", "-o", str(tmp_path / "x.pt2")).err


def test_rewrites_are_proved(cli: Callable, tmp_path: Path) -> None:
    result = cli("opt", TINY, "-p", "raise,rotate{r1,r2,r3,r4}", "--prove", "--json", str(tmp_path / "proof.json"))
    assert result.code == 0, result.err
    assert "43 of 43 statements are proved" in result.out and max(map(len, result.out.splitlines()[:-1])) <= 80
    assert "x1·W1ᵀ·H128 = x1·H384·H384·W1ᵀ·H128" in result.out and "max|R·Rᵀ − 1|: H128 " in result.out
    proof = json.loads((tmp_path / "proof.json").read_text())["proof"]
    assert proof["complete"] and sum(s["count"] for s in proof["statements"]) == proof["proved"] == 43
    assert all(s["error"] < proof["bound"] for s in proof["statements"])


def test_a_wrong_rewrite_is_not_proved(cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fuseline.compiler.expressions import Cast
    from fuseline.passes.rotation.rotations import Rotation

    monkeypatch.setattr(Rotation, "fold", lambda self, weight, value, dim, scale=None: Cast(weight, value.dtype))
    given, stage = ("opt", TINY, "-p", "raise,rotate{r4}", "--prove"), tmp_path / "stage.py"
    result = cli(*given, "--json", str(tmp_path / "proof.json"), "-o", str(stage))
    assert result.code == 1 and "error: 2 of 2 statements are not proved" in result.err
    assert "R4 online: not proved" in result.err and "left: " in result.err
    proof = json.loads((tmp_path / "proof.json").read_text())["proof"]
    assert (proof["count"], proof["proved"]) == (2, 0) and not stage.exists(), "nothing is written but the proof"


@pytest.mark.slow
def test_a_pipeline_that_states_nothing_is_not_proved(cli: Callable) -> None:
    result = cli("opt", TINY, "-p", "raise,fuse", "--prove")
    assert result.code == 2 and "there is nothing to prove" in result.err and "rotate{r1,r2,r4}" in result.err
    result = cli("opt", TINY, "-p", "raise,rotate{r4,block=5,allow_empty}", "--prove")
    assert result.code == 2 and "made no rewrite that could be proved" in result.err
