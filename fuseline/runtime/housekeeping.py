"""Keeping folders of compiled code within their size, and free of what killed processes left."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

STALE = 3600.0  # seconds after which something half written has no writer any more
IN_USE = 60.0  # seconds for which what was just used is not evicted: another process may be reading it
_FILL = 0.9  # an eviction leaves room, so that not every write evicts


@dataclass(frozen=True)
class Item:
    """Something that can be evicted: a folder, or a file with those beside it of the same stem."""

    path: Path
    size: int
    used: float


def evict(items: Iterable[Item], limit: int) -> list[Path]:
    """Removes the least recently used items until the rest fits; returns what was removed."""
    kept = sorted(items, key=lambda item: item.used)
    total = sum(item.size for item in kept)
    removed: list[Path] = []
    if total <= limit:
        return removed
    for item in kept:
        if total <= limit * _FILL or item.used > time.time() - IN_USE:
            break
        if remove(item.path):
            total -= item.size
            removed.append(item.path)
    return removed


def remove_stale(directory: Path, age: float = STALE) -> None:
    """Removes hidden files and folders that nothing has touched for `age` seconds: writes that were killed."""
    with contextlib.suppress(OSError), os.scandir(directory) as found:
        for item in found:
            if item.name.startswith(".") and item.stat(follow_symlinks=False).st_mtime < time.time() - age:
                remove(Path(item.path))


def tidy_modules(directory: Path, limit: int) -> None:
    """The same for a folder of generated modules, each a `.py` and a `.json` of one name."""
    remove_stale(directory)
    items = []
    with contextlib.suppress(OSError):
        for path in directory.glob("fuseline_*.py"):
            with contextlib.suppress(OSError):
                size = path.stat().st_size + path.with_suffix(".json").stat().st_size
                items.append(Item(path, size, path.stat().st_mtime))
    for path in evict(items, limit):
        path.with_suffix(".json").unlink(missing_ok=True)


def folder_bytes(path: Path) -> int:
    """Bytes of the files in a folder."""
    with os.scandir(path) as found:
        return sum(item.stat().st_size for item in found)


def remove(path: Path) -> bool:
    """Removes a file, or a folder in one step for whoever reads it; False where that is refused."""
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink()
            return True
        away = path.parent / f".old-{os.getpid()}-{secrets.token_hex(4)}"
        os.rename(path, away)
        shutil.rmtree(away, ignore_errors=True)
    except OSError:
        return False
    return True
