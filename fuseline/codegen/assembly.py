"""A kernel's code at each stage of Triton's compiler: ttir, ttgir, llir, then ptx and sass, or amdgcn."""

from __future__ import annotations

import subprocess

from ..compiler.errors import FuselineError, UserError, nearest
from .kernel import Kernel
from .offline import GPUS, Store, compile_kernel, compile_once

#: kind of code → the back ends that have it
KINDS = {
    "ttir": ("cuda", "hip"),
    "ttgir": ("cuda", "hip"),
    "llir": ("cuda", "hip"),
    "ptx": ("cuda",),
    "sass": ("cuda",),
    "amdgcn": ("hip",),
}
_DEFAULTS = {"cuda": "sm_90", "hip": "gfx942"}


def default_target(kind: str) -> str:
    """The target whose code is shown where none was asked for.

    Raises:
        UserError: there is no such kind of code.
    """
    if kind not in KINDS:
        raise UserError(f"no kind of code {kind!r}{nearest(kind, KINDS)}")
    return _DEFAULTS[KINDS[kind][0]]


def assembly(kernel: Kernel, kind: str, target: str | None = None, store: Store | None = None) -> str:
    """The text of `kernel` as `kind` for `target`, compiled without a GPU; PTX and AMD's assembly may be in `store`.

    Raises:
        UserError: an unknown kind or target, or a target without that kind.
        CompileError: Triton rejects the kernel.
        FuselineError: NVIDIA's disassembler, which Triton ships, cannot be run.
    """
    target = target or default_target(kind)
    if target in GPUS and GPUS[target][0] not in KINDS.get(kind, ("cuda", "hip")):
        raise UserError(f"{target} has no {kind}", remedy=f"--for {default_target(kind)}")
    default_target(kind)
    if kind in ("ttir", "ttgir", "llir"):  # no store keeps these
        compile_kernel(kernel, target)
        return str(compile_once(kernel, target, named=True)[0].asm[kind])
    compiled = compile_kernel(kernel, target, store) if store else compile_once(kernel, target, named=True)[0]
    if kind != "sass":
        return str(compiled.asm[kind])
    from triton.tools.disasm import get_sass

    try:
        text = get_sass(compiled.asm["cubin"])
    except (OSError, subprocess.CalledProcessError) as error:
        raise FuselineError("NVIDIA's disassembler cannot be run", [str(error)], "--asm ptx") from error
    if not text:
        raise FuselineError("NVIDIA's disassembler found no kernel in the binary", remedy="--asm ptx")
    return str(text)
