"""What a reproducer needs besides its text: the modules that define passes and ops which are not Fuseline's own.

passes    name → "module:Class", or "script.py:Class" for one of the program that ran
ops       name → the module that defines the dialect op
paths     folders to look for those modules in
"""

from __future__ import annotations

import ast
import importlib
import os
import site
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.fx import GraphModule, Node

from .. import registry
from ..errors import UserError
from ..importing import import_file
from ..ops import find
from ..ops._define import REGISTRY
from ..pipeline import Pipeline
from ..program import Program


class Unimportable(UserError):
    """A pass or an op that no other process can be given."""


def needs(pipeline: Pipeline, program: Program) -> dict[str, Any]:
    """What a fresh process has to import for a pipeline over a program.

    Raises:
        Unimportable: something is defined inside a function, at a prompt, or in a script that runs when imported; or
            the pipeline's text is not all that there is to it.
    """
    passes: dict[str, str] = {}
    ops: dict[str, str] = {}
    paths: dict[str, None] = {}

    def place(what: str, defined: Any) -> str:
        where, folder = _place(what, defined)
        if folder is not None:
            paths[folder] = None
        return where

    for step in pipeline.passes:
        kind = type(step)
        if not _is_ours(kind):
            where = place(f"the pass '{step.name}'", kind)
            passes[step.name] = f"{where}:{kind.__qualname__}"
    for node in _nodes(program.module):
        op = find(node.target)
        if op is not None and op.name not in ops and not _is_ours(op.naive):
            ops[op.name] = place(f"the op '{op.name}'", op.naive)
    if pipeline != _reread(pipeline):
        raise Unimportable(f"the pipeline '{pipeline}' does not read back as it was written")
    return {"passes": passes, "ops": ops, "paths": list(paths)}


def fulfil(table: dict[str, Any], path: Path) -> None:
    """Imports and registers what the table of a reproducer says that it needs.

    Raises:
        UserError: something of it cannot be imported here.
    """
    passes, ops, known = table.get("passes", {}), table.get("ops", {}), registry.available()
    for folder in [*table.get("paths", []), str(path.resolve().parent)]:
        if (passes or ops) and folder not in sys.path:
            sys.path.append(folder)
    for name, place in passes.items():
        module, _, attribute = place.rpartition(":")
        if name not in known or known[name].__qualname__ != attribute:
            registry.register(_get(path, f"the pass '{name}'", module, attribute))
    for name, module in ops.items():
        if name not in REGISTRY:
            _get(path, f"the op '{name}'", module, None)


def _get(path: Path, what: str, module: str, attribute: str | None) -> Any:
    try:
        found = _import(module)
        return found if attribute is None else getattr(found, attribute)
    except Exception as error:
        raise UserError(
            f"{path} needs {what} of {module}, which cannot be imported here",
            [f"{type(error).__name__}: {error}"],
            f"put the folder that holds {module.partition('.')[0]} on PYTHONPATH",
        ) from error


def _is_ours(defined: Any) -> bool:
    return bool(defined.__module__.partition(".")[0] == "fuseline")


def _nodes(module: GraphModule) -> Iterator[Node]:
    """The nodes of a graph and of the regions that it calls."""
    for node in module.graph.nodes:
        yield node
        if node.op == "call_module":
            inner = module.get_submodule(str(node.target))
            if isinstance(inner, GraphModule):
                yield from _nodes(inner)


def _place(what: str, defined: Any) -> tuple[str, str | None]:
    """Where a class or a function can be imported from, and the folder to look in."""
    if "<locals>" in defined.__qualname__:
        raise Unimportable(
            f"{what} is defined inside a function, where no other process finds it",
            remedy=f"define {defined.__name__} at the top of a module",
        )
    return _script(what, defined) if defined.__module__ == "__main__" else _module(what, defined)


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


def _module(what: str, defined: Any) -> tuple[str, str | None]:
    """A module's name, and the folder to import it from; none for an installed package."""
    name = defined.__module__
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        raise Unimportable(f"{what} is defined in {name}, which is no file", remedy="define it in a module's file")
    parts = name.count(".") + (Path(file).name == "__init__.py")
    folder = str(Path(file).resolve().parents[parts])
    return name, None if folder in map(os.path.realpath, site.getsitepackages()) else folder


def _script(what: str, defined: Any) -> tuple[str, str | None]:
    """The script that is running, where it can be imported without running it."""
    main = sys.modules["__main__"]
    if getattr(main, "__spec__", None) is not None:  # python -m package.module
        return str(main.__spec__.name), str(Path.cwd())  # type: ignore[union-attr]
    file = getattr(main, "__file__", None)
    if file is not None and _is_guarded(Path(file)):
        return str(Path(file).resolve()), None
    raise Unimportable(
        f"{what} is defined in the program that runs, {file or 'a prompt'}",
        ["a fresh process cannot import it without running that program"],
        f"move {defined.__name__} to a module, or put what the script does under: if __name__ == '__main__'",
    )


def _is_guarded(script: Path) -> bool:
    """Whether a script does its work under `if __name__ == "__main__"`."""
    try:
        body = ast.parse(script.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, UnicodeDecodeError):
        return False
    return any(isinstance(item, ast.If) and "__name__" in ast.unparse(item.test) for item in body)


def _import(module: str) -> Any:
    if not module.endswith(".py"):
        return importlib.import_module(module)
    name = f"fuseline_script_{Path(module).stem}"
    return sys.modules[name] if name in sys.modules else import_file(Path(module), name)
