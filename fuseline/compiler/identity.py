"""The identity of a pass: a digest of its code and its options, for what is kept longer than a process.

The code is the text of the module that defines the pass and of all that it imports from its own package: for a pass of
Fuseline's, from `fuseline.passes`; for one in a single file, that file. What a pass uses beyond that goes with the
version of the package it comes from, which is kept beside the digest.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from .framework import Pass

DIGITS = 12


def identity(step: Pass) -> str | None:
    """A digest that changes with the pass's code or options; None where the code is in no file (at a prompt)."""
    code = code_digest(type(step))
    return None if code is None else _digest([code, str(step)])


def code_digest(kind: type[Pass]) -> str | None:
    """A digest of the code alone."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return None if file is None or not Path(file).is_file() else _of_module(kind.__module__, file)


@lru_cache(maxsize=256)
def _of_module(name: str, file: str) -> str:
    """Read once a process: code that is edited later is not the code that runs."""
    package = name.rpartition(".")[0]
    files, pending = {name: file}, [name]
    while pending:
        module = pending.pop()
        for other in _imports(module, files[module]):
            origin = _origin(other) if package and other.startswith(f"{package}.") and other not in files else None
            if origin is not None:
                files[other] = origin
                pending.append(other)
    return _digest([part for module in sorted(files) for part in (module if package else "", _text(files[module]))])


def _imports(module: str, file: str) -> Iterator[str]:
    """The modules that a module may import, and names that it imports from them, which may be modules as well."""
    inside = module if Path(file).name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(_text(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = inside.split(".")
            base = ".".join(parts[: len(parts) + 1 - node.level]) if node.level else ""
            whole = ".".join(filter(None, (base, node.module)))
            yield whole
            yield from (f"{whole}.{alias.name}" for alias in node.names)


def _origin(module: str) -> str | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # a name in a module, which is no package
        return None
    return spec.origin if spec is not None and spec.origin is not None and spec.origin.endswith(".py") else None


def _text(file: str) -> str:
    return Path(file).read_text(encoding="utf-8")


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:DIGITS]
