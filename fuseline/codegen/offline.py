"""Compiling kernels for GPUs that this machine does not have.

Triton's own compiler does it all: no driver, no device. `ptxas` and AMD's linker come with the wheel.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..compiler.errors import FuselineError, UserError, nearest
from .kernel import Kernel, Launcher
from .module_file import identity, load_module, write_module

#: name → (back end, architecture, threads in a warp)
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
}


class CompileError(FuselineError):
    """A kernel that Triton rejects for a target: a fault of the code generator."""


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code. `asm` maps a stage ("ttir", "ptx", "cubin", "amdgcn", …) to its text or bytes."""

    kernel: Kernel
    target: str
    shared_bytes: int
    num_warps: int
    asm: dict[str, str | bytes]


_DONE: dict[tuple[object, str], Compiled] = {}


def compile_kernel(kernel: Kernel, target: str) -> Compiled:
    """Compiles `kernel` with its constants for "sm_80", "sm_90" or "gfx942"; no GPU is needed.

    Pointers are taken as aligned to 16 bytes, as PyTorch allocates. Equal kernels are compiled once in a process.

    Raises:
        UserError: an unknown target, no Triton, or Triton in interpreter mode.
        CompileError: Triton rejects the kernel.
    """
    if target not in TARGETS:
        raise UserError(f"unknown target {target!r}{nearest(target, TARGETS)}")
    key = (identity(kernel), target)
    if key not in _DONE:
        _DONE[key] = _compile(kernel, target)
    done = _DONE[key]
    return Compiled(kernel, target, done.shared_bytes, done.num_warps, done.asm)


def _compile(kernel: Kernel, target: str) -> Compiled:
    triton, source_type, target_type = _triton()
    path = Path(_folder()) / f"{kernel.name}.py"
    write_module(path, [Launcher("unused", "", (kernel,))])
    function = getattr(load_module(path), kernel.name)
    signature = dict(kernel.signature)
    aligned = [["tt.divisibility", 16]]
    attributes = {(k,): aligned for k, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = source_type(function, signature, {name: kernel.constants[name] for name in kernel.constants}, attributes)
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    try:
        compiled = triton.compile(source, target=target_type(*TARGETS[target]), options=options)
    except Exception as error:  # Triton raises many types, all of which mean this
        raise CompileError(
            f"kernel {kernel.name} does not compile for {target}",
            details=[f"{type(error).__name__}: {line}" for line in str(error).splitlines()[:6]],
            remedy=f"read it in {path}",
        ) from error
    return Compiled(kernel, target, compiled.metadata.shared, compiled.metadata.num_warps, dict(compiled.asm))


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
