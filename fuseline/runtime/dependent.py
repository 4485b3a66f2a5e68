"""Which launches begin while the kernels before them end (`codegen/dependent.py`)."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from math import prod
from typing import Any

from ..compiler.early_launch import CAPABILITY, CONSTANT, OPTION

VARIABLE = "FUSELINE_DEPENDENT_LAUNCH"
"""0: every kernel begins when the one before it has ended."""
PROGRAMS = 1024
"""At most: all are on the GPU at once, or nearly so. Each program of more would pay for a wait that is over."""
DRIVER = 12040  # the first whose captures know such launches


@cache
def possible(backend: str, capability: int) -> bool:
    """Whether a GPU and its driver launch kernels so."""
    if backend != "cuda" or capability < CAPABILITY or os.environ.get(VARIABLE) == "0":
        return False
    return _driver() >= DRIVER


def _driver() -> int:
    """The version of CUDA that the driver serves, as 12040 for 12.4; 0 where there is none."""
    found = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(found))
    except OSError:
        return 0
    return found.value


def early(grid: Any) -> bool:
    """Whether a launch of so many programs gains by it."""
    return type(grid) is tuple and prod(grid) <= PROGRAMS


def constants(begins_early: bool) -> dict[str, bool]:
    """What a kernel of the constant DEPENDENT is compiled with."""
    return {CONSTANT: True, OPTION: True} if begins_early else {CONSTANT: False}
