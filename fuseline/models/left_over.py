"""Tensors of a checkpoint that a model has no place for, or another place than they need."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from fuseline.compiler.errors import UserError
from fuseline.models.headers import Headers, headers_of, read

HARMLESS = ("bias", "weight_zero_point")
"""Tensors that change nothing where they are 0."""


def refuse_left_over(model: nn.Module, folder: Path, names: Iterable[str]) -> None:
    """Holds a checkpoint to the tensors that its model reads.

    A tensor under a module that has tensors of its own and no place for this one would change what the module computes.
    Those of modules that the model does not have, such as a head that is used in training only, are counted on stderr.

    Raises:
        UserError: naming such tensors.
    """
    rest = sorted(names)
    if not rest:
        return
    headers = headers_of(folder)
    wrong = [name for name in rest if _belongs(model, name) and not _changes_nothing(headers, name)]
    if wrong:
        raise UserError(
            f"{folder} has {len(wrong)} tensors that {type(model).__name__} has no place for: {wrong[0]}",
            [*wrong[1:5], "the model would be loaded without them, and compute something else"],
            "a config.json that goes with these weights; or remove the tensors, if nothing should read them",
        )
    others = [name for name in rest if not _belongs(model, name)]
    if others:
        print(f"{len(others)} tensors of {folder} belong to no module of the model: {others[0]}, …", file=sys.stderr)


def refuse_shapes(model: nn.Module, wrong: Iterable[tuple[str, Iterable[int], Iterable[int]]]) -> None:
    """Refuses tensors of another shape than the model's; wrong: name, shape in the checkpoint, shape in the model.

    Raises:
        UserError: naming them.
    """
    lines = [f"{name}: {list(found)}, not {list(wanted)}" for name, found, wanted in sorted(wrong)]
    if lines:
        raise UserError(
            f"{len(lines)} tensors have other shapes than {type(model).__name__} needs: {lines[0].partition(':')[0]}",
            lines[:5],
            "a config.json that goes with these weights",
        )


def _belongs(model: nn.Module, name: str) -> bool:
    """Whether the name's module has tensors, no modules below it, and nothing of that name."""
    path, _, tensor = name.rpartition(".")
    module = dict(model.named_modules()).get(path)
    if module is None or any(True for _ in module.children()):
        return False
    own = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    return bool(own) and tensor not in own


def _changes_nothing(headers: Headers, name: str) -> bool:
    if name not in headers or not name.endswith(HARMLESS):
        return False
    return not bool(read(headers[name], name).any())
