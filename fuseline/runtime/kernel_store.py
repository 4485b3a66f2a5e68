"""Compiled kernels in the cache: what makes two of them the same binary, and what is kept of one.

A kernel's binary depends on its source, on how its arguments are specialised (types, which are divisible by 16, which
are constants), on the options, the GPU's architecture, and the versions that compiled it. All of that is in the key,
by name, so that a miss can say which of it changed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .cache import KERNELS, Cache
from .entry import Entry, Miss

log = logging.getLogger("fuseline")
KEPT = ("json", "cubin", "ptx", "hsaco", "amdgcn")  # of what Triton leaves: metadata, binary, assembly to read
PACKAGES = ("triton", "torch", "fuseline")
# Variables that may change what Triton compiles are part of the key where they are set; these do not.
_PREFIXES = ("TRITON_", "PTXAS_", "NVPTX_", "AMDGCN_", "LLVM_", "MLIR_", "DISABLE_PTXAS", "DISABLE_LLVM", "DISABLE_MMA")
_HARMLESS = re.compile(r"TRITON_(HOME|INTERPRET|.*CACHE.*|.*_DIR|.*AUTOTUNING|LIBCUDA_PATH|LIBHIP_PATH)")


@cache
def versions() -> dict[str, str | None]:
    """The versions that are part of a kernel's key; None for what is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def fields(
    source: str,
    signature: Mapping[str, str],
    divisible: Iterable[str],
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
    target: tuple[str, int | str],
) -> dict[str, Any]:
    """A kernel's key.

    Args:
        source: the text of the function, with or without decorators.
        signature: argument → Triton type ("*bf16", "i32", "constexpr"), in order.
        divisible: the arguments whose value, or address, is a multiple of 16.
        constants: constexpr → value; options: num_warps, num_stages; target: ("cuda", 90).
    """
    body = re.search(r"^def .*", source, re.MULTILINE | re.DOTALL)
    text = (body[0] if body else source).strip()
    aligned = set(divisible)
    return {
        "source": hashlib.sha256(text.encode()).hexdigest(),
        "signature": {name: kind + (":16" if name in aligned else "") for name, kind in signature.items()},
        "constants": {name: repr(value) for name, value in constants.items()},
        "options": dict(options),
        "target": ":".join(map(str, target)),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(_PREFIXES) and not _HARMLESS.fullmatch(k)},
        **versions(),
    }


class KernelStore:
    """Binaries of kernels, found by `fields` and counted: `hits`, and `misses` by kernel with their reasons."""

    def __init__(self, cache: Cache | None = None):
        self.cache = Cache() if cache is None else cache
        self.hits = 0
        self.misses: dict[str, Miss] = {}

    def find(self, name: str, **made_of: Any) -> Entry | Miss:
        """The entry of the kernel `name`; `made_of` are the arguments of `fields`."""
        found = self.cache.get(KERNELS, name, fields(**made_of))
        if isinstance(found, Miss):
            self.misses[name] = found
            log.debug("kernel %s is compiled: %s", name, found)
        else:
            self.hits += 1
        return found

    def load(self, name: str, **made_of: Any) -> dict[str, bytes] | None:
        """The files of the kernel `name` by their endings ("cubin", "json", …), or None where it must be compiled."""
        found = self.find(name, **made_of)
        if isinstance(found, Miss):
            return None
        return {file.rpartition(".")[2]: data for file, data in found.files.items()}

    def save(
        self,
        name: str,
        files: Mapping[str, str | bytes],
        replace: bool = False,
        about: Mapping[str, Any] | None = None,
        **made_of: Any,
    ) -> None:
        """Keeps what Triton compiled, given by its files' endings; about: the kernel's ops, lines and makers."""
        kept = {f"{name[:150]}.{ending}": data for ending, data in files.items() if ending in KEPT}
        because = str(self.misses.get(name, ""))
        encoded = {file: data.encode() if isinstance(data, str) else data for file, data in kept.items()}
        self.cache.put(KERNELS, name, fields(**made_of), encoded, because, replace, about)
