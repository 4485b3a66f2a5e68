"""A run of the harness: rows fail alone, the file is always whole, and a run that was cut goes on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Run, arguments, circumstances, commit, short_name
from harness.run import UNFINISHED, reason


def options(path: Path | None, *words: str) -> argparse.Namespace:
    return arguments("").parse_args(["--device", "cpu", *(["--json", str(path)] if path else []), *words])


def start(path: Path | None, *words: str) -> Run:
    return Run("trial", options(path, *words), floors=False)


def written(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def good(row: dict[str, Any]) -> None:
    row["ms"] = 1.5


def bad(row: dict[str, Any]) -> None:
    row["ms"] = 2.5
    raise ValueError("the kernel does not fit\nand more lines")


def test_a_failing_row_keeps_its_reason_and_the_others(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "trial.json"
    run = start(path)
    run.measure("first", good)
    run.measure("second", bad)
    run.measure("third", good)
    first, second, third = written(path)["rows"]
    assert first["ms"] == third["ms"] == 1.5 and "failed" not in first and first["row_seconds"] >= 0
    assert second["failed"] == "ValueError: the kernel does not fit" and second["ms"] == 2.5
    assert "test_run.py" in second["trace"][-1] and str(Path(__file__).parents[2]) not in json.dumps(second["trace"])
    assert not list(path.parent.glob("*.part"))


def test_the_record_has_its_circumstances(tmp_path: Path) -> None:
    path = tmp_path / "trial.json"
    run = Run("trial", options(path))
    run.measure("first", good)
    record = written(path)
    assert set(record) == {"environment", "options", "rows", "rates"}
    assert {"gpu", "python", "torch", "commit", "command", "date"} <= set(record["environment"])
    assert record["environment"]["torch"] == torch.__version__ and record["options"]["json"] == path.name
    rates = record["rates"]
    assert rates["bandwidth"] == max(rates["copy_bytes_s"], rates["read_bytes_s"]) > 0 and rates["matmul_flop_s"] > 0


def test_a_row_that_is_cut_off_is_marked_while_it_runs(tmp_path: Path) -> None:
    path = tmp_path / "trial.json"

    def look(row: dict[str, Any]) -> None:
        assert written(path)["rows"] == [{"name": "first", "failed": UNFINISHED}]
        row["seen"] = True

    start(path).measure("first", look)
    assert written(path)["rows"][0]["seen"] is True


def test_resume_measures_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "trial.json"
    run = start(path)
    run.measure("good", good)
    run.measure("bad", bad)
    run.measure("lost", bad)
    run.rows[-1]["lost"] = True
    run.record["environment"]["commit"] = "of the first run"
    run.save()
    again, measured = start(path, "--resume"), []
    for name in ("good", "bad", "lost", "new"):
        again.measure(name, lambda row: measured.append(row["name"]))
    assert measured == ["bad", "new"]
    assert {row["name"]: "failed" in row for row in written(path)["rows"]} == {
        "good": False, "lost": True, "bad": False, "new": False,
    }  # fmt: skip
    commits = {row["name"]: row.get("commit") for row in written(path)["rows"]}
    assert commits == {"good": "of the first run", "lost": "of the first run", "bad": None, "new": None}


def test_resume_refuses_another_machines_rows(tmp_path: Path) -> None:
    path = tmp_path / "trial.json"
    run = start(path)
    run.record["environment"]["gpu"] = "NVIDIA H100 80GB HBM3"
    run.measure("first", good)
    with pytest.raises(SystemExit, match="--resume: the file's rows were measured with gpu NVIDIA H100"):
        start(path, "--resume")


def test_no_row_begins_after_the_budget(tmp_path: Path) -> None:
    path = tmp_path / "trial.json"
    start(path, "--budget", "0").measure("late", bad)
    (row,) = written(path)["rows"]
    assert row == {"name": "late", "skipped": "the budget of 0 s was spent"}


def test_only_the_rows_that_were_asked_for(tmp_path: Path) -> None:
    run = start(None, "--only", "a", "c")
    for name in "abc":
        run.measure(name, good)
    assert [row["name"] for row in run.rows] == ["a", "c"]
    with pytest.raises(SystemExit, match="no row c; there are a, b"):
        run.check(["a", "b"])


def test_a_lost_device_starts_the_script_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = tmp_path / "trial.json", []
    monkeypatch.setattr("harness.run.sys.orig_argv", ["python", "decode.py", "--only", "a", "b"])
    monkeypatch.setattr("harness.run.os.execv", lambda program, words: calls.append(words))
    run = start(path)
    monkeypatch.setattr(run, "alive", lambda: False)
    run.measure("a", bad)
    assert written(path)["rows"][0]["lost"] is True
    ((_, *words),) = calls
    assert words[:4] == ["decode.py", "--only", "a", "b"] and words[-1] == "--resume"


def test_the_table_shows_figures_and_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = start(tmp_path / "trial.json")
    run.measure("good", lambda row: row.update(ms=1.23456, count=7, flag=True))
    run.measure("bad [x]", bad)
    capsys.readouterr()
    run.table(("name", "ms", "count", "flag"))
    printed = capsys.readouterr().out
    assert "good  1.235      7  True" in printed
    assert "bad [x]: failed: ValueError: the kernel does not fit" in printed and "trial.json" in printed


def test_the_reason_inside_dynamos_error() -> None:
    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        raise ValueError("no kernel for this")

    with pytest.raises(Exception) as caught:
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert reason(caught.value) == "ValueError: no kernel for this"


@pytest.mark.parametrize(
    ("gpu", "short"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100"),
        ("Tesla T4", "t4"), ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("AMD Instinct MI300X", "mi300x"), ("none", "cpu"),
    ],
)  # fmt: skip
def test_the_name_in_files(gpu: str, short: str) -> None:
    assert short_name(gpu) == short


def test_the_commit_without_a_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.environment.ROOT", tmp_path)
    monkeypatch.setenv("FUSELINE_COMMIT", "abc1234")
    assert commit() == "abc1234" == circumstances(torch.device("cpu"))["commit"]
    monkeypatch.delenv("FUSELINE_COMMIT")
    assert commit() == "unknown"
