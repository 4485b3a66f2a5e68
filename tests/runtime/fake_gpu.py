"""A GPU that records launches instead of running them: Triton's driver on a machine without one.

Kernels are really compiled, for sm_90. What runs is everything between `kernel[grid](…)` and the C launcher.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget


@dataclass
class FakeGpu:
    """launches: (kernel's name, grid, arguments as numbers, constants dropped), in order; overlapped: whether each may
    begin while the one before it ends."""

    launches: list[tuple[Any, ...]] = field(default_factory=list)
    overlapped: list[bool] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    scratch: int = 0  # bytes of global scratch memory that every kernel pretends to want

    def __post_init__(self) -> None:
        gpu = self

        class Launcher:
            """The Python side of Triton's CudaLauncher."""

            def __init__(self, src: Any, metadata: Any):
                self.constants = {k[0] for k in src.constants}
                self.global_scratch_size, self.profile_scratch_size = gpu.scratch, 0
                self.launch_cooperative_grid, self.launch_pdl = False, metadata.launch_pdl

            def launch(self, x, y, z, stream, function, *rest):
                _cooperative, overlapped, _scratch, _profile, packed, metadata, enter, _leave, *args = rest
                if enter is not None:
                    enter(metadata)
                given = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
                kept = tuple(a for i, a in enumerate(given) if i not in self.constants)
                gpu.overlapped.append(overlapped)
                gpu.launches.append((gpu.loaded[function], (x, y, z), stream, packed, kept))

            def __call__(self, x, y, z, stream, function, *args):
                self.launch(x, y, z, stream, function, False, False, None, None, *args)

        self.launcher_cls = Launcher
        self.utils = SimpleNamespace(
            load_binary=self._load, get_device_properties=lambda device: {"max_shared_mem": 232448}
        )

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        assert binary[:4] == b"\x7fELF"
        self.loaded.append(name)
        return 1, len(self.loaded) - 1, 32, 0, 1024

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """Triton and the launcher take CPU tensors for tensors on a GPU; both cache nothing outside this block."""
    from triton.compiler import compiler
    from triton.runtime.driver import driver

    from fuseline.runtime import kernels

    gpu = FakeGpu()
    before = driver._active
    monkeypatch.setattr(kernels, "device_index", lambda tensor: 0)
    monkeypatch.setattr(torch.cuda, "device", _NoDevice)
    monkeypatch.setattr(torch.cuda, "device_of", _NoDevice)
    compiler.max_shared_mem.cache_clear()
    driver.set_active(gpu)
    try:
        yield gpu
    finally:
        driver._active = before
        compiler.max_shared_mem.cache_clear()


class _NoDevice:
    """`torch.cuda.device` where there is none."""

    def __init__(self, index: Any):
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: Any) -> None:
        pass
