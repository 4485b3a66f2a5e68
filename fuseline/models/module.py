"""Models that are code or an exported program: `py:package.module:factory`, `py:FILE.py:factory` and `FILE.pt2`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from fuseline.compiler.errors import UserError, nearest
from fuseline.compiler.importing import import_file
from fuseline.models.checks import check_weights
from fuseline.models.huggingface import as_loaded, byte_tokenizer
from fuseline.models.loaded import LoadedModel


def load_factory(spec: str, name: str, dtype: torch.dtype | None) -> LoadedModel:
    """Calls `factory()`, which returns a module or a tuple (module, example_args[, example_kwargs]).

    A Hugging Face model needs no example inputs. The current folder is searched for a module, as `python -m` does; a
    file's own folder is searched for what it imports, as `python FILE` does.
    """
    module_name, separator, factory_name = spec.rpartition(":")
    if not (separator and module_name and factory_name):
        remedy = f"{name}:FUNCTION" if spec.endswith(".py") else None
        raise UserError(f"{name!r} is not of the form py:package.module:factory or py:FILE.py:factory", remedy=remedy)
    factory = _factory(module_name, factory_name)
    result = factory()
    model, args, kwargs = _unpack(result, name)
    if dtype is not None:
        model.to(dtype)
        convert = lambda value: (
            value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        )
        args, kwargs = pytree.tree_map(convert, (args, kwargs))
    model.eval()
    check_weights(model, name)
    if args is None:
        if not hasattr(model, "config"):
            raise UserError(
                f"{name} returned a {type(model).__name__} without example inputs",
                remedy=f"let {factory_name}() return (model, (example_input, …))",
            )
        return as_loaded(name, model, byte_tokenizer(model))
    return LoadedModel(name, model, args, kwargs, byte_tokenizer(model) if _takes_ids(args) else None)


def _factory(module_name: str, factory_name: str) -> Any:
    if module_name.endswith(".py"):
        module = _from_file(Path(module_name).expanduser())
    else:
        with _searched(Path.cwd()):
            try:
                module = importlib.import_module(module_name)
            except ModuleNotFoundError as error:
                raise UserError(
                    f"cannot import {module_name!r}: {error}",
                    remedy=f"run in the folder that holds it, or name the file: py:PATH/FILE.py:{factory_name}",
                ) from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise UserError(f"{module_name} has no function {factory_name!r}{nearest(factory_name, names)}")
    return factory


def _from_file(path: Path) -> ModuleType:
    """The module that a file is; classes in it find it by its name."""
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        with _searched(path.resolve().parent):
            return import_file(path, "fuseline_model_" + re.sub(r"\W", "_", path.stem))
    except (ModuleNotFoundError, SyntaxError) as error:
        raise UserError(f"cannot import {path}: {error}") from error


@contextlib.contextmanager
def _searched(folder: Path) -> Iterator[None]:
    """Modules are also looked for in this folder."""
    added = str(folder) not in sys.path
    if added:
        sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if added:
            sys.path.remove(str(folder))


def _unpack(result: Any, name: str) -> tuple[nn.Module, tuple[Any, ...] | None, dict[str, Any]]:
    if isinstance(result, nn.Module):
        return result, None, {}
    parts = tuple(result) if isinstance(result, (tuple, list)) else ()
    well_formed = (
        len(parts) in (2, 3)
        and isinstance(parts[0], nn.Module)
        and isinstance(parts[1], (tuple, list))
        and (len(parts) == 2 or isinstance(parts[2], dict))
    )
    if not well_formed:
        raise UserError(
            f"{name} returned {type(result).__name__}, not a module with its example inputs",
            remedy="return model, (example_input, …) or model, (example_input, …), {'name': value}",
        )
    return parts[0], tuple(parts[1]), dict(parts[2]) if len(parts) == 3 else {}


def _takes_ids(args: tuple[Any, ...]) -> bool:
    return bool(args) and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.int64 and args[0].dim() == 2


def load_exported(path: Path, name: str, dtype: torch.dtype | None) -> LoadedModel:
    """A program written by `torch.export.save`. Its dtype is fixed: asking for another is a UserError."""
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    if dtype is not None:
        raise UserError(f"{path} is an exported program, whose dtype is fixed", remedy="leave out --dtype")
    _check_archive(path)
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it logs a traceback before it raises
    try:
        exported = torch.export.load(path)
    except Exception as error:  # torch.export raises anything from KeyError to AssertionError here
        reason = str(error).strip().splitlines()[:2] or [type(error).__name__]
        raise UserError(f"{path} could not be loaded as an exported program", reason) from error
    finally:
        log.setLevel(level)
    if exported.example_inputs is None:
        raise UserError(f"{path} was saved without its example inputs", remedy="export it again with torch.export")
    args, kwargs = exported.example_inputs
    model = exported.module()
    check_weights(model, str(path))
    return LoadedModel(name, model, tuple(args), dict(kwargs), None, exported=exported)


def _check_archive(path: Path) -> None:
    """The file is a whole zip archive and holds an exported program, by the names of its members."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        names = []
    if not any("exported_program" in name or "archive_format" in name for name in names):
        raise UserError(
            f"{path} is truncated or not a .pt2 file",
            ["it is not a zip archive with an exported program in it"],
            "torch.export.save(torch.export.export(model, args), FILE)",
        )
