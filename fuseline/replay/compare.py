"""The difference of two recordings.

A change that many kernels share, such as one to a helper, is shown once: hunks of a diff are the same change where
their changed lines are, whatever the numbers in them (sizes, numbered names), as long as equal ones stay equal.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..compiler.errors import UserError
from .corpus import Case

VERSION = 1
INDEX = "replay.json"
CONTEXT = 2  # lines around a change
KERNEL, CAPTURE, MODULE, MANIFEST, ERROR = "kernel", "capture", "module", "manifest", "error"


@dataclass(frozen=True)
class Recording:
    """A folder of `record`: its cases, and the text of each case's files."""

    cases: list[Case]
    files: dict[str, dict[str, str]]  # case's folder → file → text


@dataclass(frozen=True)
class Kernels:
    """What became of a case's kernels, by name; renamed: the old name → the new."""

    same: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)


@dataclass
class Change:
    """One change, wherever it was made. lines: a unified hunk of the first place; places: (case's folder, file)."""

    kind: str
    lines: list[str]
    places: list[tuple[str, str]]

    @property
    def cases(self) -> list[str]:
        return list(dict.fromkeys(case for case, _ in self.places))


@dataclass(frozen=True)
class Difference:
    """changes: what comes first causes what follows (errors, captures, kernels, modules, manifests), of each the most
    frequent first. cases: folder → its kernels."""

    cases: dict[str, Kernels]
    changes: list[Change]
    added: list[str]
    removed: list[str]

    def __bool__(self) -> bool:
        moved = any(k.changed or k.added or k.removed or k.renamed for k in self.cases.values())
        return bool(moved or self.changes or self.added or self.removed)

    def to_json(self) -> dict[str, Any]:
        changes = [{"kind": c.kind, "diff": c.lines, "places": [list(p) for p in c.places]} for c in self.changes]
        cases = {case: vars(kernels) for case, kernels in self.cases.items()}
        return {"cases": cases, "changes": changes, "cases_added": self.added, "cases_removed": self.removed}


def write_index(folder: Path, cases: list[Case]) -> None:
    """Completes a recording: without it a folder is none."""
    text = json.dumps({"version": VERSION, "cases": [case.to_json() for case in cases]}, indent=1, ensure_ascii=False)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def read(folder: Path) -> Recording:
    """
    Raises:
        UserError: the folder is no recording, or one of another version, or files are missing.
    """
    remedy = f"fuseline replay {folder} --record"
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if index["version"] != VERSION:
            raise UserError(f"{folder} is a recording of version {index['version']}, not {VERSION}", remedy=remedy)
        cases = [Case(**case) for case in index["cases"]]
        files = {case.folder: dict(_texts(folder / case.folder)) for case in cases}
    except FileNotFoundError:
        raise UserError(f"{folder} is no recording: it has no {INDEX}", remedy=remedy) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is a damaged recording", [f"{type(error).__name__}: {error}"], remedy) from error
    for case in cases:
        if not files[case.folder]:
            raise UserError(f"{folder} is a damaged recording", [f"nothing in {case.folder}"], remedy)
    return Recording(cases, files)


def _texts(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8")


def compare(before: Recording, after: Recording) -> Difference:
    """What `after` has that `before` had not, and the other way round."""
    names = {case.folder for case in before.cases}, {case.folder for case in after.cases}
    shared = [case.folder for case in before.cases if case.folder in names[1]]
    kernels = {case: _kernels(before.files[case], after.files[case]) for case in shared}
    changes: dict[tuple[str, ...], Change] = {}
    for case in shared:
        for kind, file, old, new in _pairs(before.files[case], after.files[case], kernels[case]):
            for lines in _hunks(old, new):
                change = changes.setdefault((kind, *_shape(lines)), Change(kind, lines, []))
                change.places.append((case, file))
    order = [ERROR, CAPTURE, KERNEL, MODULE, MANIFEST]
    ranked = sorted(changes.values(), key=lambda change: (order.index(change.kind), -len(change.places)))
    return Difference(
        kernels,
        ranked,
        [case.folder for case in after.cases if case.folder not in names[0]],
        [case.folder for case in before.cases if case.folder not in names[1]],
    )


def _kernels(before: Mapping[str, str], after: Mapping[str, str]) -> Kernels:
    """Pairs the kernels of a case: equal ones first, by name and then by text, then those of one name."""
    old, new = _by_name(before), _by_name(after)
    found = Kernels([name for name in old if new.get(name) == old[name]])
    for name in found.same:
        del old[name], new[name]
    for name, text in list(old.items()):
        other = next((n for n, t in new.items() if t == text), None)
        if other is not None:
            found.renamed[name] = other
            del old[name], new[other]
    found.changed.extend(name for name in old if name in new)
    found.removed.extend(name for name in old if name not in new)
    found.added.extend(name for name in new if name not in old)
    return found


def _by_name(files: Mapping[str, str]) -> dict[str, str]:
    """Kernel → its text, in which it is called `kernel`."""
    named = {file.removeprefix("kernels/").removesuffix(".py"): t for file, t in files.items() if "kernels/" in file}
    return {name: re.sub(rf"\b{re.escape(name)}\b", "kernel", text) for name, text in named.items()}


def _pairs(
    before: Mapping[str, str], after: Mapping[str, str], kernels: Kernels
) -> Iterator[tuple[str, str, str, str]]:
    """(kind, file, text before, text after) of what is compared line by line."""
    for name in kernels.changed:
        yield KERNEL, name, _by_name(before)[name], _by_name(after)[name]
    texts = {ERROR: "error.txt", CAPTURE: "capture.txt", MODULE: "module.py", MANIFEST: "manifest.json"}
    for kind, file in texts.items():
        if kind is not ERROR and (file not in before or file not in after):
            continue  # one side emitted nothing: its error says so
        if before.get(file, "") != after.get(file, ""):
            yield kind, file, before.get(file, ""), after.get(file, "")


def _hunks(old: str, new: str) -> Iterator[list[str]]:
    """The hunks of a unified diff, without line numbers."""
    a, b = old.splitlines(), new.splitlines()
    for group in difflib.SequenceMatcher(None, a, b, autojunk=False).get_grouped_opcodes(CONTEXT):
        lines = []
        for tag, i1, i2, j1, j2 in group:
            if tag == "equal":
                lines += [f" {line}" for line in a[i1:i2]]
            else:
                lines += [f"-{line}" for line in a[i1:i2]] + [f"+{line}" for line in b[j1:j2]]
        yield lines


def _shape(lines: list[str]) -> tuple[str, ...]:
    """The changed lines with each number replaced by its turn of appearance."""
    seen: dict[str, str] = {}
    turn = lambda match: seen.setdefault(match[0], f"#{len(seen)}")
    return tuple(re.sub(r"\d+", turn, line) for line in lines if line[0] != " ")
