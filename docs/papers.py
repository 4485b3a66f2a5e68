"""The page docs/papers.md: paper, pass, file, from docstrings that cite, and docs/papers.json, which has the titles.

A docstring cites as `AWQ (Lin et al., 2024)` or `Source: Lin et al., 2024`. A new one appears on the page by itself;
its line in papers.json gives it a title.
"""

from __future__ import annotations

import ast
import json
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CITED = re.compile(r"\b(?P<authors>[A-Z][\w'-]+(?: et al\.| and [A-Z][\w'-]+)?),? (?P<year>(?:19|20)\d\d)\b")
AREAS = {
    "passes": "",
    "codegen": "kernels",
    "runtime": "run time",
    "exporting": "export",
    "models": "checkpoints",
    "qat": "quantization-aware training",
    "view": "fuseline view",
}
INNER = {"calibrated": "calibration", "debug": "debugger", "observe": "debugger", "algebra": "proofs", "ops": "dialect"}
INTRODUCTION = """\
# Papers

Written by `python docs/generate.py` from the docstrings of `fuseline/`, which say where each method is from. If you use
a pass, cite its papers; for Fuseline itself, `CITATION.cff` has the entry.

| paper | where it is used | files |
|---|---|---|
"""


def docstrings() -> Iterator[tuple[Path, str]]:
    """The text of every docstring of the package, as one line, with its file."""
    for path in sorted((ROOT / "fuseline").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                yield path.relative_to(ROOT), " ".join((ast.get_docstring(node) or "").split())


def cited() -> tuple[dict[int, set[Path]], dict[str, set[Path]]]:
    """Files by the number of a paper in papers.json; and files by citations that it does not have.

    Of several papers by the same authors in one year it is the one whose name the docstring has, else any of its file.
    """
    papers = json.loads((ROOT / "docs" / "papers.json").read_text(encoding="utf-8"))
    found: dict[int, set[Path]] = defaultdict(set)
    unknown: dict[str, set[Path]] = defaultdict(set)
    for path, text in docstrings():
        for match in CITED.finditer(text):
            authors, year = match["authors"], int(match["year"])
            fits = [n for n, p in enumerate(papers) if p["authors"] == authors and year in p["years"]]
            named = [n for n in fits if papers[n]["name"].lower() in text.lower()]
            for number in fits if len(fits) == 1 else named:
                found[number].add(path)
            if not fits:
                unknown[f"{authors}, {year}"].add(path)
    return found, unknown


def where(files: set[Path], name: str) -> str:
    """The passes that a paper serves, by their folders and their pages, and the other parts of the package."""
    from fuseline.compiler import framework, registry

    parts: list[str] = []
    for kind in registry.available().values():
        home = Path(*kind.__module__.split("."))
        if not kind.__module__.startswith("fuseline."):
            continue
        inside = any(home in path.parents or path == home.with_suffix(".py") for path in files)
        if inside or re.search(rf"\b{re.escape(name)}\b", framework.document(kind)):
            parts.append(f"`{kind.name}`")
    for path in sorted(files):
        area = path.parts[1] if len(path.parts) > 2 else ""
        inner = path.parts[2] if len(path.parts) > 3 else ""
        parts.append(INNER.get(inner) or (inner if area == "compiler" else "") or AREAS.get(area, area))
    return ", ".join(dict.fromkeys(filter(None, parts)))


def page() -> str:
    papers: list[dict[str, Any]] = json.loads((ROOT / "docs" / "papers.json").read_text(encoding="utf-8"))
    found, unknown = cited()
    rows = []
    for number, paper in sorted(enumerate(papers), key=lambda item: item[1]["name"].lower()):
        if number in found:
            short = f"{paper['name']} ({paper['authors']}, {paper['years'][-1]})"
            rows.append(f"| {short} | {where(found[number], paper['name'])} | {links(found[number])} |\n")
    text = [INTRODUCTION, *rows, "\n## Full references\n\n"]
    for number, paper in sorted(enumerate(papers), key=lambda item: item[1]["authors"].lower()):
        if number in found:
            line = f"- {paper['authors']}, *{paper['title']}*, {paper['where']}."
            text.append(textwrap.fill(line, 118, subsequent_indent="  ", break_on_hyphens=False) + "\n")
    if unknown:
        text.append("\nCited, and without a title in `docs/papers.json` so far:\n\n")
        for short, files in sorted(unknown.items()):
            line = f"- {short}: {links(files)}"
            text.append(textwrap.fill(line, 118, subsequent_indent="  ", break_long_words=False) + "\n")
    return "".join(text)


def links(files: set[Path]) -> str:
    return ", ".join(f"[{path.relative_to('fuseline')}](../{path.as_posix()})" for path in sorted(files))
