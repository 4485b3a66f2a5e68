"""The published JSON Schemas (draft 2020-12) of the files that Fuseline writes.

fuseline.schemas.names()               "artifact-1", "manifest-1", "plan-1", "record-1"
fuseline.schemas.load("manifest-1")    the schema as data
fuseline.schemas.path("manifest-1")    its file

A form keeps its number for as long as what reads it can read what was written with it: fields may be added. What every
version of a form looks like is kept in tests/formats, and read by each release's tests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..compiler.errors import UserError, nearest


def names() -> list[str]:
    """The schemas there are, without `.json`."""
    return sorted(file.stem for file in Path(__file__).parent.glob("*.json"))


def path(name: str) -> Path:
    """The file of the schema `name`.

    Raises:
        UserError: there is no such schema.
    """
    if name not in names():
        raise UserError(f"no schema {name!r}{nearest(name, names())}", [f"there are: {', '.join(names())}"])
    return Path(__file__).parent / f"{name}.json"


def load(name: str) -> dict[str, Any]:
    """The schema `name` as JSON data; raises what `path` does."""
    return json.loads(path(name).read_text(encoding="utf-8"))
