"""Progress of a long search in a safetensors file, so that a call that was stopped goes on where it was."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from .errors import UserError


def read(path: Path, search: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a file and its header; search: what it must be the progress of.

    Raises:
        UserError: the file is another search's, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("search") != search:
                raise UserError(
                    f"{path} holds the progress of another search",
                    [f"there: {header.get('search')}", f"here:  {search}"],
                    "name another file, or remove this one",
                )
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}", remedy="remove it to begin anew") from None


def write(path: Path, search: str, tensors: Mapping[str, torch.Tensor], header: Mapping[str, str]) -> None:
    """Writes all of it at once or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(held, scratch, {**header, "search": search})
    scratch.replace(path)
