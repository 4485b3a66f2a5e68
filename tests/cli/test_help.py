"""Help fits a terminal of 24 lines and 80 columns, and names every verb and option."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest


@pytest.mark.parametrize(
    "verb", [(), ("run",), ("passes",), ("opt",), ("kernels",), ("cache",), ("diff",), ("replay",), ("examine",)]
)
def test_help_fits_one_screen(cli: Callable, verb: tuple[str, ...]) -> None:
    result = cli(*verb, "--help")
    lines = result.out.rstrip("\n").split("\n")
    assert result.code == 0
    assert len(lines) <= 24, result.out
    assert max(map(len, lines)) <= 80, result.out


def test_help_names_the_verbs_in_full(cli: Callable) -> None:
    out = cli("--help").out.split("Commands:")[1]
    for verb in ("run", "passes", "opt", "kernels", "cache", "diff", "replay", "examine"):
        assert f"\n  {verb} " in out
    assert "..." not in out, "a summary was cut"


def test_python_m_fuseline() -> None:
    result = subprocess.run([sys.executable, "-m", "fuseline", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "kernels" in result.stdout


def test_no_arguments_show_help(cli: Callable) -> None:
    result = cli()
    assert "Commands:" in result.out + result.err
