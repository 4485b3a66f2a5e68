"""Compiles generated kernels for GPUs that this machine does not have, or finds them in the cache."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from fuseline.cli.environment import has
from fuseline.codegen.lower import Lowered
from fuseline.codegen.offline import TARGETS, CompileError, compile_kernel
from fuseline.runtime.kernel_store import KernelStore


def describe_kernels(lowered: Lowered, store: KernelStore | None = None) -> list[dict[str, Any]]:
    """The distinct kernels as data.

    Each has name, ops, lines (file:line of the user's code), made_by, count (regions that launch it), targets:
    {"sm_80": "ok" or the compiler's message}, empty without triton, and cached: the targets that were in the store
    (by default the cache on disk).
    """
    compiled = compile_all(lowered, store or KernelStore()) if has("triton") else {}
    launches = Counter(kernel.name for launcher in lowered.launchers for kernel in launcher.kernels)
    return [
        {
            "name": kernel.name,
            "ops": list(kernel.ops),
            "lines": list(kernel.lines),
            "made_by": list(kernel.made_by),
            "count": launches[kernel.name],
            "targets": {target: said for target, (said, _) in compiled.get(kernel.name, {}).items()},
            "cached": [target for target, (_, stored) in compiled.get(kernel.name, {}).items() if stored],
        }
        for kernel in lowered.kernels
    ]


def compile_all(lowered: Lowered, store: KernelStore) -> dict[str, dict[str, tuple[str, bool]]]:
    """Kernel → target → ("ok", or the last line of what the compiler said; whether the store had it).

    Empty under Triton's interpreter.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return {}
    found: dict[str, dict[str, tuple[str, bool]]] = {}
    for kernel in lowered.kernels:
        found[kernel.name] = {}
        for target in TARGETS:
            try:
                found[kernel.name][target] = ("ok", compile_kernel(kernel, target, store).stored)
            except CompileError as error:  # a finding, not an end
                found[kernel.name][target] = (error.details[-1] if error.details else error.headline, False)
    return found
