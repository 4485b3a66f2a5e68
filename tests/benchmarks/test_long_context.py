"""The long-context benchmark: pairs that fit, rows that are compared with their own length, workers that say why."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import long_context
from long_context import BACKENDS, Process, Worker, compare, main, parse, rounds


def test_what_fits_together_compiles_together() -> None:
    rows = [(backend, length) for length in (8192, 32768) for backend in BACKENDS]
    on_h200 = rounds(rows, 0.9 * 150e9)
    assert len(on_h200) == 2 and sorted(sum(on_h200, [])) == sorted(rows)
    assert on_h200[0][0] == ("inductor", 32768)
    assert [("inductor", 32768)] in rounds(rows, 0.9 * 85e9)  # on 80 GB it is alone
    assert rounds([], 1e9) == []


def test_rows_are_compared_with_their_own_length() -> None:
    measured = {"inductor 8": {"peak_gb": 4.0, "step_s": 3.0}, "inductor 16": {"failed": "out of memory"}}
    row = {"peak_gb": 2.0, "step_s": 1.5}
    compare(row, measured, 8)
    assert (row["of_inductor_memory"], row["speedup"]) == (0.5, 2.0)
    other = {"peak_gb": 2.0, "step_s": 1.5}
    compare(other, measured, 16)
    assert "speedup" not in other


@pytest.mark.slow
def test_a_worker_that_fails_says_why() -> None:
    process = Process("fuseline", 16, ["--device", "cpu", "--tiny", "--pipeline", "rais"])
    try:
        with pytest.raises(RuntimeError) as caught:
            process.ready()
    finally:
        process.stop()
    assert "unknown pass 'rais'" in str(caught.value)


def test_both_backends_take_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's step without the compilers: what is timed is a forward and a backward with gradients of everything."""
    monkeypatch.setattr(long_context.torch, "compile", lambda model, **_: model)
    worker = Worker(parse(["--device", "cpu", "--tiny", "--worker", "fuseline:16"]))
    assert worker.step().isfinite() and all(p.grad is not None for p in worker.model.parameters())


@pytest.mark.slow
def test_the_whole_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "long.json"
    monkeypatch.setattr(sys, "argv", ["long_context.py"])
    main(["--device", "cpu", "--tiny", "--lengths", "32", "--steps", "1", "--json", str(path)])
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["inductor 32", "passes 32", "fuseline 32"] and not any(
        "failed" in row for row in rows.values()
    )
    ours, theirs = rows["fuseline 32"], rows["inductor 32"]
    assert abs(ours["loss"] - theirs["loss"]) < 1e-2 and ours["speedup"] > 0
    assert abs(ours["gradient_norm"] / theirs["gradient_norm"] - 1) < 2e-2
