"""Writes what the documentation takes from the code: nothing of it is typed by hand.

    python docs/generate.py              docs/passes.md, and the blocks whose command is answered at once
    python docs/generate.py "make demo"  also the blocks whose command contains that text (minutes)

A block is ```console: a line `$ COMMAND`, then what the command printed. `fuseline … --help` and `fuseline passes` are
answered in this process; every other command is run by the shell at the repository's root when it is named.
tests/test_docs.py holds the quick ones to the code.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
PASSES = ROOT / "docs" / "passes.md"
DOCUMENTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"```console\n\$ (?P<command>.+)\n(?P<output>(?:(?!```).*\n)*)```")

TABLE = re.compile(
    r"(?P<marker><!-- table (?P<name>[\w.-]+): (?P<columns>[\w,\s]+) -->)\n(?:(?!<!-- end -->).*\n)*<!-- end -->"
)


def is_quick(command: str) -> bool:
    """Whether a command's output is the same everywhere and costs nothing."""
    words = shlex.split(command, comments=True)
    return words[:1] == ["fuseline"] and ("--help" in words or words[1:2] == ["passes"])


def answer(command: str) -> str:
    """What a quick command prints on a terminal of 80 columns."""
    from fuseline.cli import app

    arguments = shlex.split(command, comments=True)[1:]
    out = io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.suppress(SystemExit),
        mock.patch.dict(os.environ, COLUMNS="80"),
    ):
        app(arguments, prog_name="fuseline")
    return tidy(out.getvalue())


def run(command: str) -> str:
    """What a slow command prints, through this interpreter's environment.

    Raises:
        subprocess.CalledProcessError: the command failed, so it has nothing to show.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    return tidy(done.stdout)


def tidy(text: str) -> str:
    """Without spaces at the ends of lines, which tables leave."""
    return "".join(f"{line.rstrip()}\n" for line in text.strip("\n").splitlines())


def table(name: str, columns: list[str]) -> str:
    """A measured table: the `rows` of a file in benchmarks/results, those columns, numbers to four digits."""
    record = json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))
    show = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)
    rows = [[show(row.get(column, "")) for column in columns] for row in record["rows"]]
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def refresh(text: str, answers: Mapping[str, str] | None = None) -> str:
    """A document with its quick blocks answered again, and with `answers` under the other commands that have one."""

    def block(match: re.Match[str]) -> str:
        command = match["command"]
        output = answer(command) if is_quick(command) else (answers or {}).get(command, match["output"])
        return f"```console\n$ {command}\n{output}```"

    def measured(match: re.Match[str]) -> str:
        columns = [column.strip() for column in match["columns"].split(",")]
        return f"{match['marker']}\n{table(match['name'], columns)}<!-- end -->"

    return TABLE.sub(measured, BLOCK.sub(block, text))


def passes() -> str:
    """docs/passes.md: every registered pass's page, from its docstring and its fields."""
    from fuseline.cli.passes import describe
    from fuseline.compiler import registry

    parts = [
        "# Passes\n\n"
        "Written by `python docs/generate.py` from the passes' docstrings and options; `fuseline passes NAME` prints\n"
        "the same page. Every pass also takes `allow_empty`: matching no site is then no error.\n"
    ]
    for kind in registry.available().values():
        if not kind.__module__.startswith("fuseline."):
            continue
        page = describe(kind)
        rows = [
            f"| `{option['name']}` | {option['type'].replace('|', ' or ')} | {option['default']} |"
            for option in page["options"]
            if option["name"] != "allow_empty"
        ]
        table = (
            "\n".join(["| option | values | default |", "|---|---|---|", *rows]) if rows else "No options of its own."
        )
        heading = f"## {page['name']}\n\nTier: {page['tier']}. Level: {page['level']}."
        parts.append(f"{heading}\n\n```text\n{page['page']}\n```\n\n{table}\n")
    return "\n".join(parts)


def documents(answers: Mapping[str, str] | None = None) -> dict[Path, str]:
    """Each document and what it should hold."""
    found = {path: refresh(path.read_text(encoding="utf-8"), answers) for path in DOCUMENTS if path != PASSES}
    return {**found, PASSES: passes()}


def main() -> None:
    commands = [match["command"] for path in DOCUMENTS for match in BLOCK.finditer(path.read_text(encoding="utf-8"))]
    answers = {c: run(c) for c in dict.fromkeys(commands) if any(part in c for part in sys.argv[1:])}
    for path, text in documents(answers).items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
