"""Progress bars: on a terminal only, and gone when the work is done."""

from __future__ import annotations

import io

import pytest

from fuseline.compiler.progress import bar, step, steps


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def as_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard error from here on; no fixture, since pytest puts its own in between."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    made = Terminal()
    monkeypatch.setattr("sys.stderr", made)
    return made


def test_a_terminal_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = as_terminal(monkeypatch)
    assert list(steps(range(3), "counting")) == [0, 1, 2]
    assert "counting" in terminal.getvalue() and "3/3" in terminal.getvalue()


def test_a_resumed_work_begins_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = as_terminal(monkeypatch)
    work = steps(range(5, 8), "learning", total=8, completed=5)
    assert next(work) == 5
    assert list(work) == [6, 7]
    assert "8/8" in terminal.getvalue()
    with bar("named", 2) as progress:
        step(progress, "another name")
        assert progress.tasks[0].completed == 1 and progress.tasks[0].description == "another name"


def test_a_log_is_told_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(steps(range(3), "counting")) == [0, 1, 2]
    with bar("counting", 1) as progress:
        step(progress)
    assert capsys.readouterr() == ("", "")
