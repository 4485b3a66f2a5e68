"""A cache on disk, addressed by what its entries were made from.

    cache.get("kernels", "softmax", {"source": …, "target": "cuda:90", "triton": "3.6.0"})
        → Entry, or a Miss that says why: "triton: 3.6.0 stored, 3.7.0 here"

An entry is a folder, `<directory>/<kind>/<name>/<digest of the fields>/`, of some files and an `entry.json` that holds
the fields and each file's size and SHA-256. It is written under another name and renamed, so that any number of
processes may read, write and be killed at any moment: there is never half an entry. What is read is checked, and an
entry that was truncated, edited or written by something else is a miss and gets replaced. Nothing here raises for the
state of the disk: a cache that cannot be read is empty, and one that cannot be written warns once.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .entry import HEADER, VERSION, Entry, Miss, digest, explain, folder_name, folders, plain, read
from .housekeeping import Item, evict, folder_bytes, remove, remove_stale
from .location import cache_root, size_limit, warn_once

KERNELS = "kernels"
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)


class Cache:
    """Entries below one directory, at most `limit` bytes of them (default: `FUSELINE_CACHE_SIZE`, or 1 GiB)."""

    def __init__(self, directory: str | os.PathLike[str] | None = None, limit: int | None = None):
        self.directory = cache_root() / "compiled" if directory is None else Path(directory)
        self.limit = size_limit() if limit is None else limit
        self.refused: OSError | None = None  # why nothing is written any more
        self._unscanned = self.limit  # bytes written since the last look at the whole: the first write looks

    def get(self, kind: str, name: str, fields: Mapping[str, Any]) -> Entry | Miss:
        """The entry made from exactly `fields` (JSON data), read and checked, or why there is none."""
        fields = plain(fields)
        path = self._path(kind, name, fields)
        found = read(path)
        if isinstance(found, Entry):
            with contextlib.suppress(OSError):  # when it was last used; a read-only cache does without
                os.utime(path)
            return found
        return found if found.damaged else explain(path, name, fields)

    def put(
        self,
        kind: str,
        name: str,
        fields: Mapping[str, Any],
        files: Mapping[str, bytes],
        because: str = "",
        replace: bool = False,
        about: Mapping[str, Any] | None = None,
    ) -> Path | None:
        """Stores `files` (plain names, no folders) and returns their folder; None where that cannot be done.

        An intact entry of the same fields stays as it is unless `replace` is set: another process made it meanwhile.
        about: JSON data that says what the entry is for, given back with it and no part of the key.
        """
        fields, size = plain(fields), sum(map(len, files.values()))
        if self.refused is not None or size > self.limit or self.limit == 0:
            return None
        path = self._path(kind, name, fields)
        header = {"version": VERSION, "kind": kind, "name": name, "fields": fields, "because": because}
        header["made"] = round(time.time(), 3)
        header["about"] = plain(about or {})
        header["files"] = {n: {"bytes": len(x), "sha256": hashlib.sha256(x).hexdigest()} for n, x in files.items()}
        try:
            if replace or not read(path):
                for remaining in reversed(range(4)):
                    try:
                        self._publish(path, header, files, replace)
                        break
                    except FileNotFoundError:  # someone cleared the cache under our feet, or there is no such place
                        if not remaining:
                            raise
                self._unscanned += size
        except OSError as error:
            self.refused = error
            warn_once(self.directory, error)
            return None
        if self._unscanned >= self.limit // 32:
            self._unscanned = 0
            self.tidy()
        return path

    def entries(self) -> Iterator[Entry | tuple[Path, Miss]]:
        """All entries, read and checked; for a damaged one its path and what is wrong with it."""
        for path in self._paths():
            found = read(path)
            yield found if isinstance(found, Entry) else (path, found)

    def tidy(self) -> None:
        """Removes what dead processes left half written, and the least recently used entries beyond the limit."""
        for parent in (self.directory, *self._parents()):
            remove_stale(parent)
        items = []
        for path in self._paths():
            with contextlib.suppress(OSError):  # removed by another process
                items.append(Item(path, folder_bytes(path), path.stat().st_mtime))
        evict(items, self.limit)

    def clear(self) -> int:
        """Removes everything; returns how many entries there were.

        Raises:
            OSError: something cannot be removed.
        """
        count = 0
        for parent in list(self._parents()):
            for path in folders(parent):
                count += 1
                if not any(remove(path) or not os.path.lexists(path) for _ in range(4)):
                    raise PermissionError(f"{path} cannot be removed")
            with contextlib.suppress(OSError):  # another process is about to write in it
                parent.rmdir()
        return count

    def _path(self, kind: str, name: str, fields: dict[str, Any]) -> Path:
        return self.directory / kind / folder_name(name) / digest(fields)

    def _parents(self) -> Iterator[Path]:
        for kind in folders(self.directory):
            yield from folders(kind)

    def _paths(self) -> Iterator[Path]:
        for parent in self._parents():
            yield from folders(parent)

    def _publish(self, path: Path, header: dict[str, Any], files: Mapping[str, bytes], replace: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.parent / f".new-{os.getpid()}-{secrets.token_hex(4)}"
        new.mkdir()
        try:
            for name, content in files.items():
                (new / name).write_bytes(content)
            (new / HEADER).write_text(json.dumps(header, indent=1), encoding="utf-8")
            contended = False
            for remaining in reversed(range(8)):
                try:
                    os.rename(new, path)
                    return
                except OSError as error:
                    if error.errno not in _TAKEN or not (remaining or contended):
                        raise
                if not replace and read(path):
                    return
                contended |= remove(path)  # again in its place: others are writing this entry just now, and may
        finally:
            shutil.rmtree(new, ignore_errors=True)
