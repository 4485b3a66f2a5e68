"""`fuseline reduce`: a failing pipeline comes down to a small reproducer, by a check or by a command."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fuseline
from fuseline import Program
from fuseline.compiler.debug.extract import calls
from fuseline.compiler.debug.reproducer import load_reproducer
from fuseline.compiler.stage import Recipe, load_stage, read_table, render
from tests.helpers import faulty  # noqa: F401  its passes register themselves
from tests.helpers.models import Mlp

aten = torch.ops.aten


@pytest.fixture
def mlp() -> Program:
    torch.manual_seed(0)
    model = torch.nn.Sequential(Mlp(), Mlp())
    return fuseline.capture(model, (torch.randn(4, 8),), dynamic=({0: torch.export.Dim.AUTO},))


@pytest.fixture
def stage(mlp: Program, tmp_path: Path) -> Path:
    path = tmp_path / "stage.py"
    path.write_text(render(mlp, "two MLPs", Recipe("embedded"), path.name))
    return path


def targets(program: Program) -> list[object]:
    return [n.target for n in calls(program)]


def test_a_check_says_what_is_interesting(cli: Callable, stage: Path, tmp_path: Path) -> None:
    out, answer = tmp_path / "small.py", tmp_path / "answer.json"
    result = cli("reduce", str(stage), "-p", "wrong-scale,fuse", "-o", str(out), "--json", str(answer))
    assert result.code == 0, result.err
    read = load_reproducer(out)
    assert targets(read.program) == [aten.silu.default] and str(read.pipeline) == "wrong-scale"
    assert (read.scope, read.values, read.check) == ("reduced", "random", "error")
    assert "rule: wrong-scale/OffByAPercent  " in result.out and "torch.ops.aten.silu.default(" in result.out
    assert "it fails alike in a fresh process" in result.out.replace("\n", " ")
    assert "fuseline repro" in result.out.rstrip().splitlines()[-1]
    data = json.loads(answer.read_text())
    assert data["before"] == {"nodes": 24, "inputs": 1, "weights": 12, "passes": 2}
    assert data["after"] == {"nodes": 1, "inputs": 1, "weights": 0, "passes": 1}
    assert data["culprit"]["rule"] == "OffByAPercent" and data["complete"] and data["checks"] > 3
    assert cli("repro", str(out), "--here").code == 1


def test_a_command_says_what_is_interesting(cli: Callable, stage: Path, tmp_path: Path) -> None:
    """Its exit code has to stay what it was: here, that of a search for two ops."""
    script, out = tmp_path / "interesting.sh", tmp_path / "small.py"
    script.write_text('grep -q "aten.silu.default(" "$2" && grep -q "aten.rsqrt.default(" "$2"; exit $((3 + $?))\n')
    result = cli("reduce", str(stage), "-o", str(out), "--", "sh", str(script), "--file", "{}")
    assert result.code == 0, result.err
    assert sorted(map(str, targets(load_stage(out)))) == ["aten.rsqrt.default", "aten.silu.default"]
    assert "ends with 3" in result.out
    assert result.out.rstrip().endswith(f"sh {script} --file {out}")


def test_a_command_s_output_has_to_match(cli: Callable, stage: Path, tmp_path: Path) -> None:
    out, command = tmp_path / "small.py", ("grep", "-c", "linear.default(")
    result = cli("reduce", str(stage), "-o", str(out), "--match", "^[4-6]$", "--most", "200", "--", *command)
    assert result.code == 0, result.err
    assert targets(load_stage(out)).count(aten.linear.default) == 4
    result = cli("reduce", str(stage), "-o", str(tmp_path / "other.py"), "--match", "^9$", "--", *command)
    assert result.code == 2 and "the command's output does not match '^9$'" in result.err


def test_the_pipeline_is_reduced_for_a_command(cli: Callable, stage: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.py"
    command = ("grep", "-q", "'pipeline': '.*wrong-scale")
    result = cli("reduce", str(stage), "-p", "fuse,wrong-scale{at=7},fuse", "-o", str(out), "--", *command)
    assert result.code == 0, result.err
    read = load_reproducer(out)
    assert str(read.pipeline) == "wrong-scale" and len(calls(read.program)) == 1


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "out.py"], "is no reproducer, and there is no pipeline\n  try: fuseline reduce"),
        (["-p", "fuse", "-o", "out.py"], "nothing to reduce: nothing is wrong with fuse here"),
        (["-p", "fuse", "-o", "out"], "'out' does not end in .py"),
        (["-p", "fuse", "-o", __file__], "exists, and is no reproducer"),
        (["-p", "fuse", "-o", "out.py", "--match", "x"], "--match is for the output of a command"),
        (["-p", "fuse", "-o", "out.py", "--check", "any", "--", "true"], "either a command says"),
        (["-p", "fuse", "-o", "out.py", "--match", "(", "--", "true"], "'(' is no pattern"),
        (["-p", "fuse", "-o", "out.py", "--", "no-such-command"], "'no-such-command' cannot be run"),
        (["-p", "quantize{weights=int8}", "-o", "out.py"], "how large an error is one too many has to be said"),
    ],
)
def test_mistakes(cli: Callable, stage: Path, tmp_path: Path, monkeypatch, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("reduce", str(stage), *arguments)
    assert result.code == 2 and message in result.err, result.err
    assert not (tmp_path / "out.py").exists()


@pytest.mark.slow
def test_a_reproducer_brings_its_own_check(cli: Callable, stage: Path, tmp_path: Path) -> None:
    made, out = tmp_path / "made.py", tmp_path / "small.py"
    assert cli("repro", str(stage), "-p", "wrong-scale,crash-at-add,fuse", "-o", str(made)).code == 0
    assert cli("reduce", str(made), "-o", str(out)).code == 0
    read = load_reproducer(out)
    assert read.verdict.message.startswith("pass 'crash-at-add' failed") and len(calls(read.program)) == 2
    text = made.read_text().replace("no such sum", "no such product")
    made.write_text(text)
    result = cli("reduce", str(made), "-o", str(tmp_path / "other.py"))
    assert result.code == 2 and "it does not fail as it did" in result.err


@pytest.mark.slow
def test_repro_as_the_command(cli: Callable, stage: Path, tmp_path: Path) -> None:
    import sys

    made, out = tmp_path / "made.py", tmp_path / "small.py"
    assert cli("repro", str(stage), "-p", "crash-at-add", "-o", str(made)).code == 0
    command = (sys.executable, "-m", "fuseline", "repro", "{}", "--here", "--quiet")
    result = cli("reduce", str(made), "-o", str(out), "--most", "8", "--", *command)
    assert result.code == 0, result.err
    read = load_reproducer(out)
    assert len(calls(read.program)) < 24 and read.verdict.kind == "crash"
    assert cli("repro", str(out), "--here").code == 1


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="it compiles kernels")
def test_a_kernel_that_does_not_compile(cli: Callable, stage: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.py"
    result = cli("reduce", str(stage), "-p", "wrong-kernel,fuse", "--check", "lower", "-o", str(out))
    assert result.code == 0, result.err
    read = load_reproducer(out)
    # What the first pass made is in the program now, and with it the op that this pass's module defines.
    assert len(calls(read.program)) == 2 and str(read.pipeline) == "fuse"
    assert read_table(out)["ops"] == {"faulty_silu": "tests.helpers.faulty"}


@pytest.mark.slow
def test_a_demonstration_model(cli: Callable, tmp_path: Path) -> None:
    out = tmp_path / "small.py"
    result = cli("reduce", "demo:tiny-decoder", "-p", "wrong-scale{at=1},raise,fuse", "-o", str(out))
    assert result.code == 0 and targets(load_reproducer(out).program) == [aten.silu.default]
