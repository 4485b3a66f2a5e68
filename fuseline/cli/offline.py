"""Compiles generated kernels for GPUs that this machine does not have, or finds them in the cache."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from typing import Any

from fuseline.cli.environment import has
from fuseline.codegen.lower import Lowered
from fuseline.codegen.offline import TARGETS, CompileError, begins_early, compile_kernel
from fuseline.codegen.resources import resources
from fuseline.compiler.progress import bar, step
from fuseline.runtime.kernel_store import KernelStore

Targets = dict[str, dict[str, Any]]  # target → what is known of one kernel there


def describe_kernels(lowered: Lowered, store: KernelStore | None = None) -> list[dict[str, Any]]:
    """The distinct kernels as data.

    Each has name, ops, lines (file:line of the user's code), made_by, count (regions that launch it), targets:
    {"sm_80": "ok" or the compiler's message}, empty without triton, and cached: the targets that were in the store
    (by default the cache on disk).
    """
    return summarise(lowered, compile_all(lowered, store))


def summarise(lowered: Lowered, compiled: dict[str, Targets]) -> list[dict[str, Any]]:
    """`describe_kernels` of kernels that `compile_all` compiled."""
    launches = Counter(kernel.name for launcher in lowered.launchers for kernel in launcher.kernels)
    return [
        {
            "name": kernel.name,
            "ops": list(kernel.ops),
            "lines": list(kernel.lines),
            "made_by": list(kernel.made_by),
            "count": launches[kernel.name],
            "targets": {target: found.get("error", "ok") for target, found in targets.items()},
            "cached": [target for target, found in targets.items() if found["cached"]],
        }
        for kernel in lowered.kernels
        for targets in [compiled.get(kernel.name, {})]
    ]


def compile_all(
    lowered: Lowered, store: KernelStore | None = None, only: Collection[str] | None = None
) -> dict[str, Targets]:
    """Kernel → target → {ok, cached, and error or its figures}, as the manifest's schema describes a target.

    only: the kernels to compile. Empty without Triton and under its interpreter.
    """
    if os.environ.get("TRITON_INTERPRET") == "1" or not has("triton"):
        return {}
    store = store or KernelStore()
    kernels = [k for k in lowered.kernels if only is None or k.name in only]
    found: dict[str, Targets] = {}
    with bar("compiling", len(kernels) * len(TARGETS)) as progress:
        for kernel in kernels:
            found[kernel.name] = {}
            for target in TARGETS:
                try:
                    compiled = compile_kernel(kernel, target, store)
                    figures = resources(compiled).to_json()
                    if (early := begins_early(kernel, target)) is not None:
                        compile_kernel(early, target, store)  # what launches of few programs look for
                    found[kernel.name][target] = {"ok": True, "cached": compiled.stored, **figures}
                except CompileError as error:  # a finding, not an end
                    said = error.details[-1] if error.details else error.headline
                    found[kernel.name][target] = {"ok": False, "cached": False, "error": said}
                step(progress, f"{kernel.name} for {target}")
    return found
