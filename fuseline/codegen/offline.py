"""Compiling kernels for GPUs that this machine does not have.

Triton's own compiler does it all: no driver, no device. `ptxas` and AMD's linker come with the wheel.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from ..compiler.early_launch import CAPABILITY, CONSTANT, OPTION
from ..compiler.errors import FuselineError, UserError, nearest
from .kernel import Kernel, Launcher
from .module_file import identity, load_module, write_module

#: name → (back end, architecture, threads in a warp)
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
}
#: What can be compiled for beside those; T4 and RTX 20, RTX 30, L4 and RTX 40, B200, RTX 50.
OTHERS: dict[str, tuple[str, int | str, int]] = {
    f"sm_{capability}": ("cuda", capability, 32) for capability in (75, 86, 89, 100, 120)
}
GPUS = {**TARGETS, **OTHERS}


class CompileError(FuselineError):
    """A kernel that Triton rejects for a target: a fault of the code generator."""


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code. `asm` maps a stage ("ptx", "cubin", "amdgcn", …) to its text or bytes; compiled here and
    now it has all stages, from a store (`stored`) the assembly and the binary."""

    kernel: Kernel
    target: str
    shared_bytes: int
    num_warps: int
    num_stages: int
    asm: dict[str, str | bytes]
    stored: bool = False


class Store(Protocol):
    """Keeps compiled kernels; `fuseline.runtime.kernel_store.KernelStore` is one. `made_of` is all they depend on."""

    def load(self, name: str, **made_of: Any) -> dict[str, bytes] | None: ...

    def save(
        self,
        name: str,
        files: Mapping[str, str | bytes],
        replace: bool = False,
        about: Mapping[str, Any] | None = None,
        **made_of: Any,
    ) -> None: ...


_FIGURES = ("shared", "num_warps", "num_stages")  # of Triton's metadata, in the order of `Compiled`
_DONE: dict[tuple[object, str, str | None], tuple[Compiled, str]] = {}


def compile_kernel(kernel: Kernel, target: str, store: Store | None = None) -> Compiled:
    """Compiles `kernel` with its constants for one of GPUS; no GPU is needed.

    Pointers are taken as aligned to 16 bytes, as PyTorch allocates. A constant `PTX` is whether the target is NVIDIA's,
    `PACKED` whether it is of capability 8.0 or later, too, whatever the kernel says. Equal kernels are compiled once in
    a process, and never where `store` has them.

    Raises:
        UserError: an unknown target, no Triton, or Triton in interpreter mode.
        CompileError: Triton rejects the kernel.
    """
    if target not in GPUS:
        raise UserError(f"unknown target {target!r}{nearest(target, GPUS)}")
    if known := _of_target(kernel, target):
        kernel = replace(kernel, constants=kernel.constants | known)
    if store is None:
        return replace(compile_once(kernel, target)[0], kernel=kernel)
    key = _made_of(kernel, target)
    files = store.load(kernel.name, **key)
    found = files and _from_files(kernel, target, files)
    if found:
        return found
    done, metadata = compile_once(kernel, target, named=True)
    about = {"ops": kernel.ops, "lines": kernel.lines, "made_by": kernel.made_by}
    store.save(kernel.name, {**done.asm, "json": metadata}, files is not None, about, **key)
    return done


def begins_early(kernel: Kernel, target: str) -> Kernel | None:
    """The kernel as it is launched where it begins while the one before it ends; None where no such GPU does that."""
    backend, architecture, _ = GPUS[target]
    if CONSTANT not in kernel.constants or backend != "cuda" or int(architecture) < CAPABILITY:
        return None
    return replace(kernel, constants={**kernel.constants, CONSTANT: True})


def _of_target(kernel: Kernel, target: str) -> dict[str, bool]:
    backend, architecture, _ = GPUS[target]
    nvidia = backend == "cuda"
    known = {"PTX": nvidia, "PACKED": nvidia and int(architecture) >= 80}
    return {name: known[name] for name in known if name in kernel.constants}


