"""What code generation hands on: kernels as text, and the host function that launches them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class BufferUse:
    """A pointer argument of a kernel, and what it points to in one region.

    value: the region's node; for memory that only the launcher's kernels share, a name and its `shape` on the host.
    access: "read" or "write".
    """

    argument: str
    value: str
    access: str
    shape: tuple[int | str, ...] | None = None


@dataclass(frozen=True)
class Kernel:
    """One Triton kernel, complete enough to be compiled without a GPU.

    `source` is a `@triton.jit` function (and nothing else) that may use `triton`, `tl` and `libdevice`.
    `signature` maps each argument, in order, to its Triton type: "*bf16", "i32", "fp32", "constexpr", …
    `constants` gives every constexpr a value that the compile check uses and the launcher passes.
    """

    name: str
    source: str
    signature: dict[str, str]
    constants: dict[str, int | float | bool]
    ops: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    made_by: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    buffers: tuple[BufferUse, ...] = ()


@dataclass(frozen=True)
class Out:
    """A result that a host function writes into the tensor given by the keyword `parameter`, its own where none is.

    result: which of the region's results it is; shape, strides: in the graph's symbols, no strides where contiguous.
    """

    parameter: str
    result: int
    shape: tuple[Any, ...]
    strides: tuple[Any, ...] | None
    dtype: torch.dtype


@dataclass(frozen=True)
class Launcher:
    """A host function as text, `def <name>(<the region's placeholders>): …`, and the kernels it launches.

    It returns what the region's graph returns. It may use `torch`, `triton` and its kernels by name; kernels are
    launched as `kernel[grid](…, num_warps=…, num_stages=…)`, so the same text runs under Triton's interpreter.
    `buffers`: kernel → what its arguments are here, where regions share the kernel.
    """

    name: str
    source: str
    kernels: tuple[Kernel, ...] = field(default=())
    buffers: dict[str, tuple[BufferUse, ...]] = field(default_factory=dict)
    outs: tuple[Out, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """Why a region has no kernel; it then runs through PyTorch."""

    reason: str


def function_name(region: str) -> str:
    """The name of a region's host function; the region's own name is often that of a value."""
    return f"run_{region}"
