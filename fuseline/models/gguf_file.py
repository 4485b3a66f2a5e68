"""The header of a GGUF file: its metadata and the size that the whole file must have.

Format: github.com/ggml-org/ggml, docs/gguf.md (versions 2 and 3, little-endian). The tensors themselves are read by
transformers; this reader exists because a file cut short fails there with an error that does not say so.
"""

from __future__ import annotations

import io
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fuseline.compiler.errors import UserError

# ggml type → (elements in a block, bytes of a block)
BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18),
}  # fmt: skip
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class GgufHeader:
    """metadata: key → value (arrays as lists). expected_bytes: the size of a complete file."""

    metadata: dict[str, Any]
    tensors: int
    expected_bytes: int


class _Cut(Exception):
    """The file ended inside the header, or a length in it is impossible."""


def read_header(path: Path) -> GgufHeader:
    """Reads the header; raises a UserError for a file that is not GGUF, corrupt or cut short."""
    size = path.stat().st_size
    remedy = "copy or download the file again"
    with path.open("rb") as raw:
        file = io.BufferedReader(raw, 1 << 20)
        if (magic := file.read(4)) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file", [f"it begins with {magic!r}, not b'GGUF'"], remedy)
        try:
            header = _header(file, size)
        except (_Cut, struct.error, UnicodeDecodeError, RecursionError) as error:
            detail = f"its header ends early or is corrupt at byte {file.tell()} of {size}"
            raise UserError(f"{path} is truncated or corrupt", [detail], remedy) from error
    if size < header.expected_bytes:
        detail = f"its {header.tensors} tensors need {header.expected_bytes} bytes, the file has {size}"
        raise UserError(f"{path} is truncated", [detail], remedy)
    return header


def _header(file: BinaryIO, size: int) -> GgufHeader:
    version, tensors, keys = struct.unpack("<IQQ", _take(file, 20, size))
    if version not in (2, 3):
        raise UserError(f"GGUF version {version} is not supported", ["versions 2 and 3 are"])
    metadata = {}
    for _ in range(keys):
        key = _string(file, size)
        metadata[key] = _value(file, struct.unpack("<I", _take(file, 4, size))[0], size)
    end = 0
    for _ in range(tensors):
        name = _string(file, size)
        (rank,) = struct.unpack("<I", _take(file, 4, size))
        shape = struct.unpack(f"<{rank}Q", _take(file, 8 * rank, size))
        kind, offset = struct.unpack("<IQ", _take(file, 12, size))
        if kind not in BLOCKS:
            raise UserError(f"tensor {name!r} has the unknown ggml type {kind}")
        elements, block = BLOCKS[kind]
        end = max(end, offset + math.prod(shape) // elements * block)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise _Cut
    start = -(-file.tell() // alignment) * alignment
    return GgufHeader(metadata, tensors, start + end)


def _value(file: BinaryIO, kind: int, size: int) -> Any:
    if kind == STRING:
        return _string(file, size)
    if kind == ARRAY:
        element, count = struct.unpack("<IQ", _take(file, 12, size))
        if count > size:
            raise _Cut
        return [_value(file, element, size) for _ in range(count)]
    if kind not in SCALARS:
        raise _Cut
    return struct.unpack(SCALARS[kind], _take(file, struct.calcsize(SCALARS[kind]), size))[0]


def _string(file: BinaryIO, size: int) -> str:
    return _take(file, struct.unpack("<Q", _take(file, 8, size))[0], size).decode("utf-8")


def _take(file: BinaryIO, count: int, size: int) -> bytes:
    """Exactly `count` bytes; a corrupt length never makes it allocate more than the file holds."""
    data = file.read(count) if count <= size else b""
    if len(data) < count:
        raise _Cut
    return data
