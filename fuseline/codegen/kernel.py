"""What code generation hands on: kernels as text, and the host function that launches them."""

from __future__ import annotations

from dataclasses import dataclass, field


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


@dataclass(frozen=True)
class Launcher:
    """A host function as text, `def <name>(<the region's placeholders>): …`, and the kernels it launches.

    It returns what the region's graph returns. It may use `torch`, `triton` and its kernels by name; kernels are
    launched as `kernel[grid](…, num_warps=…, num_stages=…)`, so the same text runs under Triton's interpreter.
    """

    name: str
    source: str
    kernels: tuple[Kernel, ...] = field(default=())


@dataclass(frozen=True)
class Refusal:
    """Why a region has no kernel; it then runs through PyTorch."""

    reason: str
