"""The index of errors: what Fuseline can say, and what it suggests, read off the code that raises it."""

from __future__ import annotations

import ast
import builtins
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INTRODUCTION = """\
# Errors

What Fuseline says when something is wrong, and what it suggests, from the code that says it: `…` stands for what the
message fills in. Search this page for a piece of yours. {count} messages.

A message has a headline, details, and `try:` with what to do. `UserError`, exit code 2: the input is wrong. Others,
exit code 1: Fuseline refuses, or found itself at fault; then the last line names a reproducer, and
[a hunt](debugging.md) goes on from there. `--debug`, anywhere in a command, adds the traceback.
"""


@dataclass(frozen=True)
class Message:
    kind: str
    headline: str
    remedy: str


def messages() -> Iterator[tuple[Path, Message]]:
    """Every `raise` of an error of Fuseline's whose headline is written where it is raised."""
    for path in sorted((ROOT / "fuseline").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else None
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or not call.args:
                continue
            name = call.func.id
            if not name.endswith("Error") or hasattr(builtins, name):
                continue
            headline = text(call.args[0])
            remedies = [k.value for k in call.keywords if k.arg == "remedy"] + call.args[2:3]
            if headline and headline != "…":
                yield path.relative_to(ROOT), Message(name, headline, text(remedies[0]) if remedies else "")


def text(node: ast.expr) -> str:
    """A literal or an f-string as text, `…` for what it fills in; empty for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(text(v) if isinstance(v, ast.Constant) else "…" for v in node.values)
    if isinstance(node, ast.BinOp):
        return (text(node.left) or "…") + (text(node.right) or "…")
    return "…"


def error_page() -> str:
    by_part: dict[str, set[Message]] = defaultdict(set)
    for path, message in messages():
        by_part[path.parts[1].removesuffix(".py")].add(message)
    parts = [INTRODUCTION.format(count=sum(map(len, by_part.values())))]
    for part, found in sorted(by_part.items()):
        rows = sorted(found, key=lambda m: m.headline.lower())
        lines = "".join(f"| {cell(m.headline)} | {cell(m.remedy)} | {m.kind} |\n" for m in rows)
        parts.append(f"\n## {part}\n\n| message | try | |\n|---|---|---|\n{lines}")
    return "".join(parts)


def cell(words: str) -> str:
    """Text in a table's cell, as it is written: markup in it is none."""
    plain = " ".join(words.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
    return "" if plain == "…" else plain
