"""Compiles generated kernels for GPUs that this machine does not have."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fuseline.cli.environment import has
from fuseline.codegen.kernel import Kernel
from fuseline.codegen.lower import Lowered
from fuseline.codegen.module_file import load_module
from fuseline.models.cache import cache_dir

# name → Triton's backend, architecture, threads of a warp
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}


def describe_kernels(lowered: Lowered) -> list[dict[str, Any]]:
    """The distinct kernels as data.

    Each has name, ops, lines (file:line of the user's code), made_by, count (regions that launch it) and targets:
    {"sm_80": "ok" or the compiler's message}, empty without triton.
    """
    compiled = compile_all(lowered) if has("triton") and lowered.kernels else {}
    launches = Counter(kernel.name for launcher in lowered.launchers for kernel in launcher.kernels)
    return [
        {
            "name": kernel.name,
            "ops": list(kernel.ops),
            "lines": list(kernel.lines),
            "made_by": list(kernel.made_by),
            "count": launches[kernel.name],
            "targets": compiled.get(kernel.name, {}),
        }
        for kernel in lowered.kernels
    ]


def compile_all(lowered: Lowered) -> dict[str, dict[str, str]]:
    """Kernel → target → "ok", or the first line of what the compiler said; empty under Triton's interpreter.

    The module is written to the cache first: Triton reads a kernel's source from its file.
    """
    from triton.runtime.jit import JITFunction

    module = load_module(lowered.write(cache_dir() / "modules"))
    functions = {kernel.name: getattr(module, kernel.name) for kernel in lowered.kernels}
    if not all(isinstance(function, JITFunction) for function in functions.values()):
        return {}
    return {
        kernel.name: {target: compile_kernel(functions[kernel.name], kernel, target) for target in TARGETS}
        for kernel in lowered.kernels
    }


def compile_kernel(function: Any, kernel: Kernel, target: str) -> str:
    """Compiles down to the target's binary, without a GPU. Returns "ok" or why not."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=function, signature=dict(kernel.signature), constexprs=dict(kernel.constants))
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    try:
        triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    except Exception as error:  # a compiler's failure is the finding here, whatever its class
        return (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return "ok"