def _options(kernel: Kernel) -> dict[str, int]:
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    return options | ({OPTION: True} if kernel.constants.get(CONSTANT) else {})


def _made_of(kernel: Kernel, target: str) -> dict[str, Any]:
    """What a store keeps the compiled kernel by: as a launcher would ask for it."""
    backend, architecture, _ = GPUS[target]
    return {
        "source": kernel.source,
        "signature": kernel.signature,
        "divisible": [name for name, kind in kernel.signature.items() if kind.startswith("*")],
        "constants": kernel.constants,
        "options": _options(kernel),
        "target": (backend, architecture),
    }


def _from_files(kernel: Kernel, target: str, files: Mapping[str, bytes]) -> Compiled | None:
    """A stored kernel; None where the files are not those of one."""
    binary, text = ("hsaco", "amdgcn") if GPUS[target][0] == "hip" else ("cubin", "ptx")
    try:
        metadata = json.loads(files["json"])
        asm: dict[str, str | bytes] = {binary: files[binary], text: files[text].decode()}
        shared, warps, stages = (metadata[key] for key in _FIGURES)
        return Compiled(kernel, target, shared, warps, stages, asm, stored=True)
    except (KeyError, TypeError, ValueError):
        return None


def compile_once(kernel: Kernel, target: str, named: bool = False) -> tuple[Compiled, str]:
    """A kernel and Triton's metadata as JSON, compiled here with all stages.

    named: the binary's entry point must bear the kernel's own name, not that of an equal one.
    """
    key = (identity(kernel), target, kernel.name if named else None)
    if key not in _DONE:
        _DONE[key] = _compile(kernel, target)
    return _DONE[key]


def _compile(kernel: Kernel, target: str) -> tuple[Compiled, str]:
    """The compiled kernel, and Triton's metadata as JSON."""
    triton, source_type, target_type = _triton()
    path = Path(_folder()) / f"{kernel.name}.py"
    write_module(path, [Launcher("unused", "", (kernel,))])
    function = getattr(load_module(path), kernel.name)
    signature = dict(kernel.signature)
    aligned = [["tt.divisibility", 16]]
    attributes = {(k,): aligned for k, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = source_type(function, signature, {name: kernel.constants[name] for name in kernel.constants}, attributes)
    options = {**_options(kernel), "enable_fp_fusion": True}
    compile_it = lambda: triton.compile(source, target=target_type(*GPUS[target]), options=options)
    try:
        try:
            compiled = compile_it()
        except OSError:  # Triton's own cache cannot be written
            triton.knobs.cache.dir = _folder()
            compiled = compile_it()
    except Exception as error:  # Triton raises many types, all of which mean this
        raise CompileError(
            f"kernel {kernel.name} does not compile for {target}",
            details=[f"{type(error).__name__}: {line}" for line in str(error).splitlines()[:6]],
            remedy=f"read it in {path}",
        ) from error
    metadata = json.dumps(compiled.metadata._asdict(), default=vars)
    shared, warps, stages = (getattr(compiled.metadata, key) for key in _FIGURES)
    return Compiled(kernel, target, shared, warps, stages, dict(compiled.asm)), metadata


@cache
def _folder() -> str:
    """Where kernels lie while this process lives: Triton reads a kernel's source from its file."""
    return tempfile.mkdtemp(prefix=f"fuseline-offline-{os.getpid()}-")


def _triton() -> tuple[Any, Any, Any]:
    if importlib.util.find_spec("triton") is None:
        raise UserError(
            "Triton is not installed, so kernels cannot be compiled",
            remedy="pip install triton   (Linux; it needs no GPU)",
        )
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        raise UserError(
            "Triton is in interpreter mode, which compiles nothing",
            remedy="unset TRITON_INTERPRET and start the process again",
        )
    return triton, ASTSource, GPUTarget
