"""safetensors files, written and read one tensor at a time, with the file's digest from the same pass over its bytes.

The format (github.com/huggingface/safetensors): the header's length in 8 bytes, a JSON header, the tensors' bytes
without gaps. Reading copies into memory that PyTorch allocated instead of mapping the file: mapped pages count as the
process's memory beside what is copied from them, tensors in them are aligned to their element only (matrix products may
then round differently), and a file that is cut while it is mapped kills the process.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch

from ..compiler.errors import UserError
from ..models.checks import check_safetensors

CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {code: dtype for dtype, code in CODES.items()}
CHUNK = 16 << 20  # bytes read and hashed at a time


@dataclass(frozen=True)
class Kind:
    """What is known of a tensor before its values are."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @staticmethod
    def of(tensor: torch.Tensor) -> Kind:
        return Kind(tensor.dtype, tuple(tensor.shape))

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


class _Hashing:
    """A file that is hashed as it is written."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.bytes += len(data)


def write(path: Path, kinds: Mapping[str, Kind], value_of: Callable[[str], torch.Tensor]) -> tuple[int, str]:
    """Writes a new file and waits for the disk; returns its size in bytes and its SHA-256.

    Args:
        kinds: of all tensors. Those that fill whole words of 8 bytes are stored first, in this order, then those with
            the widest elements, so that each tensor is aligned to its element.
        value_of: gives a tensor's values, on any device; asked once for each name, and let go before the next.

    Raises:
        UserError: a dtype that the format has no name for.
    """
    order = sorted(kinds, key=lambda name: -kinds[name].dtype.itemsize if kinds[name].bytes % 8 else -8)
    header: dict[str, object] = {}
    end = 0
    for name in order:
        kind = kinds[name]
        if kind.dtype not in CODES:
            raise UserError(f"'{name}' is of {kind.dtype}, which safetensors has no name for")
        header[name] = {"dtype": CODES[kind.dtype], "shape": kind.shape, "data_offsets": [end, end + kind.bytes]}
        end += kind.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    with path.open("xb") as file:
        out = _Hashing(file)
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for name in order:
            value = value_of(name)
            assert Kind.of(value) == kinds[name], name
            data = _bytes_of(value.detach().contiguous())
            for start in range(0, len(data), CHUNK):
                out.write(memoryview(data[start : start + CHUNK].cpu().numpy()))
            del value, data
        file.flush()
        os.fsync(file.fileno())
    return out.bytes, out.digest.hexdigest()


def kinds_in(path: Path) -> dict[str, Kind]:
    """The tensors of a file, by its header, in the order of their bytes.

    Raises:
        UserError: truncated, no safetensors file, or a dtype that is not known here.
    """
    check_safetensors(path)
    with path.open("rb") as file:
        entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    entries.pop("__metadata__", None)
    found: dict[str, Kind] = {}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        code, shape = entry.get("dtype"), entry.get("shape")
        if code not in DTYPES or not (isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)):
            raise UserError(f"{path}: tensor '{name}' has no type known here: {code} {shape}")
        found[name] = Kind(DTYPES[code], tuple(shape))
        start, end = end, end + found[name].bytes
        if entry["data_offsets"] != [start, end]:
            raise UserError(f"{path}: the bytes of tensor '{name}' are not where its type and its neighbours say")
    return found


def read(path: Path, names: Iterable[str], device: torch.device) -> tuple[dict[str, torch.Tensor], str]:
    """The named tensors, on `device`, and the SHA-256 of the whole file.

    On the host: the tensors themselves if `device` is the CPU, and one chunk otherwise.
    """
    wanted, digest = set(names), hashlib.sha256()
    kinds = kinds_in(path)
    found: dict[str, torch.Tensor] = {}
    chunk = torch.empty(CHUNK, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        prefix = file.read(8)
        digest.update(prefix)
        digest.update(file.read(int.from_bytes(prefix, "little")))
        for name, kind in kinds.items():
            tensor = torch.empty(kind.shape, dtype=kind.dtype, device=device if name in wanted else "meta")
            data = _bytes_of(tensor)
            for start in range(0, kind.bytes, CHUNK):
                size = min(CHUNK, kind.bytes - start)
                into = data[start : start + size] if tensor.device.type == "cpu" else chunk[:size]
                _fill(file, memoryview(into.numpy()), path)
                digest.update(memoryview(into.numpy()))
                if tensor.device.type not in ("cpu", "meta"):
                    data[start : start + size].copy_(into)
            if name in wanted:
                found[name] = tensor
    return found, digest.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory, as bytes."""
    return tensor.reshape(-1).view(torch.uint8)


def _fill(file: BinaryIO, view: memoryview, path: Path) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise UserError(f"{path} ended while it was read")
        done += count
