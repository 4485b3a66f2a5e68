"""Writes what the documentation takes from the code: nothing of it is typed by hand.

    python docs/generate.py              docs/passes.md, and the blocks whose command is answered at once
    python docs/generate.py "make demo"  also the blocks whose command contains that text (minutes)

A block is ```console: a line `$ COMMAND`, then what the command printed. `fuseline … --help` and `fuseline passes` are
answered in this process; every other command is run by the shell at the repository's root when it is named.
tests/test_docs.py holds the quick ones to the code.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
PASSES = ROOT / "docs" / "passes.md"
SCRIPTS = ("choosing", "families", "papers", "rotations", "schemes", "tools")
MEASURED = {ROOT / "docs" / f"{name}.md": ROOT / "docs" / f"{name}.py" for name in SCRIPTS}
"""Pages of records, and the scripts that write them."""
DOCUMENTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"```console\n\$ (?P<command>.+)\n(?P<output>(?:(?!```).*\n)*)```")

RESULTS = ROOT / "benchmarks" / "results"
TABLE = re.compile(
    r"(?P<marker><!-- table (?P<name>[\w.*?-]+): (?P<columns>[\w,\s]+)-->)\n(?:(?!<!-- end -->).*\n)*<!-- end -->"
)

IMAGE = re.compile(
    r"(?P<marker><!-- image (?P<name>[\w.-]+): (?P<says>[^>]+) -->)\n(?:(?!<!-- end -->).*\n)*<!-- end -->"
)
"""A figure that docs/figures.py draws once there is something measured."""

RECIPES = re.compile(r"<!-- recipes -->\n(?:(?!<!-- end -->).*\n)*<!-- end -->")


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

    Of `fuseline …` it is what goes to standard output; exit code 1 says there that something was found.

    Raises:
        subprocess.CalledProcessError: the command failed, so it has nothing to show.
    """
    ours = "fuseline" in shlex.split(command)[:2]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if ours else subprocess.STDOUT,
        text=True,
    )
    if not (done.returncode == 0 or (ours and done.returncode == 1 and done.stdout)):
        done.check_returncode()
    return tidy(done.stdout)


def tidy(text: str) -> str:
    """Without spaces at the ends of lines, which tables leave, and without the folders of one machine."""
    text = re.sub(r"\S*/site-packages/", "", text).replace(f"{ROOT}/", "")
    return "".join(f"{line.rstrip()}\n" for line in text.strip("\n").splitlines())


def table(name: str, columns: list[str]) -> str:
    """A measured table: the `rows` of a file in benchmarks/results, those columns, numbers to four digits.

    A name with `*` or `?` is the newest file that it matches, named with its circumstances under the table. A row that
    failed says why in the place of its figures.
    """
    found = sorted(RESULTS.glob(name))
    if not found:
        return "Not measured yet.\n"
    record = json.loads(found[-1].read_text(encoding="utf-8"))
    lines = [columns, ["---"] * len(columns), *(cells(row, columns) for row in record["rows"])]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text if name == found[-1].name else f"{text}\n{circumstances(found[-1].name, record['environment'])}"


def cells(row: Mapping[str, Any], columns: list[str]) -> list[str]:
    reason = next((f"{key}: {row[key]}" for key in ("failed", "skipped") if key in row), None)
    if reason is not None and columns[1] not in row:
        return [str(row["name"]), reason.replace("|", "\\|"), *([""] * (len(columns) - 2))]
    values = (row.get(column, "") for column in columns)
    return [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]


def circumstances(name: str, facts: Mapping[str, Any]) -> str:
    """Where a file's figures come from, in a line or two."""
    versions = [
        f"{package} {facts[package]}" for package in ("torch", "triton", "transformers", "torchao") if package in facts
    ]
    gpu = f"{facts['gpu']}, driver {facts.get('driver', 'unknown')}"
    device = f"no GPU, {facts['processor']}" if facts["gpu"] == "none" else gpu
    where = f"{device}, commit {facts['commit']}"
    return f"`benchmarks/results/{name}`:\n{where},\n{', '.join(versions)}.\n"


