"""A Python file as a module, wherever it lies."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def import_file(path: Path, name: str, keep: bool = True) -> ModuleType:
    """Runs a file as the module `name`.

    keep: whether others find it in `sys.modules`, as the classes in it do; it is gone again where the import fails.

    Raises:
        ImportError: it is no Python file. Whatever the file itself raises.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"no module in {path}")
    module = importlib.util.module_from_spec(spec)
    if keep:
        sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if keep:
            del sys.modules[name]
        raise
    return module
