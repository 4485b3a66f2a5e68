"""What the safetensors files of a folder hold, from their headers alone."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch


@dataclass(frozen=True)
class Header:
    """dtype: as safetensors writes it ("F16", "I32"); file: where the tensor is."""

    dtype: str
    shape: tuple[int, ...]
    file: Path


Headers: TypeAlias = dict[str, Header]


def headers_of(folder: Path) -> Headers:
    """Of every tensor, by its name, of the files that the folder's index names, or of all.

    The files are whole (`huggingface.check_files`).
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    found: Headers = {}
    for path in files:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        found |= {name: Header(one["dtype"], tuple(one["shape"]), path) for name, one in entries.items()}
    return found


def read(header: Header, name: str) -> torch.Tensor:
    """One tensor."""
    from safetensors import safe_open

    with safe_open(header.file, "pt") as file:
        return file.get_tensor(name)  # type: ignore[no-any-return]
