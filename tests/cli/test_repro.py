"""`fuseline repro`: what a reproducer does now, told by its exit code, and one made on demand."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fuseline
from fuseline import Pipeline, Program
from fuseline.compiler.debug.check import Check
from fuseline.compiler.debug.reproducer import load_reproducer, write_reproducer
from fuseline.compiler.stage import Recipe, render
from tests.helpers import faulty  # noqa: F401  its passes register themselves
from tests.helpers.models import Mlp


@pytest.fixture
def mlp() -> Program:
    torch.manual_seed(0)
    return fuseline.capture(Mlp(), (torch.randn(4, 8),), dynamic={"x": {0: torch.export.Dim.AUTO}})


@pytest.fixture
def stage(mlp: Program, tmp_path: Path) -> Path:
    path = tmp_path / "stage.py"
    path.write_text(render(mlp, "an MLP", Recipe("embedded"), path.name))
    return path


@pytest.fixture
def crash(mlp: Program, tmp_path: Path) -> Path:
    path, pipeline = tmp_path / "crash.py", Pipeline("crash-at-add")
    write_reproducer(path, mlp, pipeline, "crash", Check.parse("crash")(mlp, pipeline), Recipe(), "local")
    return path


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def test_it_fails_alike(cli: Callable, crash: Path) -> None:
    result = cli("repro", str(crash), "--here")
    assert result.code == 1, result.err
    assert "crash.py: local, 12 nodes, types only" in " ".join(result.out.split())
    assert "recorded  crash: pass 'crash-at-add' failed: LookupError: no such sum" in result.out
    assert "it fails alike, with the same versions" in result.out
    assert "fuseline reduce" in result.out.rstrip().splitlines()[-1]
    assert max(map(len, result.out.splitlines()[1:4])) <= 80


def test_it_fails_no_more(cli: Callable, crash: Path) -> None:
    edit(crash, "'pipeline': 'crash-at-add'", "'pipeline': 'fuse{allow_empty}'")
    result = cli("repro", str(crash), "--here")
    assert result.code == 0 and "it does not fail any more" in result.out


def test_it_fails_in_another_way(cli: Callable, crash: Path) -> None:
    edit(crash, "no such sum", "no such product")
    result = cli("repro", str(crash), "--here")
    assert result.code == 3 and "it fails in another way" in result.out
    assert "no such product" in result.out and "no such sum" in result.out


def test_versions_that_changed_are_shown(cli: Callable, crash: Path) -> None:
    edit(crash, f"'torch': '{torch.__version__}'", "'torch': '1.0.0'")
    result = cli("repro", str(crash), "--here")
    (row,) = [line for line in result.out.splitlines() if line.startswith("torch")]
    assert "1.0.0" in row and torch.__version__ in row and "python" not in result.out
    assert "with the same versions" not in result.out


def test_quiet_and_json(cli: Callable, crash: Path, tmp_path: Path) -> None:
    answer = tmp_path / "answer.json"
    result = cli("repro", str(crash), "--here", "--quiet", "--json", str(answer))
    assert result.code == 1 and result.out == "" and result.err == ""
    data = json.loads(answer.read_text())
    assert data["status"] == "reproduces" and data["recorded"]["kind"] == data["found"]["kind"] == "crash"
    assert data["found"]["signature"].endswith("no such sum") and data["versions"]["then"] == data["versions"]["now"]
    assert (data["nodes"], data["scope"], data["values"], data["check"]) == (12, "local", "none", "crash")


def test_a_fault_that_shows_at_times(cli: Callable, mlp: Program, tmp_path: Path) -> None:
    path, check = tmp_path / "times.py", Check.parse("error")
    verdict = next(v for _ in range(3) if (v := check(mlp, Pipeline("at-times"))))
    write_reproducer(path, mlp, Pipeline("at-times"), "error", verdict, Recipe("embedded"), repeat=3)
    codes = [cli("repro", str(path), "--here", "--repeat", str(n)).code for n in (1, 1, 1)]
    assert sorted(codes) == [0, 0, 1]
    assert cli("repro", str(path), "--here").code == 1


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py"], "no such file: nowhere.py"),
        (["STAGE", "--here"], "is a stage, and says of no pipeline that it fails"),
        (["CRASH", "-p", "fuse"], "-p is for making a reproducer"),
        (["STAGE", "-o", "out.py"], "is no reproducer, and there is no pipeline"),
        (["STAGE", "-o", "out.txt", "-p", "fuse"], "'out.txt' does not end in .py"),
        (["STAGE", "-o", "nowhere/out.py", "-p", "fuse"], "no such folder: nowhere"),
        (["STAGE", "-o", __file__, "-p", "fuse"], "exists, and is no reproducer"),
        (["STAGE", "-o", "out.py", "-p", "fuse"], "nothing to reproduce: any finds nothing wrong with fuse"),
        (["STAGE", "-o", "out.py", "-p", "fuse", "--check", "eror"], "unknown check 'eror'; did you mean 'error'"),
        (["STAGE", "-o", "out.py", "-p", "quantize{weights=int8}"], "how large an error is one too many"),
        (["STAGE", "-o", "out.py", "-p", "wrong-scale", "--values", "rael"], "values cannot be 'rael'"),
    ],
)  # fmt: skip
def test_mistakes(cli: Callable, stage: Path, crash: Path, tmp_path: Path, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("repro", *({"STAGE": str(stage), "CRASH": str(crash)}.get(a, a) for a in arguments))
    assert result.code == 2 and message in result.err, result.err
    assert not (tmp_path / "out.py").exists()


@pytest.mark.slow
def test_one_is_made_and_proved_in_a_fresh_process(cli: Callable, stage: Path, tmp_path: Path) -> None:
    out = tmp_path / "made.py"
    result = cli("repro", str(stage), "-p", "fuse,wrong-scale{at=0,allow_empty},crash-at-add", "-o", str(out))
    assert result.code == 0, result.err
    assert "made.py: global, 12 nodes, types only" in " ".join(result.out.split())
    assert load_reproducer(out).verdict.message.startswith("pass 'crash-at-add' failed")


@pytest.mark.slow
def test_values_that_are_asked_for(cli: Callable, stage: Path, tmp_path: Path) -> None:
    for values, kind in (("real", "embedded"), ("random", "random")):
        out = tmp_path / f"{values}.py"
        result = cli("repro", str(stage), "-p", "wrong-scale", "--values", values, "-o", str(out))
        assert result.code == 0 and load_reproducer(out).values == kind, result.err
    result = cli("repro", str(stage), "-p", "wrong-scale", "--values", "none", "-o", str(tmp_path / "none.py"))
    assert result.code == 1 and "what is written to a file does not fail alike" in result.err


@pytest.mark.slow
def test_a_fresh_process_by_default(cli: Callable, crash: Path) -> None:
    result = cli("repro", str(crash))
    assert result.code == 1 and "it fails alike" in result.out
    edit(crash, "no such sum", "no such product")
    assert cli("repro", str(crash)).code == 3
    edit(crash, "'check': 'crash'", "'check': 'crush'")
    result = cli("repro", str(crash))
    assert result.code == 2 and "a fresh process cannot run" in result.err and "crush" in result.err


@pytest.mark.slow
def test_a_failing_verb_leaves_one(cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSELINE_REPRO", str(tmp_path / "left"))
    result = cli("kernels", "demo:tiny-decoder", "-p", "raise,crash-at-add")
    (path,) = (tmp_path / "left").glob("*.py")
    last = result.err.rstrip().splitlines()[-1]
    assert result.code == 1 and last == f"  reproducer: {path} (fails alike in a fresh process)"
    assert str(load_reproducer(path).pipeline) == "crash-at-add"


@pytest.mark.slow
def test_a_wrong_result_leaves_one(cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSELINE_REPRO", str(tmp_path / "left"))
    result = cli("run", "demo:tiny-decoder", "-p", "wrong-scale{allow_empty,at=99},dropped-residual,fuse", "--verify")
    assert result.code == 1 and "pass 'dropped-residual' is exact and changed the results" in result.err
    (path,) = (tmp_path / "left").glob("*.py")
    read = load_reproducer(path)
    assert f"reproducer: {path} (fails" in result.err and (read.scope, read.values) == ("local", "random")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="it compiles a kernel")
def test_a_kernel_that_does_not_compile(cli: Callable, stage: Path, tmp_path: Path) -> None:
    out = tmp_path / "kernel.py"
    arguments = ("repro", str(stage), "-p", "wrong-kernel,fuse", "--check", "lower", "-o", str(out))
    result = cli(*arguments)
    assert result.code == 0, result.err
    assert "a kernel does not compile for sm_80" in result.out
    assert cli("repro", str(out), "--here").code == 1
    edit(out, "'pipeline': 'wrong-kernel,fuse'", "'pipeline': 'fuse'")
    assert cli("repro", str(out), "--here").code == 0


@pytest.mark.slow
def test_code_that_cannot_be_generated_leaves_one(cli: Callable, tmp_path: Path, monkeypatch) -> None:
    """A fault of an emitter: an exception of any kind, behind the passes."""
    monkeypatch.setenv("FUSELINE_REPRO", str(tmp_path / "left"))
    result = cli("kernels", "demo:tiny-decoder", "-p", "wrong-kernel{written=false},fuse")
    (path,) = (tmp_path / "left").glob("*.py")
    assert result.code == 1 and "LookupError: no expression for this op" in result.err
    assert f"reproducer: {path} (fails alike in a fresh process)" in result.err
    read = load_reproducer(path)
    assert (read.check, read.values) == ("lower", "none") and "does not lower" in read.verdict.message


@pytest.mark.slow
def test_a_fault_of_this_process_alone_leaves_none(cli: Callable, tmp_path: Path, monkeypatch) -> None:
    from fuseline.codegen.expressions import RULES

    monkeypatch.setenv("FUSELINE_REPRO", str(tmp_path / "left"))
    monkeypatch.setitem(RULES, torch.ops.aten.silu.default, lambda call: call.no_such_attribute)
    result = cli("kernels", "demo:tiny-decoder", "-p", "fuse")
    assert result.code == 1 and "no_such_attribute" in result.err
    assert "reproducer: none that fails alike in a fresh process" in result.err
    assert not list((tmp_path / "left").glob("*.py"))
