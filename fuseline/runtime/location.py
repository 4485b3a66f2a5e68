"""Where compiled code is kept, and what happens where nothing can be kept.

A cache is a convenience: a folder that cannot be written costs time in the next process, never a result. The user
hears of it once.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

from ..compiler.errors import UserError
from .housekeeping import tidy_modules

SIZE = 1 << 30  # bytes, unless FUSELINE_CACHE_SIZE says otherwise
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_warned: set[str] = set()


class CacheWarning(UserWarning):
    """Compiled code could not be kept; results are not affected."""


def cache_root() -> Path:
    """`$FUSELINE_CACHE`, else `$XDG_CACHE_HOME/fuseline`, else `~/.cache/fuseline`; it need not exist."""
    given = os.environ.get("FUSELINE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fuseline"


def modules_root() -> Path:
    """Where generated modules are kept."""
    return cache_root() / "modules"


def size_limit() -> int:
    """Bytes of compiled code to keep: `FUSELINE_CACHE_SIZE` ("512M", "2 GiB", 0 for nothing), else 1 GiB.

    Raises:
        UserError: the variable is not a size.
    """
    text = os.environ.get("FUSELINE_CACHE_SIZE", "").strip()
    if not text:
        return SIZE
    match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([kmgt]?)(?:i?b)?", text.lower())
    if match is None:
        raise UserError(f"FUSELINE_CACHE_SIZE is {text!r}, which is not a size", remedy="FUSELINE_CACHE_SIZE=2GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def warn_once(directory: Path, error: OSError) -> None:
    """Says that `directory` keeps nothing, once in a process for each cache root."""
    root = str(cache_root())
    if root in _warned:
        return
    _warned.add(root)
    warnings.warn(
        f"compiled code cannot be kept in {directory}: {error.strerror or type(error).__name__}. Results are right; "
        "the next process compiles again. Set FUSELINE_CACHE to a folder that can be written and has room.",
        CacheWarning,
        stacklevel=3,
    )


def keep_module(write: Callable[[Path], Path], directory: Path | None = None) -> Path:
    """Writes a generated module by `write(directory)`, in `modules_root()` by default, and returns its path.

    Where that fails there is one warning, and the module goes into a folder that lives as long as this process.

    Raises:
        UserError: no folder at all can be written.
    """
    directory = modules_root() if directory is None else directory
    try:
        path = write(directory)
        _tidy(directory)
        return path
    except OSError as error:
        warn_once(directory, error)
    try:
        return write(temporary())
    except OSError as error:
        raise UserError(
            "there is nowhere to write a generated module",
            [f"{directory} cannot be written, nor can the folder for temporary files: {error}"],
            "set FUSELINE_CACHE (or TMPDIR) to a folder that can be written and has room",
        ) from error


@cache
def _tidy(directory: Path) -> None:
    """Once in a process: removes the generated modules least recently used, beyond the limit."""
    tidy_modules(directory, size_limit())


@cache
def temporary() -> Path:
    """A folder of this process, removed when it ends."""
    path = tempfile.mkdtemp(prefix="fuseline-")
    atexit.register(_remove, path, os.getpid())
    return Path(path)


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked child leaves its parent's folder alone
        shutil.rmtree(path, ignore_errors=True)
