"""`fuseline bisect`: in process and over a command; what it prints, and what is left behind (nothing)."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tests.debugging.faults
from tests.debugging.scripts import HERE

TINY = "demo:tiny-decoder"
SCRIPT = (
    HERE
    + """
import sys
torch.manual_seed(0)
model, x = Mlp(), torch.randn(4, 8)
with torch.no_grad():
    expected = model(x)
    model.compile(backend="fuseline", options={"pipeline": "planted{fault=here}"})
    same = torch.allclose(model(x), expected, atol=1e-4)
print("all is well" if same else "the results differ")
sys.exit(0 if same else 3)
"""
)


def test_a_fault_is_named_with_its_rule_and_line(cli: Callable, tmp_path: Path) -> None:
    tests.debugging.faults.FAULTS  # noqa: B018  registers the pass
    result = cli("bisect", TINY, "-p", "planted{fault=wrong-dtype,layer=1}", "--json", str(tmp_path / "found.json"))
    assert result.code == 1, result.err
    data = json.loads((tmp_path / "found.json").read_text())
    assert data["kind"] == "rewrite" and data["entries"]["here"]["rule"] == "wrong-dtype"
    assert "planted/wrong-dtype at layers.1" in result.out and "faults.py:" in result.out
    assert "decoder.py:" in result.out and "aten.silu.default" in result.out and "torch.bfloat16" in result.out
    assert f"FUSELINE_LIMIT={data['number']} fuseline" in result.out
    assert "without it alone it passes" in result.out and result.out.rstrip().splitlines()[-2].startswith("next: ")
    assert f"run {data['runs']}: all rewrites but {data['number']}: passes" in result.err


def test_a_sound_pipeline_has_nothing_to_find(cli: Callable) -> None:
    result = cli("bisect", TINY, "-p", "planted")
    assert result.code == 0 and "nothing to find: it passes with all" in result.out


@pytest.mark.slow
def test_a_lossy_pipeline_needs_a_bound(cli: Callable) -> None:
    result = cli("bisect", TINY, "-p", "quantize{weights=int8}")
    assert result.code == 2 and "'quantize' approximates" in result.err and "--check 'any|error:0.1'" in result.err
    assert cli("bisect", TINY, "-p", "quantize{weights=int8}", "--check", "error:0.5").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is neither a GRAPH nor a command"),
        ((TINY, "--", "true"), "a GRAPH and a command were both given"),
        (("--", "/no/such/program"), "'/no/such/program' cannot be run: No such file or directory"),
        ((TINY, "--check", "eror"), "unknown check 'eror'; did you mean 'error'"),
        (("--", "false"), "it fails without any of the 0 rewrites"),
    ],
)
def test_slips_are_told(cli: Callable, arguments: tuple[str, ...], message: str) -> None:
    result = cli("bisect", *arguments)
    assert message in result.err + result.out and result.code in (1, 2)


@pytest.mark.slow
def test_a_command_is_searched_and_nothing_is_left_behind(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    result = cli("bisect", "--match", "results differ", "--", sys.executable, str(script))
    assert result.code == 1 and "planted/here" in result.out and "train.py:" in result.out, result.err
    assert f"{sys.executable} {script}" in result.out and "exit code 3" in result.out
    assert not list((tmp_path / "tmp").glob("fuseline-*")) and dict(os.environ) == before
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["tmp", "train.py"]
    other = cli("bisect", "--match", "something else", "--", sys.executable, str(script))
    assert other.code == 2 and "cannot tell" in other.err


@pytest.mark.slow
def test_a_command_that_hangs_is_stopped(cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("return new(torch.ops.aten.relu.default, m.x)", "\n        while True: pass"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    result = cli("bisect", "--timeout", "25", "--", sys.executable, str(script))
    assert result.code == 1 and "planted/here" in result.out and "not done after 25 s" in result.out, result.err
