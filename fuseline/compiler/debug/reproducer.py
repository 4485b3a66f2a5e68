"""Reproducers: a stage's file that also says which pipeline fails on it, how, and where that pipeline's passes live.

The table `STAGE` of such a file has these entries beside a stage's own:

    pipeline, check   what to run, and what to look for
    verdict           what was found: kind, message, signature, size
    scope             "local": the program just before the failing pass; "global": as captured; "reduced"
    versions          of Python, PyTorch, Triton, Fuseline and the packages of other passes
    passes            where passes that are not Fuseline's own are defined: name → "module:Class" or "script.py:Class"
    paths             folders to look for those modules in
    repeat            how often to try a fault that does not show at every run
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import os
import platform
import re
import site
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

import torch

from .. import registry
from ..compat import real_tensors
from ..errors import UserError
from ..framework import Pass
from ..pipeline import Pipeline
from ..program import Program
from ..stage import Recipe, load_stage, read_table, render, save_examples
from ..structure import structural_hash
from .check import Verdict

EMBEDDED_BYTES = 4 << 20  # of values, in the file's own text
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


class Unimportable(UserError):
    """A pass that no other process can be given."""


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
    passes, paths = origins(pipeline)
    headline = (verdict.message.splitlines() or [""])[0].replace("\\", "/").replace('"""', "'''")
    title = f"{verdict.kind} by {pipeline}: {headline}"[:400] + f"\n\nTo reproduce it: fuseline repro {path.name}"
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial")
    with real_tensors():
        text = render(
            program,
            title.rstrip("\\"),
            recipe,
            path.name,
            pipeline=str(pipeline),
            check=check,
            verdict=describe(verdict),
            scope=scope,
            versions=versions(pipeline),
            passes=passes,
            paths=paths,
            repeat=repeat,
        )
        if recipe.kind == "file":
            save_examples(program, path.parent, recipe.name)
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
    _find_passes(path, table.get("passes", {}), table.get("paths", []))
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


def example_bytes(program: Program) -> int:
    """Bytes of the captured arguments, parameters included."""
    return sum(t.numel() * t.element_size() for t in program.examples or () if isinstance(t, torch.Tensor))


def describe(verdict: Verdict) -> dict[str, Any]:
    """A verdict as data."""
    return {
        "kind": verdict.kind,
        "message": verdict.message,
        "signature": verdict.signature,
        "size": verdict.size,
    }


def versions(pipeline: Pipeline | None = None) -> dict[str, str | None]:
    """Versions of what a fault may depend on; None for a package that is not installed."""
    names = ["fuseline", "torch", "triton"]
    if pipeline is not None:
        roots = {type(step).__module__.partition(".")[0] for step in pipeline.passes} - {"fuseline", "__main__"}
        packages = packages_distributions() if roots else {}
        names += sorted({name for root in roots for name in packages.get(root, ())} - set(names))
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def origins(pipeline: Pipeline) -> tuple[dict[str, str], list[str]]:
    """Where the passes that are not Fuseline's own are defined, and the folders of those modules.

    Raises:
        Unimportable: a pass is defined inside a function, at a prompt, or in a script that cannot be imported safely.
    """
    found: dict[str, str] = {}
    paths: dict[str, None] = {}
    for step in pipeline.passes:
        kind = type(step)
        if kind.__module__.partition(".")[0] == "fuseline":
            continue
        if "<locals>" in kind.__qualname__:
            raise Unimportable(
                f"the pass '{step.name}' is defined inside a function, where no other process finds it",
                remedy=f"define {kind.__name__} at the top of a module",
            )
        place, folder = _script(kind) if kind.__module__ == "__main__" else _module(kind)
        found[step.name] = f"{place}:{kind.__qualname__}"
        if folder is not None:
            paths[folder] = None
    if Pipeline(pipeline.passes) != _reread(pipeline):
        raise Unimportable(f"the pipeline '{pipeline}' does not read back as it was written")
    return found, list(paths)


def _reread(pipeline: Pipeline) -> Pipeline:
    """The pipeline of this one's text, whether or not its passes are registered."""
    kinds = {step.name: type(step) for step in pipeline.passes}
    registry.available()  # so that entry points are not loaded below, and dropped again
    before = dict(registry._known)
    try:
        registry._known.update(kinds)
        return Pipeline(str(pipeline))
    finally:
        registry._known.clear()
        registry._known.update(before)


def _module(kind: type[Pass]) -> tuple[str, str | None]:
    """A pass's module, and the folder to import it from; none for an installed package."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is None:
        raise Unimportable(
            f"the pass '{kind.name}' is defined in {kind.__module__}, which is no file",
            remedy="define it in a module's file",
        )
    parts = kind.__module__.count(".") + (Path(file).name == "__init__.py")
    folder = str(Path(file).resolve().parents[parts])
    return kind.__module__, None if folder in map(os.path.realpath, site.getsitepackages()) else folder


def _script(kind: type[Pass]) -> tuple[str, str | None]:
    """The script that is running, where it can be imported without running it."""
    main = sys.modules["__main__"]
    if getattr(main, "__spec__", None) is not None:  # python -m package.module
        return str(main.__spec__.name), str(Path.cwd())  # type: ignore[union-attr]
    file = getattr(main, "__file__", None)
    if file is not None and _is_guarded(Path(file)):
        return str(Path(file).resolve()), None
    raise Unimportable(
        f"the pass '{kind.name}' is defined in the program that runs, {file or 'a prompt'}",
        ["a fresh process cannot import it without running that program"],
        f"move {kind.__name__} to a module, or put what the script does under: if __name__ == '__main__'",
    )


def _is_guarded(script: Path) -> bool:
    """Whether a script does its work under `if __name__ == "__main__"`."""
    try:
        body = ast.parse(script.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, UnicodeDecodeError):
        return False
    return any(isinstance(item, ast.If) and "__name__" in ast.unparse(item.test) for item in body)


def _find_passes(path: Path, passes: dict[str, str], folders: Iterable[str]) -> None:
    """Imports and registers the passes that a reproducer needs."""
    known = registry.available()
    for folder in [*folders, str(path.resolve().parent)]:
        if passes and folder not in sys.path:
            sys.path.append(folder)
    for name, place in passes.items():
        module, _, attribute = place.rpartition(":")
        if name in known and known[name].__qualname__ == attribute:
            continue
        try:
            kind = getattr(_import(module), attribute)
        except Exception as error:
            raise UserError(
                f"{path} needs the pass '{name}' of {module}, which cannot be imported here",
                [f"{type(error).__name__}: {error}"],
                f"put the folder that holds {module.partition('.')[0]} on PYTHONPATH",
            ) from error
        registry.register(kind)


def _import(module: str) -> Any:
    if not module.endswith(".py"):
        return importlib.import_module(module)
    name = f"fuseline_script_{Path(module).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, module)
        if spec is None or spec.loader is None:
            raise ImportError(f"no module in {module}")
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[name] = loaded
        spec.loader.exec_module(loaded)
    return sys.modules[name]
