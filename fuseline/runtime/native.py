"""What is written in C++: compiled with the machine's compiler when it is first asked for, kept in the cache.

Each has the same in Python beside it, which is what runs where there is no compiler, or no header of Python's or of
PyTorch's. (Triton needs the first two on every machine that runs its kernels; PyTorch's wheels bring the third.)
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import logging
import os
import secrets
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from .cache import Cache
from .entry import Entry
from .kernel_store import versions
from .location import temporary

log = logging.getLogger("fuseline")
KIND = "native"
COMPILERS = ("g++", "clang++", "c++")
LIBRARIES = ("-Wl,--as-needed", "-lc10", "-ltorch_cpu", "-ltorch_python")  # loaded already, and found by their names
STANDARD = "c++20"  # what PyTorch's headers are written in


class Missing(Exception):
    """Why there is no such module on this machine."""


@cache
def module(name: str) -> ModuleType | None:
    """The extension module made from `runtime/NAME.cpp`; None, and one line in the log, where it cannot be had."""
    try:
        return build(Path(__file__).with_name(f"{name}.cpp"), Cache())
    except Missing as reason:
        log.info("%s runs in Python, at a higher cost on the host: %s", name, reason)
        return None


def build(source: Path, store: Cache) -> ModuleType:
    """The module of a source file, from `store` if it was compiled before.

    Raises:
        Missing: it cannot be compiled or loaded here.
    """
    fields = {
        "source": hashlib.sha256(source.read_bytes()).hexdigest(),
        "python": sysconfig.get_config_var("EXT_SUFFIX") or "",
        "torch": versions()["torch"] or "",  # whose headers say where fields lie
        "compiler": os.environ.get("CXX", ""),
    }
    found = store.get(KIND, source.stem, fields)
    if isinstance(found, Entry):
        try:
            return _load(source.stem, found.path / _file(source.stem))
        except ImportError:  # it was compiled on another machine that shares the cache
            pass
    binary = _compile(source)
    kept = store.put(
        KIND, source.stem, fields, {_file(source.stem): binary}, because=str(found), replace=isinstance(found, Entry)
    )
    if kept is not None:
        path = kept / _file(source.stem)
    else:
        path = temporary() / f"{source.stem}-{secrets.token_hex(4)}.so"
        path.write_bytes(binary)
    try:
        return _load(source.stem, path)
    except ImportError as error:
        raise Missing(str(error)) from error


def _file(name: str) -> str:
    return f"{name}.so"


def _compile(source: Path) -> bytes:
    compiler = shlex.split(os.environ.get("CXX", "")) or [c for c in COMPILERS if shutil.which(c)][:1]
    if not compiler:
        raise Missing("no C++ compiler was found (CXX names one)")
    pytorch = Path(torch.__file__).parent
    headers = [f"-I{sysconfig.get_paths()['include']}", f"-isystem{pytorch / 'include'}"]
    libraries = [f"-L{pytorch / 'lib'}", *LIBRARIES]
    with tempfile.TemporaryDirectory(prefix="fuseline-") as folder:
        target = Path(folder) / _file(source.stem)
        options = ["-O2", f"-std={STANDARD}", "-shared", "-fPIC", *headers]
        command = [*compiler, *options, str(source), "-o", str(target), *libraries]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True)
            return target.read_bytes()
        except subprocess.CalledProcessError as error:
            lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines()
            raise Missing(lines[0] if lines else f"{compiler[0]} failed") from error
        except OSError as error:
            raise Missing(f"{compiler[0]}: {error.strerror or error}") from error


def _load(name: str, path: Path) -> ModuleType:
    """Raises ImportError."""
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    if spec is None:
        raise ImportError(f"{path} is no extension module")
    loaded = importlib.util.module_from_spec(spec)
    loader.exec_module(loaded)
    return loaded
