"""Emitted modules: kernels and host functions in one Python file that can be read, edited and run again.

render(launchers)        the module's text
write_module(path, …)    that text in a file, replaced in one step
load_module(path)        the file as a module, by the import system
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from ..compiler.errors import UserError
from .kernel import Kernel, Launcher
from .kernel_text import call, opened

_IMPORTS = "import torch\nimport triton\nimport triton.language as tl\n"
_LIBDEVICE = "from triton.language.extra import libdevice\n"


def deduplicate(launchers: Sequence[Launcher]) -> list[Launcher]:
    """The same launchers, where kernels that differ only in their names are one kernel, the first of them.

    What the kernel serves (`ops`, `lines`, `made_by`) is joined from all of them.
    """
    first: dict[object, str] = {}
    merged: dict[str, Kernel] = {}
    renamed: list[tuple[Launcher, dict[str, str]]] = []
    for launcher in launchers:
        names: dict[str, str] = {}
        for kernel in launcher.kernels:
            name = names[kernel.name] = first.setdefault(identity(kernel), kernel.name)
            merged[name] = _joined(merged[name], kernel) if name in merged else kernel
        renamed.append((launcher, names))
    result = []
    for launcher, names in renamed:
        kernels = tuple(merged[name] for name in dict.fromkeys(names.values()))
        buffers = {names[kernel.name]: kernel.buffers for kernel in launcher.kernels}
        source = _rename(launcher.source, names)
        result.append(replace(launcher, source=source, kernels=kernels, buffers=buffers))
    return result


def identity(kernel: Kernel) -> tuple[object, ...]:
    """What makes two kernels the same program: everything but the name and what it serves.

    How many lines the parameters take depends on the name's length.
    """
    before, parameters, body = opened(_rename(kernel.source, {kernel.name: "kernel"}), "kernel")
    return (
        (before, tuple(parameters), body),
        tuple(kernel.signature.items()),
        tuple(kernel.constants.items()),
        kernel.num_warps,
        kernel.num_stages,
    )


def _rename(text: str, names: dict[str, str]) -> str:
    changed = {old: new for old, new in names.items() if old != new}
    if not changed:
        return text
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, changed))})\b")
    return pattern.sub(lambda match: changed[match.group(1)], text)


def _joined(a: Kernel, b: Kernel) -> Kernel:
    def join(x: tuple[str, ...], y: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*x, *y)))

    return replace(a, ops=join(a.ops, b.ops), lines=join(a.lines, b.lines), made_by=join(a.made_by, b.made_by))


def render(launchers: Sequence[Launcher], extra: str = "") -> str:
    """The module's text: imports, each kernel once with what it serves, the host functions, then `extra`.

    Kernels of one name must be one kernel (ValueError otherwise); pass the launchers through `deduplicate` to have
    equal kernels share a name.
    """
    kernels: dict[str, Kernel] = {}
    for launcher in launchers:
        for kernel in launcher.kernels:
            if kernels.setdefault(kernel.name, kernel).source != kernel.source:
                raise ValueError(f"two kernels are called {kernel.name}")
    imports = _IMPORTS + (_LIBDEVICE if any("libdevice" in k.source for k in kernels.values()) else "")
    parts = [imports, *(_comment(k) + k.source for k in kernels.values()), *(launcher.source for launcher in launchers)]
    return "\n\n".join(part.rstrip("\n") + "\n" for part in [*parts, *([extra] if extra else [])])


def _comment(kernel: Kernel) -> str:
    """What a kernel computes, from which lines, and which passes made it."""
    text = ""
    for title, items in (("", kernel.ops), ("lines: ", kernel.lines), ("made by: ", kernel.made_by)):
        if items:
            rows = call(f"# {title}", list(items), "")
            text += "".join(f"{row if row.startswith('#') else '#' + row}".rstrip() + "\n" for row in rows if row)
    return text


def write_module(path: str | os.PathLike[str], launchers: Sequence[Launcher], extra: str = "") -> None:
    """Writes `render(launchers, extra)` to `path`."""
    write_text(path, render(launchers, extra))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file in one step: another process sees the old file or the new one, never half.

    A file that holds just that text is left alone, so that a folder that nobody may write serves what it has.
    """
    target = Path(path)
    if _holds(target, text.encode()):
        with contextlib.suppress(OSError):
            os.utime(target)  # it was used
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.stat().st_size == len(content) and path.read_bytes() == content
    except OSError:
        return False


class _FromSource(SourceFileLoader):
    """Compiles the file as it is now. Bytecode beside it could be of another file of the same size and second."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def load_module(path: str | os.PathLike[str]) -> ModuleType:
    """Imports an emitted module from its file, under a name of its own.

    Raises UserError where Triton is missing or the file is not there.
    """
    if importlib.util.find_spec("triton") is None:
        raise UserError(
            "Triton is not installed, so no emitted kernel can be loaded",
            remedy="pip install triton   (Linux; without it use target=eager)",
        )
    target = Path(path).resolve()
    if not target.is_file():
        raise UserError(f"no emitted module at {target}")
    digest = hashlib.sha256(f"{target}\0".encode() + target.read_bytes()).hexdigest()[:16]
    name = f"fuseline_emitted_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, target, loader=_FromSource(name, str(target)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Triton looks its functions' modules up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
