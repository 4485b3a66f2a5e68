"""`fuseline.json`: what an artifact says about itself, and the checks it must pass before anything is made of it.

Version 1. Reading it runs nothing and imports nothing: a class of transformers is looked up by name (`construct.py`),
any other model is built by the caller's own code.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..compiler.errors import FuselineError, UserError
from ..compiler.expressions import Expression
from .state import ATTRIBUTE, BUFFER, PARAMETER
from .tensors import DTYPES, Kind

NAME = "fuseline.json"
FORMAT = "fuseline artifact"
VERSION = 1


@dataclass(frozen=True)
class Entry:
    """A parameter, buffer or attribute.

    tensor: its name in the tensor file; None where only what was derived from it is stored.
    same_as: another name of the same object (tied parameters); then nothing else of the entry counts.
    order: the memory order of its dimensions, where that is not row by row.
    """

    role: str
    kind: Kind
    tensor: str | None = None
    same_as: str | None = None
    order: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Derived:
    """A value that stands for an expression over the model's parameters, by their names."""

    expression: Expression
    kind: Kind
    tensor: str


@dataclass
class Manifest:
    """An artifact's manifest; see the fields' namesakes in `docs/saving.md`."""

    pipeline: str
    model: dict[str, Any]
    state: dict[str, Entry] = field(default_factory=dict)
    derived: list[Derived] = field(default_factory=list)
    file: str = ""
    bytes: int = 0
    sha256: str = ""
    plan: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def kinds(self) -> dict[str, Kind]:
        """The tensors of the tensor file, by their names there."""
        plain = {e.tensor: e.kind for e in self.state.values() if e.tensor is not None}
        return {**plain, **{d.tensor: d.kind for d in self.derived}}

    def save(self, folder: Path) -> None:
        """Writes `fuseline.json` in one step; what it names must be there already."""
        record = {
            "format": FORMAT,
            "version": VERSION,
            "versions": self.versions,
            "pipeline": self.pipeline,
            "plan": self.plan,
            "model": self.model,
            "tensors": {"file": self.file, "bytes": self.bytes, "sha256": self.sha256},
            "state": {name: _entry_record(e) for name, e in self.state.items()},
            "derived": [
                {"tensor": d.tensor, **_kind_record(d.kind), "expression": d.expression.to_json()} for d in self.derived
            ],
        }
        with replacing(folder / NAME) as path:
            path.write_text(json.dumps(record, indent=1), encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> Manifest:
        """Reads the manifest of an artifact.

        Raises:
            UserError: no folder, no manifest, one that is truncated, foreign or of another version, or wrong in itself.
        """
        record = _record(folder)
        try:
            return _manifest(record)
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, FuselineError) as error:
            raise UserError(
                f"{folder / NAME} is damaged: {type(error).__name__}: {error}", remedy="save the model again"
            ) from None


def _record(folder: Path) -> dict[str, Any]:
    again = "give the folder that fuseline.save(model, folder) wrote"
    if folder.is_file():
        raise UserError(f"{folder} is a file, and an artifact is a folder", remedy=again)
    if not folder.is_dir():
        raise UserError(f"no artifact at {folder}: no such folder", remedy=again)
    path = folder / NAME
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        raise UserError(f"{folder} is not an artifact: it has no {NAME}", [f"found: {found}"], again)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is truncated or no JSON: {error}", remedy="copy or save the artifact again") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{path} is not an artifact's manifest: its format is not '{FORMAT}'", remedy=again)
    if record.get("version") != VERSION:
        raise UserError(
            f"{path} is of version {record.get('version')}, and this release reads version {VERSION}",
            [f"versions of what wrote it: {record.get('versions')}"],
            "load it with that release, or save the model again with this one",
        )
    return record


def _manifest(record: dict[str, Any]) -> Manifest:
    tensors = record["tensors"]
    manifest = Manifest(
        _text(record["pipeline"]),
        dict(record["model"]),
        {_text(name): _entry(e) for name, e in record["state"].items()},
        [Derived(Expression.from_json(d["expression"]), _kind(d), _text(d["tensor"])) for d in record["derived"]],
        _file_name(tensors["file"]),
        int(tensors["bytes"]),
        _text(tensors["sha256"]),
        None if record["plan"] is None else _file_name(record["plan"]),
        dict(record["versions"]),
    )
    for name, entry in manifest.state.items():
        if entry.same_as is not None and (entry.same_as == name or manifest.state[entry.same_as].same_as is not None):
            raise ValueError(f"'{name}' is the same as '{entry.same_as}', which is itself another's name")
    for derived in manifest.derived:
        for name in derived.expression.parameters():
            if manifest.state[name].role != PARAMETER:
                raise ValueError(f"'{derived.tensor}' is derived from '{name}', which is no parameter")
    return manifest


def _entry(record: dict[str, Any]) -> Entry:
    if record["role"] not in (PARAMETER, BUFFER, ATTRIBUTE):
        raise ValueError(f"unknown role {record['role']!r}")
    order = record.get("order")
    if order is not None and sorted(order) != list(range(len(record["shape"]))):
        raise ValueError(f"{order} is no order of {len(record['shape'])} dimensions")
    tensor, same_as = record.get("tensor"), record.get("same_as")
    return Entry(record["role"], _kind(record), tensor, same_as, tuple(order) if order is not None else None)


def _entry_record(entry: Entry) -> dict[str, Any]:
    record: dict[str, Any] = {"role": entry.role, **_kind_record(entry.kind), "tensor": entry.tensor}
    if entry.same_as is not None:
        record["same_as"] = entry.same_as
    if entry.order is not None:
        record["order"] = entry.order
    return record


def _kind(record: dict[str, Any]) -> Kind:
    dtype, shape = getattr(torch, _text(record["dtype"]), None), record["shape"]
    if dtype not in DTYPES.values():
        raise ValueError(f"unknown dtype {record['dtype']!r}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{shape!r} is no shape")
    return Kind(dtype, tuple(shape))


def _kind_record(kind: Kind) -> dict[str, Any]:
    return {"dtype": str(kind.dtype).removeprefix("torch."), "shape": list(kind.shape)}


def plan_name(path: Path) -> str:
    """What the plan in `path` and its tensors beside it are called in an artifact: by their contents."""
    digest = hashlib.sha256(path.read_bytes() + path.with_suffix(".safetensors").read_bytes()).hexdigest()
    return f"plan-{digest[:12]}.json"


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _file_name(value: Any) -> str:
    """A file of the artifact's own folder: a manifest cannot have any other read."""
    if _text(value) != Path(value).name or value in ("", ".", ".."):
        raise ValueError(f"{value!r} is not the name of a file in the artifact")
    return value


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new path to write to, which then takes the place of `target` in one step; gone if writing failed."""
    folder = tempfile.mkdtemp(dir=target.parent, prefix=".writing-")
    path = Path(folder) / target.name
    try:
        yield path
        with path.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(path, target)
    finally:
        for left in Path(folder).iterdir():
            left.unlink()
        os.rmdir(folder)
