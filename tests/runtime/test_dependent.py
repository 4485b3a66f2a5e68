"""Which launches begin while the kernels before them end, on a GPU that only records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fuseline.codegen.dependent import dependent as with_constant
from fuseline.codegen.kernel import Launcher
from fuseline.codegen.offline import begins_early, compile_kernel
from fuseline.runtime import dependent
from fuseline.runtime.cache import Cache
from fuseline.runtime.kernel_store import KernelStore
from fuseline.runtime.kernels import wrap
from tests.runtime.fake_gpu import FakeGpu, fake_gpu
from tests.runtime.launches import ADD, OPTIONS, module

X = torch.zeros(4096)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    dependent.possible.cache_clear()
    monkeypatch.setattr(dependent, "_driver", lambda: 13000)
    with fake_gpu(monkeypatch) as fake:
        yield fake
    dependent.possible.cache_clear()


def kernel(folder: Path, store: KernelStore) -> Any:
    [add] = with_constant(Launcher("unused", "", (ADD,))).kernels
    return wrap(module(folder, add), store).add


@pytest.fixture
def store(tmp_path: Path) -> KernelStore:
    return KernelStore(Cache(tmp_path / "cache"))


def test_launches_of_few_programs_begin_early(gpu: FakeGpu, tmp_path: Path, store: KernelStore) -> None:
    add = kernel(tmp_path / "a", store)
    grids = ((4,), (dependent.PROGRAMS,), (dependent.PROGRAMS // 2, 3), (dependent.PROGRAMS + 1, 1, 1), (4,))
    for grid in grids:
        add[grid](X[:100], X[512:612], 7, 3, **OPTIONS)
    assert gpu.overlapped == [True, True, False, False, True]
    assert len(gpu.loaded) == 2, "one for each way"


def test_both_ways_are_found_by_the_next_process(gpu: FakeGpu, tmp_path: Path, store: KernelStore, monkeypatch) -> None:
    for grid in ((4,), (5000,)):
        kernel(tmp_path / "a", store)[grid](X[:100], X[512:612], 7, 3, **OPTIONS)
    monkeypatch.setattr("triton.compile", lambda *_, **__: pytest.fail("it is compiled again"))
    for grid in ((4,), (5000,)):
        kernel(tmp_path / "b", store)[grid](X[:100], X[512:612], 7, 3, **OPTIONS)
    assert gpu.overlapped == [True, False] * 2


def test_what_is_compiled_ahead_is_found(gpu: FakeGpu, tmp_path: Path, store: KernelStore, monkeypatch) -> None:
    [add] = with_constant(Launcher("unused", "", (ADD,))).kernels
    early = begins_early(add, "sm_90")
    assert early is not None and begins_early(add, "sm_89") is begins_early(add, "gfx942") is None
    for one in (add, early):
        compile_kernel(one, "sm_90", store)
    monkeypatch.setattr("triton.compile", lambda *_, **__: pytest.fail("it is compiled again"))
    for grid in ((4,), (5000,)):
        kernel(tmp_path / "a", store)[grid](X, X[512:], 7, 3, **OPTIONS)
    assert gpu.overlapped == [True, False]


def test_switched_off(gpu: FakeGpu, tmp_path: Path, store: KernelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dependent.VARIABLE, "0")
    kernel(tmp_path / "a", store)[(4,)](X[:100], X[512:612], 7, 3, **OPTIONS)
    assert gpu.overlapped == [False]


@pytest.mark.parametrize(
    ("backend", "capability", "driver", "expected"),
    [
        ("cuda", 90, 13000, True),
        ("cuda", 120, 12040, True),
        ("cuda", 89, 13000, False),
        ("cuda", 90, 12030, False),
        ("hip", 942, 13000, False),
    ],
)
def test_where_it_is_possible(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, backend: str, capability: int, driver: int, expected: bool
) -> None:
    monkeypatch.setattr(dependent, "_driver", lambda: driver)
    assert dependent.possible(backend, capability) is expected


def test_no_driver() -> None:
    assert dependent._driver() == 0 or torch.cuda.is_available()
