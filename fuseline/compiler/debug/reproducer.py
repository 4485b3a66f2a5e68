"""Reproducers: a stage's file that also says which pipeline fails on it, how, and where that pipeline's passes live.

The table `STAGE` of such a file has these entries beside a stage's own:

    pipeline, check   what to run, and what to look for
    verdict           what was found: kind, message, signature, size
    scope             "local": the program just before the failing pass; "global": as captured; "reduced"
    versions          of Python, PyTorch, Triton, Fuseline, the packages of other passes, and each pass's code
    passes, ops       where passes and ops that are not Fuseline's own are defined (`needs.py`)
    paths             folders to look for those modules in
    repeat            how often to try a fault that does not show at every run
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..compat import real_tensors
from ..errors import UserError
from ..identity import code_digest
from ..pipeline import Pipeline
from ..program import Program
from ..stage import Recipe, load_stage, read_table, render, save_examples
from ..structure import structural_hash
from .check import Verdict
from .needs import fulfil, needs

_OFF = re.compile(r" is off by .*")
_SYMBOL = re.compile(r"\b[su]\w*N\b")
_SIZES = re.compile(r"N(?:(?: ?[-,*+] ?)N)+")  # a list of sizes, or a sum of some


@dataclass(frozen=True)
class Reproducer:
    """What a reproducer's file says."""

    path: Path
    program: Program
    pipeline: Pipeline
    check: str
    verdict: Verdict
    versions: dict[str, str | None] = field(default_factory=dict)
    scope: str = "global"
    values: str = "none"
    repeat: int = 1


def alike(found: Verdict, wanted: Verdict) -> bool:
    """Whether two verdicts are of one fault: the same kind, and the same message but for numbers. By how much a result
    is wrong, and how many dimensions a message lists, make no difference."""
    return found.kind is not None and found.kind == wanted.kind and _identity(found) == _identity(wanted)


def _identity(verdict: Verdict) -> str:
    if verdict.kind == "hang":
        return ""
    if verdict.kind == "error" and _OFF.search(verdict.message):
        return "off"
    return _SIZES.sub("N", _SYMBOL.sub("N", verdict.signature))


def write_reproducer(
    path: Path,
    program: Program,
    pipeline: Pipeline,
    check: str,
    verdict: Verdict,
    recipe: Recipe,
    scope: str = "global",
    repeat: int = 1,
) -> None:
    """Writes a reproducer, whole or not at all; values that a "file" recipe names go beside it.

    Raises:
        Unimportable: a pass of the pipeline cannot be found again by a fresh process.
        UserError: values that are to be embedded are too many.
    """
    notes = _notes(program, pipeline, check, verdict, scope, repeat) if pipeline.passes else {}
    title = _title(pipeline, verdict, path) if pipeline.passes else "A program that a command was run on"
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial")
    with real_tensors():
        text = render(program, title, recipe, path.name, **notes)
        if recipe.kind == "file":
            save_examples(program, path.parent, recipe.name)
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _notes(
    program: Program, pipeline: Pipeline, check: str, verdict: Verdict, scope: str, repeat: int
) -> dict[str, Any]:
    return {
        "pipeline": str(pipeline),
        "check": check,
        "verdict": describe(verdict),
        "scope": scope,
        "versions": versions(pipeline),
        **needs(pipeline, program),
        "repeat": repeat,
    }


def _title(pipeline: Pipeline, verdict: Verdict, path: Path) -> str:
    """The first lines of a file's docstring."""
    headline = (verdict.message.splitlines() or [""])[0]
    text = f"{verdict.kind} by {pipeline}: {headline}" if verdict.kind else f"Something goes wrong in {pipeline}"
    plain = text[:400].replace("\\", "/").replace('"', "'")
    return f"{plain}\n\nTo reproduce it: fuseline repro {path.name}"


def load_reproducer(path: str | Path) -> Reproducer:
    """Reads a reproducer; the modules that define its passes are imported, and nothing else of it is run.

    Raises:
        UserError: it is no reproducer, or a pass of it cannot be found here.
    """
    path = Path(path)
    table = read_table(path)
    if "pipeline" not in table:
        raise UserError(
            f"{path} is a stage, and says of no pipeline that it fails",
            remedy=f"fuseline repro {path} -p PIPELINE --check any -o reproducer.py",
        )
    fulfil(table, path)
    told = table["verdict"]
    return Reproducer(
        path,
        load_stage(path),
        Pipeline(table["pipeline"]),
        table["check"],
        Verdict(told["kind"], told["message"], told.get("size", "")),
        table.get("versions", {}),
        table.get("scope", "global"),
        table["tensors"]["kind"],
        table.get("repeat", 1),
    )


def is_reproducer(path: str | Path) -> bool:
    """Whether a stage's file says which pipeline fails on it."""
    return "pipeline" in read_table(path)


def digest(program: Program, *rest: Any) -> str:
    """A short name for a program and what is said of it; the same failure has the same one."""
    text = "\n".join([structural_hash(program), *map(str, rest)])
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def describe(verdict: Verdict) -> dict[str, Any]:
    """A verdict as data."""
    return {
        "kind": verdict.kind,
        "message": verdict.message,
        "signature": verdict.signature,
        "size": verdict.size,
    }


def versions(pipeline: Pipeline | None = None) -> dict[str, str | None]:
    """Versions of what a fault may depend on, the packages of other passes among it (where they are called as their
    modules are), and a digest of each pass's code; None for what is not installed, or in no file."""
    names = ["fuseline", "torch", "triton"]
    if pipeline is not None:
        roots = {type(step).__module__.partition(".")[0] for step in pipeline.passes} - {"fuseline", "__main__"}
        names += sorted(roots - set(names))
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if name in ("fuseline", "torch", "triton"):
                found[name] = None
    for step in pipeline.passes if pipeline is not None else ():
        found[f"pass {step.name}"] = code_digest(type(step))
    return found
