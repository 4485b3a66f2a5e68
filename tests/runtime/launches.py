"""A kernel to launch, and what counts compilations: for the launcher's tests with and without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fuseline.codegen.kernel import Kernel, Launcher
from fuseline.codegen.module_file import load_module, write_module

ADD = Kernel(
    "add",
    """@triton.jit(do_not_specialize=["rows"])
def add(x_ptr, y_ptr, stride, rows, BLOCK: tl.constexpr):
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = k < rows * 100
    tl.store(y_ptr + k, tl.load(x_ptr + k * stride, mask=inside) + 1, mask=inside)
""",
    {"x_ptr": "*fp32", "y_ptr": "*fp32", "stride": "i32", "rows": "i32", "BLOCK": "constexpr"},
    {"BLOCK": 128},
    num_warps=1,
    num_stages=1,
)
OPTIONS = {"BLOCK": 128, "num_warps": 1, "num_stages": 1}


def module(folder: Path, kernel: Kernel = ADD, extra: str = "") -> Any:
    folder.mkdir(exist_ok=True)
    write_module(folder / "kernels.py", [Launcher("unused", "", (kernel,))], extra)
    return load_module(folder / "kernels.py")


class Compiling:
    """Counts what Triton compiles."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        import triton

        self.names: list[str] = []
        real = triton.compile

        def compile(source: Any, **options: Any) -> Any:
            self.names.append(source.name)
            return real(source, **options)

        monkeypatch.setattr(triton, "compile", compile)
