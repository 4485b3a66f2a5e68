"""Which passes there are: those of this package, and those that other packages offer.

A third-party package adds a pass by an entry point:

    [project.entry-points."fuseline.passes"]
    my-pass = "my_package.my_pass:MyPass"

A pass that is not installed yet, of a file or a module, is named by the environment:

    FUSELINE_PASSES=my_pass.py,my_package.other fuseline run MODEL -p "raise,my-pass"
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path

from .errors import UserError, nearest
from .framework import Pass
from .importing import import_file
from .recipes import recipes

GROUP = "fuseline.passes"
VARIABLE = "FUSELINE_PASSES"
_known: dict[str, type[Pass]] = {}
_loaded_entry_points = False


def register(kind: type[Pass]) -> type[Pass]:
    """Adds a pass under its name; also a class decorator."""
    if not kind.name:
        raise ValueError(f"{kind.__name__} has no name")
    known = _known.setdefault(kind.name, kind)
    if known is not kind and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(f"two passes are called '{kind.name}': {known.__module__} and {kind.__module__}")
    _known[kind.name] = kind
    return kind


def available() -> dict[str, type[Pass]]:
    """All passes by name."""
    global _loaded_entry_points
    if not _loaded_entry_points:
        for point in entry_points(group=GROUP):
            try:
                kind = point.load()
            except Exception as error:
                raise UserError(
                    f"the pass '{point.name}' of package '{point.dist.name if point.dist else '?'}' cannot be loaded",
                    [f"{point.value}: {type(error).__name__}: {error}"],
                    "repair or uninstall that package",
                ) from error
            if not (isinstance(kind, type) and issubclass(kind, Pass)):
                raise UserError(f"the entry point '{point.name}' ({point.value}) is not a fuseline.Pass")
            register(kind)
        _loaded_entry_points = True
        for name in filter(None, (part.strip() for part in os.environ.get(VARIABLE, "").split(","))):
            _import_named(name)
    return dict(sorted(_known.items()))


def _import_named(name: str) -> None:
    """Imports a file or a module that the environment names; its passes register themselves.

    Raises:
        UserError: there is no such file or module, or it cannot be imported.
    """
    path = Path(name)
    try:
        if path.suffix != ".py":
            importlib.import_module(name)
            return
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {name}")
        import_file(path.resolve(), path.stem, keep=path.stem not in sys.modules)
    except Exception as error:
        raise UserError(
            f"{VARIABLE} names '{name}', which cannot be imported",
            [f"{type(error).__name__}: {error}"],
            f"{VARIABLE}=my_pass.py or {VARIABLE}=my_package.my_pass, separated by commas",
        ) from error


def find(name: str) -> type[Pass]:
    """The pass of that name.

    Raises:
        UserError: if there is none, with the nearest names, recipes among them.
    """
    passes = available()
    if name not in passes:
        raise UserError(f"unknown pass '{name}'{nearest(name, (*passes, *recipes()))}", remedy="fuseline passes")
    return passes[name]
