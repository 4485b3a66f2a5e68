"""An entry of the cache: how it lies in its folder, how it is read, and how it is trusted.

A folder `<kind>/<name>/<digest of the fields>/` with some files and `entry.json`, which holds the fields and each
file's size and SHA-256. The digest vouches for the fields, the fields' neighbours for the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VERSION = 1
HEADER = "entry.json"
_COMPARED = 64  # entries of one name that a miss is explained with


@dataclass(frozen=True)
class Miss:
    """Nothing usable is stored, and why. It is false, where an Entry is true.

    differing: field → (stored, here), for the nearest entry of the same kind and name. damaged: there is an entry of
    these very fields, which cannot be trusted.
    """

    reason: str
    differing: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    damaged: bool = False

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class Entry:
    """What is stored: `files` by name, checked as they were read; `because`: the miss that led to it; `made`: when;
    `about`: what the entry is for (it is no part of what is looked up)."""

    kind: str
    name: str
    fields: dict[str, Any]
    path: Path
    files: dict[str, bytes] = field(repr=False)
    because: str = ""
    made: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)


def read(path: Path) -> Entry | Miss:
    """The entry in a folder, or what is wrong with it."""
    header = _header(path)
    if isinstance(header, Miss):
        return header
    files = {}
    for file, expected in header["files"].items():
        try:
            content = (path / file).read_bytes()
        except OSError as error:
            return Miss(f"{file} cannot be read: {error.strerror}", damaged=True)
        if len(content) != expected["bytes"]:
            return Miss(f"{file} has {len(content)} bytes, not {expected['bytes']}", damaged=True)
        if hashlib.sha256(content).hexdigest() != expected["sha256"]:
            return Miss(f"{file} is not what was stored: its SHA-256 differs", damaged=True)
        files[file] = content
    kind, name, fields = header["kind"], header["name"], header["fields"]
    about = header.get("about")  # entries of earlier releases have none
    about = about if isinstance(about, dict) else {}
    return Entry(kind, name, fields, path, files, header["because"], header["made"], about)


def _header(path: Path) -> dict[str, Any] | Miss:
    try:
        header = json.loads((path / HEADER).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return Miss(f"{HEADER} is missing", damaged=True) if os.path.lexists(path) else Miss("no entry")
    except (OSError, ValueError, RecursionError) as error:
        return Miss(f"{HEADER} cannot be read: {getattr(error, 'strerror', None) or error}", damaged=True)
    wrong = _fault(header, path)
    return Miss(f"{HEADER} is not ours: {wrong}", damaged=True) if wrong else header


def _fault(header: Any, path: Path) -> str | None:
    """What makes a header one that this class did not write for this place."""
    if not isinstance(header, dict) or header.get("version") != VERSION:
        return f"no header of format {VERSION}"
    kinds: dict[str, Any] = {
        "kind": str,
        "name": str,
        "fields": dict,
        "files": dict,
        "because": str,
        "made": (int, float),
    }
    for key, kind_of in kinds.items():
        if not isinstance(header.get(key), kind_of):
            return f"'{key}' is missing"
    if header["kind"] != path.parent.parent.name or folder_name(header["name"]) != path.parent.name:
        return f"it is of {header['kind']} {header['name']}"
    if digest(header["fields"]) != path.name:
        return "its fields do not belong to its folder's name"
    for file, expected in header["files"].items():
        if file != os.path.basename(file) or file in ("", ".", "..", HEADER):
            return f"the file name {file!r}"
        if not isinstance(expected, dict) or {"bytes", "sha256"} - expected.keys():
            return f"no size and SHA-256 of {file}"
    return None


def explain(path: Path, name: str, fields: dict[str, Any]) -> Miss:
    """Why there is no entry at `path`: how its nearest neighbour of the same kind and name differs."""
    nearest: dict[str, tuple[Any, Any]] | None = None
    for other in list(folders(path.parent))[:_COMPARED]:
        header = _header(other)
        if isinstance(header, Miss):
            continue
        found = differences(header["fields"], fields)
        if nearest is None or len(found) < len(nearest):
            nearest = found
    if nearest is None:
        return Miss(f"no entry of {name}")
    return Miss("; ".join(f"{k}: {_short(a)} stored, {_short(b)} here" for k, (a, b) in nearest.items()), nearest)


def differences(stored: Any, here: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Fields that differ, nested ones by dotted names: name → (stored, here), "absent" where there is none."""
    if isinstance(stored, dict) and isinstance(here, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in (*here, *(k for k in stored if k not in here)):
            inner = f"{prefix}.{key}" if prefix else str(key)
            found |= differences(stored.get(key, "absent"), here.get(key, "absent"), inner)
        return found
    return {} if stored == here and type(stored) is type(here) else {prefix: (stored, here)}


def folders(path: Path) -> Iterator[Path]:
    """The visible folders in a folder, most recently used first; none where it cannot be read."""
    with contextlib.suppress(OSError), os.scandir(path) as found:
        inside = [(e.stat().st_mtime, e.name) for e in found if not e.name.startswith(".") and e.is_dir()]
        yield from (path / name for _, name in sorted(inside, reverse=True))


def plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from JSON, so that what is stored and what is asked for compare equal."""
    return json.loads(json.dumps(dict(fields)))


def digest(fields: dict[str, Any]) -> str:
    """32 hexadecimal digits for an entry's fields."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def folder_name(name: str) -> str:
    """A name as a folder's: itself where that is possible."""
    kept = re.sub(r"[^\w.+-]", "_", name)[:100].lstrip(".")
    if kept == name and kept:
        return kept
    return f"{kept or 'entry'}-{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:8]}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 24 else f"{text[:12]}…"
