"""Help fits a terminal of 80 columns, that of a verb 24 lines, and names every verb and option."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

import fuseline.cli

VERBS = [verb.__name__ for verb in fuseline.cli.VERBS]


@pytest.mark.parametrize("verb", [(), *((name,) for name in VERBS)])
def test_help_fits_one_screen(cli: Callable, verb: tuple[str, ...]) -> None:
    result = cli(*verb, "--help")
    lines = result.out.rstrip("\n").split("\n")
    assert result.code == 0
    assert len(lines) <= (24 if verb else 30), result.out
    assert max(map(len, lines)) <= 80, result.out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_gives_its_data(cli: Callable, verb: str) -> None:
    assert "--json FILE" in cli(verb, "--help").out


def test_help_names_the_verbs_in_full(cli: Callable) -> None:
    out = cli("--help").out.split("Commands:")[1]
    for verb in VERBS:
        assert f"\n  {verb} " in out
    assert "..." not in out, "a summary was cut"


def test_python_m_fuseline() -> None:
    result = subprocess.run([sys.executable, "-m", "fuseline", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "kernels" in result.stdout


def test_no_arguments_show_help(cli: Callable) -> None:
    result = cli()
    assert "Commands:" in result.out + result.err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_that_asks_the_program(cli: Callable, shell: str) -> None:
    result = cli("completion", shell)
    assert result.code == 0 and f"complete_{shell}" in result.out and "fuseline" in result.err
    assert cli("completion", "csh").code == 2


@pytest.mark.slow
def test_the_program_answers_the_script() -> None:
    asked = {"_FUSELINE_COMPLETE": "complete_bash", "COMP_WORDS": "fuseline bis", "COMP_CWORD": "1"}
    program = "import sys; sys.argv[0] = 'fuseline'; from fuseline.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, **asked}, capture_output=True, text=True)
    assert done.stdout.split() == ["bisect"], done.stderr
