"""Golden tests: each file of `tests/filecheck/` runs here, and its output is held to the CHECK lines in it.

A file builds a program with the public API and prints what it is about. The CHECK lines are those of LLVM's FileCheck,
read by its Python twin: what must stand in which order, what must not stand between, which names must be the same.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("filecheck")

from filecheck.finput import FInput
from filecheck.matcher import Matcher
from filecheck.options import Options
from filecheck.parser import Parser, pattern_for_opts

FOLDER = Path(__file__).parent / "filecheck"
CASES = sorted(FOLDER.glob("*.py"))


@cache
def output(path: Path) -> str:
    """What a file prints when it runs."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(path), run_name="__main__")
    return printed.getvalue()


def check(path: Path, text: str, checks: str | None = None) -> str | None:
    """What is wrong with a file's output by the file's CHECK lines (or `checks` in their place), or None."""
    options = Options(str(path), comment_prefixes=["COM"])
    parser = Parser(options, io.StringIO(path.read_text() if checks is None else checks), *pattern_for_opts(options))
    matcher = Matcher(options, FInput("its output", text), parser)
    matcher.stderr = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):  # it says where it goes on after a run of CHECK-DAG lines
        code = matcher.run()
    complaint = re.sub(r"\033\[\d*m", "", matcher.stderr.getvalue())  # its colours, on a terminal
    return complaint or f"exit code {code}" if code else None


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_prints_what_it_says(path: Path) -> None:
    text = output(path)
    complaint = check(path, text)
    if complaint is not None:
        pytest.fail(f"{complaint}\n--- its output ---\n{text}", pytrace=False)


DIRECTIVE = re.compile(r"(# CHECK[A-Z-]*:)(.*)")


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_every_line_can_fail(path: Path) -> None:
    """Another text in any CHECK line, or none to leave out in a CHECK-NOT, is a failure at that file and line."""
    lines = path.read_text().splitlines()
    numbers = [number for number, line in enumerate(lines, 1) if DIRECTIVE.match(line)]
    assert numbers
    for number in numbers:
        wrong = "{{.}}" if "CHECK-NOT:" in lines[number - 1] else "no such text"
        changed = [*lines]
        changed[number - 1] = DIRECTIVE.sub(rf"\1 {wrong}", changed[number - 1])
        complaint = check(path, output(path), "\n".join(changed))
        assert complaint is not None and complaint.startswith(f"{path}:{number}: error: "), lines[number - 1]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("print('one two')\n# CHECK: one\n# CHECK-SAME: three\n", r'case.py:3: error: Couldn\'t match "three"'),
        ("print('one two')\n# CHECK: one\n# CHECK-NOT: two\n", r"case.py:3: error: CHECK-NOT: excluded string found"),
        ("print('one')\n# CHECK: [[A:o]]\n# CHECK: [[A]]\n", r"case.py:3: error: Couldn't match"),
        ("print('one')\n# CHECK-NEXT one\n", "No check strings found"),
        ("# CHECK: one\n", "is empty"),
    ],
)
def test_a_wrong_file_is_told_its_line(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "case.py"
    path.write_text(text)
    assert re.search(complaint, check(path, output(path)) or "")
