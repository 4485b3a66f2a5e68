"""Kernels that begin while those before them end: NVIDIA's programmatic dependent launch.

    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()    the next kernel's programs may take the places that become free
        tl.extra.cuda.gdc_wait()                 the kernels before have ended, and what they wrote is seen

A kernel's launch, some microseconds, then lies beside the end of the kernel before it. Every kernel waits before it
reads or writes anything; so one has ended only where all before it have, and whatever else is in the stream finds the
order of plain launches. DEPENDENT is False unless the runtime launches a kernel so (`runtime/dependent.py`), and such
a kernel's text means the same without those lines. Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch
and Synchronization".
"""

from __future__ import annotations

import re
from dataclasses import replace

from ..compiler.early_launch import CONSTANT
from .kernel import Kernel, Launcher
from .kernel_text import call, opened

MARK = "# the next kernel may begin"
"""A line of a template whose programs are long: the next kernel's, if they came early, would wait in the places that
this one's own need, unevenly. Kernels without it say so as they begin."""
_BEGIN, _WAIT = "tl.extra.cuda.gdc_launch_dependents()", "tl.extra.cuda.gdc_wait()"


def dependent(launcher: Launcher) -> Launcher:
    """The launcher with kernels that may be launched so."""
    return replace(launcher, kernels=tuple(map(_kernel, launcher.kernels)))


def _kernel(kernel: Kernel) -> Kernel:
    before, parameters, body = opened(kernel.source, kernel.name)
    head = call(f"def {kernel.name}(", [*parameters, f"{CONSTANT}: tl.constexpr = False"], "):")
    marked = re.sub(rf"^( +){MARK}$", rf"\1if {CONSTANT}:\n\1    {_BEGIN}", body, flags=re.MULTILINE)
    lines = [f"if {CONSTANT}:", *([f"    {_BEGIN}"] if marked == body else []), f"    {_WAIT}"]
    return replace(
        kernel,
        source=before + "\n".join([*head, *(f"    {line}" for line in lines)]) + marked,
        signature={**kernel.signature, CONSTANT: "constexpr"},
        constants={**kernel.constants, CONSTANT: False},
    )
