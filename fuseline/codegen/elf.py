"""A small reader of ELF files, as compilers for GPUs leave them: sections, functions, notes.

64-bit little-endian files only. Every offset is checked: a damaged file is a ValueError that says what is wrong, never
a wrong figure. Source: the System V ABI, chapter 4; the AMDGPU note's MessagePack is in LLVM's AMDGPUUsage.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SYMBOLS, NOTE, NO_BITS, DYNAMIC_SYMBOLS = 2, 7, 8, 11  # kinds of sections
FUNCTION = 2  # the kind of a symbol
_DEEPEST = 16  # of nested MessagePack values


@dataclass(frozen=True)
class Section:
    name: str
    kind: int
    link: int  # the section of a symbol table's names
    data: bytes


def sections(binary: bytes) -> list[Section]:
    """The sections of a file, those without content (`NO_BITS`) with none.

    Raises:
        ValueError: this is no ELF file, or it was cut.
    """
    if binary[:6] != b"\x7fELF\x02\x01":
        raise ValueError("no 64-bit ELF file")
    (table,) = _unpack("<Q", binary, 0x28)
    size, count, names = _unpack("<HHH", binary, 0x3A)
    if size < 64 or names >= count:
        raise ValueError("no table of sections")
    raw = [_unpack("<IIQQQQII", binary, table + i * size) for i in range(count)]
    contents = [b"" if kind == NO_BITS else _slice(binary, at, length) for _, kind, _, _, at, length, _, _ in raw]
    return [
        Section(_text(contents[names], name), kind, link, data)
        for (name, kind, _, _, _, _, link, _), data in zip(raw, contents, strict=True)
    ]


def functions(found: list[Section]) -> dict[str, tuple[int, int]]:
    """Function → (its number in its symbol table, its code's bytes)."""
    result: dict[str, tuple[int, int]] = {}
    for section in found:
        if section.kind not in (SYMBOLS, DYNAMIC_SYMBOLS) or section.link >= len(found):
            continue
        for number in range(len(section.data) // 24):
            name, info, _, _, _, size = _unpack("<IBBHQQ", section.data, number * 24)
            if info & 15 == FUNCTION:
                result[_text(found[section.link].data, name)] = (number, size)
    return result


def notes(section: Section) -> Iterator[tuple[str, int, bytes]]:
    """(owner, kind, content) of each note of a NOTE section."""
    at = 0
    while at + 12 <= len(section.data):
        owner, content, kind = _unpack("<III", section.data, at)
        name = _slice(section.data, at + 12, owner).rstrip(b"\0").decode(errors="replace")
        start = at + 12 + (owner + 3 & ~3)
        yield name, kind, _slice(section.data, start, content)
        at = start + (content + 3 & ~3)


def message(data: bytes) -> Any:
    """A MessagePack value as dicts, lists, strings, numbers.

    Raises:
        ValueError: it was cut, nests too deeply, or holds what no note holds (floats, extensions).
    """
    return _value(data, 0, 0)[0]


def _value(data: bytes, at: int, depth: int) -> tuple[Any, int]:
    (tag,) = _slice(data, at, 1)
    at += 1
    if depth > _DEEPEST:
        raise ValueError("a note nests too deeply")
    if tag < 0x80 or tag >= 0xE0:
        return tag if tag < 0x80 else tag - 0x100, at
    if tag in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[tag], at
    if 0xCC <= tag <= 0xD3:  # unsigned, then signed, of 1, 2, 4 and 8 bytes
        size = 1 << (tag - 0xCC) % 4
        return int.from_bytes(_slice(data, at, size), "big", signed=tag >= 0xD0), at + size
    length, at = _length(data, tag, at)
    if tag < 0x90 or tag in (0xDE, 0xDF):
        table = {}
        for _ in range(length):
            key, at = _value(data, at, depth + 1)
            if not isinstance(key, (str, int)):
                raise ValueError("a note has a key that is no text")
            table[key], at = _value(data, at, depth + 1)
        return table, at
    if tag < 0xA0 or tag in (0xDC, 0xDD):
        items = []
        for _ in range(length):
            item, at = _value(data, at, depth + 1)
            items.append(item)
        return items, at
    content = _slice(data, at, length)
    return content if tag in (0xC4, 0xC5, 0xC6) else content.decode(errors="replace"), at + length


_LENGTHS = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}


def _length(data: bytes, tag: int, at: int) -> tuple[int, int]:
    """How much a map, a list, a text or bytes hold."""
    if tag < 0xC0:
        return tag & (31 if tag >= 0xA0 else 15), at
    if tag not in _LENGTHS:
        raise ValueError(f"a note has a value of kind {tag:#x}")
    size = _LENGTHS[tag]
    return int.from_bytes(_slice(data, at, size), "big"), at + size


def _unpack(form: str, data: bytes, at: int) -> tuple[Any, ...]:
    return struct.unpack(form, _slice(data, at, struct.calcsize(form)))


def _slice(data: bytes, at: int, size: int) -> bytes:
    if at + size > len(data):
        raise ValueError(f"it ends after {len(data)} bytes, and {size} more are named at {at}")
    return data[at : at + size]


def _text(data: bytes, at: int) -> str:
    end = data.find(b"\0", at)
    if end < 0:
        raise ValueError("a name has no end")
    return data[at:end].decode(errors="replace")