def refresh(text: str, answers: Mapping[str, str] | None = None) -> str:
    """A document with its quick blocks answered again, and with `answers` under the other commands that have one."""

    def block(match: re.Match[str]) -> str:
        command = match["command"]
        output = answer(command) if is_quick(command) else (answers or {}).get(command, match["output"])
        return f"```console\n$ {command}\n{output}```"

    def measured(match: re.Match[str]) -> str:
        columns = [column.strip() for column in match["columns"].split(",")]
        return f"{match['marker']}\n{table(match['name'], columns)}<!-- end -->"

    def image(match: re.Match[str]) -> str:
        drawn = ROOT / "docs" / "images" / match["name"] in figures()
        shown = f"![{match['says']}](images/{match['name']})" if drawn else "Not measured yet."
        return f"{match['marker']}\n{shown}\n<!-- end -->"

    text = IMAGE.sub(image, text)
    text = RECIPES.sub(lambda _: f"<!-- recipes -->\n{recipes()}<!-- end -->", text)
    return TABLE.sub(measured, BLOCK.sub(block, text))


def recipes() -> str:
    """The recipes as a table."""
    import fuseline  # noqa: F401  registers them
    from fuseline.compiler.recipes import recipes

    rows = [f"| `{one.name}` | {one.summary} | `{one.pipeline}` |\n" for one in recipes().values()]
    return "".join(["| recipe | what it is for | passes |\n", "|---|---|---|\n", *rows])


def passes() -> str:
    """docs/passes.md: every registered pass's page, from its docstring and its fields."""
    from fuseline.cli.passes import describe
    from fuseline.compiler import registry

    parts = [
        "# Passes\n\n"
        "Written by `python docs/generate.py` from the passes' docstrings and options; `fuseline passes NAME` prints\n"
        "the same page. Every pass also takes `allow_empty` (to match no site is then no error) and `expect`: fewer\n"
        "rewrites than `raise{expect=181}`, or than `raise{expect=RMSNorm:61|Attention:30}` says, are an error.\n"
    ]
    for kind in registry.available().values():
        if not kind.__module__.startswith("fuseline."):
            continue
        page = describe(kind)
        table = option_table(page["options"])
        heading = f"## {page['name']}\n\nTier: {page['tier']}. Level: {page['level']}."
        parts.append(f"{heading}\n\n```text\n{page['page']}\n```\n\n{table}")
    return "\n".join(parts)


def option_table(options: list[dict[str, Any]]) -> str:
    """A pass's options as a table of Markdown."""
    from fuseline.cli.passes import told

    own = [o for o in options if o["name"] not in ("allow_empty", "expect")]
    if not own:
        return "No options of its own.\n"
    rows = [" | ".join((f"`{o['name']}`", *(cell.replace("|", "\\|") for cell in told(o)))) for o in own]
    return "| option | default | what it is |\n|---|---|---|\n" + "".join(f"| {row} |\n" for row in rows)


def documents(answers: Mapping[str, str] | None = None) -> dict[Path, str]:
    """Each document and what it should hold."""
    written = [path for path in DOCUMENTS if path not in (PASSES, *MEASURED)]
    found = {path: refresh(path.read_text(encoding="utf-8"), answers) for path in written}
    tables = {path: runpy.run_path(str(script))["page"]() for path, script in MEASURED.items()}
    return {**found, PASSES: passes(), **tables, **figures()}


@functools.cache
def figures() -> dict[Path, str]:
    """Path of a figure → SVG."""
    return dict(runpy.run_path(str(ROOT / "docs" / "figures.py"))["figures"]())


def main() -> None:
    commands = [match["command"] for path in DOCUMENTS for match in BLOCK.finditer(path.read_text(encoding="utf-8"))]
    answers = {c: run(c) for c in dict.fromkeys(commands) if any(part in c for part in sys.argv[1:])}
    for path, text in documents(answers).items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
